"""GSTA: global video-level spatio-temporal association, the aggregator of STAR.

Wu, Zhu, Gong: Spatio-Temporal Associative Representation for Video Person Re-Identification, BMVC 2019, Sec. 3.3.

The paper does not say how wide the hidden state is, nor which form of ConvLSTM it takes; ours: 512 channels, 3x3
convolutions, no peepholes, a zero initial state, a forget gate that starts open (bias 1).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import masked
from ..losses import PyramidRankingLoss, TripletLoss
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
from .registry import ClipConfig, Paper, register_aggregator, register_criterion

__all__ = ["GSTA", "ConvLSTM", "GSTACriterion"]

PAPER = Paper(
    name="STAR",
    title="Spatio-Temporal Associative Representation for Video Person Re-Identification",
    authors=("Guile Wu", "Xiatian Zhu", "Shaogang Gong"),
    venue="British Machine Vision Conference (BMVC)",
    year=2019,
    results={
        "mars": (85.4, 76.0),
        "duke": (94.0, 93.4),
        "ilids-vid": (85.9, None),
        "prid-2011": (93.4, None),
    },
)

State = tuple[Tensor, Tensor]


class ConvLSTM(nn.Module):
    """A one-layer convolutional LSTM, 3x3, without peepholes (Shi et al., NeurIPS 2015).

    One convolution over ``[x_t, h_{t-1}]`` is the sum of one over ``x_t`` and one over ``h_{t-1}``. The first does not
    wait for the recurrence and runs over all frames at once. Gates stand in torch's order: i, f, g, o.

    Args:
        in_features: C.
        hidden_features: the channels of the hidden state and of the cell.
    """

    def __init__(self, in_features: int, hidden_features: int):
        super().__init__()
        self.hidden_features = hidden_features
        self.input = nn.Conv2d(in_features, 4 * hidden_features, 3, padding=1)
        self.recurrent = nn.Conv2d(hidden_features, 4 * hidden_features, 3, padding=1, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.input.reset_parameters()
        self.recurrent.reset_parameters()
        bias = self.input.get_parameter("bias")
        nn.init.zeros_(bias)
        nn.init.ones_(bias[self.hidden_features : 2 * self.hidden_features])

    def forward(self, x: Tensor, state: State | None = None, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Runs over the frames in order.

        Args:
            x: ``[B, T, C, H, W]``.
            state: hidden state and cell ``[B, hidden, H, W]`` to go on from; None = zeros.
            mask: bool ``[B, T]``; the state passes unchanged over frames where it is False. None = all are real.

        Returns:
            The hidden states ``[B, T, hidden, H, W]`` and the last state, which is kept in at least float32. A sequence
            cut into pieces, each given the state of the one before, has the hidden states of the whole.
        """
        B, T, _, H, W = x.shape
        from_input = self.input(x.flatten(0, 1)).unflatten(0, (B, T))
        if state is None:
            zeros = masked.at_least_float32(from_input.new_zeros(B, self.hidden_features, H, W))
            state = zeros, zeros
        h, c = state
        real = (None,) * T if mask is None else mask[..., None, None, None].unbind(1)
        outputs = []
        for from_x, is_real in zip(from_input.unbind(1), real, strict=True):
            i, f, g, o = (masked.at_least_float32(from_x) + self.recurrent(h.to(from_x.dtype))).chunk(4, 1)
            new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            new_h = o.sigmoid() * new_c.tanh()
            h = new_h if is_real is None else torch.where(is_real, new_h, h)
            c = new_c if is_real is None else torch.where(is_real, new_c, c)
            outputs.append(h.to(x.dtype))
        return torch.stack(outputs, 1), (h, c)


@register_criterion("star")
class GSTACriterion(Criterion):
    """STAR (BMVC 2019, Eqs. 11-13): cross-entropy, batch-hard triplet and 0.1 x the pyramid ranking regulariser.

    The classifier has no bias, as printed. The aggregator must hand out its input maps, as GSTA does.

    Args:
        num_classes: identities in the training set.
        model: read for the embedding's width.
        margin: of the triplet loss and of the regulariser (alpha_2 = alpha_1).
        pyramid_weight: the factor of the regulariser (lambda); 0 leaves it out, and any aggregator will do.

    Raises:
        TypeError: a model with another aggregator, and the regulariser.
    """

    def __init__(self, num_classes: int, model: nn.Module, margin: float = 0.4, pyramid_weight: float = 0.1):
        super().__init__(num_classes, model)
        aggregator = aggregator_of(model)
        if pyramid_weight and not isinstance(aggregator, GSTA):
            raise TypeError(
                f"criteria 'gsta' and 'star' read the maps that GSTA hands out, got {type(aggregator).__name__}: "
                "pyramid_weight=0 leaves out the term that needs them."
            )
        check_range(0, pyramid_weight=pyramid_weight)
        self.weights = {"pyramid": pyramid_weight}
        self.classifier = initial_classifier(aggregator_of(model).num_features, num_classes, bias=False)
        self.triplet = TripletLoss(margin)
        self.pyramid = PyramidRankingLoss(margin) if pyramid_weight else None

    def terms(self, details: Details, labels: Tensor) -> dict[str, Tensor]:
        terms = {
            "cross_entropy": F.cross_entropy(self.classifier(details.embedding), labels),  # Eq. 11
            "triplet": self.triplet(details.embedding, labels),  # Eq. 12
        }
        if self.pyramid is not None:
            terms["pyramid"] = self.pyramid(details.supervised["features"], labels, details.mask)
        return terms


class _Seen(NamedTuple):
    """What GSTA keeps of a stream."""

    h: Tensor  # [B, hidden, H, W], of no size before the first frame
    c: Tensor
    highest: Tensor  # [B], these three of base.Softmaxed
    weight: Tensor  # [B]
    total: Tensor  # [B, hidden]
    residual: Tensor  # [B, C], the sum of the frame vectors
    seen: Tensor  # [B], the real frames


@register_aggregator(
    "gsta",
    criterion=GSTACriterion,
    paper=PAPER,
    note="its aggregator GSTA",
    clip=ClipConfig(length=10, train_sampling="random", test_sampling="all", distance="euclidean"),
)
class GSTA(Aggregator):
    """ConvLSTM over the maps, temporal attention over its hidden vectors, and the maps' mean as a residual; D = C.

    Eq. 7 prints b8 inside the ReLU, where it would double b7; outside, it cancels in the softmax. It is left out.
    The frame weights are K. ``supervised["features"]`` are the input maps ``[B, T, C, H, W]``, padding zeroed, for the
    pyramid ranking regulariser; no copy is made of them.

    Args:
        in_features: C.
        hidden_features: the channels of the ConvLSTM's state (the paper does not say; ours). At C = 2048 the
            ConvLSTM has 47 million parameters by default, and would have 302 million at a width of 2048.
        start: of W9: ``random``, torch's values; or ``zero``, so that the embedding starts as the maps' mean, where an
            existing embedding was trained (ours).

    Raises:
        ValueError: an unknown ``start``.
    """

    needs_maps = True
    is_recurrent = True

    def __init__(self, in_features: int, hidden_features: int = 512, start: str = "random"):
        if start not in ("random", "zero"):
            raise ValueError(f"GSTA: start must be 'random' or 'zero', got {start!r}.")
        check_range(1, hidden_features=hidden_features)
        super().__init__(in_features, in_features)
        self.lstm = ConvLSTM(in_features, hidden_features)
        self.squeeze = nn.Linear(hidden_features, max(1, hidden_features // 16))  # W7, b7
        self.score = nn.Linear(self.squeeze.out_features, 1, bias=False)  # W8
        self.project = nn.Linear(hidden_features, in_features, bias=False)  # W9
        if start == "zero":
            nn.init.zeros_(self.project.weight)

    def aggregate(self, features: Tensor, mask: Tensor, frames: Tensor | None) -> Details:
        hidden, _ = self.lstm(features, mask=mask)
        h = frame_vectors(hidden)  # Eq. 6
        weights = masked.softmax(self._scores(h), mask)  # Eq. 7
        embedding = self.project(weighted_sum(h, weights)) + masked.mean(frame_vectors(features), mask)  # Eq. 8
        return Details(embedding, mask, weights, {}, {"features": features})

    def _scores(self, h: Tensor) -> Tensor:
        return self.score(F.relu(self.squeeze(h))).squeeze(-1)

    streaming_reason = ""

    def _begin(self, batch: int, like: Tensor) -> _Seen:
        hidden = self.lstm.hidden_features
        nothing, none = like.new_zeros(batch, hidden, 0, 0), like.new_zeros(batch, dtype=torch.int64)
        attended = Softmaxed.begin(batch, (), (hidden,), like)
        return _Seen(nothing, nothing, *attended, like.new_zeros(batch, self.in_features), none)

    def _update(self, state: _Seen, features: Tensor, mask: Tensor) -> _Seen:
        h, c, *attended, residual, seen = state
        if not h.shape[2:].numel():
            h = c = h.new_zeros(*h.shape[:2], *features.shape[3:])
        if h.shape[2:] != features.shape[3:]:
            raise ValueError(
                f"GSTA: expected maps of the size {list(h.shape[2:])} as before, got {list(features.shape)}."
            )
        hidden, (h, c) = self.lstm(features, (h, c), mask)
        vectors = frame_vectors(hidden)
        softmaxed = Softmaxed(*attended).add(self._scores(vectors), vectors, mask)
        residual = residual + masked.at_least_float32(frame_vectors(features)).sum(1)
        return _Seen(h, c, *softmaxed, residual, seen + mask.sum(1))

    def _read(self, state: _Seen) -> Tensor:
        attended = self._like_parameters(Softmaxed(*state[2:5]).read())
        return self.project(attended) + state.residual / state.seen[:, None]  # Eq. 8
