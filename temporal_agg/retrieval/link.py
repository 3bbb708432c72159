"""Tracklets -> identities: average linkage that keeps apart who was seen at two places at once; B-cubed figures."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ._arrays import Array, Ids, ids
from .distances import distances

__all__ = ["BCubed", "bcubed", "link"]

Times = Sequence[float] | np.ndarray | Tensor

_BLOCK = 1024  # rows whose times are compared at once


def link(
    embeddings: Array,
    threshold: float,
    *,
    metric: str = "cosine",
    cameras: Ids | None = None,
    start: Times | None = None,
    end: Times | None = None,
) -> np.ndarray:
    """Puts tracklets of one person together, by agglomerative clustering with average linkage.

    Again and again the two groups with the smallest mean distance between their tracklets become one, while it is at
    most ``threshold``. Two tracklets that overlap in time in one camera are two persons: groups that hold such a pair
    never become one. The distances take 4 bytes for each pair: 20,000 tracklets 1.6 GB.

    Args:
        embeddings: ``[N, D]``, of any real type; numpy, or torch on any device.
        threshold: mean distance up to which groups become one; ``open_set`` and ``calibrate`` help to choose it.
        metric: as in ``distances``.
        cameras: ``[N]``; -1: unknown, overlaps with nothing. None: all are of one camera.
        start: ``[N]``, when each tracklet begins (frame number or time); None: nothing is known to overlap.
        end: ``[N]``, when it ends, itself included.

    Returns:
        int64 ``[N]``: persons 0, 1, ... in the order of their first tracklets.

    Raises:
        TypeError: embeddings or times that are no numbers, cameras that are no integers.
        ValueError: as in ``distances``; a threshold that is NaN, times that are given in part, do not fit, are not
            finite, or end before they start.

    Example:
        >>> import numpy as np
        >>> from temporal_agg.retrieval import link
        >>> embeddings = np.array([[1.0, 0.1], [0.1, 1.0], [1.0, 0.0], [1.0, 0.2]])
        >>> link(embeddings, threshold=0.3)
        array([0, 1, 0, 0])
        >>> link(embeddings, threshold=0.3, start=[0, 0, 50, 0], end=[9, 9, 59, 9])  # the first and the last overlap
        array([0, 1, 0, 2])
    """
    if not isinstance(threshold, int | float | np.number) or math.isnan(threshold):
        raise ValueError(f"threshold must be a number, got {threshold!r}.")
    found = distances(embeddings, embeddings, metric)
    table = found.cpu().numpy() if isinstance(found, Tensor) else found
    N = len(table)
    apart = _overlaps(N, cameras, start, end)
    if apart is not None:
        begin, finish, camera = apart
        for first in range(0, N, _BLOCK):
            rows = slice(first, first + _BLOCK)
            meet = (begin[rows, None] <= finish) & (begin <= finish[rows, None])
            table[rows][meet & (camera[rows, None] == camera) & (camera != -1)] = np.inf
    np.fill_diagonal(table, np.inf)
    return _agglomerate(table, float(threshold))


def _agglomerate(table: np.ndarray, threshold: float) -> np.ndarray:
    """Average linkage of a symmetric table of distances, whose infinities are never overcome. The table is used up."""
    N = len(table)
    group = np.arange(N)  # of each tracklet: its group, named by its first member
    if N < 2:
        return group
    size = np.ones(N)
    nearest = table.argmin(1)
    least = table[np.arange(N), nearest]
    while True:
        a = int(least.argmin())
        if not least[a] <= threshold or least[a] == np.inf:
            break
        a, b = sorted((a, int(nearest[a])))
        # Of infinity and a number the mean is infinity: who must stay apart from a part stays apart from the whole.
        row = (size[a] * table[a] + size[b] * table[b]) / (size[a] + size[b])
        row[a] = np.inf
        table[a] = table[:, a] = row
        table[b] = table[:, b] = np.inf
        size[a] += size[b]
        group[group == b] = a
        least[b] = np.inf
        # No group comes nearer by a merge than its nearer part was: only those whose nearest has changed look again.
        again = np.flatnonzero(((nearest == a) | (nearest == b)) & (least < np.inf))
        again = np.union1d(again, [a])
        nearest[again] = table[again].argmin(1)
        least[again] = table[again, nearest[again]]
    return np.unique(group, return_inverse=True)[1].astype(np.int64)


def _overlaps(
    N: int, cameras: Ids | None, start: Times | None, end: Times | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Begin, end and camera of all tracklets, checked; None where no time is known."""
    if (start is None) != (end is None):
        raise ValueError("start and end go together: give both, or neither.")
    if start is None or end is None:
        if cameras is not None:
            raise ValueError("cameras alone keep nobody apart: give start and end of the tracklets as well.")
        return None
    times: list[np.ndarray] = []
    for name, given in (("start", start), ("end", end)):
        x = np.asarray(given.detach().cpu().numpy() if isinstance(given, Tensor) else given)
        if x.shape != (N,):
            raise ValueError(f"{name} must have the shape [{N}] to fit the embeddings, got {list(x.shape)}.")
        if x.dtype.kind not in "fiu":
            raise TypeError(f"{name} must be numbers, got {x.dtype}.")
        if not np.isfinite(x).all():
            raise ValueError(f"{name}[{int(np.flatnonzero(~np.isfinite(x))[0])}] is not finite.")
        times.append(x)
    wrong = np.flatnonzero(times[1] < times[0])
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(f"tracklet {i} ends ({times[1][i]}) before it starts ({times[0][i]}).")
    known = np.zeros(N, np.int64) if cameras is None else ids("cameras", cameras, N, "the embeddings")
    return times[0], times[1], known


class BCubed(NamedTuple):
    """B-cubed figures (Bagga and Baldwin, 1998), from 0 to 1, means over the tracklets.

    Attributes:
        precision: the share of a tracklet's group that is of its person.
        recall: the share of its person that is in its group.
        f: the harmonic mean of both.
    """

    precision: float
    recall: float
    f: float


def bcubed(labels: Ids, truth: Ids) -> BCubed:
    """Compares groups with persons. A tracklet counts in its own group and person.

    Args:
        labels: ``[N]``, groups, as ``link`` gives them.
        truth: ``[N]``, persons; -1 = junk, left out.

    Raises:
        TypeError: no integers.
        ValueError: shapes that do not fit each other, no tracklet but junk.
    """
    truth = ids("truth", truth, len(truth), "itself")
    labels = ids("labels", labels, len(truth), f"truth [{len(truth)}]")[truth != -1]
    truth = truth[truth != -1]
    if not len(truth):
        raise ValueError("there is no tracklet of a person: nothing can be compared.")
    _, group, in_group = np.unique(labels, return_inverse=True, return_counts=True)
    persons, person, of_person = np.unique(truth, return_inverse=True, return_counts=True)
    _, cell, together = np.unique(group * len(persons) + person, return_inverse=True, return_counts=True)
    precision = float((together[cell] / in_group[group]).mean())
    recall = float((together[cell] / of_person[person]).mean())
    return BCubed(precision, recall, 2 * precision * recall / (precision + recall))
