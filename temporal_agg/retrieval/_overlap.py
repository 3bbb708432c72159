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
    known = np.unique(np.frombuffer(b"".join(queries), "<u8"))
    q, q_code, q_size = _frames(queries, known)
    g, g_code, g_size = _frames(gallery, known)
    common = np.bincount(g_code, minlength=len(known)) > COMMON
    q, q_code = (x[~common[q_code]] for x in (q, q_code))
    g, g_code = (x[~common[g_code]] for x in (g, g_code))

    order = q_code.argsort(kind="stable")
    q, q_code = q[order], q_code[order]
    first, last = (np.searchsorted(q_code, g_code, side) for side in ("left", "right"))
    count = last - first  # of queries, for each frame of the gallery
    start = np.repeat(first - (count.cumsum() - count), count)
    pairs, shared = np.unique(q[start + np.arange(len(start))] * len(gallery) + np.repeat(g, count), return_counts=True)
    rows, columns = np.divmod(pairs, max(len(gallery), 1))
    return rows, columns, shared / np.minimum(q_size[rows], g_size[columns])


def _frames(marks: Sequence[bytes], known: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The frames that are known and come once in their tracklet: owner and place in ``known``; all frames' number."""
    size = np.array([len(mark) // 8 for mark in marks], np.int64)
    flat, ends = np.frombuffer(b"".join(marks), "<u8"), size.cumsum()
    found = []
    for start in range(0, len(flat) if len(known) else 0, PIECE):
        piece = flat[start : start + PIECE]
        # Where the known ones are more than a cache holds, looking up in order is ten times as fast.
        order = piece.argsort() if len(known) > MANY else np.arange(len(piece))
        piece = piece[order]
        code = np.searchsorted(known, piece).clip(max=len(known) - 1)
        hit = known[code] == piece
        found.append(np.searchsorted(ends, order[hit] + start, "right") * len(known) + code[hit])
    keys, times = np.unique(np.concatenate([np.empty(0, np.int64), *found]), return_counts=True)
    owner, code = np.divmod(keys[times == 1], max(len(known), 1))
    return owner, code, size
