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

import numpy as np
import torch
from torch import Tensor

__all__ = ["rerank", "rerank_distances"]

_CELLS = 2**21  # of the tables that the encodings are worked out on, some rows at once
_PAIRS = 512  # of embeddings that are compared at once


def rerank(
    queries: np.ndarray | Tensor,
    gallery: np.ndarray | Tensor,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    *,
    chunk_size: int = 1024,
) -> np.ndarray | Tensor:
    """Distances that also compare whom two embeddings have for neighbours; smaller is nearer.

    The neighbours of queries and gallery are looked up among both together: the result depends on all queries. For
    embeddings that are compared by cosine, pass them L2-normalised.

    Args:
        queries: ``[Q, D]``, of any real type; numpy, or torch on any device.
        gallery: ``[G, D]``, of the same kind and on the same device.
        k1: length of the lists of neighbours. At equal distance queries come before the gallery, lower indices first.
        k2: an encoding is averaged over its k2 nearest, itself included; 1: it is not.
        lambda_value: weight of the original distance, from 0 (the Jaccard distance alone) to 1.
        chunk_size: distances are computed in blocks of so many rows and columns.

    Returns:
        float32 ``[Q, G]``, from 0 to 1, of the kind and on the device of the input. No gradient is kept.

    Raises:
        TypeError: numpy mixed with torch, or neither.
        ValueError: a wrong shape or setting, different devices, NaN or infinity among the embeddings.
    """
    (queries, gallery), is_numpy = _tensors(queries=queries, gallery=gallery)
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"expected queries [Q, D] and gallery [G, D], got {list(queries.shape)} and {list(gallery.shape)}."
        )
    source = _Features(queries, gallery)
    for name, squares in zip(("queries", "gallery"), source.squares, strict=True):
        wrong = (~squares.isfinite()).nonzero()
        if len(wrong):
            raise ValueError(
                f"{name}[{int(wrong[0])}] holds NaN, infinity, or numbers too large for float32 distances: it has no "
                "neighbours."
            )
    out = _rerank(source, k1, k2, lambda_value, chunk_size)
    return out.numpy() if is_numpy else out


def rerank_distances(
    query_gallery: np.ndarray | Tensor,
    query_query: np.ndarray | Tensor,
    gallery_gallery: np.ndarray | Tensor,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    *,
    chunk_size: int = 1024,
) -> np.ndarray | Tensor:
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
        TypeError: numpy mixed with torch, or neither.
        ValueError: shapes that do not fit each other, a wrong setting, different devices, a distance that is negative,
            NaN or infinite.
    """
    given = {"query_gallery": query_gallery, "query_query": query_query, "gallery_gallery": gallery_gallery}
    matrices, is_numpy = _tensors(**given)
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
    out = _rerank(_Distances(*matrices), k1, k2, lambda_value, chunk_size)
    return out.numpy() if is_numpy else out


def _tensors(**arrays: np.ndarray | Tensor) -> tuple[list[Tensor], bool]:
    """The arrays as float32 tensors, and whether they were numpy's."""
    names, given = " and ".join(arrays), list(arrays.values())
    is_numpy = isinstance(given[0], np.ndarray)
    if not all(isinstance(x, np.ndarray if is_numpy else Tensor) for x in given):
        types = " and ".join(type(x).__name__ for x in given)
        raise TypeError(f"{names} must be all numpy arrays or all torch tensors, got {types}.")
    if is_numpy:
        given = [torch.from_numpy(np.require(x, np.float32, "CW")) for x in given]
    for name, x in zip(arrays, given, strict=True):
        if x.dim() != 2:
            raise ValueError(f"{name} must have two dimensions, got {list(x.shape)}.")
        if x.device != given[0].device:
            raise ValueError(f"{names} must be on one device, got {given[0].device} and {x.device}.")
    return [x.detach().float() for x in given], is_numpy


class _Source:
    """Squared distances between items: queries, numbered from 0, then the gallery. A side is 0 or 1 for them."""

    sizes: tuple[int, int]
    device: torch.device

    def block(self, a: slice, b: slice, room: Tensor) -> Tensor:
        """All of ``a`` with all of ``b``; each lies on one side, ``a`` not after ``b``. Written where ``room`` is."""
        Q = self.sizes[0]
        sides = int(a.start >= Q), int(b.start >= Q)
        shape = a.stop - a.start, b.stop - b.start
        places = (slice(s.start - Q * side, s.stop - Q * side) for s, side in zip((a, b), sides, strict=True))
        return self._block(sides, *places, out=room[: shape[0] * shape[1]].view(shape))

    def pairs(self, i: Tensor, j: Tensor) -> Tensor:
        """Each of ``i`` with the item at its place in ``j``."""
        Q = self.sizes[0]
        i, j = torch.minimum(i, j), torch.maximum(i, j)
        out = torch.empty(len(i), device=self.device)
        for sides in ((0, 0), (0, 1), (1, 1)):
            at = (((i >= Q) == sides[0]) & ((j >= Q) == sides[1])).nonzero()[:, 0]
            for part in at.split(_PAIRS):
                out[part] = self._pairs(sides, i[part] - Q * sides[0], j[part] - Q * sides[1])
        return out


class _Features(_Source):
    def __init__(self, queries: Tensor, gallery: Tensor):
        self.features = queries, gallery
        self.sizes = len(queries), len(gallery)
        self.device = queries.device
        self.squares = tuple(torch.cat([part.square().sum(1) for part in x.split(_PAIRS)]) for x in self.features)

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
        self.sizes = tuple(query_gallery.shape)
        self.device = query_gallery.device

    def _block(self, sides: tuple[int, int], a: slice, b: slice, out: Tensor) -> Tensor:
        return torch.square(self.matrices[sides][a, b], out=out)

    def _pairs(self, sides: tuple[int, int], i: Tensor, j: Tensor) -> Tensor:
        return self.matrices[sides][i, j].square()


@torch.no_grad()
def _rerank(source: _Source, k1: int, k2: int, lambda_value: float, chunk_size: int) -> Tensor:
    for name, value in (("k1", k1), ("k2", k2), ("chunk_size", chunk_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if not 0 <= lambda_value <= 1:
        raise ValueError(f"lambda_value must be from 0 to 1, got {lambda_value}.")
    Q, G = source.sizes
    if not Q * G:
        return torch.empty(Q, G, device=source.device)

    with torch.autocast(source.device.type, enabled=False):
        out, nearest, values, scale = _neighbours(source, max(k1 + 1, k2), chunk_size)
        codes = _encode(source, nearest, values, scale, k1)
        if k2 > 1:
            codes = _expand(codes, nearest[:, :k2])
        return _blend(out, codes, scale, lambda_value)


# ----------------------------------------------------------------------------------------------------------------------
# Neighbours. A key is a distance (whose bits, read as an integer, have its order) above the neighbour's number: keys
# order by distance, then by number, and no two are equal.


def _neighbours(source: _Source, k: int, chunk_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The squared distances of the queries to the gallery ``[Q, G]``; for each item its k nearest, in order, and their
    squared distances ``[N, k]``, and the largest of all its squared distances ``[N]``."""
    (Q, G), device = source.sizes, source.device
    N = Q + G
    out = torch.empty(Q, G, device=device)
    scale = torch.zeros(N, device=device)
    best = _keys(torch.full((N, min(k, N)), math.inf, device=device), torch.tensor(2**31 - 1, device=device))

    starts = [*range(0, Q, chunk_size), *range(Q, N, chunk_size)]
    parts = [slice(start, stop) for start, stop in zip(starts, [*starts[1:], N], strict=True)]
    room = torch.empty(min(chunk_size, N) ** 2, device=device)  # memory that is new for each block costs time
    numbers = torch.arange(N, device=device)
    for a in parts:  # the blocks on the diagonal first: they give every item a bound for the others
        block = source.block(a, a, room)
        scale[a] = block.amax(1)
        _keep_smallest(best[a], _keys(block, numbers[a]))
    for n, a in enumerate(parts):
        for b in parts[n + 1 :]:
            block = source.block(a, b, room)
            if a.stop <= Q <= b.start:
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
    if not scale.isfinite().all():
        raise ValueError("the squared distances overflow float32: scale the embeddings (or distances) down.")
    values, nearest = _unpack(best)
    return out, nearest, values, scale.clamp_(min=torch.finfo(torch.float32).tiny)


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
        weight /= torch.zeros(len(rows), device=rows.device).index_add_(0, r, weight)[r]
        parts.append((torch.bincount(r, minlength=len(rows)), column, weight))
    return _Rows.joined(parts)


def _expand(codes: _Rows, nearest: Tensor) -> _Rows:
    """Local query expansion: the mean of the encodings of the nearest."""
    N, k = nearest.shape
    matrix = partial(torch.sparse_coo_tensor, size=(N, N), check_invariants=False)
    owner = torch.arange(N, device=nearest.device).repeat_interleave(k)
    mean = matrix(torch.stack([owner, nearest.flatten()]), codes.value.new_full((N * k,), 1 / k))
    owner = torch.repeat_interleave(codes.count)
    codes = matrix(torch.stack([owner, codes.column]), codes.value)
    with warnings.catch_warnings():  # on a CPU the product is worked out on CSR matrices, which torch calls a beta
        warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
        expanded = torch.sparse.mm(mean, codes).coalesce()
    row, column = expanded.indices()
    return _Rows(torch.bincount(row, minlength=N), column, expanded.values())


def _true_cells(flags: Tensor) -> Tensor:
    """Where a table of flags, most of them False and a multiple of 8 in a row, is True, counting through its rows."""
    word = flags.view(torch.int64).flatten().nonzero()[:, 0]
    place, bit = flags.view(-1, 8)[word].nonzero(as_tuple=True)
    return word[place] * 8 + bit


def _blend(out: Tensor, codes: _Rows, scale: Tensor, lambda_value: float) -> Tensor:
    """The final distance, of the Jaccard distance and the original, in place of the squared distances."""
    Q, G = out.shape
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
        shared = torch.zeros((last - first) * G, device=out.device).index_add_(0, cell, shared).view(-1, G)
        # Rows sum to 1, so that the maxima sum to 2 - the sum of the minima. (But an item that is preceded by more than
        # k1 equal ones is not among its own neighbours, and its row is empty; the authors' code does the same.)
        block = out[first:last]
        jaccard = shared.div_(2 - shared).neg_().add_(1)
        block.mul_(lambda_value / scale[first:last, None]).add_(jaccard, alpha=1 - lambda_value)
    return out
