"""ONNX files against the models that they were made from, run by onnxruntime."""

import json

import onnxruntime
import pytest
import torch
from helpers import moved
from torch import nn

import temporal_agg
from temporal_agg import (
    Aggregator,
    ClipConfig,
    Details,
    TrackletModel,
    create_aggregator,
    create_model,
    export_onnx,
    list_aggregators,
)
from temporal_agg.aggregators.registry import aggregator_options

C, MAPS, FRAMES = 32, (4, 2), (32, 16)
SMALL = {"clip_length": 3, "hidden_features": 8}  # options, for those that have them

# Torch's own exporter imports modules that warn about each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def build(name, **options):
    torch.manual_seed(0)
    return moved(create_aggregator(name, C, **options))


def small(name):
    return {key: value for key, value in SMALL.items() if key in aggregator_options(name)}


def holes(B, T, seed=0):
    """A mask with a real frame or more in each clip, and padding anywhere."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=generator) < 0.6
    mask[torch.arange(B), torch.randint(T, (B,), generator=generator)] = True
    return mask


def run(path, **inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (embedding,) = session.run(["embedding"], {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(embedding)


def metadata(path):
    return onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map


def shapes(path):
    session = onnxruntime.InferenceSession(path)
    return {x.name: x.shape for x in (*session.get_inputs(), *session.get_outputs())}


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


QUICK = ("mean", "gem")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in list_aggregators()]
)
def test_every_aggregator(name, tmp_path):
    aggregator, path = build(name, **small(name)), tmp_path / "a.onnx"
    free = aggregator.clip_length is None and not aggregator.is_recurrent
    sizes = {"map_size": MAPS} if free or aggregator.needs_maps else {}
    if aggregator.needs_frames:
        sizes["frame_size"] = FRAMES
    export_onnx(aggregator, path, clip_length=None if free else 3, **sizes)

    length = "length" if free else 3
    want = {"features": ["batch", length, C, *sizes.get("map_size", ())], "mask": ["batch", length]}
    if aggregator.needs_frames:
        want["frames"] = ["batch", length, 3, *FRAMES]
    assert shapes(path) == {**want, "embedding": ["batch", aggregator.num_features]}
    about = {"architecture": name, "temporal_agg": temporal_agg.__version__}
    assert metadata(path) == {**about, "clip_length": "null" if free else "3"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]

    aggregator.eval()
    for B, T in ((1, 1), (5, 4)) if free else ((1, 3), (5, 3)):
        generator = torch.Generator().manual_seed(B)
        inputs = {key: torch.rand(B, T, *shape[2:], generator=generator) for key, shape in want.items()}
        inputs["mask"] = holes(B, T)
        with torch.no_grad():
            close(run(path, **inputs), aggregator(**inputs))
            inputs["mask"] = torch.ones(B, T, dtype=torch.bool)
            close(run(path, **inputs), aggregator(**inputs))


@pytest.mark.slow
def test_a_recurrent_file_serves_shorter_clips(tmp_path):
    aggregator, path = build("lstm").eval(), tmp_path / "a.onnx"
    export_onnx(aggregator, path)
    assert shapes(path)["features"] == ["batch", 4, C]  # its paper's clips
    features = torch.rand(2, 4, C)
    mask = torch.tensor([[True, True, False, False], [False, True, False, True]])
    with torch.no_grad():
        want = torch.cat([aggregator(x[None, m]) for x, m in zip(features, mask, strict=True)])
    close(run(path, features=features, mask=mask), want)


@pytest.fixture(scope="module")
def gltr():
    return moved(create_model("gltr_resnet10t", img_size=(64, 32), clip=ClipConfig(length=5, distance="dot")))


@pytest.mark.slow
def test_a_whole_model(gltr, tmp_path):
    path = tmp_path / "model.onnx"
    gltr.train()
    gltr.encoder.eval()
    before = {key: value.clone() for key, value in gltr.state_dict().items()}
    export_onnx(gltr, str(path))
    assert gltr.training  # the caller's model is left alone
    assert not gltr.encoder.training
    assert all(torch.equal(value, before[key]) for key, value in gltr.state_dict().items())

    assert shapes(path) == {
        "clips": ["batch", "length", 3, 64, 32],
        "mask": ["batch", "length"],
        "embedding": ["batch", gltr.num_features],
    }
    gltr.eval()
    for B, T in ((1, 1), (3, 4)):
        clips, mask = torch.randn(B, T, 3, 64, 32), holes(B, T)
        with torch.no_grad():
            close(run(path, clips=clips, mask=mask), gltr(clips, mask))
            garbage = clips.masked_fill(~mask[..., None, None, None], float("nan"))
            close(run(path, clips=garbage, mask=mask), gltr(clips, mask))

    about = metadata(path)
    assert about.pop("architecture") == "gltr_resnet10t"
    assert about.pop("temporal_agg") == temporal_agg.__version__
    config = gltr.data_config
    about = {key: json.loads(value) for key, value in about.items()}
    assert about["clip"].items() >= {"length": 5, "distance": "dot", "test_sampling": "dense"}.items()
    assert {key: about[key] for key in ("input_size", "mean", "std", "interpolation", "clip_length")} == {
        "input_size": [3, 64, 32],
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": config["interpolation"],
        "clip_length": None,
    }


@pytest.mark.slow
def test_optical_flow_is_an_input(tmp_path):
    model = moved(create_model("star_resnet10t", img_size=(32, 16), hidden_features=8, clip=ClipConfig(length=2)))
    path = tmp_path / "star.onnx"
    export_onnx(model, path, mask=False)
    assert list(shapes(path)) == ["clips", "flow", "embedding"]
    clips, flow = torch.randn(3, 2, 3, 32, 16), torch.randn(3, 2, 2, 32, 16)
    with torch.no_grad():
        want = model.eval()(clips, flow=flow)
        assert not torch.allclose(want, model(clips))
    close(run(path, clips=clips, flow=flow), want)


@pytest.mark.slow
def test_other_types_devices_and_wrappers_of_a_model(tmp_path):
    aggregator = build("attention").to(torch.float64)
    export_onnx(aggregator, tmp_path / "a.onnx", mask=False)
    features = torch.rand(2, 3, C)
    close(run(tmp_path / "a.onnx", features=features), aggregator(features.double()).float().detach())
    assert aggregator.score.weight.dtype == torch.float64
    with pytest.raises(TypeError, match=r"got DataParallel: pass the model itself, not a wrapper .*model.module"):
        export_onnx(nn.DataParallel(aggregator), tmp_path / "b.onnx")


class Frozen(Aggregator):
    """Looks at the data to choose its way: no graph can hold that."""

    def __init__(self):
        super().__init__(C, C)

    def aggregate(self, features, mask, frames):
        vectors = features if features.sum() > 0 else -features
        return Details(vectors.mean(1), mask, mask.float(), {}, {})


def test_what_does_not_export_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_text("old")
    with pytest.raises(RuntimeError, match=r"Frozen cannot be exported to ONNX: .*clip_length=") as error:
        export_onnx(Frozen(), path)
    assert error.value.__cause__ is not None
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.onnx", "old")]


@pytest.mark.slow
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.onnx"
    path.write_text("old")

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError("no space left on device")

    monkeypatch.setattr(type(path), "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        export_onnx(build("mean"), path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.onnx", "old")]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("loga", {"frame_size": FRAMES, "clip_length": 8}, "LOGA takes clips of exactly 10 frames, got clip_length=8"),
        ("mean", {"clip_length": 0}, "clips of at least one frame, got clip_length=0"),
        ("fgra", {}, r"FGRA wants maps: pass map_size=\(height, width\)"),
        ("loga", {}, r"LOGA reads the images too: pass frame_size=\(height, width\)"),
        ("gltr", {"frame_size": FRAMES}, "GLTR does not read the images: leave out frame_size"),
    ],
)
def test_sizes_that_do_not_fit(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_onnx(build(name), tmp_path / "a.onnx", **options)


def test_other_errors(gltr, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="a model has its own input size"):
        export_onnx(gltr, tmp_path / "a.onnx", map_size=MAPS)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        export_onnx(build("mean"), tmp_path / "nowhere" / "a.onnx")
    with pytest.raises(TypeError, match="got ReLU"):
        export_onnx(nn.ReLU(), tmp_path / "a.onnx")
    by_hand = type(build("lstm"))(C)
    with pytest.raises(ValueError, match="LSTM is recurrent: say for which clip_length"):
        export_onnx(by_hand, tmp_path / "a.onnx")
    with torch.device("meta"):
        huge = nn.Linear(30_000, 20_000)  # 2.4 GB
    with pytest.raises(ValueError, match=r"the weights take 2.4 GB, and an ONNX file holds 2 GB"):
        export_onnx(moved_into(build("mean"), huge), tmp_path / "a.onnx")
    with monkeypatch.context() as older:
        older.setattr(torch, "__version__", "2.8.1+cpu")
        with pytest.raises(ImportError, match=r"ONNX files need torch >= 2\.9, got 2\.8\.1"):
            export_onnx(build("mean"), tmp_path / "a.onnx")
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install temporal-agg\[export\]"):
        export_onnx(build("mean"), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def moved_into(aggregator, module):
    aggregator.extra = module
    return aggregator


class Attention(nn.Module):
    """Attention with a learned bias, as in BEiT and MaxViT."""

    num_features, data_config = 4, {"input_size": (3, 4, 2), "mean": (0, 0, 0), "std": (1, 1, 1)}

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(3, 12)
        self.bias = nn.Parameter(torch.randn(1, 2, 8, 8))

    def count(self, frames):
        return frames.shape[0]

    def forward(self, frames, flow=None):
        q, k, v = self.qkv(frames.flatten(2).mT).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        return x.transpose(1, 2).reshape(self.count(frames), 8, 4).mT.unflatten(2, (4, 2))


@pytest.mark.slow
def test_a_model_built_by_hand(tmp_path):
    model, path = TrackletModel(Attention(), create_aggregator("mean", 4)), tmp_path / "a.onnx"
    export_onnx(model, path)
    assert metadata(path)["architecture"] == "mean on Attention"
    clips, mask = torch.rand(4, 2, 3, 4, 2), holes(4, 2)
    close(run(path, clips=clips, mask=mask), model(clips, mask).detach())


class FusedAttention(nn.Module):
    """Attention within windows, rank 5, with the switch that timm's models have."""

    num_features, data_config, fused_attn = 3, Attention.data_config, True

    def forward(self, frames, flow=None):
        x = frames.flatten(2).mT.unflatten(1, (2, 4))[:, None]
        if self.fused_attn:
            y = nn.functional.scaled_dot_product_attention(x, x, x)
        else:
            y = (x @ x.mT / 3**0.5).softmax(-1) @ x
        return y[:, 0].flatten(1, 2).mT.unflatten(2, (4, 2))


@pytest.mark.slow
def test_fused_attention_is_switched_off(tmp_path):
    model, path = TrackletModel(FusedAttention(), create_aggregator("mean", 3)), tmp_path / "a.onnx"
    export_onnx(model, path)
    assert model.encoder.fused_attn
    clips, mask = torch.rand(4, 2, 3, 4, 2), holes(4, 2)
    close(run(path, clips=clips, mask=mask), model(clips, mask))


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Attention, "count", lambda self, frames: len(frames))  # torch takes that for a constant
    model = TrackletModel(Attention(), create_aggregator("mean", 4))
    with pytest.raises(RuntimeError, match=r"take sizes from x.shape \(len\(x\) would be fixed"):
        export_onnx(model, tmp_path / "a.onnx")
    monkeypatch.setattr(Attention, "count", lambda self, frames: frames.shape[0])
    monkeypatch.setattr(
        onnxruntime.InferenceSession,
        "run",
        lambda self, names, inputs: [0.99 * inputs["clips"][:, 0, 0].mean((1, 2))[:, None]],
    )
    with pytest.raises(RuntimeError, match="mean on Attention cannot be exported") as error:
        export_onnx(model, tmp_path / "a.onnx")
    assert "onnxruntime's embeddings differ from torch's" in str(error.value.__cause__)
    assert list(tmp_path.iterdir()) == []
