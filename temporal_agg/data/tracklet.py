"""A tracklet (the frames of one person in one camera, in order) and a data set made of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["ImageError", "Tracklet", "TrackletData"]


class ImageError(OSError):
    """A frame that cannot be used; the message names its path."""


@dataclass(frozen=True, eq=False)
class Tracklet:
    """One person's frames in one camera, in temporal order.

    Anything with ``pid``, ``camera``, ``name``, ``len()`` and ``load()`` can stand in for it.

    Args:
        frames: paths of image files, or uint8 RGB arrays ``[h, w, 3]`` that are in memory already.
        pid: the identity; negative = junk, ignored in evaluation.
        camera: -1 = unknown.
        name: what messages call it.

    Raises:
        ValueError: no frame.
    """

    frames: Sequence[str | Path | np.ndarray]
    pid: int
    camera: int = -1
    name: str = ""

    def __post_init__(self):
        if isinstance(self.frames, (str, Path)):
            raise TypeError(f"frames must be a sequence of paths or arrays, got the single path {str(self.frames)!r}.")
        if len(self.frames) == 0:
            raise ValueError(f"{self._label()} has no frame: leave it out or give it at least one.")

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
        place = {tracklet_key(t): i for i, t in enumerate(self.gallery)}
        return [place.get(tracklet_key(t), -1) for t in self.query]

    def check_retrieval(self) -> "TrackletData":
        """Returns the data set itself if at least one query can be found in the gallery.

        Raises:
            ValueError: no query or no gallery tracklet, no identity in common, or every common identity in one and the
                same camera only (an evaluation ignores the same person in the same camera).
        """
        for split in ("query", "gallery"):
            if not getattr(self, split):
                raise ValueError(f"data set {self.name!r} has no {split} tracklet: nothing can be retrieved.")
        common = {t.pid for t in self.query} & {t.pid for t in self.gallery if t.pid >= 0}
        if not common:
            raise ValueError(
                f"query and gallery of data set {self.name!r} have no identity in common "
                f"(query: {_some(t.pid for t in self.query)}; gallery: {_some(t.pid for t in self.gallery)}): no query "
                "has a match. Name an identity by the same number in both."
            )
        cameras: dict[int, set[int]] = {}
        for t in self.gallery:
            cameras.setdefault(t.pid, set()).add(t.camera)
        if not any(t.camera == -1 or cameras[t.pid] - {t.camera} for t in self.query if t.pid in common):
            raise ValueError(
                f"every query of data set {self.name!r} has its matches in its own camera only, where they are ignored:"
                " no query has a match. If the camera is unknown or there is just one, set it to -1."
            )
        return self


def tracklet_key(tracklet: Tracklet) -> object:
    """Equal for tracklets that are the same one: the same files in the same order, or the same object."""
    frames = getattr(tracklet, "frames", ())
    if frames and not any(isinstance(f, np.ndarray) for f in frames):
        return tuple(map(str, frames))
    return id(tracklet)


def _some(pids: Iterable[int], shown: int = 5) -> str:
    pids = sorted(set(pids))
    return ", ".join(map(str, pids[:shown])) + (f", ... ({len(pids)} in all)" if len(pids) > shown else "")
