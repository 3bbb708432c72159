"""Whole tracklets of any length -> one embedding each."""

import logging
import math
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args, overload

import torch
from torch import Tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .data import ClipConfig, ClipTransform, Tracklet, check_flow
from .data.tracklet import check_tracklets
from .models.inputs import exact_convolutions, fastest_memory_format, forwards, weights_laid_out

if TYPE_CHECKING:
    from .aggregators.robust import Purity
    from .models import TrackletModel

__all__ = ["FrameRunner", "Precision", "allowed_cores", "embed_tracklets"]

Precision = Literal["float32", "bfloat16", "float16"]
Part = TypeVar("Part")

CPU = torch.device("cpu")
DECODE = 32  # frames that a thread reads in one go
CPU_PASS = 8  # frames in one pass of a backbone on a CPU, or as many as torch has threads,
CPU_PIXELS = 2**17  # or as have so many pixels together
FLUSH = 16  # aggregator calls between two waits for the device
LONG_RUN = 10  # seconds: runs that take longer say where the time went

_logger = logging.getLogger(__name__)


@overload
def embed_tracklets(
    model: "TrackletModel",
    tracklets: Sequence[Tracklet],
    *,
    frames_per_batch: int = 256,
    precision: Precision = "float32",
    device: str | torch.device | None = None,
    progress: bool = True,
    num_workers: int | None = None,
    reject_outliers: bool = False,
    return_purity: Literal[False] = False,
) -> Tensor: ...


@overload
def embed_tracklets(
    model: "TrackletModel",
    tracklets: Sequence[Tracklet],
    *,
    frames_per_batch: int = 256,
    precision: Precision = "float32",
    device: str | torch.device | None = None,
    progress: bool = True,
    num_workers: int | None = None,
    reject_outliers: bool = False,
    return_purity: Literal[True],
) -> "tuple[Tensor, Purity]": ...


def embed_tracklets(
    model: "TrackletModel",
    tracklets: Sequence[Tracklet],
    *,
    frames_per_batch: int = 256,
    precision: Precision = "float32",
    device: str | torch.device | None = None,
    progress: bool = True,
    num_workers: int | None = None,
    reject_outliers: bool = False,
    return_purity: bool = False,
) -> "Tensor | tuple[Tensor, Purity]":
    """Embeds whole tracklets, cut into clips as ``model.clip`` says.

    A tracklet's embedding is the mean of its clips' embeddings, not normalised before. Every frame that a clip needs is
    read and passes the backbone once, also where clips overlap; batches are filled across tracklets; features are kept
    only until the last clip that needs them. A clip of more than ``frames_per_batch`` frames, as a whole tracklet can
    be, is handed to the aggregator piece by piece where it can take that (``supports_streaming``): its features are
    then never all there.

    Threads read the frames ahead, while the backbone runs; they start no process and use no shared memory. Frames
    travel as bytes and are normalised on the device, in the memory format that is fastest for the backbone; the weights
    are not touched. Optical flow is read for an encoder that has a stem for it. The model runs in evaluation mode,
    without gradients, and gets back the mode that it had. A run of more than 10 seconds logs, at the level INFO, how
    many frames a second it made and how much of the time it waited for frames.

    Args:
        model: turns clips into embeddings.
        tracklets: what to embed, each with ``len()``, ``name`` and ``load()`` (and ``load_flow()``), which are called
            from several threads at once unless ``num_workers`` is 0.
        frames_per_batch: frames in one pass of the backbone and of the aggregator (of which one clip is the least), at
            most. On a CPU the backbone's passes are smaller still, because that is faster there. It bounds memory and
            does not change the result.
        precision: what the model computes in: ``bfloat16`` and ``float16`` by autocast, but for convolutions that
            are depthwise or of 32 channels or fewer, which bear bfloat16 badly. ``float32`` leaves an autocast around
            the call in force.
        device: moves the model there first; None = where it is.
        progress: shows a bar on a terminal if tqdm is installed.
        num_workers: threads that read frames; 0 = none but the caller's. None = as many as the process may use cores,
            up to 8.
        reject_outliers: leave out the frames that show somebody else than most of the tracklet's frames do, as
            :func:`~temporal_agg.aggregators.robust.outlier_mask` judges by their average-pooled features: they are
            masked, for any aggregator. The features of a whole tracklet are then kept until it has been judged.
        return_purity: also return how much like two people each tracklet looks, and where the second one would be, as
            :func:`~temporal_agg.aggregators.robust.tracklet_purity` judges by the same features.

    Returns:
        float32 ``[N, D]`` on the CPU, in the order of the tracklets; and the :class:`Purity`, whose places are the
        frames' numbers in the tracklet, from 0 on.

    Raises:
        TypeError: no :class:`TrackletModel`, or no list of tracklets.
        ValueError: no tracklet, a tracklet without a frame, ``frames_per_batch`` below 1, ``num_workers`` below 0, or
            an unknown precision.
        FlowError: a tracklet without optical flow, and an encoder that takes it.

    Example:
        >>> from temporal_agg import create_model, embed_tracklets
        >>> from temporal_agg.data import open_dataset
        >>> people = open_dataset("synthetic", num_identities=4, num_cameras=2, size=(64, 32))
        >>> model = create_model("mean_resnet10t", img_size=(64, 32))
        >>> embed_tracklets(model, people.query, progress=False).shape
        torch.Size([4, 512])
    """
    check_tracklets(tracklets)
    if not len(tracklets):
        raise ValueError("tracklets is empty: there is nothing to embed.")
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, or None for as many as there are cores, got {num_workers}.")
    runner = FrameRunner(model, frames_per_batch=frames_per_batch, precision=precision)
    model = runner.model
    if runner.uses_flow:
        check_flow(tracklets)
    with CPU:  # whatever the caller's default device is
        plan = _plan(tracklets, model.clip, frames_per_batch)
    runner.to(device)
    reader = _Reader(tracklets, plan, runner, min(8, allowed_cores()) if num_workers is None else num_workers)
    start = time.perf_counter()
    judges = _Judges(plan, reject_outliers, return_purity)
    with runner.running(), frames_bar(len(plan.frames), progress) as bar, closing(reader.batches(bar)) as batches:
        out = _embed(model, plan, _Features(runner, batches), frames_per_batch, judges)
    seconds = time.perf_counter() - start
    _logger.log(
        logging.INFO if seconds > LONG_RUN else logging.DEBUG,
        "embedded %d tracklets of %d frames in %.1f s: %.1f frames/s, %.0f %% of the time spent waiting for frames to "
        "be decoded",
        len(tracklets),
        len(plan.frames),
        seconds,
        len(plan.frames) / seconds,
        100 * reader.waited / seconds,
    )
    out = out.clone()  # outside inference mode
    return (out, judges.purity()) if return_purity else out


class FrameRunner:
    """Bytes of frames -> what the model's aggregator wants of them, the way that is fastest for its backbone.

    Args:
        model: a :class:`TrackletModel`, also in a wrapper for several devices.
        frames_per_batch: frames in one pass, at most.
        precision: what the model computes in.
        device: moves the model there; None = where it is.

    Attributes:
        model: out of its wrapper.
        transform: resizes frames to what the model takes.
        size: frames in one pass. A CPU is fastest while the activations of a pass stay small: 8, or one a thread (at
            256 x 128 a MobileNetV2 makes 55 frames a second in passes of 8, and 23 in passes of 256), and more of
            small frames (16 at 128 x 64, 64 at 64 x 32).
        uses_flow: whether the encoder has a stem for optical flow.

    Raises:
        TypeError: no :class:`TrackletModel`.
        ValueError: ``frames_per_batch`` below 1, an unknown precision, or float16 on a CPU where torch cannot.
    """

    def __init__(
        self,
        model: "TrackletModel",
        *,
        frames_per_batch: int = 256,
        precision: Precision = "float32",
        device: str | torch.device | None = None,
    ):
        while isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        if not all(hasattr(model, part) for part in ("encoder", "aggregator", "clip")):
            raise TypeError(
                f"model must be a TrackletModel, as create_model returns it, got {type(model).__name__}: wrap a "
                "backbone as TrackletModel(FrameEncoder(backbone), aggregator)."
            )
        if frames_per_batch < 1:
            raise ValueError(f"frames_per_batch must be at least 1, got {frames_per_batch}.")
        if precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}.")
        self.model = model
        self.frames_per_batch = frames_per_batch
        self.precision = precision
        self.exact = exact_convolutions(model.encoder) if precision == "bfloat16" else {}
        self.uses_flow = bool(getattr(model.encoder, "uses_flow", False))
        self.transform = ClipTransform.for_model(model)
        self.to(device)

    def to(self, device: str | torch.device | None) -> None:
        """Moves the model, and finds out how it runs best there."""
        if device is not None:
            self.model.to(device)
        weight = next((p for p in self.model.parameters() if p.is_floating_point()), torch.empty(0, device=CPU))
        self.device, self.dtype = weight.device, weight.dtype
        half = self.precision == "float16" or self.dtype == torch.float16
        if half and self.device.type == "cpu" and not _cpu_has_half(self.precision == "float16"):
            raise ValueError(
                f"torch {torch.__version__} does not compute in float16 on a CPU: take bfloat16 or float32, or a newer "
                "torch."
            )
        pixels = math.prod(self.model.data_config["input_size"][-2:])
        on_cpu = max(CPU_PASS, torch.get_num_threads(), CPU_PIXELS // pixels)
        self.size = min(self.frames_per_batch, on_cpu if self.device.type == "cpu" else sys.maxsize)
        known = self.device.type in ("cpu", "cuda")
        self.memory_format = fastest_memory_format(self.model.encoder) if known else torch.contiguous_format

    @contextmanager
    def running(self, encode: bool = True) -> Iterator[None]:
        """Evaluation mode, no gradients and the wanted precision; then the modes that were.

        ``encode=False``: the encoder is not used, and left as it is.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with ExitStack() as stack:
                if encode:
                    stack.enter_context(weights_laid_out(self.model.encoder, self.memory_format))
                    stack.enter_context(forwards(self.exact))
                stack.enter_context(torch.inference_mode())
                if self.precision != "float32":
                    stack.enter_context(torch.autocast(self.device.type, getattr(torch, self.precision)))
                yield
        finally:
            for module, training in modes:
                module.training = training

    def load(self, pixels: Tensor, flow: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Bytes ``[n, 3, H, W]`` (and flow ``[n, 2, H, W]``) of any device -> images as the encoder wants them."""
        images = self.transform.normalize(pixels.to(self.device, non_blocking=True)).to(self.dtype)
        images = images.contiguous(memory_format=self.memory_format)
        return images, None if flow is None else flow.to(self.device, self.dtype, non_blocking=True)

    def __call__(self, pixels: Tensor, flow: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """:meth:`TrackletModel.frame_features` of bytes, in passes of ``size`` frames at most."""
        flows: Sequence[Tensor | None] = [None] * len(pixels) if flow is None else flow.split(self.size)
        passes = zip(pixels.split(self.size), flows, strict=False)
        features, images = zip(*(self.model.frame_features(*self.load(*part)) for part in passes), strict=True)
        return _join(features), None if images[0] is None else _join(images)


def _cpu_has_half(autocast: bool) -> bool:
    """Whether this torch computes in float16 on a CPU, by autocast or from weights of that type: torch 2.0 does not."""
    pixel = torch.zeros(1, 1, 1, 1, device=CPU, dtype=torch.float32 if autocast else torch.float16)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            with torch.autocast("cpu", torch.float16) if autocast else nullcontext():
                return torch.nn.functional.conv2d(pixel, pixel).dtype == torch.float16
    except RuntimeError:
        return False


def allowed_cores() -> int:
    """The processor cores that this process may use: of its affinity, and of its container's quota (cgroups)."""
    try:
        cores: float = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        cores = os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _cgroup_quota(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")))))


def _cgroup_quota(root: Path, own: Path) -> float:
    """Cores' worth of time that the process's control groups allow, in version 2 and 1; infinite without a limit."""
    quota = math.inf
    try:
        groups = [line.split(":", 2) for line in own.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return quota
    for _, controllers, path in (group for group in groups if len(group) == 3):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):  # any group above may be the one with the limit
            try:
                if controllers:
                    limit, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    limit, period = (folder / "cpu.max").read_text().split()
                if limit != "max" and int(limit) > 0:
                    quota = min(quota, int(limit) / int(period))
            except (OSError, ValueError):
                pass
            if folder == top:
                break
    return quota


class _Call(NamedTuple):
    """One call of the aggregator: n clips of L frames."""

    owners: Tensor  # [n], the clips' tracklets
    frames: Tensor  # [n, L], places in the plan's frames
    mask: Tensor  # [n, L]


class _Plan(NamedTuple):
    owners: Tensor  # [F], the tracklet of each distinct frame, ascending
    frames: Tensor  # [F], its index in the tracklet
    clips: Tensor  # [N], how many clips each tracklet has
    calls: list[_Call]


def _plan(tracklets: Sequence[Tracklet], clip: ClipConfig, frames_per_batch: int) -> _Plan:
    """What to read, in order, and what to aggregate from it. Clips of one length share a call."""
    frames, clips, start = [], [], 0
    for i, tracklet in enumerate(tracklets):
        if not len(tracklet):
            raise ValueError(f"tracklets[{i}] ({getattr(tracklet, 'name', tracklet)!r}) has no frame: leave it out.")
        indices, mask = clip.cut(len(tracklet))
        distinct, places = indices.unique(return_inverse=True)
        clips.append(_Call(torch.full((len(indices),), i), start + places, mask))
        frames.append(distinct)
        start += len(distinct)

    calls = []
    for length, group in groupby(clips, key=lambda call: call.mask.shape[1]):
        size = max(1, frames_per_batch // length)
        joined = (torch.cat(parts).split(size) for parts in zip(*group, strict=True))
        calls += [_Call(*parts) for parts in zip(*joined, strict=True)]
    owners = torch.arange(len(tracklets)).repeat_interleave(torch.tensor([len(f) for f in frames]))
    return _Plan(owners, torch.cat(frames), torch.tensor([len(call.owners) for call in clips]), calls)


class _Pixels(NamedTuple):
    frames: Tensor  # uint8 [n, 3, H, W]
    flow: Tensor | None  # [n, 2, H, W]


class _Reader:
    """The plan's frames in order, as bytes of the model's size, read ahead by threads.

    Threads, because decoding and resizing let go of Python's lock: of 256x128 JPEGs they were measured to make half as
    many again per second of processor time as worker processes, which have to hand every frame over.
    """

    def __init__(self, tracklets: Sequence[Tracklet], plan: _Plan, runner: FrameRunner, workers: int):
        self.tracklets = tracklets
        self.owners, self.frames = plan.owners, plan.frames
        self.transform, self.flow, self.size = runner.transform, runner.uses_flow, runner.size
        self.pinned = runner.device.type == "cuda"
        self.workers = workers
        self.waited = 0.0  # seconds for which the backbone had to wait for frames

    def batches(self, bar: Any) -> Generator[_Pixels, None, None]:
        """Batches of the runner's size; the last may be smaller."""
        total = len(self.frames)
        batches = [range(first, min(first + self.size, total)) for first in range(0, total, self.size)]
        parts = [batch[i : i + DECODE] for batch in batches for i in range(0, len(batch), DECODE)]
        ahead = 2 * self.workers + 2 * math.ceil(self.size / DECODE)
        with closing(_ahead(self.read, parts, self.workers, ahead)) as made:
            for batch in batches:
                start = time.perf_counter()
                frames, flow = zip(*(next(made) for _ in range(0, len(batch), DECODE)), strict=True)
                pixels = _Pixels(self._joined(frames), None if flow[0] is None else self._joined(flow))
                self.waited += time.perf_counter() - start
                if bar is not None:
                    bar.update(len(batch))
                yield pixels

    def read(self, part: range) -> _Pixels:
        where = slice(part.start, part.stop)
        owners, counts = self.owners[where].unique_consecutive(return_counts=True)
        frames: list[Tensor] = []
        flow: list[Tensor] = []
        for owner, indices in zip(owners.tolist(), self.frames[where].split(counts.tolist()), strict=True):
            frames += self.tracklets[owner].load(indices.tolist())
            if self.flow:
                flow += self.tracklets[owner].load_flow(indices.tolist())
        return _Pixels(self.transform.resize(frames), self.transform.resize_flow(flow) if self.flow else None)

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        pixels = _join(parts)
        return pixels.pin_memory() if self.pinned else pixels


def _ahead(
    make: Callable[[range], Part], parts: Sequence[range], workers: int, ahead: int
) -> Generator[Part, None, None]:
    """``make(part)`` of each part in order, up to ``ahead`` of them being made before they are asked for."""
    if workers < 1:
        yield from map(make, parts)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="read-frames")
    try:
        waiting = deque(pool.submit(make, part) for part in parts[:ahead])
        for place in range(len(parts)):
            made = waiting.popleft().result()
            if place + ahead < len(parts):
                waiting.append(pool.submit(make, parts[place + ahead]))
            yield made
    finally:
        pool.shutdown(cancel_futures=True)


class _Features:
    """The features of the plan's frames, made in order when they are asked for, and kept until they are dropped."""

    def __init__(self, runner: FrameRunner, batches: Iterator[_Pixels]):
        self.runner = runner
        self.batches = batches
        self.kept: list[tuple[Tensor, Tensor | None]] = []  # batches of features, and of images where they are wanted
        self.start = self.stop = 0  # the frames that they hold

    def read(self, stop: int) -> None:
        while self.stop < stop:
            batch = next(self.batches)
            self.kept.append(self.runner(*batch))
            self.stop += len(batch.frames)

    def drop(self, before: int) -> None:
        """Lets batches go that hold no frame from ``before`` on."""
        while self.kept and self.start + len(self.kept[0][0]) <= before:
            self.start += len(self.kept.pop(0)[0])

    def take(self, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        """The features, and the images where they are wanted, of any frames from the first kept one on."""
        self.read(int(frames.max()) + 1)
        features, images = zip(*self.kept, strict=True)
        places = (frames - self.start).to(features[0].device, non_blocking=True)
        return _join(features)[places], None if images[0] is None else _join(images)[places]

    def chunks(self, first: int, last: int) -> Iterator[Tensor]:
        """The features ``[1, t, ...]`` of successive frames by batches, each let go before the next is made."""
        while first < last:
            stop = min(first + self.runner.frames_per_batch, last)
            self.drop(first)
            self.read(stop)
            chunk = _join([features for features, _ in self.kept])[first - self.start : stop - self.start][None]
            self.drop(stop)
            first = stop
            yield chunk
            del chunk

    def vectors(self, first: int, stop: int) -> Tensor:
        """The average-pooled features ``[1, t, C]`` of successive frames."""
        self.read(stop)
        vectors = [x.mean((2, 3)) if x.dim() == 4 else x for x, _ in self.kept]
        return _join(vectors)[first - self.start : stop - self.start][None]


class _Judges:
    """What is said of whole tracklets: which of the plan's frames count, and how pure each tracklet is."""

    def __init__(self, plan: _Plan, reject: bool, purity: bool):
        self.reject, self.needed = reject, reject or purity
        self.wants_purity = purity
        self.frames = plan.frames
        self.ends = plan.owners.bincount(minlength=len(plan.clips)).cumsum(0).tolist()
        self.trusted = torch.ones(len(plan.frames), dtype=torch.bool, device=CPU)
        self.found: list[Purity] = []
        self.judged = 0  # tracklets

    def judge(self, last: int, features: _Features) -> None:
        """The tracklets up to this one."""
        from .aggregators.robust import outlier_mask, tracklet_purity

        while self.judged <= last:
            start, stop = (self.ends[self.judged - 1] if self.judged else 0), self.ends[self.judged]
            vectors = features.vectors(start, stop)
            if self.reject:
                self.trusted[start:stop] = outlier_mask(vectors)[0].to(CPU)
            if self.wants_purity:
                self.found.append(self._placed(tracklet_purity(vectors), start))
            self.judged += 1

    def _placed(self, found: "Purity", first: int) -> "Purity":
        """With the frames' numbers in the tracklet, of which a clip may have left some out."""
        if found.start < 0:
            return found
        return found._replace(start=self.frames[first + found.start], stop=self.frames[first + found.stop - 1] + 1)

    def purity(self) -> "Purity":
        from .aggregators.robust import Purity

        return Purity(*(torch.cat(parts).clone() for parts in zip(*self.found, strict=True)))


def _embed(model: "TrackletModel", plan: _Plan, features: _Features, frames_per_batch: int, judges: _Judges) -> Tensor:
    """The mean of each tracklet's clips."""
    calls = plan.calls
    out = torch.zeros(len(plan.clips), model.num_features, dtype=torch.float32, device=CPU)
    count = plan.clips.clone()
    # The first frame that a call or any later one needs: everything before it can go.
    needed = torch.stack([call.frames.min() for call in calls]).flip(0).cummin(0).values.flip(0).tolist()
    needed.append(sys.maxsize)
    done: list[tuple[Tensor, Tensor]] = []
    for k, call in enumerate(calls):
        features.drop(needed[k])
        owners, frames, mask = call
        first, last = int(frames.min()), int(frames.max()) + 1
        if judges.needed:
            judges.judge(int(owners.max()), features)
        if judges.reject:
            mask = mask & judges.trusted[frames]
            some = mask.any(1)  # a clip of nobody but others is left out
            count.index_add_(0, owners[~some], torch.full_like(owners[~some], -1))
            owners, frames, mask = owners[some], frames[some], mask[some]
            if not len(owners):
                continue
        if (
            model.aggregator.supports_streaming
            and frames.shape[1] > frames_per_batch
            and bool(mask.all())
            and not judges.needed
            and torch.equal(frames[0], torch.arange(first, last, device=CPU))
            and needed[k + 1] >= last  # no later call wants these frames
        ):
            embeddings = _streamed(model.aggregator, features.chunks(first, last))
        else:
            clips, images = features.take(frames)
            embeddings = model.aggregate(clips, None if mask.all() else mask.to(clips.device), images=images)
            del clips, images
        done.append((owners, embeddings.float()))
        if len(done) == FLUSH:
            _add(out, done)
    _add(out, done)
    return out / count[:, None]


def _add(out: Tensor, done: list[tuple[Tensor, Tensor]]) -> None:
    """Adds clips' embeddings to their tracklets' rows, and forgets them."""
    if done:
        owners, rows = (torch.cat(parts) for parts in zip(*done, strict=True))
        out.index_add_(0, owners, rows.cpu())
        done.clear()


def _streamed(aggregator: Any, chunks: Iterable[Tensor]) -> Tensor:
    """The embedding ``[1, D]`` of one clip whose features ``[1, t, ...]`` come in pieces."""
    state = None
    for chunk in chunks:
        state = aggregator.update(aggregator.begin(1, chunk) if state is None else state, chunk)
        del chunk  # or it would live on while the next one is made
    return aggregator.read(state).embedding


def _join(batches: Sequence[Tensor]) -> Tensor:
    return torch.cat(tuple(batches)) if len(batches) > 1 else batches[0]


def frames_bar(total: int, progress: bool) -> Any:
    if progress and not getattr(sys.stderr, "closed", sys.stderr is None):  # a program without a console has none
        try:
            from tqdm import tqdm

            return tqdm(total=total, unit="frame", desc="embed", disable=None, leave=False)
        except ImportError:
            pass
    return nullcontext()
