"""The reference recipe, in miniature: what it writes, what it refuses, and that nothing is lost when it is killed."""

import _multiprocessing
import gc
import json
import multiprocessing.synchronize
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from benchmarks_on_disk import make_duke, make_ilids_vid, make_ls_vid, make_mars, make_prid2011
from PIL import Image
from safetensors.torch import load_file
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


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_directory_says_everything_about_itself(recipe, tmp_path):
    argv = [*MINIATURE, "--model", "mean_resnet10t,attention_resnet10t", "--epochs", "2", "--out", str(tmp_path)]
    results = recipe("train").main(argv)
    assert set(results) == {"mean_resnet10t", "attention_resnet10t"}
    directories = sorted(tmp_path.iterdir())
    assert [d.name for d in directories] == ["synthetic-seed0-attention_resnet10t", "synthetic-seed0-mean_resnet10t"]
    for directory in directories:
        files = {p.name for p in directory.iterdir()}
        assert files == {
            *(
                "settings.json",
                "log.jsonl",
                "metrics.json",
                "config.json",
                "model.safetensors",
                "reference.safetensors",
            ),
            *("cmc.png", "checkpoints"),
        }
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


@pytest.mark.slow
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
    reference = load_file(tmp_path / "one" / "reference.safetensors")["gallery"]
    torch.testing.assert_close(embeddings[1][:16], reference, rtol=1e-4, atol=1e-5)


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


@pytest.mark.slow
def test_own_folder_with_identity_splits(recipe, folder, tmp_path):
    argv = [*MINIATURE[4:], "--data", f"folder:{folder}", "--identity-splits", "2", "--model", "mean_resnet10t"]
    results = recipe("train").main([*argv, "--epochs", "1", "--out", str(tmp_path / "runs")])["mean_resnet10t"]
    assert [m["queries"] for m in results] == [2, 2]
    assert {d.name for d in (tmp_path / "runs").iterdir()} == {
        f"folder-seed0-mean_resnet10t-split{k}" for k in range(2)
    }
    # The second split alone is the same split, under the same name: the run is found, nothing is trained.
    again = recipe("train").main([*argv, "--epochs", "1", "--out", str(tmp_path / "runs"), "--split", "1"])
    assert again["mean_resnet10t"] == results[1:]


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again_and_another_one_not_overwritten(recipe, tmp_path, capsys):
    argv = [*MINIATURE, "--model", "mean_resnet10t", "--epochs", "1", "--name", "one", "--out", str(tmp_path)]
    first = recipe("train").main(argv)
    (tmp_path / "one" / ".lock").touch()  # of a process that was killed after its last file
    assert recipe("train").main(argv) == first
    assert "finished before" in capsys.readouterr().out
    assert not (tmp_path / "one" / ".lock").exists()
    with pytest.raises(SystemExit, match=r"other settings \(lr: 0.001 there, 0.5 now\)"):
        recipe("train").main([*argv, "--lr", "0.5"])
    run = tmp_path / "one"
    for name, damage in (
        ("config.json", Path.unlink),
        ("config.json", lambda path: path.write_text(path.read_text()[:-9])),
        ("model.safetensors", Path.unlink),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-9])),
    ):
        whole = (run / name).read_bytes()
        damage(run / name)
        with pytest.raises(SystemExit, match=rf"metrics\.json says .* finished, but .*{name}.* delete metrics\.json"):
            recipe("train").main(argv)
        (run / "metrics.json").unlink()
        again = recipe("train").main(argv)["mean_resnet10t"][0]
        assert again["map"] == first["mean_resnet10t"][0]["map"]
        assert (run / name).read_bytes() == whole


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    """Killed in the middle of an epoch, between two optimizer steps, with random mining."""

    def command(name):
        options = ["--model", "mean_resnet10t", "--epochs", "4", "--identities", "2", "--name", name]
        options += ["--criterion-options", "mining=random", "--save-every", "1", "--out", str(tmp_path)]
        return [sys.executable, str(SCRIPT), *MINIATURE, *options]

    def newest(name):
        names = sorted(path.name for path in (tmp_path / name / "checkpoints").glob("batch-*.ckpt"))
        return names[-1] if names else ""

    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command("whole"), check=True, env=env, capture_output=True)
    process = subprocess.Popen(command("killed"), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while newest("killed") < "batch-000000003" and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "metrics.json").exists(), "it was killed too late to show anything"
    done = subprocess.run(command("killed"), check=True, env=env, capture_output=True, text=True)
    assert "goes on in epoch" in done.stdout
    whole, resumed = (temporal_agg.create_model(f"local-dir:{tmp_path / n}").state_dict() for n in ("whole", "killed"))
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    assert newest("killed") == newest("whole") == "batch-000000008.ckpt"
    log, metrics = [], []
    for name in ("whole", "killed"):
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").open()]
        log.append([{k: v for k, v in line.items() if k != "train_seconds"} for line in lines])
        content = json.loads((tmp_path / name / "metrics.json").read_text())
        metrics.append({k: v for k, v in content.items() if "seconds" not in k})
    assert log[0] == log[1]
    assert metrics[0] == metrics[1]


def test_the_newest_checkpoints_are_kept_and_a_damaged_one_is_passed_over(recipe, tmp_path, capsys):
    train = recipe("train")
    assert train.load_checkpoint(tmp_path) is None
    for batches in range(1, 5):
        train.save_checkpoint(tmp_path, batches, 2, {"batches": batches, "weights": torch.arange(100.0)})
    newest, older = train.checkpoints(tmp_path)
    assert (newest.name, older.name) == ("batch-000000004.ckpt", "batch-000000003.ckpt")
    assert train.load_checkpoint(tmp_path)["batches"] == 4
    whole = newest.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(torch.arange(100.0).numpy().tobytes()[8:40]) + 3] ^= 0x40
    for damaged in (whole[:100], b"", b"hello", flipped, whole.replace(b"batches", b"batch\xffs"), whole + b"x"):
        newest.write_bytes(damaged)
        assert train.load_checkpoint(tmp_path)["batches"] == 3
        assert "batch-000000004.ckpt cannot be read: it is damaged" in capsys.readouterr().out
    older.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .*checkpoints can be read: all are damaged"):
        train.load_checkpoint(tmp_path)
    assert len(train.checkpoints(tmp_path)) == 2
    newest.unlink()
    newest.mkdir()  # the system refuses to read it: no damage
    train.save_checkpoint(tmp_path, 3, 9, {})
    with pytest.raises(OSError, match="batch-000000004"):
        train.load_checkpoint(tmp_path)


def test_a_damaged_newer_checkpoint_does_not_push_out_the_sound_ones(recipe, tmp_path):
    train = recipe("train")
    train.save_checkpoint(tmp_path, 9, 1, {"batches": 9})
    (newest,) = train.checkpoints(tmp_path)
    newest.write_bytes(b"damaged")
    for batches in (3, 4):
        train.save_checkpoint(tmp_path, batches, 1, {"batches": batches})
        assert train.load_checkpoint(tmp_path) == {"batches": batches}


def test_a_loss_that_is_not_finite_stops_after_saving(recipe, tmp_path):
    argv = [*MINIATURE, "--identities", "2", "--model", "mean_resnet10t", "--name", "one", "--out", str(tmp_path)]
    argv += ["--optimizer", "sgd", "--lr", "1e30", "--warmup", "0", "--schedule", "constant"]
    with pytest.raises(SystemExit, match=r"in epoch 1, batch 2, identities \[\d, \d\]. The last sound state is saved"):
        recipe("train").main(argv)
    (checkpoint,) = recipe("train").checkpoints(tmp_path / "one")
    state = torch.load(checkpoint, weights_only=True)
    assert state["progress"]["batch"] == 1
    assert all(value.isfinite().all() for value in state["model"].values())  # BatchNorm's statistics, too


@pytest.mark.slow
def test_a_run_goes_on_behind_the_last_batch_of_an_epoch(recipe, tmp_path):
    options = [*MINIATURE, "--identities", "2", "--model", "mean_resnet10t", "--epochs", "3", "--out", str(tmp_path)]
    options += ["--save-every", "2", "--keep", "9"]
    for name in ("whole", "killed"):
        recipe("train").main([*options, "--name", name])
    killed = tmp_path / "killed"
    *later, first = recipe("train").checkpoints(killed)
    assert torch.load(first, weights_only=True)["progress"]["batch"] == 2  # of the 2 that an epoch has
    for path in (*later, killed / "metrics.json"):
        path.unlink()
    recipe("train").main([*options, "--name", "killed"])
    equal_runs(tmp_path / "whole", killed)


@pytest.mark.slow
def test_the_log_has_the_line_that_was_lost_between_checkpoint_and_log(recipe, tmp_path):
    options = [*MINIATURE, "--model", "mean_resnet10t", "--epochs", "2", "--name", "one", "--out", str(tmp_path)]
    recipe("train").main(options)
    whole = read_lines(tmp_path / "one" / "log.jsonl")
    for lost in ("log.jsonl", "metrics.json"):
        (tmp_path / "one" / lost).unlink()
    recipe("train").main(options)
    assert read_lines(tmp_path / "one" / "log.jsonl") == whole


def test_a_folder_that_is_no_run_is_not_written_into(recipe, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_text("precious")
    with pytest.raises(SystemExit, match=r"mine holds files of something else \(no settings.json\)"):
        recipe("train").main([*MINIATURE, "--model", "mean_resnet10t", "--name", "mine", "--out", str(tmp_path)])
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("settings.json", "{"),
        ("settings.json", "[]"),
        ("settings.json", '{"settings": 5, "environment": {}}'),
        ("settings.json", '{"settings": {"data": 5}, "environment": {}}'),
        ("metrics.json", ""),
        ("metrics.json", '{"map": 0.5}'),
        ("metrics.json", '{"map": NaN}'),
    ],
)
def test_a_damaged_file_of_a_run_is_named(recipe, tmp_path, name, content):
    options = [*MINIATURE, "--model", "mean_resnet10t", "--epochs", "0", "--name", "one", "--out", str(tmp_path)]
    options += ["--no-eval-untrained"]
    (tmp_path / "one").mkdir()
    train = recipe("train")
    settings = {**recipe("settings").DEFAULTS, "split_seed": 0}
    (tmp_path / "one" / "settings.json").write_text(json.dumps({"settings": settings, "environment": {}}))
    (tmp_path / "one" / name).write_text(content)
    reader = recipe("common").read_metrics if name == "metrics.json" else None
    with pytest.raises((SystemExit, ValueError), match=name):
        reader(tmp_path / "one" / name) if reader else train.main(options)


@pytest.mark.slow
def test_a_command_waits_for_another_one_in_its_directory(recipe, tmp_path, capsys):
    from temporal_agg.files import locked

    options = [*MINIATURE, "--model", "mean_resnet10t", "--epochs", "0", "--name", "one", "--out", str(tmp_path)]
    (tmp_path / "one").mkdir()
    with locked(tmp_path / "one" / ".lock", "a test"):
        done = threading.Thread(target=recipe("train").main, args=(options,))
        done.start()
        time.sleep(1)
        assert not (tmp_path / "one" / "metrics.json").exists()
    done.join(60)
    assert "another command is at work there; this one waits" in capsys.readouterr().out
    assert (tmp_path / "one" / "metrics.json").exists()


def test_an_interrupted_command_ends_with_one_line(recipe, capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as error:
        recipe("common").run(interrupted)
    assert error.value.code == 130
    assert capsys.readouterr().err.strip().endswith("stopped; the same command goes on.")


def test_a_killed_loader_process_ends_with_one_line(recipe):
    with pytest.raises(
        SystemExit, match=r"train.py: a process that reads frames was killed.* the same command goes on"
    ):
        with recipe("common").one_line("train.py"):
            raise RuntimeError("DataLoader worker (pid(s) 5) exited unexpectedly")


@pytest.mark.slow
def test_other_tracklets_are_another_run(recipe, tmp_path):
    options = ["--model", "mean_resnet10t", "--epochs", "1", "--name", "one", "--out", str(tmp_path)]
    recipe("train").main([*MINIATURE, *options])
    train = recipe("train")
    datasets = [train.data.open_dataset("synthetic", num_identities=8, num_cameras=2, seed=s) for s in (0, 0, 1)]
    keys = [train.tracklets_of(dataset) for dataset in datasets]
    assert keys[0] == keys[1] != keys[2]
    settings = json.loads((tmp_path / "one" / "settings.json").read_text())
    settings["settings"]["tracklets"] = keys[2]
    (tmp_path / "one" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match=r"holds a run with other settings \(tracklets: "):
        train.main([*MINIATURE, *options])


@pytest.mark.slow
def test_accumulated_batches_make_one_step(recipe, tmp_path):
    """Without BatchNorm and mining, the mean of two batches' gradients is that of one batch of both."""
    options = ["--model", "mean_test_vit", "--criterion", "gltr", "--optimizer", "sgd", "--epochs", "2"]
    for name, more in {"one": ["--identities", "4"], "two": ["--identities", "2", "--accumulate", "2"]}.items():
        recipe("train").main([*MINIATURE, *options, *more, "--name", name, "--out", str(tmp_path)])
    equal_runs(tmp_path / "one", tmp_path / "two")


def equal_runs(one, two):
    """The same losses by epoch and weights."""
    logs = [[json.loads(line)["loss"] for line in (run / "log.jsonl").open()] for run in (one, two)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    models = [temporal_agg.create_model(f"local-dir:{run}").state_dict() for run in (one, two)]
    for key, value in models[0].items():
        torch.testing.assert_close(models[1][key], value, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("before", [{"model": "mean_resnet10t"}, {"model_options": {"dtp": False, "tsa": False}}])
def test_stages_start_from_the_stage_before(recipe, folder, tmp_path, before):
    """From its encoder; from its aggregator too, if that is the same but for options (GLTR's frame embedding)."""
    file = tmp_path / "stages.yaml"
    stages = [{**before, "sampler": "frames", "batch-size": 4, "clip_length": 1, "epochs": 2}, {}]
    file.write_text(json.dumps({"stages": stages, "lr": 0.01, "epochs": 0, "model": "gltr_resnet10t"}))
    options = ["--config", str(file), "--data", f"folder:{folder}", "--name", "two", "--out", str(tmp_path)]
    argv = [*MINIATURE[4:], *options, "--criterion", "gltr"]
    argv.remove("--clip-length"), argv.remove("3")
    recipe("train").main(argv)
    first, last = (temporal_agg.create_model(f"local-dir:{tmp_path / d}") for d in ("two/stage1", "two"))
    torch.manual_seed(0)
    settings = settings_of(recipe, "--model", "gltr_resnet10t", "--size", "32x16")
    untrained = recipe("train").build_model(settings)
    weights = [model.encoder.state_dict()["backbone.conv1.0.weight"] for model in (first, last, untrained)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    same = "model" not in before
    assert torch.equal(last.aggregator.embed.weight, (first if same else untrained).aggregator.embed.weight)
    assert torch.equal(last.aggregator.dtp.branches[0].weight, untrained.aggregator.dtp.branches[0].weight)
    if same:
        assert not torch.equal(last.aggregator.embed.weight, untrained.aggregator.embed.weight)
    log = (tmp_path / "two" / "stage1" / "log.jsonl").read_text().splitlines()
    assert len(log) == 2
    assert (tmp_path / "two" / "log.jsonl").exists() is False  # no epoch, as asked for


def test_a_factor_of_zero_freezes(recipe, folder, tmp_path):
    """No gradient is made there, and what is frozen keeps its weights; the rest is trained."""
    train = recipe("train")
    frozen = {"encoder.backbone.conv1": 0.0, "encoder.backbone.layer1": 0.0}
    settings = settings_of(
        recipe, "--model", "mean_resnet10t", "--lr-factors", *(f"{k}={v}" for k, v in frozen.items())
    )
    model = train.build_model(settings)
    criterion = train.build_criterion(settings, model, 3)[1]
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = train.build_optimizer(settings, model, criterion)
    criterion(model(torch.randn(4, 2, 3, 32, 16), return_details=True), torch.tensor([0, 0, 1, 1]))["loss"].backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        still = name.startswith(tuple(frozen))
        assert (parameter.grad is None) == still, name
        assert not still or torch.equal(parameter, before[name]), name
    assert not torch.equal(
        model.encoder.backbone.layer2[0].conv1.weight, before["encoder.backbone.layer2.0.conv1.weight"]
    )


def gradients_of(rank, world, recipe_path, tmp_path):
    sys.path.insert(0, str(recipe_path))
    import train

    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store{world}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(2), temporal_agg.create_aggregator("attention", 12)).double()
    wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    criterion = temporal_agg.create_criterion("baseline", 4, model[1]).double()
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--sampler", "identity"], ["--sampler", "pairs", "--find-unused-parameters"]])
def test_two_processes_train_to_the_weights_of_one_where_nothing_is_batch_normalised(tmp_path, options):
    options = ["--model", "attention_test_vit", *options, "--batch-size", "4", "--epochs", "2"]
    # SGD, since Adam divides by what may be rounding alone.
    options += ["--optimizer", "sgd", "--lr", "0.05", "--out", str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]}
    for name, more in launch.items():
        command = [sys.executable, *more, str(SCRIPT), *MINIATURE, *options, "--name", name]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    settings = json.loads((tmp_path / "two" / "settings.json").read_text())
    assert settings["environment"]["processes"] == 2
    equal_runs(tmp_path / "one", tmp_path / "two")
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in launch]
    assert metrics[0]["map"] == pytest.approx(metrics[1]["map"], abs=1e-6)


@pytest.mark.slow
def test_two_processes_evaluate_the_model_that_is_saved(tmp_path):
    """BatchNorm's statistics are each process's own until they are broadcast."""
    options = ["--model", "mean_resnet10t", "--epochs", "4", "--lr", "0.01", "--out", str(tmp_path), "--name", "two"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *MINIATURE, *options], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    model = temporal_agg.create_model(f"local-dir:{tmp_path / 'two'}")
    dataset = temporal_agg.data.open_dataset("synthetic", num_identities=8, length=[4, 9], num_cameras=2)
    expected = load_file(tmp_path / "two" / "reference.safetensors")["gallery"]
    got = temporal_agg.embed_tracklets(model, dataset.gallery[: len(expected)], progress=False)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


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


def test_yaml_is_overridden_by_the_command_line(recipe, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 1\nclip-length: 6\nmodel-options: {quality: features}\n")
    settings = settings_of(recipe, "--config", str(file), "--clip-length", "4")
    assert (settings.lr, settings.clip_length, settings.model_options) == (1.0, 4, {"quality": "features"})


def test_the_learning_rate_rises_and_falls(recipe):
    settings = settings_of(recipe, "--warmup", "0.2")
    factor = recipe("train").lr_factor
    epochs = [p * settings.epochs for p in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert [factor(settings, epoch) for epoch in epochs] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert factor(settings_of(recipe, "--schedule", "constant"), 36) == 1
    steps = settings_of(recipe, "--schedule", "step", "--warmup", "0", "--step-epochs", "10")
    assert [factor(steps, epoch) for epoch in (0, 9.9, 10, 25)] == pytest.approx([1, 1, 0.1, 0.01])
    steps = settings_of(recipe, "--schedule", "step", "--warmup", "0", "--step-milestones", "4", "6")
    assert [factor(steps, epoch) for epoch in (0, 3.9, 4, 30)] == pytest.approx([1, 1, 0.1, 0.01])


def test_learning_rates_and_decay_by_module(recipe):
    train = recipe("train")
    argv = ["--lr", "0.5", "--head-lr-factor", "2", "--lr-factors", "aggregator.score=3", "--weight-decay", "0.25"]
    settings = settings_of(recipe, *argv, "--size", "32x16", "--model", "attention_resnet10t")
    model = train.build_model(settings)
    criterion = temporal_agg.create_criterion("baseline", 4, model)

    def by_name(settings):
        groups = train.build_optimizer(settings, model, criterion).param_groups
        of = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
        everything = [*model.named_parameters(), *criterion.named_parameters()]
        assert len(of) == len(everything)
        return {name: of[id(p)] for name, p in everything}

    got = by_name(settings)
    assert got["encoder.backbone.conv1.0.weight"] == (0.5, 0.25)
    assert got["encoder.backbone.bn1.weight"] == (0.5, 0)
    assert got["aggregator.score.weight"] == (1.5, 0.25)
    assert got["classifier.weight"] == (1.0, 0.25)
    assert by_name(settings_of(recipe, *argv, "--no-no-decay-norms"))["encoder.backbone.bn1.weight"] == (0.5, 0.25)


MINIATURES = {  # a paper's settings on a benchmark in its authors' layout
    ("loga", "mars"): (make_mars, {}),
    ("star", "duke"): (make_duke, {}),
    ("gltr", "ls-vid"): (make_ls_vid, {}),
    ("gltr_released", "mars"): (make_mars, {}),
    ("fgra", "ilids-vid"): (make_ilids_vid, {}),
    ("grl", "prid-2011"): (make_prid2011, {"people": 4}),
    ("grl_released", "mars"): (make_mars, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("system", "name"), MINIATURES)
def test_every_paper_trains_end_to_end(recipe, tmp_path, system, name):
    """Its own sampling, batches, optimizer, criterion and stages; a small backbone and small frames."""
    make, options = MINIATURES[system, name]
    root = make(tmp_path / "data", **options)
    file = tmp_path / "small.yaml"
    config = SCRIPT.parent / "configs" / f"{system}.yaml"
    settings = recipe("settings").read_config(config)
    small = {"backbone_pretrained": False, "size": "32x16", "epochs": 2, "workers": 0, "device": "cpu"}
    small |= {"base": str(config), "data": f"{name}:{root}", "out": str(tmp_path / "runs"), "eval_untrained": False}
    small["data_options"] = {"cache": False} | ({} if name == "prid-2011" else {"check_counts": False})
    small["model"] = settings["model"].replace("resnet50.tv_in1k", "resnet10t")
    if "stages" in settings:
        first = {**settings["stages"][0], "epochs": 1}
        small["stages"] = [first, *settings["stages"][1:]]
    if settings.get("model_options", {}).get("flow"):
        recipe("compute_flow").main(["--data", f"duke:{root}", "--data-options", "check_counts=false", "cache=false"])
    file.write_text(yaml.safe_dump(small))
    split = ["--split", "3"] if name in ("ilids-vid", "prid-2011") else []
    (results,) = recipe("train").main(["--config", str(file), *split]).values()
    assert results[0]["criterion"] == settings["criterion"]
    assert 0 < results[0]["map"] <= 1
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.endswith("-split3") == bool(split)
    assert len((run / "log.jsonl").read_text().splitlines()) == 2
    assert (run / "stage1" / "metrics.json").exists() == ("stages" in settings)


@pytest.mark.slow
def test_half_precision_and_recomputed_activations(recipe, tmp_path):
    """bfloat16 moves the losses by its rounding, computing activations twice not at all."""
    losses = {}
    for name, more in {"plain": [], "twice": ["--grad-checkpointing"], "half": ["--mixed-precision", "bf16"]}.items():
        argv = [*MINIATURE, "--model", "mean_resnet18", "--epochs", "2", "--warmup", "0", "--no-eval-untrained"]
        argv += [*more, "--name", name, "--out", str(tmp_path)]
        # accelerate fixes the precision for the rest of a process.
        subprocess.run([sys.executable, str(SCRIPT), *argv], check=True, capture_output=True)
        losses[name] = [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").open()]
    assert losses["twice"] == pytest.approx(losses["plain"], rel=1e-4)
    assert losses["half"] == pytest.approx(losses["plain"], rel=0.1)
    assert losses["half"] != losses["plain"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the failing lock reaches forked workers only")
def test_where_no_workers_can_be_started_one_line_says_so(recipe, monkeypatch):
    """As in a container with little shared memory, whatever lock it is that has no room: torch's half-made iterator
    would end in a traceback of its own."""
    raised, refused, make, room = [], [], _multiprocessing.SemLock, iter(())

    def lock(*args):
        if next(room, None) is None:
            raise OSError(28, "No space left on device")
        return make(*args)

    monkeypatch.setattr(multiprocessing.synchronize._multiprocessing, "SemLock", lock)
    monkeypatch.setattr(sys, "unraisablehook", lambda error: raised.append(str(error.exc_value)))
    for number in (0, 3, 6, 9, 10, 11, 12, 13, 99):
        room = iter(range(number))
        loader = torch.utils.data.DataLoader([0, 1], num_workers=2, multiprocessing_context="fork")
        try:
            assert len(list(recipe("common").start_workers(loader))) == 2
        except OSError as error:
            refused.append(str(error))
    gc.collect()
    assert multiprocessing.active_children() == []
    assert 4 < len(refused) < 9
    assert all("2 processes that read frames cannot be started" in text and "--workers 0" in text for text in refused)
    assert raised == []
    room = iter(())
    with pytest.raises(OSError, match=r"2 jobs cannot be started .*--jobs 1"):
        list(recipe("comparison").run_jobs(print, [(1,), (2,)], 2))
