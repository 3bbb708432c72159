"""Distances between embeddings, in float32 and block by block, whatever the numbers' magnitude."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ._arrays import Array, as_tensors, like, peaks, whole

__all__ = ["METRICS", "Comparison", "distances"]

METRICS = ("cosine", "euclidean", "dot")
_SAFE = 2.0**50  # between its inverse and this, float32 numbers can be squared and summed up


@torch.no_grad()
def distances(queries: Array, gallery: Array, metric: str = "cosine", *, chunk_size: int = 512) -> Array:
    """Compares every query with every gallery embedding; smaller is nearer.

    Args:
        queries: ``[Q, D]``, of any real type; numpy, or torch on any device.
        gallery: ``[G, D]``, of the same kind and on the same device.
        metric: ``cosine``: 1 - cosine, from 0 to 2 (a zero vector is at distance 1 from everything, itself included);
            ``euclidean``: by the inner product, so that distances below some 1e-3 of the vectors' length drown in
            rounding (never below 0); ``dot``: the negative dot product.
        chunk_size: query rows that are worked on at once.

    Returns:
        float32 ``[Q, G]``, of the kind and on the device of the input. No gradient is kept.

    Raises:
        TypeError: numpy mixed with torch, or neither; no real numbers.
        ValueError: a wrong shape, different devices, an unknown metric; NaN or infinity among the embeddings (the rows
            are named); distances that float32 cannot hold.
    """
    chunk_size = whole("chunk_size", chunk_size)
    compared = Comparison(queries, gallery, metric)
    Q, G = compared.sizes
    out = torch.empty(Q, G, dtype=torch.float32, device=compared.device)
    columns = compared.part(1, slice(0, G))
    for start in range(0, Q, chunk_size):
        rows = compared.part(0, slice(start, min(start + chunk_size, Q)))
        block = compared.raw(rows, columns, out[start : start + chunk_size])
        compared.finish(block, rows, slice(None))
    return like(out, queries)


class Part(NamedTuple):
    """Some rows of one side: float32 vectors ``[n, D]`` (for cosine at unit length), for the Euclidean distance their
    squared lengths ``[n]``, and what they were divided by to be safe, float64 ``[n]``, if they were."""

    vectors: Tensor
    squares: Tensor | None
    sizes: Tensor | None


class Comparison:
    """Queries and a gallery, checked, whose distances can be had in blocks.

    ``raw`` fills a block with numbers that, within a row, have the order of the distances; ``finish`` makes distances
    of any of them. A search finishes the few that it keeps.
    """

    def __init__(self, queries: np.ndarray | Tensor, gallery: np.ndarray | Tensor, metric: str):
        if metric not in METRICS:
            raise ValueError(f"metric must be 'cosine', 'euclidean' or 'dot', got {metric!r}.")
        self.metric = metric
        self.sides = as_tensors(queries=queries, gallery=gallery)
        shapes = [list(x.shape) for x in self.sides]
        if any(len(shape) != 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
            single = " A single embedding goes in as x[None]." if any(len(shape) == 1 for shape in shapes) else ""
            raise ValueError(f"expected queries [Q, D] and gallery [G, D], got {shapes[0]} and {shapes[1]}.{single}")
        if not shapes[0][1]:
            raise ValueError(f"embeddings must have at least one number, got {shapes[0]} and {shapes[1]}.")
        self.sizes = shapes[0][0], shapes[1][0]
        self.device = self.sides[0].device
        largest = [peaks(name, x) for name, x in zip(("queries", "gallery"), self.sides, strict=True)]
        # Rows of other sizes are divided by a power of two: nothing is rounded.
        safe = all(bool(((x == 0) | ((x >= 1 / _SAFE) & (x <= _SAFE))).all()) for x in largest)
        self.powers = None if safe else [_power_of_two(x) for x in largest]

    def part(self, side: int, rows: slice) -> Part:
        """Rows of the queries (0) or the gallery (1)."""
        x = self.sides[side][rows]
        sizes = None if self.powers is None else self.powers[side][rows]
        vectors = x.float() if sizes is None else (x.double() / sizes[:, None]).float()
        if self.metric == "cosine":
            return Part(F.normalize(vectors, eps=torch.finfo(torch.float32).tiny), None, None)
        return Part(vectors, vectors.square().sum(1) if self.metric == "euclidean" else None, sizes)

    def raw(self, rows: Part, columns: Part, out: Tensor) -> Tensor:
        """Writes a block ``[n, m]`` into ``out``: increasing with the distance, along each row."""
        with torch.autocast(self.device.type, enabled=False):
            if rows.sizes is not None and columns.sizes is not None:
                return out.copy_(self._of_all_sizes(rows, columns, rows.sizes[:, None], columns.sizes))
            if columns.squares is not None:
                return out.copy_(columns.squares).addmm_(rows.vectors, columns.vectors.T, alpha=-2)
            return out.addmm_(rows.vectors, columns.vectors.T, beta=0, alpha=-1)

    def finish(self, raw: Tensor, rows: Part, which: Tensor | slice) -> Tensor:
        """Distances in place of what ``raw`` gave for the rows ``which`` (of ``rows``): ``[n, m]``."""
        if self.metric == "cosine":
            return raw.add_(1).clamp_(min=0)
        if rows.squares is not None and rows.sizes is None:
            return raw.add_(rows.squares[which, None]).clamp_(min=0).sqrt_()
        return raw

    def _of_all_sizes(self, rows: Part, columns: Part, a: Tensor, b: Tensor) -> Tensor:
        product = rows.vectors @ columns.vectors.T
        if rows.squares is None or columns.squares is None:
            found, size = -product.double(), a * b
        else:
            size = torch.maximum(a, b)
            a, b = (a / size).float(), (b / size).float()
            square = a.square() * rows.squares[:, None] + b.square() * columns.squares - 2 * a * b * product
            found = square.clamp(min=0).sqrt().double()
        out = (found * size).float()
        lost = (found != 0) & ~((out.abs() >= torch.finfo(torch.float32).tiny) & out.isfinite())
        if lost.any():
            raise ValueError(
                f"distances of about {float((found * size)[lost][0]):.3g} are beyond what float32 holds (from 1e-38 to "
                "3e38): divide the embeddings by their typical length first, or compare them by cosine."
            )
        return out


def _power_of_two(x: Tensor) -> Tensor:
    """What each of some magnitudes is divided by to lie between 1/2 and 1; for 0 something very small."""
    exponent = torch.frexp(x.double()).exponent.clamp(-1000, 1000)
    return torch.exp2(torch.where(x == 0, -1000, exponent).double())
