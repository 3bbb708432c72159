import inspect
import socket

import pytest
import timm
import torch

from temporal_agg.aggregators import ClipConfig, create_aggregator, list_aggregators, register_aggregator, registry
from temporal_agg.aggregators.pooling import Mean
from temporal_agg.aggregators.registry import aggregator_options
from temporal_agg.models import (
    FrameEncoder,
    StarEncoder,
    TrackletModel,
    create_encoder,
    create_model,
    list_models,
)

SIZE = (64, 32)


@pytest.fixture
def offline(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"tried to connect to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_names_are_aggregator_and_backbone(offline):
    model = create_model("gltr_released_test_resnet", img_size=SIZE)
    assert isinstance(model, TrackletModel)
    assert model.aggregator.config["name"] == "gltr_released"
    assert model.encoder.config["backbone"] == "test_resnet"
    model = create_model("mean_test_resnet.r160_in1k", img_size=SIZE)
    assert model.encoder.config["backbone"] == "test_resnet.r160_in1k"


def test_star_is_an_encoder_and_gsta():
    model = create_model("star_test_resnet", img_size=SIZE, flow=False)
    assert isinstance(model.encoder, StarEncoder)
    assert model.aggregator.config["name"] == "gsta"
    with pytest.raises(ValueError, match="gsta_"):
        create_model("star_test_convnext", img_size=SIZE)


def test_lsta_is_a_backbone_for_any_aggregator():
    model = create_model("mean_lsta_test_resnet", img_size=SIZE, variant="se", flow=False)
    assert isinstance(model.encoder, StarEncoder)
    assert model.encoder.config["backbone"] == "lsta_test_resnet"
    assert [block.variant for block in model.encoder.lsta] == ["se"] * 4
    assert type(create_encoder(**model.encoder.config)) is StarEncoder
    star, gsta = (create_model(f"{name}_test_resnet", img_size=SIZE) for name in ("star", "gsta_lsta"))
    assert star.encoder.config == gsta.encoder.config
    assert star.aggregator.config == gsta.aggregator.config
    assert star.clip == gsta.clip
    with pytest.raises(ValueError, match=r"did you mean .*'lsta_resnet50'"):
        create_model("mean_lsta_resnet5")
    with pytest.raises(ValueError, match=r"built by StarEncoder: create_encoder"):
        FrameEncoder("lsta_resnet18")


def test_of_names_that_begin_alike_the_longest_wins_whose_rest_is_a_backbone(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    for name in ("mean_test", "star_test", "mean_lsta"):
        register_aggregator(name)(Mean)
    for name, aggregator, backbone in (
        ("mean_test_resnet", "mean", "test_resnet"),  # "resnet" is no model of timm
        ("mean_test_resnet18", "mean_test", "resnet18"),
        ("mean_test_test_resnet.r160_in1k", "mean_test", "test_resnet.r160_in1k"),
        ("star_test_resnet", "gsta", "lsta_test_resnet"),
        ("star_test_test_resnet", "star_test", "test_resnet"),
        ("mean_lsta_test_resnet", "mean_lsta", "test_resnet"),
    ):
        model = create_model(name, img_size=SIZE)
        assert (model.aggregator.config["name"], model.encoder.config["backbone"]) == (aggregator, backbone)


def test_options_reach_their_part():
    model = create_model(
        "lstm_test_resnet",
        img_size=SIZE,
        last_stride=1,
        backbone_kwargs={"drop_path_rate": 0.1},
        hidden_features=7,
        clip={"length": 5, "distance": "dot"},
    )
    assert model.encoder.config == {
        "backbone": "test_resnet",
        "last_stride": 1,
        "img_size": list(SIZE),
        "backbone_kwargs": {"drop_path_rate": 0.1},
    }
    assert model.num_features == 7
    assert model.clip == ClipConfig(length=5, distance="dot")
    assert create_model("mean_test_resnet", img_size=SIZE, clip=ClipConfig(length=2)).clip.length == 2
    loga = create_model("loga_test_resnet", img_size=SIZE, clip={"length": 6})
    assert loga.clip.length == loga.aggregator.clip_length == 6
    clip = create_model("loga_test_resnet", img_size=SIZE, clip_length=4, clip={"distance": "dot"}).clip
    assert (clip.length, clip.distance) == (4, "dot")


@pytest.mark.parametrize("name", list_aggregators())
def test_no_aggregator_option_hides_one_of_the_encoders(name):
    taken = {*inspect.signature(create_model).parameters, "clip"} - {"kwargs"}
    taken |= set(inspect.signature(StarEncoder).parameters)
    assert not taken & set(aggregator_options(name))


@pytest.mark.parametrize(
    ("name", "kwargs", "stride"),
    [
        ("loga_test_resnet", {}, 1),
        ("loga_test_resnet", {"last_stride": 2}, None),
        ("loga_test_resnet", {"backbone_kwargs": {"output_stride": 16}}, None),
        ("loga_test_convnext", {}, None),
        ("mean_test_resnet", {}, None),
        ("mean_test_resnet", {"last_stride": 1}, 1),
    ],
)
def test_the_papers_last_stride_where_there_is_one(name, kwargs, stride):
    assert create_model(name, img_size=SIZE, **kwargs).encoder.config["last_stride"] == stride


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match=r"no option foo\. Its encoder has: last_stride, img_size.*hidden_features"):
        create_model("lstm_test_resnet", foo=1)
    with pytest.raises(TypeError, match=r"no option flow"):
        create_model("mean_test_resnet", flow=False)
    with pytest.raises(TypeError, match=r"clip has no field len; it has: length"):
        create_model("mean_test_resnet", img_size=SIZE, clip={"len": 1})
    with pytest.raises(ValueError, match="last stride"):
        create_model("mean_test_convnext", img_size=SIZE, last_stride=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mean_resnet5", "did you mean .*'resnet50'"),
        ("meen_resnet50", "did you mean 'mean_resnet50'"),
        ("resnet50", "for example mean_resnet50"),
        ("gltr", "for example gltr_resnet50"),
        ("owner/name", "'hf-hub:<owner>/<repo>'.*'local-dir:<path>'"),
        ("~model", "'local-dir:<path>'"),
        ("mean_resnet50.nothing", "no weights tagged 'nothing'"),
    ],
)
def test_unknown_names_get_help(name, message):
    with pytest.raises(ValueError, match=message):
        create_model(name)


def test_checkpoints_load_without_backbone_weights(tmp_path, offline):
    torch.manual_seed(0)
    want = create_model("mean_test_resnet", img_size=SIZE)
    want.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        got = create_model("mean_test_resnet", img_size=SIZE, checkpoint_path=path, backbone_pretrained=True)
        assert all(torch.equal(a, b) for a, b in zip(got.parameters(), want.parameters(), strict=True))


def test_a_checkpoint_of_other_options_is_said(tmp_path, caplog):
    small = {"img_size": SIZE, "embed_features": 8}
    create_model("gltr_test_resnet", normalize="softmax", **small).save_pretrained(tmp_path)
    create_model("gltr_test_resnet", checkpoint_path=tmp_path, **{**small, "img_size": (32, 32)})
    assert caplog.text == ""
    create_model("gltr_test_resnet", normalize="none", checkpoint_path=tmp_path, **small)
    assert "trained with other options: aggregator.normalize is 'none', there 'softmax'" in caplog.text


def test_a_file_for_the_backbone(tmp_path, offline, caplog, monkeypatch):
    theirs = timm.create_model("test_resnet", num_classes=7).state_dict()
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save({"state_dict": {f"module.{key}": value for key, value in theirs.items()}}, tmp_path / "all.pth")
    with caplog.at_level("INFO"):
        model = create_model("star_test_resnet", img_size=SIZE, backbone_weights="~/all.pth")
    own = model.encoder.backbone.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in own.items())
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert f"{len(own)} loaded; 0 missing; 2 unexpected: fc.weight, fc.bias; 0 mismatched" in record.getMessage()

    caplog.clear()
    some = dict(theirs)
    del some["layer1.0.conv1.weight"]
    torch.save(some, tmp_path / "some.pth")
    create_model("mean_test_resnet", img_size=SIZE, backbone_weights=tmp_path / "some.pth")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "1 missing: layer1.0.conv1.weight" in caplog.text

    torch.save({key: value for key, value in theirs.items() if "layer4" not in key}, tmp_path / "few.pth")
    with pytest.raises(ValueError, match=r"few\.pth fits \d+ % of ResNet only.*missing: layer4"):
        create_model("mean_test_resnet", img_size=SIZE, backbone_weights=tmp_path / "few.pth")
    for other in ({"backbone_pretrained": True}, {"pretrained": True}, {"checkpoint_path": "x"}):
        with pytest.raises(ValueError, match="pass one of them"):
            create_model("mean_test_resnet", img_size=SIZE, backbone_weights="x", **other)
    with pytest.raises(TypeError, match="comes with its weights"):
        create_model("local-dir:x", backbone_weights="x")


def test_backbone_weights_come_from_timm(monkeypatch):
    asked = []
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained, **kwargs: (asked.append(pretrained), create(name, **kwargs))[1]
    )
    create_model("mean_test_resnet", img_size=SIZE, backbone_pretrained=True)
    create_model("mean_test_resnet", img_size=SIZE)
    # An argument that this family does not have is tried first.
    assert asked == [True, True, False, False]


def test_saved_models_by_name(tmp_path):
    torch.manual_seed(0)
    model = create_model("mean_test_resnet", img_size=SIZE).eval()
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 3, *SIZE)
    assert torch.equal(create_model(f"local-dir:{tmp_path}")(x), model(x))
    with pytest.raises(TypeError, match="comes with its weights and options"):
        create_model(f"local-dir:{tmp_path}", last_stride=1)
    with pytest.raises(ValueError, match="revision goes with hf-hub"):
        create_model(f"local-dir:{tmp_path}", revision="v1")
    with pytest.raises(ValueError, match="revision goes with hf-hub"):
        create_model("mean_test_resnet", revision="v1")
    with pytest.raises(TypeError, match=r"named by a string.*'local-dir:<path>'"):
        create_model(tmp_path)


def test_a_directory_is_found_however_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    model = create_model("mean_test_resnet", img_size=SIZE)
    model.save_pretrained("~/here")
    assert (tmp_path / "here" / "config.json").is_file()
    weight = model.encoder.backbone.conv1[0].weight
    for name in ("local-dir:~/here", f"local-dir:{tmp_path}/here"):
        for got in (
            create_model(name),
            TrackletModel.from_pretrained(name),
            TrackletModel.from_pretrained(name.removeprefix("local-dir:")),
            create_model("mean_test_resnet", img_size=SIZE, checkpoint_path=name),
        ):
            assert torch.equal(got.encoder.backbone.conv1[0].weight, weight)


def test_listed_models_exist():
    names = list_models()
    assert names == sorted(set(names))
    assert {"loga_resnet50", "gltr_convnext_tiny", "gltr_released_resnet50", "star_resnet50"} <= set(names)
    assert list_models("gltr_[!r]*net50") == ["gltr_lsta_resnet50"]
    assert list_models("gltr_resnet*") == ["gltr_resnet18", "gltr_resnet50"]
    assert all(timm.is_model(name.removeprefix("mean_").removeprefix("lsta_")) for name in list_models("mean_*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models("mean_*"))
def test_listed_backbones_work(name):
    model = create_model(name).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 2, *model.data_config["input_size"])).isfinite().all()


def test_every_aggregator_takes_the_channels_of_large_backbones():
    for name in list_aggregators():
        with torch.device("meta"):
            assert create_aggregator(name, 2048).in_features == 2048


@pytest.mark.slow
@pytest.mark.parametrize("backbone", sorted(name.removeprefix("mean_") for name in list_models("mean_*")))
def test_every_prefix_works_on_every_listed_backbone(backbone):
    """One encoder for all of them, at maps of its own shape; what create_model adds to that is tested above."""
    encoder = create_encoder(backbone).eval()
    with torch.no_grad():
        maps = encoder(torch.randn(2, 3, *encoder.data_config["input_size"][1:]))
        for prefix in list_aggregators():
            aggregator = create_aggregator(prefix, encoder.num_features).eval()
            T = aggregator.clip_length or 2
            clip = maps[:1].expand(T, -1, -1, -1)[None].clone()
            frames = torch.randn(1, T, 3, *encoder.data_config["input_size"][1:])
            embedding = aggregator(clip, frames=frames if aggregator.needs_frames else None)
            assert embedding.shape == (1, aggregator.num_features)
            assert embedding.isfinite().all(), prefix
