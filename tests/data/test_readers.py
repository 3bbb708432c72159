import csv

import numpy as np
import pytest
from PIL import Image

from temporal_agg.data import (
    Tracklet,
    TrackletData,
    identity_splits,
    parse_data_spec,
    read_csv,
    read_folder,
    synthetic_data,
)


def image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 2, 3), value, np.uint8)).save(path)
    return path


@pytest.fixture
def root(tmp_path):
    for split, pid, tracklet, count in (
        ("train", "0001", "1_a", 11),
        ("train", "0002", "-1_0001", 2),
        ("query", "0003", "1_0001", 1),
        ("gallery", "0003", "2_0001", 3),
        ("gallery", "-1", "2_0002", 1),
    ):
        for i in range(count):
            image(tmp_path / "set" / split / pid / tracklet / f"{i + 1}.png", i)
    return tmp_path / "set"


def test_folder_layout(root):
    data = read_folder(root)
    assert [(t.pid, t.camera, len(t)) for t in data.train] == [(1, 1, 11), (2, -1, 2)]
    assert [(t.pid, t.camera, len(t)) for t in data.query] == [(3, 1, 1)]
    assert sorted((t.pid, t.camera, len(t)) for t in data.gallery) == [(-1, 2, 1), (3, 2, 3)]
    assert [int(frame[0, 0, 0]) for frame in data.train[0].load(range(11))] == list(range(11)), "10 comes after 9"
    assert data.train[0].name == "train/0001/1_a"
    assert data.label_map == {1: 0, 2: 1}
    assert data.check_retrieval() is data
    assert parse_data_spec(f"folder:{root}").query[0].frames == data.query[0].frames


def test_frame_numbers_inside_names_order_the_frames(tmp_path):
    names = ["0001C1T0001F9.jpg", "0001C1T0001F10.jpg", "0001C1T0001F100.jpg", "0001C1T0002F1.jpg"]
    for name in reversed(names):
        image(tmp_path / "train" / "7" / "1_x" / name)
    (tracklet,) = read_folder(tmp_path).train
    assert [path.name for path in tracklet.frames] == names


def test_what_systems_leave_behind_is_left_out(root):
    for place in (root, root / "train", root / "train" / "0001", root / "train" / "0001" / "1_a"):
        for name in (".DS_Store", "Thumbs.db", "notes.txt", "._1.png"):
            (place / name).write_bytes(b"x")
        (place / ".thumbnails").mkdir()
    (root / "train" / "__MACOSX").mkdir()
    image(root / "train" / "0001" / "1_a" / "12.JPG")
    assert [len(t) for t in read_folder(root).train] == [12, 2]


def test_a_set_may_have_train_only_or_test_only(root):
    for path in sorted((root / "train").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    with pytest.raises(ValueError, match="train holds no tracklet"):
        read_folder(root)
    (root / "train").rmdir()
    assert read_folder(root).train == []
    (root / "query").rename(root / "probe")
    with pytest.raises(FileNotFoundError, match=r"query: expected <root>/\{train,query,gallery\}/<pid>"):
        read_folder(root)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        read_folder(root / "nowhere")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("train/bob/1_a/1.jpg", "bob should be named by an identity"),
        ("train/0009/a/1.jpg", r"<camera>_<tracklet>, such as 2_0001"),
        ("train/0009/1_a/readme.md", "1_a holds no image"),
        ("train/0009/1.jpg", r"1.jpg lies where only folders are expected"),
        ("train/1.jpg", r"1.jpg lies where only folders are expected"),
    ],
)
def test_wrong_layouts_name_the_path(root, path, message):
    path = root / path
    if path.suffix == ".jpg":
        image(path)
    else:
        path.parent.mkdir(parents=True)
        path.write_text("")
    with pytest.raises(ValueError, match=message) as error:
        read_folder(root)
    assert str(root) in str(error.value)


def write(file, rows, header="split,pid,camera,tracklet,path"):
    with open(file, "w", newline="", encoding="utf-8-sig") as out:
        csv.writer(out).writerows([header.split(","), *rows])
    return file


def test_csv_layout(tmp_path):
    for i in range(6):
        image(tmp_path / "images" / f"{i}.png", i)
    rows = [
        ("train", "0004", 1, "x", "images/2.png"),
        ("query", 5, -1, "0", "images/0.png"),
        ("train", "0004", 1, "x", "images/1.png"),
        ("train", 4, 2, "x", "images/3.png"),
        ("gallery", 5, -1, "0", "images/0.png"),
        ("gallery", 5, -1, "1", str(tmp_path / "images" / "5.png")),
    ]
    data = read_csv(write(tmp_path / "all.csv", rows))
    assert [(t.pid, t.camera, len(t)) for t in data.train] == [(4, 1, 2), (4, 2, 1)]
    assert [int(frame[0, 0, 0]) for frame in data.train[0].load(range(2))] == [2, 1], "rows are in order"
    assert [len(t) for t in data.gallery] == [1, 1]
    assert data.query_index == [0]
    spec = parse_data_spec(f"csv:{tmp_path / 'all.csv'}")
    assert [t.pid for t in spec.query] == [5]
    write(tmp_path / "more.csv", [(*row, 1) for row in rows], "split,pid,camera,tracklet,path,quality")
    assert len(read_csv(tmp_path / "more.csv").train) == 2


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (("test", 1, 1, "x", "0.png"), ValueError, "line 3: split must be one of train, query, gallery, got 'test'"),
        (("train", "bob", 1, "x", "0.png"), ValueError, "line 3: pid must be an integer, got 'bob'"),
        (("train", 1, "", "x", "0.png"), ValueError, r"camera must be an integer \(-1: unknown\), got ''"),
        (("train", 1, 1, "x", ""), ValueError, "path is empty"),
        (("train", 1, 1, "x"), ValueError, "path is empty"),
        (("train", 1, 1, "x", "9.png"), FileNotFoundError, "line 3: no image .*9.png"),
    ],
)
def test_csv_errors_name_the_line(tmp_path, row, error, message):
    image(tmp_path / "0.png")
    file = write(tmp_path / "a.csv", [("train", 1, 1, "x", "0.png"), row])
    with pytest.raises(error, match=message) as caught:
        read_csv(file)
    assert str(file) in str(caught.value)


def test_csv_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        read_csv(tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match=r"missing tracklet, path in 'split,pid,camera'"):
        read_csv(write(tmp_path / "a.csv", [], "split,pid,camera"))
    with pytest.raises(ValueError, match="missing split"):
        read_csv(write(tmp_path / "b.csv", [], "split|pid|camera|tracklet|path"))
    with pytest.raises(ValueError, match="no row below its header"):
        read_csv(write(tmp_path / "c.csv", []))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(("delimiter", "newline"), [(",", "\n"), (";", "\r\n"), ("\t", "\r")])
def test_csv_as_editors_and_spreadsheets_write_it(tmp_path, encoding, delimiter, newline):
    image(tmp_path / "caf\u00e9 1.png")
    rows = ["Split,PID,camera,tracklet,path", "train,1,1,\u00e9,caf\u00e9 1.png", "", " train , 2,-1,b,caf\u00e9 1.png"]
    text = newline.join(row.replace(",", delimiter) for row in rows) + newline
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    data = read_csv(tmp_path / "a.csv")
    assert [(t.pid, t.camera, t.name) for t in data.train] == [(1, 1, "train/1/1_\u00e9"), (2, -1, "train/2/-1_b")]


@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "utf-16-le"])
def test_csv_of_another_encoding_names_the_file(tmp_path, encoding):
    file = tmp_path / "people.csv"
    file.write_bytes("split,pid,camera,tracklet,path\ntrain,1,1,caf\u00e9,1.png\n".encode(encoding))
    with pytest.raises(ValueError, match="UTF-8") as error:
        read_csv(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"train,1,0,x,{'a' * 200_000}", "line 2: field larger than"),
        (
            f"train,{'9' * 5000},0,x,0.png",
            r"line 2: pid must be -1 \(junk\) or 0 to 2\*\*63 - 1, got one of more than 63",
        ),
        (f"gallery,{2**63},0,x,0.png", "more than 63 bits"),
        (f"gallery,1,{2**70},x,0.png", r"line 2: camera must be -1 \(unknown\)"),
        ("gallery,-5,0,x,0.png", r"line 2: pid must be -1 \(junk\) or 0 to 2\*\*63 - 1, got -5"),
        ("gallery,1,-2,x,0.png", "camera must be -1"),
        ('train,1,0,x,"0.png', "0.png"),
    ],
)
def test_csv_cells_out_of_range(tmp_path, row, message):
    file = tmp_path / "people.csv"
    image(tmp_path / "0.png")
    file.write_text(f"split,pid,camera,tracklet,path\n{row}\n")
    if row.endswith('"0.png'):  # a quotation mark that is left open, up to the end
        assert len(read_csv(file).train) == 1
        return
    with pytest.raises(ValueError, match=message) as error:
        read_csv(file)
    assert str(file) in str(error.value)
    assert len(str(error.value)) < 400


def test_folder_ids_out_of_range(root):
    for name, message in (("-5", "pid must be -1"), (str(2**63), "more than 63 bits")):
        image(root / "gallery" / name / "1_a" / "1.png")
        with pytest.raises(ValueError, match=message) as error:
            read_folder(root)
        assert str(root / "gallery" / name) in str(error.value)
        (root / "gallery" / name / "1_a" / "1.png").unlink()
        (root / "gallery" / name / "1_a").rmdir()
        (root / "gallery" / name).rmdir()
    image(root / "gallery" / "3" / "-2_a" / "1.png")
    with pytest.raises(ValueError, match="camera must be -1"):
        read_folder(root)


def test_the_home_directory(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    assert len(read_folder("~/set").train) == 2
    assert len(parse_data_spec("folder:~/set").train) == 2
    rows = [("query", 1, 1, "a", "set/query/0003/1_0001/1.png")]
    write(root.parent / "a.csv", rows)
    assert len(parse_data_spec("csv:~/a.csv").query) == 1
    with pytest.raises(FileNotFoundError, match=f"no folder {root.parent}/nowhere"):
        parse_data_spec("folder:~/nowhere")
    with pytest.raises(FileNotFoundError, match=str(root.parent / "mars")):
        parse_data_spec("mars:~/mars")


def test_junk_is_not_trained_on(root, caplog):
    image(root / "train" / "-1" / "1_a" / "1.png")
    data = read_folder(root)
    assert data.label_map == {1: 0, 2: 1}
    assert {t.pid for t in data.train} == {1, 2}
    assert "1 training tracklets of pid -1 (junk) are left out" in caplog.text


def small_set():
    """Identities 1-9 in cameras 1 and 2 (9 also twice in 1), 10 once, 11 twice in one camera, junk."""

    def tracklet(pid, camera, number=0):
        return Tracklet([f"{pid}_{camera}_{number}.jpg"], pid, camera)

    both = [tracklet(pid, camera) for pid in range(1, 10) for camera in (2, 1)]
    rest = [tracklet(9, 1, 1), tracklet(10, 1), tracklet(11, 1), tracklet(11, 1, 1), tracklet(-1, 1), tracklet(-1, 2)]
    return TrackletData(both[:7], both[7:12], [*both[12:], *rest, both[8]], "small")


def test_identity_splits_halve_the_identities():
    splits = identity_splits(small_set(), 6, seed=1)
    halves = set()
    for split in splits:
        train, test = {t.pid for t in split.train}, {t.pid for t in split.query}
        assert not train & test
        assert {10, 11} <= train, "identities without a match are trained on"
        assert train | test == set(range(1, 12))
        assert len(test) == 5
        assert {t.pid for t in split.gallery} == test
        assert {t.camera for t in split.query} == {1}
        assert {t.camera for t in split.gallery} == {2}
        assert len(split.query) == 5 + (9 in test)
        paths = [t.frames[0] for t in (*split.train, *split.query, *split.gallery)]
        assert len(set(paths)) == len(paths) == 22, "every tracklet once, though one lay in query and gallery"
        assert split.check_retrieval() is split
        halves.add(frozenset(test))
    assert len(halves) == 6
    again = identity_splits(small_set(), 2, seed=1)
    assert [[t.frames[0] for t in split.query] for split in again] == [
        [t.frames[0] for t in split.query] for split in splits[:2]
    ]
    other = identity_splits(small_set(), 6, seed=2)
    assert {frozenset(t.pid for t in split.query) for split in other} != halves


@pytest.mark.parametrize("camera", [-1, 3])
def test_identity_splits_without_cameras(camera):
    tracklets = [Tracklet([f"{pid}_{i}.jpg"], pid, camera) for pid in range(4) for i in range(3)]
    (split,) = identity_splits(TrackletData([], tracklets[:2], tracklets[2:]), 1)
    assert len(split.train) == 6
    assert len(split.query) == 2
    assert len(split.gallery) == 4
    assert {t.camera for t in split.query} == {-1}
    assert split.check_retrieval() is split


def test_identity_splits_of_synthetic_data():
    data = synthetic_data(8, faults={})
    (split,) = identity_splits(data, 1)
    assert len(split.train) == len(split.query) + len(split.gallery) == 4 * 6
    assert len(split.query) == 4 * 2
    assert all(t.camera == 1 for t in split.query)


def test_identity_splits_need_identities():
    with pytest.raises(ValueError, match="data set 'tiny' has 1"):
        identity_splits(TrackletData([Tracklet(["a"], 1, 1), Tracklet(["b"], 1, 2)], [], [], "tiny"), 1)
    with pytest.raises(ValueError, match="k must be at least 1"):
        identity_splits(small_set(), 0)


@pytest.mark.parametrize("kind", ["copy", "link", "spelling"])
def test_identity_splits_take_copies_of_a_tracklet_once(tmp_path, kind):
    rng = np.random.default_rng(0)
    rows = []
    for pid in range(4):
        for n in range(2):
            path = tmp_path / f"{pid}_{n}.png"
            Image.fromarray(rng.integers(0, 256, (4, 2, 3), np.uint8)).save(path)
            rows.append(("gallery", pid, -1, n, path.name))
        other = {"copy": f"copy{pid}.png", "link": f"link{pid}.png", "spelling": f"./{pid}_0.png"}[kind]
        if kind == "copy":
            (tmp_path / other).write_bytes((tmp_path / f"{pid}_0.png").read_bytes())
        elif kind == "link":
            (tmp_path / other).symlink_to(tmp_path / f"{pid}_0.png")
        rows.append(("query", pid, -1, "q", other))
    data = read_csv(write(tmp_path / "a.csv", rows))
    assert data.query_index == [0, 2, 4, 6]
    (split,) = identity_splits(data, 1)
    assert (len(split.train), len(split.query), len(split.gallery)) == (4, 2, 2)
    assert split.query_index == [-1, -1]
