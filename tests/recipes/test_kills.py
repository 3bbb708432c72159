"""Killed before any write of any command, the same command comes to the same files.

Here: train (one process, two, stages), evaluate, publish (with its manifest), compute_flow, study, robust, ward, mot
and speed's page, and the example that cuts tracklets out of sequences. In tests/test_cli_kills.py: embed (also by
several processes, and to Parquet), append, search -o, index, merge, link, export. In tests/models/test_hub.py:
save_pretrained.
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
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks_on_disk import make_ward

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, which this system cannot"),
]

# Kills of one command: if it writes more often, before every rename, and before others evenly spread.
MOST = int(os.environ.get("KILLS", 4))
minutes = pytest.mark.skipif("KILLS" not in os.environ, reason="whole studies again and again: KILLS=2 runs it")
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
    # Before every write: between the new embeddings and the end of the old ones there is no rename.
    files = kill_everywhere(server, tmp_path, "evaluate", argv, start, most=max(MOST, 20))
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


MOT = """
import sys, types, mot
from matplotlib.figure import Figure
mot.PART, mot.FRAMES, mot.GAPS, mot.THRESHOLDS, mot.figure = 4, (1, 2), (1,), (0.1,), lambda study: Figure((1, 1))
def evaluate(truth, rows, metrics):  # of two files; what their evaluation says is another test's
    share = len(rows.read_text()) / len(truth.read_text())
    clear, hota = types.SimpleNamespace(MOTA=share, IDSW=0), types.SimpleNamespace(HOTA=share, AssA=share)
    return types.SimpleNamespace(CLEAR=clear, HOTA=hota, Identity=types.SimpleNamespace(IDF1=share))
package, part = types.ModuleType("trackers"), types.ModuleType("trackers.eval")
part.evaluate_mot_sequence = evaluate
sys.modules.update({"trackers": package, "trackers.eval": part})
def tracked(found, last, options):
    chosen = [(int(f), 1 + (x > 20), [x, y, right, bottom]) for f, x, y, right, bottom, _ in found]
    return mot.Rows(*map(mot.np.array, zip(*chosen)))
mot.tracked = tracked
"""


@minutes
def test_mot(server, tmp_path, trained):
    start = shutil.copytree(trained, tmp_path / "start")
    for name in ("img1", "gt", "det"):
        (start / "seq" / name).mkdir(parents=True)
    rows = [(frame, person) for frame in range(1, 7) for person in (1, 2)]
    for frame in range(1, 7):
        Image.effect_noise((60, 60), 50).save(start / f"seq/img1/{frame:06d}.jpg")
    lines = [f"{frame},{person},{20 * person},5,9,50,1,1,1\n" for frame, person in rows]
    (start / "seq/gt/gt.txt").write_text("".join(lines))
    lines = [f"{frame},-1,{20 * person},4,9,50,0.9\n" for frame, person in rows]
    (start / "seq/det/det.txt").write_text("".join(lines))
    argv = ["{}/seq", "--model", "{}/runs/run", "--out", "{}/mot", "--results", "{}/results", "--least", "2"]
    made = kill_everywhere(server, tmp_path, "mot", argv, start, setup=MOT)
    assert {"results/mot.json", "results/mot.md", "results/mot.png", "mot/tracks-000004.safetensors"} <= set(made)


STUDY = """
import dataclasses, study
size = study.Size(channels=(8, 16, 32, 64), size=(32, 16), people=4, length=(2, 3), frames=2, identities=2,
                  encoder_steps=1, steps=1, hidden=8, strengths=(1.0,))
study.Size = lambda: size
"""


@minutes
def test_study(server, tmp_path):
    argv = ["--out", "{}", "--only", "mean", "--seeds", "2", "--device", "cpu"]
    kill_everywhere(server, tmp_path, "study", argv, setup=STUDY, most=min(8, MOST))


WARD = """
import ward
from temporal_agg.data.benchmarks import PUBLISHED
size = ward.Size(backbone="lcnet_035", size=(32, 32), frames=3, identities=2, epochs=1, encoder_epochs=1,
                 rates=((1e-3, 2.0),), shares=(("foreign", 0.5), ("bad boxes", 0.5)), splits=(1,))
ward.Size = lambda: size
counts = {"persons": 6, "cameras": 3, "tracklets": 18, "frames": 90}
PUBLISHED["ward"] = PUBLISHED["ward"]._replace(counts=counts)
"""


@minutes
def test_ward(server, tmp_path):
    root = make_ward(tmp_path / "data", 6, 4, size=(16, 32))
    save_file(timm.create_model("lcnet_035", num_classes=0).state_dict(), tmp_path / "imagenet.safetensors")
    argv = ["--root", str(root), "--backbone-weights", str(tmp_path / "imagenet.safetensors"), "--out", "{}/runs"]
    argv += ["--results", "{}/results", "--only", "mean", "--device", "cpu"]
    kill_everywhere(server, tmp_path, "ward", argv, setup=WARD, most=min(20, MOST))
