"""The figures' content, read back from matplotlib's objects; their looks were checked by eye."""

import itertools
import re
from typing import ClassVar

import numpy as np
import pytest
import torch
from helpers import small
from matplotlib.colors import to_hex
from torch import nn

import temporal_agg
from temporal_agg import (
    Aggregator,
    ClipConfig,
    Details,
    MapKind,
    Tracklet,
    TrackletModel,
    create_aggregator,
    evaluate,
    plot,
)
from temporal_agg.aggregators.base import AXES, VALUES
from temporal_agg.retrieval.evaluate import ranked_gallery

C = 8
SIZE = (16, 8)
T, REAL = 5, [0, 1, 3, 4]  # of the clips of details made by hand, which have a hole
LENGTHS = {"frames": T, "sources": T, "height": 4, "width": 2, "regions": 3, "parts": 6, "directions": 2, "features": 7}


class Encoder(nn.Module):
    """Maps of 8 channels, of 8 x 4 pixels."""

    num_features = C
    uses_flow = False

    def __init__(self):
        super().__init__()
        self.data_config = {"input_size": (3, *SIZE), "mean": (0,) * 3, "std": (1,) * 3, "interpolation": "bilinear"}
        self.conv = nn.Conv2d(3, C, 3, stride=2, padding=1)

    def forward(self, frames, flow=None):
        return self.conv(frames) if flow is None else self.conv(frames) + flow.mean()


def model(name, clip=None, **options):
    torch.manual_seed(0)
    aggregator = create_aggregator(name, C, **{**small(name), **options})
    with torch.no_grad():
        for p in aggregator.parameters():
            p += 0.1 * torch.randn(p.shape)
    return TrackletModel(Encoder(), aggregator, clip)


def walk(length, flow=None):
    """A tracklet whose frame i has the colour (i, 100, 255 - i) above and noise below."""
    frames = np.random.default_rng(0).integers(0, 256, (length, *SIZE, 3), np.uint8)
    for i, frame in enumerate(frames):
        frame[:8] = i, 100, 255 - i
    return Tracklet(list(frames), 1, 1, "walk", flow)


def pictures(figure):
    """Which frames of the walk are drawn at the top, in order."""
    return [int(image.get_array()[0, 0, 0]) for image in figure.axes[0].images]


def headings(figure):
    return [axes.texts[0].get_text().replace("\n", " ") for axes in figure.axes if not axes.axison]


def panels(figure):
    """The maps: of each axes that have some, the arrays of the images, without frames and colour bars."""
    found = []
    for axes in figure.axes:
        arrays = [image.get_array() for image in axes.images]
        maps = [array.filled(np.nan) for array in arrays if array.ndim == 2 and array.shape != (256, 1)]
        if maps:
            found.append(np.array(maps))
    return found


def labelled(figure, label):
    """The axes with this label at the left."""
    (axes,) = (axes for axes in figure.axes if axes.get_ylabel() == label)
    return axes


def faults(figure):
    """What runs over the edges of the page, and headings that something runs over."""
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    off = [b for b in boxes if min(b.x0, b.y0) < -0.5 or b.x1 > width + 0.5 or b.y1 > height + 0.5]
    texts = [axes.texts[0].get_window_extent() for axes in figure.axes if not axes.axison]
    others = [box for axes, box in zip(figure.axes, boxes, strict=True) if axes.axison]
    return off + [text for text in texts for box in others if text.shrunk(0.98, 0.98).overlaps(box)]


def bars(figure):
    return {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in labelled(figure, "weight").patches}


def details_of(model, tracklet):
    """Of all frames of a walk as one clip."""
    frames = torch.stack(tracklet.load(range(len(tracklet)))).float() / 255
    features = model.eval().encode_frames(frames)[None]
    with torch.no_grad():
        return model.aggregator.inspect(features, frames=frames[None])


def drawn(kind, values, **options):
    """The figure of one map ``[T, ...]`` of a clip with a hole."""
    mask = torch.zeros(1, T, dtype=torch.bool)
    mask[0, REAL] = True
    details = Details(torch.zeros(1, C), mask, mask / len(REAL), {"it": torch.as_tensor(values)[None]}, {})
    return plot.maps(details, walk(T), ["it"], kinds={"it": kind}, **options)


def values_of(axes, seed=0):
    return np.random.default_rng(seed).random([LENGTHS[axis] for axis in axes], np.float32)


def tracklet(pid, camera):
    return Tracklet([np.full((8, 4, 3), 10 * (pid + 1) + camera, np.uint8)] * 3, pid, camera, f"{pid}/{camera}")


def test_cmc_draws_each_curve_in_per_cent():
    figure = plot.cmc({"one": [0.5, 0.75, 1.0], "two": np.array([0.25, 0.5])}, "title")
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["one", "two"]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 50], [2, 75], [3, 100]])


def test_every_name_can_be_drawn(tmp_path):
    """Of a folder whose name is no text, or looks like a formula."""
    name = "caf\udce9 $_a$ and $b"
    figure = plot.cmc({name: [0.5]}, name)
    figure.savefig(tmp_path / "a.png")
    assert figure.axes[0].get_title() == r"caf\udce9 \$_a\$ and \$b"
    query = Tracklet([np.zeros((8, 4, 3), np.uint8)], 1, 1, name)
    plot.ranked_lists(np.zeros((1, 1)), [query], [tracklet(1, 2)], [0]).savefig(tmp_path / "b.png")


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


def test_a_long_name_fits_beside_its_query():
    long = Tracklet([np.zeros((8, 4, 3), np.uint8)], 1, 1, "query/0001/camera 1/a tracklet of the afternoon_0001")
    figure = plot.ranked_lists(np.zeros((2, 3)), [long] * 2, [tracklet(2, 2)] * 3, [0, 1], ranks=3)
    assert faults(figure) == []
    grid = np.array(figure.axes).reshape(2, 4)
    labels = [axes.yaxis.label for axes in grid[:, 0]]
    assert ["".join(label.get_text().split()) for label in labels] == ["".join(long.name.split())] * 2
    above, below = (label.get_window_extent() for label in labels)
    assert above.y0 > below.y1
    assert above.x1 <= grid[0, 0].get_window_extent().x0


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


@pytest.mark.parametrize("name", temporal_agg.list_aggregators())
def test_frame_weights_are_those_of_the_embedding(name):
    m = model(name, ClipConfig(length=4, fill="mask") if name != "loga" else None)
    walking = walk(10)
    drawn = bars(plot.frame_weights(m, walking))
    assert list(drawn) == list(range(10))
    assert sum(drawn.values()) == pytest.approx(1)
    if name in ("mean", "lstm"):  # uniform in each of the clips 0-3, 4-7, 8-9
        assert list(drawn.values()) == pytest.approx([1 / 12] * 8 + [1 / 6] * 2)
    if name == "attention":
        vectors = m.encode_frames(torch.stack(walking.load(range(10))) / 255).mean((2, 3))
        scores = m.aggregator.score(vectors).detach().flatten().split(4)
        assert list(drawn.values()) == pytest.approx([float(w) / 3 for part in scores for w in part.softmax(0)])


def test_frames_that_no_clip_has_get_no_bar():
    clip = ClipConfig(length=4, test_sampling="even", fill="repeat")
    figure = plot.frame_weights(model("mean", clip), walk(40))
    assert bars(figure) == pytest.approx({5: 0.25, 15: 0.25, 25: 0.25, 35: 0.25})
    assert pictures(figure) == [5, 15, 25, 35]


def test_a_repeated_frame_gets_the_sum():
    clip = ClipConfig(length=5, fill="repeat")
    assert bars(plot.frame_weights(model("mean", clip), walk(3))) == pytest.approx({0: 0.4, 1: 0.4, 2: 0.2})


def test_one_clip_alone():
    clip = ClipConfig(length=4, fill="mask")
    figure = plot.frame_weights(model("mean", clip), walk(10), clip=2)
    assert bars(figure) == pytest.approx({8: 0.5, 9: 0.5})
    assert pictures(figure) == [8, 9]


def test_titles_and_colours_say_which_frames_are_shown():
    clip = ClipConfig(length=3, test_sampling="all")
    figure = plot.frame_weights(model("attention", clip), walk(30), shown=4)
    weights = bars(figure)
    shown = pictures(figure)
    titles = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert titles == [f"{i}\n{weights[i]:.3f}" for i in shown]
    axes = labelled(figure, "weight")
    assert [i for i, bar in enumerate(axes.patches) if to_hex(bar.get_facecolor()) == plot.SHOWN] == shown
    assert axes.lines[0].get_ydata() == pytest.approx([1 / 30, 1 / 30])


@pytest.mark.parametrize(("heaviest", "shown"), [(0, [0, 10, 19, 29]), (16, [0, 10, 16, 29]), (28, [0, 10, 19, 28])])
def test_the_frame_that_counts_most_is_shown(heaviest, shown):
    weights = torch.full((1, 30), 0.01)
    weights[0, heaviest] = 0.71
    details = Details(torch.zeros(1, C), torch.ones(1, 30, dtype=torch.bool), weights, {}, {})
    for figure in (plot.frame_weights, plot.maps):
        assert pictures(figure(details, walk(30), shown=4)) == shown


def test_details_and_padding():
    """Tensors of somebody else's loop: what the mask leaves out is nowhere in the figures."""
    m, walking = model("gltr"), walk(6)
    mask = torch.tensor([[True] * 6, [False, True, True, False, True, False]])
    frames = torch.stack(walking.load(range(6)))
    details = m.eval()((frames / 255).expand(2, -1, -1, -1, -1), mask, return_details=True)
    figure = plot.frame_weights(details, list(frames), clip=1)
    assert pictures(figure) == [1, 2, 4]
    assert bars(figure) == pytest.approx({i: details.frame_weights[1, i].item() for i in (1, 2, 4)})
    figure = plot.maps(details, walking, kinds=m.aggregator.maps, clip=1)  # without the finer ones
    assert pictures(figure) == [1, 2, 4]
    (matrix,) = panels(figure)
    keep = torch.tensor([1, 2, 4])
    want = details.maps["tsa"][1][keep][:, keep].detach()
    np.testing.assert_allclose(2 ** matrix[0] / 3, want.clip(1 / 12, 4 / 3), rtol=1e-5)  # the scale ends there
    axes = labelled(figure, "from frame")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "4"]


@pytest.mark.slow
def test_maps_of_any_axes_are_drawn():
    singles = [axes for n in (1, 2) for axes in itertools.combinations(AXES[::-1], n)]
    more = [axes for n in (3, 4) for axes in itertools.combinations(AXES, n)]
    kinds = {
        str(axes): MapKind(axes, VALUES[i % 4], "it", axes[0] if i % 4 == 1 else None) for i, axes in enumerate(singles)
    }
    kinds |= {str(axes): MapKind(axes, "unit", "it") for axes in more[::9]}
    maps = {name: torch.from_numpy(values_of(kind.axes))[None] for name, kind in kinds.items()}
    details = Details(torch.zeros(1, C), torch.ones(1, T, dtype=torch.bool), torch.full((1, T), 1 / T), maps, {})
    figure = plot.maps(details, walk(T), list(maps), kinds=kinds)
    assert len(panels(figure)) >= len(maps) - 1  # ("frames",) is drawn by bars


@pytest.mark.parametrize("axes", list(itertools.permutations(("frames", "height", "width"))))
def test_space_lies_over_the_frames(axes):
    x = values_of(axes)
    figure = drawn(MapKind(axes, "unit", "it"), x)
    assert pictures(figure) == REAL
    want = x.transpose([axes.index(axis) for axis in ("frames", "height", "width")])
    (panel,) = panels(figure)
    np.testing.assert_array_equal(panel, want[REAL])
    over = figure.axes[-1]
    assert [image.get_extent() for image in over.images[:4]] == [image.get_extent() for image in over.images[4:]]
    assert [image.get_extent() for image in over.images[:4]] == [i.get_extent() for i in figure.axes[0].images]


def test_other_axes_have_rows():
    x = values_of(("directions", "frames", "height", "width"))
    figure = drawn(MapKind(("directions", "frames", "height", "width"), "unit", "it"), x)
    for i, name in enumerate(("forward", "backward")):
        maps = [image.get_array() for image in labelled(figure, name).images[4:]]
        np.testing.assert_array_equal(maps, x[i][REAL])
    x = values_of(("frames", "height", "width", "regions"))
    figure = drawn(MapKind(("frames", "height", "width", "regions"), "unit", "it"), x)
    for i in range(3):
        axes = labelled(figure, f"region {i + 1}")
        np.testing.assert_array_equal([image.get_array() for image in axes.images[4:]], x[REAL][..., i])
        (stripe,) = axes.lines  # framed where the region stands in the first frame, from top to bottom
        _, _, low, high = axes.images[0].get_extent()
        ends = [high - (high - low) * k / 3 for k in (i + 1, i)]
        np.testing.assert_allclose(sorted(set(stripe.get_ydata())), ends)


def test_many_rows_are_a_choice_that_is_told():
    figure = drawn(MapKind(("frames", "features", "height", "width"), "unit", "it"), np.zeros((T, 40, 4, 2)))
    assert len(panels(figure)) == plot.ROWS
    assert headings(figure)[0].endswith("(8 of 40 drawn)")


@pytest.mark.parametrize("axes", [("frames", "sources"), ("sources", "frames")])
def test_a_matrix_has_its_sources_in_rows(axes):
    x = values_of(axes)
    figure = drawn(MapKind(axes, "unit", "it"), x)
    (panel,) = panels(figure)
    want = x if axes[0] == "sources" else x.T
    np.testing.assert_array_equal(panel[0], want[REAL][:, REAL])
    matrix = labelled(figure, "from frame")
    assert matrix.get_xlabel() == "to frame"
    assert matrix.images[0].origin == "upper"
    figure.draw_without_rendering()
    rows = [axes for axes in figure.axes[1:] if any(image.get_array().ndim == 3 for image in axes.images)]
    assert [int(axes.images[0].get_array()[0, 0, 0]) for axes in rows] == REAL  # each beside its row
    middles = [(axes.bbox.y0 + axes.bbox.y1) / 2 for axes in rows]
    np.testing.assert_allclose(middles, [matrix.transData.transform((0, i))[1] for i in range(4)], atol=0.5)


@pytest.mark.parametrize(("grid", "parts"), [((16, 8), 12), ((16, 8), 16), ((5, 3), 15), ((2, 2), 6)])
def test_parts_lie_in_reading_order(grid, parts):
    x = np.random.default_rng(0).random((3, parts))
    got = plot._laid_out(x, grid)
    pixels = grid[0] * grid[1]
    for t, row, column in itertools.product(range(3), *map(range, grid)):
        i = row * grid[1] + column
        part = i // (pixels // parts) if parts <= pixels else i * parts // pixels
        np.testing.assert_equal(got[t, row, column], x[t, part] if part < parts else np.nan)


def test_parts_lie_over_the_frames_and_what_is_left_is_grey():
    x = np.random.default_rng(0).random((T, 12), np.float32)
    figure = drawn(MapKind(("frames", "parts"), "signed", "it"), x)
    (panel,) = panels(figure)
    np.testing.assert_array_equal(panel, plot._laid_out(x[REAL], SIZE))
    assert np.isnan(panel[:, -1]).any()
    assert to_hex(figure.axes[-1].images[-1].to_rgba(np.ma.masked_all(1))[0]) == "#808080"


@pytest.mark.parametrize("axes", [("frames", "regions"), ("regions", "frames")])
def test_regions_are_stripes_and_curves(axes):
    x = values_of(axes)
    figure = drawn(MapKind(axes, "amount", "it"), x)
    curves = (x if axes[0] == "frames" else x.T)[REAL]
    (panel,) = panels(figure)
    np.testing.assert_array_equal(panel, curves[..., None])
    lines = [line.get_ydata() for line in figure.axes[-1].lines]
    np.testing.assert_array_equal(lines, curves.T)
    assert [text.get_text() for text in figure.axes[-1].get_legend().texts] == ["region 1", "region 2", "region 3"]


def test_features_over_time_have_their_first_principal_component():
    x = values_of(("frames", "features")) - 0.5
    figure = drawn(MapKind(("frames", "features"), "signed", "it"), x)
    image, strip = panels(figure)
    np.testing.assert_array_equal(image[0], x[REAL].T)
    centred = x[REAL] - x[REAL].mean(0)
    U, S, _ = np.linalg.svd(centred.astype(float), full_matrices=False)
    want = U[:, 0] * S[0] / np.linalg.norm(x[REAL], axis=1).mean()
    np.testing.assert_allclose(abs(strip[0, 0]), abs(want), rtol=1e-4)
    assert figure.axes[-1].images[0].get_clim() == (-1, 1)
    assert f"PC 1, {100 * S[0] ** 2 / (S**2).sum():.0f} %" in figure.axes[-1].get_ylabel().replace("\n", " ")


def test_weights_of_frames_stand_side_by_side():
    m = model("loga", clip_length=4)
    figure = plot.maps(m, walk(4))
    details = details_of(m, walk(4))
    (axes,) = (axes for axes in figure.axes if axes.patches)
    for group, want in zip(
        axes.containers, (details.frame_weights, details.maps["laq"], details.maps["gcq"]), strict=True
    ):
        np.testing.assert_allclose([bar.get_height() for bar in group], want[0], rtol=1e-5)
    labels = [text.get_text().replace("\n", " ") for text in axes.get_legend().texts]
    assert labels == ["frame weights", "LAQ's w_l (Eq. 6)", "GCQ's w_g (Eq. 7)"]
    assert axes.lines[0].get_ydata() == pytest.approx([1 / 4, 1 / 4])


@pytest.mark.parametrize(
    ("kind", "values", "limits", "says"),
    [
        ("unit", [0.1, 0.2, 0.2, 0.9], (0, 1), "0.1 to 0.9"),
        ("unit", [0.49, 0.5, 0.51, 0.5], (0, 1), "no structure, 0.5 to within 0.01"),
        ("signed", [-0.5, 0.1, 0.2, 0.2], (-0.5, 0.5), "-0.5 to 0.2"),
        ("signed", [-3e-9, 2e-9, 1e-9, 0], (-1, 1), "no structure"),
        ("signed", [2.0, 2.01, 2.02, 2.0], (-2.02, 2.02), "no structure, 2 to within 0.01"),
        ("amount", [1.0, 4.0, 2.0, 3.0], (0, 4), "1 to 4"),
        ("amount", [0.0, 0.0, 0.0, 0.0], (0, 1), "no structure, 0 to within 0"),
        ("share", [0.7, 0.1, 0.1, 0.1], (-2, 2), "0.40 to 2.80 times uniform"),
        ("share", [0.26, 0.24, 0.25, 0.25], (-2, 2), "uniform to within 4 %"),
    ],
)
def test_a_colour_means_the_same_and_noise_is_called_noise(kind, values, limits, says):
    maps = np.zeros((T, 4, 2), np.float32)
    maps[REAL] = np.array(values)[:, None, None]
    figure = drawn(MapKind(("frames", "height", "width"), kind, "it", "frames" if kind == "share" else None), maps)
    assert headings(figure)[0].startswith(f"it: {says}")
    (image, *_) = figure.axes[-1].images[4:]
    assert image.get_clim() == pytest.approx(limits)
    (bar,) = (axes for axes in figure.axes if axes.images and axes.images[0].get_array().shape == (256, 1))
    assert bar.images[0].get_extent()[2:] == pytest.approx(limits)
    assert bar.images[0].get_cmap().name == image.get_cmap().name
    if kind == "share":  # double and half are as far from the middle; beyond a quarter and four times is all one
        np.testing.assert_allclose(
            panels(figure)[0][:, 0, 0], np.log2(np.clip(4 * np.array(values), 1 / 4, 4)), atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize(
    "name", ["mean", *(n for n in temporal_agg.list_aggregators() if create_aggregator(n, C).maps)]
)
@pytest.mark.filterwarnings("error::UserWarning")  # what does not fit is told by a warning
def test_any_length_fits_the_page(name, length):
    m = model(name, ClipConfig(test_sampling="all") if name != "loga" else None)
    # The other figure is the same for every aggregator.
    weights = [plot.frame_weights(m, walk(length), shown=5)] if name == "mean" else []
    for figure in (plot.maps(m, walk(length), shown=5), *weights):
        assert faults(figure) == []
        assert len(set(pictures(figure))) == min(length, 5)
        assert figure.get_figwidth() <= 7


@pytest.mark.parametrize("options", [{}, {"directions": ["backward", "forward"]}, {"directions": ["backward"]}])
def test_the_memory_of_grl_has_a_row_for_each_direction(options):
    m, walking = model("grl", ClipConfig(test_sampling="all"), **options), walk(4)
    figure = plot.maps(m, walking, ["memory"])
    memory = details_of(m, walking).maps["memory"][0]
    np.testing.assert_allclose(np.array(panels(figure)).reshape(memory.shape), memory, rtol=1e-4, atol=1e-6)
    if "directions" not in options:
        assert [axes.get_ylabel() for axes in figure.axes if len(axes.images) == 8] == ["forward", "backward"]


def test_names_choose_the_maps_and_their_order():
    m = model("gltr", ClipConfig(test_sampling="all"))
    assert [text.split(":")[0] for text in headings(plot.maps(m, walk(3), ["mean", "tsa"]))] == [
        "f, their mean (Eq. 4)",
        "TSA's mask M (Eq. 3)",
    ]
    assert len(headings(plot.maps(m, walk(3)))) == 1 + len(m.aggregator.maps)


def test_repeated_frames_are_drawn_as_often_as_they_are_read():
    figure = plot.maps(model("mean", ClipConfig(length=5, fill="repeat")), walk(3))
    assert pictures(figure) == [0, 1, 2, 0, 1]
    (axes,) = (axes for axes in figure.axes if axes.patches)
    assert [round(bar.get_x() + bar.get_width() / 2) for bar in axes.patches] == [0, 1, 2, 3, 4]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "0", "1"]


def test_the_map_of_a_stranger_is_drawn():
    class Stranger(Aggregator):
        maps: ClassVar = {"edges": MapKind(("frames", "height", "width"), "amount", "edges")}
        needs_maps = True

        def __init__(self):
            super().__init__(C, C)

        def aggregate(self, features, mask, frames):
            weights = mask / mask.sum(1, keepdim=True)
            return Details((features.mean((3, 4)) * weights[..., None]).sum(1), mask, weights, {}, {})

        def finer_maps(self, features, mask, frames, details):
            return {"edges": features.abs().mean(2)}

    m = TrackletModel(Encoder(), Stranger(), ClipConfig(test_sampling="all"))
    features = m.encode_frames(torch.stack(walk(3).load(range(3))) / 255)
    (panel,) = panels(plot.maps(m, walk(3)))
    np.testing.assert_allclose(panel, features.abs().mean(1).detach(), rtol=1e-5)


def test_the_model_keeps_its_mode_and_gradients_stay_out():
    m = model("gltr").train()
    m.aggregator.embed.eval()
    before = {key: value.clone() for key, value in m.state_dict().items()}
    plot.maps(m, walk(3))
    assert m.training
    assert not m.aggregator.embed.training
    assert all(torch.equal(value, before[key]) for key, value in m.state_dict().items())


def test_optical_flow_reaches_the_encoder():
    m = model("attention", ClipConfig(test_sampling="all"))
    m.encoder.uses_flow = True
    flow = [np.full((2, *SIZE), i, np.float32) for i in range(3)]
    seen = []
    m.encoder.register_forward_hook(lambda module, args, output: seen.append(args[1]))
    plot.frame_weights(m, walk(3, flow))
    torch.testing.assert_close(seen[0], torch.from_numpy(np.stack(flow)))
    with pytest.raises(temporal_agg.data.FlowError, match="flow"):
        plot.frame_weights(m, walk(3))


def distances(points):
    return torch.cdist(torch.as_tensor(points), torch.as_tensor(points)).numpy()


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (2, 3), (3, 2), (4, 1), (1, 4)])
def test_points_of_a_plane_keep_their_distances(shape):
    n, d = shape
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(n, min(2, d), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(d, min(2, d), generator=generator, dtype=torch.float64)).Q
    figure = plot.embedding_map(plane @ basis.T + 7, list(range(n)))
    drawn = np.concatenate([points.get_offsets() for points in figure.axes[0].collections])
    np.testing.assert_allclose(distances(drawn), distances(plane), atol=1e-6)
    assert np.ptp(drawn[:, 0]) >= np.ptp(drawn[:, 1]) or n > 2


def test_the_axes_say_how_much_they_show():
    x = np.zeros((4, 3))
    x[:, 0] = 3, -3, 0, 0  # of the variance 18, 8 and 0 of 26
    x[:, 2] = 0, 0, 2, -2
    axes = plot.embedding_map(x, [0] * 4).axes[0]
    assert axes.get_xlabel() == "component 1, 69 % of the variance"
    assert axes.get_ylabel() == "component 2, 31 % of the variance"


def test_identities_differ_in_colour_or_marker():
    pids = [-1, *range(37), -1, 5]
    axes = plot.embedding_map(np.random.default_rng(0).normal(size=(40, 4)), pids).axes[0]
    looks = {(to_hex(p.get_facecolor()[0]), p.get_paths()[0].vertices.tobytes()) for p in axes.collections}
    assert len(looks) == 38
    assert {p.get_label(): len(p.get_offsets()) for p in axes.collections} == {
        **{str(pid): 2 if pid == 5 else 1 for pid in range(37)},
        "junk": 2,
    }


def test_a_model_embeds_its_tracklets_for_the_map():
    m, walks = model("mean"), [walk(length) for length in (1, 3, 5, 8)]
    x = nn.functional.normalize(temporal_agg.embed_tracklets(m, walks, progress=False))
    figures = plot.embedding_map(m, walks), plot.embedding_map(x, [1] * 4)
    got, want = (figure.axes[0].collections[0].get_offsets() for figure in figures)
    np.testing.assert_allclose(distances(got), distances(want), atol=1e-6)


def test_what_cannot_be_drawn():
    m, walking = model("gltr"), walk(3)
    details = details_of(m, walking)
    with pytest.raises(TypeError, match=r"got GLTR. An aggregator alone sees no images"):
        plot.frame_weights(m.aggregator, walking)
    with pytest.raises(ValueError, match="clips of 3 frames, padding included; got 2 frames"):
        plot.maps(details, walk(2), kinds=m.aggregator.maps)
    for clip in (-1, 1):
        with pytest.raises(ValueError, match=f"there are 1 clips: clip must be 0 to 0, got {clip}"):
            plot.maps(m, walking, clip=clip)
    with pytest.raises(ValueError, match="at least 1 frame, got 0"):
        plot.maps(m, walking, shown=0)
    with pytest.raises(ValueError, match="no map laq here; there are frame_weights, tsa, embedded"):
        plot.maps(m, walking, ["tsa", "laq"])
    with pytest.raises(ValueError, match=r"what tsa, .* means: pass kinds=aggregator.maps"):
        plot.maps(details, walking)
    with pytest.raises(ValueError, match=re.escape("map it must have the axes ('frames', 'regions') behind the batch")):
        drawn(MapKind(("frames", "regions"), "unit", "it"), np.zeros(T))
    with pytest.raises(ValueError, match=r"got \[3, 2\] and \[2\]"):
        plot.embedding_map(torch.zeros(3, 2), [1, 2])
    with pytest.raises(ValueError, match="expected embeddings"):
        plot.embedding_map(torch.zeros(0, 2), [])


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install temporal-agg\[plot\]"):
        plot.cmc({"one": [1.0]})
