"""Batches of clips: P identities with K clips each, pairs of one person, or every tracklet once."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from .sampling import CPU, seeded_generator

__all__ = ["Draw", "IdentityBatchSampler", "PairBatchSampler", "TrackletBatchSampler"]


class Draw(NamedTuple):
    """What a batch asks a :class:`~temporal_agg.data.ClipDataset` for; its clip is a function of these numbers.

    Attributes:
        index: the tracklet.
        number: 0 for its first clip in this epoch, 1 for the second, ...
        epoch: carried along, so that it reaches workers that live longer than an epoch.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index
    number: int = 0
    epoch: int = 0


class _BatchSampler(Sampler[list[Draw]]):
    """What the samplers share: an epoch takes every one of ``total`` things once, ``per_batch`` of them a batch."""

    def __init__(self, total: int, per_batch: int, what: str, argument: str, seed: int, rank: int, world_size: int):
        if per_batch < 1:
            raise ValueError(f"{argument} must be at least 1, got {per_batch}.")
        if total < per_batch:
            raise ValueError(
                f"a batch of {per_batch} needs as many {what} in the training set, which has {total}: lower {argument}."
            )
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be 0 to world_size - 1 = {world_size - 1}, got {rank}.")
        if per_batch % world_size:
            raise ValueError(
                f"{argument} = {per_batch} must be a multiple of world_size = {world_size}, so that each process gets "
                "as many."
            )
        self.total = total
        self.per_batch = per_batch
        self.seed = seed
        self.epoch = 0
        share = per_batch // world_size
        self.share = slice(rank * share, (rank + 1) * share)

    @property
    def sampler(self) -> "_BatchSampler":
        """Itself: Lightning and others call ``batch_sampler.sampler.set_epoch``, as torch's own batch samplers want."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch's order and clips come next; call it on every rank before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.total / self.per_batch)

    def __iter__(self) -> Iterator[list[Draw]]:
        generator = seeded_generator(self.seed, self.epoch)
        order = torch.randperm(self.total, generator=generator, device=CPU).tolist()
        # The last batch is filled from the front of the order: per_batch at most, hence never one of its own.
        order += order[: -len(order) % self.per_batch]
        drawn: Counter[int] = Counter()
        for start in range(0, len(order), self.per_batch):
            places = order[start : start + self.per_batch]
            batch = [self._draws(place, generator, drawn) for place in places]
            yield [draw for draws in batch[self.share] for draw in draws]

    def _draws(self, place: int, generator: torch.Generator, drawn: Counter[int]) -> list[Draw]:
        """What thing ``place`` gives to its batch; ``drawn`` counts the clips of each tracklet in this epoch."""
        draws = []
        for index in self._tracklets_of(place, generator):
            draws.append(Draw(index, drawn[index], self.epoch))
            drawn[index] += 1
        return draws

    def _tracklets_of(self, place: int, generator: torch.Generator) -> list[int]:
        raise NotImplementedError


class IdentityBatchSampler(_BatchSampler):
    """Batches of P identities with K clips each; every identity comes once in an epoch.

    Where the number of identities is no multiple of P, the last batch is filled up with identities seen before. An
    identity with more than K tracklets gives K of them, drawn without replacement, from distinct cameras first if
    ``cameras`` are given; one with fewer gives each about equally often, with other frames each time. The order is a
    function of (seed, epoch) only.

    With ``world_size`` W > 1 each rank yields its P / W identities of the same global batches.

    Args:
        labels: the identity of each tracklet.
        identities_per_batch: P, over all ranks.
        clips_per_identity: K.
        seed: >= 0.
        rank: this process's number, 0 .. W - 1.
        world_size: W.
        cameras: the camera of each tracklet.

    Raises:
        ValueError: fewer identities than P, a P that W does not divide, or a number out of range.

    Example:
        >>> from temporal_agg.data import IdentityBatchSampler
        >>> labels = [0, 0, 0, 1, 1, 2, 2, 2]  # of the training tracklets
        >>> batches = IdentityBatchSampler(labels, identities_per_batch=2, clips_per_identity=2, seed=0)
        >>> batches.set_epoch(0)
        >>> first = next(iter(batches))  # DataLoader(dataset, batch_sampler=batches, ...) does this
        >>> len(first), len({labels[draw.index] for draw in first})
        (4, 2)
    """

    def __init__(
        self,
        labels: Sequence[int],
        identities_per_batch: int,
        clips_per_identity: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        cameras: Sequence[int] | None = None,
    ):
        self.tracklets = list(_by_identity(labels, cameras).values())
        super().__init__(
            len(self.tracklets), identities_per_batch, "identities", "identities_per_batch", seed, rank, world_size
        )
        if clips_per_identity < 1:
            raise ValueError(f"clips_per_identity must be at least 1, got {clips_per_identity}.")
        self.clips_per_identity = clips_per_identity
        self.cameras = cameras

    def _tracklets_of(self, place: int, generator: torch.Generator) -> list[int]:
        """K tracklets of an identity, in random order."""
        own = self.tracklets[place]
        shuffled = [own[i] for i in torch.randperm(len(own), generator=generator, device=CPU).tolist()]
        if self.cameras is not None:
            seen: Counter[int] = Counter()
            turn = {}
            for index in shuffled:
                turn[index] = seen[self.cameras[index]]
                seen[self.cameras[index]] += 1
            shuffled.sort(key=turn.__getitem__)  # each camera's first, then each camera's second, ...
        return [shuffled[i % len(shuffled)] for i in range(self.clips_per_identity)]


class PairBatchSampler(_BatchSampler):
    """Batches of N pairs, clips 2j and 2j + 1 of one person; every tracklet comes once in an epoch as the first one.

    The second is a random tracklet of the same person from another camera; where there is none, another tracklet of
    the person; where there is none, another clip of the same. Where the number of tracklets is no multiple of N, the
    last batch is filled from the front of the order, with other clips. The order is a function of (seed, epoch) only.

    With ``world_size`` W > 1 each rank yields its N / W pairs of the same global batches.

    Args:
        labels: the identity of each tracklet.
        pairs_per_batch: N, over all ranks; a batch has 2N clips.
        seed: >= 0.
        rank: this process's number, 0 .. W - 1.
        world_size: W.
        cameras: the camera of each tracklet; None = not known.

    Raises:
        ValueError: fewer tracklets than N, an N that W does not divide, or a number out of range.
    """

    def __init__(
        self,
        labels: Sequence[int],
        pairs_per_batch: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        cameras: Sequence[int] | None = None,
    ):
        super().__init__(len(labels), pairs_per_batch, "tracklets", "pairs_per_batch", seed, rank, world_size)
        tracklets = _by_identity(labels, cameras)
        self.partners = []
        for index, label in enumerate(labels):
            others = [i for i in tracklets[int(label)] if i != index]
            elsewhere = [i for i in others if cameras is not None and cameras[i] != cameras[index]]
            self.partners.append(elsewhere or others or [index])

    def _tracklets_of(self, place: int, generator: torch.Generator) -> list[int]:
        partners = self.partners[place]
        return [place, partners[int(torch.randint(len(partners), (), generator=generator, device=CPU))]]


class TrackletBatchSampler(_BatchSampler):
    """Batches of clips in random order, from an epoch that takes of each tracklet as many as it is told.

    ``TrackletBatchSampler([1] * len(tracklets), 10)`` is one clip of every tracklet, ten a batch. The number of clips n
    of a tracklet counts as clips 0 to n - 1: together with the policy ``each`` and clips of one frame,
    ``TrackletBatchSampler([len(t) for t in tracklets], 128)`` is every frame of every tracklet once.

    Where the number of clips is no multiple of the batch, the last batch is filled from the front of the order, with
    the same clips again. The order is a function of (seed, epoch) only.

    With ``world_size`` W > 1 each rank yields its share of the same global batches.

    Args:
        clips: the number of clips of each tracklet in an epoch.
        batch_size: clips, over all ranks.
        seed: >= 0.
        rank: this process's number, 0 .. W - 1.
        world_size: W.

    Raises:
        ValueError: fewer clips than a batch, a batch that W does not divide, or a number out of range.
    """

    def __init__(self, clips: Sequence[int], batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1):
        self.starts = list(accumulate(clips, initial=0))
        super().__init__(self.starts[-1], batch_size, "clips", "batch_size", seed, rank, world_size)

    def _draws(self, place: int, generator: torch.Generator, drawn: Counter[int]) -> list[Draw]:
        index = bisect_right(self.starts, place) - 1
        return [Draw(index, place - self.starts[index], self.epoch)]


def _by_identity(labels: Sequence[int], cameras: Sequence[int] | None) -> dict[int, list[int]]:
    """The tracklets of each identity, in the order of their first ones."""
    if cameras is not None and len(cameras) != len(labels):
        raise ValueError(f"expected one camera for each of the {len(labels)} labels, got {len(cameras)}.")
    if len(labels) and min(labels) < 0:
        raise ValueError(f"labels must be 0 or more, got {min(labels)}: junk is never trained on, leave it out.")
    tracklets: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        tracklets.setdefault(int(label), []).append(index)
    return tracklets
