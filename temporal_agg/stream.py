"""Tracklets that grow: crops of many tracks in, the embedding of any track at any time."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, Union

import numpy as np
import torch
from torch import Tensor

from .data import ClipConfig, Tracklet
from .inference import CPU, FrameRunner, Precision

if TYPE_CHECKING:
    from PIL.Image import Image

    from .models import TrackletModel

__all__ = ["TrackletStream", "crop_embedder"]

Crop = Union[np.ndarray, str, Path, "Image"]
Frame = tuple[Tensor, Tensor | None]  # features [C, ...], and the image where the aggregator wants it
Id = TypeVar("Id", bound=Hashable)


class TrackletStream(Generic[Id]):
    """Embeds many tracks at once while they grow::

        stream = TrackletStream(model)
        for frame in video:
            stream.update(crops, ids)              # of one frame, or of several
            ids, embeddings = stream.embeddings()
            stream.drop(lost)

    A track's embedding is that of :func:`embed_tracklets` for the frames that it has had: at any time, and however they
    came in. The crops of all tracks pass the backbone together. What a track keeps:

    * a model that takes whole tracklets (``clip.test_sampling == "all"``) whose aggregator ``supports_streaming``:
      the aggregator's state, which most keep at one size (GLTR and robust: one short vector a frame);
    * ``dense`` windows: the sum of the finished windows' embeddings, and the features of the last ``clip.length``
      frames;
    * else (``chunks``, ``even``; whole tracklets for other aggregators), the features of at most ``max_frames`` frames.
      A track that has more keeps every second frame, then every fourth and so on, and its embedding is that of the
      tracklet of those.

    Optical flow is not taken: an encoder with a stem for it works without, as in ``model(clips)``. Not for several
    threads at once.

    Args:
        model: turns clips into embeddings; it gets back the mode that it had after each call.
        max_frames: frames whose features a track keeps, where all would be needed; at least ``clip.length``. None = 64,
            or more if the clips are longer.
        max_tracks: with more tracks, those go that were not updated for the longest time; None = all stay until they
            are dropped.
        frames_per_batch: crops in one pass of the backbone, at most.
        device: moves the model there first; None = where it is.
        precision: what the model computes in, as for :func:`embed_tracklets`.

    Raises:
        TypeError: no :class:`TrackletModel`.
        ValueError: a number below what it must be, or an unknown precision.

    Example:
        >>> import numpy as np
        >>> from temporal_agg import TrackletStream, create_model
        >>> stream = TrackletStream(create_model("attention_resnet10t", img_size=(64, 32)))
        >>> crop = np.zeros((64, 32, 3), np.uint8)
        >>> stream.update([crop, crop], ids=["track 1", "track 7"])  # of one frame of the video
        >>> stream.update([crop], ids=["track 7"])
        >>> ids, embeddings = stream.embeddings()
        >>> ids, embeddings.shape
        (['track 1', 'track 7'], torch.Size([2, 512]))
    """

    def __init__(
        self,
        model: "TrackletModel",
        *,
        max_frames: int | None = None,
        max_tracks: int | None = None,
        frames_per_batch: int = 256,
        device: str | torch.device | None = None,
        precision: Precision = "float32",
    ):
        self.runner = FrameRunner(model, frames_per_batch=frames_per_batch, precision=precision, device=device)
        self.model = self.runner.model
        clip: ClipConfig = self.model.clip
        if max_tracks is not None and max_tracks < 1:
            raise ValueError(f"max_tracks must be at least 1, or None for all, got {max_tracks}.")
        least = 2 if clip.test_sampling == "all" else max(2, clip.length)
        if max_frames is not None and max_frames < least:
            raise ValueError(f"max_frames must be at least {least} for this model, got {max_frames}.")
        self.max_frames = max(64, least) if max_frames is None else max_frames
        self.max_tracks = max_tracks
        self._tracks: dict[Id, _Track] = {}  # the track that was updated last stands last
        with self.runner.running(encode=False):  # what an aggregator supports may depend on its mode
            supported = bool(getattr(self.model.aggregator, "supports_streaming", False))
        self._streams = clip.test_sampling == "all" and supported

    def update(self, crops: Sequence[Crop], ids: Sequence[Id]) -> None:
        """Appends frames to tracks.

        Args:
            crops: uint8 RGB arrays ``[h, w, 3]`` of any sizes, PIL images, or paths of image files.
            ids: whose each of them is; an id that is new begins a track. The crops of one id are in temporal order.

        Raises:
            ImageError: a crop that cannot be used; no track has changed then.
            ValueError: another number of ids than of crops.
        """
        ids = list(ids)
        if len(crops) != len(ids):
            raise ValueError(f"expected one id for each crop, got {len(crops)} crops and {len(ids)} ids.")
        if not ids:
            return
        frames = [np.array(crop.convert("RGB")) if hasattr(crop, "convert") else crop for crop in crops]
        pixels = self.runner.transform.resize(Tracklet(frames, pid=-1, name="crops").load(range(len(frames))))
        with self.runner.running():
            features, images = self.runner(pixels)
            news: dict[Id, list[Frame]] = {}
            for place, track in enumerate(ids):
                image = None if images is None else images[place].clone()  # or the others' would be kept with it
                news.setdefault(track, []).append((features[place].clone(), image))
            for track in news:
                self._tracks[track] = self._tracks.pop(track) if track in self._tracks else _Track()
            if self._streams:
                self._advance([(self._tracks[track], new) for track, new in news.items()])
            else:
                self._keep([(self._tracks[track], new) for track, new in news.items()])
        while self.max_tracks is not None and len(self._tracks) > self.max_tracks:
            del self._tracks[next(iter(self._tracks))]

    def embedding(self, track: Id) -> Tensor:
        """The embedding of one track's frames so far: float32 ``[D]`` on the CPU.

        Raises:
            KeyError: no such track.
        """
        return self._read([self._track(track)])[0]

    def embeddings(self) -> tuple[list[Id], Tensor]:
        """The ids of all tracks, and their embeddings, float32 ``[N, D]`` on the CPU."""
        return list(self._tracks), self._read(list(self._tracks.values()))

    def nbytes(self, track: Id) -> int:
        """How much memory a track's state takes, and the features and images that it keeps.

        Raises:
            KeyError: no such track.
        """
        kept = self._track(track)
        tensors = [*(kept.state or ()), kept.total, *(x for frame in kept.frames for x in frame)]
        return sum(x.numel() * x.element_size() for x in tensors if x is not None)

    def drop(self, track: Id) -> None:
        """Forgets a track.

        Raises:
            KeyError: no such track.
        """
        self._track(track)
        del self._tracks[track]

    def __len__(self) -> int:
        return len(self._tracks)

    def __contains__(self, track: object) -> bool:
        return track in self._tracks

    def __iter__(self) -> Iterator[Id]:
        return iter(self._tracks)

    def _track(self, track: Id) -> "_Track":
        try:
            return self._tracks[track]
        except KeyError:
            raise KeyError(f"no track {track!r}: it has had no crop, or was dropped.") from None

    def _advance(self, news: "list[tuple[_Track, list[Frame]]]") -> None:
        """Updates the aggregator's states; tracks with as many new frames and states of one shape go together."""
        aggregator: Any = self.model.aggregator
        for track, new in news:
            if track.state is None:
                track.state = aggregator.begin(1, new[0][0])
        for group in _alike(news, lambda item: (len(item[1]), _shapes(item[0].state))):
            features = torch.stack([torch.stack([frame for frame, _ in new]) for _, new in group])
            state = aggregator.update(_stack([track.state for track, _ in group]), features)
            for (track, _), own in zip(group, _unstack(state, len(group)), strict=True):
                track.state = own

    def _keep(self, news: "list[tuple[_Track, list[Frame]]]") -> None:
        """Keeps the frames that the clips may still need, and adds up the windows that are whole."""
        clip = self.model.clip
        dense, stride = clip.test_sampling == "dense", clip.stride or clip.length
        windows: list[tuple[_Track, list[Frame]]] = []
        for track, new in news:
            for frame in new:
                track.seen += 1
                if not dense:
                    track.thin(frame, self.max_frames)
                    continue
                track.frames = [*track.frames[-clip.length + 1 :], frame] if clip.length > 1 else [frame]
                if track.seen >= clip.length and (track.seen - clip.length) % stride == 0:
                    windows.append((track, list(track.frames)))
        for track, embedding in self._embed([(track, window, None) for track, window in windows]):
            track.total = embedding if track.total is None else track.total + embedding
            track.count += 1

    def _read(self, tracks: "list[_Track]") -> Tensor:
        out = torch.empty(len(tracks), self.model.num_features, dtype=torch.float32, device=CPU)
        if not tracks:
            return out
        with self.runner.running(encode=False):
            where = {id(track): place for place, track in enumerate(tracks)}
            if self._streams:
                aggregator: Any = self.model.aggregator
                for group in _alike(tracks, lambda track: _shapes(track.state)):
                    rows = aggregator.read(_stack([track.state for track in group])).embedding.float()
                    out[[where[id(track)] for track in group]] = rows.to(CPU)
                return out
            with CPU:
                clips = [(track, *clip) for track in tracks for clip in self._open_clips(track)]
            totals = {id(t): [] if t.total is None else [t.total] for t in tracks}
            counts = {id(t): t.count for t in tracks}
            for track, embedding in self._embed(clips):
                totals[id(track)].append(embedding)
                counts[id(track)] += 1
            out.copy_(torch.stack([sum(totals[id(t)][1:], totals[id(t)][0]) / counts[id(t)] for t in tracks]))
        return out

    def _open_clips(self, track: "_Track") -> Iterator[tuple[list[Frame], Tensor | None]]:
        """The clips of a track that are not in its sum: all, or of dense windows the last one, if it isn't whole."""
        clip, frames = self.model.clip, track.frames
        if clip.test_sampling == "dense":
            stride = clip.stride or clip.length
            whole = track.seen >= clip.length
            if whole and (track.seen - clip.length) % stride == 0:
                return
            if not whole:
                start = 0
            elif clip.tail == "shift":
                start = track.seen - clip.length
            else:
                start = track.count * stride
            frames = frames[len(frames) - (track.seen - start) :]
        for indices, mask in zip(*clip.cut(len(frames)), strict=True):
            yield [frames[i] for i in indices.tolist()], mask

    def _embed(self, clips: "list[tuple[_Track, list[Frame], Tensor | None]]") -> "Iterator[tuple[_Track, Tensor]]":
        """The embedding ``[D]`` of each clip; those of one length go through the aggregator together."""
        for group in _alike(clips, lambda item: len(item[1])):
            size = max(1, self.runner.frames_per_batch // len(group[0][1]))
            for start in range(0, len(group), size):
                part = group[start : start + size]
                features = torch.stack([torch.stack([f for f, _ in clip]) for _, clip, _ in part])
                masks = [torch.ones(len(clip), dtype=torch.bool, device=CPU) if m is None else m for _, clip, m in part]
                mask = torch.stack(masks)
                images = None
                if part[0][1][0][1] is not None:
                    images = torch.stack([torch.stack([i for _, i in clip if i is not None]) for _, clip, _ in part])
                only = None if bool(mask.all()) else mask.to(features.device)
                rows = self.model.aggregate(features, only, images=images).float()
                yield from zip((track for track, _, _ in part), rows, strict=True)


def crop_embedder(
    model: "TrackletModel",
    *,
    channels: Literal["rgb", "bgr"] = "rgb",
    frames_per_batch: int = 256,
    device: str | torch.device | None = None,
    precision: Precision = "float32",
) -> Callable[[np.ndarray, Any], Tensor]:
    """A function from an image and boxes to embeddings, for trackers that want just that.

    Each crop is embedded as a tracklet of one frame, by the pixels that :func:`embed_tracklets` would see.

    Args:
        model: turns clips into embeddings.
        channels: the order of the images' channels: ``rgb``, or ``bgr`` as OpenCV reads them.
        frames_per_batch: crops in one pass of the backbone, at most.
        device: moves the model there first; None = where it is.
        precision: what the model computes in, as for :func:`embed_tracklets`.

    Returns:
        ``embed(image, boxes)``, with a uint8 image ``[H, W, 3]`` and boxes ``[N, 4]`` (left, top, right, bottom, in
        pixels), which returns float32 ``[N, D]`` on the CPU, not normalised. Corners are rounded; what of a box lies
        outside the image is cut off, and a box that lies outside altogether gets the nearest pixels of the edge.

    Raises:
        TypeError: no :class:`TrackletModel`.
        ValueError: another order of channels, or what :func:`embed_tracklets` refuses; from the function: an image or
            boxes of another shape, or a corner that is not finite.
    """
    if channels not in ("rgb", "bgr"):
        raise ValueError(f"channels must be 'rgb' or 'bgr', got {channels!r}.")

    def embed(image: np.ndarray, boxes: Any) -> Tensor:
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"image must be a uint8 array [H, W, 3], got {image.dtype} {list(image.shape)}.")
        if channels == "bgr":
            image = image[..., ::-1]
        stream: TrackletStream[int] = TrackletStream(
            model, frames_per_batch=frames_per_batch, device=device, precision=precision
        )
        crops = crop_boxes(image, boxes)
        stream.update(crops, range(len(crops)))
        return stream.embeddings()[1]

    FrameRunner(model, frames_per_batch=frames_per_batch, device=device, precision=precision)  # refuses now, not later
    return embed


def crop_boxes(image: np.ndarray, boxes: Any) -> list[np.ndarray]:
    """The pixels of boxes ``[N, 4]`` (left, top, right, bottom) of an image ``[H, W, 3]``, at least one pixel each.

    Raises:
        ValueError: boxes of another shape, or a corner that is not finite.
    """
    corners = np.asarray(boxes, dtype=np.float64)
    if corners.size == 0:
        return []
    if corners.ndim != 2 or corners.shape[1] != 4 or not np.isfinite(corners).all():
        raise ValueError(
            f"boxes must be finite numbers [N, 4] (left, top, right, bottom, in pixels), got {list(corners.shape)}"
            + (" with NaN or infinity." if corners.ndim == 2 and corners.shape[1] == 4 else ".")
        )
    sides = np.array([image.shape[1], image.shape[0]])
    first = np.clip(np.round(corners[:, :2]), 0, sides - 1).astype(int)
    last = np.clip(np.round(corners[:, 2:]), first + 1, sides).astype(int)
    return [image[y1:y2, x1:x2] for (x1, y1), (x2, y2) in zip(first.tolist(), last.tolist(), strict=True)]


class _Track:
    """What is kept of a track: the aggregator's state; or frames, and the sum of the windows that are whole."""

    def __init__(self) -> None:
        self.state: Any = None
        self.frames: list[Frame] = []
        self.seen = 0
        self.step = 1  # of how many frames one is kept
        self.total: Tensor | None = None
        self.count = 0

    def thin(self, frame: Frame, most: int) -> None:
        if (self.seen - 1) % self.step:
            return
        self.frames.append(frame)
        if len(self.frames) > most:
            self.frames = self.frames[::2]
            self.step *= 2


Item = TypeVar("Item")


def _alike(items: Sequence[Item], key: Callable[[Item], Any]) -> Iterator[list[Item]]:
    """The items in groups of one key, in order within a group."""
    for _, group in groupby(sorted(items, key=lambda item: repr(key(item))), key=lambda item: repr(key(item))):
        yield list(group)


def _shapes(state: Any) -> list[tuple[Any, ...]]:
    return [(tuple(x.shape), x.dtype) for x in state]


def _stack(states: Sequence[Any]) -> Any:
    """States of one tracklet each -> the state of all."""
    return type(states[0])(*map(torch.cat, zip(*states, strict=True)))


def _unstack(state: Any, count: int) -> list[Any]:
    return [type(state)(*(x[i : i + 1].clone() for x in state)) for i in range(count)]
