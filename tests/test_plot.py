"""The figures' content, read back from matplotlib's objects; their looks were checked by eye."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from torch import nn

import temporal_agg
from temporal_agg import ClipConfig, Details, Tracklet, TrackletModel, create_aggregator, evaluate, plot
from temporal_agg.retrieval.evaluate import ranked_gallery

C = 8
SIZE = (16, 8)
OF_A_MODEL = {  # and an aggregator for each
    "frame_weights": "attention",
    "laq_parts": "loga",
    "correlation_maps": "grl",
    "tsa_mask": "gltr",
    "fgra_regions": "fgra",
}


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
    aggregator = create_aggregator(name, C, **options)
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
    """Which frames of the walk are drawn, in order."""
    first = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    return [int(image[0, 0, 0]) for image in first if image.shape == (*SIZE, 3)]


def overlays(figure):
    """The maps that lie over frames, in order."""
    return np.array([axes.images[1].get_array().filled(np.nan) for axes in figure.axes if len(axes.images) == 2])


def labelled(figure, label):
    """The axes with this label at the left."""
    (axes,) = (axes for axes in figure.axes if axes.get_ylabel() == label)
    return axes


def cut_off(figure):
    """Titles and labels that run over the edges of the page."""
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    texts = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    boxes = {text.get_text(): text.get_window_extent() for text in texts if text.get_text()}
    return [t for t, b in boxes.items() if min(b.x0, b.y0) < -0.5 or b.x1 > width + 0.5 or b.y1 > height + 0.5]


def bars(figure):
    return {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in labelled(figure, "weight").patches}


def details_of(model, tracklet):
    """Of all frames of a walk as one clip."""
    frames = torch.stack(tracklet.load(range(len(tracklet)))).float() / 255
    with torch.no_grad():
        return model.eval()(frames[None], return_details=True)


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


def test_a_long_name_fits_beside_its_query():
    long = Tracklet([np.zeros((8, 4, 3), np.uint8)], 1, 1, "query/0001/camera 1/a tracklet of the afternoon_0001")
    figure = plot.ranked_lists(np.zeros((2, 3)), [long] * 2, [tracklet(2, 2)] * 3, [0, 1], ranks=3)
    assert cut_off(figure) == []
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
    titles = [axes.get_title() for axes in figure.axes if axes.images]
    assert titles == [f"{i}\n{weights[i]:.3f}" for i in shown]
    axes = labelled(figure, "weight")
    assert [i for i, bar in enumerate(axes.patches) if to_hex(bar.get_facecolor()) == plot.SHOWN] == shown
    assert axes.lines[0].get_ydata() == pytest.approx([1 / 30, 1 / 30])


@pytest.mark.parametrize(("heaviest", "shown"), [(0, [0, 10, 19, 29]), (16, [0, 10, 16, 29]), (28, [0, 10, 19, 28])])
def test_the_frame_that_counts_most_is_shown(heaviest, shown):
    weights = torch.full((1, 30), 0.01)
    weights[0, heaviest] = 0.71
    maps = {"tsa": weights[0, :, None].expand(1, 30, 30)}
    details = Details(torch.zeros(1, C), torch.ones(1, 30, dtype=torch.bool), weights, maps, {})
    for figure in (plot.frame_weights, plot.tsa_mask):
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
    figure = plot.tsa_mask(details, walking, clip=1)
    assert pictures(figure) == [1, 2, 4]
    keep = torch.tensor([1, 2, 4])
    axes = labelled(figure, "from frame")
    np.testing.assert_array_equal(axes.images[0].get_array(), details.maps["tsa"][1][keep][:, keep].detach())
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "4"]


@pytest.mark.parametrize(("figure", "rows"), [("laq_parts", 2), ("correlation_maps", 3), ("fgra_regions", 4)])
def test_padding_has_no_picture(figure, rows):
    clip = ClipConfig(length=10, fill="mask")
    drawn = getattr(plot, figure)(model(OF_A_MODEL[figure], clip), walk(4))
    assert pictures(drawn) == [0, 1, 2, 3] * rows
    if figure == "fgra_regions":
        assert [len(line.get_xdata()) for line in labelled(drawn, "score").lines] == [4] * 4


def test_the_mask_of_tsa_has_its_sources_in_rows():
    m, walking = model("gltr"), walk(7)
    figure = plot.tsa_mask(m, walking)
    axes = labelled(figure, "from frame")
    M = axes.images[0].get_array()
    np.testing.assert_allclose(M, details_of(m, walking).maps["tsa"][0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(M.sum(0), 1, rtol=1e-5)  # what a column takes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("to frame", "from frame")
    assert axes.images[0].origin == "upper"


@pytest.mark.parametrize("length", [1, 12])
def test_the_mask_of_tsa_stands_below_its_frames_on_a_scale_from_zero(length):
    figure = plot.tsa_mask(model("gltr", ClipConfig(test_sampling="all")), walk(length))
    figure.draw_without_rendering()
    axes = labelled(figure, "from frame")
    low, high = axes.images[0].get_clim()
    assert low == 0
    assert high == pytest.approx(axes.images[0].get_array().max())
    box = axes.get_window_extent()
    assert abs((box.x0 + box.x1) / 2 / figure.bbox.width - 0.5) < 0.1


def test_correlation_maps_are_high_and_low():
    m, walking = model("grl", ClipConfig(test_sampling="all")), walk(5)
    R = details_of(m, walking).maps["correlation"][0].numpy()
    for figure in (plot.correlation_maps(m, walking), plot.correlation_maps(details_of(m, walking), walking)):
        assert pictures(figure) == [0, 1, 2, 3, 4] * 3
        np.testing.assert_allclose(overlays(figure), np.concatenate([R, 1 - R]), rtol=1e-5)
        assert (
            len({image.get_clim() for axes in figure.axes if len(axes.images) == 2 for image in axes.images[1:]}) == 2
        )


@pytest.mark.parametrize("quality", ["frames", "features"])
def test_parts_of_laq_lie_where_they_were_read(quality):
    m, walking = model("loga", clip_length=4, part_size=10, quality=quality), walk(4)
    figure = plot.laq_parts(m, walking)
    maps = overlays(figure)
    H, W = SIZE if quality == "frames" else (8, 4)
    assert maps.shape == (4, H, W)
    flat = maps.reshape(4, -1)
    whole = H * W // 10
    image = next(axes.images[1] for axes in figure.axes if len(axes.images) == 2)
    assert to_hex(image.to_rgba(np.ma.masked_all(1))[0]) == "#808080"
    assert np.isnan(flat[:, 10 * whole :]).all()
    assert not np.isnan(flat[:, : 10 * whole]).any()
    frames = torch.stack(walking.load(range(4))) / 255
    read = (frames if quality == "frames" else m.encode_frames(frames)).mean(1).flatten(1)  # Eq. 5, part by part
    convolution = m.aggregator.laq.convolution
    for k in range(whole):
        scores = (convolution.weight * read[:, 10 * k : 10 * (k + 1)]).sum((1, 2)) + convolution.bias
        want = np.repeat(scores.detach().numpy()[:, None], 10, 1)
        np.testing.assert_allclose(flat[:, 10 * k : 10 * (k + 1)], want, rtol=1e-4, atol=1e-5)


def test_regions_of_fgra():
    m, walking = model("fgra", ClipConfig(test_sampling="all"), num_regions=3, reduced_features=4), walk(5)
    figure = plot.fgra_regions(m, walking)
    assert pictures(figure) == [0, 1, 2, 3, 4] * 3
    details = details_of(m, walking)
    features = m.encode_frames(torch.stack(walking.load(range(5))) / 255)[None]
    _, scores = m.aggregator.gam(features, details.supervised["templates"])
    gates = overlays(figure).reshape(3, 5, 8, 4)
    np.testing.assert_allclose(gates.mean((2, 3)), scores[0].mean(2).T.detach(), rtol=1e-5)  # Eq. 5
    images = [axes.images[1] for axes in figure.axes if len(axes.images) == 2]
    bars = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    assert [image.get_clim() for image in images[::5]] == [axes.get_ylim() for axes in bars]  # a scale for each region
    lines = labelled(figure, "score").lines
    curves = np.array([line.get_ydata() for line in lines])
    np.testing.assert_allclose(curves, details.maps["region_scores"][0].T, rtol=1e-5)
    boxes = [(axes.get_ylabel(), *axes.patches) for axes in figure.axes if axes.images and axes.patches]
    weights = details.maps["region_weights"][0]
    assert [label for label, _ in boxes] == [f"region {n + 1}\nweight {weights[n]:.3f}" for n in range(3)]
    rows = [box.get_extents().transformed(box.axes.transData.inverted()).get_points()[:, 1] for _, box in boxes]
    # Of 8 rows of the map, 2 pixels each: 0-2, 2-5, 5-7 (floor and ceiling of thirds).
    np.testing.assert_allclose(np.sort(rows), [[-0.5, 5.5], [3.5, 11.5], [9.5, 15.5]])


def test_plain_stripes_have_frames_and_no_gates():
    clip = ClipConfig(length=4, test_sampling="all")
    figure = plot.fgra_regions(
        model("fgra", clip, local_branch="stripes", temporal="average", spatial="concatenation"), walk(3)
    )
    assert len(overlays(figure)) == 0
    assert sum(len(axes.patches) for axes in figure.axes if axes.images) == 4 * 3


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("name", OF_A_MODEL)
@pytest.mark.filterwarnings("error::UserWarning")  # what does not fit is told by a warning
def test_any_length_fits_the_page(name, length):
    m = model(OF_A_MODEL[name], None if name == "laq_parts" else ClipConfig(test_sampling="all"))
    figure = getattr(plot, name)(m, walk(length), shown=5)
    assert cut_off(figure) == []
    assert len(set(pictures(figure))) == min(length, 5)
    assert figure.get_figwidth() <= 7


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("figure", ["laq_parts", "correlation_maps"])
def test_a_map_stands_below_its_frame(figure, length):
    clip = ClipConfig(length=10, fill="mask")
    drawn = getattr(plot, figure)(model(OF_A_MODEL[figure], clip), walk(length))
    drawn.draw_without_rendering()
    places = [axes.get_window_extent().x0 for axes in drawn.axes if axes.images]
    rows = np.array(places[: len(places) // length * length]).reshape(-1, length)
    assert np.ptp(rows, axis=0).max() < 1


def test_the_model_keeps_its_mode_and_gradients_stay_out():
    m = model("gltr").train()
    m.aggregator.embed.eval()
    before = {key: value.clone() for key, value in m.state_dict().items()}
    plot.tsa_mask(m, walk(3))
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


def test_errors_name_the_models_that_have_it():
    for name in plot.FOR:
        with pytest.raises(ValueError, match=f"{name}: Mean, this model has nothing.*{plot.FOR[name]}"):
            getattr(plot, name)(model("mean"), walk(3))
    with pytest.raises(ValueError, match="these details have nothing"):
        plot.tsa_mask(details_of(model("mean"), walk(3)), walk(3))


@pytest.mark.parametrize("name", temporal_agg.list_aggregators())
def test_the_models_that_errors_name_are_all_there_are(name):
    m = model(name)
    for figure, whom in plot.FOR.items():
        if name in whom.replace(" with", ",").split(", ")[0].split(" and ") or name in whom.split():
            getattr(plot, figure)(m, walk(3))
        else:
            with pytest.raises(ValueError, match=figure):
                getattr(plot, figure)(m, walk(3))


@pytest.mark.parametrize("options", [{"name": "gltr", "tsa": False}, {"name": "loga", "assembly": "gcq"}])
def test_parts_that_were_left_out_of_a_model(options):
    figure = {"gltr": plot.tsa_mask, "loga": plot.laq_parts}[options["name"]]
    with pytest.raises(ValueError, match="nothing to draw"):
        figure(model(**options), walk(3))


def test_what_cannot_be_drawn():
    m, walking = model("gltr"), walk(3)
    with pytest.raises(TypeError, match=r"got GLTR. An aggregator alone sees no images"):
        plot.frame_weights(m.aggregator, walking)
    with pytest.raises(TypeError, match="expected a TrackletModel"):
        plot.fgra_regions(details_of(m, walking), walking)
    with pytest.raises(ValueError, match="clips of 3 frames, padding included; got 2 frames"):
        plot.frame_weights(details_of(m, walking), walk(2))
    for clip in (-1, 1):
        with pytest.raises(ValueError, match=f"there are 1 clips: clip must be 0 to 0, got {clip}"):
            plot.tsa_mask(m, walking, clip=clip)
    with pytest.raises(ValueError, match="at least 1 frame, got 0"):
        plot.tsa_mask(m, walking, shown=0)
    with pytest.raises(ValueError, match=r"got \[3, 2\] and \[2\]"):
        plot.embedding_map(torch.zeros(3, 2), [1, 2])
    with pytest.raises(ValueError, match="expected embeddings"):
        plot.embedding_map(torch.zeros(0, 2), [])


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install temporal-agg\[plot\]"):
        plot.cmc({"one": [1.0]})
