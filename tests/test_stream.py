from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import small
from PIL import Image
from test_inference import C, build, embed, tracklets
from torch import Tensor

from temporal_agg import inference
from temporal_agg.aggregators import Aggregator, ClipConfig, Details, list_aggregators
from temporal_agg.data import ImageError, Tracklet
from temporal_agg.models import TrackletModel
from temporal_agg.stream import TrackletStream, crop_boxes, crop_embedder

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LENGTHS = {"a": 1, "b": 21, "c": 7, 4: 8, (5,): 3}


class Sums(NamedTuple):
    total: Tensor
    count: Tensor


class StreamingMean(Aggregator):
    """The mean over frames, by the streaming protocol; notes how many tracklets every update has."""

    supports_streaming = True

    def __init__(self):
        super().__init__(C, C)
        self.updates = []

    def aggregate(self, features, mask, frames):
        x = features.mean((3, 4)) if features.dim() == 5 else features
        weights = mask / mask.sum(1, keepdim=True)
        return Details((x * weights[..., None]).sum(1), mask, weights, {}, {})

    def begin(self, batch, like=None):
        return Sums(torch.zeros(batch, C), torch.zeros(batch))

    def update(self, state, features, mask=None):
        self.updates.append(len(features))
        mask = torch.ones(features.shape[:2], dtype=torch.bool) if mask is None else mask
        features = torch.where(mask[..., None], features, 0)
        return Sums(state.total + features.sum(1), state.count + mask.sum(1))

    def read(self, state):
        return Details(state.total / state.count[:, None], torch.ones(1, 1), torch.ones(1, 1), {}, {})


def streaming_model(clip=None):
    torch.manual_seed(0)
    return TrackletModel(build().encoder, StreamingMean(), clip or ClipConfig(8, test_sampling="all")).eval()


def feed(stream, items, seed=0, most=3):
    """Hands the frames of tracklets by id to a stream, some at a time, in turns drawn at random."""
    rng = np.random.default_rng(seed)
    at = dict.fromkeys(items, 0)
    while any(at[key] < len(items[key]) for key in items):
        crops, ids = [], []
        for key in rng.permutation(len(items)):
            key = list(items)[key]
            for _ in range(rng.integers(0, most + 1)):
                if at[key] < len(items[key]):
                    crops.append(items[key].frames[at[key]])
                    ids.append(key)
                    at[key] += 1
        stream.update(crops, ids)
        yield {key: n for key, n in at.items() if n}


def named(lengths=LENGTHS):
    return dict(zip(lengths, tracklets(tuple(lengths.values())), strict=True))


def beginnings(model, items):
    """What embed_tracklets gives for the first n frames of each tracklet, by id and n."""
    keys = [(key, n) for key, item in items.items() for n in range(1, len(item) + 1)]
    return dict(zip(keys, embed(model, [Tracklet(items[key].frames[:n], 1) for key, n in keys]), strict=True))


def check(stream, wanted, had):
    ids, got = stream.embeddings()
    assert sorted(map(str, ids)) == sorted(map(str, had))
    assert len(stream) == len(had)
    want = torch.stack([wanted[key, had[key]] for key in ids])
    torch.testing.assert_close(got, want, **CLOSE)
    torch.testing.assert_close(stream.embedding(ids[-1]), want[-1], **CLOSE)


@pytest.mark.parametrize("name", list_aggregators())
def test_equals_embed_tracklets_at_any_time(name):
    model, items = build(name, **small(name)), named()
    wanted, stream = beginnings(model, items), TrackletStream(model)
    for had in feed(stream, items):
        check(stream, wanted, had)


@pytest.mark.parametrize(
    "clip",
    [
        ClipConfig(6, stride=3, tail="shift"),
        ClipConfig(6, stride=4, tail="shift", fill="mask"),
        ClipConfig(6, stride=3, fill="mask"),
        ClipConfig(6, stride=5, fill="last"),
        ClipConfig(6, stride=1),
        ClipConfig(1),
        ClipConfig(4, fill="repeat"),
        ClipConfig(5, test_sampling="chunks", fill="mask"),
        ClipConfig(5, test_sampling="even"),
        ClipConfig(8, test_sampling="all"),
    ],
    ids=lambda clip: f"{clip.test_sampling}-{clip.stride}-{clip.fill}-{clip.tail}",
)
def test_every_way_to_cut(clip):
    model, items = build("attention", clip), named()
    wanted = beginnings(model, items)
    for most in (1, 9):
        stream = TrackletStream(model, frames_per_batch=7)
        for had in feed(stream, items, most=most):
            check(stream, wanted, had)


def test_aggregators_that_stream_keep_their_state_alone():
    model, items = streaming_model(), named()
    wanted, stream = beginnings(model, items), TrackletStream(model)
    for had in feed(stream, items):
        check(stream, wanted, had)
    assert not any(track.frames for track in stream._tracks.values())
    model.aggregator.updates.clear()
    stream.update([items["b"].frames[0]] * 5, list(items))
    assert model.aggregator.updates == [5], "tracks go through the aggregator together"
    torch.testing.assert_close(embed(model, [items["b"]], frames_per_batch=4), embed(model, [items["b"]]), **CLOSE)
    assert len(model.aggregator.updates) == 1 + 6, "a tracklet longer than a batch goes in piece by piece"


def test_windows_keep_the_frames_of_one_window():
    model = build("attention", ClipConfig(6, stride=3))
    stream = TrackletStream(model)
    (item,) = tracklets((50,))
    for frame in item.frames:
        stream.update([frame], [0])
        assert len(stream._tracks[0].frames) <= 6
    # Each frame by itself: a view would keep the whole batch that it came in.
    assert stream._tracks[0].frames[0][0].untyped_storage().nbytes() == 4 * C


def test_a_track_that_would_have_to_keep_all_frames_keeps_every_second():
    model = build("attention", ClipConfig(5, test_sampling="chunks"))
    stream = TrackletStream(model, max_frames=10)
    (item,) = tracklets((100,))
    for n, frame in enumerate(item.frames, 1):
        stream.update([frame], [0])
        step = 1
        while len(range(0, n, step)) > 10:
            step *= 2
        if n in (10, 11, 12, 21, 64, 100):
            want = embed(model, [Tracklet(item.frames[:n:step], 1)])[0]
            torch.testing.assert_close(stream.embedding(0), want, **CLOSE)


def test_tracks_are_dropped():
    model, items = build(), named()
    stream = TrackletStream(model, max_tracks=2)
    frame = items["b"].frames[0]
    stream.update([frame, frame], ["a", "b"])
    stream.update([frame, frame], ["a", "c"])
    assert set(stream) == {"a", "c"}, "b was not seen for the longest time"
    assert "a" in stream
    stream.drop("a")
    assert "a" not in stream
    for call in (stream.drop, stream.embedding):
        with pytest.raises(KeyError, match="no track 'a'"):
            call("a")
    ids, rows = TrackletStream(model).embeddings()
    assert ids == []
    assert rows.shape == (0, C)


def test_crops_of_all_kinds(tmp_path):
    model = build()
    frame = tracklets((1,))[0].frames[0]
    Image.fromarray(frame).save(tmp_path / "frame.png")
    stream = TrackletStream(model)
    crops = [frame, Image.fromarray(frame), tmp_path / "frame.png", str(tmp_path / "frame.png")]
    stream.update(crops, range(4))
    ids, rows = stream.embeddings()
    assert torch.equal(rows, rows[:1].expand(4, -1))
    before = {key: stream.embedding(key) for key in ids}
    with pytest.raises(ImageError, match=r"missing\.png"):
        stream.update([frame, tmp_path / "missing.png"], [0, 9])
    with pytest.raises(ImageError, match="uint8"):
        stream.update([frame, frame.astype(float)], [0, 9])
    assert {key: stream.embedding(key).tolist() for key in stream} == {k: v.tolist() for k, v in before.items()}


def test_leaves_the_model_as_it_was():
    model = build().train()
    stream = TrackletStream(model)
    stream.update([tracklets((1,))[0].frames[0]], [0])
    embedding = stream.embedding(0)
    assert all(module.training for module in model.modules())
    assert embedding.dtype == torch.float32
    assert not embedding.is_inference()
    assert not embedding.requires_grad


def test_precision():
    model, items = build("attention"), named()
    streams = [TrackletStream(model, precision=precision) for precision in ("float32", "bfloat16")]
    for stream in streams:
        for _ in feed(stream, items):
            pass
    want, got = (stream.embeddings()[1] for stream in streams)
    assert 0 < (got - want).norm() / want.norm() < 0.02


def test_arguments_are_checked():
    model = build("attention", ClipConfig(6, test_sampling="chunks"))
    for options, said in [
        ({"max_frames": 5}, "max_frames must be at least 6"),
        ({"max_tracks": 0}, "max_tracks must be at least 1"),
        ({"precision": "int8"}, "precision must be one of"),
    ]:
        with pytest.raises(ValueError, match=said):
            TrackletStream(model, **options)
    with pytest.raises(TypeError, match="must be a TrackletModel"):
        TrackletStream(model.encoder)
    with pytest.raises(ValueError, match="2 crops and 1 ids"):
        TrackletStream(model).update([None, None], [1])


@pytest.mark.parametrize("channels", ["rgb", "bgr"])
@pytest.mark.parametrize("name", ["mean", "loga"])
def test_crop_embedder(name, channels):
    model = build(name)
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    boxes = [(10.4, 5.6, 30, 50), (-8, -8, 20, 20), (70, 50, 200, 90)]
    crops = [image[6:50, 10:30], image[:20, :20], image[50:, 70:]]
    got = crop_embedder(model, channels=channels)(image[..., ::-1] if channels == "bgr" else image, boxes)
    want = embed(model, [Tracklet([crop], 1) for crop in crops])
    torch.testing.assert_close(got, want, **CLOSE)


def test_boxes_outside_and_none():
    model = build()
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    embedder = crop_embedder(model)
    assert embedder(image, []).shape == embedder(image, np.zeros((0, 4))).shape == (0, C)
    assert np.array_equal(crop_boxes(image, [(100, 10, 120, 20)])[0], image[10:20, 79:])
    assert np.array_equal(crop_boxes(image, [(-20, 70, -10, 90)])[0], image[59:, :1])
    assert crop_boxes(image, [(5, 5, 5, 5)])[0].shape == (1, 1, 3)
    assert embedder(image, [(100, 100, 120, 120)]).isfinite().all()
    for boxes in ([(0, 0, float("nan"), 1)], [(0, 0, 1)], [1, 2, 3, 4]):
        with pytest.raises(ValueError, match="boxes must be finite numbers"):
            embedder(image, boxes)
    with pytest.raises(ValueError, match="uint8"):
        embedder(image.astype(float), [(0, 0, 1, 1)])
    with pytest.raises(ValueError, match="channels must be"):
        crop_embedder(model, channels="gbr")


def test_crops_share_passes_of_the_backbone(monkeypatch):
    monkeypatch.setattr(inference, "CPU_PASS", 10**6)
    model, items = build(), named()
    stream = TrackletStream(model)
    stream.update([items["b"].frames[i] for i in range(12)], ["a", "b", "c"] * 4)
    assert model.encoder.calls == [12]
