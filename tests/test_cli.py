import csv
import io
import json
import os
import shutil
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image
from versions import BEGIN

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
        temporal_agg.create_model("attention_test_resnet", img_size=(32, 16)).save_pretrained(root / name)
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
    assert "5 embeddings of 96 numbers, with identities" in capsys.readouterr().err


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


@pytest.mark.slow
def test_kill_9_and_resume(embed, models, folder, tmp_path, monkeypatch, capsys):
    command = ["embed", str(folder), "-o", str(tmp_path / "out.npz"), "--model", str(models / "first")]
    command += ["--frames-per-batch", "4"]
    killed = subprocess.run(
        [sys.executable, "-c", BEGIN + KILLED, *command], capture_output=True, text=True, check=False
    )
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
    mean = temporal_agg.create_model("mean_test_resnet", img_size=(32, 16))
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
    assert np.load(gallery)["embeddings"].shape == (5, 96)


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

    # A folder is embedded by the gallery's model: its tracklets are in the gallery, under other names.
    csv_file = tmp_path / "found.csv"
    assert cli.main(["search", str(folder / "0001"), gallery, "--format", "csv", "-o", str(csv_file)]) == 0
    rows = list(csv.DictReader(csv_file.open()))
    assert len(rows) == 2 * 4
    assert [(row["query"], row["gallery"]) for row in rows[:4]] == [
        ("1_a", names[j]) for j in np.argsort(expected[names.index("0001/1_a")])[:4]
    ]
    assert "2 queries have frames in common with tracklets of the gallery" in capsys.readouterr().err

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
    fails("--device 'banana'", "--device", "banana")
    fails("at least 1", "--frames-per-batch", "0", output="zero.npz")
    (folder / "0003" / "2_a" / "2.png").write_bytes(b"no image")
    for workers in ("0", "1"):
        fails(str(folder / "0003" / "2_a" / "2.png"), "--workers", workers)
    (folder / "0003" / "2_a" / "2.png").unlink()
    (folder / "0003" / "2_a" / "2.png").symlink_to("nowhere")
    fails("2.png: there is no such file. It is frame", "--overwrite")

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
    assert cli.main([*command, "--model", "attention_test_resnet"]) == 1
    assert "which nobody has trained" in capsys.readouterr().err
    built = []

    def offline(name, backbone_pretrained=False):
        built.append(backbone_pretrained)
        return temporal_agg.create_model(name, img_size=(32, 16))

    monkeypatch.setattr(_embed, "create_model", offline)
    assert cli.main([*command, "--model", "mean_test_resnet"]) == 0
    assert built == [False, True]


def test_the_script_is_there():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    from pathlib import Path

    scripts = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["temporal-agg"].partition(":")
    assert getattr(import_module(module), function) is cli.main


@pytest.fixture
def plain(tmp_path):
    """Writes small files of embeddings."""

    def write(name, rows, names=None, **more):
        names = names or [f"{i}" for i in range(len(rows))]
        found = cli.Embeddings(torch.tensor(rows), names, None, None, "cosine", "m", False, "f")._replace(**more)
        cli.write_embeddings(tmp_path / name, found)
        return str(tmp_path / name)

    return write


def test_no_command_overwrites_what_is_there(plain, folder, tmp_path, models, capsys):
    q, g = plain("q.npz", [[1.0, 0.0]]), plain("g.npz", [[1.0, 0.0], [0.0, 1.0]])
    new, image = tmp_path / "new.txt", folder / "0001" / "1_a" / "1.png"
    weights = models / "first" / "model.safetensors"
    link, other = tmp_path / "link.npz", tmp_path / "precious.txt"
    link.symlink_to(q)
    other.write_text("precious")
    files = [tmp_path / "q.npz", tmp_path / "g.npz", image, weights, other]
    before = [file.read_bytes() for file in files]
    model = ["--model", str(models / "first")]
    of_model = plain("of_model.npz", [[1.0, 0.0]], model=str(models / "first"))
    for overwrite in ([], ["--overwrite"]):
        for command in (
            ["search", q, g, "-o", q],
            ["search", q, g, "-o", g],
            ["search", q, g, "-o", str(link)],
            ["search", str(folder), g, *model, "-o", str(image)],
            ["search", str(folder), g, *model, "-o", str(weights)],
            ["link", g, "-o", g],
            ["link", g, "-o", str(image), "--sheet", str(tmp_path / "a.html"), "--folder", str(folder)],
            ["link", g, "-o", str(new), "--sheet", g, "--folder", str(folder)],
            ["link", g, "-o", str(new), "--sheet", str(image), "--folder", str(folder)],
            ["merge", q, g, "-o", q],
            ["merge", q, g, "-o", str(link)],
            ["index", g, "-o", g],
        ):
            assert cli.main([*command, *overwrite]) == 1, command
            message = capsys.readouterr().err
            assert "is an input, or part of one" in message, (command, message)
            assert [file.read_bytes() for file in files] == before
    assert cli.main(["search", str(folder), of_model, "-o", str(weights), "--overwrite"]) == 1  # the gallery's model
    assert "is an input, or part of one" in capsys.readouterr().err
    for command in (
        ["search", q, g, "-o", str(other)],
        ["link", g, "-o", str(other)],
        ["index", g, "-o", str(other)],
        ["embed", str(folder), *model, "-o", q],
        ["merge", q, q, "-o", g],
    ):
        if command[-1] not in command[:-1]:
            assert cli.main(command) == 1, command
        assert [file.read_bytes() for file in files] == before
        message = capsys.readouterr().err
        assert "there already" in message or "is an input" in message, (command, message)
    assert cli.main(["search", q, g, "-o", str(other), "--overwrite"]) == 0
    assert "precious" not in other.read_text()
    assert cli.main(["search", q, g, "-o", str(tmp_path)]) == 1
    assert "no file: choose another name" in capsys.readouterr().err


def test_an_output_that_appears_meanwhile_stays(plain, tmp_path, monkeypatch, capsys):
    q, output = plain("q.npz", [[1.0, 0.0]]), tmp_path / "found.txt"
    show = cli.show

    def slow(*args):
        output.write_text("precious")
        show(*args)

    monkeypatch.setattr(cli, "show", slow)
    assert cli.main(["search", q, q, "-o", str(output)]) == 1
    assert output.read_text() == "precious"
    assert "is there already" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found.txt", "q.npz"]


def test_a_gallery_may_be_written_into_while_a_folder_is_embedded(embed, folder, tmp_path, monkeypatch, capsys):
    """It takes long, and the gallery was read before: a file that is mapped would change, or end the process."""
    embed()
    command = ["search", str(folder), str(tmp_path / "out.npz"), "--format", "json"]
    capsys.readouterr()
    assert cli.main(command) == 0
    want = capsys.readouterr().out
    prepare = cli.prepare

    def slow(*args):
        with open(tmp_path / "out.npz", "r+b") as file:
            file.write(bytes((tmp_path / "out.npz").stat().st_size))
        return prepare(*args)

    monkeypatch.setattr(cli, "prepare", slow)
    assert cli.main(command) == 0
    assert capsys.readouterr().out == want


def test_a_gallery_that_is_written_into_while_it_is_searched_gives_no_result(plain, tmp_path, monkeypatch, capsys):
    """It may be replaced: what was opened is searched."""
    q, g = plain("q.npz", [[1.0, 0.0]], ["one"]), plain("g.npz", [[0.0, 1.0], [1.0, 0.1]], ["up", "right"])
    content, nearest = (tmp_path / "g.npz").read_bytes(), cli.nearest

    def replaced(*args):
        (tmp_path / "new").write_bytes(content[:-1])
        (tmp_path / "new").replace(g)
        return nearest(*args)

    def written(*args):
        with open(g, "r+b") as file:
            file.write(content)
        os.utime(g, ns=(0, 1))
        return nearest(*args)

    monkeypatch.setattr(cli, "nearest", replaced)
    assert cli.main(["search", q, g, "-k", "1", "--format", "csv"]) == 0
    assert "one,1,right" in capsys.readouterr().out
    (tmp_path / "g.npz").write_bytes(content)
    monkeypatch.setattr(cli, "nearest", written)
    assert cli.main(["search", q, g, "-k", "1", "--format", "csv"]) == 1
    assert "g.npz was written into while it was searched: search it again" in capsys.readouterr().err


def test_threshold_and_unknown(plain, tmp_path, capsys):
    rows = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]
    q = plain("q.npz", [[1.0, 0.1], [1.0, 1.0]], ["near", "unknown"])
    g = plain("g.npz", rows, ["right", "up", "left"])
    assert cli.main(["search", q, g, "--threshold", "0.1", "--format", "json"]) == 0
    near, far = json.loads(capsys.readouterr().out)
    assert [m["name"] for m in near["matches"]] == ["right"]
    assert "unknown" not in near
    assert (far["matches"], far["unknown"], far["nearest"]["name"]) == ([], True, "right")
    assert far["nearest"]["distance"] == pytest.approx(1 - 0.5**0.5, abs=1e-6)
    assert cli.main(["search", q, g, "--threshold", "0.1", "--format", "csv"]) == 0
    table = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [(row["query"], row["rank"], row["gallery"]) for row in table] == [
        ("near", "1", "right"),
        ("unknown", "0", "unknown"),
    ]
    assert cli.main(["search", q, g, "--threshold", "0.1"]) == 0
    assert "unknown (the nearest: right, 0.2929)" in capsys.readouterr().out
    # As in open-set figures: what lies on the threshold is not identified.
    assert cli.main(["search", g, g, "--threshold", "1", "--format", "json"]) == 0
    assert all(result["unknown"] for result in json.loads(capsys.readouterr().out))
    assert cli.main(["search", q, g, "--threshold", "nan"]) == 1
    assert "--threshold must be a number" in capsys.readouterr().err


def test_a_copy_of_the_gallery_does_not_match_itself(plain, tmp_path, capsys):
    g = plain("g.npz", [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    (tmp_path / "copy.npz").write_bytes((tmp_path / "g.npz").read_bytes())
    for query in (g, str(tmp_path / "copy.npz")):
        assert cli.main(["search", query, g, "--format", "json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [[m["name"] for m in result["matches"]] for result in found] == [["2", "1"], ["2", "0"], ["0", "1"]]


def test_a_query_that_is_in_the_gallery_does_not_match_itself(embed, folder, tmp_path, capsys):
    """Also where the gallery has more, by another order, or its folder is given in place of its file."""
    embed()
    gallery = cli.read_embeddings(tmp_path / "out.npz")
    rows = [4, 0, 2]
    chosen = {key: [value[i] for i in rows] for key, value in gallery._asdict().items() if type(value) is list}
    part = gallery._replace(embeddings=gallery.embeddings[rows] * 1.0001, **chosen)
    cli.write_embeddings(tmp_path / "part.npz", part)
    (tmp_path / "link").symlink_to(folder)
    for query in ("part.npz", "link"):
        for more in ([], ["--rerank"]):
            capsys.readouterr()
            command = ["search", str(tmp_path / query), str(tmp_path / "out.npz"), "-k", "9", "--format", "json", *more]
            assert cli.main(command) == 0
            found = json.loads(capsys.readouterr().out)
            assert len(found) == (3 if query == "part.npz" else 5)
            for result in found:
                others = {name for name in gallery.names if name != result["query"]}
                assert {m["name"] for m in result["matches"]} == others, (query, more)
    for more in (["--rerank", "--candidates", "0"], ["--candidates", "5"]):
        assert cli.main(["search", str(tmp_path / "part.npz"), str(tmp_path / "out.npz"), *more]) == 1
        assert "--candidates is a number of at least 1 and goes with --rerank" in capsys.readouterr().err


@pytest.mark.parametrize("style", ["table", "csv", "json"])
def test_names_of_any_kind_are_printed_and_written(style, plain, tmp_path, monkeypatch):
    names = ["latin \udce9", "\u5f20", "line\nbreak \x1b[2J", "plain"]
    g = plain("g.npz", torch.eye(4).tolist(), names)
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="cp1252"))
    assert cli.main(["search", g, g, "--format", style]) == 0
    assert sys.stdout.errors == "strict"  # as it was
    printed = screen.getvalue()
    assert rb"\udce9" in printed
    assert rb"\u5f20" in printed
    assert style == "csv" or b"\x1b" not in printed  # a terminal would obey
    assert cli.main(["search", g, g, "--format", style, "-o", str(tmp_path / "found")]) == 0
    text = (tmp_path / "found").read_text(encoding="utf-8")
    assert ("\u5f20" if style != "json" else r"\u5f20") in text
    if style == "json":
        assert [result["query"] for result in json.loads(text)] == names


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_standard_output_is_one_line(plain, monkeypatch, capsys):
    g = plain("g.npz", [[1.0, 0.0], [0.0, 1.0]])
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["search", g, g]) == 1
    message = capsys.readouterr().err
    assert "the standard output" in message
    assert len(message.splitlines()) == 1


@pytest.mark.slow
def test_a_damaged_part_is_named_and_left(embed, tmp_path, capsys):
    embed(output="other.npz")
    settings = {"temporal-agg": "0"}
    head = json.dumps(settings).encode() + b"\n"
    row = {"name": "a", "frames": "b", "embedding": "AACAPw=="}
    lines = [
        b"\x00" * 20 + b"\n",
        b"[]\n",
        b"5\n",
        b"{}\n",
        b'{"name": "a"}\n',
        *(
            json.dumps({**row, "embedding": wrong}).encode() + b"\n"
            for wrong in ("", "AA", "%%%%", "AADAfw==", 5, None)
        ),
        *(
            json.dumps({**row, **wrong}).encode() + b"\n"
            for wrong in ({"purity": 2}, {"purity": "x"}, {"marks": "AA=="})
        ),
        *(json.dumps({**row, "change": wrong}).encode() + b"\n" for wrong in (1e999, 10**30, -2, 1.5, [1], True)),
        json.dumps(row).encode() + b"\n" + json.dumps({**row, "embedding": "AACAPwAAgD8="}).encode() + b"\n",
    ]
    part = tmp_path / "out.npz.part"
    capsys.readouterr()
    for line in lines:
        part.write_bytes(head + line)
        assert embed()[0] == 1
        message = capsys.readouterr().err
        assert f"{part} is no file of temporal-agg, or it is damaged (" in message, line
        assert len(message.splitlines()) == 1
        assert part.read_bytes() == head + line


def test_append_adds_what_is_new(embed, folder, models, tmp_path, capsys):
    assert embed("--append")[0] == 0  # there is nothing yet
    write_tracklets(folder, {"0009/1_a": 2}, seed=5)
    assert embed()[0] == 1
    assert "is there already" in capsys.readouterr().err
    code, found = embed("--append")
    assert code == 0
    assert found["names"].tolist()[-1] == "0009/1_a"
    assert len(found["names"]) == 6
    LENGTHS_ALL = {**LENGTHS, "0009/1_a": 2}
    names = found["names"].tolist()
    model = temporal_agg.create_model(f"local-dir:{models / 'first'}")
    tracklets = [temporal_agg.Tracklet([folder / n / f"{i + 1}.png" for i in range(LENGTHS_ALL[n])], 0) for n in names]
    want = temporal_agg.embed_tracklets(model, tracklets, progress=False).numpy()
    np.testing.assert_allclose(found["embeddings"], want, rtol=1e-4, atol=1e-6)
    assert embed("--append")[0] == 0  # nothing is new
    os.utime(folder / "0009" / "1_a" / "1.png", (0, 0))
    assert embed("--append")[0] == 1
    assert "has a tracklet '0009/1_a' already, of other files" in capsys.readouterr().err
    assert embed("--append", model="second")[0] == 1
    assert "different models" in capsys.readouterr().err


def test_merge(plain, tmp_path, capsys):
    a, b = plain("a.npz", [[1.0, 0.0]], ["a"]), plain("b.npz", [[0.0, 1.0], [1.0, 1.0]], ["b", "c"])
    assert cli.main(["merge", a, b, "-o", str(tmp_path / "c.npz")]) == 0
    with np.load(tmp_path / "c.npz") as stored:
        assert stored["names"].tolist() == ["a", "b", "c"]
        assert stored["embeddings"].tolist() == [[1, 0], [0, 1], [1, 1]]
    other = plain("other.npz", [[1.0, 0.0]], ["x"], fingerprint="g")
    assert cli.main(["merge", a, other, "-o", str(tmp_path / "d.npz")]) == 1
    assert "other.npz was embedded by m (g), " in capsys.readouterr().err
    assert cli.main(["merge", a, str(tmp_path / "c.npz"), "-o", str(tmp_path / "d.npz")]) == 1
    assert "two tracklets are named 'a'" in capsys.readouterr().err


def test_link(embed, folder, tmp_path, capsys):
    embed()
    gallery, people, sheet = (tmp_path / name for name in ("out.npz", "people.csv", "people.html"))
    command = ["link", str(gallery), "-o", str(people), "--threshold", "1e-3"]
    assert cli.main([*command, "--sheet", str(sheet), "--folder", str(folder)]) == 0
    assert "5 tracklets, 5 people" in capsys.readouterr().err
    rows = list(csv.DictReader(people.open()))
    assert [row["name"] for row in rows] == np.load(gallery)["names"].tolist()
    assert [row["person"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert [row["pid"] for row in rows] == ["1", "1", "2", "2", "3"]
    assert "0002/-1_c" in sheet.read_text()
    assert cli.main([*command[:-1], "3", "--overwrite"]) == 0
    assert "5 tracklets, 1 people" in capsys.readouterr().err
    # Frames 1 to 3 of 0001/1_a and frame 1 of 0002/1_a are one camera's: two people, whatever the distance.
    assert cli.main([*command[:-1], "3", "--overwrite", "--numbers-are-times"]) == 0
    person = {row["name"]: row["person"] for row in csv.DictReader(people.open())}
    assert person["0001/1_a"] != person["0002/1_a"]
    assert cli.main([*command, "--overwrite", "--sheet", str(sheet)]) == 1
    assert "pass --folder" in capsys.readouterr().err


def test_index(plain, tmp_path, capsys):
    pytest.importorskip("faiss", reason="faiss is not installed (extra faiss)")
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    g, index = plain("g.npz", rows.tolist()), str(tmp_path / "g.faiss")
    other = plain("other.npz", rows.flip(0).tolist())
    assert cli.main(["index", g, "-o", index]) == 0
    assert "it finds 100.0%" in capsys.readouterr().err
    for query in (g, other):
        assert cli.main(["search", query, g, "-k", "3", "--format", "json"]) == 0
        want = json.loads(capsys.readouterr().out)
        assert cli.main(["search", query, g, "-k", "3", "--format", "json", "--index", index]) == 0
        for got, exact in zip(json.loads(capsys.readouterr().out), want, strict=True):
            assert [m["name"] for m in got["matches"]] == [m["name"] for m in exact["matches"]]
    assert cli.main(["search", g, other, "--index", index]) == 1
    assert "g.faiss is no index of" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
@pytest.mark.parametrize("distance", ["cosine", "euclidean", "dot"])
def test_an_index_of_a_gallery_that_has_changed_since_is_refused(plain, tmp_path, capsys, kind, distance):
    """By one row of many, or by two that have changed places: names would stand beside other tracklets' distances."""
    pytest.importorskip("faiss", reason="faiss is not installed (extra faiss)")
    rows = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    index = str(tmp_path / "g.faiss")
    assert cli.main(["index", plain("g.npz", rows.tolist(), distance=distance), "-o", index, "--kind", kind]) == 0
    other, swapped, near = rows.clone(), rows.clone(), rows * (1 + 1e-7)
    other[41] += 0.01
    swapped[[41, 42]] = rows[[42, 41]]
    for changed, code in ((rows, 0), (near, 0), (other, 1), (swapped, 1), (rows[:-1], 1)):
        path = plain("now.npz", changed.tolist(), distance=distance)
        assert cli.main(["search", path, path, "-k", "1", "--index", index]) == code
        assert ("g.faiss is no index of" in capsys.readouterr().err) == bool(code)


@pytest.mark.parametrize("name", ["meta", "", "gpu", "cuda:99", "mps:7"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=rf"--device '{name}' cannot be used here \(.*\); try cpu\.$") as error:
        _embed.pick_device(name)
    assert len(str(error.value)) < 300


def test_tilde_is_expanded(models, folder, tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(folder.parent))
    (folder.parent / "model").symlink_to(models / "first")
    for model in ("local-dir:~/model", "~/model"):
        assert cli.main(["embed", "~/data", "-o", "~/out.npz", "--model", model, "--overwrite"]) == 0
    assert (tmp_path / "out.npz").exists()


def test_the_least_pure_tracklets_are_named(embed, models, folder, tmp_path, capsys):
    """Purity and the place of change are columns of the store, also of what a killed run had finished."""
    other = sorted((folder / "0002" / "-1_c").iterdir())
    for image, foreign in zip(sorted((folder / "0001" / "2_b").iterdir())[3:], other, strict=False):
        image.write_bytes(foreign.read_bytes())
    code, found = embed("--reject-outliers")
    assert code == 0
    items = [
        temporal_agg.Tracklet([folder / n / f"{i}.png" for i in range(1, LENGTHS[n] + 1)], 0) for n in found["names"]
    ]
    model = temporal_agg.create_model(f"local-dir:{models / 'first'}")
    rows, purity = temporal_agg.embed_tracklets(model, items, progress=False, reject_outliers=True, return_purity=True)
    np.testing.assert_allclose(found["embeddings"], rows, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["purity"], purity.score, atol=1e-5)
    assert found["change"].tolist() == purity.start.tolist()
    assert found["change"].tolist() == [-1, 3, -1, found["change"][3], -1]  # three tracklets are too short
    assert "Look first at 0001/2_b (0." in (said := capsys.readouterr().err.splitlines()[-1])
    assert "from frame 3 on), 0002/-1_c (" in said
    assert "purity" not in embed(output="plain.npz")[1]


def test_options_reach_embed_tracklets_and_the_key(embed, monkeypatch, tmp_path, capsys):
    seen = []

    def stand_in(model, tracklets, **options):
        seen.append(options)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return torch.ones(len(tracklets), 4)

    monkeypatch.setattr(_embed, "embed_tracklets", stand_in)
    monkeypatch.setattr(_embed, "SAVE_EVERY", 0)
    options = ("--precision", "bfloat16", "--reject-outliers", "--frames-per-batch", "1")
    assert embed(*options)[0] == 130
    assert capsys.readouterr().err.splitlines()[-1] == "temporal-agg: stopped; the same command goes on where it was."
    assert seen[0]["precision"] == "bfloat16"
    assert seen[0]["reject_outliers"] is True
    assert embed()[0] == 1
    message = capsys.readouterr().err
    assert "precision: was bfloat16, is float32; reject_outliers: was True, is False" in message
    assert embed(*options)[0] == 0


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "DataLoader worker"),
        (_embed.torch.cuda.OutOfMemoryError("CUDA out of memory"), "smaller --frames-per-batch"),
        (MemoryError(), "out of memory"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_what_ends_a_run_is_one_line(error, says, embed, monkeypatch, capsys):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(_embed, "embed_tracklets", fail)
    assert embed()[0] == 1
    message = capsys.readouterr().err
    assert says in message
    assert len(message.splitlines()) == 1


def test_a_model_that_gives_no_numbers_is_told(embed, monkeypatch, capsys):
    monkeypatch.setattr(
        _embed, "embed_tracklets", lambda model, tracklets, **_: torch.full((len(tracklets), 4), np.nan)
    )
    assert embed()[0] == 1
    assert "the embedding of '0001/1_a' is not finite" in capsys.readouterr().err


def test_a_full_disk_names_the_file(embed, tmp_path, monkeypatch, capsys):
    resource = pytest.importorskip("resource", reason="this system has no limits of the size of files")
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
        assert embed()[0] == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    message = capsys.readouterr().err
    assert "out.npz.part" in message
    assert len(message.splitlines()) == 1
    assert embed()[0] == 0  # goes on


def test_the_key_of_a_tracklet_has_its_flow(folder):
    from temporal_agg.data import flow

    tracklet = cli.find_tracklets(folder)[0][0]
    keys = [cli.frames_key(tracklet)]
    for k in (0, 3):
        images = [flow.encode_flow(np.full((2, 16, 16), float(k)))] * (len(tracklet) - 1)
        flow.write_flow(flow.flow_file(tracklet.frames), images, (16, 16), {"k": k})
        keys.append(cli.frames_key(tracklet))
    assert len(set(keys)) == 3
    assert cli.frames_key(tracklet, flow=False) == keys[0]  # for models that do not look at it


def test_a_query_that_is_part_of_a_gallery_tracklet_is_not_its_match(embed, folder, tmp_path, capsys):
    """Copies of all of its frames, of one, or of less than half, in folders and under names of their own."""
    assert embed(output="gallery.npz")[0] == 0
    for name, copied in {"0009/1_all": range(1, 6), "0009/2_one": [4], "0009/3_few": [1, 2]}.items():
        (tmp_path / "query" / name).mkdir(parents=True)
        for i in copied:
            shutil.copy(folder / "0001" / "2_b" / f"{i}.png", tmp_path / "query" / name / f"0{i}.png")
    for i in range(6):
        Image.new("RGB", (16, 32), (i, 9, 99)).save(tmp_path / "query" / name / f"new{i}.png")
    assert embed(source=tmp_path / "query", output="query.npz")[0] == 0
    for more in ([], ["--rerank"], ["--rerank", "--candidates", "4"]):
        words = ["search", tmp_path / "query.npz", tmp_path / "gallery.npz", "-k", 4, "--format", "json", *more]
        capsys.readouterr()
        assert cli.main([str(word) for word in words]) == 0
        said = capsys.readouterr()
        found = {f["query"]: [m["name"] for m in f["matches"]] for f in json.loads(said.out)}
        others = set(LENGTHS) - {"0001/2_b"}
        assert set(found["0009/1_all"]) == set(found["0009/2_one"]) == others, more
        assert len(found["0009/3_few"]) == 4
        assert "2 queries have frames in common with tracklets of the gallery and are never" in said.err
        assert "1 queries have frames in common with tracklets of the gallery and are compared" in said.err
        assert "'0009/3_few' and '0001/2_b'" in said.err
