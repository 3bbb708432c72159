"""The nearest of a gallery, without the table of all distances."""

from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from ._arrays import Array, Ids, ids, like, whole
from .distances import Comparison, Part

__all__ = ["SearchResult", "search"]

T = TypeVar("T")  # np.ndarray or Tensor, whatever was searched with

_CELLS = 2**21  # of a block of distances
_ROWS = 1024  # queries at once, at most
_COLUMNS = 2048  # gallery rows at once, at least
_NUMBERS = 2**22  # of a gallery block
_GROUP = 32  # columns of a block whose smallest is looked at first
_LAST = 2**31 - 1  # the place that stands for none


class SearchResult(tuple[T, T], Generic[T]):
    """The nearest of the gallery for each query: ``(distances, indices)``, both ``[Q, k]``, nearest first.

    Where a query has fewer than k, the last places hold index -1 and distance infinity.
    """

    __slots__ = ()

    def __new__(cls, distances: T, indices: T) -> "SearchResult[T]":
        return super().__new__(cls, (distances, indices))

    def __getnewargs__(self) -> tuple[T, T]:
        return self[0], self[1]

    @property
    def distances(self) -> T:
        """float32 ``[Q, k]``."""
        return self[0]

    @property
    def indices(self) -> T:
        """int64 ``[Q, k]``, rows of the gallery."""
        return self[1]


@torch.no_grad()
def search(
    queries: Array,
    gallery: Array,
    k: int,
    metric: str = "cosine",
    *,
    exclude: Ids | tuple[Ids, Ids] | None = None,
    block: int | None = None,
) -> SearchResult[Array]:
    """The k nearest of the gallery for each query, exactly, in memory that does not grow with ``[Q, G]``.

    The order is that of ``distances``; at equal distance lower indices come first.

    Args:
        queries: ``[Q, D]``, of any real type; numpy, or torch on any device.
        gallery: ``[G, D]``, of the same kind and on the same device.
        k: how many; of a gallery with fewer all are ranked.
        metric: as in ``distances``.
        exclude: what is left out: ``[Q]``, each query's own place in the gallery or -1 (``arange(N)`` where queries and
            gallery are the same); or a pair of query rows and gallery rows, both ``[n]``.
        block: gallery rows that are compared at once; None: as many as fit the processor's caches.

    Returns:
        ``(distances, indices)``: float32 and int64 ``[Q, min(k, G)]``, of the kind and on the device of the input.

    Raises:
        TypeError: as in ``distances``; k or block that is no whole number, exclude that holds no integers.
        ValueError: as in ``distances``; k or block below 1, places outside queries or gallery.

    Example:
        >>> import numpy as np
        >>> from temporal_agg.retrieval import search
        >>> gallery = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> found = search(np.array([[2.0, 0.0]]), gallery, k=2)
        >>> found.indices, found.distances.round(2)
        (array([[0, 2]]), array([[0.  , 0.29]], dtype=float32))
    """
    k = whole("k", k)
    block = None if block is None else whole("block", block)
    compared = Comparison(queries, gallery, metric)
    Q, G = compared.sizes
    if G > _LAST:
        raise ValueError(f"a gallery may have up to {_LAST:,} rows, got {G:,}: search it in parts.")
    left_out = _excluded(exclude, Q, G, compared.device)
    k = min(k, G)
    if block is None:
        most = max(_COLUMNS, _NUMBERS // compared.sides[1].shape[1])
        fits = _CELLS // max(1, min(Q, _ROWS)) // _GROUP * _GROUP  # all queries at once, as long as they are few
        block = max(2 * k, min(most, max(_COLUMNS, fits)))
    block = -(-min(max(block, k), max(G, 1)) // _GROUP) * _GROUP
    height = max(1, min(_ROWS, _CELLS // block))

    keys = torch.empty(Q, k, dtype=torch.int64, device=compared.device)
    if k:
        room = torch.empty(min(height, Q) * block, dtype=torch.float32, device=compared.device)
        for start in range(0, Q, height):
            rows = slice(start, min(start + height, Q))
            keys[rows] = _nearest(compared, rows, k, block, room, left_out)
    found, indices = unpack(keys)
    indices[found.isinf()] = -1
    return SearchResult(like(found, queries), like(indices, queries))


def _nearest(
    compared: Comparison, which: slice, k: int, block: int, room: Tensor, left_out: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The keys of the k nearest of some queries, in order: ``[n, k]``."""
    rows, G = compared.part(0, which), compared.sizes[1]
    n = len(rows.vectors)
    if left_out is not None:
        inside = (left_out[0] >= which.start) & (left_out[0] < which.stop)
        hidden_rows, hidden_columns = (x[inside] for x in left_out)  # in order of the columns
        hidden_rows = hidden_rows - which.start
        starts = torch.arange(0, G + block, block, device=room.device)
        edges = torch.searchsorted(hidden_columns, starts).tolist()
    best = room.new_empty(0, dtype=torch.int64)
    for number, start in enumerate(range(0, G, block)):
        columns = compared.part(1, slice(start, min(start + block, G)))
        width = len(columns.vectors)
        padded = -(-width // _GROUP) * _GROUP
        raw = room[: n * padded].view(n, padded)
        raw[:, width:] = torch.inf
        compared.raw(rows, columns, raw[:, :width])
        if left_out is not None:
            at = slice(edges[number], edges[number + 1])
            raw[hidden_rows[at], hidden_columns[at] - start] = torch.inf
        if number:
            _improve(best, compared, rows, raw, start)
        else:
            places = torch.arange(width, device=raw.device)
            best = keys_of(compared.finish(raw[:, :width], rows, slice(None)), places)
            best = best.topk(k, largest=False, sorted=False).values
    return best.sort(1).values


def _improve(best: Tensor, compared: Comparison, rows: Part, raw: Tensor, start: int) -> None:
    """Takes what is nearer than the farthest that a row has. What is as near has a higher index, and stays out."""
    bound = unpack(best.amax(1))[0]
    groups = raw.view(len(raw), _GROUP, -1)  # the columns of a group lie apart, so that the smallest come in one sweep
    smallest = compared.finish(groups.amin(1), rows, slice(None))
    row, group = (smallest < bound[:, None]).nonzero(as_tuple=True)
    if not len(row):
        return
    values = compared.finish(groups[row, :, group], rows, row)
    hit, member = (values < bound[row, None]).nonzero(as_tuple=True)
    row, place = row[hit], start + member * groups.shape[2] + group[hit]
    touched, count = row.unique_consecutive(return_counts=True)
    table = best.new_full((len(touched), int(count.max())), torch.iinfo(torch.int64).max)
    owner = torch.repeat_interleave(count)
    table[owner, torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[owner]] = keys_of(
        values[hit, member], place
    )
    together = torch.cat([best[touched], table], 1)
    best[touched] = together.topk(best.shape[1], largest=False, sorted=False).values


# A key is a distance, as an integer that has its order, above the place in the gallery: keys order by distance, then by
# place, and no two are equal.


def keys_of(distances: Tensor, places: Tensor) -> Tensor:
    """float32 distances and the places that they are at -> int64 keys."""
    bits = (distances + 0.0).view(torch.int32)  # + 0.0: no negative zero
    bits = bits ^ ((bits >> 31) & _LAST)  # the order of negative numbers is the reverse of their bits'
    return (bits.long() << 32) | torch.where(distances == torch.inf, _LAST, places)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys -> distances, places."""
    bits = (keys >> 32).int()
    return (bits ^ ((bits >> 31) & _LAST)).view(torch.float32), keys & _LAST


def _excluded(exclude: Any, Q: int, G: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Query rows and gallery rows of what is left out, in order of the latter."""
    if exclude is None:
        return None
    if isinstance(exclude, tuple) and len(exclude) == 2 and np.ndim(exclude[0]) == 1:
        n = len(exclude[0])
        rows, columns = (ids(f"exclude[{i}]", x, n, f"exclude[0] [{n}]") for i, x in enumerate(exclude))
    else:
        columns = ids("exclude", exclude, Q, f"the {Q} queries")
        rows = (columns != -1).nonzero()[0]
        columns = columns[rows]
    for what, places, size in (("queries", rows, Q), ("gallery", columns, G)):
        if len(places) and not (places.min() >= 0 and places.max() < size):
            raise ValueError(
                f"exclude must name rows of the {what}, 0 to {size - 1} (or -1 for none where it is one list), got "
                f"values from {places.min()} to {places.max()}."
            )
    order = columns.argsort(kind="stable")
    return torch.as_tensor(rows[order], device=device), torch.as_tensor(columns[order], device=device)
