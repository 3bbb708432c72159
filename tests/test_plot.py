"""The figures' content, read back from matplotlib's objects; their looks were checked by eye."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from temporal_agg import Tracklet, evaluate, plot
from temporal_agg.retrieval.evaluate import ranked_gallery


def tracklet(pid, camera):
    return Tracklet([np.full((8, 4, 3), 10 * (pid + 1) + camera, np.uint8)] * 3, pid, camera, f"{pid}/{camera}")


def test_cmc_draws_each_curve_in_per_cent():
    figure = plot.cmc({"one": [0.5, 0.75, 1.0], "two": np.array([0.25, 0.5])}, "title")
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["one", "two"]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 50], [2, 75], [3, 100]])


def test_ranked_lists_show_what_an_evaluation_counts():
    gallery = [tracklet(1, 1), tracklet(1, 2), tracklet(2, 1), tracklet(-1, 2), tracklet(3, 2)]
    queries = [tracklet(1, 1), tracklet(2, 2)]
    distances = np.array([[0.0, 0.3, 0.2, 0.1, 0.9], [0.5, 0.4, 0.1, 0.0, 0.2]])
    figure = plot.ranked_lists(distances, queries, gallery, [1, 0], query_index=[0, -1], ranks=4)
    grid = np.array(figure.axes).reshape(2, 5)
    shown = [[axes.images[0].get_array()[0, 0, 0] for axes in row if axes.images] for row in grid]
    assert shown == [[32, 31, 42, 22, 21], [21, 31, 22, 42]]  # the query, then its list without junk and its own camera
    colours = [[to_hex(axes.spines["left"].get_edgecolor()) for axes in row if axes.images][1:] for row in grid]
    assert colours == [[plot.HIT, plot.WRONG, plot.WRONG, plot.WRONG], [plot.WRONG, plot.HIT, plot.WRONG]]


@pytest.mark.parametrize("seed", range(20))
def test_the_ranked_list_is_the_one_that_is_evaluated(seed):
    rng = np.random.default_rng(seed)
    distances = rng.integers(0, 6, 12) / 4
    pids, cams = rng.integers(-1, 4, 12), rng.integers(-1, 3, 12)
    pid, camera = int(rng.integers(0, 4)), int(rng.integers(-1, 3))
    own = int(rng.choice([-1, *np.flatnonzero(pids == pid)]))
    order = ranked_gallery(distances, pid, camera, pids, cams, own)
    hits = np.flatnonzero(pids[order] == pid)
    want = evaluate(distances[None], [pid], [camera], pids, cams, query_index=[own])
    assert want.queries_without_match == (len(hits) == 0)
    if len(hits):
        assert want.map == pytest.approx(np.mean((1 + np.arange(len(hits))) / (1 + hits)))


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install temporal-agg\[plot\]"):
        plot.cmc({"one": [1.0]})
