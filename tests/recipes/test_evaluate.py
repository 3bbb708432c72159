"""Evaluation of saved runs: the protocol of the data set, re-ranking, and embeddings that are never used wrongly."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from benchmarks_on_disk import make_mars, make_prid2011

import temporal_agg
from temporal_agg import data, retrieval

TRAIN = ["--size", "32x16", "--model", "mean_resnet10t", "--epochs", "0", "--no-eval-untrained", "--workers", "0"]


@pytest.fixture(scope="module")
def mars(tmp_path_factory):
    return make_mars(tmp_path_factory.mktemp("mars"), cameras=3)


@pytest.fixture(scope="module")
def trained(recipe, mars, tmp_path_factory):
    """A run on MARS in miniature."""
    out = tmp_path_factory.mktemp("runs")
    options = ["--data", "mars", "--root", str(mars), "--data-options", "check_counts=false", "cache=false"]
    recipe("train").main([*TRAIN, *options, "--device", "cpu", "--name", "one", "--out", str(out)])
    return out / "one"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run that a test may change."""
    return shutil.copytree(trained, tmp_path / "one")


def evaluate(recipe, *argv):
    return recipe("evaluate").main([*map(str, argv), "--device", "cpu"])


@pytest.mark.slow
def test_a_run_is_evaluated_on_its_own_data(recipe, run, capsys):
    (got,) = evaluate(recipe, run)["one"]
    metrics = json.loads((run / "metrics.json").read_text())
    for key in ("map", "minp", "rank1", "rank5", "cmc", "queries", "gallery", "distance"):
        assert got[key] == pytest.approx(metrics[key], abs=1e-6), key
    assert f"{100 * got['map']:.1f}" in capsys.readouterr().out
    there = {path.name.split("-")[0] for path in (run / "evaluation" / "mars").iterdir()}
    assert there == {"metrics.json", "cmc.png", "ranked.png", "embeddings"}
    assert json.loads((run / "evaluation" / "mars" / "metrics.json").read_text()) == [got]


@pytest.mark.slow
def test_re_ranking_stands_beside_the_plain_result(recipe, run, mars):
    plain, reranked = evaluate(recipe, run, "--rerank", "--k1", "3", "--k2", "2", "--no-figures")["one"]
    dataset = data.open_dataset("mars", mars, check_counts=False, cache=False)
    model = temporal_agg.create_model(f"local-dir:{run}")
    sides = (dataset.query, dataset.gallery)
    embeddings = [torch.nn.functional.normalize(temporal_agg.embed_tracklets(model, t), dim=1) for t in sides]
    ids = [[getattr(t, key) for t in side] for side in sides for key in ("pid", "camera")]
    want = retrieval.evaluate(retrieval.rerank(*embeddings, 3, 2), *ids, query_index=dataset.query_index)
    assert reranked["method"] == "re-ranked"
    assert reranked["map"] == pytest.approx(want.map, abs=1e-6)
    assert plain["method"] == ""


@pytest.mark.slow
def test_queries_without_a_match_are_reported(recipe, run, mars, tmp_path, capsys):
    picture = next(mars.rglob("*.jpg"))
    for place in ("query/1/1_1", "query/2/1_1", "gallery/1/2_1", "gallery/3/2_1"):
        (tmp_path / "data" / place).mkdir(parents=True)
        shutil.copy(picture, tmp_path / "data" / place)
    (got,) = evaluate(recipe, run, "--data", f"folder:{tmp_path / 'data'}", "--no-figures")["one"]
    assert (got["queries"], got["queries_without_match"], got["map"]) == (2, 1, 0.5)  # a tie is no hit
    assert "1 of 2 queries have no match; they are left out of the means." in capsys.readouterr().out


@pytest.mark.slow
def test_embeddings_are_used_again_only_for_the_same_model_frames_and_settings(recipe, run, mars, tmp_path, capsys):
    def again(*argv):
        evaluate(recipe, run, "--no-figures", *argv)
        return "used again" in capsys.readouterr().out

    assert not again()
    assert again()
    assert again("--rerank", "--k1", "3", "--ap", "trapezoidal")  # what comes after the embeddings
    assert not again("--clip", "length=2")
    assert not again()  # the last one's are gone
    model = temporal_agg.create_model(f"local-dir:{run}")
    with torch.no_grad():
        next(model.parameters())[0] += 1e-3
    model.save_pretrained(run)
    assert not again()
    assert again()

    copy = shutil.copytree(mars, tmp_path / "copy")
    options = ["--data", f"mars:{copy}", "--data-options", "check_counts=false", "cache=false"]
    assert not again(*options)
    assert again(*options)
    frame = next((copy / "bbox_test").rglob("0005*.jpg"))
    os.utime(frame, ns=(1, 1))
    assert not again(*options)
    (file,) = (run / "evaluation" / "mars").glob("embeddings-*")
    file.write_bytes(file.read_bytes()[:50])
    assert not again(*options)
    assert again(*options)


@pytest.mark.slow
def test_the_key_of_embeddings_changes_with_options_that_have_no_weights(recipe):
    """Two aggregators without parameters, and two options, on one backbone."""
    fingerprint = recipe("evaluate").fingerprint
    tracklets = data.open_dataset("synthetic", num_identities=4, num_cameras=2, length=[3, 5]).query
    names = [
        ("mean_resnet10t", {}),
        ("max_resnet10t", {}),
        ("gltr_resnet10t", {}),
        ("gltr_resnet10t", {"normalize": "none"}),
    ]
    keys = []
    for name, options in names:
        torch.manual_seed(0)
        keys.append(fingerprint(temporal_agg.create_model(name, img_size=(32, 16), **options), tracklets))
        torch.manual_seed(0)
        assert keys[-1] == fingerprint(temporal_agg.create_model(name, img_size=(32, 16), **options), tracklets)
    assert len(set(keys)) == len(keys)


def test_the_key_of_embeddings_changes_with_the_sides_and_takes_any_name(recipe, tmp_path):
    """A tracklet that moves from the gallery to the queries leaves the list of both as it was."""
    fingerprint = recipe("evaluate").fingerprint
    model = temporal_agg.create_model("mean_resnet10t", img_size=(32, 16))
    a, b, c = data.open_dataset("synthetic", num_identities=4, num_cameras=2, length=[3, 5]).query[:3]
    assert fingerprint(model, [a, b], [c]) != fingerprint(model, [a], [b, c])
    path = tmp_path / os.fsdecode(b"caf\xe9.jpg")
    path.touch()
    tracklet = data.Tracklet([path], 0)
    assert fingerprint(model, [tracklet], []) == fingerprint(model, [tracklet], [])


def test_tensors_on_disk_are_checked(recipe, odd_folder):
    common, file = recipe("common"), odd_folder / "x.safetensors"
    common.write_tensors(file, {"a": torch.arange(64.0)})
    assert torch.equal(common.read_tensors(file)["a"], torch.arange(64.0))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.safetensors is damaged: .* another checksum"):
        common.read_tensors(file)
    file.write_bytes(content[:50])
    with pytest.raises(ValueError, match=r"x.safetensors is damaged"):
        common.read_tensors(file)


@pytest.mark.slow
def test_several_splits_are_a_mean_and_a_deviation(recipe, tmp_path, capsys):
    root = make_prid2011(tmp_path / "data", people=4, frames=22)
    options = ["--data", f"prid-2011:{root}", "--split", "all", "--device", "cpu", "--out", str(tmp_path / "runs")]
    (trained,) = recipe("train").main([*TRAIN, *options, "--data-options", "cache=false", "--name", "prid"]).values()
    assert len(trained) == 10
    runs = sorted((tmp_path / "runs").iterdir())
    assert [run.name for run in runs] == [f"prid-split{k}" for k in range(10)]
    results = evaluate(recipe, *runs, "--no-figures")
    assert list(results) == ["prid"]
    assert [e["map"] for e in results["prid"]] == pytest.approx([m["map"] for m in trained])
    values = 100 * np.array([m["map"] for m in trained])
    assert f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" in capsys.readouterr().out
    # The data set by name: each run on its own split, for the people of the others were in its training
    results = evaluate(recipe, *runs[1:3], *options[:2], "--data-options", "cache=false", "--no-figures")
    assert [e["split"] for e in results["prid"]] == [1, 2]
    assert [e["map"] for e in results["prid"]] == pytest.approx([m["map"] for m in trained[1:3]])
    assert (runs[2] / "evaluation" / "prid-2011-split2" / "metrics.json").is_file()
    # One model on all splits
    results = evaluate(recipe, runs[0], *options[:4], "--data-options", "cache=false", "--no-figures")
    assert [e["split"] for e in results["prid"]] == list(range(10))


def test_what_cannot_be_evaluated_is_said(recipe, run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate(recipe, run, "--split", "3")
    assert "--split and --data-options are of --data" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--clip has no lenght"):
        evaluate(recipe, run, "--clip", "lenght=3")
    with pytest.raises(SystemExit, match="no weights have been released or planned for 'mean_resnet10t'"):
        evaluate(recipe, "mean_resnet10t", "--data", "synthetic")
    with pytest.raises(SystemExit, match=r"gltr_resnet50\.mars are planned and have not been released"):
        evaluate(recipe, "gltr_resnet50", "--data", "synthetic")
    with pytest.raises(SystemExit, match="is not the name of a model: use"):
        evaluate(recipe, tmp_path / "nothing")
    (run / "settings.json").unlink()
    with pytest.raises(SystemExit, match="does not say what to evaluate on: pass --data"):
        evaluate(recipe, run)
    (tmp_path / "empty" / "train" / "1" / "1_1").mkdir(parents=True)
    shutil.copy(next(run.rglob("cmc.png")), tmp_path / "empty" / "train" / "1" / "1_1" / "1.png")
    with pytest.raises(SystemExit, match="query tracklet"):
        evaluate(recipe, run, "--data", f"folder:{tmp_path / 'empty'}")
