"""The noise study in miniature: its numbers are those of its runs, and nothing is computed twice."""

import dataclasses
import json
import re

import numpy as np
import pytest
from safetensors.torch import load_file
from scipy import stats

from temporal_agg.aggregators import create_criterion, registry_entry

pytestmark = pytest.mark.slow


NAMES = [
    "mean",
    "attention",
    "gltr",
    "gltr: DTP alone",
    "gltr: common loss",
    "mean: gltr's loss",
    "mean: 2 of the steps",
]
SEEDS = (0, 1)


@pytest.fixture(scope="module")
def study(recipe):
    return recipe("study")


@pytest.fixture(scope="module")
def tiny(study):
    return study.Size(
        channels=(8, 16, 32, 64),
        size=(32, 16),
        people=12,
        length=(3, 5),
        frames=3,  # not below the stride of fgra
        identities=4,
        encoder_steps=2,
        steps=2,
        frozen=("conv1", "layer1"),
        hidden=8,
        strengths=(0.5, 1.0),
    )


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return ["--out", str(out), "--only", ",".join(NAMES), "--seeds", str(len(SEEDS)), "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(study, tiny, argv):
    return study.main(argv, tiny)


def runs(out, name):
    """The files of a variant's runs, by seed."""
    label = name.replace(": ", "-").replace(" ", "_").replace("'", "")
    return [out / f"{label}-seed{seed}" for seed in SEEDS]


def read(path):
    return json.loads(path.read_text())


def half_width(values):
    return stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


@pytest.mark.parametrize("n", range(2, 11))
def test_the_interval_is_that_of_student(study, n):
    values = np.random.default_rng(n).random(n)
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert study.interval(values) == pytest.approx((50 * (low + high), 50 * (high - low)), rel=1e-4)


def test_the_study_holds_the_numbers_of_its_runs(study, tiny, argv, finished, tmp_path):
    out = study.parse(argv).out
    assert read(out / "study.json") == json.loads(json.dumps(finished))
    for name in NAMES:
        metrics = [read(run / "metrics.json") for run in runs(out, name)]
        got = finished["variants"][name]
        for key in ("map", "rank1"):
            assert got[key]["mixed"] == pytest.approx([m[key] for m in metrics], abs=1e-6)
    assert set(finished["variants"]["gltr: DTP alone"]["map"]) == {"mixed"}
    single = {f"{fault} {s}" for fault in study.FAULTS for s in (0.5, 1.0)}
    want = {"mixed", "clean", *single}
    assert set(finished["variants"]["gltr"]["map"]) == want
    assert set(finished["variants"]["gltr"]["area"]) == {f"{fault} 1.0" for fault in study.FAULTS}
    assert [finished["variants"][name]["criterion"] for name in NAMES[2:6]] == ["gltr", "gltr", "baseline", "gltr"]
    settings = [read(runs(out, name)[0] / "settings.json")["settings"] for name in NAMES]
    assert [one["epochs"] for one in settings] == [1, 1, 1, 1, 1, 1, 2]
    assert [one["init"] for one in settings[:3]] == ["../encoder-seed0", "../encoder-seed0", "../gltr-stage_1-seed0"]


def test_the_area_is_the_share_of_pairs_in_the_right_order(study, tiny, argv, finished):
    """Of the mean exactly a half; of attention by every pair of a struck frame and another one."""
    out, size, fault = study.parse(argv).out, tiny, "occlusion"
    model = study.load_model(str(out / "attention-seed0"), {}).eval()
    sources = study.data.open_dataset("synthetic", **study.world(size, 0, {fault: 1.0})).query
    struck, others = [], []
    for tracklet in sources:
        seen = {i: [] for i in range(len(tracklet))}
        for indices, mask in zip(*model.clip.cut(len(tracklet)), strict=True):
            frames = study.data.ClipTransform.for_model(model)(tracklet.load(indices))
            weights = model(frames[None], mask=mask[None], return_details=True).frame_weights[0]
            for i, weight in zip(indices.tolist(), weights.tolist(), strict=True):
                seen[i].append(weight * int(mask.sum()))
        for i, hit in enumerate(tracklet.struck(fault)):
            (struck if hit else others).append(np.mean(seen[i]))
    pairs = [1.0 if a < b - 1e-6 else 0.0 if a > b + 1e-6 else 0.5 for a in struck for b in others]
    got = finished["variants"]
    assert got["attention"]["area"][f"{fault} 1.0"][0] == pytest.approx(np.mean(pairs), abs=1e-3)
    assert all(values == [0.5, 0.5] for values in got["mean"]["area"].values())


@pytest.mark.parametrize("key", ["clean", "identity_switch 1.0"])
def test_each_fault_stands_alone_with_the_people_of_the_training(recipe, study, tiny, argv, finished, tmp_path, key):
    fault, _, strength = key.partition(" ")
    (run, _) = runs(study.parse(argv).out, "gltr")
    options = dict(read(run / "settings.json")["settings"]["data_options"])
    assert options["faults"] == dict.fromkeys(study.FAULTS, tiny.mixed)
    options["faults"] = {fault: float(strength)} if strength else {}
    options = [f"{key}={json.dumps(value)}" for key, value in options.items()]
    argv = [str(run), "--data", "synthetic", "--data-options", *options, "--out", str(tmp_path), "--no-figures"]
    ((result,),) = recipe("evaluate").main([*argv, "--device", "cpu"]).values()
    assert result["map"] == pytest.approx(finished["variants"]["gltr"]["map"][key][0], abs=1e-6)


def test_the_tables_say_what_was_measured(study, argv, finished):
    out = study.parse(argv).out
    written = (out / "study.md").read_text()
    lines = [line.split("|") for line in written.splitlines() if line.startswith("|")]
    rows = {cells[1].strip(" *"): cells for cells in reversed(lines)}  # the first table of each
    maps = {name: 100 * np.array([read(run / "metrics.json")["map"] for run in runs(out, name)]) for name in NAMES}
    faults = [read(run / "faults.json")["blur 1.0"]["map"] for run in runs(out, "mean")]
    assert f" {maps['mean'].mean():.1f} ± {half_width(maps['mean']):.1f} " in rows["mean"]
    assert f" {100 * np.mean(faults):.1f} ± {100 * half_width(faults):.1f} " in rows["mean"]
    gap = maps["gltr: DTP alone"] - maps["gltr"]
    assert f"{gap.mean():+.1f} ± {half_width(gap):.1f}" in rows["DTP alone"][3]
    gap = maps["mean: 2 of the steps"] - maps["mean"]
    assert f"| 4 | {maps['mean: 2 of the steps'].mean():.1f}" in written
    assert f"{gap.mean():+.1f} ± {half_width(gap):.1f}" in rows["4"][3]
    pairs = [("gltr", "mean: gltr's loss"), ("gltr: common loss", "mean"), ("mean: gltr's loss", "mean")]
    losses = [cells for cells in lines if cells[1] == " gltr "][-1]
    for cell, (a, b) in zip(losses[2:], [*pairs, ("gltr", "gltr: common loss")], strict=False):
        gap = maps[a] - maps[b]
        assert f"{gap.mean():+.1f} ± {half_width(gap):.1f}" in cell
    areas = [100 * value for value in finished["variants"]["attention"]["area"]["blur 1.0"]]
    assert f"{np.mean(areas):.1f} ± {half_width(areas):.1f}" in written
    gap = maps["gltr"] - maps["mean"]
    said = "Not to be told from" if abs(gap.mean()) <= half_width(gap) else "Above" if gap.mean() > 0 else "Below"
    assert re.search(rf"{said} mean: [a-z, ]*gltr", written)


def test_bold_and_the_verdict_want_an_interval_without_zero(study):
    def variants(**maps):
        return {"variants": {name: {"map": {"mixed": values}} for name, values in maps.items()}}

    made = variants(mean=[0.5, 0.6, 0.7], max=[0.55, 0.65, 0.76], lstm=[0.1, 0.2, 0.31], gltr=[0.4, 0.7, 0.8])
    gaps = {name: study.difference(made["variants"], name, "mean") for name in ("max", "lstm", "gltr")}
    assert [study.signed(*gap).startswith("**") for gap in gaps.values()] == [True, True, False]
    assert study.supported(made).endswith("Above mean: max. Below mean: lstm. Not to be told from mean: gltr.")


def test_the_figure_shows_the_numbers(study, argv, finished):
    out = study.parse(argv).out
    drawing = study.figure(finished)
    for i, axes in enumerate(drawing.axes):
        fault = study.FAULTS[i % len(study.FAULTS)]
        assert axes.get_title() in (fault.replace("_", " "), "")
        for line, band in zip(axes.lines, axes.collections, strict=True):
            done = [read(run / "faults.json") for run in runs(out, line.get_label())]
            for k, key in enumerate(["clean", f"{fault} 0.5", f"{fault} 1.0"]):
                values = 100 * np.array([d[key]["map"] for d in done])
                assert line.get_ydata()[k] == pytest.approx(values.mean(), abs=1e-3)
                x = line.get_xdata()[k]
                ends = [y for at, y in band.get_paths()[0].vertices if at == x]
                want = values.mean() + half_width(values) * np.array([-1, 1])
                assert [min(ends), max(ends)] == pytest.approx(want, abs=2e-3)
    assert {line.get_label() for axes in drawing.axes for line in axes.lines} == {"mean", "attention", "gltr"}
    assert (out / "study.png").stat().st_size > 10_000


def test_what_is_finished_is_read_and_what_is_missing_made_again(study, tiny, argv, finished, monkeypatch, capsys):
    out = study.parse(argv).out
    file = out / "mean-seed1" / "faults.json"
    done = read(file)
    file.write_text(json.dumps({key: value for key, value in done.items() if key != "blur 0.5"}))
    (out / "gltr-seed0" / "metrics.json").unlink()
    before = (out / "gltr-seed1" / "model.safetensors").stat().st_mtime_ns
    calls, tested = [], study.tested
    monkeypatch.setattr(study, "tested", lambda *a, **k: calls.append(a) or tested(*a, **k))
    again = study.main(argv, tiny)
    assert len(calls) == 1
    assert read(file) == done
    of_each_seed = 2 + len(NAMES)  # with the encoder and the first stage
    assert capsys.readouterr().out.count("finished before") == 2 * of_each_seed - 1
    assert (out / "gltr-seed1" / "model.safetensors").stat().st_mtime_ns == before
    for name in NAMES:
        assert again["variants"][name]["map"] == finished["variants"][name]["map"]


def test_everybody_starts_from_the_same_encoder(study, tiny, tmp_path):
    size = dataclasses.replace(tiny, steps=0, strengths=(1.0,))
    study.main(["--out", str(tmp_path), "--only", "max,grl,star", "--seeds", "2", "--device", "cpu"], size)
    names = ("encoder", "max", "grl", "star")
    weights = [load_file(tmp_path / f"{name}-seed1" / "model.safetensors") for name in names]
    keys = [key for key in weights[0] if key.startswith("encoder.")]
    assert len(keys) > 20
    assert any(key.startswith("encoder.lsta.") for key in weights[-1])
    for other in weights[1:]:
        assert all(other[key].equal(weights[0][key]) for key in keys)
    other = load_file(tmp_path / "encoder-seed0" / "model.safetensors")
    assert not all(other[key].equal(weights[0][key]) for key in keys)


def test_every_variant_differs_from_every_other_and_is_built(recipe, study, tiny, tmp_path):
    train = recipe("train")
    seen, size = [], dataclasses.replace(tiny, steps=8)
    for name in study.VARIANTS:
        settings = study.settings_of(size, name, 0, tmp_path)
        model = train.build_model(settings)
        criterion = settings.criterion or registry_entry(model.aggregator.config["name"]).default_criterion
        create_criterion(criterion, 6, model, **settings.criterion_options)
        assert model.clip.length == tiny.frames, name
        seen.append((settings.model, settings.model_options, criterion, settings.criterion_options, settings.epochs))
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "meen"], "--only has no 'meen'"),
        (["--seeds", "1"], "--seeds must be 2"),
        (["--jobs", "0"], "--jobs"),
    ],
)
def test_wrong_arguments_are_named(study, argv, message, capsys):
    with pytest.raises(SystemExit):
        study.main(argv)
    assert message in capsys.readouterr().err
