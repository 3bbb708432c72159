"""The weights in hub/ load, and their cards say what was measured."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import temporal_agg
from temporal_agg import data, retrieval

ROOT = Path(__file__).parents[2]
HUB = sorted(file.parent for file in (ROOT / "hub").glob("*/model.safetensors"))
(DEMONSTRATION,) = [directory for directory in HUB if directory.name.endswith(".synthetic")]
OF_WARD = [directory for directory in HUB if directory.name.endswith(".ward")]


@pytest.mark.parametrize("directory", HUB, ids=lambda directory: directory.name)
def test_the_card_says_where_the_weights_are(directory):
    """In this clone: nothing is on the Hub yet."""
    assert f'create_model("local-dir:hub/{directory.name}")' in (directory / "README.md").read_text()


@pytest.mark.slow
def test_demonstration_weights_give_their_metrics():
    model = temporal_agg.create_model(f"local-dir:{DEMONSTRATION}")
    settings = json.loads((DEMONSTRATION / "settings.json").read_text())["settings"]
    metrics = json.loads((DEMONSTRATION / "metrics.json").read_text())
    dataset = data.open_dataset("synthetic", **settings["data_options"])
    sides = (dataset.query, dataset.gallery)
    query, gallery = (temporal_agg.embed_tracklets(model, side, progress=False) for side in sides)
    ids = [[getattr(t, key) for t in side] for side in sides for key in ("pid", "camera")]
    got = retrieval.evaluate(retrieval.distances(query, gallery, model.clip.distance), *ids)
    assert got.map == pytest.approx(metrics["map"], abs=1e-3)
    assert got.rank(1) == pytest.approx(metrics["rank1"], abs=1e-3)
    assert f"| this model | {100 * metrics['map']:.1f} |" in (DEMONSTRATION / "README.md").read_text()


@pytest.mark.parametrize("directory", OF_WARD, ids=lambda directory: directory.name)
def test_weights_trained_on_all_of_wards_people_show_what_halves_reach(directory):
    """What their own training has seen says nothing; each half was tested by a model that had not seen it."""
    record = json.loads((ROOT / "recipes" / "benchmarks" / "results" / "ward.json").read_text())
    runs = record["results"][directory.name.partition("_mobilenetv2")[0]].values()
    card = (directory / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if f"has not seen ({len(runs)} halves)" in line]
    mean_ap, rank1 = (100 * np.mean([run[key] for run in runs]) for key in ("map", "rank1"))
    assert f"| {mean_ap:.1f} | {rank1:.1f} |" in line
    assert json.loads((directory / "settings.json").read_text())["settings"]["data_options"] == {"everybody": True}
    assert "BSD-3-Clause" in card


@pytest.mark.slow
@pytest.mark.parametrize("directory", OF_WARD, ids=lambda directory: directory.name)
def test_weights_know_the_rest_of_a_tracklet(directory):
    """Drawn figures are nobody that they have seen; across cameras these would be too hard."""
    model = temporal_agg.create_model(f"local-dir:{directory}")
    people = data.open_dataset("synthetic", num_identities=24, length=(12, 12), size=(128, 64), seed=3).gallery
    halves = [
        [data.Tracklet([frame.permute(1, 2, 0).numpy() for frame in t.load(part)], t.pid) for t in people]
        for part in (range(0, 6), range(6, 12))
    ]
    first, second = (temporal_agg.embed_tracklets(model, half, progress=False) for half in halves)
    nearest = retrieval.distances(first, second, model.clip.distance).argmin(1)
    assert (nearest == torch.arange(len(people))).float().mean() > 0.8


def test_every_file_of_weights_is_small():
    assert OF_WARD
    assert all((directory / "model.safetensors").stat().st_size < 12e6 for directory in HUB)
