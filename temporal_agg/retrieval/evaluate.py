"""CMC, mean average precision and mINP of a ranked list, by the protocol of the video benchmarks."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._arrays import Ids, ids

__all__ = ["RetrievalMetrics", "evaluate", "evaluate_tracklets"]

_CELLS = 2**20  # of the distances, that a thread works on at once
_THREADS = 8  # at most: what runs between the array operations runs one at a time


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

    def __repr__(self) -> str:
        ranks = [k for k in (1, 5, 10, 20) if k <= len(self.cmc)]
        shown = [f"mAP {self.map:.1%}", *(f"rank-{k} {self.rank(k):.1%}" for k in ranks), f"mINP {self.minp:.1%}"]
        return (
            f"RetrievalMetrics({', '.join(shown)}; {len(self.ap_per_query)} queries, "
            f"{self.queries_without_match} without a match)"
        )

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
    query_pids: Ids,
    query_cams: Ids,
    gallery_pids: Ids,
    gallery_cams: Ids,
    *,
    query_index: Ids | None = None,
    ambiguous_pids: Ids | None = None,
    ranks: Sequence[int] = (1, 5, 10, 20),
    ap: str = "step",
) -> RetrievalMetrics:
    """Ranks the gallery for every query.

    A gallery tracklet *matches* a query of the same person, unless it is ignored: same camera (a camera of -1 is
    unknown and equals none), the query itself, or somebody who may be two persons. Tracklets of other persons are
    *wrong*, distractors among them (pid 0 in MARS, which no query has). Junk (pid -1) is ignored by all. Ignored
    tracklets take no rank.

    Ties are broken against the model: a match ranks after all wrong tracklets at its distance.

    Args:
        distances: ``[Q, G]``, floating point, smaller = nearer; numpy, or torch on any device. Compared as they are:
            float64 is not rounded.
        query_pids: ``[Q]``, persons, from 0.
        query_cams: ``[Q]``.
        gallery_pids: ``[G]``, persons from 0, -1 = junk.
        gallery_cams: ``[G]``.
        query_index: ``[Q]``, each query's own column in the gallery, or -1. With known cameras it changes nothing;
            without them a query that is part of the gallery would match itself. ``evaluate_tracklets`` finds it.
        ambiguous_pids: ``[G]``, who else a gallery tracklet may be, or -1: for the queries of that person it is
            neither a match nor wrong (the corrected labels of MARS).
        ranks: how far the curve goes: to the largest of them.
        ap: the average precision. ``step``: the mean over the matches of (matches so far) / (rank). ``trapezoidal``:
            the mean over the matches of the average of that and of the precision one rank earlier (1 before the
            first rank), as the Matlab evaluation of Market-1501 and MARS has it.

    Raises:
        TypeError: distances that are not floating point, ids that are not integers.
        ValueError: shapes that do not fit each other, an empty side, NaN among the distances, a query pid below 0, a
            gallery pid below -1, a ``query_index`` outside the gallery or at another person.
    """
    if ap not in ("step", "trapezoidal"):
        raise ValueError(f"ap must be 'step' or 'trapezoidal', got {ap!r}.")
    if not len(ranks) or min(ranks) < 1:
        raise ValueError(f"ranks must be positive integers, got {ranks}.")
    protocol = Protocol(distances, query_pids, query_cams, gallery_pids, gallery_cams, query_index, ambiguous_pids)

    def score(q: int, row: np.ndarray) -> tuple[float, float, int]:
        """Average precision, inverse negative penalty and the rank of the first match; 0 = there is none."""
        seen = protocol.of(q)
        hits = np.sort(row[seen.matches])
        n = len(hits)
        if not n:
            return np.nan, np.nan, 0
        wrong = _at_or_below(row, hits)
        for part in seen.not_wrong:
            wrong -= _at_or_below(row[part], hits)
        count = np.arange(1, n + 1)
        rank = wrong + count
        precision = count / rank
        if ap == "trapezoidal":
            before = np.where(rank > 1, (count - 1) / np.maximum(rank - 1, 1), 1)
            precision = (before + precision) / 2
        return precision.sum() / n, n / rank[-1], rank[0]

    scores = np.array(protocol.each(score))
    average_precision, inverse_penalty, first_match = scores[:, 0].copy(), scores[:, 1], scores[:, 2].astype(np.int64)
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
        queries_without_match=len(scores) - matched,
    )


def evaluate_tracklets(
    distances: np.ndarray | Tensor,
    query: Sequence[Any],
    gallery: Sequence[Any],
    *,
    ranks: Sequence[int] = (1, 5, 10, 20),
    ap: str = "step",
) -> RetrievalMetrics:
    """:func:`evaluate` for tracklets, which know who they are: nobody forgets that a query may be in the gallery.

    Args:
        distances: ``[Q, G]``, as in ``evaluate``.
        query: ``[Q]`` tracklets, or anything with ``pid`` and ``camera``.
        gallery: ``[G]`` tracklets, likewise; where they have an ``ambiguous_pid``, it is respected. A query is found
            in it as ``TrackletData.query_index`` finds it.
        ranks: as in ``evaluate``.
        ap: as in ``evaluate``.

    Raises:
        TypeError: tracklets without ``pid`` or ``camera``; as in ``evaluate``.
        ValueError: as in ``evaluate``.

    Example:
        >>> from temporal_agg import create_model, embed_tracklets
        >>> from temporal_agg.data import open_dataset
        >>> from temporal_agg.retrieval import distances, evaluate_tracklets
        >>> people = open_dataset("synthetic", num_identities=4, size=(64, 32))
        >>> model = create_model("mean_resnet10t", img_size=(64, 32))
        >>> query, gallery = (embed_tracklets(model, part, progress=False) for part in (people.query, people.gallery))
        >>> metrics = evaluate_tracklets(distances(query, gallery, "cosine"), people.query, people.gallery)
        >>> 0 <= metrics.map <= metrics.rank(20) == 1
        True
    """
    return evaluate(distances, **tracklet_ids(query, gallery), ranks=ranks, ap=ap)


def tracklet_ids(query: Sequence[Any], gallery: Sequence[Any]) -> dict[str, Any]:
    """What ``evaluate`` and ``open_set`` ask of tracklets, by the names of their arguments."""
    from ..data.tracklet import query_index  # at need: the rest knows nothing of tracklets

    for name, tracklets in (("query", query), ("gallery", gallery)):
        for i, t in enumerate(tracklets):
            if not (hasattr(t, "pid") and hasattr(t, "camera")):
                raise TypeError(f"{name}[{i}] must be a tracklet with pid and camera, got {type(t).__name__}.")
    other = [getattr(t, "ambiguous_pid", None) for t in gallery]
    return {
        "query_pids": [t.pid for t in query],
        "query_cams": [t.camera for t in query],
        "gallery_pids": [t.pid for t in gallery],
        "gallery_cams": [t.camera for t in gallery],
        "query_index": query_index(query, gallery),
        "ambiguous_pids": [-1 if pid is None else pid for pid in other] if any(p is not None for p in other) else None,
    }


class Seen(NamedTuple):
    """Of a query: the columns of its matches, and, apart from each other, all that are not wrong, the matches too."""

    matches: np.ndarray
    not_wrong: tuple[np.ndarray, ...]


class Protocol:
    """Distances and ids, checked, and what each query sees of the gallery. See ``evaluate``."""

    def __init__(
        self,
        distances: np.ndarray | Tensor,
        query_pids: Ids,
        query_cams: Ids,
        gallery_pids: Ids,
        gallery_cams: Ids,
        query_index: Ids | None,
        ambiguous_pids: Ids | None,
    ):
        if not isinstance(distances, np.ndarray | Tensor):
            raise TypeError(f"distances must be a numpy array or a torch tensor, got {type(distances).__name__}.")
        if distances.ndim != 2 or 0 in distances.shape:
            raise ValueError(
                f"distances must have the shape [Q, G] with at least one of each, got {list(distances.shape)}."
            )
        if not (distances.is_floating_point() if isinstance(distances, Tensor) else distances.dtype.kind == "f"):
            raise TypeError(f"distances must be floating point, got {distances.dtype}.")
        self.distances = distances
        Q, G = distances.shape
        fits = "distances [Q, G]"
        self.pids, self.cams = ids("query_pids", query_pids, Q, fits), ids("query_cams", query_cams, Q, fits)
        gallery_pids = ids("gallery_pids", gallery_pids, G, fits)
        self.gallery_cams = ids("gallery_cams", gallery_cams, G, fits)
        self.own = np.full(Q, -1) if query_index is None else ids("query_index", query_index, Q, fits)
        _check_ids(self.pids, gallery_pids, self.own)
        self.gallery_pids = gallery_pids
        self.persons = _Places(gallery_pids, self.pids)
        self.junk = np.flatnonzero(gallery_pids == -1)
        self.ambiguous = None if ambiguous_pids is None else ids("ambiguous_pids", ambiguous_pids, G, fits)
        self.maybe = None if self.ambiguous is None else _Places(self.ambiguous, self.pids)

    def of(self, q: int) -> Seen:
        """What a query sees."""
        person = self.persons.of(q)
        ignored = person == self.own[q]
        if self.cams[q] != -1:
            ignored |= self.gallery_cams[person] == self.cams[q]
        if self.ambiguous is None or self.maybe is None:
            return Seen(person[~ignored], (person, self.junk))
        ignored |= self.ambiguous[person] == self.pids[q]
        maybe = self.maybe.of(q)
        pids = self.gallery_pids[maybe]
        return Seen(person[~ignored], (person, self.junk, maybe[(pids != self.pids[q]) & (pids != -1)]))

    def each(self, work: Any) -> list[Any]:
        """``work(query, its distances)`` for each query, on as many cores as torch may use, in order."""

        def several(start: int) -> list[Any]:
            rows = _rows(self.distances, start, size)
            return [work(q, row) for q, row in enumerate(rows, start)]

        Q, G = self.distances.shape
        threads = min(torch.get_num_threads(), _cores(), _THREADS)
        size = max(1, min(_CELLS // G, -(-Q // threads)))
        starts = range(0, Q, size)
        if threads == 1 or len(starts) == 1:
            return [found for start in starts for found in several(start)]
        with ThreadPoolExecutor(threads) as pool:
            return [found for part in pool.map(several, starts) for found in part]


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


class _Places:
    """For each of the persons looked for, the places in a list that have this person."""

    def __init__(self, listed: np.ndarray, persons: np.ndarray):
        self.order = np.argsort(listed, kind="stable")
        ordered = listed[self.order]
        self.first, self.last = (np.searchsorted(ordered, persons, side) for side in ("left", "right"))

    def of(self, q: int) -> np.ndarray:
        return self.order[self.first[q] : self.last[q]]


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


def _rows(distances: np.ndarray | Tensor, start: int, size: int) -> Iterator[np.ndarray]:
    """Some rows in order, fetched from the device and checked at once."""
    part = distances[start : start + size]
    if isinstance(part, Tensor):
        part = part.detach().cpu()
        part = (part.float() if part.dtype == torch.bfloat16 else part).numpy()
    block = np.ascontiguousarray(part, dtype=np.float32 if part.dtype == np.float16 else None)
    if np.isnan(block.max()):
        row, column = np.argwhere(np.isnan(block))[0]
        raise ValueError(
            f"distances[{start + row}, {column}] is NaN: a list with it has no order. Look for NaN in the embeddings "
            "of that query and that gallery tracklet."
        )
    yield from block


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
