"""tracklets_from_mot.py and tracklets_from_video.py on a made-up scene of 40 frames."""

import csv
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from temporal_agg import data
from temporal_agg._files import locked

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
    other = tmp_path / "SEQ-02"
    shutil.copytree(sequence, other)
    main([str(sequence), str(other), "--out", str(tmp_path / "b"), *options])
    people = {p for p, _ in written(tmp_path / "b", shift=1)}
    assert people == {1, 2, 3, 6, 7, 8}  # numbers up to 4 are the first sequence's
    main([str(sequence), str(other), "--out", str(tmp_path / "c"), *options, "--shared-ids"])
    assert set(written(tmp_path / "c", shift=1)) == {(p, c) for p in (1, 2, 3) for c in (0, 1)}
    with pytest.raises(SystemExit, match="is given twice"):
        main([str(sequence), str(sequence), "--out", str(tmp_path / "d"), *options])


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


def simple(folder, rows, frames=12, draw=None, name="gt/gt.txt"):
    """A sequence of grey frames with one file of boxes."""
    (folder / "img1").mkdir(parents=True)
    for f in range(1, frames + 1):
        picture = Image.new("RGB", (320, 240), (80, 90, 100))
        draw(folder / "img1", f) if draw else picture.save(folder / "img1" / f"{f:06d}.jpg")
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(row.format(f=f) + "\n" for f in range(1, frames + 1) for row in rows))
    return folder


PLAIN = ["--cameras", "1", "--test", "0"]
PERSON = "{f},1,21,61,40,120,1,1,1.0"


@pytest.mark.parametrize(
    "option",
    ["--visibility nan", "--visibility 50", "--occlusion nan", "--confidence nan", "--margin inf", "--max-gap -1"],
)
def test_mot_numbers_that_make_no_sense(sequence, tmp_path, monkeypatch, option):
    with pytest.raises(SystemExit, match=r"are shares, from 0 to 1, and .* numbers of at least 0"):
        load("tracklets_from_mot", monkeypatch)([str(sequence), "--out", str(tmp_path / "out"), *option.split()])
    assert not (tmp_path / "out").exists()


def test_mot_a_sequence_twice_would_double_its_people(sequence, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(sequence)
    with pytest.raises(SystemExit, match="SEQ-01 is given twice"):
        load("tracklets_from_mot", monkeypatch)([str(sequence), str(tmp_path / "link"), "--out", str(tmp_path / "out")])


@pytest.mark.slow
def test_mot_a_full_disk_leaves_no_half_frame(sequence, tmp_path):
    """Pillow takes no notice when the system writes a part of a frame only; then it would stay for ever."""
    resource = pytest.importorskip("resource", reason="this system bounds no files")

    def bound():
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))

    out = tmp_path / "out"
    command = [sys.executable, str(EXAMPLES / "tracklets_from_mot.py"), str(sequence), "--out", str(out)]
    command += ["--min-height", "20", "--min-length", "4"]
    done = subprocess.run(command, preexec_fn=bound, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    subprocess.run(command, check=True, capture_output=True)
    files = sorted(out.rglob("*.jpg"))
    assert len(files) > 40
    for file in files:
        data.open_image(file)


def test_mot_says_what_each_filter_left_out(tmp_path, monkeypatch, capsys):
    main = load("tracklets_from_mot", monkeypatch)
    rows = [PERSON, "{f},-1,200,60,40,120,1,1,1.0", "{f},2,200,60,40,20,1,1,1.0", "{f},3,100,60,40,120,1,1,0.1"]
    rows += ["{f},4,280,60,40,120,1,7,1.0", PERSON]
    main([str(simple(tmp_path / "walk", rows)), "--out", str(tmp_path / "people"), *PLAIN])
    said = capsys.readouterr().out
    assert "walk: 72 boxes, read as mot-gt (frame,id,left,top,width,height,flag,class,visibility)" in said
    for why in (
        "without an identity (id below 0)",
        "of other classes than 1",
        "of somebody who has another box in that frame",
        "of a height below 48 pixels",
        "of a visibility below 0.5",
    ):
        assert f"left out: 12 {why}" in said
    assert {p for p, _ in written(tmp_path / "people", shift=1)} == {1}


def test_mot_columns_and_classes(tmp_path, monkeypatch):
    main = load("tracklets_from_mot", monkeypatch)
    folder = simple(tmp_path / "walk", ["{f},1,20,60,40,120,1,1,0"], name="tracks.txt")
    command = [str(folder), "--boxes", str(folder / "tracks.txt"), *PLAIN]
    with pytest.raises(SystemExit, match="can be mot-gt or boxmot"):
        main([*command, "--out", str(tmp_path / "a")])
    main([*command, "--out", str(tmp_path / "a"), "--columns", "boxmot"])
    assert written(tmp_path / "a", shift=1) == {(1, 0): [list(range(12))]}
    with pytest.raises(SystemExit, match="no box of a person"):
        main([*command, "--out", str(tmp_path / "b"), "--columns", "boxmot", "--classes", "2"])


def test_mot_frames_of_other_kinds(tmp_path, monkeypatch):
    """Label files beside the frames, pictures that are turned by EXIF, and 16 bits."""
    main = load("tracklets_from_mot", monkeypatch)
    upright = np.zeros((320, 240, 3), np.uint8)
    upright[40:200, 150:210] = (250, 20, 20)
    exif = Image.Exif()
    exif[0x0112] = 6

    def turned(folder, f):
        Image.fromarray(np.rot90(upright, 1).copy()).save(folder / f"{f:06d}.jpg", exif=exif.tobytes())
        for suffix in ("json", "txt", "xml"):
            (folder / f"{f:06d}.{suffix}").write_text("{}")

    box = "{f},1,151,41,60,160,1,1,1.0"
    folder = simple(tmp_path / "phone", [box], draw=turned)
    main([str(folder), "--out", str(tmp_path / "a"), *PLAIN, "--margin", "0"])
    crops = sorted((tmp_path / "a").glob("train/*/*/*.jpg"))
    assert len(crops) == 12
    assert np.asarray(Image.open(crops[0]))[..., 0].mean() > 240
    deep = (20000 + 40 * np.arange(240)[:, None] + 10 * np.arange(320)).astype(np.uint16)
    folder = simple(tmp_path / "thermal", [PERSON], draw=lambda d, f: Image.fromarray(deep).save(d / f"{f:06d}.png"))
    main([str(folder), "--out", str(tmp_path / "b"), *PLAIN, "--margin", "0"])
    pixels = np.asarray(Image.open(min((tmp_path / "b").glob("train/*/*/*.jpg"))))[..., 0]
    np.testing.assert_allclose(pixels, deep[60:180, 20:60] >> 8, atol=2)
    Image.new("RGB", (320, 240)).save(folder / "img1" / "1.jpg")
    with pytest.raises(SystemExit, match="are the same frame"):
        main([str(folder), "--out", str(tmp_path / "c"), *PLAIN])


def test_mot_unreadable_frames_are_listed_at_once(tmp_path, monkeypatch, capsys):
    main = load("tracklets_from_mot", monkeypatch)
    folder = simple(tmp_path / "walk", [PERSON])
    bad = [folder / "img1" / f"{f:06d}.jpg" for f in (3, 5, 9, 11)]
    bad[0].write_bytes(b"no image")
    bad[1].write_bytes(bad[1].read_bytes()[:-300])
    bad[2].unlink()
    with Image.open(bad[3]) as image:  # its boxes would show other places
        size = image.size
        image.resize((size[0] // 2, size[1])).save(bad[3])
    out = tmp_path / "people"
    with pytest.raises(SystemExit, match="4 frames cannot be read; --skip-unreadable leaves them out") as error:
        main([str(folder), "--out", str(out), *PLAIN])
    said = str(error.value)
    assert str(bad[0]) in said
    assert str(bad[1]) in said
    assert "boxes in frame 9, but no image" in said
    assert f"{bad[3]} has {size[0] // 2}x{size[1]} pixels, where the first frame has {size[0]}x{size[1]}." in said
    assert not list(out.glob("train/*/[0-9]*"))
    main([str(folder), "--out", str(tmp_path / "skip"), *PLAIN, "--skip-unreadable"])
    assert written(tmp_path / "skip", shift=1) == {(1, 0): [[f for f in range(12) if f not in (2, 4, 8, 10)]]}
    captured = capsys.readouterr()
    assert "4 frames cannot be read and are left out" in captured.err
    assert str(bad[0]) in captured.err
    assert (tmp_path / "skip" / "contact_sheet.jpg").is_file()


@pytest.mark.parametrize("number", [-1, 1])
def test_mot_images_and_boxes_that_count_from_other_numbers(tmp_path, monkeypatch, number):
    """ByteTrack's demonstration counts frames from 0; folders of frames often do."""
    main = load("tracklets_from_mot", monkeypatch)
    folder = simple(tmp_path / "walk", [PERSON])
    rows = [line.split(",", 1) for line in (folder / "gt" / "gt.txt").read_text().splitlines()]
    (folder / "tracks.txt").write_text("".join(f"{int(frame) + number},{rest}\n" for frame, rest in rows))
    command = [str(folder), "--out", str(tmp_path / "out"), *PLAIN, "--skip-unreadable"]
    with pytest.raises(SystemExit, match=r"tracks\.txt has boxes in the frames .* one of them counts from 0"):
        main([*command, "--boxes", str(folder / "tracks.txt")])
    gone = 1 if number < 0 else 12  # only an image that is missing
    (folder / "img1" / f"{gone:06d}.jpg").unlink()
    main(command)
    assert {int(path.stem) for path in tmp_path.glob("out/train/*/*/*.jpg")} == {*range(1, 13)} - {gone}


@pytest.mark.parametrize(
    ("content", "read"),
    [
        ("[Sequence]\r\nname=walk\r\nimDir=frames\r\n".encode("utf-8-sig"), True),
        ("[Sequence]\nimDir=frames\n".encode("utf-16"), True),
        (b"name=walk\nimDir=frames\n", True),
        (b"[sequence]\nimdir = frames\n[other]\na=50%b\n", True),
        ("[Sequence]\nimDir=frames\ncomment=Stra\xdfe\n".encode("cp1252"), False),
        (b"[Sequence]\nno value\n", False),
        (b"[Sequence]\nimDir=a%b\n", False),
    ],
)
def test_mot_seqinfo_as_editors_write_it(tmp_path, monkeypatch, content, read):
    main = load("tracklets_from_mot", monkeypatch)
    folder = simple(tmp_path / "walk", [PERSON])
    (folder / "img1").rename(folder / "frames")
    (folder / "seqinfo.ini").write_bytes(content)
    command = [str(folder), "--out", str(tmp_path / "people"), *PLAIN]
    if read:
        main(command)
        assert written(tmp_path / "people", shift=1) == {(1, 0): [list(range(12))]}
    else:
        with pytest.raises(SystemExit, match=r"seqinfo\.ini"):
            main(command)


def test_mot_reads_csv(tmp_path, monkeypatch):
    main = load("tracklets_from_mot", monkeypatch)
    folder = simple(tmp_path / "walk", [])
    rows = [f"{f};1;20;60;60;180;0.9" for f in range(1, 13)]
    (folder / "tracks.csv").write_bytes("\r\n".join(["Frame;ID;left;top;right;bottom;conf", *rows]).encode("utf-16"))
    main([str(folder), "--boxes", str(folder / "tracks.csv"), "--out", str(tmp_path / "people"), *PLAIN])
    assert written(tmp_path / "people", shift=1) == {(1, 0): [list(range(12))]}
    with Image.open(min((tmp_path / "people").glob("train/*/*/*.jpg"))) as image:
        assert image.size == (44, 132)


def test_mot_two_at_once(tmp_path, monkeypatch):
    main = load("tracklets_from_mot", monkeypatch)
    folder = simple(tmp_path / "walk", [PERSON])
    with locked(tmp_path / ".people.lock", "it"):
        with pytest.raises(SystemExit, match=r"another process is at work on .*people"):
            main([str(folder), "--out", str(tmp_path / "people"), *PLAIN])
    main([str(folder), "--out", str(tmp_path / "people"), *PLAIN])


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


def test_video_with_the_text_of_a_tracker(video, tmp_path, monkeypatch):
    """It counts frames and pixels from 1; boxes that were not tracked are nobody's."""
    main = load("tracklets_from_video", monkeypatch)
    rows = []
    for frame in SCENE:
        rows += [
            f"{frame + 1},{p},{x + 1},{top_of(p) + 1},{BOX[0]},{BOX[1]},-1,-1,-1,-1" for p, x in SCENE[frame].items()
        ]
        rows.append(f"{frame + 1},-1,90,1,{BOX[0]},{BOX[1]},-1,-1,-1,-1")
    (tmp_path / "tracks.txt").write_text("\n".join(rows))
    out, options = tmp_path / "people", [*OPTIONS, "--cameras", "1", "--test", "0"]
    main([str(video), str(tmp_path / "tracks.txt"), "--out", str(out), *options])
    found = written(out, shift=1)
    assert {person for person, _ in found} == {1, 2, 3}
    for t in data.open_dataset("folder", out).train:
        np.testing.assert_allclose(t.load([0])[0][:, 30, 9], COLOURS[t.pid], atol=40)

    (tmp_path / "late.csv").write_text(
        "frame,id,left,top,width,height\n" + "".join(f"{f},1,9,9,30,60\n" for f in range(30, 55))
    )
    late = [str(video), str(tmp_path / "late.csv"), *options, "--occlusion", "1"]
    main([*late, "--out", str(tmp_path / "skip"), "--skip-unreadable"])
    assert written(tmp_path / "skip", shift=0) == {(1, 0): [list(range(30, 40))]}


def test_video_ids_below_0_are_nobody(video, tmp_path, monkeypatch):
    """The -1 of a second video is not the last person of the first one."""
    main = load("tracklets_from_video", monkeypatch)
    files = []
    for name, other in (("door", 5), ("hall", -1)):
        rows = [f"{f},{track},{left},20,30,60" for f in range(30) for track, left in ((1, 20), (other, 120))]
        (tmp_path / f"{name}-boxes.csv").write_text("\n".join(["frame,id,left,top,width,height", *rows]))
        files += [str(video), str(tmp_path / f"{name}-boxes.csv")]
    main([*files, "--out", str(tmp_path / "people"), "--cameras", "1", "--test", "0"])
    assert set(written(tmp_path / "people", shift=0)) == {(1, 0), (5, 0), (7, 1)}
