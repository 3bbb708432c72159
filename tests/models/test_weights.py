"""Weights from files: the model's own exactly, others as far as they fit."""

import pickle

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from temporal_agg.models import create_model, load_weights, read_checkpoint

SIZE = (64, 32)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("lstm_test_resnet", img_size=SIZE, hidden_features=8)


@pytest.fixture
def backbone():
    torch.manual_seed(1)
    return timm.create_model("test_resnet", num_classes=0).state_dict()


def encoder_of(model):
    return model.encoder.backbone.state_dict()


def test_what_fits_is_loaded_and_the_rest_reported(model, tmp_path):
    other = create_model("lstm_test_resnet", img_size=SIZE, hidden_features=9)
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({**other.state_dict(), "classifier.weight": torch.zeros(3)}, path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = load_weights(model, path, strict=False)
    assert report.unexpected == ("classifier.weight",)
    assert report.missing == ()
    assert set(report.mismatched) == {key for key in before if key.startswith("aggregator.")}
    assert set(report.loaded) | set(report.mismatched) == set(before)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key] if key in report.loaded else before[key])
    assert load_weights(model, path, strict=False) == report
    with pytest.raises(ValueError, match=r"1 unexpected: classifier\.weight"):
        load_weights(model, path)


@pytest.mark.parametrize(
    ("before", "wrapper"),
    [
        ("", None),  # torchreid, timm
        ("module.", "state_dict"),  # torchreid, from several GPUs
        ("backbone.", "model"),  # fast-reid
        ("module.backbone.", "model"),
        ("base.", None),  # the strong baseline
        ("model.cnn.base.", "state_dict"),
    ],
)
def test_backbone_weights_of_other_libraries(model, backbone, tmp_path, before, wrapper):
    head = {"classifier.weight": torch.zeros(5, 96), "heads.bnneck.0.bias": torch.zeros(96)}
    if before.startswith("module."):
        head = {f"module.{key}": value for key, value in head.items()}
    weights = {**{before + key: value for key, value in backbone.items()}, **head}
    path = tmp_path / "weights.pth"
    torch.save({wrapper: weights, "epoch": 3, "best": np.float64(0.5)} if wrapper else weights, path)
    aggregator = {key: value.clone() for key, value in model.aggregator.state_dict().items()}
    report = load_weights(model, path, strict=False)
    assert all(torch.equal(value, backbone[key]) for key, value in encoder_of(model).items())
    assert all(torch.equal(value, aggregator[key]) for key, value in model.aggregator.state_dict().items())
    assert set(report.loaded) == {f"encoder.backbone.{key}" for key in encoder_of(model)}
    assert set(report.missing) == {f"aggregator.{key}" for key in aggregator}
    assert {name.removeprefix("module.") for name in report.unexpected} == {
        "classifier.weight",
        "heads.bnneck.0.bias",
        *(before.removeprefix("module.") + key for key in set(backbone) - set(encoder_of(model))),
    }


def test_aggregators_load_their_own_weights(model, tmp_path):
    other = create_model("lstm_test_resnet", img_size=SIZE, hidden_features=8).aggregator.state_dict()
    safetensors.torch.save_file(other, tmp_path / "lstm.safetensors")
    report = load_weights(model, tmp_path / "lstm.safetensors", strict=False)
    assert len(report.loaded) == len(other)
    assert all(torch.equal(value, other[key]) for key, value in model.aggregator.state_dict().items())


def test_nothing_that_fits_is_an_error(model, tmp_path):
    torch.save({"w": torch.zeros(1), "epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"nothing in .*x\.pth fits the model: it has 1 tensors: w"):
        load_weights(model, tmp_path / "x.pth", strict=False)


class Evil:
    def __reduce__(self):
        return print, ("this ran",)


def test_no_code_in_a_file_is_run(model, tmp_path, capsys):
    for number, content in enumerate(({"w": Evil()}, {"state_dict": model.state_dict(), "optimizer": Evil()})):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        with pytest.raises(ValueError, match="more than tensors"):
            load_weights(model, path, strict=False)
    path = tmp_path / "pointer.pth"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"no file of torch\.save, it begins with b'version https.*git LFS"):
        read_checkpoint(path)
    path = tmp_path / "plain.pth"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="more than tensors"):
        read_checkpoint(path)
    assert "this ran" not in capsys.readouterr().out


def test_a_pickle_under_another_name_is_refused(model, tmp_path):
    for legacy in (True, False):
        model.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError, match="is a pickle"):
            create_model(f"local-dir:{tmp_path}")
        with pytest.raises(ValueError, match="is a pickle"):
            load_weights(model, path, strict=False)


def test_files_that_are_no_weights(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"only \.safetensors .*strict=False"):
        load_weights(model, tmp_path / "model.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"no complete torch\.save file"):
        load_weights(model, tmp_path / "half.pt", strict=False)
    torch.save(torch.zeros(1), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="no state dict, but Tensor"):
        load_weights(model, tmp_path / "tensor.pt", strict=False)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_weights(model, tmp_path / "none.pt", strict=False)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_weights(model, tmp_path)
