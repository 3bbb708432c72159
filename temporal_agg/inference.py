"""Whole tracklets of any length -> one embedding each."""

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import reduce
from itertools import groupby
from traceback import clear_frames
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .aggregators import ClipConfig
from .data import ClipTransform, Tracklet, check_flow, cut_tracklet

if TYPE_CHECKING:
    from .models import TrackletModel

__all__ = ["embed_tracklets"]

DECODE = 32  # frames that a worker hands over at once
FLUSH = 16  # aggregator calls between two waits for the device


def embed_tracklets(
    model: "TrackletModel",
    tracklets: Sequence[Tracklet],
    *,
    frames_per_batch: int = 256,
    device: str | torch.device | None = None,
    progress: bool = True,
    num_workers: int | None = None,
) -> Tensor:
    """Embeds whole tracklets, cut into clips as ``model.clip`` says.

    A tracklet's embedding is the mean of its clips' embeddings, not normalised before. Every frame that a clip needs is
    read and passes the backbone once, also where clips overlap; batches are filled across tracklets; features are kept
    only until the last clip that needs them. A clip of more than ``frames_per_batch`` frames, as a whole tracklet can
    be, is streamed where the aggregator can (``supports_streaming``): its maps are then never all there.
    Optical flow is read for an encoder that has a stem for it. The model runs in evaluation mode, without gradients,
    and gets back the mode that it had. Mixed precision is the caller's: wrap the call in ``torch.autocast``.

    Args:
        model: turns clips into embeddings.
        tracklets: what to embed, each with ``len()``, ``name`` and ``load()`` (and ``load_flow()``).
        frames_per_batch: frames in one pass of the backbone, and at most (one clip at least) of the aggregator. It
            bounds memory and does not change the result.
        device: moves the model there first; None = where it is.
        progress: shows a bar on a terminal if tqdm is installed.
        num_workers: processes that read frames; 0 = none but this one. None = up to 8, a quarter of the cores for a
            model that runs on the CPU itself, and 0 where Python does not fork (more would need a script with a
            ``__main__`` guard).

    Returns:
        float32 ``[N, D]`` on the CPU, in the order of the tracklets.

    Raises:
        ValueError: no tracklet, a tracklet without a frame, or ``frames_per_batch`` below 1.
        FlowError: a tracklet without optical flow, and an encoder that takes it.
    """
    if not len(tracklets):
        raise ValueError("tracklets is empty: there is nothing to embed.")
    if frames_per_batch < 1:
        raise ValueError(f"frames_per_batch must be at least 1, got {frames_per_batch}.")
    flow = getattr(model.encoder, "uses_flow", False)
    if flow:
        check_flow(tracklets)
    plan = _plan(tracklets, model.clip, frames_per_batch)
    if device is not None:
        model.to(device)
    device = next(model.parameters()).device
    if num_workers is None:
        cores = os.cpu_count() or 1
        forks = multiprocessing.get_start_method() == "fork"
        num_workers = min(8, cores // 4 if device.type == "cpu" else cores) if forks else 0
    loader = DataLoader(
        _Frames(tracklets, plan, model.data_config, frames_per_batch, flow),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the loader seeds its workers: not from the global generator
    )

    modes = [(module, module.training) for module in model.modules()]
    out = torch.zeros(len(tracklets), model.num_features)
    model.eval()
    try:
        with torch.inference_mode(), _bar(len(plan.frames), progress) as bar:
            batches = _batches(loader, frames_per_batch, device, bar)
            _embed(model, plan.calls, _Features(model, batches), out, frames_per_batch)
    finally:
        for module, training in modes:
            module.training = training
    return out / plan.clips[:, None]


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
        indices, mask = cut_tracklet(
            len(tracklet), clip.length, clip.test_sampling, stride=clip.stride, fill=clip.fill, tail=clip.tail
        )
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


class _Frames(Dataset):
    """The plan's frames in order, read and transformed, in parts that never cross a batch of the backbone.

    A part is ``[n, 3, H, W]``; with flow ``[n, 5, H, W]``, dx and dy being the last two channels.
    """

    def __init__(
        self, tracklets: Sequence[Tracklet], plan: _Plan, data_config: dict, frames_per_batch: int, flow: bool
    ):
        self.tracklets = tracklets
        self.flow = flow
        self.owners = plan.owners
        self.frames = plan.frames
        self.parts = [
            slice(part, min(part + DECODE, batch + frames_per_batch, len(plan.frames)))
            for batch in range(0, len(plan.frames), frames_per_batch)
            for part in range(batch, min(batch + frames_per_batch, len(plan.frames)), DECODE)
        ]
        self.transform = ClipTransform(
            data_config["input_size"][1:], data_config["mean"], data_config["std"], data_config["interpolation"]
        )

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> Tensor:
        part, frames, flow = self.parts[i], [], []
        owners, counts = self.owners[part].unique_consecutive(return_counts=True)
        for owner, indices in zip(owners.tolist(), self.frames[part].split(counts.tolist()), strict=True):
            frames += self.tracklets[owner].load(indices.tolist())
            if self.flow:
                flow += self.tracklets[owner].load_flow(indices.tolist())
        return torch.cat(self.transform(frames, flow=flow), 1) if self.flow else self.transform(frames)


def _batches(loader: DataLoader, frames_per_batch: int, device: torch.device, bar) -> Iterator[Tensor]:
    """Joins the loader's parts to batches of ``frames_per_batch`` frames on the device; the last may be smaller."""
    parts, count = [], 0
    try:
        for i, part in enumerate(loader, 1):
            parts.append(part.to(device, non_blocking=True))
            count += len(part)
            if count == frames_per_batch or i == len(loader):
                if bar is not None:
                    bar.update(count)
                yield torch.cat(parts) if len(parts) > 1 else parts[0]
                parts, count = [], 0
    except Exception as error:
        clear_frames(error.__traceback__)  # a cycle in them would keep the workers and end them seconds late
        raise


class _Features:
    """The features of the plan's frames, made in order when they are asked for, and kept until they are dropped."""

    def __init__(self, model: "TrackletModel", batches: Iterator[Tensor]):
        self.model = model
        self.batches = batches
        self.kept: list[tuple[Tensor, Tensor | None]] = []  # batches of features, and of images where they are wanted
        self.start = self.stop = 0  # the frames that they hold

    def read(self, stop: int) -> None:
        aggregator = self.model.aggregator
        while self.stop < stop:
            batch = next(self.batches)
            images, flow = batch[:, :3], batch[:, 3:]
            features = self.model.encode_frames(images, flow if flow.shape[1] else None)
            if not aggregator.needs_maps:
                features = features.mean((2, 3))
            self.kept.append((features, images if aggregator.needs_frames else None))
            self.stop += len(batch)

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
        """The features ``[1, t, ...]`` of successive frames; a batch is let go before the next one is made."""
        while first < last:
            self.drop(first)
            self.read(first + 1)
            chunk = slice(first - self.start, last - self.start)
            first = self.start + len(self.kept[0][0])
            yield self.kept[0][0][chunk][None]


def _embed(model: "TrackletModel", calls: list[_Call], features: _Features, out: Tensor, frames_per_batch: int) -> None:
    """Adds every clip's embedding to its tracklet's row of ``out``."""
    aggregator = model.aggregator
    # The first frame that a call or any later one needs: everything before it can go.
    needed = torch.stack([call.frames.min() for call in calls]).flip(0).cummin(0).values.flip(0).tolist()
    needed.append(sys.maxsize)
    done: list[tuple[Tensor, Tensor]] = []
    for k, call in enumerate(calls):
        features.drop(needed[k])
        first, last = int(call.frames.min()), int(call.frames.max()) + 1
        if (
            aggregator.supports_streaming
            and aggregator.needs_maps
            and call.frames.shape[1] > frames_per_batch
            and call.mask.all()
            and torch.equal(call.frames[0], torch.arange(first, last))
            and needed[k + 1] >= last  # no later call wants these frames
        ):
            state = reduce(aggregator.update, features.chunks(first, last), aggregator.begin(1))
            embeddings = aggregator.read(state).embedding
        else:
            clips, images = features.take(call.frames)
            mask = None if call.mask.all() else call.mask.to(clips.device)
            embeddings = aggregator(clips, mask, frames=images)
            del clips, images
        done.append((call.owners, embeddings.float()))
        if len(done) == FLUSH or k == len(calls) - 1:
            owners, embeddings = (torch.cat(parts) for parts in zip(*done, strict=True))
            out.index_add_(0, owners, embeddings.cpu())
            done.clear()


def _join(batches: Sequence[Tensor]) -> Tensor:
    return torch.cat(batches) if len(batches) > 1 else batches[0]


def _bar(total: int, progress: bool):
    if progress:
        try:
            from tqdm import tqdm

            return tqdm(total=total, unit="frame", desc="embed", disable=None, leave=False)
        except ImportError:
            pass
    return nullcontext()
