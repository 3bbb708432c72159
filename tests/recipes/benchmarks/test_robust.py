"""Foreign frames in tracklets: who comes in where, the areas against loops, and the page against its file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from temporal_agg import data
from temporal_agg.aggregators import create_aggregator
from temporal_agg.models import TrackletModel


@pytest.fixture(scope="module")
def robust(recipe):
    return recipe("robust")


@pytest.fixture(scope="module")
def people():
    return data.synthetic_data(num_identities=8, num_cameras=2, length=(6, 9), faults={}, size=(32, 16))


class Colours(torch.nn.Module):
    """The mean colours of a frame's quarters."""

    num_features = 12
    data_config = {"input_size": (3, 32, 16), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear"}  # noqa: RUF012
    config = None

    def forward(self, frames, flow=None):
        return torch.nn.functional.adaptive_avg_pool2d(frames, (4, 1)).flatten(1)[:, :, None, None]


def test_the_area_is_that_of_all_pairs(robust):
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 4, 40), rng.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert robust.area(scores, positive) == pytest.approx(np.mean(pairs))
    assert np.isnan(robust.area([1, 2], [True, True]))


def test_intruders_are_other_people_of_the_same_camera(robust, people):
    tracklets = [*people.query, *people.gallery]
    for share in (0.0, 0.3):
        plan = robust.intrusions(tracklets, share, 1)
        assert plan == robust.intrusions(tracklets, share, 1)
        seen = [torch.full((len(t), 2), float(i)) for i, t in enumerate(tracklets)]
        for i, (x, (run, other)) in enumerate(zip(robust.mixed(seen, plan), plan, strict=True)):
            assert len(run) == round(share * len(tracklets[i]))
            assert tracklets[other].camera == tracklets[i].camera
            assert tracklets[other].pid != tracklets[i].pid
            assert x[:, 0].tolist() == [other if k in run else i for k in range(len(tracklets[i]))]


def test_the_comparison_on_ward_puts_the_same_people_in(robust, recipe, people):
    tracklets = [*people.query, *people.gallery]
    seen = [torch.stack(t.load(range(len(t)))) for t in tracklets]
    memory = [
        data.Tracklet(list(x.permute(0, 2, 3, 1).numpy()), t.pid, t.camera)
        for x, t in zip(seen, tracklets, strict=True)
    ]
    count = len(people.query)
    faulty = recipe("ward").with_fault(data.TrackletData([], memory[:count], memory[count:]), "foreign", 0.3, 4)
    mixed = robust.mixed(seen, robust.intrusions(tracklets, 0.3, 4))
    for x, t in zip(mixed, [*faulty.query, *faulty.gallery], strict=True):
        assert torch.equal(x, torch.stack(t.load(range(len(t)))))


def test_measures_are_those_of_embed_tracklets(robust, people):
    """Without foreign frames; and the mean behind outlier_mask is what reject_outliers gives."""
    from temporal_agg import embed_tracklets

    tracklets = [*people.query, *people.gallery]
    model = TrackletModel(Colours(), create_aggregator("mean", 12), data.ClipConfig(test_sampling="all")).eval()
    found = robust.measure(model, "mean", people, 0)
    assert set(found["measures"]) == set(map(str, robust.SHARES))
    for reject, key in ((False, "mean"), (True, "outlier_mask, then mean")):
        rows = embed_tracklets(model, tracklets, reject_outliers=reject, progress=False, num_workers=0)
        want = robust.metrics(rows, people, "cosine").map
        assert found["measures"]["0.0"][key]["map"] == pytest.approx(float(want), abs=1e-6)
    assert found["areas"]["0.4"]["weights"] > 0.5
    assert found["areas"]["0.4"]["purity"] > 0.5


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("mean", ["measures", "0.3"], [], r"it\['measures'\] has no '0\.3'"),
        ("mean", ["measures", "0.0", "mean", "map"], ["x"], r"\['mean'\]\['map'\] should be share, got 'x'"),
        ("mean", ["measures", "0.0", "mean", "map"], [84.2], "should be share, got 84.2"),
        ("mean", ["measures", "0.0", "mean"], [], r"it\['measures'\]\['0\.0'\] has no 'mean'"),
        ("mean", ["areas", "0.3", "purity"], [], r"it\['areas'\]\['0\.3'\] has no 'purity'"),
        ("mean", ["areas", "0.3"], [], r"areas has no '0\.3'"),
        ("mean", ["split"], [1], "is of mean, split 1: rename it"),
        ("synthetic", ["name"], [], "it has no 'name'"),
        ("synthetic", ["areas", "blur"], [], "areas has no 'blur'"),
    ],
)
def test_what_is_wrong_in_a_split_is_named(robust, tmp_path, wrong, name, place, value, message):
    def first(of):
        return {key: first(x) for key, x in of.items()} if isinstance(of, dict) else of[0]

    kept = json.loads((robust.RESULTS / "robust.json").read_text(encoding="utf-8"))["models"]
    file = tmp_path / f"{name}-split0.json"
    good = {"name": name, **first(kept[name])}
    file.write_text(json.dumps(good))
    assert robust.read(file) == good
    wrong(file, good, place, *value)
    with pytest.raises(ValueError, match=rf"{name}-split0\.json.*{message}"):
        robust.read(file)


def test_the_page_is_that_of_the_kept_file(robust):
    kept = robust.RESULTS / "robust.json"
    study = json.loads(kept.read_text(encoding="utf-8"))
    assert (robust.RESULTS / "robust.md").read_text(encoding="utf-8") == robust.text(study), (
        "run recipes/benchmarks/robust.py with --results recipes/benchmarks/results"
    )
    page = (Path(__file__).parents[3] / "docs" / "robust.md").read_text(encoding="utf-8")
    assert "results/robust.md" in page
    assert "results/robust.png" in page
