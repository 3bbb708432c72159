"""Figures of results. They need matplotlib (``pip install temporal-agg[plot]``)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .data import Tracklet
from .retrieval.evaluate import ranked_gallery

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["cmc", "ranked_lists"]

HIT, WRONG, QUERY = "#1a9850", "#d73027", "#4d4d4d"


def _figure(**options) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install temporal-agg[plot]") from error
    return Figure(layout="constrained", **options)


def cmc(curves: Mapping[str, Sequence[float] | np.ndarray], title: str = "") -> "Figure":
    """Draws cumulative matching characteristics.

    Args:
        curves: the label of each curve, and its values by rank, as fractions (``RetrievalMetrics.cmc``).
        title: above the axes.

    Raises:
        ImportError: no matplotlib.
    """
    figure = _figure(figsize=(5, 3.5))
    axes = figure.subplots()
    longest = 1
    for label, curve in curves.items():
        longest = max(longest, len(curve))
        axes.plot(range(1, len(curve) + 1), 100 * np.asarray(curve), marker="o", markersize=3, label=label)
    axes.set(xlabel="rank", ylabel="queries with a match up to this rank, %", title=title)
    axes.set_xticks([rank for rank in (1, 5, 10, 15, 20, 30, 40, 50) if rank <= longest])
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def ranked_lists(
    distances: np.ndarray,
    queries: Sequence[Tracklet],
    gallery: Sequence[Tracklet],
    rows: Sequence[int],
    *,
    query_index: Sequence[int] | None = None,
    ranks: int = 10,
    titles: Sequence[str] | None = None,
) -> "Figure":
    """Draws what some queries found: the middle frame of each tracklet, matches framed green and wrong ones red.

    What an evaluation ignores (junk, the query itself, the same person in the same camera) is left out.

    Args:
        distances: ``[Q, G]``.
        queries: the Q query tracklets.
        gallery: the G gallery tracklets.
        rows: the queries to draw, one in a row.
        query_index: as in :func:`temporal_agg.evaluate`.
        ranks: how many of the list to draw.
        titles: one for each of ``rows``; None = the query's name.

    Raises:
        ImportError: no matplotlib.
    """
    figure = _figure(figsize=(0.75 * (ranks + 1) + 0.3, 1.75 * len(rows)))
    grid = figure.subplots(len(rows), ranks + 1, squeeze=False)
    pids, cams = (np.array([getattr(t, key) for t in gallery]) for key in ("pid", "camera"))
    for axes, q, i in zip(grid, rows, range(len(rows)), strict=True):
        query = queries[q]
        own = -1 if query_index is None else query_index[q]
        order = ranked_gallery(np.asarray(distances[q]), query.pid, query.camera, pids, cams, own)[:ranks]
        _draw(axes[0], query, QUERY)
        axes[0].set_title(titles[i] if titles else query.name, fontsize=6)
        for rank, (place, g) in enumerate(zip(axes[1:], order, strict=False), 1):
            _draw(place, gallery[g], HIT if pids[g] == query.pid else WRONG)
            place.set_title(f"{rank}: {distances[q][g]:.3f}", fontsize=6)
        for place in axes[1 + len(order) :]:
            place.axis("off")
    return figure


def _draw(axes, tracklet: Tracklet, colour: str) -> None:
    (frame,) = tracklet.load([len(tracklet) // 2])
    axes.imshow(frame.permute(1, 2, 0).numpy(), aspect="equal")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2.5)
