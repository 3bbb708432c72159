"""CMC, mean average precision and mINP of a ranked list, by the protocol of the video benchmarks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["RetrievalMetrics", "evaluate"]


@dataclass(frozen=True, eq=False)
class RetrievalMetrics:
    """Results as fractions from 0 to 1; the means are over the queries that have a match (NaN where none has).

    Attributes:
        map: mean average precision.
        cmc: float64 ``[max(ranks)]``: ``cmc[k - 1]`` is the share of queries with a match among the first k.
        minp: mean inverse negative penalty (Ye et al., arXiv:2001.04193): (matches) / (rank of the last match).
        ap_per_query: float64 ``[Q]``, NaN for a query without a match.
        queries_without_match: how many queries had no match in the gallery.
    """

    map: float
    cmc: np.ndarray
    minp: float
    ap_per_query: np.ndarray
    queries_without_match: int

    def rank(self, k: int) -> float:
        """The share of queries with a match among the first ``k``.

        Raises:
            ValueError: beyond the curve.
        """
        if not 1 <= k <= len(self.cmc):
            raise ValueError(f"the curve covers ranks 1 to {len(self.cmc)}, got {k}: evaluate with ranks=(..., {k}).")
        return float(self.cmc[k - 1])


def evaluate(
    distances: np.ndarray | Tensor,
    query_pids: Sequence[int] | np.ndarray | Tensor,
    query_cams: Sequence[int] | np.ndarray | Tensor,
    gallery_pids: Sequence[int] | np.ndarray | Tensor,
    gallery_cams: Sequence[int] | np.ndarray | Tensor,
    *,
    query_index: Sequence[int] | np.ndarray | Tensor | None = None,
    ranks: Sequence[int] = (1, 5, 10, 20),
    ap: str = "step",
) -> RetrievalMetrics:
    """Ranks the gallery for every query.

    A gallery tracklet *matches* a query of the same person, unless it is ignored: same camera (a camera of -1 is
    unknown and equals none), or the query itself. Tracklets of other persons are *wrong*, distractors among them (pid 0
    in MARS, which no query has). Junk (pid -1) is ignored by all. Ignored tracklets take no rank.

    Ties are broken against the model: a match ranks after all wrong tracklets at its distance.

    Args:
        distances: ``[Q, G]``, floating point, smaller = nearer; numpy, or torch on any device. Compared as they are:
            float64 is not rounded.
        query_pids: ``[Q]``, persons, from 0.
        query_cams: ``[Q]``.
        gallery_pids: ``[G]``, persons from 0, -1 = junk.
        gallery_cams: ``[G]``.
        query_index: ``[Q]``, each query's own column in the gallery, or -1. With known cameras it changes nothing;
            without them a query that is part of the gallery would match itself.
        ranks: how far the curve goes: to the largest of them.
        ap: the average precision. ``step``: the mean over the matches of (matches so far) / (rank). ``trapezoidal``:
            the mean over the matches of the average of that and of the precision one rank earlier (1 before the
            first rank), as the Matlab evaluation of Market-1501 and MARS has it.

    Raises:
        TypeError: distances that are not floating point, ids that are not integers.
        ValueError: shapes that do not fit each other, an empty side, NaN among the distances, a query pid below 0, a
            gallery pid below -1, a ``query_index`` outside the gallery or at another person.
    """
    if not isinstance(distances, np.ndarray | Tensor):
        raise TypeError(f"distances must be a numpy array or a torch tensor, got {type(distances).__name__}.")
    if distances.ndim != 2 or 0 in distances.shape:
        raise ValueError(
            f"distances must have the shape [Q, G] with at least one of each, got {list(distances.shape)}."
        )
    if not (distances.is_floating_point() if isinstance(distances, Tensor) else distances.dtype.kind == "f"):
        raise TypeError(f"distances must be floating point, got {distances.dtype}.")
    if ap not in ("step", "trapezoidal"):
        raise ValueError(f"ap must be 'step' or 'trapezoidal', got {ap!r}.")
    if not len(ranks) or min(ranks) < 1:
        raise ValueError(f"ranks must be positive integers, got {ranks}.")
    Q, G = distances.shape
    query_pids, query_cams = _ids("query_pids", query_pids, Q), _ids("query_cams", query_cams, Q)
    gallery_pids, gallery_cams = _ids("gallery_pids", gallery_pids, G), _ids("gallery_cams", gallery_cams, G)
    own = np.full(Q, -1) if query_index is None else _ids("query_index", query_index, Q)
    _check_ids(query_pids, gallery_pids, own)

    by_person = np.argsort(gallery_pids, kind="stable")
    sorted_pids = gallery_pids[by_person]
    first, last = np.searchsorted(sorted_pids, query_pids), np.searchsorted(sorted_pids, query_pids, "right")
    junk = np.flatnonzero(gallery_pids == -1)

    average_precision = np.full(Q, np.nan)
    inverse_penalty = np.full(Q, np.nan)
    first_match = np.zeros(Q, dtype=np.int64)  # its rank; 0 = the query has no match
    for q, row in enumerate(_rows(distances)):
        person = by_person[first[q] : last[q]]
        ignored = person == own[q]
        if query_cams[q] != -1:
            ignored |= gallery_cams[person] == query_cams[q]
        hits = np.sort(row[person[~ignored]])
        n = len(hits)
        if not n:
            continue
        wrong = _at_or_below(row, hits) - _at_or_below(row[person], hits) - _at_or_below(row[junk], hits)
        count = np.arange(1, n + 1)
        rank = wrong + count
        precision = count / rank
        if ap == "trapezoidal":
            before = np.where(rank > 1, (count - 1) / np.maximum(rank - 1, 1), 1)
            precision = (before + precision) / 2
        average_precision[q] = precision.sum() / n
        inverse_penalty[q] = n / rank[-1]
        first_match[q] = rank[0]

    found = first_match > 0
    matched = int(found.sum())
    curve = np.full(max(ranks), np.nan)
    if matched:
        curve = np.bincount(first_match[found], minlength=max(ranks) + 1)[1 : max(ranks) + 1].cumsum() / matched
    return RetrievalMetrics(
        map=float(average_precision[found].mean()) if matched else float("nan"),
        cmc=curve,
        minp=float(inverse_penalty[found].mean()) if matched else float("nan"),
        ap_per_query=average_precision,
        queries_without_match=Q - matched,
    )


def ranked_gallery(
    distances: np.ndarray, pid: int, camera: int, gallery_pids: np.ndarray, gallery_cams: np.ndarray, own: int = -1
) -> np.ndarray:
    """One query's ranked list: gallery indices without those it ignores, a match after what it ties with."""
    same = gallery_pids == pid
    ignored = gallery_pids == -1
    if camera != -1:
        ignored |= same & (gallery_cams == camera)
    if own >= 0:
        ignored[own] = True
    order = np.lexsort((same, distances))
    return order[~ignored[order]]


def _at_or_below(values: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """For each of the thresholds, in ascending order: how many values are at or below it."""
    if len(thresholds) > 32:  # from here on one sort is cheaper than a pass for each threshold (measured)
        return np.searchsorted(np.sort(values), thresholds, "right")
    return np.count_nonzero(values <= thresholds[:, None], axis=1)


def _rows(distances: np.ndarray | Tensor) -> Iterator[np.ndarray]:
    """The rows in order, fetched from the device and checked in blocks of some 16 MB."""
    size = max(1, 2**22 // distances.shape[1])
    for start in range(0, len(distances), size):
        block = distances[start : start + size]
        if isinstance(block, Tensor):
            block = block.detach().cpu()
            block = (block.float() if block.dtype == torch.bfloat16 else block).numpy()
        block = np.ascontiguousarray(block, dtype=np.float32 if block.dtype == np.float16 else None)
        if np.isnan(block.max()):
            row, column = np.argwhere(np.isnan(block))[0]
            raise ValueError(
                f"distances[{start + row}, {column}] is NaN: a list with it has no order. Look for NaN in the "
                "embeddings of that query and that gallery tracklet."
            )
        yield from block


def _ids(name: str, ids: Sequence[int] | np.ndarray | Tensor, length: int) -> np.ndarray:
    ids = ids.cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if ids.shape != (length,):
        raise ValueError(f"{name} must have the shape [{length}] to fit distances [Q, G], got {list(ids.shape)}.")
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {ids.dtype}.")
    return ids.astype(np.int64)


def _check_ids(query_pids: np.ndarray, gallery_pids: np.ndarray, own: np.ndarray) -> None:
    if query_pids.min() < 0:
        q = int(np.argmin(query_pids))
        raise ValueError(
            f"query_pids[{q}] is {query_pids[q]}: -1 is junk, no person to look for. Leave such queries out, and "
            "number persons from 0."
        )
    if gallery_pids.min() < -1:
        raise ValueError(f"gallery_pids must be persons from 0, or -1 for junk, got {gallery_pids.min()}.")
    if own.min() < -1 or own.max() >= len(gallery_pids):
        raise ValueError(
            f"query_index must be columns of the gallery (0 to {len(gallery_pids) - 1}) or -1, "
            f"got values from {own.min()} to {own.max()}."
        )
    strangers = np.flatnonzero((own >= 0) & (gallery_pids[own] != query_pids))
    if len(strangers):
        q = strangers[0]
        raise ValueError(
            f"query_index[{q}] is {own[q]}, but that gallery tracklet has pid {gallery_pids[own[q]]} and the query has "
            f"{query_pids[q]}: a query's own column holds the query itself."
        )
