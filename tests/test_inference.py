import contextlib
import io
import math
import os
import re
import subprocess
import sys
import threading
import time
import types
import weakref

import numpy as np
import pytest
import torch
from helpers import small
from PIL import Image
from torch import nn
from versions import BEGIN, needs_torch

from temporal_agg import inference
from temporal_agg.aggregators import ClipConfig, create_aggregator, list_aggregators
from temporal_agg.aggregators.robust import tracklet_purity
from temporal_agg.data import ClipTransform, FlowError, ImageError, Tracklet, cut_tracklet
from temporal_agg.inference import allowed_cores, embed_tracklets
from temporal_agg.models import FrameEncoder, StarEncoder, TrackletModel, create_model
from temporal_agg.models.inputs import fastest_memory_format

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


def test_frames_of_several_sizes_are_resized_each(tmp_path):
    """Also those of files; the mean of frames is the mean of what each frame alone gives."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((64, 32), (20, 10), (32, 16), (9, 40))]
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for file, array in zip(files, arrays, strict=True):
        Image.fromarray(array).save(file)
    model = build()
    alone = embed_tracklets(model, [Tracklet([array], pid=1) for array in arrays], progress=False)
    for frames in (arrays, files, [*arrays[:2], *files[2:]]):
        together = embed_tracklets(model, [Tracklet(frames, pid=1)], progress=False)
        torch.testing.assert_close(together[0], alone.mean(0), rtol=1e-5, atol=1e-6)


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
    model, items = build(name, **small(name)), tracklets()
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


def test_a_timm_backbone_and_threads():
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


def test_vectors_are_kept_in_place_of_maps(monkeypatch):
    model = build("attention", ClipConfig(8, test_sampling="all"))
    monkeypatch.setattr(type(model.aggregator), "supports_streaming", False)  # which keeps neither
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
    empty = type("Empty", (), {"name": "camera2/0007", "__len__": lambda self: 0, "load": None})()
    with pytest.raises(ValueError, match=r"tracklets\[2\] \('camera2/0007'\) has no frame"):
        embed(model, [*tracklets((5, 2)), empty])
    with pytest.raises(ValueError, match="frames_per_batch must be at least 1, got 0"):
        embed(model, tracklets((5,)), frames_per_batch=0)
    with pytest.raises(ValueError, match="num_workers must be at least 0, or None"):
        embed(model, tracklets((5,)), num_workers=-1)
    with pytest.raises(ValueError, match=r"precision must be one of float32, bfloat16, float16, got 'half'"):
        embed(model, tracklets((5,)), precision="half")


class Slow(Counting):
    """A tracklet of which some frames take longer than others."""

    def load(self, indices):
        time.sleep(0.002 * (len(self.tracklet) % 3))
        self.threads = {*getattr(self, "threads", ()), threading.current_thread()}
        return super().load(indices)


@pytest.mark.parametrize("num_workers", [1, 4])
def test_threads_keep_the_order(num_workers):
    model, items = build("attention", ClipConfig(6, stride=3, fill="mask")), tracklets(LENGTHS * 3)
    slow = [Slow(t) for t in items]
    got = embed(model, slow, frames_per_batch=5, num_workers=num_workers)
    torch.testing.assert_close(got, embed(model, items), rtol=1e-5, atol=1e-6)
    threads = set().union(*(t.threads for t in slow))
    assert len(threads) <= num_workers
    assert threading.current_thread() not in threads
    assert not any(thread.is_alive() for thread in threads), "all have ended"


def test_reading_ahead_is_bounded(whole_batches):
    (item,), ahead = [Counting(t) for t in tracklets((400,))], []
    model = build(clip=ClipConfig(4))
    model.encoder.register_forward_hook(lambda *args: ahead.append(len(item.read) - sum(model.encoder.calls)))

    embed(model, [item], frames_per_batch=10, num_workers=2)
    assert max(ahead) <= 10 * (2 * 2 + 2)
    assert sorted(item.read) == list(range(400))


@pytest.mark.slow
def test_no_process_is_started_and_no_start_method_is_chosen():
    code = """
import multiprocessing, os
import numpy as np, torch
import temporal_agg
from multiprocessing import process
os.fork = process.BaseProcess.start = lambda *args: exit("a process was started")
multiprocessing.current_process()._config["daemon"] = True  # such as the worker of a pool
model = temporal_agg.create_model("mean_test_resnet", img_size=(32, 32))
tracklets = [temporal_agg.Tracklet([np.zeros((32, 32, 3), np.uint8)] * 50, 1)]
for workers in (None, 0, 3):
    temporal_agg.embed_tracklets(model, tracklets, progress=False, num_workers=workers)
print(multiprocessing.get_start_method(allow_none=True))
"""
    run = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "None\n"), run.stderr


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_defaults_of_the_caller_do_not_matter(dtype, num_workers):
    model, items = build("attention", ClipConfig(6, stride=3, fill="mask")), tracklets()
    want = embed(model, items)
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        got = embed(model, items, num_workers=num_workers)
        assert torch.get_default_dtype() == dtype
        assert torch.empty(0).device.type == "meta"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(got, want)


class Convolutions(nn.Sequential):
    def __init__(self, convolutions, linear):
        super().__init__(
            *(nn.Conv2d(3, 3, 3, padding=1) for _ in range(convolutions)), *(nn.Linear(3, 3) for _ in range(linear))
        )


def test_the_memory_format_follows_what_the_network_is():
    for layers, want in [((5, 0), True), ((1, 48), False), ((22, 36), True), ((0, 9), False), ((0, 0), False)]:
        assert (fastest_memory_format(Convolutions(*layers)) == torch.channels_last) == want, layers
    encoders = {"test_resnet": True, "test_convnext": True, "test_vit": False}
    for name, want in encoders.items():
        assert (fastest_memory_format(FrameEncoder(name, img_size=(64, 32))) == torch.channels_last) == want, name


@pytest.mark.parametrize("killed", [False, True])
def test_images_and_weights_are_channels_last_and_the_models_own_weights_come_back(killed):
    encoder, seen, blocks = FrameEncoder("test_resnet", img_size=(64, 32)), [], set()
    model = TrackletModel(encoder, create_aggregator("mean", encoder.num_features), ClipConfig(4)).eval()
    weights = [weight for weight in model.encoder.parameters() if weight.dim() == 4]
    wide = [weight for weight in weights if not weight.is_contiguous(memory_format=torch.channels_last)]

    def look(module, args):
        blocks.update(weight.untyped_storage().data_ptr() for weight in wide)
        seen.extend(x.is_contiguous(memory_format=torch.channels_last) for x in (*args[:1], *weights))
        if killed:
            raise KeyboardInterrupt

    model.encoder.register_forward_pre_hook(look)
    before = {key: (x.clone(), x.stride(), x.data_ptr()) for key, x in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt) if killed else contextlib.nullcontext():
        embed(model, tracklets())
    assert seen
    assert all(seen)
    assert len(wide) > 1
    assert len(blocks) == 1  # many small copies would scatter what the activations need
    for key, x in model.state_dict().items():
        value, stride, place = before[key]
        assert torch.equal(x, value)
        assert (x.stride(), x.data_ptr()) == (stride, place)
        assert not x.is_inference()


@pytest.mark.parametrize(
    "precision", ["bfloat16", pytest.param("float16", marks=needs_torch("2.4", "float16 on a CPU"))]
)
def test_precision(precision):
    torch.manual_seed(0)
    encoder = FrameEncoder("test_resnet", img_size=(64, 32))
    model = TrackletModel(encoder, create_aggregator("attention", encoder.num_features), ClipConfig(4)).eval()
    items, seen = tracklets(), []
    want = embed(model, items)
    model.aggregator.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    got = embed(model, items, precision=precision)
    assert set(seen) == {getattr(torch, precision)}
    assert got.dtype == torch.float32
    assert not torch.equal(got, want)
    assert torch.cosine_similarity(got, want).min() > 0.999


@pytest.mark.parametrize("killed", [False, True])
def test_narrow_and_depthwise_convolutions_stay_in_float32(killed):
    """Those of 32 channels or fewer; an image's three do not count. Afterwards the modules are what they were."""
    wide, narrow, depthwise = nn.Conv2d(3, 64, 3, 2, 1), nn.Conv2d(64, 8, 1), nn.Conv2d(40, 40, 3, 1, 1, groups=40)
    other, last = nn.Conv2d(8, 40, 1), nn.Conv2d(40, 48, 1, groups=2)
    changed, seen = other.forward, {}

    def forward(x):  # as accelerate and others change a module
        return changed(x)

    other.forward = forward
    encoder = SmallEncoder()
    encoder.conv, encoder.norm = nn.Sequential(wide, narrow, other, depthwise, last), nn.Identity()
    encoder.num_features = 48
    model = TrackletModel(encoder, create_aggregator("mean", 48), ClipConfig(4))
    for conv in model.encoder.conv:
        conv.register_forward_hook(lambda conv, args, out: seen.update({conv: out.dtype}))
    if killed:
        model.aggregator.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt) if killed else contextlib.nullcontext():
        embed(model, tracklets(), precision="bfloat16")
    low, full = torch.bfloat16, torch.float32
    assert seen == {wide: low, narrow: full, other: full, depthwise: full, last: low}
    assert other.forward is forward
    assert all("forward" not in vars(conv) for conv in (wide, narrow, depthwise, last))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_types(dtype):
    model, items = build("attention", ClipConfig(4)), tracklets()
    want = embed(model, items)
    got = embed(model.to(dtype), items)
    assert got.dtype == torch.float32
    assert (got - want).norm() / want.norm() < 0.02


def test_wrapped_models():
    model, items = build(clip=ClipConfig(4)), tracklets()
    assert torch.equal(embed(nn.DataParallel(model), items), embed(model, items))
    with pytest.raises(TypeError, match="must be a TrackletModel, as create_model returns it, got SmallEncoder"):
        embed(model.encoder, items)


def test_a_long_run_says_where_the_time_went(monkeypatch, caplog):
    model, items = build(clip=ClipConfig(4)), [Slow(t) for t in tracklets((7, 8))]
    caplog.set_level("INFO")
    embed(model, items)
    assert not caplog.records
    monkeypatch.setattr(inference, "LONG_RUN", 0)
    embed(model, items)
    (record,) = caplog.records
    found = re.fullmatch(
        r"embedded 2 tracklets of 15 frames in [\d.]+ s: ([\d.]+) frames/s, (\d+) % of the time spent waiting for "
        r"frames to be decoded",
        record.message,
    )
    assert float(found[1]) > 0
    assert 0 < int(found[2]) <= 100


def test_the_cores_that_are_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(inference, "_cgroup_quota", lambda root, own: 2.5)
    assert allowed_cores() == 3
    monkeypatch.setattr(inference, "_cgroup_quota", lambda root, own: math.inf)
    assert allowed_cores() == 6
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert allowed_cores() == 1


@pytest.mark.parametrize(
    ("own", "files", "want"),
    [
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/\n", {"cpu.max": "max 100000"}, math.inf),
        ("0::/a/b\n", {"cpu.max": "max 100000", "a/cpu.max": "50000 100000", "a/b/cpu.max": "300000 100000"}, 0.5),
        ("0::/gone\n", {}, math.inf),
        (
            "12:cpu,cpuacct:/docker/x\n3:memory:/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "150000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            1.5,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ("nonsense", {"cpu.max": "1 1"}, math.inf),
        (None, {}, math.inf),
    ],
)
def test_quotas_of_control_groups(own, files, want, tmp_path):
    if own is not None:
        (tmp_path / "own").write_text(own)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert inference._cgroup_quota(tmp_path, tmp_path / "own") == want


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu():
    model, items = build("attention", ClipConfig(6, stride=3, fill="mask")), tracklets()
    want = embed(model, items)
    got = embed(model, items, device="cuda", frames_per_batch=10, num_workers=None)
    assert got.device.type == "cpu"
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert torch.equal(got, embed(model, items, frames_per_batch=10))


@pytest.mark.parametrize("clip", [ClipConfig(4), ClipConfig(8, test_sampling="all"), ClipConfig(6, stride=3)])
@pytest.mark.parametrize("name", ["attention", "loga", "gsta"])
def test_frames_of_somebody_else_are_rejected(name, clip, whole_batches):
    robust = pytest.importorskip("temporal_agg.aggregators.robust")
    model = build(
        name, **({"clip": clip} if name != "loga" else {}), **({"hidden_features": 16} if name == "gsta" else {})
    )
    rng = np.random.default_rng(0)

    def frames(level, n):
        return [rng.integers(level, level + 30, (32, 16, 3), dtype=np.uint8) for _ in range(n)]

    items = [
        Tracklet([*frames(20, 9), *frames(200, 6), *frames(20, 8)], 1),  # whole clips of others among them
        Tracklet(frames(120, 13), 1),
        Tracklet([*frames(30, 1)], 1),
    ]
    got = embed(model, items, frames_per_batch=5, reject_outliers=True)
    rows = []
    transform = ClipTransform.for_model(model)
    with torch.no_grad():
        for item in items:
            features, images = model.frame_features(transform(item.load(range(len(item)))))
            vectors = features.mean((2, 3)) if features.dim() == 4 else features
            good = robust.outlier_mask(vectors[None])[0]
            indices, mask = model.clip.cut(len(item))
            mask = mask & good[indices]
            clips = [
                model.aggregate(features[i][None], m[None], images=images if images is None else images[i][None])[0]
                for i, m in zip(indices, mask, strict=True)
                if m.any()
            ]
            rows.append(torch.stack(clips).mean(0))
            if item is items[0]:
                assert not good[9:15].any()
    torch.testing.assert_close(got, torch.stack(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [True, False])
def test_float16_on_a_cpu_that_cannot_is_one_sentence(autocast, monkeypatch):
    """torch 2.0 cannot, and says so in words of its own in the middle of a run."""

    def refuse(*args):
        raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'")

    model = create_model("mean_resnet10t", img_size=(32, 16))
    model, precision = (model, "float16") if autocast else (model.half(), "float32")
    monkeypatch.setattr(torch.nn.functional, "conv2d", refuse)
    with pytest.raises(ValueError, match="does not compute in float16 on a CPU: take bfloat16 or float32"):
        embed_tracklets(model, [Tracklet([np.zeros((32, 16, 3), np.uint8)], 0)], precision=precision)


@pytest.mark.parametrize("reject", [False, True])
@pytest.mark.parametrize(
    "clip", [ClipConfig(4), ClipConfig(8, test_sampling="all"), ClipConfig(12, test_sampling="even")]
)
def test_purity_is_that_of_the_frames_in_use(clip, reject):
    """Its places are numbers of the tracklet's frames, also where clips leave frames out."""
    model, items = build("mean", clip), tracklets((9, 40, 3, 16))
    options = {"frames_per_batch": 5, "reject_outliers": reject}
    got, purity = embed(model, items, return_purity=True, **options)
    torch.testing.assert_close(got, embed(model, items, **options))
    transform = ClipTransform.for_model(model)
    for i, item in enumerate(items):
        used = clip.cut(len(item))[0].unique()
        with torch.no_grad():
            want = tracklet_purity(model.frame_features(transform(item.load(used.tolist())))[0][None])
        torch.testing.assert_close(purity.score[i], want.score[0])
        if want.start >= 0:
            want = want._replace(start=used[want.start], stop=used[want.stop - 1] + 1)
        assert (purity.start[i], purity.stop[i]) == (want.start, want.stop)


@pytest.mark.parametrize("closed", [True, False])
def test_a_program_without_a_console_shows_no_bar(monkeypatch, closed):
    model = create_model("mean_test_resnet", img_size=(64, 32))
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr("sys.stderr", stream if closed else None)
    tracklet = Tracklet([np.zeros((64, 32, 3), np.uint8)], pid=1)
    assert embed_tracklets(model, [tracklet], progress=True).isfinite().all()
