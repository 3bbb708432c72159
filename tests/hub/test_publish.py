"""From a run of the recipe to weights that a fresh process loads by name."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
from hub_client import Client

import temporal_agg
from temporal_agg.models import manifest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))  # as when a script there is run

OPTIONS = {"num_identities": 8, "length": [4, 9], "num_cameras": 2}
NAME = "attention_resnet10t.synthetic"

EVALUATE = """
from pathlib import Path
import temporal_agg
from temporal_agg import data, retrieval
from temporal_agg.models import manifest
manifest.PATH = Path(path)
model = temporal_agg.create_model(name, pretrained=True)
dataset = data.open_dataset("synthetic", **options)
embeddings = [temporal_agg.embed_tracklets(model, t, progress=False) for t in (dataset.query, dataset.gallery)]
ids = [[getattr(t, key) for t in side] for side in (dataset.query, dataset.gallery) for key in ("pid", "camera")]
distances = retrieval.distances(*embeddings, model.clip.distance)
metrics = retrieval.evaluate(distances, *ids, query_index=dataset.query_index)
result = {"map": float(metrics.map), "minp": float(metrics.minp), "rank1": float(metrics.rank(1))}
"""

PUBLISH = """
import importlib.util
spec = importlib.util.spec_from_file_location("publish", script)
publish = importlib.util.module_from_spec(spec)
spec.loader.exec_module(publish)
publish.manifest.PATH = Path(path)
result = vars(publish.main(argv))
"""


@pytest.fixture(scope="module")
def publish():
    spec = importlib.util.spec_from_file_location("hub_publish", ROOT / "hub" / "publish.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run."""
    import train

    out = tmp_path_factory.mktemp("runs")
    argv = ["--data-options", *(f"{key}={value}" for key, value in OPTIONS.items()), "--size", "32x16", "--epochs", "1"]
    argv += ["--identities", "4", "--workers", "0", "--device", "cpu", "--clip-length", "3", "--out", str(out)]
    train.main([*argv, "--model", "attention_resnet10t", "--name", "run"])
    return out / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))


@pytest.fixture
def own_manifest(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"owner": "somebody", "weights": {}}))
    return path


@pytest.mark.slow
def test_a_dry_run_writes_all_of_the_release(publish, run, capsys):
    weights = publish.main([str(run), "--dry-run"])
    out = run / "release"
    assert {path.name for path in out.iterdir()} == {
        *("README.md", "config.json", "metrics.json", "model.safetensors", "settings.json")
    }
    assert (weights.name, weights.released, weights.revision, weights.licence) == (NAME, False, None, "apache-2.0")
    assert weights.size == (out / "model.safetensors").stat().st_size
    metrics = json.loads((run / "metrics.json").read_text())
    assert weights.metrics["map"] == pytest.approx(metrics["map"], abs=1e-4)
    assert "8 embeddings are reproduced" in capsys.readouterr().out
    assert temporal_agg.create_model(f"local-dir:{out}").num_features == 512

    card = (out / "README.md").read_text()
    assert 'create_model("local-dir:release")' in card
    assert "hf-hub:" not in card  # a name that is only planned may be anybody's
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: temporal-agg\n")
    for section in ("How to use it", "Training data", "Protocol", "Results", "Limitations and ethics", "Citation"):
        assert f"\n## {section}\n" in card
    assert f"| this model | {100 * metrics['map']:.1f} | {100 * metrics['rank1']:.1f} |" in card
    assert f"| the same before training | {100 * metrics['untrained']['map']:.1f} |" in card
    assert "on real people it is worth nothing" in card
    assert "$" not in card
    assert weights.command.startswith("python recipes/")
    assert str(run.parent.parent) not in card + (out / "settings.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["settings.json", "metrics.json", "model.safetensors", "reference.safetensors"])
def test_a_run_that_is_not_whole_is_refused(publish, run, name):
    (run / name).unlink()
    with pytest.raises(SystemExit, match=rf"no finished run .*{name} is missing"):
        publish.main([str(run), "--dry-run"])
    assert not (run / "release").exists()


def test_what_does_not_agree_is_refused(publish, run):
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "rank5": 75}))
    with pytest.raises(SystemExit, match="rank5 is missing or not between 0 and 1"):
        publish.main([str(run), "--dry-run"])
    (run / "metrics.json").write_text(json.dumps(metrics))
    weights = safetensors.torch.load_file(run / "model.safetensors")
    weights["encoder.backbone.layer4.0.bn2.weight"] += 0.01
    safetensors.torch.save_file(weights, run / "model.safetensors")
    with pytest.raises(SystemExit, match=r"does not give the embeddings of reference\.safetensors: they differ by"):
        publish.main([str(run), "--dry-run"])
    settings = json.loads((run / "settings.json").read_text())
    settings["settings"]["data"] = "folder:/nowhere"
    (run / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match="--licence"):
        publish.main([str(run), "--dry-run"])


def test_places_of_the_trainers_machine_are_taken_out(publish):
    settings = {"data": "mars", "root": "/data/my mars", "out": "/home/me/runs", "init": "/home/me/runs/a/stage1"}
    command = "/home/me/agg/recipes/train.py --config grl.yaml --root /data/my mars"
    environment = {"command": command, "processes": 4}
    found = {"settings": settings, "environment": environment, "flow_root": "/home/alice/flow"}
    got = publish.without_paths(found, found, Path("/home/me/runs/a"))
    assert got["flow_root"] == "<path>/flow"
    assert got["settings"] == {"data": "mars", "root": "<root>", "out": "<out>", "init": "<out>/a/stage1"}
    expected = "torchrun --nproc_per_node 4 recipes/train.py --config grl.yaml --root <root>"
    assert publish.command_of(got["environment"]) == expected
    study = {"command": "../agg/recipes/benchmarks/study.py --seeds 2", "processes": 1}
    assert publish.command_of(study) == "python recipes/benchmarks/study.py --seeds 2"
    assert publish.command_of({**study, "command": "train.py --lr 1"}) == "python recipes/train.py --lr 1"


@pytest.mark.parametrize("root", ["data", ".", "/data"])
def test_a_place_is_taken_out_where_it_is_one(publish, root):
    settings = {"data": f"folder:{root}", "root": "", "out": "runs", "lr": "0.001"}
    command = f"train.py --data folder:{root} --lr 0.001 --data-options a=data.csv"
    found = {"settings": settings, "command": command, "map": 0.5, "see": ["https://a.org/b", f"{root}/train/1"]}
    got = publish.without_paths(found, found, Path("/home/me/runs/a"))
    assert got["settings"] == {"data": "folder:<root>", "root": "", "out": "<out>", "lr": "0.001"}
    assert got["command"] == "train.py --data folder:<root> --lr 0.001 --data-options a=data.csv"
    assert (got["map"], got["see"]) == (0.5, ["https://a.org/b", "<root>/train/1"])


@pytest.mark.slow
def test_a_release_of_something_else_is_not_written_over(publish, run, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "README.md").write_text("precious")
    with pytest.raises(SystemExit, match=r"mine holds README\.md of something else"):
        publish.main([str(run), "--dry-run", "--out", str(out)])
    assert {path.name: path.read_text() for path in out.iterdir()} == {"README.md": "precious"}
    release = publish.main([str(run), "--dry-run"])
    assert publish.main([str(run), "--dry-run"]) == release  # of the same run
    settings = json.loads((run / "settings.json").read_text())
    settings["settings"]["lr"] = 0.5
    (run / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match="of something else: choose another --out"):
        publish.main([str(run), "--dry-run"])


@pytest.mark.parametrize(("name", "content"), [("settings.json", "{"), ("metrics.json", "[]"), ("config.json", "5")])
def test_a_damaged_file_is_named(publish, run, name, content):
    (run / name).write_text(content)
    with pytest.raises(SystemExit, match=name):
        publish.main([str(run), "--dry-run"])


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("settings", "out", 3),
        ("settings", "split", "x"),
        ("settings", "identity_splits", True),
        ("settings", "split_seed", -1),
        ("settings", "flow_root", 3),
        ("environment", "command", 3),
        ("environment", "processes", "2"),
        ("environment", "temporal_agg", None),
    ],
)
def test_a_value_of_another_kind_is_named(publish, run, part, key, value):
    settings = json.loads((run / "settings.json").read_text())
    settings[part][key] = value
    (run / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match=rf"publish\.py: .*settings\.json: .*{key}.*restore the file"):
        publish.main([str(run), "--dry-run"])


@pytest.mark.parametrize("name", ["x", "a/b", "../x", "mean_resnet10t.synthetic", NAME + " x", "attention_resnet10t."])
def test_a_name_is_that_of_the_model_and_a_tag(publish, run, name):
    with pytest.raises(SystemExit, match=r"--name must be attention_resnet10t\.<tag>"):
        publish.main([str(run), "--dry-run", "--name", name])
    with pytest.raises(SystemExit, match="--repo must be owner/name"):
        publish.main([str(run), "--dry-run", "--repo", name.replace("/", "")])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loga", "star", "gsta", "gltr_released", "fgra", "grl_released", "mean"])
def test_every_system_has_its_card(publish, run, tmp_path, name):
    model = temporal_agg.create_model(f"{name}_resnet18", img_size=(64, 32))
    config = publish.hub.describe(model)
    settings = json.loads((run / "settings.json").read_text())
    settings["settings"]["data"] = "mars:/data/mars"
    metrics = json.loads((run / "metrics.json").read_text())
    weights = manifest.Weights("x.mars", False, "a/b", None, None, None, "MARS", "terms", "other", None, "p", "c")
    card = publish.card(weights, settings, metrics, config, model, "local-dir:x")
    assert 'create_model("local-dir:x")' in card
    assert ("@inproceedings{" in card) == ("the paper reports (not measured here)" in card) == (name != "mean")
    assert ("its authors released" in card) == name.endswith("released")
    assert "worth nothing" not in card


@pytest.mark.slow
def test_a_published_run_gives_its_metrics_in_a_fresh_process(hub_client, hub_server, tmp_path, run, own_manifest):
    argv = [str(run), "--repo", "me/published", "--manifest", str(own_manifest), "--out", str(tmp_path / "release")]
    known = {"script": str(ROOT / "hub" / "publish.py"), "path": str(own_manifest), "argv": argv}
    hub_client.run("from pathlib import Path; from temporal_agg.models import manifest; packaged = manifest.PATH")
    hub_server.refuse_commits = 1
    try:
        with pytest.raises(Exception, match=r"(?s)publish\.py: .*no more today"):
            hub_client.run(PUBLISH, **known)
        assert json.loads(own_manifest.read_text())["weights"] == {}
        hub_server.log.clear()
        weights = hub_client.run(PUBLISH, **known)
        assert not hub_server.asked("PUT", "/blobs/")  # the weights had arrived
    finally:
        hub_client.run("manifest.PATH = packaged")
    entry = hub_server.repos["me/published"]
    assert weights["released"]
    assert 'create_model("hf-hub:me/published")' in (tmp_path / "release" / "README.md").read_text()
    assert weights["revision"] == entry["refs"]["main"]
    files = entry["commits"][weights["revision"]]
    assert set(files) == {"README.md", "config.json", "metrics.json", "model.safetensors", "settings.json"}
    hub_server.log.clear()
    fresh = Client(hub_server, tmp_path / "home")  # not logged in, nothing in its cache
    try:
        got = fresh.run(EVALUATE, path=str(own_manifest), name=NAME, options=OPTIONS)
    finally:
        fresh.close()
    recorded = json.loads((run / "metrics.json").read_text())
    assert got == {key: pytest.approx(recorded[key], abs=1e-6) for key in got}
    assert {path.split("/")[1] for _, path, _ in hub_server.log} == {"me", "blobs"}
