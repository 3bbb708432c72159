"""Killed at every write of every command, the same command comes to the same result; processes share an embed."""

import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback

import pytest
import torch
from PIL import Image

from temporal_agg import _embed, _files, cli, create_aggregator, create_model, export_onnx
from temporal_agg.retrieval.store import read_embeddings

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

# Kills of one command: if it writes more often, evenly spread.
MOST = int(os.environ.get("KILLS", 12))
FEW = min(4, MOST)  # where another test has killed the same mechanism everywhere
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"}
NAMES = [f"000{i // 2}/{i % 2 + 1}_a" for i in range(6)]


@functools.cache
def model():
    torch.manual_seed(0)
    return create_model("mean_test_resnet", img_size=(32, 16)).eval()


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        (tmp_path / "data" / name).mkdir(parents=True)
        for frame in "12":
            Image.new("RGB", (4, 8)).save(tmp_path / "data" / name / f"{frame}.png")
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    """One vector for each name, and a log of what has been embedded: what is tested is not the model."""
    log = tmp_path / "log"
    log.touch()

    def embed(model, tracklets, **options):
        with open(log, "a") as file:
            file.write("".join(f"{t.name}\n" for t in tracklets))
        return torch.stack([torch.tensor([float(t.pid), t.camera, 1.0, 2.0]) for t in tracklets])

    monkeypatch.setattr(_files, "ABANDONED", -1)  # an empty folder without a lock counts as at work for a day
    monkeypatch.setattr(_embed, "SAVE_EVERY", 0)
    monkeypatch.setattr(_embed, "embed_tracklets", embed)
    monkeypatch.setattr(_embed, "load_model", lambda *args: model())
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return log


def start(run, before=lambda: None, **environment):
    """A child process; its exit code comes from ``ended``."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        torch.set_num_threads(1)
        os.environ.update(environment)
        before()
        code = run()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code or 0)


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def watch(root, kill_at, counted=None):
    """Ends this process before its change number ``kill_at`` below ``root``; ``counted`` gets a byte for each."""
    seen = 0
    count = None if counted is None else os.open(counted, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def hook(event, args):
        nonlocal seen
        paths = [os.fsdecode(a) for a in args if isinstance(a, (str, bytes, os.PathLike))]
        writes = event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & 3)
        if writes and any(path.startswith(str(root)) for path in paths):
            seen += 1
            if count is not None:
                os.write(count, b".")
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def content(folder):
    return {p.name: p.read_bytes() if p.is_file() else None for p in folder.iterdir()}


def check(out, run, tmp_path, outputs, most=MOST):
    """Kills ``run`` at each of its changes in the folder ``out``, and lets it run again."""
    first = content(out)
    counted = tmp_path / "counted"
    counted.unlink(missing_ok=True)
    assert ended(start(run, lambda: watch(out, -1, counted))) == 0
    want = content(out)
    assert set(want) == {*first, *outputs}
    number = counted.stat().st_size
    assert number > 3
    sizes = [1, 60, 200, 700][: max(1, most // 3)]  # killed in the middle of a write, too
    places = range(1, number + 1, max(1, -(-number // most)))
    for kill in [*places, number, *(-size for size in sizes)]:
        shutil.rmtree(out)
        out.mkdir()
        for name, data in first.items():
            (out / name).write_bytes(data)

        def before(kill=kill):
            if kill > 0:
                watch(out, kill)
            else:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (-kill, -kill))

        code = ended(start(run, before))
        assert code in ((-signal.SIGKILL,) if kill > 0 else (-signal.SIGXFSZ, 0)), kill
        for name in outputs:  # whole, or what was there
            now = content(out).get(name)
            assert now in (want[name], first.get(name)), (kill, name)
        whole = all(content(out).get(name) == want[name] for name in outputs)
        code = ended(start(run))
        assert code == 0 or whole, kill  # what is there already is refused
        assert content(out) == want, kill


def command(*words):
    return lambda: cli.main([str(word) for word in words])


@pytest.fixture
def gallery(folder, tmp_path):
    path = tmp_path / "gallery.npz"
    assert cli.main(["embed", str(folder), "-o", str(path), "--model", "m", "--frames-per-batch", "4"]) == 0
    return path


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.slow
def test_embed(folder, tmp_path, out):
    run = command("embed", folder, "-o", out / "a.npz", "--model", "m", "--frames-per-batch", 4)
    check(out, run, tmp_path, ["a.npz"])


@pytest.mark.slow
def test_embed_parquet(folder, tmp_path, out):
    pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    run = command("embed", folder, "-o", out / "a.parquet", "--model", "m", "--frames-per-batch", 4)
    check(out, run, tmp_path, ["a.parquet"], FEW)
    (folder / "0007/1_a").mkdir(parents=True)
    Image.new("RGB", (4, 8)).save(folder / "0007/1_a/1.png")
    run = command("embed", folder, "-o", out / "a.parquet", "--model", "m", "--append")
    check(out, run, tmp_path, ["a.parquet"], FEW)
    assert read_embeddings(out / "a.parquet").names == [*NAMES, "0007/1_a"]


@pytest.mark.slow
def test_embed_append(folder, tmp_path, out, gallery):
    (out / "a.npz").write_bytes(gallery.read_bytes())
    for name in ("0007/1_a", "0007/2_a"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (4, 8)).save(folder / name / "1.png")
    run = command("embed", folder, "-o", out / "a.npz", "--model", "m", "--append", "--frames-per-batch", 1)
    check(out, run, tmp_path, ["a.npz"])
    assert read_embeddings(out / "a.npz").names == [*NAMES, "0007/1_a", "0007/2_a"]


@pytest.mark.slow
def test_search(tmp_path, out, gallery):
    check(out, command("search", gallery, gallery, "-o", out / "found.csv", "--format", "csv"), tmp_path, ["found.csv"])


@pytest.mark.slow
def test_merge(tmp_path, out, gallery):
    check(out, command("merge", gallery, "-o", out / "all.npz"), tmp_path, ["all.npz"])


@pytest.mark.slow
def test_merge_parquet(tmp_path, out, gallery):
    """From npz to Parquet, and over one that is there."""
    pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    run = command("merge", gallery, "-o", out / "all.parquet")
    check(out, run, tmp_path, ["all.parquet"], FEW)
    (out / "all.parquet").write_bytes(b"old")
    run = command("merge", gallery, "-o", out / "all.parquet", "--overwrite")
    check(out, run, tmp_path, ["all.parquet"], FEW)
    assert read_embeddings(out / "all.parquet").names == NAMES


@pytest.mark.slow
def test_index(tmp_path, out, gallery):
    """FAISS opens its file unseen by Python, and does not raise OSError."""
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    check(out, command("index", gallery, "-o", out / "a.faiss"), tmp_path, ["a.faiss"], FEW)
    (out / "a.faiss").write_bytes(b"old")
    run = command("index", gallery, "-o", out / "a.faiss", "--kind", "hnsw", "--overwrite")
    check(out, run, tmp_path, ["a.faiss"], FEW)


@pytest.mark.slow
def test_link(folder, tmp_path, out, gallery):
    words = ["link", gallery, "-o", out / "a.csv", "--sheet", out / "a.html", "--folder", folder]
    check(out, command(*words), tmp_path, ["a.csv", "a.html"])


@pytest.mark.slow
def test_export(tmp_path, out):
    pytest.importorskip("onnxscript", reason="the extra export is not installed")

    def before():
        def hook(event, args):
            if event == "os.rename" and str(out) in str(args[0]):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    aggregator, path = create_aggregator("mean", 4), out / "a.onnx"
    export_onnx(aggregator, tmp_path / "first.onnx")  # the children find everything imported
    path.write_text("old")
    assert ended(start(lambda: export_onnx(aggregator, path), before)) == -signal.SIGKILL
    assert path.read_text() == "old"
    assert ended(start(lambda: export_onnx(aggregator, path))) == 0
    assert path.stat().st_size > 100
    assert list(content(out)) == ["a.onnx"]


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


def embed(folder, out, *more, cwd=None):
    words = ["embed", folder, "-o", out / "a.npz", "--model", "m", "--frames-per-batch", 1, *more]

    def run():
        if cwd is not None:
            cwd.mkdir(exist_ok=True)
            os.chdir(cwd)
        return command(*words)()

    return run


def of(rank, world):
    return {"RANK": str(rank), "WORLD_SIZE": str(world)}


def kill_before_embedding(number):
    def before():
        embed, calls = _embed.embed_tracklets, []

        def or_die(*args, **options):
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return embed(*args, **options)

        _embed.embed_tracklets = or_die

    return before


def test_one_of_two_is_killed_and_restarted(folder, tmp_path, out, gallery, quick):
    """Two processes that share nothing but the disk with the output."""
    quick.write_text("")
    first, second = (embed(folder, out, cwd=tmp_path / name) for name in ("machine 1", "machine 2"))
    assert ended(start(first, **of(0, 2))) == 0
    assert not (out / "a.npz").exists()
    assert ended(start(second, kill_before_embedding(3), **of(1, 2))) == -signal.SIGKILL
    assert not (out / "a.npz").exists()
    assert ended(start(second, **of(1, 2))) == 0
    assert content(out) == {"a.npz": gallery.read_bytes()}
    assert sorted(quick.read_text().split()) == NAMES  # nothing twice


def test_restarted_with_another_number_of_processes(folder, tmp_path, out, gallery, quick):
    quick.write_text("")
    assert ended(start(embed(folder, out), kill_before_embedding(2), **of(2, 3))) == -signal.SIGKILL
    assert ended(start(embed(folder, out), kill_before_embedding(2), **of(1, 3))) == -signal.SIGKILL
    assert ended(start(embed(folder, out), kill_before_embedding(2), **of(1, 2))) == -signal.SIGKILL
    assert len(quick.read_text().split()) == 3
    assert ended(start(embed(folder, out))) == 0
    assert content(out) == {"a.npz": gallery.read_bytes()}
    assert sorted(quick.read_text().split()) == NAMES


def test_at_the_same_time(folder, tmp_path, out, gallery, quick):
    quick.write_text("")
    for _ in range(2):
        children = [start(embed(folder, out), **of(rank, 3)) for rank in range(3)]
        assert [ended(child) for child in children] == [0, 0, 0]
        assert content(out) == {"a.npz": gallery.read_bytes()}
        assert sorted(quick.read_text().split()) == NAMES
        (out / "a.npz").unlink()
        quick.write_text("")


def wait_before_embedding(folder):
    """The process says by a file that it is at work, and goes on once another file is there."""

    def before():
        embed, calls = _embed.embed_tracklets, []

        def wait(*args, **options):
            calls.append(1)
            if len(calls) == 2:
                (folder / "at work").touch()
                while not (folder / "go on").exists():
                    time.sleep(0.01)
            return embed(*args, **options)

        _embed.embed_tracklets = wait

    return before


@pytest.mark.slow
@pytest.mark.parametrize(("mine", "theirs"), [((0, 1), (0, 1)), ((0, 1), (1, 2)), ((1, 2), (0, 1)), ((1, 2), (1, 2))])
def test_a_second_run_says_that_the_first_is_at_work(mine, theirs, folder, tmp_path, out, gallery, capfd):
    child = start(embed(folder, out), wait_before_embedding(tmp_path), **of(*theirs))
    while not (tmp_path / "at work").exists():
        time.sleep(0.01)
    part = out / ("a.npz.part" if theirs[1] == 1 else f"a.npz.{theirs[0]}.part")
    before = part.read_bytes()
    for more in ((), ("--overwrite",)):
        assert ended(start(embed(folder, out, *more), **of(*mine))) == 1
        assert "another process is at work on" in capfd.readouterr().err
        assert part.read_bytes() == before
    (tmp_path / "go on").touch()
    assert ended(child) == 0


@pytest.mark.slow
def test_torchrun(folder, out, tmp_path):
    create_model("mean_resnet10t", img_size=(32, 16)).save_pretrained(tmp_path / "model")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [sys.executable, *launch, "-m", "temporal_agg.cli"]
    words += ["embed", str(folder), "-o", str(out / "a.npz"), "--model", str(tmp_path / "model"), "--device", "cpu"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert read_embeddings(out / "a.npz").names == NAMES
    assert [p.name for p in out.iterdir()] == ["a.npz"]


def test_an_unfinished_run_is_no_leave_to_overwrite(folder, out, gallery, capfd):
    (out / "a.npz").write_bytes(gallery.read_bytes())
    (folder / "0009" / "1_a").mkdir(parents=True)
    Image.new("RGB", (4, 8)).save(folder / "0009" / "1_a" / "1.png")
    assert ended(start(embed(folder, out, "--overwrite"), kill_before_embedding(3))) == -signal.SIGKILL
    assert ended(start(embed(folder, out))) == 1
    assert "is there already" in capfd.readouterr().err
    assert (out / "a.npz").read_bytes() == gallery.read_bytes()
    assert ended(start(embed(folder, out, "--overwrite"))) == 0
    assert read_embeddings(out / "a.npz").names == [*NAMES, "0009/1_a"]
    assert list(content(out)) == ["a.npz"]


@pytest.mark.parametrize("name", ["a.npz.part", ".a.npz.part.lock"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_where_the_part_should_be_is_named(folder, out, capsys, quick, make, name):
    """A pipe would be waited for without end."""
    make(out / name)
    assert embed(folder, out)() == 1
    assert f"{out / name} is there and no file: choose another name." in capsys.readouterr().err
    assert quick.read_text() == ""


def test_a_run_that_fails_at_once_leaves_nothing(folder, out):
    def before():
        _embed.embed_tracklets = None  # a TypeError

    assert ended(start(embed(folder, out), before)) == 1
    assert content(out) == {}


def test_processes_of_the_environment(folder, out, monkeypatch, capsys):
    for rank, world in (("2", "2"), ("-1", "2"), ("x", "2")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        assert embed(folder, out)() == 1
        assert f"RANK={rank} and WORLD_SIZE={world}" in capsys.readouterr().err
    monkeypatch.delenv("RANK")
    assert embed(folder, out)() == 0  # WORLD_SIZE alone is somebody else's


def test_the_part_of_a_run_can_be_read_while_it_is_written(folder, out, quick):
    """JSON lines, as documented: settings, then a tracklet a line."""
    assert ended(start(embed(folder, out), kill_before_embedding(4))) == -signal.SIGKILL
    first, *rows = map(json.loads, (out / "a.npz.part").read_text().splitlines())
    assert {"temporal-agg", "precision", "weights", "clip", "encoder"} <= set(first)
    assert [row["name"] for row in rows] == NAMES[:3]
