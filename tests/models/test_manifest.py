"""The packaged manifest says nothing that is not so, and in a form that the code can use."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from temporal_agg._files import Busy, locked
from temporal_agg.models import create_model, list_models, manifest

ROOT = Path(__file__).parents[2]
ENTRIES = list(manifest.read().values())


@pytest.fixture
def entries(tmp_path, monkeypatch):
    """A manifest with a released and two planned weights."""
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"owner": "somebody", "weights": {}}))
    monkeypatch.setattr(manifest, "PATH", path)
    common = dict.fromkeys(("revision", "sha256", "size", "licence", "metrics"))
    common |= {"training_data": "d", "training_data_licence": "l", "protocol": "p", "command": "c"}
    for name, released in (("mean_resnet18.a", False), ("mean_resnet18.b", True), ("max_resnet18.a", False)):
        manifest.write(manifest.Weights(name, released, "{owner}/" + name, **common), path)
    return path


@pytest.mark.parametrize("weights", ENTRIES, ids=lambda w: w.name)
def test_entries_are_whole(weights):
    name, _, tag = weights.name.partition(".")
    assert tag
    assert name in list_models() or name.startswith("mean_")
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", weights.repo)
    texts = (weights.training_data, weights.training_data_licence, weights.protocol, weights.command)
    assert all(texts)
    if weights.released:
        assert re.fullmatch("[0-9a-f]{40}", weights.revision)
        assert re.fullmatch("[0-9a-f]{64}", weights.sha256)
        assert weights.size > 0
        assert weights.licence
        assert 0 < weights.metrics["map"] <= 1
    else:
        assert weights.revision is None
    for config in re.findall(r"--config (\S+)", weights.command):
        assert (ROOT / "recipes" / "configs" / config).is_file()


def test_only_released_weights_are_listed(entries):
    assert list_models(pretrained=True) == ["mean_resnet18.b"]
    assert list_models("max*", pretrained=True) == []


def test_names_and_tags(entries):
    assert manifest.find("mean_resnet18").name == "mean_resnet18.a"  # the first one
    assert manifest.find("mean_resnet18", "b") == manifest.find("mean_resnet18.b")
    assert manifest.find("mean_resnet18.b", "b").repo == "somebody/mean_resnet18.b"
    with pytest.raises(ValueError, match=r"two tags .*'b' .*pretrained_tag='a'"):
        manifest.find("mean_resnet18.b", "a")
    message = r"'lstm_resnet18' \(released: mean_resnet18\.b; planned: .*max_resnet18\.a\).*backbone_pretrained=True"
    with pytest.raises(ValueError, match=message):
        create_model("lstm_resnet18", pretrained=True)
    with pytest.raises(ValueError, match=r"'mean_resnet18\.tv_in1k'"):  # a tag of timm's weights
        create_model("mean_resnet18.tv_in1k", pretrained=True)
    with pytest.raises(ValueError, match="goes with pretrained=True"):
        create_model("mean_resnet18", pretrained_tag="b")
    with pytest.raises(ValueError, match="one of them"):
        create_model("mean_resnet18", pretrained=True, checkpoint_path="somewhere")
    with pytest.raises(TypeError, match="no option foo"):
        create_model("mean_resnet18", pretrained=True, foo=1)


def test_a_write_that_fails_leaves_the_manifest(entries, monkeypatch):
    before = entries.read_bytes()

    def fail(self, *args, **kwargs):
        with open(self, "w") as file:
            file.write("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match=r"manifest\.json cannot be written: No space left"):
        manifest.write(manifest.find("mean_resnet18"), entries)
    assert entries.read_bytes() == before
    assert [path.name for path in entries.parent.iterdir()] == ["manifest.json"]
    with (
        locked(entries.with_name(".manifest.json.lock"), "x"),
        pytest.raises(Busy, match=r"at work on .*manifest\.json"),
    ):
        manifest.write(manifest.find("mean_resnet18"), entries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("owner"), "'owner' and 'weights'"),
        (lambda c: c.update(weights=[]), "'owner' and 'weights'"),
        (lambda c: c["weights"]["mean_resnet18.a"].pop("repo"), r"the entry 'mean_resnet18\.a' must have"),
        (lambda c: c["weights"]["mean_resnet18.a"].update(new=1), "and nothing else"),
        (lambda c: c["weights"]["mean_resnet18.a"].update(released="no"), "released of the entry .* cannot be 'no'"),
        (lambda c: c["weights"].update({"mean_resnet18.a": None}), "must have"),
    ],
)
def test_a_damaged_manifest_is_named(entries, change, message):
    content = json.loads(entries.read_text())
    change(content)
    entries.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"manifest\.json: .*{message}"):
        manifest.read()


def test_an_entry_is_replaced_and_keeps_its_place(entries):
    released = dataclasses.replace(manifest.find("mean_resnet18"), released=True, revision="0" * 40)
    manifest.write(released, entries)
    assert list(manifest.read()) == ["mean_resnet18.a", "mean_resnet18.b", "max_resnet18.a"]
    assert manifest.find("mean_resnet18").revision == "0" * 40
