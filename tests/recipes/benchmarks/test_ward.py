"""The comparison on WARD in miniature: its numbers are those of its runs, and nothing is measured twice."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from safetensors.torch import load_file

import temporal_agg
from temporal_agg import data, retrieval
from temporal_agg.aggregators import create_criterion, registry_entry
from temporal_agg.data.benchmarks import PUBLISHED

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks_on_disk import make_ward

NAMES = ["mean", "gltr", "start"]
PEOPLE, FRAMES = 6, 4
RESULTS = Path(__file__).parents[3] / "recipes" / "benchmarks" / "results"


@pytest.fixture(scope="module")
def ward(recipe):
    return recipe("ward")


@pytest.fixture(scope="module")
def tiny(ward):
    return ward.Size(
        backbone="lcnet_035",
        size=(32, 32),
        frames=3,
        identities=2,
        epochs=1,
        encoder_epochs=1,
        rates=((1e-3, 2.0),),
        shares=(("foreign", 0.5), ("bad boxes", 0.5)),
        splits=(1,),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Few people, which are counted as all of WARD's."""
    root = make_ward(tmp_path_factory.mktemp("data"), PEOPLE, FRAMES, size=(16, 32))
    counts = {"persons": PEOPLE, "cameras": 3, "tracklets": 3 * PEOPLE, "frames": PEOPLE * 3 * (FRAMES + 1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PUBLISHED, "ward", PUBLISHED["ward"]._replace(counts=counts))
        yield root


@pytest.fixture(scope="module")
def argv(tmp_path_factory, root):
    out = tmp_path_factory.mktemp("ward")
    weights = out / "imagenet.safetensors"
    model = timm.create_model("lcnet_035", num_classes=0)
    for _ in range(20):  # without BatchNorm's statistics all people look the same, to seven digits
        model(torch.randn(32, 3, 32, 32))
    safetensors.torch.save_file(model.state_dict(), weights)
    places = ["--root", str(root), "--backbone-weights", str(weights), "--out", str(out / "runs")]
    return [*places, "--results", str(out / "results"), "--only", ",".join(NAMES), "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(ward, tiny, argv):
    return ward.main(argv, tiny)


@pytest.fixture
def results(ward, argv, finished, tmp_path):
    """A copy of what was measured."""
    shutil.copytree(ward.parse(argv).results, tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def two(finished):
    """The same with a second split, which nobody trained."""
    record = json.loads(json.dumps(finished))
    record["size"]["splits"] = [1, 2]
    for name, runs in record["results"].items():
        runs["2"] = json.loads(json.dumps(runs["1"]))
        for key, found in runs["2"]["tests"].items():
            found["map"] = (found["map"] + len(name) / 10 + len(key) / 70) % 1
    return record


def rows(written):
    """The cells of the first table row of each name."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in written.splitlines() if line.startswith("| ")]
    return {cells[0]: cells for cells in reversed(lines)}


@pytest.mark.slow
def test_the_record_holds_what_the_runs_reach(recipe, ward, argv, finished):
    """By evaluate.py, from the files on the disk, without the memory of frames."""
    args = ward.parse(argv)
    run = args.out / "gltr-split1-rate0"
    ((result,),) = recipe("evaluate").main([str(run), "--out", str(args.out / "eval"), "--no-figures"]).values()
    got = finished["results"]["gltr"]["1"]
    assert got["tests"]["clean"] == {"map": pytest.approx(result["map"]), "rank1": pytest.approx(result["rank1"])}
    faults = {"clean", "foreign 50 %", "bad boxes 50 %"}
    assert set(got["tests"]) == faults | {"clean, outliers rejected", "foreign 50 %, outliers rejected"}
    assert (got["criterion"], got["num_features"], len(got["losses"])) == ("gltr", 384, 1)
    assert json.loads((args.results / "ward.json").read_text()) == json.loads(json.dumps(finished))


@pytest.mark.slow
def test_everybody_starts_from_the_encoder_of_the_split_and_gltr_from_its_first_stage(ward, argv, finished):
    out = ward.parse(argv).out
    of = {name: load_file(out / name / "model.safetensors") for name in ("encoder-split1", "start-split1-rate0")}
    assert all(value.equal(of["encoder-split1"][key]) for key, value in of["start-split1-rate0"].items())
    settings = json.loads((out / "gltr-split1-rate0" / "settings.json").read_text())["settings"]
    assert settings["init"] == "../gltr-stage_1-split1-rate0"
    settings = json.loads((out / "gltr-stage_1-split1-rate0" / "settings.json").read_text())["settings"]
    assert (settings["init"], settings["clip_length"]) == ("../encoder-split1", 1)


@pytest.mark.slow
def test_what_is_recorded_is_not_trained_again_on_another_machine_either(
    recipe, ward, tiny, argv, finished, results, monkeypatch
):
    record = json.loads((results / "ward.json").read_text())
    del record["results"]["start"]["1"]
    (results / "ward.json").write_text(json.dumps(record))
    trained, train = [], recipe("train").train
    monkeypatch.setattr(
        ward.train, "train", lambda directory, *rest: trained.append(directory) or train(directory, *rest)
    )
    again = ward.main([*argv, "--results", str(results)], tiny)
    assert [directory.name for directory in trained] == ["start-split1-rate0"]
    assert again["results"] == finished["results"]
    with pytest.raises(SystemExit, match="other settings \\(epochs\\)"):
        ward.main([*argv, "--results", str(results)], dataclasses.replace(tiny, epochs=2))


@pytest.mark.slow
def test_systems_are_trained_longer_where_that_is_asked_for(ward, tiny, argv, finished, two, results):
    assert finished["longer"] == {}
    longer = ward.main([*argv, "--longer", "--results", str(results)], tiny)["longer"]
    assert set(longer) == {"mean", "gltr"}
    assert len(longer["gltr"]["1"]["losses"]) == 3 * len(finished["results"]["gltr"]["1"]["losses"]) == 3
    assert set(longer["gltr"]["1"]["tests"]) == {"clean"}
    two["longer"] = longer
    table = rows(ward.text(two, NAMES).partition("## More steps")[2])
    of = {
        name: [100 * run["tests"]["clean"]["map"] for run in (two["results"][name]["1"], longer[name]["1"])]
        for name in longer
    }
    assert table["mean"][1:3] == [f"{value:.1f}" for value in of["mean"]]
    assert table["gltr"][3] == f"{of['gltr'][1] - of['gltr'][0]:+.1f}"
    assert table["gltr"][5] == f"{of['gltr'][1] - of['mean'][1]:+.1f}"


@pytest.mark.slow
def test_what_a_system_is_before_it_is_trained_stands_beside_what_it_becomes(ward, tiny, argv, results, monkeypatch):
    monkeypatch.setattr(ward, "REASONS", {"start: gltr": ward.REASONS["start: gltr"]})
    record = ward.main([*argv, "--reasons", "--results", str(results)], tiny)
    got = record["results"]["start: gltr"]["1"]
    assert set(got["tests"]) == {"clean"}
    out = ward.parse(argv).out
    before, stage = (
        load_file(out / place / "model.safetensors")
        for place in ("start-gltr-split1-rate0", "gltr-stage_1-split1-rate0")
    )
    shared = [key for key in before if key in stage]
    assert shared
    assert all(before[key].equal(stage[key]) for key in shared)
    table = rows((results / "ward.md").read_text().partition("## Before and without")[2])
    trained, mean = (100 * record["results"][name]["1"]["tests"]["clean"]["map"] for name in ("gltr", "start"))
    value = 100 * got["tests"]["clean"]["map"]
    assert table["start: gltr"][1:] == ["1", f"{value:.1f}", f"{value - mean:+.1f}", f"{trained - value:+.1f}"]


@pytest.mark.slow
def test_a_step_is_timed_and_nothing_is_trained(ward, tiny, argv, finished, results):
    record = ward.main([*argv, "--steps", "--results", str(results)], tiny)
    assert set(record["steps"]["ms"]) == {"mean", "gltr"}
    assert all(len(times) == 5 and min(times) > 0 for times in record["steps"]["ms"].values())
    assert {**record, "steps": {}} == json.loads(json.dumps(finished))
    cells = rows((results / "ward.md").read_text().partition("## What it costs")[2])["gltr"]
    assert cells[-1] == f"{np.median(record['steps']['ms']['gltr']):.0f}"


@pytest.mark.slow
def test_what_rejecting_outliers_gains_is_paired(ward, two):
    table = ward.text(two, NAMES).partition("## Foreign frames rejected")[2].partition("##")[0]
    for name in NAMES:
        tests = [two["results"][name][s]["tests"] for s in "12"]
        cells = rows(table)[name]
        assert len(cells) == 1 + 2 * 2
        for i, key in enumerate(("clean", "foreign 50 %")):
            after, before = ([100 * t[k]["map"] for t in tests] for k in (f"{key}, outliers rejected", key))
            assert cells[1 + 2 * i].startswith(f"{np.mean(after):.1f} ± ")
            assert cells[2 + 2 * i].strip("*").startswith(f"{np.mean(after) - np.mean(before):+.1f} ± ")


@pytest.mark.slow
def test_the_tables_are_of_the_splits_that_are_whole(ward, two):
    results = two["results"]
    written = ward.text(two, NAMES)
    assert "**2 of 2 splits are whole** (1, 2)" in written
    maps = {name: 100 * np.array([results[name][s]["tests"]["clean"]["map"] for s in "12"]) for name in NAMES}
    half = {name: 12.7062 * maps[name].std(ddof=1) / 2**0.5 for name in NAMES}
    assert rows(written)["gltr"][1] == f"{maps['gltr'].mean():.1f} ± {half['gltr']:.1f}"
    assert rows(written)["gltr"][3].strip("*").startswith(f"{(maps['gltr'] - maps['mean']).mean():+.1f} ± ")
    del results["gltr"]["2"]
    assert ward.gather(two, NAMES)[0] == [1]
    written = ward.text(two, NAMES)
    assert "**1 of 2 splits are whole** (1)" in written
    assert rows(written)["gltr"][1] == f"{maps['gltr'][0]:.1f}"  # one split has no interval, and nothing is bold
    assert "**" not in rows(written)["gltr"][3]
    results.clear()
    written = ward.text(two, NAMES)
    assert "not finished" in written
    encoder = two["encoders"]["1"]
    for found in (encoder["untrained"], encoder["tests"]["clean"]):
        assert f"mAP {100 * found['map']:.1f}, rank-1 {100 * found['rank1']:.1f}" in written


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["search"], [], "it has no 'search'"),
        (["environments", 0, "torch"], [2], r"\['environments'\]\[0\]\['torch'\] should be str, got 2"),
        (["encoders", "1"], [[]], r"encoders\['1'\] should be dict, got \[\]"),
        (["encoders", "1", "untrained", "map"], [], r"encoders\['1'\]\['untrained'\] has no 'map'"),
        (["results", "mean"], ["x"], r"results\['mean'\] should be dict, got 'x'"),
        (["results", "mean", "1", "tests", "foreign 50 %"], [], r"results\['mean'\]\['1'\]\['tests'\] has no 'fore"),
        (["results", "gltr", "1", "tests", "clean", "map"], [54.2], r"\['clean'\]\['map'\] should be share, got 54\.2"),
        (["results", "gltr", "1", "tests", "clean", "map"], [float("nan")], "should be share, got nan"),
        (["results", "gltr", "1", "processor_seconds"], [None], "should be number, got None"),
        (["results", "gltr", "1", "num_features"], [True], "should be int, got True"),
    ],
)
def test_what_is_wrong_in_a_record_is_named(ward, tiny, finished, tmp_path, wrong, place, value, message):
    wrong(tmp_path / "ward.json", json.loads(json.dumps(finished)), place, *value)
    before = (tmp_path / "ward.json").read_text()
    with pytest.raises(SystemExit, match=rf"ward\.py: .*ward\.json: .*{message}.*restore the file"):
        ward.main(["--tables", "--results", str(tmp_path)], tiny)
    assert (tmp_path / "ward.json").read_text() == before


@pytest.mark.slow
def test_what_failed_is_named_and_not_in_the_tables(ward, two):
    two["results"]["gltr"]["2"] = {"variant": "gltr", "split": 2, "failed": "the loss is nan"}
    written = ward.text(two, NAMES)
    assert "not finite: gltr." in written
    assert "2 of 2" in written
    assert written.count("| gltr |") == 1  # among the learning rates


def test_what_contradicts_a_paper_is_said_with_what_the_controls_show(ward):
    low, high = [0.1, 0.12, 0.11], [0.5, 0.53, 0.51]
    names = {"mean": high, "loga": low, "gltr": low, "fgra": high, "mean: gltr's loss": low, "loga: common loss": low}
    variants = {name: {"map": {"clean": values}} for name, values in names.items()}
    loga, gltr = ward.against_papers(variants).splitlines()
    assert "`loga`" in loga
    assert "its aggregator is a reason" in loga
    assert "its loss" not in loga
    assert "`gltr`" in gltr
    assert "its loss is a reason" in gltr
    assert "its aggregator" not in gltr
    better = ward.against_papers({**variants, "loga: common loss": variants["fgra"]}).splitlines()[0]
    assert "higher with the common loss, so its own loss is a reason" in better
    assert "its aggregator" not in better
    del variants["loga: common loss"]
    assert "not known" in ward.against_papers(variants).splitlines()[0]


@pytest.mark.slow
def test_another_seed_takes_the_learning_rates_of_the_first(ward, tiny, argv, finished, tmp_path):
    results = ward.parse(argv).results
    argv = [*argv, "--out", str(tmp_path / "runs"), "--results", str(tmp_path), "--seed", "1", "--only", "mean"]
    again = ward.main([*argv, "--beside", str(results)], tiny)
    assert again["search"] == finished["search"]
    assert set(again["encoders"]) == {"0", "1"}
    assert again["encoders"]["1"]["losses"] != finished["encoders"]["1"]["losses"]
    settings = json.loads((tmp_path / "runs" / "mean-split1-rate0" / "settings.json").read_text())["settings"]
    assert settings["seed"] == 1001
    page = (tmp_path / "ward.md").read_text()
    assert "drawn with seed 1" in page
    assert "on split 0, of seed 0." in page
    assert "--seed 1" in page
    assert "seed" not in (results / "ward.md").read_text()
    with pytest.raises(SystemExit, match="--beside wants"):
        ward.main([*argv, "--beside", str(tmp_path / "none")], tiny)


def test_a_seed_beside_the_first_one_and_both_together(ward, two):
    other = json.loads(json.dumps(two))
    two["size"]["seed"] = 1
    for i, runs in enumerate(other["results"].values()):
        for split, run in runs.items():
            for j, found in enumerate(run["tests"].values()):
                found["map"] = (0.3 * i + 0.17 * int(split) * (j + 1) + 0.1 * i * i) % 1
    written = ward.text(two, NAMES, other).partition("## Beside seed 0")[2].partition("\n## ")[0]
    assert "on splits 1, 2." in written
    assert set(rows(written)) == {"", "---", "gltr", "start"}

    def gaps(record, name, key):
        tests = [[record["results"][of][split]["tests"][key]["map"] for split in "12"] for of in (name, "mean")]
        return 100 * np.subtract(*tests)

    for name in ("gltr", "start"):
        seeds = [gaps(of, name, "clean") for of in (other, two)]
        faults = [(gaps(other, name, key) + gaps(two, name, key)) / 2 for key in ("foreign 50 %", "bad boxes 50 %")]
        want = [*seeds, (seeds[0] + seeds[1]) / 2, *faults]
        for cell, of in zip(rows(written)[name][1:], want, strict=True):
            mean, half = map(float, cell.strip("*").split(" ± "))
            assert mean == pytest.approx(of.mean(), abs=0.051)
            assert half == pytest.approx(12.706 * abs(of[0] - of[1]) / 2, rel=1e-3, abs=0.051)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_page_shows_the_record_that_is_kept(ward, seed):
    """docs/results.md includes ward.md."""
    first, folder = ward.read_record(RESULTS / "ward.json", ward.Size()), RESULTS / ("seed1" if seed else "")
    record = ward.read_record(folder / "ward.json", ward.Size(seed=seed))
    names, other = (list(ward.SHOWN), first) if seed else (list(ward.VARIANTS), None)
    assert (folder / "ward.md").read_text(encoding="utf-8") == ward.text(record, names, other)
    assert (folder / "ward.png").exists() == bool(ward.gather(record, names)[0])


def test_the_best_rate_is_that_of_the_highest_map(ward):
    def at(*maps):
        return {"x": {str(i): {"tests": {"clean": {"map": m}}} if m else {"failed": ""} for i, m in enumerate(maps)}}

    assert [ward.best(at(*maps), "x") for maps in ((0.5, 0.6, 0.55), (0.5, 0.5), (None, 0.1), (None,))] == [1, 0, 1, 0]
    assert ward.best({}, "start") == 0


@pytest.mark.parametrize("fault", ["foreign", "occlusion", "bad boxes"])
def test_a_fault_befalls_one_run_of_each_tracklet(ward, tiny, root, fault):
    dataset = ward.split_of(str(root), tiny, 1)
    made, again = (ward.with_fault(dataset, fault, 0.5, 1) for _ in range(2))
    everybody = [*dataset.query, *dataset.gallery]
    for before, after, same in zip(
        everybody, [*made.query, *made.gallery], [*again.query, *again.gallery], strict=True
    ):
        assert (before.pid, before.camera, len(before)) == (after.pid, after.camera, len(after))
        assert all(np.array_equal(x, y) for x, y in zip(after.frames, same.frames, strict=True))
        hit = [i for i, (x, y) in enumerate(zip(before.frames, after.frames, strict=True)) if not np.array_equal(x, y)]
        assert len(hit) == round(0.5 * len(before))
        assert hit == list(range(hit[0], hit[0] + len(hit)))
        others = [f for t in everybody if t.camera == before.camera and t.pid != before.pid for f in t.frames]
        for i in hit:
            x, y, half = before.frames[i], after.frames[i], tiny.size[1] // 2
            assert y.shape == x.shape
            if fault == "foreign":
                assert any(np.array_equal(y, f) for f in others)
            if fault == "occlusion":
                assert np.array_equal(y[:, half:], x[:, half:])
                assert any(np.array_equal(y[:, :half], f[:, :half]) for f in others)


def test_a_box_that_is_off_shows_what_lies_there(ward, monkeypatch):
    """Shifted by a quarter of the width, with the border going on beyond the frame."""
    frame = np.random.default_rng(0).integers(0, 256, (16, 8, 3), np.uint8)

    class Drawn:
        def uniform(self, low, high):
            return 1.0, 0.25, 0.0

    got = ward.off(frame, Drawn())
    assert np.array_equal(got[:, :6], frame[:, 2:])
    assert np.array_equal(got[:, 6:], np.repeat(frame[:, 7:], 2, 1))


@pytest.mark.slow
def test_every_variant_differs_from_every_other_and_is_built(recipe, ward, tiny, tmp_path):
    train = recipe("train")
    plan = ward.Plan(tiny, "somewhere", "", tmp_path)
    seen = []
    for name in [*ward.VARIANTS, *ward.REASONS, *ward.STARTS]:
        settings = ward.settings_of(plan, name, 1, 0)
        model = train.build_model(settings)
        create_criterion(settings.criterion, 6, model, **settings.criterion_options)
        assert model.clip.length == (1 if name in ward.STARTS else tiny.frames), name
        own = registry_entry(model.aggregator.config["name"]).default_criterion
        assert name not in ward.SYSTEMS or settings.criterion == own
        seen.append((settings.model, settings.model_options, settings.criterion, settings.criterion_options))
        seen[-1] += (settings.epochs, settings.clip_length)
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.slow
def test_the_figure_shows_the_differences(ward, two):
    drawing = ward.figure(two, NAMES)
    assert [axes.get_title() for axes in drawing.axes] == ["clean", "foreign 50 %", "bad boxes 50 %"]
    _, variants = ward.gather(two, NAMES)
    want = ward.comparison.difference(variants, "gltr", "mean", "foreign 50 %")[0]
    assert drawing.axes[1].lines[0].get_xdata()[0] == pytest.approx(want)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--root", "x", "--only", "meen"], "--only has no 'meen'"),
        (["--root", "x", "--splits", "0"], "--splits must be some of 1,2"),
        ([], "--root: where does WARD lie"),
    ],
)
def test_wrong_arguments_are_named(ward, argv, message, capsys):
    with pytest.raises(SystemExit):
        ward.main(argv)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_weights_are_trained_on_everybody_and_say_what_halves_reach(recipe, ward, tiny, argv, root, finished, tmp_path):
    args = ward.parse(argv)
    places = ["--root", str(root), "--backbone-weights", args.backbone_weights, "--out", str(tmp_path)]
    (run,) = recipe("ward_weights").main(
        ["gltr", *places, "--results", str(args.results), "--unseen", f"ward:{root}", "--device", "cpu"], tiny
    )
    settings = json.loads((run / "settings.json").read_text())["settings"]
    assert settings["init"] == "../gltr-stage_1-everybody-rate0"
    (dataset,) = recipe("common").open_splits(**recipe("common").own_data(str(run))).values()
    assert (len(dataset.train), len(dataset.query), len(dataset.gallery)) == (3 * PEOPLE, 0, 0)
    release = tmp_path / "release"
    sys.path.insert(0, str(Path(__file__).parents[3] / "hub"))
    recipe("publish").main([str(run), "--licence", "apache-2.0", "--dry-run", "--out", str(release)])
    half, untrained = finished["results"]["gltr"]["1"], finished["encoders"]["1"]["untrained"]
    of = {line.split(" | ")[0]: line for line in (release / "README.md").read_text().splitlines() if line[:1] == "|"}
    (own,) = [line for title, line in of.items() if "the half of WARD that it has not seen (1 halves)" in title]
    (before,) = [line for title, line in of.items() if title.endswith("mean pooling, the same halves")]
    (unseen,) = [line for title, line in of.items() if title.startswith("| this model, ")]
    for line, values in ((own, half), (before, untrained)):
        assert f"| {100 * values['map']:.1f} | {100 * values['rank1']:.1f} |" in line
    model = temporal_agg.create_model(f"local-dir:{release}")
    test = data.open_dataset("ward", root)
    queries, gallery = (
        temporal_agg.embed_tracklets(model, side, progress=False) for side in (test.query, test.gallery)
    )
    distances = retrieval.distances(queries, gallery, model.clip.distance)
    found = retrieval.evaluate_tracklets(distances, test.query, test.gallery)
    assert f"| {100 * found.map:.1f} | {100 * found.rank(1):.1f} |" in unseen
