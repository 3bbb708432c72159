"""The flow recipe, in miniature: what it computes, where it writes, and that nothing is lost when it is killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from temporal_agg import data
from temporal_agg.data.flow import flow_header

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed (pip install temporal-agg[flow])")
if not hasattr(cv2, "optflow"):
    pytest.skip("this OpenCV has no contrib modules (opencv-contrib-python-headless has)", allow_module_level=True)

SCRIPT = Path(__file__).parents[2] / "recipes" / "compute_flow.py"
SMALL = ["--size", "64x32", "--stored-size", "32x16", "--workers", "0"]
DX, DY = 2, -1  # pixels of 64 x 32 from frame to frame


def texture(seed):
    noise = np.random.default_rng(seed).standard_normal((120, 80, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.5)
    return (127 + 45 * smooth / smooth.std()).clip(0, 255).astype(np.uint8)


def write_tracklet(folder, count, seed=0, dx=DX, dy=DY):
    """A window of 64 x 32 pixels that moves over a texture: what it shows moves by (dx, dy)."""
    folder.mkdir(parents=True)
    for i in range(count):
        top, left = 25 - dy * i, 35 - dx * i
        Image.fromarray(texture(seed)[top : top + 64, left : left + 32]).save(folder / f"{i:03d}.png")


@pytest.fixture
def folder(tmp_path):
    """Two tracklets to train on, a query, and a gallery of one frame."""
    root = tmp_path / "data"
    write_tracklet(root / "train" / "0001" / "1_0001", 4, seed=0)
    write_tracklet(root / "train" / "0002" / "1_0001", 3, seed=1)
    write_tracklet(root / "query" / "0003" / "1_0001", 2, seed=2)
    write_tracklet(root / "gallery" / "0003" / "2_0001", 1, seed=3)
    return root


def run(recipe, root, *argv):
    return recipe("compute_flow").main(["--data", f"folder:{root}", *SMALL, *argv])


def inner(flow, border=4):
    return flow[..., border:-border, border:-border]


def contents(root):
    """The files of flow that are whole; what a killed process had begun lies in a hidden folder."""
    files = {path.relative_to(root): path for path in root.rglob("*.flow")}
    return {name: path.read_bytes() for name, path in files.items() if not name.parent.name.startswith(".")}


def test_a_moving_texture_has_the_flow_it_moves_by(recipe, folder, capsys):
    assert run(recipe, folder) == 0
    assert "4 tracklets: 4 computed, 0 there already, 0 failed.\n10 frames" in capsys.readouterr().out
    dataset = data.read_folder(folder)
    data.check_flow([*dataset.train, *dataset.query, *dataset.gallery])
    for tracklet in [*dataset.train, *dataset.query]:
        flow = torch.stack(tracklet.load_flow(range(len(tracklet))))
        assert flow.shape == (len(tracklet), 2, 32, 16)
        median = inner(flow).flatten(2).median(2).values
        torch.testing.assert_close(median, torch.tensor([DX / 2, DY / 2]).expand_as(median), rtol=0, atol=0.1)
        assert torch.equal(flow[-1], flow[-2])
    assert dataset.gallery[0].load_flow([0])[0].count_nonzero() == 0


def test_flow_of_flipped_and_resized_frames_is_the_transformed_flow(recipe, folder, tmp_path):
    """The oracle computes flow anew, on frames that were flipped and resized before."""
    assert run(recipe, folder, "--stored-size", "64x32") == 0
    straight = data.read_folder(folder).train[0]
    size = (96, 64)  # 1.5 and 2 times the frames
    turned = tmp_path / "turned" / "train" / "0001" / "1_0001"
    turned.mkdir(parents=True)
    for i, frame in enumerate(straight.load(range(4))):
        image = Image.fromarray(frame.permute(1, 2, 0).numpy()).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image.resize(size[::-1], Image.Resampling.BILINEAR).save(turned / f"{i:03d}.png")
    argv = ["--size", "96x64", "--stored-size", "96x64"]
    assert run(recipe, tmp_path / "turned", *argv) == 0
    anew = data.ClipTransform(size)
    flip = data.ClipTransform(size, train=True, flip=1.0)
    oracle = data.read_folder(tmp_path / "turned").train[0]
    _, want = anew(oracle.load(range(4)), flow=oracle.load_flow(range(4)))
    _, got = flip(straight.load(range(4)), flow=straight.load_flow(range(4)))
    assert inner(want, 12).mean((0, 2, 3)).tolist() == pytest.approx([-2 * DX, 1.5 * DY], abs=0.2)
    assert (inner(got, 12) - inner(want, 12)).abs().mean() < 0.1


def test_frames_of_several_sizes(recipe, tmp_path):
    write_tracklet(tmp_path / "train" / "0001" / "1_0001", 3)
    path = tmp_path / "train" / "0001" / "1_0001" / "001.png"
    Image.open(path).resize((64, 128), Image.Resampling.BICUBIC).save(path)
    assert run(recipe, tmp_path) == 0
    flow = torch.stack(data.read_folder(tmp_path).train[0].load_flow(range(2)))
    median = inner(flow).flatten(2).median(2).values
    torch.testing.assert_close(median, torch.tensor([DX / 2, DY / 2]).expand_as(median), rtol=0, atol=0.2)


def test_a_second_run_does_what_is_missing(recipe, folder, capsys):
    assert run(recipe, folder) == 0
    before = contents(folder)
    assert len(before) == 4
    first, second = [folder / path for path in list(before)[:2]]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-7])  # what a full disk leaves
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.flow") if path != second}
    capsys.readouterr()
    assert run(recipe, folder) == 0
    assert "4 tracklets: 2 computed, 2 there already, 0 failed." in capsys.readouterr().out
    assert contents(folder) == before
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert run(recipe, folder) == 0
    assert capsys.readouterr().out == "4 tracklets: 0 computed, 4 there already, 0 failed.\n"


def test_other_settings_are_refused_and_never_mixed(recipe, folder):
    assert run(recipe, folder) == 0
    before = contents(folder)
    with pytest.raises(SystemExit, match=r"made with other settings.*--overwrite"):
        run(recipe, folder, "--stored-size", "64x32")
    assert contents(folder) == before
    assert run(recipe, folder, "--stored-size", "64x32", "--overwrite") == 0
    assert {tuple(flow_header(path)["size"]) for path in folder.rglob("*.flow")} == {(64, 32)}


@pytest.mark.slow
def test_parts_and_processes_change_nothing_and_out_leaves_the_data_alone(recipe, folder, tmp_path, monkeypatch):
    tracklet = folder / "train" / "0004" / "1_0001"
    tracklet.mkdir(parents=True)
    for i in range(37):  # more than a part, and each flow another one
        Image.fromarray(texture(4)[i * i % 50 :][:64, i * 7 % 40 :][:, :32]).save(tracklet / f"{i:03d}.png")
    monkeypatch.setattr(recipe("compute_flow"), "PART", 1000)
    assert run(recipe, folder) == 0
    serial = contents(folder)
    assert len(set(serial.values())) == 5
    for path in folder.rglob("*.flow"):
        path.unlink()
    files = sorted(folder.rglob("*"))
    out = tmp_path / "out"
    command = [sys.executable, SCRIPT, "--data", f"folder:{folder}", *SMALL, "--workers", "2", "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    assert contents(out / folder.relative_to(folder.anchor)) == serial
    assert sorted(folder.rglob("*")) == files
    dataset = data.read_folder(folder).with_flow_root(out)
    data.check_flow([*dataset.train, *dataset.query, *dataset.gallery])


def test_a_broken_tracklet_is_named_and_loses_no_other(recipe, folder, capsys, monkeypatch):
    monkeypatch.setattr(recipe("compute_flow"), "PART", 1)
    broken = folder / "train" / "0001" / "1_0001" / "002.png"
    broken.write_bytes(broken.read_bytes()[:200])
    assert run(recipe, folder) == 1
    output = capsys.readouterr()
    assert "4 tracklets: 3 computed, 0 there already, 1 failed." in output.out
    assert f"failed: train/0001/1_0001: cannot read the image {broken}" in output.err
    assert len(contents(folder)) == 3
    assert not list((folder / "train" / "0001").rglob("*.tmp"))
    assert run(recipe, folder) == 1


@pytest.mark.slow
def test_a_killed_run_goes_on(recipe, folder, capsys):
    for k in range(20):
        shutil.copytree(folder / "train" / "0001", folder / "train" / f"{100 + k:04d}")
    command = [sys.executable, SCRIPT, "--data", f"folder:{folder}", *SMALL]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(contents(folder)) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {folder / path: (folder / path).stat().st_mtime_ns for path in contents(folder)}
    assert 3 <= len(done) < 24
    assert run(recipe, folder) == 0
    output = capsys.readouterr().out
    assert f"24 tracklets: {24 - len(done)} computed, {len(done)} there already, 0 failed." in output
    assert {path: path.stat().st_mtime_ns for path in done} == done
    dataset = data.read_folder(folder)
    tracklets = [*dataset.train, *dataset.query, *dataset.gallery]
    assert len(tracklets) == 24
    for tracklet in tracklets:
        tracklet.load_flow(range(len(tracklet)))


def test_each_distinct_tracklet_once(recipe, folder, capsys):
    """As in MARS, where the queries are part of the gallery."""
    lines = ["split,pid,camera,tracklet,path"]
    for split in ("query", "gallery"):
        lines += [f"{split},1,1,1,train/0001/1_0001/{i:03d}.png" for i in range(4)]
    lines += ["gallery,1,2,1,train/0002/1_0001/000.png"]
    (folder / "list.csv").write_text("\n".join(lines))
    assert recipe("compute_flow").main(["--data", f"csv:{folder / 'list.csv'}", *SMALL]) == 0
    assert "2 tracklets: 2 computed" in capsys.readouterr().out


def test_errors_come_before_the_work(recipe, folder, tmp_path, capsys, monkeypatch):
    main = recipe("compute_flow").main
    with pytest.raises(SystemExit, match="nowhere to keep their optical flow"):
        main(["--data", "synthetic", "--data-options", "num_identities=4", *SMALL])
    with pytest.raises(SystemExit, match="no data set is named 'folders'"):
        main(["--data", "folders:x", *SMALL])
    for argv, message in (
        (["--size", "64"], "invalid image_size value"),
        (["--stored-size", "128x64"], "must not exceed --size"),
        (["--data-options", "3"], "KEY=VALUE"),
    ):
        with pytest.raises(SystemExit):
            run(recipe, folder, *argv)
        assert message in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(SystemExit, match=r"cannot write to .*--out FOLDER"):
        run(recipe, folder)
    assert not contents(folder)
