"""The demonstration weights in hub/ load, and are worth what their card says."""

import json
from pathlib import Path

import pytest

import temporal_agg
from temporal_agg import data, retrieval

(DIRECTORY,) = [path.parent for path in (Path(__file__).parents[2] / "hub").glob("*/model.safetensors")]


@pytest.mark.slow
def test_demonstration_weights_give_their_metrics():
    model = temporal_agg.create_model(f"local-dir:{DIRECTORY}")
    settings = json.loads((DIRECTORY / "settings.json").read_text())["settings"]
    metrics = json.loads((DIRECTORY / "metrics.json").read_text())
    dataset = data.open_dataset("synthetic", **settings["data_options"])
    sides = (dataset.query, dataset.gallery)
    query, gallery = (temporal_agg.embed_tracklets(model, side, progress=False) for side in sides)
    ids = [[getattr(t, key) for t in side] for side in sides for key in ("pid", "camera")]
    got = retrieval.evaluate(retrieval.distances(query, gallery, model.clip.distance), *ids)
    assert got.map == pytest.approx(metrics["map"], abs=1e-3)
    assert got.rank(1) == pytest.approx(metrics["rank1"], abs=1e-3)
    assert f"| this model | {100 * metrics['map']:.1f} |" in (DIRECTORY / "README.md").read_text()
    assert (DIRECTORY / "model.safetensors").stat().st_size < 5e6
