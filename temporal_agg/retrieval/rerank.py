"""k-reciprocal re-ranking.

`Re-ranking Person Re-identification with k-reciprocal Encoding` (Zhong, Zheng, Cao, Li, CVPR 2017) -
https://arxiv.org/abs/1701.08398

What the paper leaves open follows the authors' code: squared Euclidean distances, each row divided by its maximum; an
item is its own first neighbour, so that lists of k hold k + 1; k1 / 2 is rounded half to even; a candidate's neighbours
join where strictly more than 2/3 of them are shared; each encoding is divided by its sum.

The N = queries + gallery items have N^2 distances, N k neighbours, and encodings that are nearly all zeros. Distances
come in square blocks, each used for its rows and for its columns and then dropped; neighbours and encodings are kept as
lists of what is not zero.
"""

import math
import warnings
from functools import partial
from itertools import pairwise
from typing import overload

import torch
from torch import Tensor

from ._arrays import Array, as_tensors, like, peaks, whole
from .search import SearchResult, keys_of, search, unpack

__all__ = ["rerank", "rerank_distances"]

_CELLS = 2**21  # of the tables that the encodings are worked out on, some rows at once
_PAIRS = 512  # of embeddings that are compared at once
_FARTHEST = (0x7F800000 << 32) | (2**31 - 1)  # the key of no item, at infinity
_SAFE = 2.0**50  # between its inverse and this, float32 numbers can be squared and summed up


@overload
def rerank(
    queries: Array,
    gallery: Array,
    k1: int = ...,
    k2: int = ...,
    lambda_value: float = ...,
    *,
    candidates: None = ...,
    chunk_size: int = ...,
) -> Array: ...


@overload
def rerank(
    queries: Array,
    gallery: Array,
    k1: int = ...,
    k2: int = ...,
    lambda_value: float = ...,
    *,
    candidates: int,
    chunk_size: int = ...,
) -> SearchResult[Array]: ...


@torch.no_grad()
def rerank(
    queries: Array,
    gallery: Array,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    *,
    candidates: int | None = None,
    chunk_size: int = 1024,
) -> Array | SearchResult[Array]:
    """Distances that also compare whom two embeddings have for neighbours; smaller is nearer.

    The neighbours of queries and gallery are looked up among both together: the result depends on all queries. For
    embeddings that are compared by cosine, pass them L2-normalised. Their scale does not matter.

    Args:
        queries: ``[Q, D]``, of any real type; numpy, or torch on any device.
        gallery: ``[G, D]``, of the same kind and on the same device.
        k1: length of the lists of neighbours. At equal distance queries come before the gallery, lower indices first.
        k2: an encoding is averaged over its k2 nearest, itself included; 1: it is not.
        lambda_value: weight of the original distance, from 0 (the Jaccard distance alone) to 1.
        candidates: n: only the n nearest of the gallery, by Euclidean distance, are put into a new order for each
            query, and no ``[Q, G]`` is made. Their distances are those of the full re-ranking: neighbours are still
            looked up among all. What lies beyond keeps its order, after them: that of
            ``search(queries, gallery, k, "euclidean")`` from its place n on. None: all.
        chunk_size: distances are computed in blocks of so many rows and columns.

    Returns:
        float32 ``[Q, G]``, from 0 to 1, of the kind and on the device of the input. No gradient is kept. With
        ``candidates``: ``(distances, indices)`` of the candidates, ``[Q, min(n, G)]``, nearest first.

    Raises:
        TypeError: numpy mixed with torch, or neither; a setting of another type.
        ValueError: a wrong shape or setting, different devices, NaN or infinity among the embeddings, or magnitudes
            more than 1e15 apart.

    Example:
        >>> import numpy as np
        >>> from temporal_agg import rerank
        >>> looks = np.eye(4).repeat(5, 0) + 0.1 * np.random.default_rng(0).normal(size=(20, 4))  # 4 people, 5 each
        >>> distances = rerank(looks[::5], looks, k1=5, k2=2)
        >>> distances.shape, (distances.argsort(1)[:, :5] // 5).tolist()
        ((4, 20), [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [2, 2, 2, 2, 2], [3, 3, 3, 3, 3]])
    """
    settings = _settings(k1, k2, lambda_value, chunk_size)
    candidates = None if candidates is None else whole("candidates", candidates)
    sides = as_tensors(queries=queries, gallery=gallery)
    shapes = [list(x.shape) for x in sides]
    for name, shape in zip(("queries", "gallery"), shapes, strict=True):
        if len(shape) != 2:
            raise ValueError(f"{name} must have two dimensions, got {shape}.")
    if shapes[0][1] != shapes[1][1] or not shapes[0][1]:
        raise ValueError(f"expected queries [Q, D] and gallery [G, D], got {shapes[0]} and {shapes[1]}.")
    largest = [peaks(name, x) for name, x in zip(("queries", "gallery"), sides, strict=True)]
    size = _common_size(torch.cat(largest))
    for name, x in zip(("queries", "gallery"), largest, strict=True):
        lost = ((x > 0) & (x < size / _SAFE)).nonzero()[:, 0]
        if len(lost):
            raise ValueError(
                f"{name}[{int(lost[0])}] has no number above {float(x[lost[0]]):.3g}, where others reach {size:.3g}: "
                "too far apart for float32 distances. L2-normalise the embeddings, or see what went wrong with some."
            )
    x, y = ((x / size).float() for x in sides)
    source = _Features(x, y)
    if candidates is None:
        return like(_rerank(source, *settings), queries)
    places = search(x, y, candidates, "euclidean").indices
    return _ordered(_rerank(source, *settings, places), places, queries)


@torch.no_grad()
def rerank_distances(
    query_gallery: Array,
    query_query: Array,
    gallery_gallery: Array,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    *,
    chunk_size: int = 1024,
) -> Array:
    """``rerank`` for distances that are there already.

    Args:
        query_gallery: ``[Q, G]`` Euclidean distances, which are squared here; numpy, or torch on any device.
        query_query: ``[Q, Q]``, symmetric; likewise.
        gallery_gallery: ``[G, G]``, symmetric; likewise.
        k1: as in ``rerank``.
        k2: as in ``rerank``.
        lambda_value: as in ``rerank``.
        chunk_size: as in ``rerank``.

    Returns:
        float32 ``[Q, G]``, as ``rerank`` returns it.

    Raises:
        TypeError: numpy mixed with torch, or neither; a setting of another type.
        ValueError: shapes that do not fit each other, a wrong setting, different devices, a distance that is negative,
            NaN or infinite.
    """
    settings = _settings(k1, k2, lambda_value, chunk_size)
    given = {"query_gallery": query_gallery, "query_query": query_query, "gallery_gallery": gallery_gallery}
    matrices = as_tensors(**given)
    for name, x in zip(given, matrices, strict=True):
        if x.dim() != 2:
            raise ValueError(f"{name} must have two dimensions, got {list(x.shape)}.")
    (Q, G), *square = (tuple(x.shape) for x in matrices)
    if square != [(Q, Q), (G, G)]:
        raise ValueError(
            f"expected query_query [{Q}, {Q}] and gallery_gallery [{G}, {G}] to fit query_gallery [{Q}, {G}], "
            f"got {list(square[0])} and {list(square[1])}."
        )
    for name, x in zip(given, matrices, strict=True):
        if x.numel() and not (x.min() >= 0 and x.max() < math.inf):
            raise ValueError(
                f"{name} must hold distances from 0, finite, got values from {x.min():g} to {x.max():g}. Similarities "
                "and negative dot products have no place here."
            )
    size = _common_size(torch.stack([x.max() if x.numel() else x.new_zeros(()) for x in matrices]))
    if size != 1:
        matrices = [x / size for x in matrices]
    return like(_rerank(_Distances(*(x.float() for x in matrices)), *settings), query_gallery)


def _settings(k1: int, k2: int, lambda_value: float, chunk_size: int) -> tuple[int, int, float, int]:
    k1, k2, chunk_size = whole("k1", k1), whole("k2", k2), whole("chunk_size", chunk_size)
    if not 0 <= lambda_value <= 1:
        raise ValueError(f"lambda_value must be from 0 to 1, got {lambda_value}.")
    return k1, k2, lambda_value, chunk_size


def _common_size(largest: Tensor) -> float:
    """What numbers are divided by so that float32 can square them: 1, or a power of two near the largest."""
    most = float(largest.max()) if len(largest) else 0.0
    return 1.0 if not most or 1 / _SAFE <= most <= _SAFE else 2.0 ** math.frexp(most)[1]


def _ordered(found: Tensor, places: Tensor, given: Array) -> SearchResult[Array]:
    """Nearest first, by place where they are equal."""
    distances, indices = unpack(keys_of(found, places).sort(1).values)
    return SearchResult(like(distances, given), like(indices, given))


class _Source:
    """Squared distances between items: queries, numbered from 0, then the gallery. A side is 0 or 1 for them."""

    sizes: tuple[int, int]
    device: torch.device

    def block(self, a: slice, b: slice, room: Tensor) -> Tensor:
        """All of ``a`` with all of ``b``; each lies on one side, ``a`` not after ``b``. Written where ``room`` is."""
        Q = self.sizes[0]
        sides = int(a.start >= Q), int(b.start >= Q)
        shape = a.stop - a.start, b.stop - b.start
        a, b = (slice(s.start - Q * side, s.stop - Q * side) for s, side in zip((a, b), sides, strict=True))
        return self._block(sides, a, b, room[: shape[0] * shape[1]].view(shape))

    def pairs(self, i: Tensor, j: Tensor) -> Tensor:
        """Each of ``i`` with the item at its place in ``j``."""
        Q = self.sizes[0]
        i, j = torch.minimum(i, j), torch.maximum(i, j)
        out = torch.empty(len(i), dtype=torch.float32, device=self.device)
        for sides in ((0, 0), (0, 1), (1, 1)):
            at = (((i >= Q) == sides[0]) & ((j >= Q) == sides[1])).nonzero()[:, 0]
            for part in at.split(_PAIRS):
                out[part] = self._pairs(sides, i[part] - Q * sides[0], j[part] - Q * sides[1])
        return out

    def _block(self, sides: tuple[int, int], a: slice, b: slice, out: Tensor) -> Tensor:
        raise NotImplementedError

    def _pairs(self, sides: tuple[int, int], i: Tensor, j: Tensor) -> Tensor:
        raise NotImplementedError


class _Features(_Source):
    def __init__(self, queries: Tensor, gallery: Tensor):
        self.features = queries, gallery
        self.sizes = len(queries), len(gallery)
        self.device = queries.device
        self.squares = [torch.cat([part.square().sum(1) for part in x.split(_PAIRS)]) for x in self.features]

    def _block(self, sides: tuple[int, int], a: slice, b: slice, out: Tensor) -> Tensor:
        (x, y), (xx, yy) = ([of[side] for side in sides] for of in (self.features, self.squares))
        if sides[0] != sides[1] or a != b:
            return torch.addmm(yy[b], x[a], y[b].T, alpha=-2, out=out).add_(xx[a, None]).clamp_(min=0)
        half = len(out) // 2  # symmetric: of the quarters beside the diagonal one is worked out
        for rows, columns in ((slice(None), slice(half)), (slice(half, None), slice(half, None))):
            torch.addmm(yy[b][columns], x[a][rows], y[b][columns].T, alpha=-2, out=out[rows, columns])
        out.add_(xx[a, None]).clamp_(min=0)
        out[:half, half:] = out[half:, :half].T
        return out.fill_diagonal_(0)

    def _pairs(self, sides: tuple[int, int], i: Tensor, j: Tensor) -> Tensor:
        x, y = (self.features[side] for side in sides)
        return x.index_select(0, i).sub_(y.index_select(0, j)).square_().sum(1)


class _Distances(_Source):
    def __init__(self, query_gallery: Tensor, query_query: Tensor, gallery_gallery: Tensor):
        self.matrices = {(0, 0): query_query, (0, 1): query_gallery, (1, 1): gallery_gallery}
        self.sizes = len(query_gallery), query_gallery.shape[1]
        self.device = query_gallery.device

    def _block(self, sides: tuple[int, int], a: slice, b: slice, out: Tensor) -> Tensor:
        return torch.square(self.matrices[sides][a, b], out=out)

    def _pairs(self, sides: tuple[int, int], i: Tensor, j: Tensor) -> Tensor:
        return self.matrices[sides][i, j].square()


def _rerank(
    source: _Source, k1: int, k2: int, lambda_value: float, chunk_size: int, places: Tensor | None = None
) -> Tensor:
    """The final distances ``[Q, G]``, or those at some places of the gallery, ``[Q, n]``."""
    Q, G = source.sizes
    out = torch.empty(Q, G if places is None else places.shape[1], dtype=torch.float32, device=source.device)
    if not Q * G:
        return out
    with torch.autocast(source.device.type, enabled=False):
        nearest, values, scale = _neighbours(source, max(k1 + 1, k2), chunk_size, out if places is None else None)
        if places is not None:
            item = torch.arange(Q, device=source.device).repeat_interleave(places.shape[1])
            out.copy_(source.pairs(item, places.flatten() + Q).view(places.shape))
        codes = _encode(source, nearest, values, scale, k1)
        if k2 > 1:
            codes = _expand(codes, nearest[:, :k2])
        return _blend(out, codes, source.sizes, scale, lambda_value, places)


# ----------------------------------------------------------------------------------------------------------------------
# Neighbours. A key is a distance (whose bits, read as an integer, have its order) above the neighbour's number: keys
# order by distance, then by number, and no two are equal.


def _neighbours(source: _Source, k: int, chunk_size: int, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """For each item its k nearest, in order, and their squared distances ``[N, k]``, and the largest of all its squared
    distances ``[N]``. Those of the queries to the gallery are written into ``out`` ``[Q, G]``."""
    (Q, G), device = source.sizes, source.device
    N = Q + G
    scale = torch.zeros(N, dtype=torch.float32, device=device)
    best = torch.full((N, min(k, N)), _FARTHEST, device=device)

    starts = [*range(0, Q, chunk_size), *range(Q, N, chunk_size)]
    parts = [slice(start, stop) for start, stop in zip(starts, [*starts[1:], N], strict=True)]
    room = torch.empty(
        min(chunk_size, N) ** 2, dtype=torch.float32, device=device
    )  # memory that is new for each block costs time
    numbers = torch.arange(N, device=device)
    for a in parts:  # the blocks on the diagonal first: they give every item a bound for the others
        block = source.block(a, a, room)
        scale[a] = block.amax(1)
        _keep_smallest(best[a], _keys(block, numbers[a]))
    for n, a in enumerate(parts):
        for b in parts[n + 1 :]:
            block = source.block(a, b, room)
            if out is not None and a.stop <= Q <= b.start:
                out[a, b.start - Q : b.stop - Q] = block
            scale[a] = torch.maximum(scale[a], block.amax(1))
            scale[b] = torch.maximum(scale[b], block.amax(0))
            bound_a, bound_b = (_unpack(best[s, -1])[0] for s in (a, b))
            i, j = (block <= torch.maximum(bound_a[:, None], bound_b)).nonzero(as_tuple=True)
            near = block.take(i * block.shape[1] + j)
            for rows, columns, bound, own, other in ((i, j, bound_a, a, b), (j, i, bound_b, b, a)):
                at = (near <= bound[rows]).nonzero()[:, 0]
                at = at[rows[at].argsort()]
                _keep_smallest(best[own], _padded(rows[at], _keys(near[at], numbers[other][columns[at]]), best[own]))
    values, nearest = _unpack(best)
    return nearest, values, scale.clamp_(min=torch.finfo(torch.float32).tiny)


def _keys(distances: Tensor, numbers: Tensor) -> Tensor:
    return (distances.view(torch.int32).long() << 32) | numbers


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    return (keys >> 32).int().view(torch.float32), keys & (2**31 - 1)


def _keep_smallest(best: Tensor, keys: Tensor) -> None:
    best.copy_(torch.cat([best, keys], 1).topk(best.shape[1], largest=False).values)


def _padded(rows: Tensor, keys: Tensor, like: Tensor) -> Tensor:
    """Keys with their rows, in order of the rows, as a table with as many rows as ``like``."""
    count = torch.bincount(rows, minlength=len(like))
    place = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[rows]
    table = torch.full((len(like), int(count.max())), torch.iinfo(torch.int64).max, device=rows.device)
    table[rows, place] = keys
    return table


# ----------------------------------------------------------------------------------------------------------------------
# Encodings


class _Rows:
    """A matrix by its entries, row after row: ``count`` entries in each row, their columns and values."""

    def __init__(self, count: Tensor, column: Tensor, value: Tensor):
        self.count, self.column, self.value = count, column, value
        self.start = count.cumsum(0) - count

    @classmethod
    def joined(cls, parts: list[tuple[Tensor, Tensor, Tensor]]) -> "_Rows":
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The entries of some rows: which of ``rows`` each belongs to, and where it is."""
        count = self.count[rows]
        owner = torch.repeat_interleave(count)
        shift = self.start[rows] - (count.cumsum(0) - count)
        return owner, torch.arange(len(owner), device=rows.device).add_(shift.index_select(0, owner))


def _reciprocal(nearest: Tensor) -> Tensor:
    """R(p, k): which of the neighbours ``[N, k]`` have the item among their own."""
    N = len(nearest)
    item = torch.arange(N, device=nearest.device)[:, None]
    return torch.isin(nearest * N + item, item * N + nearest, assume_unique=True)


def _encode(source: _Source, nearest: Tensor, values: Tensor, scale: Tensor, k1: int) -> _Rows:
    """V: for each item exp(-distance) to those in its R*(p, k1), its R(p, k1) with what joins it; rows sum to 1."""
    N = len(nearest)
    width = -(-(N + 1) // 8) * 8  # of a table of flags: at least one column of no item, and whole words
    nearest, values = nearest[:, : k1 + 1], values[:, : k1 + 1]
    mutual = _reciprocal(nearest)
    half = nearest[:, : round(k1 / 2) + 1]
    mutual_half = _reciprocal(half)
    size = mutual_half.sum(1)
    half = torch.where(mutual_half, half, N)

    parts = []
    for rows in torch.arange(N, device=nearest.device).split(max(1, _CELLS // N)):
        r, place = mutual[rows].nonzero(as_tuple=True)
        candidate = nearest[rows][r, place]
        flags = torch.zeros(len(rows), width, dtype=torch.bool, device=rows.device)
        flags[r, candidate] = True
        shared = flags[r[:, None], half[candidate]].sum(1)
        joins = 3 * shared > 2 * size[candidate]
        flags[r[joins, None], half[candidate[joins]]] = True
        flags[:, N:] = False
        cell = _true_cells(flags)
        r, column = cell // width, cell % width

        item = rows[r]
        same = nearest.index_select(0, item) == column[:, None]
        distance = (values.index_select(0, item) * same).sum(1)
        far = (~same.any(1)).nonzero()[:, 0]  # came with a candidate: not among the item's own neighbours
        if len(far):
            distance[far] = source.pairs(item[far], column[far])
        weight = (-distance / scale[item]).exp_()
        weight /= torch.zeros(len(rows), dtype=torch.float32, device=rows.device).index_add_(0, r, weight)[r]
        parts.append((torch.bincount(r, minlength=len(rows)), column, weight))
    return _Rows.joined(parts)


def _expand(codes: _Rows, nearest: Tensor) -> _Rows:
    """Local query expansion: the mean of the encodings of the nearest."""
    N, k = nearest.shape
    matrix = partial(torch.sparse_coo_tensor, size=(N, N), device=nearest.device, check_invariants=False)
    owner = torch.arange(N, device=nearest.device).repeat_interleave(k)
    mean = matrix(torch.stack([owner, nearest.flatten()]), codes.value.new_full((N * k,), 1 / k))
    owner = torch.repeat_interleave(codes.count)
    sparse = matrix(torch.stack([owner, codes.column]), codes.value)
    with warnings.catch_warnings():  # on a CPU the product is worked out on CSR matrices, which torch calls a beta
        warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
        expanded = torch.sparse.mm(mean, sparse).coalesce()
    row, column = expanded.indices()
    return _Rows(torch.bincount(row, minlength=N), column, expanded.values())


def _true_cells(flags: Tensor) -> Tensor:
    """Where a table of flags, most of them False and a multiple of 8 in a row, is True, counting through its rows."""
    word = flags.view(torch.int64).flatten().nonzero()[:, 0]
    place, bit = flags.view(-1, 8)[word].nonzero(as_tuple=True)
    return word[place] * 8 + bit


def _blend(
    out: Tensor, codes: _Rows, sizes: tuple[int, int], scale: Tensor, lambda_value: float, places: Tensor | None
) -> Tensor:
    """The final distance, of the Jaccard distance and the original, in place of the squared distances."""
    Q, G = sizes
    queries = int(codes.count[:Q].sum())
    column, order = codes.column[queries:].sort()
    number = torch.repeat_interleave(codes.count[Q:])[order]
    inverted = _Rows(torch.bincount(column, minlength=Q + G), number, codes.value[queries:][order])
    owner = torch.repeat_interleave(codes.count[:Q])
    work = torch.zeros_like(codes.count[:Q]).index_add_(0, owner, inverted.count[codes.column[:queries]])
    work = (work + G).cumsum(0)
    bounds = torch.arange(0, int(work[-1]) + _CELLS, _CELLS, device=out.device)
    bounds = torch.searchsorted(work, bounds, right=True).clamp_(max=Q).unique().tolist()

    for first, last in pairwise(bounds):
        owner, entry = codes.of(torch.arange(first, last, device=out.device))
        hit, at = inverted.of(codes.column[entry])
        shared = torch.minimum(codes.value[entry].index_select(0, hit), inverted.value.index_select(0, at))
        cell = inverted.column.index_select(0, at).add_((owner * G).index_select(0, hit))
        sums = torch.zeros((last - first) * G, dtype=torch.float32, device=out.device)
        shared = sums.index_add_(0, cell, shared).view(-1, G)
        if places is not None:
            shared = shared.gather(1, places[first:last])
        # Rows sum to 1, so that the maxima sum to 2 - the sum of the minima. (But an item that is preceded by more than
        # k1 equal ones is not among its own neighbours, and its row is empty; the authors' code does the same.)
        block = out[first:last]
        jaccard = shared.div_(2 - shared).neg_().add_(1)
        block.mul_(lambda_value / scale[first:last, None]).add_(jaccard, alpha=1 - lambda_value)
    return out
