"""The reference recipe, in miniature: what it writes, what it refuses, and that nothing is lost when it is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import temporal_agg
from temporal_agg import retrieval

SCRIPT = Path(__file__).parents[2] / "recipes" / "train.py"
MINIATURE = [
    *("--data-options", "num_identities=8", "length=[4,9]", "num_cameras=2"),
    *("--size", "32x16", "--identities", "4", "--workers", "0", "--device", "cpu", "--clip-length", "3"),
]


def settings_of(recipe, *argv):
    return recipe("train").parse_settings(list(argv))


def test_a_run_directory_says_everything_about_itself(recipe, tmp_path):
    argv = [*MINIATURE, "--model", "mean_resnet10t,attention_resnet10t", "--epochs", "2", "--out", str(tmp_path)]
    results = recipe("train").main(argv)
    assert set(results) == {"mean_resnet10t", "attention_resnet10t"}
    directories = sorted(tmp_path.iterdir())
    assert [d.name for d in directories] == ["synthetic-seed0-attention_resnet10t", "synthetic-seed0-mean_resnet10t"]
    for directory in directories:
        files = {p.name for p in directory.iterdir()}
        assert files == {"settings.json", "log.jsonl", "metrics.json", "config.json", "model.safetensors", "cmc.png"}
        metrics = json.loads((directory / "metrics.json").read_text())
        assert {"map", "rank1", "rank5", "rank10", "seconds", "untrained"} <= set(metrics)
        assert 0 < metrics["map"] <= 1
        assert metrics["cmc"][0] == pytest.approx(metrics["rank1"])
        log = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
        assert [entry["epoch"] for entry in log] == [1, 2]
        assert log[0]["loss"] == pytest.approx(log[0]["cross_entropy"] + log[0]["triplet"])
        settings = json.loads((directory / "settings.json").read_text())
        assert settings["settings"]["model"] in directory.name
        assert settings["environment"]["torch"] == torch.__version__


def test_the_saved_model_reproduces_the_recorded_metrics(recipe, tmp_path):
    train = recipe("train")
    metrics = train.main(
        [*MINIATURE, "--model", "mean_resnet10t", "--epochs", "1", "--name", "one", "--out", str(tmp_path)]
    )
    model = temporal_agg.create_model(f"local-dir:{tmp_path / 'one'}")
    dataset = temporal_agg.data.parse_data_spec("synthetic", num_identities=8, length=[4, 9], num_cameras=2)
    embeddings = [temporal_agg.embed_tracklets(model, t, progress=False) for t in (dataset.query, dataset.gallery)]
    got = retrieval.evaluate(
        retrieval.distances(*embeddings, model.clip.distance),
        *([getattr(t, key) for t in side] for side in (dataset.query, dataset.gallery) for key in ("pid", "camera")),
    )
    assert got.map == pytest.approx(metrics["mean_resnet10t"][0]["map"], abs=1e-6)


@pytest.fixture
def folder(tmp_path):
    """Four identities, two cameras; everybody wears a colour of their own."""
    rng = np.random.default_rng(0)
    for pid in range(4):
        colour = rng.integers(0, 255, 3)
        for camera in (1, 2):
            for split in ["train"] if pid < 2 else [["query"], ["gallery"]][camera - 1]:
                place = tmp_path / "data" / split / f"{pid:04d}" / f"{camera}_0001"
                place.mkdir(parents=True)
                for i in range(5):
                    image = (colour + rng.integers(-20, 20, (32, 16, 3))).clip(0, 255).astype(np.uint8)
                    Image.fromarray(image).save(place / f"{i:03d}.jpg")
    return tmp_path / "data"


def test_own_folder_with_identity_splits(recipe, folder, tmp_path):
    argv = [*MINIATURE[4:], "--data", f"folder:{folder}", "--identity-splits", "2", "--model", "mean_resnet10t"]
    results = recipe("train").main([*argv, "--epochs", "1", "--out", str(tmp_path / "runs")])["mean_resnet10t"]
    assert [m["queries"] for m in results] == [2, 2]
    assert {d.name for d in (tmp_path / "runs").iterdir()} == {
        f"folder-seed0-mean_resnet10t-split{k}of2" for k in range(2)
    }


def test_a_finished_run_is_not_trained_again_and_another_one_not_overwritten(recipe, tmp_path, capsys):
    argv = [*MINIATURE, "--model", "mean_resnet10t", "--epochs", "1", "--name", "one", "--out", str(tmp_path)]
    first = recipe("train").main(argv)
    assert recipe("train").main(argv) == first
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"other settings \(lr: 0.001 there, 0.5 now\)"):
        recipe("train").main([*argv, "--lr", "0.5"])


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    def command(name):
        options = ["--model", "mean_resnet10t", "--epochs", "4", "--name", name, "--out", str(tmp_path)]
        return [sys.executable, str(SCRIPT), *MINIATURE, *options]

    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command("whole"), check=True, env=env, capture_output=True)
    process = subprocess.Popen(command("killed"), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "last.ckpt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "metrics.json").exists(), "it was killed too late to show anything"
    subprocess.run(command("killed"), check=True, env=env, capture_output=True)
    whole, resumed = (temporal_agg.create_model(f"local-dir:{tmp_path / n}").state_dict() for n in ("whole", "killed"))
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    logs = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (tmp_path / n / "log.jsonl").open()]
        for n in ("whole", "killed")
    ]
    assert logs[0] == logs[1]


def gradients_of(rank, world, recipe_path, tmp_path):
    sys.path.insert(0, str(recipe_path))
    import train

    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store{world}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(2), temporal_agg.create_aggregator("attention", 12)).double()
    wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    criterion = temporal_agg.losses.create_criterion("baseline", 4, model[1]).double()
    g = torch.Generator().manual_seed(1)
    clips, labels = torch.randn(8, 3, 3, 2, 2, generator=g, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    model[1].forward = _with_details(model[1].forward)
    details, target = wrapped(clips[share]), labels[share]
    if world > 1:
        details, target = train.gather(details, target)
    oim = temporal_agg.losses.OIMLoss(4, 12).double()
    oim.table += torch.eye(4, 12, dtype=torch.float64)
    loss = criterion(details, target)["loss"] + oim(details.embedding, target)
    loss.backward()
    oim.after_step()
    gradients = [p.grad for p in (*model.parameters(), *criterion.parameters())]
    torch.save((loss.detach(), [*gradients, oim.table]), tmp_path / f"{world}-{rank}.pt")
    torch.distributed.destroy_process_group()


def _with_details(forward):
    return lambda features: forward(features, return_details=True)


def test_two_processes_equal_one(tmp_path):
    for world in (1, 2):
        torch.multiprocessing.start_processes(
            gradients_of, (world, SCRIPT.parent, tmp_path), nprocs=world, start_method="spawn"
        )
    loss, gradients = torch.load(tmp_path / "1-0.pt")  # and the OIM table after the step
    for rank in range(2):
        other, other_gradients = torch.load(tmp_path / f"2-{rank}.pt")
        torch.testing.assert_close(other, loss, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(other_gradients, gradients, rtol=1e-9, atol=1e-9)


def test_two_processes_run_the_whole_recipe(tmp_path):
    options = ["--model", "mean_resnet10t", "--epochs", "1", "--name", "two", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(SCRIPT), *MINIATURE, *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two" / "settings.json").read_text())["environment"]["processes"] == 2
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["queries"] > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "folder:nowhere"], "no folder nowhere"),
        (["--data", "sinthetic"], "did you mean 'synthetic'"),
        (["--model", "mean_resnet10t,meen_resnet10t"], "no aggregator's name starts 'meen_resnet10t'"),
        (["--model-options", "qality=features"], "no option qality"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is(recipe, tmp_path, argv, message):
    with pytest.raises(SystemExit, match=message):
        recipe("train").main([*argv, "--device", "cpu", "--size", "32x16", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_queries_without_a_match_are_said(recipe, folder, tmp_path):
    for person in (folder / "gallery").iterdir():
        person.rename(person.with_name(f"9{person.name[1:]}"))
    with pytest.raises(SystemExit, match="no identity in common"):
        recipe("train").main([*MINIATURE[4:], "--data", f"folder:{folder}", "--out", str(tmp_path / "runs")])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--size", "big"], "HEIGHTxWIDTH"),
        (["--optimizer", "adma"], "one of adamw, adam, sgd"),
        (["--model-options", "quality"], "takes KEY=VALUE"),
        (["--config", "missing.yaml"], "there is no file missing.yaml"),
        (["--epoch-count", "3"], "unrecognized arguments"),
    ],
)
def test_wrong_settings_are_refused(recipe, capsys, argv, message):
    with pytest.raises(SystemExit):
        settings_of(recipe, *argv)
    assert message in capsys.readouterr().err


def test_yaml_is_overridden_by_the_command_line_and_unknown_keys_are_refused(recipe, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 1\nclip-length: 6\nmodel-options: {quality: features}\n")
    settings = settings_of(recipe, "--config", str(file), "--clip-length", "4")
    assert (settings.lr, settings.clip_length, settings.model_options) == (1.0, 4, {"quality": "features"})
    file.write_text("epoch: 3\n")
    with pytest.raises(SystemExit):
        settings_of(recipe, "--config", str(file))
    assert "unknown setting 'epoch'; did you mean 'epochs'?" in capsys.readouterr().err
    file.write_text("epochs: many\n")
    with pytest.raises(SystemExit):
        settings_of(recipe, "--config", str(file))
    assert "epochs must be int, got 'many'" in capsys.readouterr().err


def test_the_learning_rate_rises_and_falls(recipe):
    settings = settings_of(recipe, "--warmup", "0.2")
    factor = recipe("train").lr_factor
    assert [factor(settings, p) for p in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert factor(settings_of(recipe, "--schedule", "constant"), 0.9) == 1
