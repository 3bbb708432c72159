"""Killed before any write of any command, the same command comes to the same files.

Here: train (one process, two, stages), evaluate, publish (with its manifest), compute_flow, study, robust and speed's
page, and the example that cuts tracklets out of sequences; ward writes as robust does, and trains by train. In
tests/test_cli_kills.py: embed (also by several processes, and to Parquet), append, search -o, index, merge, link,
export. In tests/models/test_hub.py: save_pretrained.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, which this system cannot"),
]

# Kills of one command: if it writes more often, before every rename, and before others evenly spread.
MOST = int(os.environ.get("KILLS", 4))
DATA = ["--data", "synthetic", "--data-options", "num_identities=4", "num_cameras=2", "length=[1,2]", "size=[32,16]"]
TINY = [*DATA, "--size", "32x16", "--clip-length", "1", "--identities", "2", "--clips", "2", "--device", "cpu"]
TINY += ["--workers", "0", "--pad", "0", "--model", "mean_resnet10t", "--no-eval-untrained", "--name", "run"]


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, str(Path(__file__).with_name("kills.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def ask(**job):
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


def times(value):
    """Without what a clock says, and the state of the repository in which somebody works."""
    if isinstance(value, dict):
        kept = {key: of for key, of in value.items() if "seconds" not in key and key not in ("hours", "command", "git")}
        return {key: times(of) for key, of in kept.items()}
    return [times(of) for of in value] if isinstance(value, list) else value


def content(path):
    if path.suffix in (".json", ".jsonl"):
        text = path.read_text()
        return times([json.loads(line) for line in ([text] if path.suffix == ".json" else text.splitlines())])
    if path.suffix == ".ckpt":
        state = torch.load(path, weights_only=True)
        state["progress"] = times(state["progress"])
        return {key: str(of) for key, of in state.items()} | {"model": tuple(state["model"].values())}
    if path.suffix in (".png", ".md"):
        return "there"  # the tables say how long it took
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files(root):
    found = {}
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if any(part.endswith(".tmp") for part in inside.parts):
            assert path.is_dir(), f"{inside} stays"  # an empty folder: killed before it was locked
        elif path.is_file():
            found[str(inside)] = content(path)
    return found


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def chosen(writes, most):
    """The numbers of the writes to be killed before."""
    if len(writes) <= most:
        return range(len(writes))
    renames = [i for i, (event, _) in enumerate(writes) if event == "os.rename"]
    others = np.linspace(0, len(writes) - 1, max(4, most - len(renames))).astype(int).tolist()
    return sorted({*renames[:: -(-len(renames) // most)], *others})


def kill_everywhere(server, tmp_path, script, argv, start=None, most=MOST, **job):
    """Runs a command whole, then killed before one write after another and run again.

    Args:
        argv: of the command; {} is the folder that it works in.
        start: a folder that it starts from.

    Returns:
        What is there in the end.
    """

    folder = tmp_path / "work"  # always the same one: files know where they lie

    def begin():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder) if start else folder.mkdir()

    def run(kill=None):
        arguments = [word.replace("{}", str(folder)) for word in argv]
        output = tmp_path / "output.txt"
        answer = server(script=script, argv=arguments, root=str(folder), kill=kill, output=str(output), **job)
        return answer, output.read_text()[-2000:]

    begin()
    answer, output = run()
    assert set(answer["codes"]) == {0}, output
    want = files(folder)
    assert want
    for kill in chosen(answer["writes"], most):
        begin()
        killed, _ = run(kill)
        where = f"killed before write {kill}, {answer['writes'][kill]}"
        assert killed["codes"][0] == -9, where
        again, output = run()
        assert set(again["codes"]) == {0}, f"{where}: {output}"
        got = files(folder)
        assert set(got) == set(want), where
        for name in want:
            assert equal(got[name], want[name]), f"{name} differs, {where}"
    return want


def test_train(server, tmp_path):
    argv = [*TINY, "--epochs", "2", "--save-every", "1", "--out", "{}/runs"]
    kill_everywhere(server, tmp_path, "train", argv)


def test_train_in_stages(server, tmp_path):
    start = tmp_path / "start"
    start.mkdir()
    (start / "stages.yaml").write_text("epochs: 1\nstages: [{lr: 0.01}, {}]\n")
    argv = ["--config", "{}/stages.yaml", *TINY, "--out", "{}/runs"]
    kill_everywhere(server, tmp_path, "train", argv, start, most=min(16, MOST))


def test_train_by_two_processes(server, tmp_path):
    argv = [*TINY, "--epochs", "2", "--save-every", "1", "--out", "{}/runs"]
    kill_everywhere(server, tmp_path, "train", argv, processes=2, most=min(12, MOST))


@pytest.fixture(scope="module")
def trained(server, tmp_path_factory):
    """A folder with a finished run and an empty manifest."""
    root = tmp_path_factory.mktemp("trained")
    argv = [*TINY, "--epochs", "1", "--out", str(root / "runs")]
    answer = server(script="train", argv=argv, root=str(root), kill=None, output=str(root.parent / "output.txt"))
    assert answer["codes"] == [0], (root.parent / "output.txt").read_text()
    (root / "manifest.json").write_text(json.dumps({"owner": "somebody", "weights": {}}))
    return root


def test_evaluate(server, tmp_path, trained):
    kill_everywhere(server, tmp_path, "evaluate", ["{}/runs/run", "--rerank", "--k1", "3", "--device", "cpu"], trained)


def test_evaluate_keeps_its_embeddings_until_others_are_there(server, tmp_path, trained):
    """An evaluation with other clips before: its embeddings go last."""
    start = shutil.copytree(trained, tmp_path / "start")
    argv = [f"{start}/runs/run", "--clip", "length=2", "--device", "cpu", "--no-figures"]
    server(script="evaluate", argv=argv, root=str(start), kill=None, output=str(tmp_path / "output.txt"))
    (old,) = (start / "runs/run/evaluation/synthetic").glob("embeddings-*")
    argv = ["{}/runs/run", "--device", "cpu", "--no-figures"]
    files = kill_everywhere(server, tmp_path, "evaluate", argv, start)
    assert f"runs/run/evaluation/synthetic/{old.name}" not in files


def test_publish(server, tmp_path, trained):
    argv = ["{}/runs/run", "--dry-run", "--manifest", "{}/manifest.json"]
    kill_everywhere(server, tmp_path, "publish", argv, trained)


def test_compute_flow(server, tmp_path):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed (pip install temporal-agg[flow])")
    if not hasattr(cv2, "optflow"):
        pytest.skip("this OpenCV has no contrib modules (opencv-contrib-python-headless has)")
    rng = np.random.default_rng(0)
    for place in ("train/1/1_1", "query/2/1_1", "gallery/2/2_1"):
        folder = tmp_path / "start" / place
        folder.mkdir(parents=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 255, (32, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    argv = ["--data", "folder:{}", "--size", "32x16", "--stored-size", "16x16", "--workers", "0", "--out", "{}/flow"]
    kill_everywhere(server, tmp_path, "compute_flow", argv, tmp_path / "start")


def test_tracklets_from_mot(server, tmp_path):
    for name in ("img1", "gt"):
        (tmp_path / "start/seq" / name).mkdir(parents=True)
    for frame in "12":
        Image.effect_noise((40, 60), 50).save(tmp_path / f"start/seq/img1/{frame}.png")
    lines = [f"{frame},{person},{10 * person},5,9,50,1,1,1\n" for frame in "12" for person in (1, 2)]
    (tmp_path / "start/seq/gt/gt.txt").write_text("".join(lines))
    argv = ["{}/seq", "--out", "{}/people", "--min-length", "1", "--cameras", "1", "--test", "0"]
    made = kill_everywhere(server, tmp_path, "tracklets_from_mot", argv, tmp_path / "start")
    assert sum(name.startswith("people/train/") for name in made) == 4


def test_robust_and_the_page_of_speed(server, tmp_path):
    results = Path(__file__).parents[2] / "recipes" / "benchmarks" / "results"
    start = shutil.copytree(results, tmp_path / "start")
    argv = ["page", "--results", "{}/speed.json", "--out", "{}/speed.md"]
    kill_everywhere(server, tmp_path, "speed", argv, start, most=min(2, MOST))
    kept = json.loads((results / "robust.json").read_text())["models"]["synthetic"]["areas"]
    kept = {"areas": {fault: {key: values[0] for key, values in of.items()} for fault, of in kept.items()}}
    argv = ["--root", "nowhere", "--only-frozen", "--out", "{}/out", "--results", "{}"]
    setup = f"import robust; robust.measure_synthetic = lambda: {kept}"
    kill_everywhere(server, tmp_path, "robust", argv, start, setup=setup)


STUDY = """
import dataclasses, study
size = study.Size(channels=(8, 16, 32, 64), size=(32, 16), people=4, length=(2, 3), frames=2, identities=2,
                  encoder_steps=1, steps=1, hidden=8, strengths=(1.0,))
study.Size = lambda: size
"""


@pytest.mark.skipif("KILLS" not in os.environ, reason="each kill is a whole study anew: minutes; KILLS=2 runs it")
def test_study(server, tmp_path):
    argv = ["--out", "{}", "--only", "mean", "--seeds", "2", "--device", "cpu"]
    kill_everywhere(server, tmp_path, "study", argv, setup=STUDY, most=min(8, MOST))
