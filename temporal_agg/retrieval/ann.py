"""FAISS indexes over the same embeddings, for galleries that one machine should not scan (extra ``faiss``)."""

import math
import os
from typing import Any

import numpy as np
import torch

from .._files import replace_file, utf8_name
from ._arrays import Array, like, whole
from .distances import METRICS, Comparison
from .search import SearchResult, keys_of, unpack

__all__ = ["faiss_index", "load_index", "save_index", "search_index"]

KINDS = ("flat", "hnsw", "ivf")
_ROWS = 65536  # of the gallery that are handed over at once
_LINKS = 32  # of a node of the HNSW graph: the usual compromise between recall and memory
_EFFORT = 128  # candidates that are kept while the graph is built, and, at least, while it is searched
_PER_LIST = 39  # rows at least of which FAISS's k-means wants to make a centre
_PROBED = 16  # one in so many inverted lists is read, but at least as many


@torch.no_grad()
def faiss_index(gallery: Array, metric: str = "cosine", kind: str = "flat") -> Any:
    """Builds a FAISS index whose row i is the gallery's row i.

    It is a plain index of FAISS, for its own tools too: inner products for ``dot`` and, behind a transform that
    normalises whatever comes in, for ``cosine``; squared distances for ``euclidean``. Its settings can be changed as
    FAISS has it.

    Args:
        gallery: ``[G, D]``, of any real type; numpy, or torch.
        metric: as in ``distances``.
        kind: ``flat``: exact, every row is compared. ``hnsw``: a graph that is walked towards the query; the fastest,
            256 bytes more a row. ``ivf``: rows lie in lists by the centre that is nearest, and the lists near the query
            are read; the smallest, and quickly built.

    Raises:
        ImportError: FAISS is not installed.
        TypeError: no array of real numbers.
        ValueError: as in ``distances``; an unknown kind, no row.
    """
    faiss = _faiss()
    if kind not in KINDS:
        raise ValueError(f"kind must be 'flat', 'hnsw' or 'ivf', got {kind!r}.")
    compared = Comparison(gallery[:0], gallery, metric)
    _check_powers(compared)
    G, D = compared.sizes[1], compared.sides[1].shape[1]
    if not G:
        raise ValueError("the gallery has no row to index.")
    by = faiss.METRIC_L2 if metric == "euclidean" else faiss.METRIC_INNER_PRODUCT
    index: Any = faiss.IndexFlat(D, by)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(D, _LINKS, by)
        index.hnsw.efConstruction = index.hnsw.efSearch = _EFFORT
    elif kind == "ivf":
        lists = max(1, min(round(4 * math.sqrt(G)), G // _PER_LIST))
        index = faiss.IndexIVFFlat(index, D, lists, by)
        index.nprobe = min(lists, max(_PROBED, lists // _PROBED))
        sample = torch.randperm(G, generator=torch.Generator("cpu").manual_seed(0), device="cpu")[: 256 * lists]
        rows = compared.sides[1][sample.sort().values.to(compared.device)]
        index.train(_vectors(Comparison(rows[:0], rows, metric), 1, slice(None)))
    if metric == "cosine":
        index = faiss.IndexPreTransform(faiss.NormalizationTransform(D, 2.0), index)
    for start in range(0, G, _ROWS):
        index.add(_vectors(compared, 1, slice(start, start + _ROWS)))
    return index


@torch.no_grad()
def search_index(index: Any, queries: Array, k: int) -> SearchResult[Array]:
    """The k nearest by a FAISS index, with the distances of ``distances``.

    Args:
        index: of ``faiss_index`` or ``load_index``.
        queries: ``[Q, D]``, of any real type; numpy, or torch.
        k: how many; of a gallery with fewer all are ranked.

    Returns:
        As ``search`` returns it. An approximate index may miss some of the nearest, and find fewer than k.

    Raises:
        ImportError: FAISS is not installed.
        TypeError: as in ``distances``.
        ValueError: as in ``distances``; queries of another width than the index.
    """
    faiss = _faiss()
    k = min(whole("k", k), index.ntotal)
    metric = _metric_of(index)
    compared = Comparison(queries, queries[:0], metric)
    _check_powers(compared)
    if compared.sides[0].shape[1] != index.d:
        raise ValueError(f"the index holds embeddings of {index.d} numbers, the queries have {queries.shape[1]}.")
    if not k or not len(queries):
        empty = torch.empty(len(queries), k, device=compared.device)
        return SearchResult(like(empty.float(), queries), like(empty.long(), queries))
    inner = faiss.downcast_index(index.index) if hasattr(index, "chain") else index
    if hasattr(inner, "hnsw"):
        inner.hnsw.efSearch = max(inner.hnsw.efSearch, 2 * k)
    values, places = (torch.from_numpy(x) for x in index.search(_vectors(compared, 0, slice(None)), k))
    if metric == "cosine":
        values = (1 - values).clamp_(min=0)
    elif metric == "euclidean":
        values = values.clamp_(min=0).sqrt_()
    else:
        values = values.neg_()
    values[places < 0] = torch.inf
    values, places = unpack(keys_of(values, places).sort(1).values)
    places[values.isinf()] = -1
    return SearchResult(like(values.to(compared.device), queries), like(places.to(compared.device), queries))


def save_index(index: Any, path: str | os.PathLike) -> None:
    """Writes an index, whole or not at all.

    Raises:
        ImportError: FAISS is not installed.
        OSError: with the path, if it cannot be written.
    """
    faiss = _faiss()

    def write(temporary: os.PathLike) -> None:
        try:
            with utf8_name(temporary, "wb") as name:
                faiss.write_index(index, name)
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[-1]) from error

    replace_file(path, write)


def load_index(path: str | os.PathLike) -> Any:
    """Reads an index that ``save_index``, or FAISS, wrote. Read only what comes from somebody you trust.

    Raises:
        ImportError: FAISS is not installed.
        FileNotFoundError: there is no such file.
        ValueError: it is no index, or one that ``search_index`` cannot use; the message names the file.
    """
    faiss = _faiss()
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {os.fspath(path)}: expected a FAISS index, as `save_index` writes it.")
    try:
        with utf8_name(path) as name:
            index = faiss.read_index(name)
        _metric_of(index)
    except Exception as error:  # FAISS raises RuntimeError, MemoryError, ...
        raise ValueError(
            f"{os.fspath(path)} is no FAISS index of embeddings, or it is damaged "
            f"({(str(error).splitlines() or [''])[-1][:200]}). Build it again."
        ) from error
    return index


@torch.no_grad()
def same_rows(index: Any, gallery: Array, metric: str) -> bool | None:
    """Whether an index has exactly a gallery's rows, in order; None where it keeps them in a smaller form, or others
    than :func:`faiss_index` makes."""
    faiss = _faiss()
    compared = Comparison(gallery[:0], gallery, metric)
    G, D = compared.sizes[1], compared.sides[1].shape[1]
    if (index.ntotal, index.d) != (G, D) or _metric_of(index) != metric:
        return False
    inner = faiss.downcast_index(index.index) if hasattr(index, "chain") else index
    if not isinstance(inner, (faiss.IndexFlat, faiss.IndexHNSWFlat, faiss.IndexIVFFlat)):
        return None
    for start in range(0, G, _ROWS):
        want = _vectors(compared, 1, slice(start, start + _ROWS))
        norms = np.linalg.norm(want, axis=1, keepdims=True)
        if metric == "cosine":
            want, norms = want / np.where(norms, norms, 1), np.ones_like(norms)
        if (np.abs(inner.reconstruct_n(start, len(want)) - want) > 1e-5 * norms).any():
            return False
    return True


def _metric_of(index: Any) -> str:
    faiss = _faiss()
    if isinstance(index, faiss.IndexPreTransform):
        kinds = [faiss.downcast_VectorTransform(index.chain.at(i)) for i in range(index.chain.size())]
        if len(kinds) == 1 and isinstance(kinds[0], faiss.NormalizationTransform):
            return METRICS[0]
        raise ValueError("it transforms embeddings in another way than by normalising them")
    if not isinstance(index, faiss.Index) or index.metric_type not in (faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT):
        raise ValueError("it compares neither by inner product nor by Euclidean distance")
    return METRICS[1] if index.metric_type == faiss.METRIC_L2 else METRICS[2]


def _check_powers(compared: Comparison) -> None:
    if compared.metric != "cosine" and compared.powers is not None:
        raise ValueError(
            "FAISS squares embeddings in float32, and some of these are beyond 1e15 or below 1e-15: divide them by "
            "their typical length, or compare them by cosine."
        )


def _vectors(compared: Comparison, side: int, rows: slice) -> np.ndarray:
    return compared.part(side, rows).vectors.cpu().contiguous().numpy()


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("FAISS is not installed: pip install 'temporal-agg[faiss]'.") from error
    return faiss
