"""The baselines that every paper compares with: mean, max, attention and LSTM over frame vectors, and their criterion.

Maps are average-pooled to one vector per frame first. The papers agree on mean and max pooling; the width of the LSTM
and the form of the attention are ours (one linear score per frame, no bias: a constant would cancel in the softmax).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import masked
from ..losses import TripletLoss
from .base import (
    Aggregator,
    Criterion,
    Details,
    Softmaxed,
    aggregator_of,
    check_range,
    frame_vectors,
    initial_classifier,
    weighted_sum,
)
from .registry import ClipConfig, register_aggregator, register_criterion

__all__ = ["LSTM", "Attention", "BaselineCriterion", "Max", "Mean"]

_CLIP = ClipConfig(length=4)  # the papers differ in the clips of their baselines; ours


@register_criterion("baseline")
class BaselineCriterion(Criterion):
    """Cross-entropy over identities + batch-hard triplet, both on the embedding.

    Args:
        num_classes: identities in the training set.
        model: read for the embedding's width.
        margin: of the triplet loss; None = soft margin.
        label_smoothing: of the cross-entropy, 0 to 1.
        mining: ``hard`` or ``random`` (see :class:`TripletLoss`).
        neck: a BatchNorm between the embedding and both terms. It is the criterion's: what is compared in the test has
            not passed it. It takes the embedding's scale out of the losses, so that aggregators whose embeddings
            differ in scale can be compared under them.
        distance: of the triplet, ``euclidean`` or ``cosine``.
    """

    def __init__(
        self,
        num_classes: int,
        model: nn.Module,
        margin: float | None = 0.3,
        label_smoothing: float = 0.0,
        mining: str = "hard",
        neck: bool = False,
        distance: str = "euclidean",
    ):
        super().__init__(num_classes, model)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be a share, from 0 to 1, got {label_smoothing!r}.")
        width = aggregator_of(model).num_features
        self.neck = nn.BatchNorm1d(width) if neck else nn.Identity()
        self.classifier = initial_classifier(width, num_classes)
        self.cross_entropy = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.triplet = TripletLoss(margin, mining, distance=distance)

    def terms(self, details: Details, labels: Tensor) -> dict[str, Tensor]:
        x = self.neck(details.embedding)
        return {"cross_entropy": self.cross_entropy(self.classifier(x), labels), "triplet": self.triplet(x, labels)}


class Sums(NamedTuple):
    """A streaming state that sums the frames and counts them."""

    total: Tensor  # [B, C]
    seen: Tensor  # [B], the real frames

    @classmethod
    def begin(cls, batch: int, width: int, like: Tensor) -> "Sums":
        return cls(like.new_zeros(batch, width), like.new_zeros(batch, dtype=torch.int64))

    def add(self, x: Tensor, mask: Tensor) -> "Sums":
        return Sums(self.total + masked.at_least_float32(masked.zero(x, mask)).sum(1), self.seen + mask.sum(1))

    def mean(self) -> Tensor:
        return self.total / self.seen[:, None]


@register_aggregator("mean", clip=_CLIP)
class Mean(Aggregator):
    """Temporal average pooling: the mean of the real frames' vectors, D = C."""

    def __init__(self, in_features: int):
        super().__init__(in_features, in_features)

    def aggregate(self, features: Tensor, mask: Tensor, frames: Tensor | None) -> Details:
        return Details(masked.mean(frame_vectors(features), mask), mask, masked.uniform(mask, features), {}, {})

    streaming_reason = ""

    def _begin(self, batch: int, like: Tensor) -> Sums:
        return Sums.begin(batch, self.in_features, like)

    def _update(self, state: Sums, features: Tensor, mask: Tensor) -> Sums:
        return state.add(frame_vectors(features), mask)

    def _read(self, state: Sums) -> Tensor:
        return state.mean()


class _Highest(NamedTuple):
    values: Tensor  # [B, C]
    seen: Tensor  # [B], the real frames


@register_aggregator("max", clip=_CLIP)
class Max(Aggregator):
    """Temporal max pooling, channel by channel, D = C. A frame's weight is the share of channels that it wins."""

    def __init__(self, in_features: int):
        super().__init__(in_features, in_features)

    def aggregate(self, features: Tensor, mask: Tensor, frames: Tensor | None) -> Details:
        vectors = frame_vectors(features).masked_fill(~mask[..., None], float("-inf"))
        embedding, winner = vectors.max(1)
        won = winner[:, None] == torch.arange(mask.shape[1], device=mask.device)[:, None]
        return Details(embedding, mask, masked.at_least_float32(won.to(vectors.dtype)).mean(2), {}, {})

    streaming_reason = ""

    def _begin(self, batch: int, like: Tensor) -> _Highest:
        lowest = like.new_full((batch, self.in_features), float("-inf"))
        return _Highest(lowest, like.new_zeros(batch, dtype=torch.int64))

    def _update(self, state: _Highest, features: Tensor, mask: Tensor) -> _Highest:
        vectors = frame_vectors(features).masked_fill(~mask[..., None], float("-inf"))
        return _Highest(torch.maximum(state.values, vectors.amax(1)), state.seen + mask.sum(1))

    def _read(self, state: _Highest) -> Tensor:
        return state.values


class _Attended(NamedTuple):
    highest: Tensor  # [B], these three of base.Softmaxed
    weight: Tensor  # [B]
    total: Tensor  # [B, C]
    seen: Tensor  # [B], the real frames


@register_aggregator("attention", clip=_CLIP)
class Attention(Aggregator):
    """One linear score per frame, softmax over the real frames, weighted sum: D = C."""

    def __init__(self, in_features: int):
        super().__init__(in_features, in_features)
        self.score = nn.Linear(in_features, 1, bias=False)

    def aggregate(self, features: Tensor, mask: Tensor, frames: Tensor | None) -> Details:
        vectors = frame_vectors(features)
        weights = masked.softmax(self.score(vectors).squeeze(-1), mask)
        return Details(weighted_sum(vectors, weights), mask, weights, {}, {})

    streaming_reason = ""

    def _begin(self, batch: int, like: Tensor) -> _Attended:
        softmaxed = Softmaxed.begin(batch, (), (self.in_features,), like)
        return _Attended(*softmaxed, like.new_zeros(batch, dtype=torch.int64))

    def _update(self, state: _Attended, features: Tensor, mask: Tensor) -> _Attended:
        vectors = frame_vectors(features)
        softmaxed = Softmaxed(*state[:3]).add(self.score(vectors).squeeze(-1), vectors, mask)
        return _Attended(*softmaxed, state.seen + mask.sum(1))

    def _read(self, state: _Attended) -> Tensor:
        return Softmaxed(*state[:3]).read()


class _Cell(NamedTuple):
    h: Tensor  # [B, D]
    c: Tensor  # [B, D]
    total: Tensor  # [B, D], of the outputs
    seen: Tensor  # [B], the real frames


@register_aggregator("lstm", clip=_CLIP)
class LSTM(Aggregator):
    """A one-layer LSTM over the real frames in order; the embedding is the mean of its outputs.

    The cell is written out (gates in torch's order i, f, g, o): ``nn.LSTM`` does not compile into one graph.

    Args:
        in_features: C.
        hidden_features: the width of the state, D.
    """

    is_recurrent = True

    def __init__(self, in_features: int, hidden_features: int = 512):
        check_range(1, hidden_features=hidden_features)
        super().__init__(in_features, hidden_features)
        self.input = nn.Linear(in_features, 4 * hidden_features)
        self.recurrent = nn.Linear(hidden_features, 4 * hidden_features, bias=False)

    def aggregate(self, features: Tensor, mask: Tensor, frames: Tensor | None) -> Details:
        order = masked.order(mask)
        from_input = self.input(masked.take(frame_vectors(features), order))
        h = c = from_input.new_zeros(from_input.shape[0], self.num_features)
        outputs = []
        for from_x in from_input.unbind(1):
            h, c = self._step(from_x, h, c)
            outputs.append(h)
        embedding = masked.mean(torch.stack(outputs, 1), mask.gather(1, order))
        return Details(embedding, mask, masked.uniform(mask, features), {}, {})

    def _step(self, from_x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (from_x + self.recurrent(h)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    streaming_reason = ""

    def _begin(self, batch: int, like: Tensor) -> _Cell:
        zeros = like.new_zeros(batch, self.num_features)
        return _Cell(zeros, zeros, zeros, like.new_zeros(batch, dtype=torch.int64))

    def _update(self, state: _Cell, features: Tensor, mask: Tensor) -> _Cell:
        h, c, total, seen = state
        from_input = self.input(frame_vectors(features))
        for from_x, real in zip(from_input.unbind(1), mask[..., None].unbind(1), strict=True):
            new_h, new_c = self._step(from_x, h.to(from_x.dtype), c.to(from_x.dtype))
            h, c = torch.where(real, new_h.to(h.dtype), h), torch.where(real, new_c.to(c.dtype), c)
            total = torch.where(real, total + h, total)
        return _Cell(h, c, total, seen + mask.sum(1))

    def _read(self, state: _Cell) -> Tensor:
        return state.total / state.seen[:, None]
