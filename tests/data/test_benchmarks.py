"""The benchmarks' readers, on miniatures in the authors' layouts."""

import json
import logging
import multiprocessing
import os
import pickle
import re
import shutil
import sys
from collections import defaultdict

import h5py
import numpy as np
import pytest
from benchmarks_on_disk import (
    make_duke,
    make_duke_si,
    make_ilids_vid,
    make_ls_vid,
    make_mars,
    make_prid2011,
    make_ward,
    picture,
)
from scipy import sparse
from scipy.io import loadmat, savemat

from temporal_agg.data import (
    benchmarks,
    read_duke,
    read_duke_si,
    read_ilids_vid,
    read_ls_vid,
    read_mars,
    read_prid2011,
    read_ward,
)
from temporal_agg.data.tracklet import FrameFiles
from temporal_agg.retrieval import evaluate

MAKE = {
    "mars": (make_mars, read_mars),
    "duke": (make_duke, read_duke),
    "duke-si": (make_duke_si, read_duke_si),
    "ilids-vid": (make_ilids_vid, read_ilids_vid),
    "prid-2011": (make_prid2011, read_prid2011),
    "ls-vid": (make_ls_vid, read_ls_vid),
    "ward": (make_ward, read_ward),
}
# What the counts of the miniatures are, by their construction.
COUNTS = {
    "mars": {
        "lines of info/train_name.txt": 32, "lines of info/test_name.txt": 48, "training tracklets": 8,
        "training identities": 4, "test tracklets": 12, "junk tracklets": 2, "distractor tracklets": 2,
        "test identities": 4, "queries": 4, "query identities": 4, "gallery tracklets": 10, "cameras": 2,
    },
    "duke": {
        "training tracklets": 8, "training identities": 4, "queries": 4, "query identities": 4,
        "queries in the gallery": 4, "gallery tracklets": 10, "gallery identities": 5, "distractor identities": 1,
        "cameras": 2,
    },
    "duke-si": {
        "training tracklets": 8, "training identities": 4, "queries": 4, "gallery tracklets": 6, "test identities": 5,
    },
    "ilids-vid": {"persons": 8, "tracklets": 16, "splits": 10, "persons in a split": 8},
    "prid-2011": {"splits": 10, "persons in use": 4},
    "ls-vid": {
        "training tracklets": 8, "training identities": 4, "test tracklets": 8, "test identities": 4, "queries": 4,
        "cameras": 2,
    },
    "ward": {"persons": 6, "cameras": 3, "tracklets": 18, "frames": 6 * (3 + 4 + 5)},
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPORAL_AGG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    return {name: make(folder / name) for name, (make, _) in MAKE.items()}


@pytest.fixture
def root(originals, tmp_path):
    """root(name): a copy of the miniature that the test may change."""
    return lambda name: shutil.copytree(originals[name], tmp_path / name)


def publish(monkeypatch, name, counts):
    published = benchmarks.PUBLISHED[name]._replace(counts=benchmarks.PUBLISHED[name].counts | counts)
    monkeypatch.setitem(benchmarks.PUBLISHED, name, published)


def told(tracklets):
    return {(t.pid, t.camera, *t.frames) for t in tracklets}


def grouped(files, pattern, key):
    """Tracklets made by grouping all files by what a search in their path gives, sorted by its last group."""
    groups = defaultdict(list)
    for file in files:
        *who, frame = re.search(pattern, str(file)).groups()
        groups[key(*who)].append((int(frame), str(file)))
    return {(pid, camera, *(file for _, file in sorted(g))) for (pid, camera, *_), g in groups.items()}


def expected_mars(root, part):
    return grouped(
        root.glob(f"bbox_{part}/*/*.jpg"),
        r"/(....)C(\d)(T\d+)F(\d+)\.jpg$",
        lambda person, camera, track: (-1 if person == "00-1" else int(person), int(camera), track),
    )


def expected_duke(root, part):
    return grouped(
        (root / part).glob("*/*/*.jpg"),
        r"/(\d+)/(\d+)/\d+_C(\d)_F(\d+)_.*$",
        lambda person, track, camera: (int(person), int(camera), track),
    )


def test_mars(originals):
    data = read_mars(originals["mars"], check_counts=False).check_retrieval()
    test = expected_mars(originals["mars"], "test")
    assert told(data.train) == expected_mars(originals["mars"], "train")
    assert told(data.gallery) == {t for t in test if t[0] != -1}
    assert told(data.query) == {t for t in test if t[0] > 0 and t[1] == 1}
    assert all(data.gallery[i] is t for i, t in zip(data.query_index, data.query, strict=True))
    assert [t.pid for t in data.gallery].count(0) == 2
    assert data.query[0].name == "test/0005C1T0001"
    assert data.name == f"MARS in {originals['mars']}"
    (first,) = data.query[0].load([0])
    assert tuple(first.shape) == (3, 16, 8)


def test_mars_without_the_queries_in_the_gallery(root, caplog):
    mars = root("mars")
    rows = loadmat(mars / "info" / "query_IDX.mat")["query_IDX"]
    savemat(mars / "info" / "query_IDX.mat", {"query_IDX": np.append(rows, rows[:, -1:] + 1, axis=1)})
    caplog.set_level(logging.INFO, "temporal_agg")
    data = read_mars(mars, queries_in_gallery=False, check_counts=False)
    assert data.query_index == [-1] * 5
    assert len(data.gallery) == 10 - 5
    assert "gallery tracklets without the queries 5 (published 9,330)" in caplog.messages[-1]
    assert "queries without a match 2" in caplog.messages[-1], "the person of whom both tracklets are queries"
    ids = [[getattr(t, what) for t in part] for part in (data.query, data.gallery) for what in ("pid", "camera")]
    metrics = evaluate(np.random.default_rng(0).random((5, 5)), *ids, query_index=data.query_index)
    assert metrics.queries_without_match == 2
    whole = read_mars(mars, check_counts=False)
    assert "queries without a match 0" in caplog.messages[-1]
    assert all(i >= 0 for i in whole.query_index)


def test_mars_unpacked_twice(originals, tmp_path):
    data = read_mars(make_mars(tmp_path / "mars", nested=True), check_counts=False)
    plain = read_mars(originals["mars"], check_counts=False)
    assert [[t.name for t in part] for part in (data.train, data.query, data.gallery)] == [
        [t.name for t in part] for part in (plain.train, plain.query, plain.gallery)
    ]
    assert "bbox_train/bbox_train/0001" in data.train[0].frames[0]
    assert len(data.train[0].load([0, 3])) == 2


def edit_mat(file, key, change):
    values = loadmat(file)[key]
    savemat(file, {key: change(values)})


def put(row, column, value):
    def change(values):
        values[row, column] = value
        return values

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(1, 1, 33), r"tracks_train_info.mat, row 2: frames 5 to 33 are not among the 32 lines of .*train_name.txt"),
        (put(1, 0, 0), r"row 2: frames 0 to 8 are not"),
        (put(1, 1, 4), r"row 2: frames 5 to 4 are not"),
        (put(1, 3, 1), r"row 2 says pid 1 and camera 1, but names the file 0001C2T0001F001.jpg"),
        (put(2, 2, 3), r"row 3 says pid 3 and camera 1, but names the file 0002C1T0001F001.jpg"),
        (put(0, 1, 5), r"0001C1T0001F001.jpg and 0001C2T0001F001.jpg are in one tracklet, but of different"),
        (
            lambda rows: rows[:, :3],
            r"'track_train_info' to be a matrix of integers \[n, 4\], got int32 \[8, 3\]",
        ),
        (lambda rows: rows + 0.5, r"matrix of integers"),
    ],
)
def test_mars_rows_that_do_not_fit(root, change, message):
    mars = root("mars")
    edit_mat(mars / "info" / "tracks_train_info.mat", "track_train_info", change)
    with pytest.raises(ValueError, match=message) as error:
        read_mars(mars, check_counts=False)
    assert str(mars) in str(error.value)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ([[5, 13]], "expected rows from 1 to 12, the number of tracklets, got 13"),
        ([[0, 5]], "got 0"),
        ([[5, 1]], "the query test/00-1C1T0001 is junk or a distractor"),
        ([[3]], "the query test/0000C1T0001 is junk"),
        ([[5], [7]], r"matrix of integers \[1, n\], got .* \[2, 1\]"),
    ],
)
def test_mars_queries_that_do_not_fit(root, query, message):
    mars = root("mars")
    edit_mat(mars / "info" / "query_IDX.mat", "query_IDX", lambda _: np.array(query, np.uint16))
    with pytest.raises(ValueError, match=message) as error:
        read_mars(mars, check_counts=False)
    assert str(mars / "info" / "query_IDX.mat") in str(error.value)


def test_mars_names_and_files(root):
    mars = root("mars")
    gone = mars / "bbox_test" / "0006" / "0006C2T0001F003.jpg"
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=rf"no image {gone}, nor 0 others .*test_name.txt lists"):
        read_mars(mars, check_counts=False)
    picture(gone, 6, 2, 3)
    lists = mars / "info" / "train_name.txt"
    lines = lists.read_text().splitlines()
    lists.write_bytes("\r\n".join(lines[3::-1] + lines[4:]).encode())
    assert told(read_mars(mars, check_counts=False).train) == expected_mars(mars, "train"), "sorted, whatever the list"
    lines[2] = "0001-C1T0001F003.jpg"
    lists.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"name.txt, lines 1-4: no frame is named '0001-C1T0001F003.jpg': MARS lies"):
        read_mars(mars, check_counts=False)
    lists.write_text("")
    with pytest.raises(ValueError, match=r"train_name.txt is empty"):
        read_mars(mars, check_counts=False)


def test_matlab_files_that_cannot_be_read(root):
    mars = root("mars")
    file = mars / "info" / "tracks_test_info.mat"
    savemat(file, {"another": np.zeros((2, 4))})
    with pytest.raises(ValueError, match=r"test_info.mat: the matrix 'track_test_info' cannot be read \(KeyError"):
        read_mars(mars, check_counts=False)
    file.write_bytes(b"no matrix")
    with pytest.raises(ValueError, match="'track_test_info' cannot be read"):
        read_mars(mars, check_counts=False)
    ls_vid = root("ls-vid")
    (ls_vid / "test" / "data" / "info_test.mat").write_bytes(b"no matrix")
    with pytest.raises(ValueError, match=r"info_test.mat: the matrix 'query' cannot be read"):
        read_ls_vid(ls_vid, check_counts=False)


def test_duke(originals):
    root = originals["duke"]
    data = read_duke(root, check_counts=False).check_retrieval()
    assert told(data.train) == expected_duke(root, "train")
    assert told(data.gallery) == expected_duke(root, "gallery")
    assert {(t[0], t[1], *(f.replace("/gallery/", "/query/") for f in t[2:])) for t in told(data.query)} == (
        expected_duke(root, "query")
    )
    assert all(data.gallery[i] is t for i, t in zip(data.query_index, data.query, strict=True))
    assert [t.pid for t in data.gallery].count(9) == 2, "the distractor"
    assert data.query[0].name == "gallery/0005/0001"
    assert len(data.query[0].load([0, 3])) == 2


def test_duke_with_old_names(originals, tmp_path):
    old = read_duke(make_duke(tmp_path / "old", old_names=True), check_counts=False)
    new = read_duke(originals["duke"], check_counts=False)
    assert old.query_index == new.query_index
    for part in ("train", "query", "gallery"):
        assert [(t.name, t.pid, t.camera) for t in getattr(old, part)] == [
            (t.name, t.pid, t.camera) for t in getattr(new, part)
        ]
    assert os.path.basename(old.gallery[-1].frames[1]) == "0009C2F0009D30831.jpg"


def test_duke_si(root):
    path = root("duke-si")
    data = read_duke_si(path, check_counts=False).check_retrieval()
    for part in ("train", "query", "gallery"):
        assert told(getattr(data, part)) == grouped(
            (path / part).glob("*/*/*.jpg"),
            r"/(\d+)/([^/]+)/.(\d)_(\d+)\.jpg$",
            lambda person, track, camera: (int(person), int(camera), track),
        )
    assert data.query_index == [-1] * 4, "the queries are not in the gallery"
    assert [os.path.basename(f) for f in data.train[0].frames] == [f"c1_{n}.jpg" for n in (9998, 9999, 10000, 10001)]
    assert data.query[0].name == "query/0005/s01142"
    assert len(data.query[0].load([0, 3])) == 2
    (path / "gallery" / "0005" / "1").mkdir()
    with pytest.raises(ValueError, match=r"gallery/0005 has a folder '1': Duke-SI lies in"):
        read_duke_si(path, check_counts=False)
    (path / "gallery" / "0005" / "1").rmdir()
    picture(path / "train" / "0001" / "any name 1" / "c2_1.jpg", 1, 1, 1)
    with pytest.raises(ValueError, match="in one tracklet, but of different persons or cameras"):
        read_duke_si(path, check_counts=False)


@pytest.mark.parametrize(("nested", "suffix"), [(True, "png"), (False, "jpg")])
def test_ward(tmp_path, caplog, nested, suffix):
    caplog.set_level(logging.INFO, "temporal_agg")
    root = make_ward(tmp_path / "w", nested=nested, suffix=suffix)
    everything = grouped(
        root.rglob(f"*.{suffix}"), r"/(\d{4})(\d{4})(\d{4})\.\w+$", lambda pid, camera: (int(pid), int(camera))
    )
    halves = set()
    for split in range(10):
        data = read_ward(root, split, check_counts=False).check_retrieval()
        train, test = {t.pid for t in data.train}, {t.pid for t in data.query}
        assert train | test == {1, 3, 5, 7, 9, 11}
        assert len(train) == len(test) == 3
        assert told(data.train) == {t for t in everything if t[0] in train}
        assert told(data.query) == {t for t in everything if t[0] in test and t[1] == 1}
        assert told(data.gallery) == {t for t in everything if t[0] in test and t[1] in (2, 3)}
        halves.add(frozenset(test))
    assert len(halves) > 5
    assert told(read_ward(root, 9, check_counts=False, cache=False).query) == told(data.query), "always the same"
    everybody = read_ward(root, everybody=True, check_counts=False).check_training()
    assert sorted(told(everybody.train)) == sorted(told([*data.train, *data.query, *data.gallery]))
    assert not everybody.query
    assert not everybody.gallery
    assert "frames 72 (published 4,786)" in caplog.messages[-1]
    for cameras, first, second in (("1-2", {1}, {2}), ("2-3", {2}, {3}), ("1,2-3", {1, 2}, {3})):
        pair = read_ward(root, cameras=cameras, check_counts=False)
        assert {t.camera for t in pair.query} == first
        assert {t.camera for t in pair.gallery} == second
        assert len(pair.train) == 9
    assert len(data.query[0].load([0])) == 1
    for wrong in ("1", "1-4", "", "1-2-3"):
        with pytest.raises(ValueError, match="cameras must be"):
            read_ward(root, cameras=wrong)
    with pytest.raises(ValueError, match="WARD has the splits 0 to 9, got 10"):
        read_ward(root, 10, check_counts=False)
    folder = root / "toolbox" / "Datasets" / "WARD" if nested else root
    picture(folder / "000100010001.bmp", 1, 1, 1)
    with pytest.raises(ValueError, match="has the image 000100010001 more than once"):
        read_ward(root, check_counts=False)
    (folder / "000100010001.bmp").rename(folder / "1.bmp")
    with pytest.raises(ValueError, match=r"no frame is named '1\.bmp': WARD lies in"):
        read_ward(root, check_counts=False)


def test_ward_splits_are_fixed(tmp_path):
    """A figure on WARD is of these halves: they must not change."""
    root = make_ward(tmp_path, people=70, frames=1, size=(2, 1))  # persons 1, 3, ... for WARD's 1, 2, ...
    test = sorted((t.pid + 1) // 2 for t in read_ward(root, 0, check_counts=False).query)
    assert test[:8] == [9, 11, 12, 13, 14, 15, 16, 17]
    assert len(test) == 35


def corrected(mars, rows=None):
    """Gives the miniature corrected labels: a row's new pid and ambiguous pid, by its number."""
    file = mars / "info" / "tracks_test_info.mat"
    old = loadmat(file)["track_test_info"]
    new = np.concatenate([old, old[:, 2:3], np.zeros_like(old[:, :1])], 1)
    for row, ids in (rows or {}).items():
        new[row, 4:] = ids
    savemat(mars / "info" / "clean_tracks_test_info.mat", {"any_name": new})
    return old


def test_mars_with_corrected_labels(root, caplog):
    caplog.set_level(logging.INFO, "temporal_agg")
    mars = root("mars")
    original = read_mars(mars, check_counts=False)
    corrected(mars)
    same_labels = read_mars(mars, labels="corrected", check_counts=False)
    assert [t.name for t in same_labels.gallery] == [t.name for t in original.gallery]
    assert {t.ambiguous_pid for t in same_labels.gallery} == {None}
    # Rows: 0, 1 junk; 2, 3 distractors; 4, 5 person 5; 6, 7 person 6; 8, 9 person 7; 10, 11 person 8.
    corrected(mars, {5: (6, 0), 7: (6, 5), 8: (-1, 0), 2: (7, 0)})
    old(mars)
    for _ in range(2):  # the second time from the cache
        data = read_mars(mars, labels="corrected", check_counts=False).check_retrieval()
        assert [t.pid for t in data.query] == [5, 6, 8], "person 7's query is junk by the new labels"
        pids = {t.name: (t.pid, t.ambiguous_pid) for t in data.gallery}
        assert pids["test/0005C2T0001"] == (6, None)
        assert pids["test/0006C2T0001"] == (6, 5)
        assert pids["test/0000C1T0001"] == (7, None)
        assert "test/0007C1T0001" not in pids
    assert any("1 queries are nobody's" in message for message in caplog.messages)
    assert {t.pid for t in read_mars(mars, check_counts=False).query} == {5, 6, 7, 8}
    with pytest.raises(ValueError, match="labels must be 'original' or 'corrected', got 'new'"):
        read_mars(mars, labels="new")
    corrected(mars, {5: (-7, 0)})
    with pytest.raises(ValueError, match=r"clean_tracks_test_info.mat, row 6: the new pid -7 is none"):
        read_mars(mars, labels="corrected", check_counts=False)
    savemat(mars / "info" / "clean_tracks_test_info.mat", {"a": np.zeros((2, 6)), "b": np.zeros((2, 6))})
    with pytest.raises(ValueError, match=r"clean_tracks_test_info.mat: the matrix"):
        read_mars(mars, labels="corrected", check_counts=False)
    (mars / "info" / "clean_tracks_test_info.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"clean_tracks_test_info\.mat"):
        read_mars(mars, labels="corrected", check_counts=False)


def test_matrices_of_another_kind(root):
    mars, ls_vid = root("mars"), root("ls-vid")
    file = mars / "info" / "query_IDX.mat"
    for values in (sparse.csc_matrix(np.ones((1, 2))), np.array([["a"]]), np.array([[1 + 1j]]), {"a": 1}, [[np.nan]]):
        savemat(file, {"query_IDX": values})
        with pytest.raises(ValueError, match="query_IDX") as error:
            read_mars(mars, check_counts=False)
        assert str(file) in str(error.value)
    file = ls_vid / "test" / "data" / "info_test.mat"

    def compound(h5):
        h5.create_dataset("query", (1, 2), np.dtype([("a", "f8")]))

    def text(h5):
        h5.create_dataset("query", data=[["a"]], dtype=h5py.string_dtype())

    for make in (compound, text, lambda h5: h5.create_group("query"), lambda h5: h5.create_dataset("query", data=1.0)):
        with h5py.File(file, "w") as h5:
            make(h5)
        with pytest.raises(ValueError, match=r"info_test\.mat"):
            read_ls_vid(ls_vid, check_counts=False)


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, "[]", "{}", "3", "", '[{"train":[],"test":[]}]', '[{"train":["person_0001"],"test":[]}]', "[3]",
     '[{"train":[["person_0001"]],"test":["person_0002"]}]', '[{"train":["person_0201"],"test":["person_0002"]}]'],
)  # fmt: skip
def test_prid_splits_of_another_kind(root, content):
    prid = root("prid-2011")
    file = prid / "splits_prid2011.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"splits_prid2011\.json"):
        read_prid2011(prid, check_counts=False)
    file.write_bytes('[{"train":["person_0001"],"test":["person_0002"]}]'.encode("utf-16"))
    assert [t.pid for t in read_prid2011(prid, check_counts=False).query] == [2]


def test_lists_as_editors_write_them(root):
    mars = root("mars")
    want = told(read_mars(mars, check_counts=False, cache=False).train)
    file = mars / "info" / "train_name.txt"
    text = file.read_text()
    for encoding in ("utf-8-sig", "utf-16"):
        file.write_bytes(text.encode(encoding))
        assert told(read_mars(mars, check_counts=False, cache=False).train) == want
    file.write_bytes(text.encode() + b"\xe9")
    with pytest.raises(ValueError, match=r"train_name.txt is not UTF-8"):
        read_mars(mars, check_counts=False, cache=False)


def test_a_foreign_cache_does_not_win(root, cache):
    """An index of another copy, or of nothing that could have changed, is not used."""
    one, other = old(root("duke")), root("duke-si")
    read_duke(one, check_counts=False)
    (first,) = cache.iterdir()
    two = old(shutil.copytree(one, one.parent / "two", copy_function=shutil.copy2))
    shutil.rmtree(two / "gallery" / "0009")
    old(two)
    read_duke(two, check_counts=False)
    (second,) = set(cache.iterdir()) - {first}
    shutil.copy(first, second)
    assert len(read_duke(two, check_counts=False).gallery) == 8
    with np.load(first) as arrays:
        arrays = dict(arrays)
    meta = json.loads(arrays["meta"].tobytes())
    shutil.rmtree(one / "gallery" / "0009")
    np.savez(first, **arrays | {"meta": np.frombuffer(json.dumps(meta | {"stamps": {}}).encode(), np.uint8)})
    assert len(read_duke(one, check_counts=False).gallery) == 8
    assert len(read_duke_si(other, check_counts=False).gallery) == 6


def test_a_folder_put_back_with_its_old_times_is_read_again(root, cache):
    path = old(root("duke"))
    read_duke(path, check_counts=False)
    gone = path / "gallery" / "0009" / "0002"
    status = [(p, p.stat()) for p in (path / "gallery" / "0009", path / "gallery")]
    shutil.rmtree(gone)
    for folder, before in status:
        os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(read_duke(path, check_counts=False).gallery) == 9


def test_duke_frames_are_sorted_by_number(root):
    duke = root("duke")
    folder = duke / "train" / "0001" / "0001"
    for name in ("0001_C1_F9324_X40000.jpg", "0001_C1_F10000_X40001.jpg", "0001_C1_F999_X39999.jpg"):
        picture(folder / name, 1, 1, 0)
    frames = [os.path.basename(f) for f in read_duke(duke, check_counts=False).train[0].frames]
    assert [name.split("_")[2] for name in frames] == ["F0001", "F0009", "F0017", "F0025", "F999", "F9324", "F10000"]


def test_duke_a_query_that_is_not_in_the_gallery_stays_itself(root):
    duke = root("duke")
    (duke / "query" / "0005" / "0001" / "0005_C1_F0001_X30823.jpg").unlink()
    data = read_duke(duke, check_counts=False)
    assert data.query_index == [-1, 2, 4, 6]
    assert data.query[0].name == "query/0005/0001"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train/0001/0001/0001_c1_F0099_X1.jpg", "no frame is named '0001_c1_F0099_X1.jpg': DukeMTMC-VideoReID lies"),
        ("train/0001/0001/0002_C1_F0099_X1.jpg", "in one tracklet, but of different persons or cameras"),
        ("train/0001/0001/0001_C2_F0099_X1.jpg", "in one tracklet, but of different persons or cameras"),
        ("train/0001/0009/0002_C2_F0099_X1.jpg", "0002_C2_F0099_X1.jpg is of person 0002, its folder of 0001"),
        ("train/0001/first/0001_C2_F0099_X1.jpg", "train/0001 has a folder 'first'"),
        ("train/0001/0009/notes.txt", "train/0001/0009 has no image"),
        ("train/0044/notes.txt", "train/0044 has no folder"),
    ],
)
def test_duke_files_that_do_not_fit(root, name, message):
    duke = root("duke")
    (duke / name).parent.mkdir(parents=True, exist_ok=True)
    (duke / name).touch()
    with pytest.raises(ValueError, match=message) as error:
        read_duke(duke, check_counts=False)
    assert str(duke) in str(error.value)


def test_what_systems_leave_behind_is_left_out(root):
    duke = root("duke")
    clean = read_duke(duke, check_counts=False)
    for folder in (duke / "train", duke / "train" / "0001", duke / "train" / "0001" / "0001"):
        for name in (".DS_Store", "Thumbs.db", "._0001_C1_F0099_X1.jpg"):
            (folder / name).touch()
        (folder / "@eaDir").mkdir()
    assert same(read_duke(duke, check_counts=False), clean)


def pairs(root, cameras, persons):
    return {
        (int(re.search(r"\d+$", person)[0]), 1 + i, *sorted(map(str, (root / camera / person).iterdir())))
        for i, camera in enumerate(cameras)
        for person in persons
    }


@pytest.mark.parametrize("swap", [False, True])
def test_ilids_vid(originals, swap):
    root = originals["ilids-vid"]
    images, cameras = root / "i-LIDS-VID" / "sequences", ("cam1", "cam2")
    persons = sorted(os.listdir(images / "cam1"))
    assert persons[3] == "person007", "numbers and places differ"
    rows = loadmat(root / "train-test people splits" / "train_test_splits_ilidsvid.mat")["ls_set"]
    for split in range(10):
        data = read_ilids_vid(root, split, swap_halves=swap, check_counts=False).check_retrieval()
        halves = [{persons[int(place) - 1] for place in half} for half in (rows[split, :4], rows[split, 4:])]
        test, train = halves[::-1] if swap else halves
        assert told(data.train) == pairs(images, cameras, train)
        assert told(data.query) == pairs(images, cameras[:1], test)
        assert {(p, c + 1, *f) for p, c, *f in pairs(images, cameras[1:], test)} == told(data.gallery)
    assert data.query[0].name.startswith("cam1/person0")
    assert len(data.query[0].load([1])) == 1
    for wrong in (10, -1, "all"):
        with pytest.raises(ValueError, match=rf"iLIDS-VID has the splits 0 to 9, got {wrong!r}"):
            read_ilids_vid(root, wrong, check_counts=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(3, 0, 9), "row 4: expected places among the 8 person folders, each once, got places from 1 to 9"),
        (put(3, 0, 0), "got places from 0 to"),
        (lambda rows: np.repeat(rows[:, :4], 2, axis=1), "4 of 8 different"),
        (lambda rows: rows[:3], "has the splits 0 to 2, got 3"),
    ],
)
def test_ilids_vid_splits_that_do_not_fit(root, change, message):
    ilids = root("ilids-vid")
    edit_mat(ilids / "train-test people splits" / "train_test_splits_ilidsvid.mat", "ls_set", change)
    with pytest.raises(ValueError, match=message):
        read_ilids_vid(ilids, 3, check_counts=False)


def test_ilids_vid_persons_are_in_both_cameras(root):
    ilids = root("ilids-vid")
    images = ilids / "i-LIDS-VID" / "sequences"
    shutil.rmtree(images / "cam2" / "person003")
    with pytest.raises(ValueError, match="sequences: person 3 is in one of cam1 and cam2 only"):
        read_ilids_vid(ilids, check_counts=False)
    (images / "cam2" / "person003").mkdir()
    with pytest.raises(ValueError, match="cam2/person003 has no image"):
        read_ilids_vid(ilids, check_counts=False)
    (images / "cam2" / "person003").rename(images / "cam2" / "somebody")
    with pytest.raises(ValueError, match="cam2 has a folder 'somebody'"):
        read_ilids_vid(ilids, check_counts=False)


def test_prid_splits_are_drawn_from_those_who_are_long_enough_in_both_cameras(originals, caplog):
    caplog.set_level(logging.INFO, "temporal_agg")
    shots, tests = originals["prid-2011"] / "prid_2011" / "multi_shot", set()
    for split in range(10):
        data = read_prid2011(originals["prid-2011"], split).check_retrieval()
        test, train = {t.pid for t in data.query}, {t.pid for t in data.train}
        assert test | train == {1, 2, 3, 4}, "5 is too short in cam_b, and from 201 on numbers do not match"
        assert len(test) == len(train) == 2
        tests.add(frozenset(test))
        persons = [f"person_{pid:04d}" for pid in test]
        assert told(data.train) == pairs(shots, ("cam_a", "cam_b"), [f"person_{pid:04d}" for pid in train])
        assert told(data.query) == pairs(shots, ("cam_a",), persons)
        assert told(data.query) | told(data.gallery) == pairs(shots, ("cam_a", "cam_b"), persons)
    assert len(tests) > 2
    assert "split 9: splits 10 (published 10), persons in use 4 (published 178)" in caplog.messages[-1]
    again = read_prid2011(originals["prid-2011"], 9, cache=False)
    assert told(again.train) == told(data.train)
    with pytest.raises(ValueError, match="PRID-2011 has the splits 0 to 9, got 10"):
        read_prid2011(originals["prid-2011"], 10)


def test_prid_without_its_outer_folder_and_with_listed_splits(tmp_path):
    root = make_prid2011(tmp_path, people=1, nested=False, json_splits=True)
    file = root / "splits_prid2011.json"
    for split, listed in enumerate(json.loads(file.read_text())):
        data = read_prid2011(root, split)
        assert [t.name for t in data.query] == [f"cam_a/{person}" for person in listed["test"]]
        assert [t.name for t in data.gallery] == [f"cam_b/{person}" for person in listed["test"]]
        assert [t.name for t in data.train] == [f"cam_{c}/{person}" for person in listed["train"] for c in "ab"]
    three = {"train": ["person_0001", "person_0003"], "test": ["person_0002"]}
    file.write_text(json.dumps([three]))
    with pytest.raises(ValueError, match=r"splits 1 \(published 10\).*check_counts=False"):
        read_prid2011(root)
    assert [t.pid for t in read_prid2011(root, check_counts=False).train] == [1, 1, 3, 3], "a listed one may be short"
    for wrong in (
        [{"train": ["person_0001"], "test": ["person_0203"]}],
        [{"train": ["person_0001"], "test": ["person_0001"]}],
        [{"train": ["person_0001"]}],
        {"train": 3},
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"splits_prid2011.json: expected (\[\{.*Correct or remove|a JSON array)"):
            read_prid2011(root, check_counts=False)
    file.unlink()
    shutil.rmtree(root / "multi_shot" / "cam_b" / "person_0001")
    with pytest.raises(ValueError, match=r"needs 2 persons or more with more than 21 frames in both cameras, found 1"):
        read_prid2011(root)


@pytest.mark.parametrize("info", [False, True])
def test_ls_vid(originals, tmp_path, info):
    root = make_ls_vid(tmp_path / "info", info=True) if info else originals["ls-vid"]
    data = read_ls_vid(root, check_counts=False).check_retrieval()
    lists = root / "info" if info else root
    for part, found in (("train", data.train), ("test", data.gallery)):
        lines = (lists / "list_sequence" / f"list_seq_{part}.txt").read_text().split()
        expected = set()
        for prefix, pid in zip(lines[::2], lines[1::2], strict=True):
            files = sorted(map(str, root.glob(f"{prefix}*")))
            expected.add((int(pid), int(os.path.basename(files[0]).split("_")[2]), *files))
        assert told(found) == expected
    assert [t.camera for t in data.query] == [1] * 4
    assert all(data.gallery[i] is t for i, t in zip(data.query_index, data.query, strict=True))
    assert data.query[0].name == "test/tracklet_test/0005/0005_001_01"
    assert len(data.query[0].load([0, 3])) == 2


def test_ls_vid_validation(root, caplog):
    caplog.set_level(logging.INFO, "temporal_agg")
    ls_vid = root("ls-vid")
    lists = ls_vid / "list_sequence" / "list_seq_val.txt"
    lists.write_text("".join(line + "\n" for line in lists.read_text().splitlines()[::-1]))
    for frame in range(2):
        picture(ls_vid / f"tracklet_val/0009/0009_003_02_{frame:07d}.jpg", 9, 2, frame)
    with lists.open("a") as file:
        file.write("tracklet_val/0009/0009_003_02_ 9\n\n")
    data = read_ls_vid(ls_vid, subset="val", check_counts=False).check_retrieval()
    assert "validation tracklets 9 (published 779), validation identities 4 (published 200)" in caplog.messages[-1]
    assert len(data.gallery) == 9
    assert data.query == data.gallery[:8], "each person's first tracklet in each camera"
    assert {t.pid for t in data.gallery} == {9, 10, 11, 12}
    with h5py.File(ls_vid / "test" / "data" / "info_val.mat", "w") as file:
        file["query"] = [[9.0, 1.0]]
    data = read_ls_vid(ls_vid, subset="val", check_counts=False)
    assert data.query == [data.gallery[8], data.gallery[0]]
    with pytest.raises(ValueError, match="subset must be 'test' or 'val', got 'train'"):
        read_ls_vid(ls_vid, subset="train")


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        (
            "tracklet_train/0001/0001_009_ 1",
            FileNotFoundError,
            r"train.txt, line 9: there is no image .*0001_009_\*",
        ),
        ("tracklet_train/0077/0077_001_ 1", FileNotFoundError, r"no .*tracklet_train/0077: LS-VID lies in"),
        ("tracklet_train/0001/0001_001_01_", ValueError, "line 9: expected '<beginning of the paths> <pid>', got"),
        ("tracklet_train/0001/0001_ 1", ValueError, "line 9: .* are in one tracklet, but of different persons or cam"),
        ("tracklet_train/0001/bad 1", ValueError, "line 9: no frame is named 'bad_1.jpg'"),
    ],
)
def test_ls_vid_lines_that_do_not_fit(root, line, error, message):
    ls_vid = root("ls-vid")
    picture(ls_vid / "tracklet_train/0001/bad_1.jpg", 1, 1, 1)
    with (ls_vid / "list_sequence" / "list_seq_train.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(error, match=message):
        read_ls_vid(ls_vid, check_counts=False)


def test_ls_vid_a_prefix_ends_where_its_number_ends(root):
    ls_vid = root("ls-vid")
    for name in ("8_1_1_1", "8_1_1_2", "8_1_1_10", "8_1_10_1", "8_10_2_1"):
        picture(ls_vid / "tracklet_train" / "0008" / f"{name}.png", 8, 1, 1)
    with (ls_vid / "list_sequence" / "list_seq_train.txt").open("a") as file:
        file.write("tracklet_train/0008/8_1_1 8\ntracklet_train/0008/8_10 8\n")
    data = read_ls_vid(ls_vid, check_counts=False)
    names = [[os.path.basename(f) for f in t.frames] for t in data.train[-2:]]
    assert names == [["8_1_1_1.png", "8_1_1_2.png", "8_1_1_10.png"], ["8_10_2_1.png"]]


@pytest.mark.parametrize("name", MAKE)
def test_counts(originals, monkeypatch, caplog, name):
    caplog.set_level(logging.INFO, "temporal_agg")
    read, root = MAKE[name][1], originals[name]
    if name != "prid-2011":  # ten splits it has
        with pytest.raises(ValueError, match=r"published.*check_counts=False") as error:
            read(root)
        assert str(root) in str(error.value)
    read(root, check_counts=False)
    publish(monkeypatch, name, COUNTS[name])
    read(root)
    for what, number in COUNTS[name].items():
        assert f"{what} {number} (published {number})" in caplog.messages[-1]
    for what, number in COUNTS[name].items() if name != "prid-2011" else [("splits", 10)]:
        publish(monkeypatch, name, COUNTS[name] | {what: number + 1})
        with pytest.raises(ValueError, match=rf"found {re.escape(what)} {number} \(published {number + 1}\)\. "):
            read(root)
        read(root, check_counts=False)


def test_every_published_count_is_compared():
    mars = {"gallery tracklets without the queries"}  # test_mars_without_the_queries_in_the_gallery
    val = {"validation tracklets", "validation identities"}  # test_ls_vid_validation
    for name, published in benchmarks.PUBLISHED.items():
        assert set(published.counts) - mars - val == set(COUNTS[name])


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("mars", "info/test_name.txt"),
        ("mars", "info/tracks_train_info.mat"),
        ("mars", "info/query_IDX.mat"),
        ("mars", "bbox_test"),
        ("mars", "bbox_train/0002"),
        ("duke", "query"),
        ("ilids-vid", "i-LIDS-VID/sequences/cam2"),
        ("ilids-vid", "train-test people splits/train_test_splits_ilidsvid.mat"),
        ("prid-2011", "prid_2011"),
        ("prid-2011", "prid_2011/multi_shot/cam_b"),
        ("ls-vid", "list_sequence/list_seq_test.txt"),
        ("ls-vid", "test/data/info_test.mat"),
        ("ls-vid", ""),
        ("duke-si", "gallery"),
    ],
)
def test_what_is_missing_is_named(root, name, gone):
    path = root(name)
    (path / gone).rename(path.parent / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"no .*{gone}.*: {benchmarks.PUBLISHED[name].title} lies in <root>/"):
        MAKE[name][1](path, check_counts=False)


@pytest.mark.parametrize(
    ("name", "module", "library"),
    [("mars", "scipy.io", "scipy"), ("ilids-vid", "scipy.io", "scipy"), ("ls-vid", "h5py", "h5py")],
)
def test_the_extra_is_named_where_it_is_missing(originals, monkeypatch, name, module, library):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {library}: pip install temporal-agg\[benchmarks\]"):
        MAKE[name][1](originals[name], check_counts=False)


def test_frame_files():
    names = np.array([b"1.jpg", b"2.jpg", "\u00e4\udcff.jpg".encode(errors="surrogateescape")])
    frames = FrameFiles("a/b", names)
    assert list(frames) == ["a/b/1.jpg", "a/b/2.jpg", "a/b/\u00e4\udcff.jpg"]
    assert frames[-1] == frames[2]
    assert frames[1:] == FrameFiles("a/b", names[1:])
    assert len({frames, FrameFiles("a/b", names.astype("S40")), FrameFiles("a/c", names), frames[:2], frames[:0]}) == 4
    assert frames != list(frames)
    with pytest.raises(IndexError):
        frames[3]
    many = FrameFiles("a/b", np.array([b"0001C1T0001F001.jpg"] * 10000))
    assert len(pickle.dumps(many[:20])) < 1000, "a worker gets its own frames alone"


def old(root):
    """Files whose clock stands: last changed an hour ago."""
    for folder, _, files in os.walk(root):
        for path in (folder, *(os.path.join(folder, file) for file in files)):
            os.utime(path, ns=(0, os.stat(path).st_mtime_ns - 3600 * 10**9))
    return root


def same(a, b):
    return a.name == b.name and all(
        [(t.name, t.pid, t.camera, t.frames) for t in getattr(a, part)]
        == [(t.name, t.pid, t.camera, t.frames) for t in getattr(b, part)]
        for part in ("train", "query", "gallery")
    )


@pytest.mark.parametrize("name", MAKE)
def test_the_cache_gives_what_the_files_give(root, cache, monkeypatch, caplog, name):
    caplog.set_level(logging.INFO, "temporal_agg")
    read, path = MAKE[name][1], old(root(name))
    fresh = read(path, check_counts=False)
    (file,) = cache.iterdir()
    assert file.name.startswith(f"{name}")
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", None)
        patch.setattr(os, "scandir", None)
        cached = read(path, check_counts=False)
    assert same(cached, fresh)
    assert cached.query_index == fresh.query_index
    assert caplog.messages[-1] == caplog.messages[-2]
    assert len(pickle.loads(pickle.dumps(cached.train[0])).load([0])) == 1
    before = file.stat().st_mtime_ns
    assert same(read(path, check_counts=False, cache=False), fresh)
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["bbox_test/0005", "info/train_name.txt", "info/tracks_test_info.mat", "bbox_train"])
def test_the_cache_follows_every_change(root, cache, name):
    path = old(root("mars"))
    read_mars(path, check_counts=False)
    (file,) = cache.iterdir()
    before = file.stat().st_ino  # another file whenever it is written
    read_mars(path, check_counts=False)
    assert file.stat().st_ino == before
    os.utime(path / name, ns=(0, 10**18))
    read_mars(path, check_counts=False)
    assert file.stat().st_ino != before


def test_the_cache_does_not_hide_changes(root):
    path = old(root("mars"))
    read_mars(path, check_counts=False)
    edit_mat(path / "info" / "query_IDX.mat", "query_IDX", lambda rows: rows[:, :2])
    assert len(read_mars(path, check_counts=False).query) == 2
    edit_mat(path / "info" / "tracks_test_info.mat", "track_test_info", lambda rows: rows[:-1])
    assert len(read_mars(path, check_counts=False).gallery) == 9
    old(path)
    read_mars(path, check_counts=False)
    (path / "bbox_test" / "0005" / "0005C1T0001F001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"0005C1T0001F001.jpg"):
        read_mars(path, check_counts=False)
    picture(path / "bbox_test" / "0005" / "0005C1T0001F001.jpg", 5, 1, 1)
    assert len(read_mars(path, check_counts=False).gallery) == 9, "the error is not kept"


def test_a_cache_that_cannot_be_used_is_made_anew(root, cache, caplog):
    path = old(root("mars"))
    fresh = read_mars(path, check_counts=False)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"0001C1T0001F001.jpg")] ^= 1
    caplog.set_level(logging.DEBUG, "temporal_agg")
    for content in (whole[: len(whole) // 2], b"", b"nonsense", bytes(flipped)):
        file.write_bytes(content)
        assert same(read_mars(path, check_counts=False), fresh)
        assert any("no index in" in r.message and r.levelno == logging.DEBUG for r in caplog.records)
        assert file.read_bytes() == whole
        caplog.clear()
    with np.load(file) as arrays:
        arrays = dict(arrays)
    meta = json.loads(arrays["meta"].tobytes()) | {"version": 0}
    np.savez(file, **arrays | {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)})
    assert same(read_mars(path, check_counts=False), fresh)
    assert file.read_bytes() == whole


def test_what_is_refused_or_just_written_is_not_cached(root, cache):
    path = old(root("mars"))
    os.utime(path / "info" / "train_name.txt")
    read_mars(path, check_counts=False)
    assert not cache.exists(), "the next change could carry the same time"
    old(path)
    with pytest.raises(ValueError, match="check_counts"):
        read_mars(path)
    assert not cache.exists()


def test_a_cache_folder_that_cannot_be_written(root, cache, monkeypatch, tmp_path):
    path = old(root("duke"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("TEMPORAL_AGG_CACHE", str(tmp_path / "file" / "folder"))
    assert len(read_duke(path, check_counts=False).query) == 4
    monkeypatch.delenv("TEMPORAL_AGG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    read_duke(path, check_counts=False)
    assert [file.name[:5] for file in (tmp_path / "xdg" / "temporal-agg").iterdir()] == ["duke-"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    read_duke(path, check_counts=False)
    assert len(list((tmp_path / "home" / ".cache" / "temporal-agg").iterdir())) == 1


def test_data_sets_and_parts_of_them_do_not_share_a_cache(root, cache):
    path = old(root("ls-vid"))
    assert {t.pid for t in read_ls_vid(path, check_counts=False).query} == {5, 6, 7, 8}
    assert {t.pid for t in read_ls_vid(path, subset="val", check_counts=False).query} == {9, 10, 11, 12}
    copy = old(shutil.copytree(path, path.parent / "copy"))
    assert str(copy) in read_ls_vid(copy, check_counts=False).query[0].frames[0]
    assert len(list(cache.iterdir())) == 3
    link = path.parent / "link"
    link.symlink_to(path)
    assert str(link) in read_ls_vid(link, check_counts=False).query[0].frames[0]
    assert len(list(cache.iterdir())) == 3, "the same folder by another name"


def test_processes_may_write_the_cache_at_once(root, cache):
    path = old(root("duke"))
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=read_often, args=(path, 10)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 3
    assert len(list(cache.iterdir())) == 1


def read_often(path, times):
    for _ in range(times):
        assert len(read_duke(path, check_counts=False).gallery) == 10
        for file in (path.parent / "cache").glob("*.npz"):
            file.unlink(missing_ok=True)
        assert len(read_duke(path, check_counts=False).gallery) == 10
