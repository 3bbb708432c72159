"""tracklets_from_mot.py and tracklets_from_video.py on a made-up scene of 40 frames."""

import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from temporal_agg import data

EXAMPLES = Path(__file__).parents[2] / "examples"
COLOURS = {1: (220, 30, 30), 2: (30, 200, 30), 3: (40, 40, 230), 4: (200, 200, 20)}
SIZE, BOX = (200, 100), (16, 40)


def left_of(person, frame):
    return {1: 10 + 2 * frame, 2: 150 - 3 * frame, 3: 170, 4: -8}[person]


def seen(person, frame):
    """2 is away in the middle; 3 is behind 1 at the end of neither period; 4 is half outside and comes late."""
    return {1: True, 2: not 11 <= frame <= 24, 3: frame <= 30, 4: frame > 10}[person]


def top_of(person):
    return {1: 50, 2: 48, 3: 20, 4: 30}[person]


SCENE = {f: {p: left_of(p, f) for p in COLOURS if seen(p, f)} for f in range(40)}  # 1 stands in front


def picture(frame):
    pixels = np.full((SIZE[1], SIZE[0], 3), 120, np.uint8)
    for person in sorted(SCENE[frame], key=top_of):
        x, y = SCENE[frame][person], top_of(person)
        pixels[y : y + BOX[1], max(x, 0) : max(x + BOX[0], 0)] = COLOURS[person]
        pixels[y : y + 10, max(x, 0) : max(x + BOX[0], 0)] = 240  # a head
    return pixels


def load(name, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "tracklets_from_mot", raising=False)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def sequence(tmp_path):
    folder = tmp_path / "SEQ-01"
    (folder / "img1").mkdir(parents=True)
    (folder / "gt").mkdir()
    rows = []
    for frame in SCENE:
        Image.fromarray(picture(frame)).save(folder / "img1" / f"{frame + 1:06d}.png")
        for person, x in SCENE[frame].items():
            visibility = 0.3 if person == 3 and frame < 5 else 1
            rows.append(f"{frame + 1},{person},{x + 1},{top_of(person) + 1},{BOX[0]},{BOX[1]},1,1,{visibility}")
        rows.append(f"{frame + 1},7,1,1,50,60,0,1,1")  # to be ignored
        rows.append(f"{frame + 1},8,1,1,50,60,1,3,1")  # a car
    (folder / "gt" / "gt.txt").write_text("\n".join(rows) + "\n")
    return folder


def expected(max_gap=10, min_length=8, stride=1, cameras=2, end=40):
    """The frames (from 0) of each tracklet, by person and camera, by a frame-by-frame account of the rules."""
    found = {}
    for person in COLOURS:
        run, last = 0, None
        for frame in SCENE:
            if not seen(person, frame) or (person == 3 and frame < 5):
                continue
            x, y = left_of(person, frame), top_of(person)
            inside = (min(x + BOX[0], SIZE[0]) - max(x, 0)) / BOX[0]
            covered = 0
            for other in SCENE[frame]:
                if top_of(other) > y:
                    wide = min(x, left_of(other, frame)) + BOX[0] - max(x, left_of(other, frame))
                    high = y + BOX[1] - top_of(other)
                    covered = max(covered, max(wide, 0) * max(high, 0) / (BOX[0] * BOX[1]))
            if inside < 0.6 or covered > 0.5:
                continue
            run += last is not None and frame - last > max_gap
            last = frame
            found.setdefault((person, frame * cameras // end, run), []).append(frame)
    found = {key: frames[::stride] for key, frames in found.items()}
    return {key: frames for key, frames in found.items() if len(frames) >= min_length}


def written(out, shift):
    """The same of what lies in a folder."""
    found = {}
    for folder in sorted(out.glob("*/*/*_*")):
        frames = sorted(int(p.stem) - shift for p in folder.glob("*.jpg"))
        person, camera = int(folder.parent.name), int(folder.name.split("_")[0])
        assert folder.name.endswith(f"-{frames[0] + shift:06d}")
        found.setdefault((person, camera), []).append(frames)
    return found


def by_camera(tracklets):
    found = {}
    for (person, period, _), frames in sorted(tracklets.items()):
        found.setdefault((person, period), []).append(frames)
    return found


OPTIONS = ["--min-height", "30", "--visibility", "0.6"]


def test_mot(sequence, tmp_path, monkeypatch, capsys):
    main, out = load("tracklets_from_mot", monkeypatch), tmp_path / "people"
    command = [str(sequence), "--out", str(out), *OPTIONS, "--min-length", "4"]
    main(command)
    want = by_camera(expected(min_length=4))
    assert written(out, shift=1) == want
    assert {p for p, _ in want} == {1, 2, 3}  # 4 is half outside
    assert any(len(frames) not in (10, 15, 20) for runs in want.values() for frames in runs)  # occluded ones are out

    dataset = data.open_dataset("folder", out)
    dataset.check_retrieval()
    assert {t.pid for t in dataset.train}.isdisjoint(t.pid for t in dataset.query)
    assert {t.camera for t in dataset.query} == {0}
    assert len(dataset.train) + len(dataset.query) + len(dataset.gallery) == sum(map(len, want.values()))
    for t in [*dataset.train, *dataset.query, *dataset.gallery]:
        frame = t.load([0])[0]
        assert frame.shape == (3, 44, 18)  # 5 % of 16 x 40 on each side
        np.testing.assert_allclose(frame[:, 30, 9], COLOURS[t.pid], atol=12)
    rows = sum(map(len, want.values()))
    with Image.open(out / "contact_sheet.jpg") as sheet:
        assert sheet.size == (200 + 8 * 64, rows * 128)
    assert f"{rows} tracklets written" in capsys.readouterr().out

    # Killed: one tracklet is lost, one was not finished.
    lost, *others = sorted(out.glob("*/*/*_*"))
    for path in lost.iterdir():
        path.unlink()
    lost.rename(lost.with_name(f".tmp-{lost.name}"))
    times = {p: p.stat().st_mtime_ns for folder in others for p in folder.iterdir()}
    main(command)
    assert "1 tracklets written" in capsys.readouterr().out
    assert written(out, shift=1) == want
    assert not list(out.glob("**/.tmp*"))
    assert times == {p: p.stat().st_mtime_ns for p in times}
    with pytest.raises(SystemExit, match=r"other settings .*min_length: was 4, is 5"):
        main([*command[:-1], "5"])


def test_mot_stride_gap_cameras(sequence, tmp_path, monkeypatch):
    main = load("tracklets_from_mot", monkeypatch)
    options = ["--stride", "3", "--min-length", "2", "--max-gap", "2", "--cameras", "3", "--test", "0"]
    main([str(sequence), "--out", str(tmp_path / "out"), *OPTIONS, *options])
    want = by_camera(expected(max_gap=2, min_length=2, stride=3, cameras=3))
    assert written(tmp_path / "out", shift=1) == want
    assert [p.name for p in (tmp_path / "out").iterdir() if p.is_dir()] == ["train"]


def test_mot_tracks_of_several_sequences(sequence, tmp_path, monkeypatch):
    main = load("tracklets_from_mot", monkeypatch)
    tracks = [line.split(",") for line in (sequence / "gt" / "gt.txt").read_text().split() if line.split(",")[1] < "7"]
    rows = [",".join([*r[:6], "0.9" if int(r[0]) > 20 else "0.2", "-1", "-1", "-1"]) for r in tracks]
    (tmp_path / "tracks.txt").write_text("\n".join(rows))
    options = [*OPTIONS, "--cameras", "1", "--test", "0", "--confidence", "0.5"]
    main([str(sequence), "--boxes", str(tmp_path / "tracks.txt"), "--out", str(tmp_path / "a"), *options])
    assert all(f >= 20 for runs in written(tmp_path / "a", shift=1).values() for run in runs for f in run)
    main([str(sequence), str(sequence), "--out", str(tmp_path / "b"), *options])
    people = {p for p, _ in written(tmp_path / "b", shift=1)}
    assert people == {1, 2, 3, 6, 7, 8}  # numbers up to 4 are the first sequence's
    main([str(sequence), str(sequence), "--out", str(tmp_path / "c"), *options, "--shared-ids"])
    assert set(written(tmp_path / "c", shift=1)) == {(p, c) for p in (1, 2, 3) for c in (0, 1)}


def test_mot_errors(sequence, tmp_path, monkeypatch):
    main = load("tracklets_from_mot", monkeypatch)

    def fails(says, *options, source=sequence, out="out"):
        with pytest.raises(SystemExit) as error:
            main([str(source), "--out", str(tmp_path / out), *OPTIONS, *options])
        assert says in str(error.value)

    fails("no folder", source=tmp_path / "nowhere")
    fails("no frame in", source=tmp_path)
    fails("no tracklet is left", "--min-length", "100")
    fails("nobody was seen in two cameras", "--cameras", "1")
    fails("at least 1", "--stride", "0")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    fails("holds other things", out="full")
    for line, says in (("1,-1,5,5,20,40,0.9", "run a tracker first"), ("1,2,x,5", "line 1: expected frame")):
        (tmp_path / "boxes.txt").write_text(line)
        fails(says, "--boxes", str(tmp_path / "boxes.txt"))
    (sequence / "img1" / "000003.png").write_bytes(b"no image")
    fails("000003.png")
    (sequence / "img1" / "000003.png").unlink()
    fails("frame 3, but no image")


@pytest.fixture
def video(tmp_path):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed (pip install temporal-agg[flow])")
    file = tmp_path / "door.avi"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 10, SIZE)
    if not writer.isOpened():
        pytest.skip("this OpenCV cannot write a video")
    for frame in SCENE:
        writer.write(picture(frame)[..., ::-1].copy())
    writer.release()
    with open(tmp_path / "door.csv", "w", newline="") as boxes:
        rows = csv.writer(boxes)
        rows.writerow(["id", "frame", "left", "top", "width", "height", "visibility"])
        for frame in SCENE:
            for person, x in SCENE[frame].items():
                rows.writerow([person, frame, x, top_of(person), *BOX, 0.3 if person == 3 and frame < 5 else ""])
    return file


def test_video(video, tmp_path, monkeypatch):
    main, out = load("tracklets_from_video", monkeypatch), tmp_path / "people"
    command = [str(video), str(video.with_suffix(".csv")), "--out", str(out), *OPTIONS]
    main(command)
    assert written(out, shift=0) == by_camera(expected())
    dataset = data.open_dataset("folder", out)
    for t in [*dataset.train, *dataset.query, *dataset.gallery]:
        for frame in t.load(range(len(t))):
            np.testing.assert_allclose(frame[:, 30, 9], COLOURS[t.pid], atol=40)  # colours through MJPEG

    def fails(says, *options):
        with pytest.raises(SystemExit) as error:
            main([*map(str, options), "--out", str(tmp_path / "other")])
        assert says in str(error.value)

    boxes, head = tmp_path / "boxes.csv", "frame,id,left,top,width,height\n"
    for text, says in (
        ("", "missing frame, id"),
        ("frame,id,left,top,width\n", "missing height"),
        (f"{head}1,1,a,2,3,4\n", "line 2: expected numbers"),
        (head, "has no box"),
        (f"{head}-1,1,1,1,9,60\n", "pass --first-frame"),
        (head + "".join(f"{f},1,9,9,9,60\n" for f in range(35, 55)), "ends before frame 40"),
    ):
        boxes.write_text(text)
        fails(says, video, boxes, "--test", "0")
    fails("no file", tmp_path / "no.mp4", boxes)
    fails("cannot read", boxes, boxes)
    fails("in turns", video)
