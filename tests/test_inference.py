import sys
import types
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from temporal_agg import inference
from temporal_agg.aggregators import ClipConfig, create_aggregator, list_aggregators
from temporal_agg.data import ClipTransform, FlowError, ImageError, Tracklet, cut_tracklet
from temporal_agg.inference import embed_tracklets
from temporal_agg.models import FrameEncoder, StarEncoder, TrackletModel

C, SIZE = 32, (32, 16)
LENGTHS = (1, 23, 7, 8, 3, 16)


class SmallEncoder(nn.Module):
    """Maps [N, 32, 4, 2]; notes how many frames every call has."""

    num_features = C
    data_config = {"input_size": (3, *SIZE), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear"}  # noqa: RUF012
    config = None

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, C, 8, stride=8)
        self.norm = nn.BatchNorm2d(C)
        self.calls = []

    def forward(self, frames, flow=None):
        self.calls.append(len(frames))
        return self.norm(self.conv(frames)).relu()


def build(aggregator="mean", clip=None, **kwargs):
    torch.manual_seed(0)
    return TrackletModel(SmallEncoder(), create_aggregator(aggregator, C, **kwargs), clip).eval()


def tracklets(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    sizes = [(40, 20), (32, 16), (25, 30)]
    return [
        Tracklet([rng.integers(0, 256, (*sizes[i % 3], 3), dtype=np.uint8) for i in range(n)], pid=1, name=f"t{k}")
        for k, n in enumerate(lengths)
    ]


@torch.no_grad()
def literal(model, items):
    """Clip by clip through the whole model."""
    c, config = model.clip, model.data_config
    transform = ClipTransform(config["input_size"][1:], config["mean"], config["std"], config["interpolation"])
    rows = []
    for tracklet in items:
        indices, mask = cut_tracklet(
            len(tracklet), c.length, c.test_sampling, stride=c.stride, fill=c.fill, tail=c.tail
        )
        embeddings = []
        for row, m in zip(indices.tolist(), mask, strict=True):
            clip, flow = transform(tracklet.load(row)), None
            if getattr(model.encoder, "uses_flow", False):
                clip, flow = transform(tracklet.load(row), flow=tracklet.load_flow(row))
            embeddings.append(model(clip[None], m[None], flow=flow if flow is None else flow[None])[0])
        rows.append(torch.stack(embeddings).mean(0))
    return torch.stack(rows)


@pytest.fixture
def whole_batches(monkeypatch):
    """Passes of the backbone as on a GPU: not smaller than the batches."""
    monkeypatch.setattr(inference, "CPU_PASS", 10**6)


def embed(model, items, **kwargs):
    return embed_tracklets(model, items, **{"num_workers": 0, "progress": False} | kwargs)


@pytest.mark.parametrize("name", list_aggregators())
def test_equals_clip_by_clip(name):
    model, items = build(name), tracklets()
    torch.testing.assert_close(embed(model, items, frames_per_batch=20), literal(model, items), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "clip",
    [
        ClipConfig(6, stride=3, tail="shift"),
        ClipConfig(6, stride=3, fill="mask"),
        ClipConfig(6, stride=5, fill="last"),
        ClipConfig(4, fill="repeat"),
        ClipConfig(5, test_sampling="chunks", fill="mask"),
        ClipConfig(5, test_sampling="even"),
        ClipConfig(8, test_sampling="all"),
    ],
    ids=lambda clip: f"{clip.test_sampling}-{clip.stride}-{clip.fill}-{clip.tail}",
)
@pytest.mark.parametrize("aggregator", ["attention", "lstm"])
def test_every_way_to_cut(clip, aggregator):
    model, items = build(aggregator, clip), tracklets()
    torch.testing.assert_close(embed(model, items, frames_per_batch=10), literal(model, items), rtol=1e-4, atol=1e-5)


def test_a_timm_backbone_and_worker_processes():
    torch.manual_seed(0)
    encoder = FrameEncoder("test_resnet", img_size=(64, 32))
    model = TrackletModel(encoder, create_aggregator("attention", encoder.num_features), ClipConfig(4)).eval()
    items = tracklets((5, 40, 9))
    got = embed(model, items, frames_per_batch=16, num_workers=2)
    torch.testing.assert_close(got, literal(model, items), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames_per_batch", [1, 7, 32, 33, 64, 1000])
def test_the_result_does_not_depend_on_the_batching(whole_batches, frames_per_batch):
    model = build("attention", ClipConfig(6, stride=3, fill="mask"))
    items = tracklets((90, *LENGTHS))
    want = embed(model, items)
    model.encoder.calls.clear()
    got = embed(model, items, frames_per_batch=frames_per_batch)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    full, last = divmod(90 + sum(LENGTHS), frames_per_batch)
    assert model.encoder.calls == [frames_per_batch] * full + [last] * (last > 0)


def test_order_follows_the_tracklets():
    model, items = build(clip=ClipConfig(4)), tracklets()
    want = torch.cat([embed(model, [t]) for t in items])
    torch.testing.assert_close(embed(model, items, frames_per_batch=5), want)
    torch.testing.assert_close(embed(model, items[::-1], frames_per_batch=5), want.flip(0))
    assert torch.pdist(want).min() > 1e-3


class Counting:
    """A tracklet that notes what is read of it."""

    def __init__(self, tracklet):
        self.tracklet, self.read, self.name = tracklet, [], tracklet.name

    def __len__(self):
        return len(self.tracklet)

    def load(self, indices):
        self.read += indices
        return self.tracklet.load(indices)


def test_overlapping_windows_read_and_encode_each_frame_once():
    model = build(clip=ClipConfig(8, stride=1))
    items = [Counting(t) for t in tracklets()]
    embed(model, items, frames_per_batch=10)
    assert [t.read for t in items] == [list(range(n)) for n in LENGTHS]
    assert sum(model.encoder.calls) == sum(LENGTHS)


def test_frames_that_no_clip_needs_are_not_read():
    items = [Counting(t) for t in tracklets((100, 3))]
    embed(build(clip=ClipConfig(4, test_sampling="chunks")), items)
    assert [t.read for t in items] == [[0, 25, 50, 75], [0, 1, 2]]


@pytest.mark.parametrize("fill", ["repeat", "mask"])
def test_maps_of_a_long_tracklet_are_let_go(whole_batches, fill):
    """With windows of 6 frames and batches of 12, no more than three batches are alive at once."""
    model = build("attention", ClipConfig(6, stride=3, fill=fill))
    model.aggregator.needs_maps = True
    alive, most = [], 0

    def watch(module, args, output):
        nonlocal most
        alive.append(weakref.ref(output))
        most = max(most, sum(ref() is not None for ref in alive))

    model.encoder.register_forward_hook(watch)
    embed(model, tracklets((400,)), frames_per_batch=12)
    assert len(alive) == 34
    assert most <= 3


def streaming(clip=None):
    """GSTA, which notes how many frames each call had, and how many maps were alive at once."""
    model = build("gsta", clip, hidden_features=16)
    model.called, model.alive, model.most = [], [], 0
    model.aggregator.register_forward_pre_hook(lambda module, args: model.called.append(tuple(args[0].shape[:2])))

    def watch(module, args, output):
        model.alive.append(weakref.ref(output))
        model.most = max(model.most, sum(ref() is not None for ref in model.alive))

    model.encoder.register_forward_hook(watch)
    return model


@pytest.mark.parametrize("lengths", [(23,), (8,), (9,), (3, 40, 40, 5, 5, 16, 17)])
def test_long_tracklets_stream(lengths):
    model, items = streaming(), tracklets(lengths)
    want = embed(model, items, frames_per_batch=1000)
    assert sum(clips for clips, _ in model.called) == len(lengths), "nothing streams where all fits into a batch"
    model.called.clear()
    torch.testing.assert_close(embed(model, items, frames_per_batch=8), want, rtol=1e-5, atol=1e-6)
    assert sorted(length for clips, length in model.called for _ in range(clips)) == sorted(
        length for length in lengths if length <= 8
    )
    torch.testing.assert_close(want, literal(model, items), rtol=1e-4, atol=1e-5)


def test_memory_does_not_grow_with_the_tracklet(whole_batches):
    model = streaming()
    embed(model, tracklets((400, 7, 90)), frames_per_batch=12)
    assert len(model.alive) == 42
    assert model.most <= 2


@pytest.mark.parametrize(("stride", "whole"), [(10, 3 + 4 + 1), (20, 1 + 1)])
def test_long_windows(stride, whole):
    """Of windows longer than a batch those stream that have no padding, and no frame that the next one wants again."""
    model, items = streaming(ClipConfig(20, stride=stride, fill="mask")), tracklets((50, 7, 60))
    got = embed(model, items, frames_per_batch=8)
    assert model.called == [(1, 20)] * whole
    torch.testing.assert_close(got, literal(model, items), rtol=1e-4, atol=1e-5)


class Filmed(Counting):
    """A tracklet that has flow, and notes what is read of it."""

    def __init__(self, tracklet, seed):
        rng = np.random.default_rng(seed)
        sizes = [(16, 8), (32, 16), (20, 10)]
        flow = [rng.standard_normal((2, *sizes[i % 3])).astype(np.float32) for i in range(len(tracklet))]
        super().__init__(Tracklet(tracklet.frames, 1, name=tracklet.name, flow=flow))
        self.flow_read = []

    def load_flow(self, indices):
        self.flow_read += indices
        return self.tracklet.load_flow(indices)


def star(clip=None):
    torch.manual_seed(0)
    encoder = StarEncoder("test_resnet", img_size=SIZE)
    with torch.no_grad():
        encoder.flow_stem[1].weight.fill_(3)  # so that flow shows
    return TrackletModel(encoder, create_aggregator("gsta", encoder.num_features, hidden_features=16), clip).eval()


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("clip", [None, ClipConfig(6, stride=3, fill="mask")])
def test_flow_is_read_once_and_goes_with_its_frame(clip, num_workers):
    model = star(clip)
    items = [Filmed(t, seed) for seed, t in enumerate(tracklets())]
    got = embed(model, items, frames_per_batch=10, num_workers=num_workers)
    if not num_workers:
        assert [t.flow_read for t in items] == [list(range(n)) for n in LENGTHS]
    torch.testing.assert_close(got, literal(model, items), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.encoder.flow_stem[1].weight.zero_()
    assert (embed(model, items) - got).norm() > 1e-2 * got.norm()


def test_missing_flow_shows_before_anything_is_computed():
    model, calls = star(), []
    model.encoder.register_forward_hook(lambda *args: calls.append(1))
    items = tracklets((30, 5))
    with pytest.raises(FlowError, match="'t1' has no optical flow"):
        embed(model, [Filmed(items[0], 0), items[1]], frames_per_batch=4)
    assert not calls
    with pytest.raises(FlowError, match=r"'t0'.*flow=False"):
        embed(model, [Counting(items[0])])


def test_vectors_are_kept_in_place_of_maps():
    model = build("attention", ClipConfig(8, test_sampling="all"))
    seen = []
    model.aggregator.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    embed(model, tracklets((50,)), frames_per_batch=8)
    assert seen == [(1, 50, C)]


def test_clips_of_several_tracklets_share_a_call():
    model = build(clip=ClipConfig(4))
    seen = []
    model.aggregator.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    embed(model, tracklets((4,) * 10), frames_per_batch=16)
    assert seen == [4, 4, 2]


def test_leaves_model_and_random_state_as_they_were():
    model = build(clip=ClipConfig(4)).train()
    model.encoder.norm.eval()  # a frozen norm in a model that trains
    modes = {key: module.training for key, module in model.named_modules()}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    out = embed(model, tracklets((5, 2)))
    assert torch.equal(torch.rand(3), first)
    assert {key: module.training for key, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(out, embed(model.eval(), tracklets((5, 2))))
    assert out.dtype == torch.float32
    assert out.device.type == "cpu"
    assert not out.requires_grad
    assert not out.is_inference()


def test_mode_is_restored_after_an_error():
    model = build(clip=ClipConfig(4)).train()
    broken = Tracklet(["missing.png"] * 3, pid=1, name="t9")
    for num_workers in (0, 1):
        with pytest.raises(ImageError, match=r"missing\.png"):
            embed(model, [*tracklets((5,)), broken], num_workers=num_workers)
        assert all(module.training for module in model.modules())


def test_autocast_is_the_callers():
    model, items = build("attention", ClipConfig(4)), tracklets((5, 3))
    want = embed(model, items)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = embed(model, items)
    assert got.dtype == torch.float32
    assert 0 < (got - want).norm() / want.norm() < 0.02


def test_the_bar_counts_frames(whole_batches, monkeypatch):
    model, items, seen = build(clip=ClipConfig(8, stride=4)), tracklets(), []

    class Bar:
        def __init__(self, total, **kwargs):
            seen.append(total)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            seen.append("closed")

        def update(self, n):
            seen.append(n)

    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    embed(model, items, frames_per_batch=32, progress=True)
    assert seen == [sum(LENGTHS), 32, sum(LENGTHS) - 32, "closed"]
    monkeypatch.setitem(sys.modules, "tqdm", None)  # not installed
    assert embed(model, items, progress=True).shape == (len(items), C)


def test_errors_name_the_tracklet():
    model = build(clip=ClipConfig(4))
    with pytest.raises(ValueError, match="nothing to embed"):
        embed(model, [])
    empty = type("Empty", (), {"name": "camera2/0007", "__len__": lambda self: 0})()
    with pytest.raises(ValueError, match=r"tracklets\[2\] \('camera2/0007'\) has no frame"):
        embed(model, [*tracklets((5, 2)), empty])
    with pytest.raises(ValueError, match="frames_per_batch must be at least 1, got 0"):
        embed(model, tracklets((5,)), frames_per_batch=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu():
    model, items = build("attention", ClipConfig(6, stride=3, fill="mask")), tracklets()
    want = embed(model, items)
    got = embed(model, items, device="cuda", frames_per_batch=10, num_workers=None)
    assert got.device.type == "cpu"
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert torch.equal(got, embed(model, items, frames_per_batch=10))
