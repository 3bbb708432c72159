"""The noise study in miniature: its numbers are those of its runs, and nothing is computed twice."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.torch import load_file
from scipy import stats

from temporal_agg.aggregators import create_criterion, registry_entry

pytestmark = pytest.mark.slow


NAMES = ["mean", "gltr", "gltr: DTP alone"]
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
    label = name.replace(": ", "-").replace(" ", "_")
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
    want = {"mixed", "clean", *(f"{fault} {s}" for fault in study.FAULTS for s in (0.5, 1.0))}
    assert set(finished["variants"]["gltr"]["map"]) == want
    assert finished["variants"]["gltr"]["criterion"] == "gltr"


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
    rows = {cells[1].strip(" *"): cells for cells in (line.split("|") for line in written.splitlines()) if cells[1:]}
    maps = {name: 100 * np.array([read(run / "metrics.json")["map"] for run in runs(out, name)]) for name in NAMES}
    faults = [read(run / "faults.json")["blur 1.0"]["map"] for run in runs(out, "mean")]
    assert f" {maps['mean'].mean():.1f} ± {half_width(maps['mean']):.1f} " in rows["mean"]
    assert f" {100 * np.mean(faults):.1f} ± {100 * half_width(faults):.1f} " in rows["mean"]
    gap = maps["gltr: DTP alone"] - maps["gltr"]
    assert f"{gap.mean():+.1f} ± {half_width(gap):.1f}" in rows["DTP alone"][3]
    gap = maps["gltr"] - maps["mean"]
    said = "Not to be told from" if abs(gap.mean()) <= half_width(gap) else "Above" if gap.mean() > 0 else "Below"
    assert f"{said} mean: gltr." in written


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
    for axes in drawing.axes:
        fault = axes.get_title().replace(" ", "_") or drawing.axes[len(study.FAULTS) - 1].get_title()
        for line, band in zip(axes.lines, axes.collections, strict=True):
            done = [read(run / "faults.json") for run in runs(out, line.get_label())]
            for i, key in enumerate(["clean", f"{fault} 0.5", f"{fault} 1.0"]):
                values = 100 * np.array([d[key]["map"] for d in done])
                assert line.get_ydata()[i] == pytest.approx(values.mean(), abs=1e-3)
                x = line.get_xdata()[i]
                ends = [y for at, y in band.get_paths()[0].vertices if at == x]
                want = values.mean() + half_width(values) * np.array([-1, 1])
                assert [min(ends), max(ends)] == pytest.approx(want, abs=2e-3)
    assert {line.get_label() for axes in drawing.axes for line in axes.lines} == {"mean", "gltr"}
    assert (out / "study.png").stat().st_size > 10_000


def test_what_is_finished_is_read_and_what_is_missing_made_again(study, tiny, argv, finished, monkeypatch, capsys):
    out = study.parse(argv).out
    file = out / "mean-seed1" / "faults.json"
    done = read(file)
    file.write_text(json.dumps({key: value for key, value in done.items() if key != "blur 0.5"}))
    (out / "gltr-seed0" / "metrics.json").unlink()
    before = (out / "gltr-seed1" / "model.safetensors").stat().st_mtime_ns
    calls, embed_test = [], study.embed_test
    monkeypatch.setattr(study, "embed_test", lambda *a: calls.append(a) or embed_test(*a))
    again = study.main(argv, tiny)
    assert len(calls) == 1
    assert read(file) == done
    assert capsys.readouterr().out.count("finished before") == 2 + 6 - 1  # two encoders, six runs, one of them gone
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


def test_every_variant_differs_from_every_other_and_is_built(recipe, study, tiny):
    train = recipe("train")
    seen = []
    for name, variant in study.VARIANTS.items():
        settings = study.settings_of(tiny, variant, 0, "somewhere")
        model = train.build_model(settings)
        criterion = settings.criterion or registry_entry(model.aggregator.config["name"]).default_criterion
        create_criterion(criterion, 6, model, **settings.criterion_options)
        assert model.clip.length == tiny.frames, name
        seen.append((settings.model, settings.model_options, criterion, settings.criterion_options))
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
