"""P x K batches: P identities with K clips each."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from .sampling import seeded_generator

__all__ = ["Draw", "IdentityBatchSampler"]


class Draw(NamedTuple):
    """What a batch asks a :class:`~temporal_agg.data.ClipDataset` for; its clip is a function of these numbers.

    Attributes:
        index: the tracklet.
        number: 0 for its first clip in this epoch, 1 for the second, ...
        epoch: carried along, so that it reaches workers that live longer than an epoch.
    """

    index: int
    number: int = 0
    epoch: int = 0


class IdentityBatchSampler(Sampler[list[Draw]]):
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
        self.tracklets: dict[int, list[int]] = {}
        for index, label in enumerate(labels):
            self.tracklets.setdefault(int(label), []).append(index)
        if identities_per_batch < 1 or clips_per_identity < 1:
            raise ValueError(
                f"identities_per_batch and clips_per_identity must be at least 1, got {identities_per_batch} and "
                f"{clips_per_identity}."
            )
        if len(self.tracklets) < identities_per_batch:
            raise ValueError(
                f"a batch of {identities_per_batch} identities needs as many in the training set, which has "
                f"{len(self.tracklets)}: lower identities_per_batch."
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be 0 to world_size - 1 = {world_size - 1}, got {rank}.")
        if identities_per_batch % world_size:
            raise ValueError(
                f"identities_per_batch = {identities_per_batch} must be a multiple of world_size = {world_size}, so "
                "that each process gets as many."
            )
        if cameras is not None and len(cameras) != len(labels):
            raise ValueError(f"expected one camera for each of the {len(labels)} labels, got {len(cameras)}.")
        self.identities_per_batch = identities_per_batch
        self.clips_per_identity = clips_per_identity
        self.seed = seed
        self.epoch = 0
        self.cameras = cameras
        share = identities_per_batch // world_size
        self.share = slice(rank * share, (rank + 1) * share)

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch's order and clips come next; call it on every rank before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.tracklets) / self.identities_per_batch)

    def __iter__(self) -> Iterator[list[Draw]]:
        generator = seeded_generator(self.seed, self.epoch)
        identities = list(self.tracklets)
        order = torch.randperm(len(identities), generator=generator).tolist()
        # The last batch is filled from the front of the order: P identities at most, hence never one of its own.
        order += order[: -len(order) % self.identities_per_batch]
        drawn: Counter[int] = Counter()
        for start in range(0, len(order), self.identities_per_batch):
            batch = []
            for place in order[start : start + self.identities_per_batch]:
                draws = []
                for index in self._tracklets_of(identities[place], generator):
                    draws.append(Draw(index, drawn[index], self.epoch))
                    drawn[index] += 1
                batch.append(draws)
            yield [draw for draws in batch[self.share] for draw in draws]

    def _tracklets_of(self, identity: int, generator: torch.Generator) -> list[int]:
        """K tracklets of an identity, in random order."""
        own = self.tracklets[identity]
        shuffled = [own[i] for i in torch.randperm(len(own), generator=generator).tolist()]
        if self.cameras is not None:
            seen: Counter[int] = Counter()
            turn = {}
            for index in shuffled:
                turn[index] = seen[self.cameras[index]]
                seen[self.cameras[index]] += 1
            shuffled.sort(key=turn.__getitem__)  # each camera's first, then each camera's second, ...
        return [shuffled[i % len(shuffled)] for i in range(self.clips_per_identity)]
