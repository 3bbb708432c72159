"""Models to and from directories and, by huggingface_hub's own client, a Hub on this machine."""

import contextlib
import hashlib
import inspect
import json
import os
import shutil
import signal
import socket
import sys
from functools import partial

import pytest
import safetensors.torch
import timm
import torch
from hub_client import Client, ClientError
from torch import nn
from versions import needs_exporter

import temporal_agg
from temporal_agg._files import Busy, locked
from temporal_agg.aggregators import ClipConfig, create_aggregator, list_aggregators
from temporal_agg.aggregators.pooling import Mean
from temporal_agg.aggregators.registry import aggregator_options
from temporal_agg.models import FrameEncoder, StarEncoder, TrackletModel, create_model, hub, manifest
from temporal_agg.models.config import build, describe

SIZE = (64, 32)
ENCODER = {"backbone": "test_resnet", "last_stride": None, "img_size": SIZE, "backbone_kwargs": {}}
DATA = {"input_size": [3, *SIZE], "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "interpolation": "bilinear"}


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
        "backbone": "test_resnet",
        "last_stride": None,
        "img_size": list(SIZE),
        "backbone_kwargs": {},
    }
    assert config["aggregator"] == {"name": "lstm", "in_features": 96, "hidden_features": 8}
    assert config["clip"]["length"] == 3
    assert set(config["versions"]) == {"temporal_agg", "timm", "torch"}
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_weights_say_what_they_are_and_equal_models_are_equal_files(model, saved, tmp_path):
    with safetensors.safe_open(saved / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata.pop("torch") == torch.__version__
    assert metadata.pop("weights") == json.loads((saved / "config.json").read_text())["weights"]
    assert metadata == {
        "architecture": "lstm_test_resnet",
        "format": "pt",
        "library": "temporal_agg",
        "temporal_agg": temporal_agg.__version__,
        "timm": timm.__version__,
    }
    first = (saved / "model.safetensors").read_bytes()
    for _ in range(3):
        model.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize("name", list_aggregators())
def test_every_argument_of_an_aggregator_is_in_the_config_and_comes_back(name):
    encoder = FrameEncoder("test_resnet", img_size=SIZE)
    model = TrackletModel(encoder, create_aggregator(name, encoder.num_features))
    config = json.loads(json.dumps(describe(model)))["aggregator"]
    assert set(config) == {"name", "in_features", *aggregator_options(name)}
    again = create_aggregator(**config).state_dict()
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in model.aggregator.state_dict().items()}


@pytest.mark.parametrize("cls", [FrameEncoder, StarEncoder])
def test_every_argument_of_an_encoder_is_in_the_config(cls, tmp_path):
    encoder = cls("test_resnet", img_size=SIZE)
    arguments = set(inspect.signature(cls).parameters) - {"pretrained", "grad_checkpointing"}
    assert set(encoder.config) == arguments
    model = TrackletModel(encoder, create_aggregator("mean", 96))
    del encoder.config["img_size"]
    with pytest.raises(ValueError, match=r"would not say all .*encoder\.img_size"):
        model.save_pretrained(tmp_path)


def test_loaded_options_and_preprocessing_are_those_saved(saved):
    edit(saved, data_config=DATA)
    model = TrackletModel.from_pretrained(str(saved))
    assert model.num_features == 8
    assert model.clip == ClipConfig(length=3)
    assert model.data_config["mean"] == (0.1, 0.2, 0.3)


def test_channels_last_weights_are_saved(model, tmp_path):
    want = {k: v.clone() for k, v in model.state_dict().items()}
    model.to(memory_format=torch.channels_last).save_pretrained(tmp_path)
    loaded = TrackletModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in want.items())


def test_a_directory_whose_name_is_no_utf8(model, odd_folder):
    """safetensors does not open it, and a save that cannot read its weights again would take its config away."""
    model.save_pretrained(odd_folder)
    assert sorted(path.name for path in odd_folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = TrackletModel.from_pretrained(odd_folder).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in model.state_dict().items())


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


def save_until(model, directory, step):
    """Saves in a process of its own, which is killed before its given access to a file; the process's end."""
    pid = os.fork()
    if pid == 0:
        left = [step]

        def hook(event, arguments):
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(directory) in str(
                arguments[0]
            ):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            torch.set_num_threads(1)
            sys.addaudithook(hook)
            model.save_pretrained(directory)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
def test_killed_at_any_step_a_save_leaves_the_old_model_or_the_new_one(model, saved):
    x = torch.randn(1, 3, 3, *SIZE)
    old = model(x)
    new = create_model("lstm_test_resnet", img_size=SIZE, hidden_features=8, clip={"length": 2}).eval()
    want = new(x)
    assert not torch.allclose(old, want)
    seen = []
    for step in range(100):
        target = saved.with_name(f"target{step}")
        shutil.copytree(saved, target)
        ended = save_until(new, target, step)
        got = TrackletModel.from_pretrained(target)
        seen.append(got.clip.length == 2)
        torch.testing.assert_close(got(x), want if seen[-1] else old)
        got.save_pretrained(target)  # clears up; a folder made just before the kill is nobody's for a day
        left = {path.name for path in target.iterdir() if not path.name.endswith(".tmp")}
        assert left == {"config.json", "model.safetensors"}
        if ended == 0:
            break
    assert ended == 0
    assert seen == sorted(seen)  # from some step on it is the new one
    assert set(seen) == {False, True}


def test_files_of_two_saves_are_refused(model, saved, tmp_path):
    torch.nn.init.zeros_(next(model.parameters()))
    model.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", saved)
    with pytest.raises(ValueError, match=r"config\.json and .*model\.safetensors do not belong together"):
        TrackletModel.from_pretrained(saved)


def test_a_full_disk_names_the_file(model, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors cannot be written: .*No space left"):
        model.save_pretrained(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_two_saves_at_once(model, saved):
    with locked(saved / hub._LOCK, "x"), pytest.raises(Busy, match="another process is at work on"):
        model.save_pretrained(saved)


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, pytest.param(partial(torch.compile, backend="eager"), marks=needs_exporter)],
    ids=["parallel", "compile"],
)
def test_wrapped_models_are_saved_as_what_they_are(model, saved, tmp_path, wrap):
    want = (saved / "model.safetensors").read_bytes()
    hub.save(wrap(nn.DataParallel(model)), tmp_path / "whole")
    model.encoder = wrap(model.encoder)
    model.save_pretrained(tmp_path / "encoder")
    for name in ("whole", "encoder"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == want
    with pytest.raises(TypeError, match=r"expected a TrackletModel, .*got Linear"):
        hub.save(wrap(nn.Linear(1, 1)), tmp_path)


def test_weights_must_fit(model, saved, tmp_path):
    path = saved / "model.safetensors"
    weights = safetensors.torch.load(path.read_bytes())  # not mapped: the file is written over
    first = weights.pop("encoder.backbone.conv1.0.weight")
    safetensors.torch.save_file({**weights, "extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"1 missing: encoder.backbone.conv1.0.weight; 1 unexpected: extra"):
        TrackletModel.from_pretrained(saved)
    safetensors.torch.save_file({**weights, "encoder.backbone.conv1.0.weight": first[1:]}, path)
    with pytest.raises(ValueError, match=r"1 of another shape or kind: encoder.backbone.conv1.0.weight \(\["):
        TrackletModel.from_pretrained(saved)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="no complete safetensors file"):
        TrackletModel.from_pretrained(saved)


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
        ({"format": 2}, r"of format 1, got format 2: .*newer version .*pip install -U"),
        ({"format": 1.0}, r"got format 1\.0"),
        ({"format": None}, "another library"),
        ({"unknown": 1}, r"unknown keys: \['unknown'\]"),
        ({"architecture": "max_test_resnet"}, "but encoder and aggregator make 'lstm_test_resnet'"),
        ({"encoder": {**ENCODER, "new": 1}}, r"encoder has no option new"),
        ({"encoder": {**ENCODER, "pretrained": True}}, r"encoder has no option pretrained"),
        ({"encoder": {**ENCODER, "last_stride": "1"}}, r"encoder\.last_stride must be a whole number or None, got '1'"),
        ({"encoder": {"backbone": "test_resnet"}}, r"encoder\.last_stride, encoder\.img_size"),
        ({"encoder": {**ENCODER, "backbone_kwargs": {"act_layer": "evil"}}}, "describes no model that can be built"),
        ({"aggregator": {"name": "lstm", "in_features": 96, "hidden_features": 8, "new": 1}}, "no option new"),
        ({"aggregator": {"name": "lstm", "in_features": 96, "hidden_features": 10**9}}, "at most 65,536"),
        ({"aggregator": {"name": "lstm", "in_features": 96, "hidden_features": 60000}}, "cannot hold"),
        ({"aggregator": {"name": "lstm", "in_features": 96}}, r"aggregator\.hidden_features is missing"),
        ({"aggregator": {"name": "lstn", "in_features": 96}}, "did you mean 'lstm'"),
        ({"clip": {"new": 1}}, "clip has no option new"),
        ({"data_config": {**DATA, "input_size": [3, 64, 64]}}, r"encoder\.img_size \[64, 32\]"),
        ({"data_config": {**DATA, "std": [0, 1, 1]}}, r"data_config\.std must be three numbers from 1e-06"),
    ],
)
def test_configs_are_checked(saved, changes, message):
    edit(saved, **changes)
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        TrackletModel.from_pretrained(saved)


def places(value, path=()):
    """Every place in a JSON object, but the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


@pytest.mark.slow
def test_whatever_stands_in_a_field_there_is_a_model_or_an_error_that_names_the_file(saved):
    path = saved / "config.json"
    base = json.loads(path.read_text())
    for place in places(base):
        for value in (None, [], {}, "x", -1, 1.5, float("nan"), 10**30, True, ...):
            config = json.loads(json.dumps(base))
            part = config
            for key in place[:-1]:
                part = part[key]
            if value is ...:
                del part[place[-1]]
            else:
                part[place[-1]] = value
            path.write_text(json.dumps(config))
            try:
                with torch.device("meta"):
                    build(path)
            except ValueError as error:
                assert "config.json" in str(error), (place, value, error)  # noqa: PT017
    for text in ('{"a":' + "[" * 100000, "1" * 5000, "[]", "", '{"format": NaN}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            TrackletModel.from_pretrained(saved)
    path.write_bytes(b'{"\xe9": 1}')
    with pytest.raises(ValueError, match=r"config\.json is not UTF-8"):
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


def test_two_revisions_are_one_too_many():
    with pytest.raises(ValueError, match="two revisions"):
        create_model("hf-hub:owner/name@v1", revision="v2")


def test_released_weights_bring_their_options(tmp_path, monkeypatch):
    """Which the caller's options replace."""

    def refuse(self, address):
        raise AssertionError(f"tried to connect to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    saved = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    create_model(
        "lstm_test_resnet", img_size=SIZE, hidden_features=8, last_stride=1, clip={"length": 3}
    ).save_pretrained(saved)
    edit(saved, data_config={"input_size": [3, *SIZE], "mean": [0.1] * 3, "std": [1] * 3, "interpolation": "bilinear"})
    monkeypatch.setattr(hub.huggingface_hub, "hf_hub_download", lambda repo, name, **kwargs: str(saved / name))
    make_manifest(tmp_path, monkeypatch, sha256=hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest())
    model = create_model("lstm_test_resnet", pretrained=True)
    assert not model.training
    assert (model.num_features, model.clip.length, model.encoder.config["last_stride"]) == (8, 3, 1)
    assert model.data_config["mean"] == (0.1, 0.1, 0.1)
    model = create_model(
        "lstm_test_resnet",
        pretrained=True,
        img_size=(32, 32),
        last_stride=2,
        clip={"stride": 1},
        backbone_kwargs={"drop_path_rate": 0.1},
    )
    assert model.data_config["input_size"] == (3, 32, 32)
    assert model.data_config["mean"] == (0.1, 0.1, 0.1)
    assert model.encoder.config["backbone_kwargs"] == {"drop_path_rate": 0.1}
    assert (model.clip.length, model.clip.stride, model.encoder.config["last_stride"]) == (3, 1, None)
    with pytest.raises(ValueError, match="of another shape"):
        create_model("lstm_test_resnet", pretrained=True, hidden_features=9)
    create_model("max_test_resnet", img_size=SIZE).save_pretrained(saved)
    make_manifest(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"holds a max_test_resnet, expected lstm_test_resnet\.mars"):
        create_model("lstm_test_resnet", pretrained=True)


# ----------------------------------------------------------------------------------------------------------------------
# With a Hub. Its clients are processes of their own; names that one snippet sets, the next one has.

BUILD = """
import os, torch
import temporal_agg
from temporal_agg.models import TrackletModel, create_model, manifest
def build(seed, name="mean_test_resnet"):
    torch.manual_seed(seed)
    return create_model(name, img_size=(64, 32)).eval()
def same(a, b):
    b = b.state_dict()
    return all(torch.equal(v, b[k]) for k, v in a.state_dict().items())
"""


def make_manifest(directory, monkeypatch=None, name="lstm_test_resnet.mars", repo="a/b", **values):
    path = directory / f"{name}.json"
    path.write_text(json.dumps({"owner": "somebody", "weights": {}}))
    entry = dict.fromkeys(("revision", "size", "licence", "metrics"))
    entry |= {
        "sha256": None,
        "training_data": "d",
        "training_data_licence": "l",
        "protocol": "p",
        "command": "train it",
    }
    manifest.write(manifest.Weights(name, **{"released": True, "repo": repo, **entry, **values}), path)
    if monkeypatch:
        monkeypatch.setattr(manifest, "PATH", path)
    return str(path)


@pytest.fixture
def client(hub_client, hub_server):
    if not hub_client.run("result = 'build' in globals()"):
        hub_client.run(BUILD)
    hub_server.log.clear()
    return hub_client


@pytest.fixture
def with_manifest(client, tmp_path):
    """Gives the client a manifest of one entry."""
    packaged = client.run("result = str(manifest.PATH)")
    use = "from pathlib import Path; manifest.PATH = Path(path)"
    yield lambda **values: client.run(use, path=make_manifest(tmp_path, **values))
    client.run(use, path=packaged)


@pytest.mark.slow
def test_pushed_models_load_by_every_scheme(client, hub_server, tmp_path):
    first = client.run("one = build(1); result = one.push_to_hub('me/model')")
    second = client.run("two = build(2); result = two.push_to_hub('me/model', commit_message='better')")
    dev = client.run("three = build(3); result = three.push_to_hub('me/model', revision='dev')")
    assert hub_server.repos["me/model"]["refs"] == {"main": second, "dev": dev}
    for expression, expected in (
        ("create_model('hf-hub:me/model')", "two"),
        (f"create_model('hf-hub:me/model@{first}')", "one"),
        ("create_model('hf-hub:me/model', revision='dev')", "three"),
        ("TrackletModel.from_pretrained('hf-hub:me/model@dev')", "three"),
        (f"create_model('hf-hub:me/model', cache_dir={str(tmp_path / 'cache')!r})", "two"),
    ):
        assert client.run(f"got = {expression}; result = same(got, {expected}) and not got.training"), expression
    (directory,) = (tmp_path / "cache").glob(f"models--me--model/snapshots/{second}")
    assert client.run(f"result = same(create_model('local-dir:{directory}'), two)")


@pytest.mark.slow
def test_what_is_not_there_is_said(client, hub_server):
    hub_server.add("me/empty", {"README.md": b"x"})
    hub_server.add("me/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    for name, kind, message in (
        ("me/none", "FileNotFoundError", f"{hub_server.url}/me/none does not exist, or is private"),
        ("me/empty@v9", "FileNotFoundError", "has no revision 'v9'"),
        ("me/empty", "FileNotFoundError", "has no config.json: it is no model that save_pretrained wrote"),
        ("me/pickled", "FileNotFoundError", "has no model.safetensors"),
    ):
        with pytest.raises(ClientError, match=message) as caught:
            client.run(f"create_model('hf-hub:{name}')")
        assert kind in caught.value.kinds


@pytest.mark.slow
def test_private_and_gated_repositories_want_a_token(client, hub_server):
    client.run("build(1).push_to_hub('me/private', private=True)")
    client.run("build(1).push_to_hub('me/gated')")
    assert hub_server.repos["me/private"]["private"]
    hub_server.repos["me/gated"]["gated"] = True
    client.run("token = os.environ.pop('HF_TOKEN')")
    try:
        with pytest.raises(ClientError, match=r"is private: .*HF_TOKEN"):
            client.run("create_model('hf-hub:me/private')")
        with pytest.raises(ClientError, match=r"me/gated is gated: ask for access there") as caught:
            client.run("create_model('hf-hub:me/gated')")
        assert "PermissionError" in caught.value.kinds
        with pytest.raises(ClientError, match="401"):
            client.run("build(1).push_to_hub('me/gated')")
        client.run("build(4).push_to_hub('me/private', token=token)")
    finally:
        client.run("os.environ['HF_TOKEN'] = token")
    assert client.run("result = same(create_model('hf-hub:me/private'), build(4))")
    assert client.run("result = same(create_model('hf-hub:me/gated'), build(1))")


@pytest.mark.slow
def test_an_upload_that_failed_is_repeated_without_sending_the_weights_again(client, hub_server):
    hub_server.refuse_commits = 1
    with pytest.raises(ClientError, match="no more today"):
        client.run("five = build(5); five.push_to_hub('me/again')")
    assert hub_server.repos["me/again"]["commits"].popitem()[1] == {}  # nothing is there by half
    client.run("five.push_to_hub('me/again')")
    assert len(hub_server.asked("PUT", "/blobs/")) == 1
    assert client.run("result = same(create_model('hf-hub:me/again'), five)")


@pytest.mark.slow
def test_a_download_that_broke_off_goes_on_where_it_was(client, hub_server):
    # Of more than 10 MB, which the client writes at a time. Older clients want a second call.
    client.run("big = build(6, 'mean_resnet10t'); big.push_to_hub('me/big')")
    hub_server.cut = 1
    with contextlib.suppress(ClientError):
        client.run("got = create_model('hf-hub:me/big')")
    client.run("got = create_model('hf-hub:me/big')")
    assert client.run("result = same(got, big)")
    ranges = [entry[2] for entry in hub_server.asked("GET", "/blobs/")]
    assert ranges == [None, "bytes=10485760-"]


@pytest.mark.slow
def test_released_weights_are_checked_and_no_backbone_is_asked_for(client, hub_server, with_manifest, tmp_path):
    commit = client.run("seven = build(7); result = seven.push_to_hub('me/seven')")
    content = hub_server.repos["me/seven"]["commits"][commit]["model.safetensors"]
    sha256 = hashlib.sha256(content).hexdigest()
    with_manifest(name="mean_test_resnet.mars", repo="me/seven", revision=commit, sha256=sha256)
    client.run("build(8).push_to_hub('me/seven')")  # main is something else now
    hub_server.log.clear()

    hub_server.corrupt = True
    with pytest.raises(ClientError, match=rf"model\.safetensors is not the file .*expected {sha256}") as caught:
        client.run("create_model('mean_test_resnet', pretrained=True)")
    with pytest.raises(ClientError, match="is not the file that was released"):  # known for this commit
        client.run(f"create_model('hf-hub:me/seven@{commit}')")
    hub_server.corrupt = False
    client.run("os.remove(blob)", blob=str(caught.value).partition("Delete ")[2].partition(" and load")[0])
    load = "got = create_model('mean_test_resnet', True, pretrained_tag='mars', backbone_pretrained=True)"
    assert client.run(f"{load}; result = same(got, seven) and not got.training")
    local = "create_model('mean_test_resnet', checkpoint_path=there, backbone_pretrained=True, img_size=(64, 32))"
    client.run(f"got.save_pretrained(there); {local}", there=str(tmp_path / "saved"))
    assert {path.split("/")[1] for _, path, _ in hub_server.log} == {"me", "blobs"}
    # The log would show it: without full weights timm asks for its own.
    with pytest.raises(ClientError):
        client.run("create_model('mean_test_resnet', backbone_pretrained=True)")
    assert hub_server.asked("HEAD", "/timm/test_resnet")

    assert client.run("result = same(create_model('mean_test_resnet', True, revision='main'), build(8))")


@pytest.mark.slow
def test_planned_weights_are_asked_for_nowhere(client, hub_server, with_manifest):
    """Whoever took the name on the Hub first could give everybody weights of their own."""
    client.run("build(9).push_to_hub('me/planned')")
    with_manifest(name="mean_test_resnet.mars", repo="me/planned", released=False)
    hub_server.log.clear()
    assert client.run("result = temporal_agg.list_models(pretrained=True)") == []
    message = r"planned and have not been released.*backbone_pretrained=True .*checkpoint_path=.*`train it`.*hf-hub:"
    for tag in ("", ".mars"):
        with pytest.raises(ClientError, match=message) as caught:
            client.run(f"create_model('mean_test_resnet{tag}', pretrained=True)")
        assert "FileNotFoundError" in caught.value.kinds
    assert hub_server.log == []
    assert client.run("result = same(create_model('hf-hub:me/planned'), build(9))")


@pytest.mark.slow
def test_offline_there_is_what_was_loaded_before(client, hub_server, hub_home, tmp_path):
    commit = client.run("result = build(10).push_to_hub('me/warm')")
    client.run("create_model('hf-hub:me/warm')")
    path = make_manifest(tmp_path, name="mean_test_resnet.mars", repo="me/warm", revision=commit)
    hub_server.log.clear()
    offline = Client(hub_server, hub_home, HF_HUB_OFFLINE="1")
    try:
        offline.run(BUILD)
        assert offline.run("result = same(create_model('hf-hub:me/warm'), build(10))")
        assert offline.run(f"result = same(create_model('hf-hub:me/warm@{commit}'), build(10))")
        use = "from pathlib import Path; manifest.PATH = Path(path)\n"
        load = "result = same(create_model('mean_test_resnet', pretrained=True), build(10))"
        assert offline.run(use + load, path=path)
        with pytest.raises(ClientError, match=r"me/cold is not in the cache, and .* could not be reached") as caught:
            offline.run("create_model('hf-hub:me/cold')")
        assert "ConnectionError" in caught.value.kinds
    finally:
        offline.close()
    assert hub_server.log == []


def test_a_convnext_is_saved_and_loaded(tmp_path):
    """In timm 1.0.8 it cannot be built without memory, as the check of sizes does it."""
    model = create_model("mean_test_convnext", img_size=SIZE).eval()
    model.save_pretrained(tmp_path)
    x = torch.rand(1, 2, 3, *SIZE)
    assert torch.equal(TrackletModel.from_pretrained(tmp_path)(x), model(x))


@pytest.mark.parametrize("repo", ["", "name", "a/b/c", "https://huggingface.co/a/b", "a/", "a b/c"])
def test_a_name_without_an_owner_is_not_asked_for(repo):
    with pytest.raises(ValueError, match="a model on the Hub is named hf-hub:<owner>/<repo>"):
        create_model(f"hf-hub:{repo}")
