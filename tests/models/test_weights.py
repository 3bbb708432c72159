"""Weights from files: the model's own exactly, others as far as they fit."""

import _codecs
import argparse
import copy
import pickle
import time
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from versions import TORCH, needs_exporter, needs_torch

from temporal_agg.models import create_model, load_weights, read_checkpoint, unwrap

SIZE = (64, 32)


@pytest.fixture(scope="module")
def built():
    torch.manual_seed(0)
    return create_model("lstm_test_resnet", img_size=SIZE, hidden_features=8)


@pytest.fixture
def model(built):
    return copy.deepcopy(built)


@pytest.fixture(scope="module")
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
    torch.save(
        {wrapper: weights, "epoch": 3, "best": np.float64(0.5) if TORCH >= (2, 4) else 0.5} if wrapper else weights,
        path,
    )
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


CHECKPOINTS = {  # what other libraries' trainings leave behind, by what they write
    "deep_sort_pytorch": lambda w: {"net_dict": w, "acc": 88.1, "epoch": 39},
    "PyTorch's tutorial": lambda w: {"epoch": 3, "model_state_dict": w, "optimizer_state_dict": {"state": {0: w}}},
    "an average of the weights": lambda w: {"state_dict": w, "state_dict_ema": {k: v + 1 for k, v in w.items()}},
    "a teacher and a student": lambda w: {
        "student": {f"module.{k}": v + 1 for k, v in w.items()},
        "teacher": {f"backbone.{k}": v for k, v in w.items()},
    },
    "compiled in DataParallel": lambda w: {f"_orig_mod.module.{k}": v for k, v in w.items()},
    "DataParallel of compiled": lambda w: {"model": {f"module._orig_mod.{k}": v for k, v in w.items()}},
    "a compiled part": lambda w: {f"net.encoder._orig_mod.{k}": v for k, v in w.items()},
    "a part in DataParallel": lambda w: {f"net.encoder.module.{k}": v for k, v in w.items()},
    "a name of its own": lambda w: {"something": {"else": w}, "epoch": 3},
    "parts": lambda w: {"encoder": w, "classifier": {"weight": torch.zeros(3, 96)}},
    "NumPy numbers": lambda w: {
        "state_dict": w,
        "best": np.float32(0.5),
        "rank1": np.float64(0.5),
        "epoch": np.int64(3),
        "done": np.bool_(True),
        "name": np.str_("x"),
        "cmc": np.array([0.5, 0.7]),
        "names": np.array(["a"]),
    },
    "NumPy arrays": lambda w: {"state_dict": {k: np.asfortranarray(v.numpy()) for k, v in w.items()}},
    "itself inside": lambda w: contained(dict(w)),
}


def contained(checkpoint):
    checkpoint["model"] = checkpoint["other"] = checkpoint
    return checkpoint


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=needs_torch("2.4", k)) if k.startswith("NumPy") else k for k in CHECKPOINTS]
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_checkpoints_of_others(model, backbone, tmp_path, kind, legacy):
    torch.save(CHECKPOINTS[kind](backbone), tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    load_weights(model, tmp_path / "x.pth", strict=False)
    assert all(torch.equal(value, backbone[key]) for key, value in encoder_of(model).items())


def test_of_two_networks_of_one_shape_one_has_to_be_named(model, backbone, tmp_path, caplog):
    both = {f"{name}.{k}": v + i for i, name in enumerate(("student", "teacher")) for k, v in backbone.items()}
    for content in ({"state_dict": both}, both, {"student": {"a": 1}, **both}):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=r"x\.pth holds two networks .*'student\.' and 'teacher\.'.*prefix="):
            load_weights(model, tmp_path / "x.pth", strict=False)
        load_weights(model, tmp_path / "x.pth", strict=False, prefix="teacher.")
        assert all(torch.equal(value, backbone[key] + 1) for key, value in encoder_of(model).items())
    torch.save({"state_dict": backbone, "state_dict_ema": both}, tmp_path / "x.pth")
    load_weights(model, tmp_path / "x.pth", strict=False)
    assert "those of 'state_dict'; it also has 'state_dict_ema', which prefix='state_dict_ema.' takes" in caplog.text
    load_weights(model, tmp_path / "x.pth", strict=False, prefix="state_dict_ema.teacher.")
    assert all(torch.equal(value, backbone[key] + 1) for key, value in encoder_of(model).items())
    with pytest.raises(ValueError, match=r"nothing behind the prefix 'x\.'; its names begin with .*state_dict_ema\."):
        load_weights(model, tmp_path / "x.pth", strict=False, prefix="x.")


COMPILED = pytest.param(partial(torch.compile, backend="eager"), marks=needs_exporter, id="compile")


@pytest.mark.parametrize("wrap", [pytest.param(nn.DataParallel, id="parallel"), COMPILED])
def test_wrapped_models_are_taken(model, tmp_path, wrap):
    want = {key: value + 1 for key, value in model.state_dict().items()}
    safetensors.torch.save_file(want, tmp_path / "x.safetensors")
    assert unwrap(nn.DataParallel(wrap(model))) is unwrap(wrap(nn.DataParallel(model))) is model
    model.encoder = wrap(model.encoder)
    report = load_weights(nn.DataParallel(model), tmp_path / "x.safetensors")
    assert report.loaded == tuple(want)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), want.values(), strict=True))


@pytest.mark.parametrize("change", ["bool", "int8", "complex64", "nan", "inf", "too large"])
def test_weights_that_are_no_numbers_of_a_model(model, tmp_path, change):
    def changed(x):
        if not x.is_floating_point():
            return x
        if hasattr(torch, change) and isinstance(getattr(torch, change), torch.dtype):
            return x.to(getattr(torch, change))
        return torch.full_like(x, 1e300, dtype=torch.float64) if change == "too large" else x * 0 + float(change)

    if change == "complex64" and torch.complex64 not in safetensors.torch._SIZE:
        pytest.skip(f"safetensors {safetensors.__version__} writes no complex numbers")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({key: changed(value) for key, value in before.items()}, path)
    message = (
        f"{change} for .* float32" if hasattr(torch, change) and change not in ("nan", "inf") else "NaN or infinite"
    )
    with pytest.raises(ValueError, match=rf"x\.safetensors.*{message}"):
        load_weights(model, path)
    if "NaN" in message:
        with pytest.raises(ValueError, match=rf"{message}.*Nothing was loaded"):
            load_weights(model, path, strict=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_half_precision_is_taken(model, tmp_path):
    half = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    safetensors.torch.save_file(half, tmp_path / "x.safetensors")
    load_weights(model, tmp_path / "x.safetensors")
    assert all(torch.equal(value, half[key].to(value.dtype)) for key, value in model.state_dict().items())


def test_the_report_prints_short(model, backbone, tmp_path):
    torch.save(backbone, tmp_path / "x.pth")
    report = load_weights(model, tmp_path / "x.pth", strict=False)
    assert len(repr(report)) < 300
    assert repr(report).startswith(f"LoadReport({len(report.loaded)} loaded; 3 missing: aggregator.")


def test_nothing_that_fits_is_an_error(model, tmp_path):
    torch.save({"w": torch.zeros(1), "epoch": 3}, tmp_path / "x.pth")
    message = r"nothing in .*x\.pth fits the model: it has 1 tensors: w \(2 top-level keys: w, epoch\)"
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "x.pth", strict=False)
    torch.save({"weights": [torch.zeros(1)], "epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"it has no tensors \(2 top-level keys: weights, epoch\)"):
        load_weights(model, tmp_path / "x.pth", strict=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to(torch.complex64),
        lambda x: x.to_sparse(),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        lambda x: x.to("meta"),
    ],
    ids=["complex", "sparse", "quantized", "meta"],
)
def test_numbers_that_are_not_stored_plainly_do_not_fit(model, tmp_path, change):
    """Also not where the counters of BatchNorm, which are integers, would."""
    state = {key: change(value) if value.is_floating_point() else value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    said = r"nothing in .*x\.pth fits the model: .* of another shape or kind are encoder"
    if TORCH < (2, 4):  # its reader refuses quantised tensors itself
        said += r"|x\.pth holds more than tensors \(torch\._utils\._rebuild_qtensor\)"
    with pytest.raises(ValueError, match=said):
        load_weights(model, tmp_path / "x.pth", strict=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Encoded:
    """What the unpickler of torch would do for any file: encode a text by a codec of the file's choice."""

    def __reduce__(self):
        return _codecs.encode, ("ab" * 1_000_000, "punycode")


@needs_torch("2.4", "what the unpickler allows can be listed")
def test_hostile_files_end_at_once(tmp_path):
    nested = {"w": torch.ones(2)}
    for _ in range(60):  # 2 ** 60 ways through it
        nested = {"a": nested, "b": nested}
    torch.save(nested, tmp_path / "shared.pth")
    torch.save({"x": Encoded(), "w": torch.ones(2)}, tmp_path / "codec.pth")
    start = time.process_time()
    read_checkpoint(tmp_path / "shared.pth")
    with pytest.raises(ValueError, match=r"codec\.pth holds more than tensors \(_codecs\.encode\)"):
        read_checkpoint(tmp_path / "codec.pth")
    assert time.process_time() - start < 60, "it would be hours"
    # The next file is read by torch's own rules again.
    assert torch._weights_only_unpickler._get_allowed_globals()["_codecs.encode"] is _codecs.encode


def test_a_state_dict_is_no_path(model):
    with pytest.raises(TypeError, match="got OrderedDict: a state dict of your own goes into"):
        load_weights(model, model.state_dict())


def test_what_is_refused_is_named(tmp_path):
    torch.save({"model": {}, "args": argparse.Namespace(lr=0.1)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth holds more than tensors \(argparse\.Namespace\)"):
        read_checkpoint(tmp_path / "x.pth")
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "x.pt"))
    with pytest.raises(ValueError, match=r"x\.pt is a TorchScript archive"):
        read_checkpoint(tmp_path / "x.pt")


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


def test_safetensors_under_another_name_are_read(model, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    safetensors.torch.save_file(model.state_dict(), path)
    assert load_weights(model, path, strict=False).missing == ()


def test_a_plain_pickle_is_named(model, tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"fc.weight": [0.0] * 10}, protocol=4))
    with pytest.raises(ValueError, match=r"model\.pkl .*\(it was written by pickle, not by torch\.save\)"):
        load_weights(model, path, strict=False)


def test_a_prefix_is_a_string(model, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(model.state_dict(), path)
    with pytest.raises(TypeError, match=r"prefix must be a string, .*model\.pth, got 3"):
        load_weights(model, path, strict=False, prefix=3)
