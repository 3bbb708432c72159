"""Robust means of the frames: what a tracker mixed in from somebody else does not count. Nothing is trained.

The estimators are textbook ones: the geometric median by Weiszfeld's iteration, and Tukey's biweight M-estimate of
location, started there. A redescending estimate like the biweight forgets what is far away altogether, but needs a
start that foreign frames cannot carry off, and a scale: the median of the distances.

    geometric_median(x, mask)             # [B, T, C] -> [B, C]
    biweight_mean(x, mask)                # the same; with return_weights=True also how much each frame counted
    outlier_mask(features, mask)          # the mask of the frames that count: for any other aggregator
    tracklet_purity(features, mask)       # whether a tracklet holds two people, and where the other one is
"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import masked
from .base import Aggregator, Details, Frames, check_range, frame_vectors
from .registry import ClipConfig, register_aggregator

__all__ = ["Purity", "Robust", "biweight_mean", "geometric_median", "outlier_mask", "tracklet_purity"]

PAIRS = 1 << 22  # runs of frames that tracklet_purity looks at in one go


def geometric_median(x: Tensor, mask: Tensor | None = None, rounds: int = 20) -> Tensor:
    """The point with the smallest sum of distances to the real frames, by Weiszfeld's iteration.

    It starts at the median of each channel. A frame that the estimate falls upon counts as if it were a thousandth of
    the median distance away, or it would hold the estimate. Breakdown point 1/2: finite values, whatever they are, in
    under half of the frames move it by a bounded amount.

    Args:
        x: ``[B, T, C]``.
        mask: bool ``[B, T]``, True = a real frame; None = all are real.
        rounds: of the iteration.

    Returns:
        ``[B, C]``, at least float32.
    """
    mask = masked.all_real(x) if mask is None else mask
    x = masked.zero(masked.at_least_float32(x), mask)
    centre = _median(x, mask)
    for _ in range(rounds):
        distance = _distances(x, centre)
        nearest = torch.maximum(_median(distance, mask).detach() * 1e-3, _rounding(centre))
        closeness = 1 / torch.maximum(distance, nearest[:, None])
        centre = _weighted_mean(x, masked.zero(closeness, mask))
    return centre


@overload
def biweight_mean(
    x: Tensor,
    mask: Tensor | None = None,
    c: float = 2.0,
    rounds: int = 20,
    start: str = "median",
    *,
    return_weights: Literal[False] = False,
) -> Tensor: ...


@overload
def biweight_mean(
    x: Tensor,
    mask: Tensor | None = None,
    c: float = 2.0,
    rounds: int = 20,
    start: str = "median",
    *,
    return_weights: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def biweight_mean(
    x: Tensor,
    mask: Tensor | None = None,
    c: float = 2.0,
    rounds: int = 20,
    start: str = "median",
    *,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Tukey's biweight M-estimate of location.

    In each round a frame at distance d of the estimate weighs (1 - u^2)^2, u = d / (c * median of the distances), and
    nothing from u = 1 on; the next estimate is the weighted mean. Breakdown point 1/2 from the geometric median on, 0
    from the mean on. The gradient flows through every round.

    Args:
        x: ``[B, T, C]``.
        mask: bool ``[B, T]``, True = a real frame; None = all are real.
        c: how many median distances away a frame counts no more.
        rounds: of the iteration, and of the geometric median's before it.
        start: ``median``: the geometric median; ``mean``.
        return_weights: return the weights too.

    Returns:
        ``[B, C]``, at least float32; and the last round's weights ``[B, T]``, from 0 to 1, 0 for padding.

    Raises:
        ValueError: ``c`` not above 1, no round or more than 1000, or an unknown ``start``.
    """
    if not c > 1:
        raise ValueError(f"c must be above 1, got {c}: fewer than half of the frames would count.")
    check_range(1, 1000, rounds=rounds)
    if start not in ("median", "mean"):
        raise ValueError(f"start must be 'median' or 'mean', got {start!r}.")
    mask = masked.all_real(x) if mask is None else mask
    x = masked.zero(masked.at_least_float32(x), mask)
    centre = masked.mean(x, mask) if start == "mean" else geometric_median(x, mask, rounds)
    weights = mask.to(x.dtype)
    for _ in range(rounds):
        distance = _distances(x, centre)
        reach = torch.maximum(c * _median(distance, mask), _rounding(centre))
        u = (distance / reach[:, None]).clamp(max=1)
        weights = masked.zero((1 - u.square()).square(), mask)
        centre = _weighted_mean(x, weights)
    return (centre, weights) if return_weights else centre


def outlier_mask(
    features: Tensor, mask: Tensor | None = None, c: float = 1.5, rounds: int = 20, start: str = "median"
) -> Tensor:
    """The mask without the frames that are far from the others: those that :class:`Robust` with this c gives no weight.

    Hand it to any aggregator, and foreign frames are ignored. At least half of a clip's real frames stay. What stays
    counts in full, while :class:`Robust` weighs it by its distance: so c is smaller here.

    Args:
        features: ``[B, T, C, H, W]`` or ``[B, T, C]``; compared as average-pooled vectors of unit length.
        mask: bool ``[B, T]``, True = a real frame; None = all are real.
        c, rounds, start: of :func:`biweight_mean`.

    Returns:
        bool ``[B, T]``, True = a real frame that counts.
    """
    mask = masked.all_real(features) if mask is None else mask
    vectors = _unit(frame_vectors(masked.zero(features, mask)))
    _, weights = biweight_mean(vectors.detach(), mask, c, rounds, start, return_weights=True)
    return mask & (weights > 0)


class Purity(NamedTuple):
    """Whether B tracklets hold two people, by :func:`tracklet_purity`; on the CPU.

    Attributes:
        score: float32 ``[B]``, -1 to 1; 1 = the same look throughout.
        start: int64 ``[B]``, the first frame that may show somebody else, -1 = too few frames to say.
        stop: int64 ``[B]``, the place behind the last of them, -1 likewise.
    """

    score: Tensor
    start: Tensor
    stop: Tensor


@torch.no_grad()
def tracklet_purity(features: Tensor, mask: Tensor | None = None, least: int = 2) -> Purity:
    """Says how much like two people a tracklet looks, and where the second one would be.

    Of all runs of frames without the first one, that is taken whose mean differs most from the mean of the other
    frames (the least sum of squares that is left within the two parts; the frame vectors have unit length), and the
    score is the cosine similarity of the two means. Where a track changes hands once, the run goes from there to the
    end; somebody who walks through its middle is a run within. There is always such a place: the score says whether to
    believe it. What a person's own frames score depends on the model, as distances do: sort tracklets by it, and look
    at the lowest first.

    Time grows with the square of the number of frames; memory does not.

    Args:
        features: ``[B, T, C, H, W]`` or ``[B, T, C]``; compared as average-pooled vectors of unit length.
        mask: bool ``[B, T]``, True = a real frame; None = all are real.
        least: frames of the run and of the rest. One alone would make every bad frame a second person.

    Returns:
        A :class:`Purity`; places are along T. With fewer than 2 ``least`` real frames 1, -1 and -1.

    Raises:
        ValueError: ``least`` below 1.
    """
    if least < 1:
        raise ValueError(f"least must be at least 1 frame, got {least}.")
    mask = masked.all_real(features) if mask is None else mask
    order = masked.order(mask)
    unit = masked.zero(_unit(frame_vectors(masked.zero(features, mask))), mask)
    x, order, count = masked.take(unit, order).to("cpu", torch.float64), order.cpu(), mask.sum(1).cpu()
    sums = torch.cat([torch.zeros_like(x[:, :1]), x.cumsum(1)], 1)  # [B, T + 1, C], of the frames before each place
    squares, of_all = sums.square().sum(2), (sums @ sums[:, -1:].mT).squeeze(2)
    places = torch.arange(sums.shape[1], device="cpu")
    best = x.new_full((len(x),), -float("inf"))
    score, start, stop = torch.ones_like(best), torch.full_like(count, -1), torch.full_like(count, -1)
    step = max(1, PAIRS // sums[..., 0].numel())
    for first in range(1, len(places) - least, step):
        starts = places[first : first + step]
        length = places - starts[:, None]  # [s, T + 1], of the run from each start to each place
        rest = count[:, None, None] - length
        run = squares[:, None] + squares[:, starts, None] - 2 * sums[:, starts] @ sums.mT  # |sum of the run|^2
        both = of_all[:, None] - of_all[:, starts, None] - run  # (sum of the run) . (sum of the rest)
        others = squares[:, -1:, None] - run - 2 * both
        fits = (length >= least) & (rest >= least) & (places <= count[:, None, None])
        between = (run / length + others / rest).masked_fill(~fits, -float("inf"))
        found, where = between.flatten(1).max(1)
        better = found > best
        cosine = both / (run.clamp(min=0) * others.clamp(min=0)).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
        best = torch.where(better, found, best)
        score = torch.where(better, cosine.flatten(1).gather(1, where[:, None]).squeeze(1).clamp(-1, 1), score)
        start = torch.where(better, first + where // len(places), start)
        stop = torch.where(better, where % len(places), stop)
    place = torch.stack([start, stop - 1], 1)  # among the real frames
    place = torch.where(place < 0, place, order.gather(1, place.clamp(min=0)))
    return Purity(score.float(), place[:, 0], torch.where(start < 0, -1, place[:, 1] + 1))


@register_aggregator("robust", clip=ClipConfig(length=4, test_sampling="all"))
class Robust(Aggregator):
    """The biweight mean of the frame vectors at unit length, D = C; nothing is trained.

    Breakdown point 1/2: whatever finite values stand in under half of the frames, the embedding moves by a bounded
    amount. The frame weights are what it believed, its weights of the last round. Tracklets are taken as a whole: in a
    short window, foreign frames can be most of them. What it keeps on WARD is measured in the documentation.

    Args:
        in_features: C.
        c: how many median distances away a frame counts no more (see :func:`biweight_mean`).
        rounds: of the iterations.
        start: ``median`` or ``mean``.

    Raises:
        ValueError: see :func:`biweight_mean`.
    """

    streaming_reason = ""

    def __init__(self, in_features: int, c: float = 2.0, rounds: int = 20, start: str = "median"):
        super().__init__(in_features, in_features)
        biweight_mean(torch.zeros(1, 1, 1), None, c, rounds, start)  # refuses what it refuses
        self.c, self.rounds, self.start = c, rounds, start

    def aggregate(self, features: Tensor, mask: Tensor, frames: Tensor | None) -> Details:
        details = self._weigh(_unit(frame_vectors(features)), mask)
        return details._replace(embedding=details.embedding.to(features.dtype))

    def _weigh(self, unit: Tensor, mask: Tensor) -> Details:
        centre, weights = biweight_mean(unit, mask, self.c, self.rounds, self.start, return_weights=True)
        return Details(centre, mask, weights / weights.sum(1, keepdim=True), {}, {})

    def _begin(self, batch: int, like: Tensor) -> Frames:
        return Frames.begin(batch, self.in_features, like)

    def _update(self, state: Frames, features: Tensor, mask: Tensor) -> Frames:
        return state.add(_unit(frame_vectors(features)), mask)

    def _read(self, state: Frames) -> Details:
        return self._weigh(state.vectors, state.mask)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, c={self.c}, rounds={self.rounds}, start={self.start!r}"


def _unit(x: Tensor) -> Tensor:
    """``x`` at unit length in at least float32, for any finite values: their largest is taken out first."""
    x = masked.at_least_float32(x)
    largest = x.detach().abs().amax(-1, keepdim=True)
    return F.normalize(x / torch.where(largest > 0, largest, 1), dim=-1)


def _distances(x: Tensor, centre: Tensor) -> Tensor:
    """``[B, T]``; the gradient at distance 0 is 0."""
    squares = (x - centre[:, None]).square().sum(2)
    tiny = torch.finfo(x.dtype).tiny
    return torch.where(squares < tiny, 0, squares.clamp(min=tiny).sqrt())


def _rounding(centre: Tensor) -> Tensor:
    """Distances ``[B]`` below which frames are the same up to rounding."""
    norm = centre.detach().abs().amax(1) * centre.shape[1] ** 0.5
    return (16 * torch.finfo(centre.dtype).eps * norm).clamp(min=torch.finfo(centre.dtype).tiny ** 0.5)


def _median(x: Tensor, mask: Tensor) -> Tensor:
    """The (lower) median over the real frames: ``[B, T, ...]`` -> ``[B, ...]``."""
    real = mask.view(mask.shape + (1,) * (x.dim() - 2))
    ordered = x.masked_fill(~real, float("inf")).sort(1).values
    middle = ((mask.sum(1) - 1) // 2).view((-1, 1) + (1,) * (x.dim() - 2))
    return ordered.gather(1, middle.expand(-1, 1, *x.shape[2:])).squeeze(1)


def _weighted_mean(x: Tensor, weights: Tensor) -> Tensor:
    weights = weights / weights.sum(1, keepdim=True)  # first, so that what is large and weighs nothing stays finite
    return (weights[..., None] * x).sum(1)  # no matrix product, which autocast would round
