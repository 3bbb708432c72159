"""Which tracklets have frames in common, told by a hash of each frame's file."""

from collections.abc import Sequence

import numpy as np

COMMON = 100  # gallery tracklets that may share a frame; one that more have, such as a black one, tells nothing
MANY = 2**18  # frames of the queries
PIECE = 2**20  # frames of the gallery looked up at once


def overlaps(queries: Sequence[bytes], gallery: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of a query and a gallery tracklet that have frames in common.

    A frame that comes twice in one tracklet tells nothing, nor does one that more than ``COMMON`` tracklets have.

    Args:
        queries: ``Embeddings.marks``, 8 bytes a frame.
        gallery: the same.

    Returns:
        Rows of the queries and of the gallery, int64 ``[n]`` each, in order; and which part of the frames of the
        shorter of both is in the other, float64 ``[n]``.
    """
    known, _ = _counted(np.frombuffer(b"".join(queries), "<u8"))
    q, q_code, q_size = _frames(queries, known)
    g, g_code, g_size = _frames(gallery, known)
    common = np.bincount(g_code, minlength=len(known)) > COMMON
    g, g_code = (x[~common[g_code]] for x in (g, g_code))

    number = np.bincount(q_code, minlength=len(known))  # of queries that have a frame; they stand side by side in q
    first, count = (number.cumsum() - number)[g_code], number[g_code]
    start = np.repeat(first - (count.cumsum() - count), count)
    pairs, shared = _counted(q[start + np.arange(len(start))] * len(gallery) + np.repeat(g, count))
    rows, columns = np.divmod(pairs, max(len(gallery), 1))
    return rows, columns, shared / np.minimum(q_size[rows], g_size[columns])


def _frames(marks: Sequence[bytes], known: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The frames that are known and come once in their tracklet, by their place in ``known``: owner and that place; all
    frames' number."""
    size = np.array([len(mark) // 8 for mark in marks], np.int64)
    flat, owner = np.frombuffer(b"".join(marks), "<u8"), np.repeat(np.arange(len(size)), size)
    found = [np.empty(0, np.int64)]
    for start in range(0, len(flat) if len(known) else 0, PIECE):
        piece = flat[start : start + PIECE]
        # Where the known ones are more than a cache holds, looking up in order is ten times as fast.
        order = piece.argsort() if len(known) > MANY else np.arange(len(piece))
        piece = piece[order]
        code = np.searchsorted(known, piece).clip(max=len(known) - 1)
        hit = known[code] == piece
        found.append(code[hit] * len(marks) + owner[start:][order[hit]])
    keys, times = _counted(np.concatenate(found))
    code, by = np.divmod(keys[times == 1], max(len(marks), 1))
    return by, code, size


def _counted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values in order, and how often each comes. numpy's ``unique`` hashes them since 2.3, which takes ten
    times as long where most are distinct."""
    values = np.sort(values)
    first = np.flatnonzero(np.append(True, values[1:] != values[:-1])[: len(values)])
    return values[first], np.diff(first, append=len(values))
