import json

import pytest
import safetensors.torch
import torch

from temporal_agg.aggregators import ClipConfig, create_aggregator
from temporal_agg.aggregators.pooling import Mean
from temporal_agg.models import FrameEncoder, TrackletModel, create_model, hub

SIZE = (64, 32)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("lstm_test_resnet", img_size=SIZE, hidden_features=8, clip={"length": 3}).eval()


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def edit(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


def test_config_says_how_to_build_it(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["architecture"] == "lstm_test_resnet"
    assert config["encoder"] == {
        "type": "frame",
        "backbone": "test_resnet",
        "last_stride": None,
        "img_size": list(SIZE),
        "backbone_kwargs": {},
    }
    assert config["aggregator"] == {"name": "lstm", "in_features": 96, "hidden_features": 8}
    assert config["clip"]["length"] == 3
    assert set(config["versions"]) == {"temporal_agg", "timm", "torch"}
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_loaded_options_and_preprocessing_are_those_saved(saved):
    edit(saved, data_config={"input_size": [3, 64, 32], "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]})
    model = TrackletModel.from_pretrained(str(saved))
    assert model.num_features == 8
    assert model.clip == ClipConfig(length=3)
    assert model.data_config["mean"] == (0.1, 0.2, 0.3)


def test_channels_last_weights_are_saved(model, tmp_path):
    want = {k: v.clone() for k, v in model.state_dict().items()}
    model.to(memory_format=torch.channels_last).save_pretrained(tmp_path)
    loaded = TrackletModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in want.items())


@pytest.mark.parametrize("where", ["writing", "renaming"])
def test_a_broken_save_leaves_what_was_there(model, saved, monkeypatch, where):
    before = (saved / "model.safetensors").read_bytes()

    def write_half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    def refuse(source, target):
        raise KeyboardInterrupt

    if where == "writing":
        monkeypatch.setattr(safetensors.torch, "save_file", write_half)
    else:
        monkeypatch.setattr(hub.os, "replace", refuse)
        torch.nn.init.zeros_(next(model.parameters()))
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_weights_must_fit(model, saved, tmp_path):
    path = saved / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    first = weights.pop("encoder.backbone.conv1.0.weight")
    safetensors.torch.save_file({**weights, "extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"1 missing: encoder.backbone.conv1.0.weight; 1 unexpected: extra"):
        TrackletModel.from_pretrained(saved)
    safetensors.torch.save_file({**weights, "encoder.backbone.conv1.0.weight": first[1:]}, path)
    with pytest.raises(ValueError, match=r"1 of another shape: encoder.backbone.conv1.0.weight \["):
        TrackletModel.from_pretrained(saved)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no complete safetensors file"):
        TrackletModel.from_pretrained(saved)


def test_only_safetensors_is_loaded(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"only \.safetensors"):
        hub.load_weights(model, tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        hub.load_weights(model, tmp_path)


def test_models_built_by_hand_say_how_to_build_them(model, tmp_path):
    backbone = FrameEncoder("test_resnet", img_size=SIZE).backbone
    by_hand = TrackletModel(FrameEncoder(backbone, img_size=SIZE), create_aggregator("mean", 96))
    with pytest.raises(ValueError, match=r'FrameEncoder\("resnet50"\)'):
        by_hand.save_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match="create_aggregator"):
        TrackletModel(model.encoder, Mean(96)).save_pretrained(tmp_path / "new")
    odd = FrameEncoder("test_resnet", img_size=SIZE, backbone_kwargs={"act_layer": torch.nn.ReLU})
    with pytest.raises(ValueError, match=r"config\.json cannot hold"):
        TrackletModel(odd, create_aggregator("mean", 96)).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "of format 1, got format 2"),
        ({"format": None}, "another library"),
        ({"unknown": 1}, r"unknown keys: \['unknown'\]"),
        ({"encoder": {"type": "other"}}, "unknown encoder type 'other'"),
        ({"encoder": {"type": "frame", "backbone": "test_resnet", "new": 1}}, "does not fit this version .*new"),
        ({"aggregator": {"name": "lstm", "in_features": 96, "new": 1}}, "no option new"),
        ({"aggregator": {"name": "lstn", "in_features": 96}}, "did you mean 'lstm'"),
        ({"clip": {"new": 1}}, "does not fit this version .*new"),
    ],
)
def test_configs_are_checked(saved, changes, message):
    edit(saved, **changes)
    with pytest.raises(ValueError, match=message):
        TrackletModel.from_pretrained(saved)


def test_broken_and_missing_files(saved):
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        TrackletModel.from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        TrackletModel.from_pretrained(saved)
    with pytest.raises(FileNotFoundError, match=r"hf-hub:<owner>/<repo>"):
        TrackletModel.from_pretrained("owner/name")


def test_a_config_cannot_ask_for_downloads(saved, monkeypatch):
    config = json.loads((saved / "config.json").read_text())
    edit(saved, encoder={**config["encoder"], "pretrained": True})
    asked = []
    create = hub.FrameEncoder.__init__
    monkeypatch.setattr(
        hub.FrameEncoder, "__init__", lambda self, *a, **k: (asked.append(k["pretrained"]), create(self, *a, **k))[1]
    )
    TrackletModel.from_pretrained(saved)
    assert asked == [False]


def test_hub_names(saved, monkeypatch):
    asked = []

    def download(repo, name, *, revision, cache_dir):
        asked.append((repo, name, revision, cache_dir))
        return str(saved / name)

    monkeypatch.setattr(hub.huggingface_hub, "hf_hub_download", download)
    assert create_model("hf-hub:owner/name@v1", cache_dir="there").num_features == 8
    assert asked == [("owner/name", file, "v1", "there") for file in ("config.json", "model.safetensors")]
    TrackletModel.from_pretrained("hf-hub:owner/name", revision="v2")
    assert asked[-1] == ("owner/name", "model.safetensors", "v2", None)
    with pytest.raises(ValueError, match="two revisions"):
        create_model("hf-hub:owner/name@v1", revision="v2")
