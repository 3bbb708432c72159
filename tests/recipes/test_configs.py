"""The papers' settings: a file for each system, in words that the recipe knows, and what it says of each data set."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from temporal_agg import create_criterion, create_model, data

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
GOLDEN = json.loads(Path(__file__).with_name("configs.json").read_text())
REPORTED = {system: tuple(datasets) for system, datasets in GOLDEN["datasets"].items()}
CASES = [(system, name) for system, names in REPORTED.items() for name in ("", *names)]


@pytest.fixture
def merged(recipe):
    """The settings of a system's file, without what is said of single data sets."""

    def read(system):
        settings = recipe("settings").read_config(CONFIGS / f"{system}.yaml")
        del settings["datasets"]
        return settings

    return read


def stages(settings):
    """The settings of each stage in turn."""
    common = {key: value for key, value in settings.items() if key != "stages"}
    return [{**common, **stage} for stage in settings.get("stages", [{}])]


def test_there_is_one_file_for_each_system_and_it_names_what_its_paper_reports(recipe):
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == set(REPORTED)
    for system, names in REPORTED.items():
        settings = recipe("settings").read_config(CONFIGS / f"{system}.yaml")
        assert set(settings["datasets"]) == set(names)
        assert "data" not in settings
        assert settings["model"].startswith(f"{system}_resnet50.")
        assert settings["criterion"] == system
        for name, own in settings["datasets"].items():
            assert own == ({"split": "all"} if data.num_splits(name) > 1 else {})


@pytest.mark.parametrize(("system", "name"), CASES)
def test_the_settings_are_those_of_the_paper(recipe, system, name):
    """A bare name is looked up beside the recipe; 35 pairs of a system and a data set, or none."""
    train = recipe("train")
    argv = ["--config", f"{system}.yaml", *(["--data", f"{name}:somewhere"] if name else [])]
    want = dataclasses.asdict(train.Settings()) | GOLDEN["systems"][system]
    if name:
        want |= {"data": f"{name}:somewhere", **GOLDEN["datasets"][system][name]}
    assert dataclasses.asdict(train.parse_settings(argv)) == want
    assert dataclasses.asdict(train.parse_settings(["--config", str(CONFIGS / argv[1]), *argv[2:]])) == want


def test_a_file_of_ones_own_may_say_something_of_one_data_set(recipe, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: {CONFIGS / 'grl.yaml'}\nlr: 0.5\ndatasets:\n  mars: {{lr: 0.25, epochs: 7}}\n")

    def got(*argv):
        settings = recipe("train").parse_settings(["--config", str(file), *argv])
        return settings.lr, settings.epochs, settings.split

    assert got() == (0.5, 50, "")
    assert got("--data", "mars", "--root", "x") == (0.25, 7, "")
    assert got("--data", "mars:x", "--epochs", "3") == (0.25, 3, "")
    assert got("--data", "prid-2011:x") == (0.5, 50, "all")
    assert got("--data", "prid-2011:x", "--split", "3") == (0.5, 50, "3")


@pytest.mark.slow
@pytest.mark.parametrize("system", REPORTED)
def test_every_model_and_criterion_builds_at_its_real_size(merged, system):
    for settings in stages(merged(system)):
        with torch.device("meta"):  # real shapes, no memory
            model = create_model(settings["model"], **settings.get("model_options", {}))
            criterion = create_criterion(settings["criterion"], 625, model, **settings.get("criterion_options", {}))
        assert model.encoder.num_features == 2048
        assert sum(p.numel() for p in criterion.parameters()) >= 2 * 2048


def test_the_first_stage_of_gltr_takes_single_frames(merged):
    first, last = stages(merged("gltr"))
    model = create_model("gltr_resnet10t", **first["model_options"])
    assert first["model"] == last["model"]
    assert (first["sampler"], model.clip.length, model.clip.train_sampling) == ("frames", 1, "each")
    assert {name for name, _ in model.aggregator.named_parameters()} == {"embed.weight", "embed.bias"}
    assert last["sampler"] == "tracklets"


def clips_and_epochs(settings):
    """Clips a batch and epochs."""
    if settings["sampler"] == "identity":
        return settings["identities"] * settings["clips"], settings["epochs"]
    return settings["batch_size"] * (2 if settings["sampler"] == "pairs" else 1), settings["epochs"]


@pytest.mark.parametrize(
    ("system", "batches", "last_lr"),
    [
        ("loga", [(32, 240)], [3e-7]),
        ("star", [(16, 300)], [5e-5]),
        ("gltr", [(128, 20), (10, 400)], [1e-3, 1e-3]),
        ("gltr_released", [(10, 501)], [1e-6]),
        ("fgra", [(64, 300)], [3e-6]),
        ("grl", [(16, 50)], [1e-6]),
        ("grl_released", [(16, 60)], [1e-6]),
    ],
)
def test_batches_and_learning_rates_are_the_papers(merged, system, batches, last_lr):
    """Clips a batch, epochs, and the learning rate of the last epoch after so many steps down."""
    settings = stages(merged(system))
    assert [clips_and_epochs(stage) for stage in settings] == batches
    for stage, want in zip(settings, last_lr, strict=True):
        assert stage["schedule"] == "step"
        last = stage["epochs"] - 1
        steps = last // stage["step_epochs"] if "step_epochs" in stage else 0
        steps += sum(last >= milestone for milestone in stage.get("step_milestones", []))
        assert stage["lr"] * 0.1**steps == pytest.approx(want)
