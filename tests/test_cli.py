import csv
import json
import os
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image

import temporal_agg
from temporal_agg import _embed, cli, retrieval

LENGTHS = {"0001/1_a": 3, "0001/2_b": 5, "0002/1_a": 1, "0002/-1_c": 11, "0003/2_a": 2}


def write_tracklets(root, lengths, seed=0):
    rng = np.random.default_rng(seed)
    for name, length in lengths.items():
        (root / name).mkdir(parents=True)
        colour = rng.integers(0, 256, 3)  # a person
        for i in range(1, length + 1):
            pixels = np.clip(colour + rng.integers(-40, 40, (32, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of the same kind with different weights."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        temporal_agg.create_model("attention_resnet10t", img_size=(32, 16)).save_pretrained(root / name)
    return root


@pytest.fixture
def folder(tmp_path):
    return write_tracklets(tmp_path / "data", LENGTHS)


@pytest.fixture
def embed(models, folder, tmp_path):
    def run(*options, model="first", source=folder, output="out.npz"):
        where = tmp_path / output
        code = cli.main(["embed", str(source), "-o", str(where), "--model", str(models / model), *options])
        return code, np.load(where) if where.exists() else None

    return run


def reference(models, folder, names, model="first"):
    tracklets = [temporal_agg.Tracklet([folder / n / f"{i}.png" for i in range(1, LENGTHS[n] + 1)], 0) for n in names]
    model = temporal_agg.create_model(f"local-dir:{models / model}")
    return temporal_agg.embed_tracklets(model, tracklets, progress=False).numpy()


def test_embed_equals_embed_tracklets(embed, models, folder, capsys):
    code, found = embed("--frames-per-batch", "4")
    assert code == 0
    names = ["0001/1_a", "0001/2_b", "0002/1_a", "0002/-1_c", "0003/2_a"]
    assert found["names"].tolist() == names
    assert found["pids"].tolist() == [1, 1, 2, 2, 3]
    assert found["cameras"].tolist() == [1, 2, 1, -1, 2]
    assert (str(found["distance"]), str(found["model"])) == ("cosine", str(models / "first"))
    assert found["embeddings"].dtype == np.float32
    np.testing.assert_allclose(found["embeddings"], reference(models, folder, names), rtol=1e-4, atol=1e-6)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["data", "out.npz"]
    assert "5 embeddings of 512 numbers, with identities" in capsys.readouterr().err


def test_any_folders_are_tracklets(tmp_path, capsys):
    root = write_tracklets(tmp_path / "people", {"anna/door 2": 1, "anna/door 10": 2, "0001/1_a": 1, ".cache/x": 1})
    (root / "anna" / "notes.txt").write_text("no image")
    (root / "anna" / "round").symlink_to(root)
    Image.new("RGB", (4, 8)).save(root / "contact_sheet.jpg")
    tracklets, known = cli.find_tracklets(root)
    assert "left out 1 images" in capsys.readouterr().err
    assert [t.name for t in tracklets] == ["0001/1_a", "anna/door 2", "anna/door 10"]
    assert not known  # one of three has the layout
    Image.new("RGB", (4, 8)).save(root / "0001" / "1_a" / "frame.JPG")
    alone, known = cli.find_tracklets(root / "0001" / "1_a")
    assert [(t.name, len(t)) for t in alone] == [("1_a", 2)]
    assert not known
    split, known = cli.find_tracklets(write_tracklets(tmp_path / "layout", {"query/7/3_x": 1, "gallery/7/4_x": 1}))
    assert known
    assert [(t.pid, t.camera) for t in split] == [(7, 4), (7, 3)]


KILLED = """
import os, signal, sys
from temporal_agg import _embed, cli
_embed.SAVE_EVERY = 0
embed, calls = _embed.embed_tracklets, []
def embed_twice(model, tracklets, **options):
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(len(tracklets))
    return embed(model, tracklets, **options)
_embed.embed_tracklets = embed_twice
cli.main(sys.argv[1:])
"""


def test_kill_9_and_resume(embed, models, folder, tmp_path, monkeypatch, capsys):
    command = ["embed", str(folder), "-o", str(tmp_path / "out.npz"), "--model", str(models / "first")]
    command += ["--frames-per-batch", "4"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    part = tmp_path / "out.npz.part"
    lines = part.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["name"] for line in lines[1:]] == ["0001/1_a", "0001/2_b"]  # 3 frames, 5 frames
    part.write_bytes(b"".join(lines) + lines[-1][:50])  # killed while it wrote a third one

    code, _ = embed(model="second")
    message = capsys.readouterr().err
    assert code == 1
    assert "other settings (weights: was " in message
    assert "aggregator" not in message  # what is the same is not named

    os.utime(folder / "0001" / "2_b" / "3.png", (0, 0))  # a frame that was replaced meanwhile
    seen = []

    def count(model, tracklets, **options):
        seen.extend(t.name for t in tracklets)
        return temporal_agg.embed_tracklets(model, tracklets, **options)

    monkeypatch.setattr(_embed, "embed_tracklets", count)
    code, found = embed()
    assert code == 0
    assert seen == ["0001/2_b", "0002/1_a", "0002/-1_c", "0003/2_a"]
    assert not part.exists()
    names = found["names"].tolist()
    np.testing.assert_allclose(found["embeddings"], reference(models, folder, names), rtol=1e-4, atol=1e-6)

    code, _ = embed(model="second")
    assert code == 1
    assert "pass --overwrite" in capsys.readouterr().err
    part.write_bytes(lines[0])  # an unfinished run of the first model
    code, found = embed("--overwrite", model="second")
    assert code == 0
    np.testing.assert_allclose(found["embeddings"], reference(models, folder, names, "second"), rtol=1e-4, atol=1e-6)


def test_models_without_weights_of_their_own_are_told_apart(folder, tmp_path, capsys):
    torch.manual_seed(0)
    mean = temporal_agg.create_model("mean_resnet10t", img_size=(32, 16))
    other = temporal_agg.TrackletModel(mean.encoder, temporal_agg.create_aggregator("max", mean.encoder.num_features))
    for name, model in (("mean", mean), ("max", other)):
        model.save_pretrained(tmp_path / name)
        command = ["embed", str(folder), "-o", str(tmp_path / f"{name}.npz"), "--model", str(tmp_path / name)]
        assert cli.main(command) == 0
    assert cli.main(["search", str(tmp_path / "mean.npz"), str(tmp_path / "max.npz")]) == 1
    assert "embeddings of different models" in capsys.readouterr().err


def test_files_of_others_are_left_alone(embed, tmp_path, capsys):
    part = tmp_path / "out.npz.part"
    for content in (b"\x00\x01 half a download", b"[1, 2]\n", b"{}\n"):
        part.write_bytes(content)
        assert embed()[0] == 1
        assert "is no file of temporal-agg" in capsys.readouterr().err
        assert part.read_bytes() == content
    part.unlink()
    embed()
    gallery = str(tmp_path / "out.npz")
    assert cli.main(["search", gallery, gallery, "-o", gallery]) == 1
    assert "is an input" in capsys.readouterr().err
    assert np.load(gallery)["embeddings"].shape == (5, 512)


def test_links_to_one_folder_are_tracklets_and_circles_end(folder, capsys):
    (folder / "linked").symlink_to(folder / "0001")
    (folder / "0002" / "back").symlink_to(folder)
    (folder / "notes").mkdir()
    (folder / "notes" / "a.tif").write_bytes(b"")
    names = [t.name for t in cli.find_tracklets(folder)[0]]
    assert {"linked/1_a", "0001/1_a"} <= set(names)
    assert len(names) == 7
    assert "left out 1 folders" in capsys.readouterr().err


def test_search(embed, models, folder, tmp_path, capsys):
    embed()
    gallery = str(tmp_path / "out.npz")
    capsys.readouterr()
    embeddings = np.load(gallery)["embeddings"]
    names = np.load(gallery)["names"].tolist()
    expected = retrieval.distances(embeddings, embeddings, "cosine")
    np.fill_diagonal(expected, np.inf)  # not its own match

    assert cli.main(["search", gallery, gallery, "-k", "3", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [f["query"] for f in found] == names
    for i, result in enumerate(found):
        order = np.argsort(expected[i])[:3]
        assert [m["name"] for m in result["matches"]] == [names[j] for j in order]
        np.testing.assert_allclose([m["distance"] for m in result["matches"]], expected[i, order], atol=1e-6)
        assert [m["pid"] for m in result["matches"]] == [int(names[j][:4]) for j in order]

    # A folder is embedded by the gallery's model: its first tracklet is in the gallery.
    csv_file = tmp_path / "found.csv"
    assert cli.main(["search", str(folder / "0001"), gallery, "--format", "csv", "-o", str(csv_file)]) == 0
    rows = list(csv.DictReader(csv_file.open()))
    assert len(rows) == 2 * 5
    assert (rows[0]["query"], rows[0]["gallery"]) == ("1_a", "0001/1_a")
    assert abs(float(rows[0]["distance"])) < 1e-5

    assert cli.main(["search", gallery, gallery, "-k", "1", "--rerank"]) == 0
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    reranked = retrieval.rerank(unit, unit)
    np.fill_diagonal(reranked, np.inf)
    table = capsys.readouterr().out.splitlines()
    assert table[0] == names[0]
    assert table[1].split()[:3] == ["1", f"{reranked[0].min():.4f}", names[int(reranked[0].argmin())]]

    embed(model="second", output="second.npz")
    assert cli.main(["search", str(tmp_path / "second.npz"), gallery]) == 1
    assert "different models cannot be compared" in capsys.readouterr().err


def test_list(capsys):
    assert cli.main(["list", "gltr*"]) == 0
    out = capsys.readouterr().out
    assert {"gltr", "gltr_released", "gltr_resnet50"} <= set(out.split())
    assert "grl" not in out.split()
    released = temporal_agg.list_models(pretrained=True)
    assert cli.main(["list", "--pretrained"]) == (0 if released else 1)
    captured = capsys.readouterr()
    assert captured.out.split()[2:] == released
    assert released or "no released weights" in captured.err


def test_errors_say_what_to_do(embed, models, folder, tmp_path, capsys):
    def fails(says, *options, **arguments):
        code, _ = embed(*options, **arguments)
        message = capsys.readouterr().err
        assert code == 1
        assert says in message
        assert "Traceback" not in message
        assert len(message.splitlines()) == 1, message

    fails("no folder", source=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    fails("no image in", source=tmp_path / "empty")
    fails("*.npz", output="out.txt")
    fails("no folder", output="missing/out.npz")
    fails("local-dir", model="no/such/model")
    fails("--device banana", "--device", "banana")
    fails("at least 1", "--frames-per-batch", "0", output="zero.npz")
    (folder / "0003" / "2_a" / "2.png").write_bytes(b"no image")
    for workers in ("0", "1"):
        fails(str(folder / "0003" / "2_a" / "2.png"), "--workers", workers)

    with pytest.raises(SystemExit) as exit:
        cli.main(["embed", str(folder), "-o", "x.npz"])
    assert exit.value.code == 2
    capsys.readouterr()
    (tmp_path / "bad.npz").write_bytes(b"PK\3\4 no")
    for file, says in (("bad.npz", "no file that `temporal-agg embed` wrote"), ("absent.npz", "no file")):
        assert cli.main(["search", str(tmp_path / file), str(tmp_path / file)]) == 1
        assert says in capsys.readouterr().err


def test_untrained_aggregators_are_refused(folder, tmp_path, monkeypatch, capsys):
    command = ["embed", str(folder), "-o", str(tmp_path / "x.npz"), "--backbone-pretrained", "--device", "cpu"]
    assert cli.main([*command, "--model", "attention_resnet10t"]) == 1
    assert "which nobody has trained" in capsys.readouterr().err
    built = []

    def offline(name, backbone_pretrained=False):
        built.append(backbone_pretrained)
        return temporal_agg.create_model(name, img_size=(32, 16))

    monkeypatch.setattr(_embed, "create_model", offline)
    assert cli.main([*command, "--model", "mean_resnet10t"]) == 0
    assert built == [False, True]


def test_the_script_is_there():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    from pathlib import Path

    scripts = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["temporal-agg"].partition(":")
    assert getattr(import_module(module), function) is cli.main
