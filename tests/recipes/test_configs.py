"""The papers' settings: a file for each system and benchmark that its paper reports, in words that the recipe knows."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from temporal_agg import create_criterion, create_model, data

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
REPORTED = {
    "loga": ("mars", "duke", "duke-si", "ilids-vid", "prid-2011"),
    "star": ("mars", "duke", "ilids-vid", "prid-2011"),
    "gltr": ("mars", "duke", "ilids-vid", "prid-2011", "ls-vid"),
    "gltr_released": ("mars", "duke", "ilids-vid", "prid-2011", "ls-vid"),
    "fgra": ("mars", "ilids-vid", "prid-2011"),
    "grl": ("mars", "ilids-vid", "prid-2011"),
    "grl_released": ("mars", "ilids-vid", "prid-2011"),
}
FILES = sorted(CONFIGS.glob("*.yaml"))


def merged(file):
    """The settings of a file over those of its base."""
    own = yaml.safe_load(file.read_text())
    base = own.pop("base", None)
    return {**merged(file.parent / base), **own} if base else own


def stages(settings):
    """The settings of each stage in turn."""
    common = {key: value for key, value in settings.items() if key != "stages"}
    return [{**common, **stage} for stage in settings.get("stages", [{}])]


def test_there_is_one_for_each_system_and_benchmark_that_a_paper_reports():
    want = set(REPORTED) | {f"{system}_{name}" for system, names in REPORTED.items() for name in names}
    assert {file.stem for file in FILES} == want
    for system, names in REPORTED.items():
        assert "data" not in merged(CONFIGS / f"{system}.yaml")
        for name in names:
            settings = merged(CONFIGS / f"{system}_{name}.yaml")
            assert settings["data"] == name
            assert settings["model"].startswith(f"{system}_resnet50.")
            assert settings["criterion"] == system
            with pytest.raises(ValueError, match="needs the path that it lies in"):
                data.open_dataset(name)
            assert settings.get("split") == ("all" if data.num_splits(name) > 1 else None)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_recipe_knows_every_setting(recipe, file):
    train = recipe("train")
    known = {field.name: field for field in dataclasses.fields(train.Settings)}
    settings = merged(file)
    for stage in settings.get("stages", []):
        assert set(stage) <= set(known)
    assert set(settings) <= set(known)
    parsed = dataclasses.asdict(train.parse_settings(["--config", str(file)]))
    assert {key: parsed[key] for key in settings} == settings


@pytest.mark.parametrize("system", REPORTED)
def test_every_model_and_criterion_builds_at_its_real_size(system):
    for settings in stages(merged(CONFIGS / f"{system}.yaml")):
        with torch.device("meta"):  # real shapes, no memory
            model = create_model(settings["model"], **settings.get("model_options", {}))
            criterion = create_criterion(settings["criterion"], 625, model, **settings.get("criterion_options", {}))
        assert model.encoder.num_features == 2048
        assert sum(p.numel() for p in criterion.parameters()) >= 2 * 2048


def test_the_first_stage_of_gltr_takes_single_frames():
    first, last = stages(merged(CONFIGS / "gltr.yaml"))
    clip = create_model("mean_resnet10t", **first["model_options"]).clip
    assert (first["sampler"], clip.length, clip.train_sampling) == ("frames", 1, "each")
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
def test_batches_and_learning_rates_are_the_papers(system, batches, last_lr):
    """Clips a batch, epochs, and the learning rate of the last epoch after so many steps down."""
    settings = stages(merged(CONFIGS / f"{system}.yaml"))
    assert [clips_and_epochs(stage) for stage in settings] == batches
    for stage, want in zip(settings, last_lr, strict=True):
        assert stage["schedule"] == "step"
        last = stage["epochs"] - 1
        steps = last // stage["step_epochs"] if "step_epochs" in stage else 0
        steps += sum(last >= milestone for milestone in stage.get("step_milestones", []))
        assert stage["lr"] * 0.1**steps == pytest.approx(want)
