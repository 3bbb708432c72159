"""Distances between embeddings, in float32 and in blocks of rows."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["distances"]


@torch.no_grad()
def distances(
    queries: np.ndarray | Tensor,
    gallery: np.ndarray | Tensor,
    metric: str = "cosine",
    *,
    chunk_size: int = 512,
) -> np.ndarray | Tensor:
    """Compares every query with every gallery embedding; smaller is nearer.

    Args:
        queries: ``[Q, D]``, of any real type; numpy, or torch on any device.
        gallery: ``[G, D]``, of the same kind and on the same device.
        metric: ``cosine``: 1 - cosine, from 0 to 2 (a zero vector is at distance 1 from everything, itself included);
            ``euclidean``: by the inner product, so that distances below some 1e-3 of the vectors' length drown in
            rounding (never below 0, never NaN); ``dot``: the negative dot product.
        chunk_size: query rows that are worked on at once.

    Returns:
        float32 ``[Q, G]``, of the kind and on the device of the input. No gradient is kept. A NaN in an embedding
        stays visible.

    Raises:
        TypeError: numpy mixed with torch, or neither.
        ValueError: a wrong shape, different devices, an unknown metric.
    """
    if metric not in ("cosine", "euclidean", "dot"):
        raise ValueError(f"metric must be 'cosine', 'euclidean' or 'dot', got {metric!r}.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    if isinstance(queries, np.ndarray) and isinstance(gallery, np.ndarray):
        # torch takes neither read-only nor reversed arrays: np.require copies those, and other types than float32.
        queries, gallery = (torch.from_numpy(np.require(x, np.float32, "CW")) for x in (queries, gallery))
        return distances(queries, gallery, metric, chunk_size=chunk_size).numpy()
    if not (isinstance(queries, Tensor) and isinstance(gallery, Tensor)):
        raise TypeError(
            "queries and gallery must be two numpy arrays or two torch tensors, got "
            f"{type(queries).__name__} and {type(gallery).__name__}."
        )
    if queries.dim() != 2 or gallery.dim() != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"expected queries [Q, D] and gallery [G, D], got {list(queries.shape)} and {list(gallery.shape)}."
        )
    if queries.device != gallery.device:
        raise ValueError(
            f"queries are on {queries.device}, the gallery is on {gallery.device}: move one to the other's device."
        )

    out = torch.empty(len(queries), len(gallery), device=queries.device)
    columns = gallery.float()
    if metric == "cosine":
        columns = _unit(columns)
    squares = columns.square().sum(1)
    with torch.autocast(queries.device.type, enabled=False):
        for rows, block in zip(queries.split(chunk_size), out.split(chunk_size), strict=True):
            rows = rows.float()
            if metric == "cosine":
                torch.mm(_unit(rows), -columns.T, out=block).add_(1).clamp_(min=0)
            elif metric == "euclidean":
                torch.addmm(squares, rows, columns.T, alpha=-2, out=block)
                block.add_(rows.square().sum(1, keepdim=True)).clamp_(min=0).sqrt_()
            else:
                torch.mm(rows, columns.T, out=block).neg_()
    return out


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, eps=torch.finfo(x.dtype).tiny)
