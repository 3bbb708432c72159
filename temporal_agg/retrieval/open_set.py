"""Who is this, or nobody? Identification where some queries are of people whom the gallery does not know."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ._arrays import Ids
from .evaluate import Protocol

__all__ = ["Calibration", "OpenSetMetrics", "calibrate", "open_set"]

_RIDGE = 1e-2  # on the slopes of standardised variables: keeps them finite where distances part the pairs perfectly
_ROUNDS = 100


@dataclass(frozen=True, eq=False)
class OpenSetMetrics:
    """Rates as fractions from 0 to 1.

    A query is *identified* as its nearest in the gallery where that is nearer than the threshold, else it is unknown.

    Attributes:
        fpirs: float64 ``[n]``, the false positive identification rates that were asked for.
        tpirs: float64 ``[n]``, the true positive identification rate (detection and identification rate at rank 1) at
            the largest threshold that keeps to each of them.
        thresholds: float64 ``[n]``, these thresholds; infinity where everybody may be identified.
        curve_thresholds: float64 ``[m]``, ascending: every threshold at which more queries without a match would be
            taken for somebody, and infinity.
        curve_fpir: float64 ``[m]``, the share of the queries without a match that are identified as somebody.
        curve_tpir: float64 ``[m]``, the share of the queries with a match that are identified as the right person.
        mated: how many queries have a match.
        unmated: how many have none.
    """

    fpirs: np.ndarray
    tpirs: np.ndarray
    thresholds: np.ndarray
    curve_thresholds: np.ndarray
    curve_fpir: np.ndarray
    curve_tpir: np.ndarray
    mated: int
    unmated: int

    def __repr__(self) -> str:
        rates = zip(self.tpirs, self.fpirs, self.thresholds, strict=True)
        shown = ", ".join(f"TPIR {tpir:.1%} at FPIR {fpir:.3g} (below {t:.4g})" for tpir, fpir, t in rates)
        return f"OpenSetMetrics({shown}; {self.mated} queries with a match, {self.unmated} without)"

    def at(self, fpir: float) -> tuple[float, float]:
        """The true positive identification rate at a false positive rate, and its threshold.

        Raises:
            ValueError: no rate from 0 to 1.
        """
        point = _allowed(self.curve_fpir, fpir)
        return float(self.curve_tpir[point]), float(self.curve_thresholds[point])


def open_set(
    distances: np.ndarray | Tensor,
    query_pids: Ids,
    query_cams: Ids,
    gallery_pids: Ids,
    gallery_cams: Ids,
    *,
    query_index: Ids | None = None,
    ambiguous_pids: Ids | None = None,
    fpirs: Sequence[float] = (0.001, 0.01, 0.1),
) -> OpenSetMetrics:
    """How many people are recognised if so many strangers may be taken for somebody.

    Who matches whom, and who is ignored, is as in ``evaluate``. Queries without a match are the strangers: put queries
    of people into it whom the gallery does not have. (A person who is seen in the query's own camera only is ignored,
    hence a stranger, too.) At equal distance a wrong tracklet comes before a match.

    Args:
        distances: as in ``evaluate``.
        query_pids: as in ``evaluate``.
        query_cams: as in ``evaluate``.
        gallery_pids: as in ``evaluate``.
        gallery_cams: as in ``evaluate``.
        query_index: as in ``evaluate``.
        ambiguous_pids: as in ``evaluate``.
        fpirs: false positive identification rates to be kept to, from 0 to 1. Rates below 1 / (strangers) are 0.

    Raises:
        TypeError: as in ``evaluate``.
        ValueError: as in ``evaluate``; a rate outside 0 to 1; no query with a match, or none without.
    """
    protocol = Protocol(distances, query_pids, query_cams, gallery_pids, gallery_cams, query_index, ambiguous_pids)

    def nearest(q: int, row: np.ndarray) -> tuple[float, float, bool]:
        """The nearest match and the nearest wrong one (infinity if there is none); whether there is a match."""
        seen = protocol.of(q)
        wrong = np.ones(len(row), bool)
        for part in seen.not_wrong:
            wrong[part] = False
        return (
            float(row[seen.matches].min(initial=np.inf)),
            float(row[wrong].min(initial=np.inf)),
            bool(len(seen.matches)),
        )

    found = protocol.each(nearest)
    strangers = np.sort([wrong for _, wrong, mated in found if not mated])
    known = [(match, wrong) for match, wrong, mated in found if mated]
    if not len(strangers) or not known:
        kind, do = "with", "Number people alike in both."
        if known:
            kind, do = "without", "Leave some people out of the gallery, and keep them among the queries."
        raise ValueError(f"no query is {kind} a match in the gallery: open-set rates need both kinds. {do}")
    right = np.sort([match for match, wrong in known if match < wrong])
    thresholds = np.append(np.unique(strangers[np.isfinite(strangers)]), np.inf)
    curve_fpir = np.searchsorted(strangers, thresholds, "left") / len(strangers)
    curve_tpir = np.searchsorted(right, thresholds, "left") / len(known)
    allowed = [_allowed(curve_fpir, float(fpir)) for fpir in fpirs]
    return OpenSetMetrics(
        fpirs=np.asarray(fpirs, np.float64),
        tpirs=curve_tpir[allowed],
        thresholds=thresholds[allowed],
        curve_thresholds=thresholds,
        curve_fpir=curve_fpir,
        curve_tpir=curve_tpir,
        mated=len(known),
        unmated=len(strangers),
    )


def _allowed(curve_fpir: np.ndarray, fpir: float) -> int:
    """The last point of the curve that keeps to a rate."""
    if not 0 <= fpir <= 1:
        raise ValueError(f"a false positive identification rate is from 0 to 1, got {fpir}.")
    return int(np.flatnonzero(curve_fpir <= fpir * (1 + 1e-12))[-1])  # 0.1 * 30 is not 3 by rounding


@dataclass(frozen=True)
class Calibration:
    """Distance -> probability that both are the same person: a logistic function, as numbers that go into JSON.

    ``json.dumps(dataclasses.asdict(calibration))`` keeps it, ``Calibration(**json.loads(text))`` has it back.

    Attributes:
        intercept: the log odds at distance 0 of one frame.
        per_distance: what a unit of distance adds to the log odds; below 0.
        per_log_frames: what each factor e of frames adds to them; None: frames were not considered.

    Raises:
        TypeError: something else than numbers.
        ValueError: NaN or infinity.
    """

    intercept: float
    per_distance: float
    per_log_frames: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None and name == "per_log_frames":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} of a calibration must be a number, got {value!r}.")
            if not math.isfinite(value):
                raise ValueError(f"{name} of a calibration must be finite, got {value}.")

    def probability(
        self, distances: float | np.ndarray | Tensor, frames: float | np.ndarray | Tensor | None = None
    ) -> np.ndarray:
        """The probability that a pair at this distance is one person.

        Prior odds are those of the pairs that it was calibrated on.

        Args:
            distances: of any shape.
            frames: how many frames were seen, as it was calibrated; of a shape that fits.

        Returns:
            float64, of the shape of both together.

        Raises:
            ValueError: frames given or not, against what it was calibrated on; below 1; NaN.
        """
        if (frames is None) != (self.per_log_frames is None):
            how = "without" if self.per_log_frames is None else "with"
            raise ValueError(f"this was calibrated {how} the number of frames: call it {how} them.")
        odds = self.intercept + self.per_distance * _numbers("distances", distances)
        if frames is not None and self.per_log_frames is not None:
            odds = odds + self.per_log_frames * _log_frames(frames)
        return np.asarray(_sigmoid(odds))


def calibrate(
    distances: Sequence[float] | np.ndarray | Tensor,
    same: Sequence[bool] | np.ndarray | Tensor,
    frames: Sequence[float] | np.ndarray | Tensor | None = None,
) -> Calibration:
    """Learns what a distance means, from pairs of tracklets of which one knows whether they are the same person.

    Logistic regression on the distance and the logarithm of the number of frames, by Newton's method in float64; slopes
    of the standardised variables carry a penalty of 0.005 times their squares, so that pairs that are parted perfectly
    have a result.

    Args:
        distances: of the pairs, of any shape (``[Q, G]`` too).
        same: of that shape: whether a pair is one person.
        frames: of that shape, or one that is broadcast to it (``[Q, 1]``): how many frames were seen. Which number that
            is for a pair (the query's, the smaller of both) is yours to choose, and to keep to.

    Raises:
        TypeError: ``same`` that is neither bool nor 0 and 1.
        ValueError: shapes that do not fit, NaN or infinity, frames below 1, pairs of one kind only.
    """
    x = _numbers("distances", distances)
    y = np.asarray(same.detach().cpu().numpy() if isinstance(same, Tensor) else same)
    if y.shape != x.shape:
        raise ValueError(f"same must have the shape of distances, {list(x.shape)}, got {list(y.shape)}.")
    if y.dtype.kind not in "biu" or not np.isin(y, (0, 1)).all():
        raise TypeError(f"same must be True and False, got {y.dtype}.")
    y = y.astype(np.float64).ravel()
    if not 0 < y.sum() < len(y):
        kind = "the same person" if len(y) and y.all() else "different persons"
        raise ValueError(f"all {len(y)} pairs are of {kind}: a calibration needs both kinds.")
    columns = [x.ravel()]
    if frames is not None:
        try:
            columns.append(np.broadcast_to(_log_frames(frames), x.shape).ravel())
        except ValueError as error:
            if "frames must" in str(error):
                raise
            raise ValueError(f"frames must fit distances {list(x.shape)}, got {list(np.shape(frames))}.") from error
    center = np.array([c.mean() for c in columns])
    spread = np.array([c.std() or 1.0 for c in columns])
    z = np.stack([np.ones(len(y)), *((c - m) / s for c, m, s in zip(columns, center, spread, strict=True))])

    penalty = np.diag([0.0, *[_RIDGE] * len(columns)])
    weights = np.array([np.log(y.mean() / (1 - y.mean())), *[0.0] * len(columns)])

    def cost(w: np.ndarray) -> float:
        odds = w @ z
        return float((np.logaddexp(0, odds) - y * odds).sum() + w @ penalty @ w / 2)

    now = cost(weights)
    for _ in range(_ROUNDS):
        p = _sigmoid(weights @ z)
        gradient = z @ (p - y) + penalty @ weights
        hessian = (z * (p * (1 - p))) @ z.T + penalty
        step = np.linalg.solve(hessian + 1e-12 * np.eye(len(weights)), gradient)
        while (then := cost(weights - step)) > now and np.abs(step).max() > 1e-12:
            step = step / 2
        weights, gain, now = weights - step, now - then, then
        if gain <= 1e-14 * max(1.0, abs(now)):
            break
    slopes = weights[1:] / spread
    if slopes[0] >= 0:
        warnings.warn(
            "pairs of the same person are not nearer than others here: these are no distances (similarities?), or the "
            "model knows nothing.",
            stacklevel=2,
        )
    intercept = float(weights[0] - slopes @ center)
    return Calibration(intercept, float(slopes[0]), float(slopes[1]) if frames is not None else None)


def _numbers(name: str, given: object) -> np.ndarray:
    found = np.asarray(given.detach().cpu().double().numpy() if isinstance(given, Tensor) else given)
    if found.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be numbers, got {found.dtype}.")
    if not np.isfinite(found).all():
        raise ValueError(f"{name} must be finite: {int((~np.isfinite(found)).sum())} are NaN or infinite.")
    return found.astype(np.float64)


def _log_frames(frames: object) -> np.ndarray:
    found = _numbers("frames", frames)
    if (found < 1).any():
        raise ValueError(f"frames must be at least 1, got {found.min():g}.")
    return np.asarray(np.log(found))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(-np.logaddexp(0, -x)))
