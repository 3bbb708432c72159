"""A tracklet (the frames of one person in one camera, in order) and a data set made of them."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .flow import COMMAND, FlowError, flow_file, read_flow

__all__ = ["ImageError", "Tracklet", "TrackletData", "check_flow"]


class ImageError(OSError):
    """A frame that cannot be used; the message names its path."""


@dataclass(frozen=True, eq=False, slots=True)
class FrameFiles(Sequence):
    """The paths of one folder's files: a million of them weigh their names alone, and no object each.

    Args:
        folder: where they lie.
        names: bytes ``[T]`` (numpy's ``S``), encoded as the file system has them.
    """

    folder: str
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int | slice) -> "str | FrameFiles":
        if isinstance(index, slice):
            return FrameFiles(self.folder, self.names[index])
        return os.path.join(self.folder, os.fsdecode(self.names[index]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FrameFiles):
            return NotImplemented
        return self.folder == other.folder and np.array_equal(self.names, other.names)

    def __hash__(self) -> int:
        return hash((self.folder, len(self), *self.names[:1].tolist()))


@dataclass(frozen=True, eq=False)
class Tracklet:
    """One person's frames in one camera, in temporal order.

    Anything with ``pid``, ``camera``, ``name``, ``len()`` and ``load()`` (and ``load_flow()``, for models that take
    optical flow) can stand in for it.

    Args:
        frames: paths of image files, or uint8 RGB arrays ``[h, w, 3]`` that are in memory already.
        pid: the identity; negative = junk, ignored in evaluation.
        camera: -1 = unknown.
        name: what messages call it.
        flow: where its optical flow is: None = in the file beside its first frame that ``recipes/compute_flow.py``
            writes; or the folder that was that command's ``--out``; or arrays ``[2, h, w]``, one a frame: dx and dy to
            the next frame, in pixels of ``h x w``.

    Raises:
        ValueError: no frame, or arrays of flow that are not one a frame.
    """

    frames: Sequence[str | Path | np.ndarray]
    pid: int
    camera: int = -1
    name: str = ""
    flow: str | Path | Sequence[np.ndarray] | None = None

    def __post_init__(self):
        if isinstance(self.frames, (str, Path)):
            raise TypeError(f"frames must be a sequence of paths or arrays, got the single path {str(self.frames)!r}.")
        if len(self.frames) == 0:
            raise ValueError(f"{self._label()} has no frame: leave it out or give it at least one.")
        if not isinstance(self.flow, (str, Path, type(None))) and len(self.flow) != len(self.frames):
            raise ValueError(
                f"{self._label()} has {len(self.frames)} frames and flow for {len(self.flow)}: give one array a frame "
                "(the last frame repeats the one before)."
            )

    def __len__(self) -> int:
        return len(self.frames)

    def load(self, indices: Iterable[int]) -> list[Tensor]:
        """Reads frames.

        Args:
            indices: which, in the order wanted.

        Returns:
            One uint8 RGB tensor ``[3, h, w]`` each; greyscale, palette and RGBA files become RGB.

        Raises:
            ImageError: a file that is missing, truncated or no 8-bit image, or an array of another shape or type.
        """
        return [self._load(int(i)) for i in indices]

    def load_flow(self, indices: Iterable[int]) -> list[Tensor]:
        """Reads optical flow.

        Args:
            indices: of which frames, in the order wanted; none checks that the flow is there.

        Returns:
            One float32 tensor ``[2, h, w]`` each, dx (to the right) and dy (down) from the frame to the next one of the
            tracklet, in pixels of ``h x w``, which need not be the frames' size. The last frame repeats the one before.

        Raises:
            FlowError: no flow, a damaged file, or an array of another shape.
        """
        if self.flow is not None and not isinstance(self.flow, (str, Path)):
            return [self._flow(int(i)) for i in indices]
        return read_flow(self._flow_file, map(int, indices), len(self), self._label())

    @cached_property
    def _flow_file(self) -> Path:
        if any(isinstance(frame, np.ndarray) for frame in self.frames):
            raise FlowError(
                f"{self._label()} has no optical flow, and frames in memory have no file beside them: pass "
                "Tracklet(..., flow=[one array a frame]), or build the model with flow=False."
            )
        return flow_file(self.frames, self.flow)

    def _flow(self, index: int) -> Tensor:
        flow = np.asarray(self.flow[index])
        if flow.ndim != 3 or flow.shape[0] != 2 or flow.dtype.kind != "f":
            raise FlowError(
                f"the flow of frame {index} of {self._label()} must be a floating-point array [2, h, w], got "
                f"{flow.dtype} {list(flow.shape)}."
            )
        return torch.from_numpy(flow.astype(np.float32))

    def _load(self, index: int) -> Tensor:
        frame = self.frames[index]
        if isinstance(frame, np.ndarray):
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                raise ImageError(
                    f"frame {index} of {self._label()} must be a uint8 RGB array [h, w, 3], got {frame.dtype} "
                    f"{list(frame.shape)}."
                )
            pixels = frame.copy()
        else:
            pixels = self._read(frame, index)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def _read(self, path: str | Path, index: int) -> np.ndarray:
        try:
            with Image.open(path) as image:
                if image.mode[0] in "IF":
                    raise ValueError(f"it has more than 8 bits a channel (mode {image.mode}): convert it to 8 bits")
                return np.array(image.convert("RGB"))
        except Exception as error:  # decoders raise what they stumble over: OSError, SyntaxError, struct.error, ...
            raise ImageError(
                f"cannot read the image {path} (frame {index} of {self._label()}): {error or type(error).__name__}. "
                "Restore the file, or leave it out of the tracklet."
            ) from error

    def _label(self) -> str:
        return f"tracklet {self.name!r}" if self.name else f"the tracklet of identity {self.pid}, camera {self.camera}"


@dataclass(frozen=True, eq=False)
class TrackletData:
    """A data set: tracklets to train on, and queries to be found in a gallery.

    Attributes:
        train: training tracklets, of other identities than the test's.
        query: tracklets to search for.
        gallery: tracklets to search in; may contain the queries.
        name: what messages call it.
    """

    train: list[Tracklet]
    query: list[Tracklet]
    gallery: list[Tracklet]
    name: str = ""

    @property
    def label_map(self) -> dict[int, int]:
        """Training identity -> class index 0 .. K-1, in the order of the identities.

        Raises:
            ValueError: no training tracklet.
        """
        if not self.train:
            raise ValueError(f"data set {self.name!r} has no training tracklet: it can only be evaluated on.")
        return {pid: label for label, pid in enumerate(sorted({t.pid for t in self.train}))}

    @property
    def query_index(self) -> list[int]:
        """For each query its own place in the gallery, -1 where the gallery does not contain it."""
        return query_index(self.query, self.gallery)

    def with_flow_root(self, root: str | Path) -> "TrackletData":
        """The same data set, its optical flow in the folder ``root`` (``--out`` of ``recipes/compute_flow.py``).

        Tracklets in memory, and those that carry flow already, stay as they are.
        """

        def pointed(t: Tracklet) -> Tracklet:
            files = isinstance(t, Tracklet) and not isinstance(t.frames[0], np.ndarray)
            return replace(t, flow=root) if files and t.flow is None else t

        splits = {split: [pointed(t) for t in getattr(self, split)] for split in ("train", "query", "gallery")}
        return replace(self, **splits)

    def check_retrieval(self) -> "TrackletData":
        """Returns the data set itself if at least one query can be found in the gallery.

        Raises:
            ValueError: no query or no gallery tracklet, no identity in common, or every common identity in one and the
                same camera only (an evaluation ignores the same person in the same camera).
        """
        for split in ("query", "gallery"):
            if not getattr(self, split):
                raise ValueError(f"data set {self.name!r} has no {split} tracklet: nothing can be retrieved.")
        junk = [t for t in self.query if t.pid < 0]
        if junk:
            raise ValueError(
                f"data set {self.name!r} has {len(junk)} query tracklets of persons below 0, which is junk, such as "
                f"{junk[0].name!r}: nobody can search for them. Take them out of the queries."
            )
        common = {t.pid for t in self.query} & {t.pid for t in self.gallery if t.pid >= 0}
        if not common:
            raise ValueError(
                f"query and gallery of data set {self.name!r} have no identity in common "
                f"(query: {_some(t.pid for t in self.query)}; gallery: {_some(t.pid for t in self.gallery)}): no query "
                "has a match. Name an identity by the same number in both."
            )
        cameras: dict[int, list[int]] = {}
        for t in self.gallery:
            cameras.setdefault(t.pid, []).append(t.camera)
        itself = [own >= 0 for own in self.query_index]
        if not any(
            len(cameras[t.pid]) > own if t.camera == -1 else set(cameras[t.pid]) - {t.camera}
            for t, own in zip(self.query, itself, strict=True)
            if t.pid in common
        ):
            raise ValueError(
                f"every query of data set {self.name!r} has its matches in its own camera only, or no other tracklet "
                "than itself, which are ignored: no query has a match. If the camera is unknown or there is just one, "
                "set it to -1."
            )
        return self


def check_flow(tracklets: Iterable[Tracklet]) -> None:
    """Raises unless every tracklet has optical flow for its frames; reads none of it.

    Raises:
        FlowError: the first that has none.
    """
    for tracklet in tracklets:
        if not hasattr(tracklet, "load_flow"):
            raise FlowError(
                f"{getattr(tracklet, 'name', tracklet)!r} has no optical flow: it is no tracklet of files, for which "
                f"it can be computed ({COMMAND}). Build the model with flow=False."
            )
        tracklet.load_flow([])


def query_index(query: Iterable[Tracklet], gallery: Iterable[Tracklet]) -> list[int]:
    """For each query its own place in the gallery, -1 where the gallery does not contain it."""
    place = {tracklet_key(t): i for i, t in enumerate(gallery)}
    return [place.get(tracklet_key(t), -1) for t in query]


def tracklet_key(tracklet: Tracklet) -> object:
    """Equal for tracklets that are the same one: the same files in the same order, or the same object."""
    frames = getattr(tracklet, "frames", ())
    if isinstance(frames, FrameFiles):
        return frames
    if frames and not any(isinstance(f, np.ndarray) for f in frames):
        return tuple(map(str, frames))
    return id(tracklet)


def _some(pids: Iterable[int], shown: int = 5) -> str:
    pids = sorted(set(pids))
    return ", ".join(map(str, pids[:shown])) + (f", ... ({len(pids)} in all)" if len(pids) > shown else "")
