"""A tracklet (the frames of one person in one camera, in order) and a data set made of them."""

import logging
import operator
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from .flow import COMMAND, FlowError, flow_file, read_flow
from .images import ImageError, open_image

__all__ = ["Tracklet", "TrackletData", "check_flow", "query_index", "skip_unreadable", "unreadable", "windows"]

IDS = 2**63  # identities and cameras are smaller

_logger = logging.getLogger(__name__)

Frame = str | Path | np.ndarray


@dataclass(frozen=True, eq=False, slots=True)
class FrameFiles(Sequence[str]):
    """The paths of one folder's files: a million of them weigh their names alone, and no object each.

    Args:
        folder: where they lie.
        names: bytes ``[T]`` (numpy's ``S``), encoded as the file system has them.
    """

    folder: str
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> "FrameFiles": ...

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


@dataclass(frozen=True, eq=False, repr=False)
class Tracklet:
    """One person's frames in one camera, in temporal order.

    Anything with ``pid``, ``camera``, ``name``, ``len()`` and ``load()`` (and ``load_flow()``, for models that take
    optical flow) can stand in for it.

    Args:
        frames: paths of image files, or uint8 RGB arrays ``[h, w, 3]`` that are in memory already. Each may have a size
            of its own, as the boxes of a tracker have: each is resized to what the model takes.
        pid: the identity, from 0; -1 = junk: never trained on, ignored in evaluation.
        camera: from 0; -1 = unknown.
        name: what messages call it.
        flow: where its optical flow is: None = in the file beside its first frame that ``recipes/compute_flow.py``
            writes; or the folder that was that command's ``--out``; or arrays ``[2, h, w]``, one a frame: dx and dy to
            the next frame, in pixels of ``h x w``.
        ambiguous_pid: somebody else who is seen as well: for queries of that identity the tracklet is neither a match
            nor wrong.

    Raises:
        TypeError: a path in place of a sequence of them, or an identity or camera that is no integer.
        ValueError: no frame, arrays of flow that are not one a frame, an identity or camera below -1 or from 2**63 on.

    Example:
        >>> import numpy as np
        >>> from temporal_agg import Tracklet
        >>> crops = [np.zeros((128, 64, 3), np.uint8) for _ in range(5)]
        >>> tracklet = Tracklet(crops, pid=12, camera=3, name="door")
        >>> len(tracklet), tracklet.load([0, 4])[1].shape
        (5, torch.Size([3, 128, 64]))
    """

    frames: Sequence[Frame]
    pid: int
    camera: int = -1
    name: str = ""
    flow: str | Path | Sequence[np.ndarray] | None = None
    ambiguous_pid: int | None = None

    def __post_init__(self):
        if isinstance(self.frames, (str, Path)):
            raise TypeError(f"frames must be a sequence of paths or arrays, got the single path {str(self.frames)!r}.")
        if len(self.frames) == 0:
            raise ValueError(f"{self._label()} has no frame: leave it out or give it at least one.")
        check_ids(self.pid, self.camera, self._label())
        flow = self.flow
        if flow is not None and not isinstance(flow, (str, Path)) and len(flow) != len(self.frames):
            raise ValueError(
                f"{self._label()} has {len(self.frames)} frames and flow for {len(flow)}: give one array a frame "
                "(the last frame repeats the one before)."
            )

    def __repr__(self) -> str:
        return f"Tracklet({self.name!r}, pid={self.pid}, camera={self.camera}, {len(self)} frames)"

    def __len__(self) -> int:
        return len(self.frames)

    def load(self, indices: Iterable[int]) -> list[Tensor]:
        """Reads frames.

        Args:
            indices: which, in the order wanted.

        Returns:
            One uint8 RGB tensor ``[3, h, w]`` each; what files become is said at :func:`open_image`.

        Raises:
            ImageError: a file that is missing, truncated or no image, or an array of another shape or type.
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
        if self._has_flow_arrays():
            return [self._flow(int(i)) for i in indices]
        return read_flow(self._flow_file, map(int, indices), len(self), self._label())

    def _has_flow_arrays(self) -> bool:
        return not isinstance(self.flow, (str, Path, type(None)))

    @cached_property
    def _flow_file(self) -> Path:
        files = file_names(self)
        if files is None:
            raise FlowError(
                f"{self._label()} has no optical flow, and frames in memory have no file beside them: pass "
                "Tracklet(..., flow=[one array a frame]), or build the model with flow=False."
            )
        return flow_file(files, self.flow)  # type: ignore[arg-type]  # no arrays of flow here

    def _flow(self, index: int) -> Tensor:
        flow = np.asarray(self.flow[index])  # type: ignore[index]
        if flow.ndim != 3 or flow.shape[0] != 2 or flow.dtype.kind != "f":
            raise FlowError(
                f"the flow of frame {index} of {self._label()} must be a floating-point array [2, h, w], got "
                f"{flow.dtype} {list(flow.shape)}."
            )
        return torch.from_numpy(flow.astype(np.float32))

    def _load(self, index: int) -> Tensor:
        frame = self.frames[index]
        if isinstance(frame, np.ndarray):
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
                raise ImageError(
                    f"frame {index} of {self._label()} must be a uint8 RGB array [h, w, 3], got {frame.dtype} "
                    f"{list(frame.shape)}{'' if frame.size else ': leave out boxes that lie outside of the image'}."
                )
            pixels = frame.copy()
        elif not isinstance(frame, (str, os.PathLike)):
            raise ImageError(
                f"frame {index} of {self._label()} must be a path or a uint8 RGB array [h, w, 3], got "
                f"{type(frame).__name__}: pass numpy.asarray of it."
            )
        else:
            try:
                pixels = np.array(open_image(frame))
            except ImageError as error:
                raise ImageError(
                    f"{error} It is frame {index} of {self._label()}: restore the file, or leave it out."
                ) from error
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def _label(self) -> str:
        return f"tracklet {self.name!r}" if self.name else f"the tracklet of identity {self.pid}, camera {self.camera}"


@dataclass(frozen=True, eq=False, repr=False)
class TrackletData:
    """A data set: tracklets to train on, and queries to be found in a gallery.

    Attributes:
        train: training tracklets, of other identities than the test's. Junk (pid -1) is not trained on: it is left out.
        query: tracklets to search for.
        gallery: tracklets to search in; may contain the queries.
        name: what messages call it.
    """

    train: list[Tracklet]
    query: list[Tracklet]
    gallery: list[Tracklet]
    name: str = ""

    def __post_init__(self):
        people = [t for t in self.train if t.pid >= 0]
        if len(people) < len(self.train):
            left = len(self.train) - len(people)
            _logger.warning("%s: %d training tracklets of pid -1 (junk) are left out.", self.name or "data set", left)
            object.__setattr__(self, "train", people)

    def __repr__(self) -> str:
        counts = ", ".join(f"{split}={len(getattr(self, split))}" for split in ("train", "query", "gallery"))
        return f"TrackletData({self.name!r}, {counts})"

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
        """For each query its own place in the gallery, -1 where the gallery does not contain it.

        See :func:`query_index`.
        """
        return query_index(self.query, self.gallery)

    def with_flow_root(self, root: str | Path) -> "TrackletData":
        """The same data set, its optical flow in the folder ``root`` (``--out`` of ``recipes/compute_flow.py``).

        Tracklets in memory, and those that carry flow already, stay as they are.
        """

        root = os.path.expanduser(root)

        def pointed(tracklets: list[Tracklet]) -> list[Tracklet]:
            return [
                replace(t, flow=root) if isinstance(t, Tracklet) and t.flow is None and file_names(t) else t
                for t in tracklets
            ]

        return TrackletData(pointed(self.train), pointed(self.query), pointed(self.gallery), self.name)

    def check_training(self) -> "TrackletData":
        """Returns the data set itself if it can be trained on; where it has a test part, that is checked, too.

        People who are in both train and test are named in a warning: the figures flatter a model that has seen them.

        Raises:
            ValueError: no training tracklet, and as :meth:`check_retrieval` where there is a query or a gallery.
        """
        _ = self.label_map
        return self.check_retrieval() if self.query or self.gallery else self

    def check_retrieval(self) -> "TrackletData":
        """Returns the data set itself if at least one query can be found in the gallery.

        Raises:
            ValueError: no query or no gallery tracklet, no identity in common, or every common identity in one and the
                same camera only (an evaluation ignores the same person in the same camera).
        """
        for split in ("query", "gallery"):
            if not getattr(self, split):
                raise ValueError(f"data set {self.name!r} has no {split} tracklet: nothing can be retrieved.")
        for t in (*self.query, *self.gallery):
            check_ids(t.pid, t.camera, f"data set {self.name!r}, {getattr(t, 'name', '')!r}")
        junk = [t for t in self.query if t.pid < 0]
        if junk:
            raise ValueError(
                f"data set {self.name!r} has {len(junk)} query tracklets of pid -1, which is junk, such as "
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
        both = {t.pid for t in self.train} & {t.pid for t in (*self.query, *self.gallery)}
        if both:
            _logger.warning(
                "data set %r: %d people are in both train and test (%s): figures will flatter what was trained on it. "
                "Give test people other numbers, or take them out of train.",
                *(self.name, len(both), _some(both)),
            )
        return self


def check_tracklets(tracklets: Any) -> None:
    """Raises a TypeError unless these are several tracklets, each of which can load its frames."""
    wanted = "tracklets must be a list of tracklets"
    if hasattr(tracklets, "load"):
        raise TypeError(f"{wanted}, got a single {type(tracklets).__name__}: write [tracklet].")
    if isinstance(tracklets, TrackletData):
        raise TypeError(f"{wanted}, got {tracklets}: take its train, query or gallery.")
    if not hasattr(tracklets, "__len__"):
        raise TypeError(f"{wanted}, got {type(tracklets).__name__}.")
    for i, tracklet in enumerate(tracklets):
        if not hasattr(tracklet, "load"):
            raise TypeError(f"{wanted}, but tracklets[{i}] is {tracklet!r:.80}: write Tracklet(frames, pid, camera).")


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


def check_ids(pid: int, camera: int, where: str) -> None:
    """Raises unless identity and camera are integers that an evaluation takes; ``where`` begins the message."""
    for value, what, meaning in ((pid, "pid", "junk"), (camera, "camera", "unknown")):
        try:
            fits = -1 <= operator.index(value) < IDS
        except TypeError:
            raise TypeError(f"{where}: {what} must be an integer, got {value!r}.") from None
        if not fits:
            said = str(value) if -IDS < value < IDS else "one of more than 63 bits"
            raise ValueError(f"{where}: {what} must be -1 ({meaning}) or 0 to 2**63 - 1, got {said}.")


def file_names(tracklet: Tracklet) -> Sequence[str | Path] | None:
    """The frames' files; None if some or all frames are in memory."""
    frames: Any = getattr(tracklet, "frames", ())
    if isinstance(frames, FrameFiles):
        return frames
    return frames if len(frames) and not any(isinstance(f, np.ndarray) for f in frames) else None


def tracklet_key(tracklet: Tracklet) -> object:
    """Equal for tracklets that are the same one: the same files in the same order, or the same object."""
    files = file_names(tracklet)
    if files is None:
        return id(tracklet)
    return files if isinstance(files, FrameFiles) else tuple(map(str, files))


def query_index(query: Sequence[Tracklet], gallery: Sequence[Tracklet]) -> list[int]:
    """For each query its own place in the gallery, -1 where the gallery does not contain it.

    A query is known by its files, whatever path they are reached by (a link, another spelling), and by what is in them:
    a copy, of the same identity and in the same or an unknown camera, is the query itself. Only files of equal number
    and sizes are read.
    """
    same = _Same()
    place = {tracklet_key(t): i for i, t in enumerate(gallery)}
    candidates: dict[tuple[int, int], list[int]] = {}
    for i, t in enumerate(gallery):
        candidates.setdefault((t.pid, _length(t)), []).append(i)

    def find(t: Tracklet) -> int:
        own = place.get(tracklet_key(t), -1)
        others = candidates.get((t.pid, _length(t)), ()) if own < 0 else ()
        return next((i for i in others if same(t, gallery[i])), own)

    return [find(t) for t in query]


def distinct(tracklets: Iterable[Tracklet]) -> list[Tracklet]:
    """The tracklets without those that are the same as an earlier one (see :func:`query_index`)."""
    same, kept = _Same(), dict[object, Tracklet]()
    groups: dict[tuple[int, int], list[Tracklet]] = {}
    for t in tracklets:
        group = groups.setdefault((t.pid, len(t)), [])
        if tracklet_key(t) not in kept and not any(same(t, other) for other in group):
            kept[tracklet_key(t)] = t
            group.append(t)
    return list(kept.values())


def _length(tracklet: Tracklet) -> int:
    """0 for what has an identity and a camera, and no frames."""
    return len(frames) if (frames := getattr(tracklet, "frames", None)) is not None else 0


class _Same:
    """Whether two tracklets of equal length are the same; keeps what it has read of them."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, str], Any] = {}  # by tracklet and kind of fact

    def __call__(self, a: Tracklet, b: Tracklet) -> bool:
        if not (getattr(a, "frames", None) is not None and getattr(b, "frames", None) is not None):
            return False
        # One frame decides nearly always; the others are looked at where it is equal.
        first, second = self.fact(a, "first"), self.fact(b, "first")
        if first is None or second is None or first[0] != second[0]:
            return False
        if first[1] and first[1] == second[1] and self.fact(a, "files") == self.fact(b, "files"):
            return True
        if a.camera != b.camera and -1 not in (a.camera, b.camera):
            return False
        return self.fact(a, "sizes") == self.fact(b, "sizes") and self.fact(a, "content") == self.fact(b, "content")

    def fact(self, t: Tracklet, kind: str) -> Any:
        key = (id(t), kind)
        if key not in self.kept:
            try:
                self.kept[key] = getattr(self, kind)(t.frames)
            except OSError:  # a file is missing: nothing is known of the tracklet
                self.kept[key] = None if kind == "first" else object()
        return self.kept[key]

    def first(self, frames: Sequence[Frame]) -> tuple[int, tuple]:
        return _size_and_place(frames[0])

    def files(self, frames: Sequence[Frame]) -> list[tuple]:
        return [_size_and_place(frame)[1] for frame in frames]

    def sizes(self, frames: Sequence[Frame]) -> list[int]:
        return [_size_and_place(frame)[0] for frame in frames]

    def content(self, frames: Sequence[Frame]) -> bytes:
        digest = blake2b()
        for frame in frames:
            if isinstance(frame, np.ndarray):
                digest.update(f"{frame.dtype} {frame.shape}".encode())
                digest.update(np.ascontiguousarray(frame).data)
            else:
                with open(frame, "rb") as file:
                    digest.update(blake2b(file.read()).digest())
        return digest.digest()


def _size_and_place(frame: Frame) -> tuple[int, tuple]:
    """A frame's bytes, and what is equal for one file by all of its names; () where there is no such thing."""
    if isinstance(frame, np.ndarray):
        return frame.nbytes, ()
    status = os.stat(frame)
    return status.st_size, (status.st_dev, status.st_ino) if status.st_ino else ()


def unreadable(tracklets: Iterable[Tracklet]) -> list[ImageError]:
    """Reads every frame of the tracklets, and returns the errors of all that cannot be used; each names its file."""
    return skip_unreadable(tracklets)[1]


def skip_unreadable(tracklets: Iterable[Tracklet]) -> tuple[list[Tracklet], list[ImageError]]:
    """The tracklets without the frames that cannot be used.

    Reads every frame. A tracklet of which none can be used is left out; one that is a stand-in for :class:`Tracklet`
    is, if one of its frames cannot be used.

    Returns:
        The tracklets, those without a bad frame as they were, and the errors of all bad frames; each names its file.
    """
    kept: list[Tracklet] = []
    errors: list[ImageError] = []

    def error(t: Tracklet, index: int) -> ImageError | None:
        try:
            t.load([index])
        except ImageError as found:
            return found
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for t in tracklets:
            found = list(pool.map(lambda i, t=t: error(t, i), range(len(t))))
            good = [i for i, bad in enumerate(found) if bad is None]
            errors += filter(None, found)
            if len(good) == len(found):
                kept.append(t)
            elif good and isinstance(t, Tracklet):
                flow: Any = [t.flow[i] for i in good] if t._has_flow_arrays() else t.flow  # type: ignore[index]
                kept.append(replace(t, frames=[t.frames[i] for i in good], flow=flow))
    return kept, errors


def windows(tracklets: Iterable[Tracklet], length: int = 8, stride: int = 4) -> list[Tracklet]:
    """Cuts tracklets into windows of ``length`` frames, one every ``stride``; each is a tracklet of its own.

    GRL's released code trains so on iLIDS-VID and PRID-2011. What is left at the end, shorter than a window, is in
    none; a tracklet of fewer frames stays whole (ours).

    Raises:
        ValueError: a number below 1.
    """
    if min(length, stride) < 1:
        raise ValueError(f"length and stride must be at least 1, got {length} and {stride}.")
    cut: list[Any] = []
    for t in tracklets:
        starts = range(0, len(t) - length + 1, stride)
        cut += [Window(t, start, length) for start in starts] if len(starts) else [t]
    return cut


@dataclass(frozen=True, eq=False)
class Window:
    """Successive frames of a tracklet; a stand-in for :class:`Tracklet`. Their flow is the tracklet's."""

    tracklet: Tracklet
    start: int
    length: int

    pid = property(lambda self: self.tracklet.pid)
    camera = property(lambda self: self.tracklet.camera)
    ambiguous_pid = property(lambda self: getattr(self.tracklet, "ambiguous_pid", None))
    name = property(lambda self: f"{self.tracklet.name}, frames {self.start} to {self.start + self.length - 1}")

    def __len__(self) -> int:
        return self.length

    def load(self, indices: Iterable[int]) -> list[Tensor]:
        """Reads frames, as :meth:`Tracklet.load`."""
        return self.tracklet.load(self._places(indices))

    def load_flow(self, indices: Iterable[int]) -> list[Tensor]:
        """Reads optical flow, as :meth:`Tracklet.load_flow`."""
        if not hasattr(self.tracklet, "load_flow"):
            check_flow([self.tracklet])
        return self.tracklet.load_flow(self._places(indices))

    def _places(self, indices: Iterable[int]) -> list[int]:
        places = [int(i) for i in indices]
        if places and not 0 <= min(places) <= max(places) < self.length:
            raise IndexError(f"{self.name} has the frames 0 to {self.length - 1}, got {places}.")
        return [self.start + i for i in places]


def _some(pids: Iterable[int], shown: int = 5) -> str:
    different = sorted(set(pids))
    more = f", ... ({len(different)} in all)" if len(different) > shown else ""
    return ", ".join(map(str, different[:shown])) + more
