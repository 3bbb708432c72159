"""Retrieval in plain numpy: what one writes first, to test and to measure ``temporal_agg.retrieval`` against.

Whole matrices, one loop over the queries or items where a step is not a matrix operation, float32.
"""

import numpy as np


def distances(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Euclidean."""
    return np.sqrt(_squared(queries, gallery))


def _squared(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum((x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * (x @ y.T), 0)


def search(queries: np.ndarray, gallery: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest by cosine: distances and places ``[Q, k]``; every query ranks the whole gallery."""
    queries, gallery = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, gallery))
    table = 1 - queries @ gallery.T
    order = np.stack([row.argsort(kind="stable")[:k] for row in table])
    return np.take_along_axis(table, order, 1), order


def evaluate(
    distances: np.ndarray,
    query_pids: np.ndarray,
    query_cams: np.ndarray,
    gallery_pids: np.ndarray,
    gallery_cams: np.ndarray,
    max_rank: int = 20,
) -> tuple[float, np.ndarray]:
    """Mean average precision and the CMC curve; every query ranks the whole gallery."""
    ranking = np.argsort(distances, axis=1)
    precisions, curves = [], []
    for q, order in enumerate(ranking):
        pids, cams = gallery_pids[order], gallery_cams[order]
        keep = (pids != -1) & ~((pids == query_pids[q]) & (cams == query_cams[q]))
        match = pids[keep] == query_pids[q]
        if not match.any():
            continue
        found = match.cumsum()
        precisions.append((found / np.arange(1, len(found) + 1))[match].mean())
        curves.append(np.pad(found, (0, max_rank), mode="edge")[:max_rank] > 0)
    return float(np.mean(precisions)), np.mean(curves, axis=0)


def rerank(
    queries: np.ndarray,
    gallery: np.ndarray,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    as_published: bool = False,
) -> np.ndarray:
    """Zhong et al., CVPR 2017, with N x N matrices for the distances, the ranking, and the encodings before and after
    query expansion.

    ``as_published`` takes the steps of the authors' code up to the ranking: three matrices of distances, joined and
    squared; divided by the maxima of the columns and transposed, so that the rows on which everything after it works
    are not contiguous.
    """
    Q, items = len(queries), np.concatenate([queries, gallery])
    N = len(items)
    if as_published:
        (qq, qg), gg = (distances(queries, other) for other in (queries, gallery)), distances(gallery, gallery)
        distance = np.square(np.concatenate([np.concatenate([qq, qg], 1), np.concatenate([qg.T, gg], 1)]))
        del qq, qg, gg
        distance = (distance / distance.max(0)).T
    else:
        distance = _squared(items, items)
        distance /= distance.max(1, keepdims=True)
    ranking = np.argsort(distance, axis=1).astype(np.int32)

    def reciprocal(item, k):
        forward = ranking[item, : k + 1]
        return forward[(ranking[forward, : k + 1] == item).any(1)]

    encoding = np.zeros_like(distance)
    for item in range(N):
        neighbours = reciprocal(item, k1)
        expanded = [neighbours]
        for candidate in neighbours:
            half = reciprocal(candidate, round(k1 / 2))
            if 3 * len(np.intersect1d(half, neighbours)) > 2 * len(half):
                expanded.append(half)
        members = np.unique(np.concatenate(expanded))
        weight = np.exp(-distance[item, members])
        encoding[item, members] = weight / weight.sum()
    if k2 > 1:
        mean = np.zeros_like(encoding)
        for item in range(N):
            mean[item] = encoding[ranking[item, :k2]].mean(0)
        encoding = mean

    inverted = [np.flatnonzero(column) for column in encoding.T]
    jaccard = np.zeros((Q, N), dtype=np.float32)
    for q in range(Q):
        shared = np.zeros(N, dtype=np.float32)
        for column in np.flatnonzero(encoding[q]):
            rows = inverted[column]
            shared[rows] += np.minimum(encoding[q, column], encoding[rows, column])
        jaccard[q] = 1 - shared / (2 - shared)
    return ((1 - lambda_value) * jaccard + lambda_value * distance[:Q])[:, Q:]
