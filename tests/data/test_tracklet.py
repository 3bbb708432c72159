import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from temporal_agg import embed_tracklets
from temporal_agg.data import (
    ClipDataset,
    ImageError,
    Tracklet,
    TrackletData,
    query_index,
    skip_unreadable,
    unreadable,
    windows,
)


def picture(height=6, width=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_files_and_arrays_load_in_the_order_asked(tmp_path):
    pictures = [picture(6 + i, 4, seed=i) for i in range(4)]
    frames = []
    for i, pixels in enumerate(pictures):
        path = tmp_path / f"{i}.png"
        Image.fromarray(pixels).save(path)
        frames.append((path, str(path), pixels, pixels)[i])
    tracklet = Tracklet(frames, pid=3, camera=1)
    assert len(tracklet) == 4
    loaded = tracklet.load(torch.tensor([3, 0, 2, 1, 0]))
    for i, frame in zip((3, 0, 2, 1, 0), loaded, strict=True):
        assert frame.dtype == torch.uint8
        assert torch.equal(frame, torch.from_numpy(pictures[i]).permute(2, 0, 1))
    loaded[0].zero_()
    assert pictures[3].any(), "a loaded frame is a copy"


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_other_kinds_of_images_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image = Image.fromarray(picture()).convert(mode)
    image.save(path)
    (frame,) = Tracklet([path], pid=1).load([0])
    assert frame.shape == (3, 6, 4)
    assert torch.equal(frame, torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))


def test_bad_images_name_their_path(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(picture(64, 32)).save(whole)
    data = whole.read_bytes()
    cases = {"truncated.jpg": data[: len(data) // 2], "empty.jpg": b"", "text.png": b"hello", "head.jpg": data[:30]}
    png = tmp_path / "whole.png"
    Image.fromarray(picture(64, 32)).save(png)
    cases["broken.png"] = png.read_bytes()[:60] + b"\0" * 400
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    for name in [*cases, "missing.jpg"]:
        tracklet = Tracklet([whole, tmp_path / name], pid=1, name="0001/1_0001")
        tracklet.load([0])
        with pytest.raises(ImageError) as error:
            tracklet.load([0, 1])
        assert isinstance(error.value, OSError)
        assert str(tmp_path / name) in str(error.value)
        assert "frame 1 of tracklet '0001/1_0001'" in str(error.value)


def test_arrays_of_another_kind_are_refused():
    for bad in (picture().astype(np.float32), picture()[..., 0], picture().transpose(2, 0, 1), picture()[:0]):
        with pytest.raises(ImageError, match=r"identity 7, camera -1 must be a uint8 RGB array \[h, w, 3\]"):
            Tracklet([bad], pid=7).load([0])
    for other in (Image.fromarray(picture()), torch.zeros(4, 3, 3, dtype=torch.uint8)):
        with pytest.raises(ImageError, match=r"a path or a uint8 RGB array \[h, w, 3\], got (Image|Tensor)"):
            Tracklet([other], pid=7).load([0])


def test_a_tracklet_has_frames():
    with pytest.raises(ValueError, match="'x' has no frame"):
        Tracklet([], pid=1, name="x")
    with pytest.raises(TypeError, match="sequence of paths"):
        Tracklet("folder", pid=1)


def tracklets(*pairs):
    return [Tracklet([f"{pid}_{camera}.jpg"], pid, camera) for pid, camera in pairs]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (tracklets((3, 1))[0], r"got a single Tracklet: write \[tracklet\]"),
        (TrackletData(tracklets((3, 1)), [], [], "d"), r"got TrackletData\('d', train=1.*: take its train, query or"),
        (iter(tracklets((3, 1))), "got list_iterator"),
        ([*tracklets((3, 1)), "a.jpg"], r"tracklets\[1\] is 'a.jpg': write Tracklet\(frames, pid, camera\)"),
    ],
)
def test_what_is_no_list_of_tracklets_is_named(given, message):
    for call in (lambda: embed_tracklets(None, given), lambda: ClipDataset(given, {3: 0}, None)):
        with pytest.raises(TypeError, match=f"tracklets must be a list of tracklets.*{message}"):
            call()


def test_label_map_numbers_the_training_identities():
    data = TrackletData(tracklets((30, 1), (5, 1), (30, 2)), [], [], "d")
    assert data.label_map == {5: 0, 30: 1}
    with pytest.raises(ValueError, match="'d' has no training tracklet"):
        _ = TrackletData([], [], [], "d").label_map


def test_retrieval_needs_a_query_that_has_a_match():
    query = tracklets((1, 1), (2, 1))

    def check(gallery):
        return TrackletData([], query, gallery, "d").check_retrieval()

    assert check(tracklets((2, 2), (9, 1))).gallery[0].pid == 2
    with pytest.raises(
        ValueError, match=r"no identity in common \(query: 1, 2; gallery: 3, 4, 5, 6, 7, ... \(6 in all"
    ):
        check(tracklets(*((pid, 2) for pid in range(3, 9))))
    with pytest.raises(ValueError, match=r"own camera only.*set it to -1"):
        check(tracklets((1, 1), (2, 1)))
    with pytest.raises(ValueError, match="no gallery tracklet"):
        check([])
    with pytest.raises(ValueError, match="no query tracklet"):
        TrackletData([], [], query).check_retrieval()
    unknown = tracklets((1, -1))
    TrackletData([], unknown, tracklets((1, -1), (1, -1))).check_retrieval()
    with pytest.raises(ValueError, match="no other tracklet than itself"):
        TrackletData([], unknown, unknown).check_retrieval()
    with pytest.raises(ValueError, match="1 query tracklets of pid -1"):
        TrackletData([], tracklets((1, 1), (-1, 1)), tracklets((1, 2)), "d").check_retrieval()


def test_query_index_finds_a_query_in_the_gallery():
    gallery = tracklets((1, 1), (2, 1), (3, 1))
    array = Tracklet([picture()], 4)
    query = [*tracklets((3, 1), (8, 1)), array, Tracklet([picture()], 4)]
    assert TrackletData([], query, [*gallery, array]).query_index == [2, -1, 3, 3], "a copy in memory, too"
    other = Tracklet([picture(seed=1)], 4)
    assert TrackletData([], [other], [*gallery, array]).query_index == [-1]


def noise(path, seed, count=3):
    path.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(picture(seed=100 * seed + i)).save(path / f"{i}.png")
    return path


def of(folder, pid=1, camera=-1):
    return Tracklet(sorted(folder.iterdir()), pid, camera, folder.name)


@pytest.mark.parametrize("kind", ["copy", "linked folder", "linked files", "hard links", "spelling", "in memory"])
def test_a_query_is_known_by_whatever_path_it_is_reached(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gallery = [of(noise(tmp_path / f"g{n}", n)) for n in range(3)]
    source, target = tmp_path / "g1", tmp_path / "q"
    if kind == "copy":
        shutil.copytree(source, target)
    elif kind == "linked folder":
        target.symlink_to(source)
    elif kind in ("linked files", "hard links"):
        target.mkdir()
        for file in source.iterdir():
            (os.symlink if kind == "linked files" else os.link)(file, target / file.name)
    if kind == "spelling":
        query = Tracklet([f"../{tmp_path.name}/./g1/{i}.png" for i in range(3)], 1)
    elif kind == "in memory":
        frames = [frame.permute(1, 2, 0).numpy().copy() for frame in gallery[1].load(range(3))]
        gallery[1], query = Tracklet(frames, 1), Tracklet([frame.copy() for frame in frames], 1)
    else:
        query = of(target)
    assert query_index([query, of(noise(tmp_path / "other", 9))], gallery) == [1, -1]
    with pytest.raises(ValueError, match="no other tracklet than itself"):
        TrackletData([], [query], gallery[1:2]).check_retrieval()


def test_a_copy_is_of_the_same_person_and_camera(tmp_path):
    gallery = [of(noise(tmp_path / "g", 1), pid=1, camera=2)]
    shutil.copytree(tmp_path / "g", tmp_path / "q")
    for pid, camera, own in ((1, 2, 0), (1, -1, 0), (1, 3, -1), (2, 2, -1)):
        assert query_index([of(tmp_path / "q", pid, camera)], gallery) == [own]
    shorter = Tracklet(sorted((tmp_path / "q").iterdir())[:2], 1, 2)
    assert query_index([shorter], gallery) == [-1]
    changed = of(tmp_path / "q", 1, 2)
    last = tmp_path / "q" / "2.png"
    last.write_bytes(last.read_bytes()[:-1] + b"x")  # of the same size
    assert query_index([changed], gallery) == [-1]


def test_only_files_of_equal_sizes_are_read(tmp_path, monkeypatch):
    gallery = [of(noise(tmp_path / f"g{n}", n, count=2)) for n in range(3)]
    for n in range(3):
        for file in (tmp_path / f"g{n}").iterdir():
            file.write_bytes(file.read_bytes() + b" " * n)
    query = of(noise(tmp_path / "q", 7, count=2))
    for file in (tmp_path / "q").iterdir():
        file.write_bytes(file.read_bytes() + b" " * 100)
    monkeypatch.setattr("builtins.open", None)
    assert query_index([query], gallery) == [-1]


def test_ids_are_checked_where_a_tracklet_is_made():
    for pid, camera in ((-2, 1), (2**63, 1), (1, -5), (1, 2**70)):
        with pytest.raises(ValueError, match=r"identity .*: (pid|camera) must be -1"):
            Tracklet([picture()], pid, camera)
    for pid in (1.5, "1", None):
        with pytest.raises(TypeError, match="pid must be an integer"):
            Tracklet([picture()], pid)
    assert Tracklet([picture()], np.int32(3), -1).pid == 3


def test_check_retrieval_looks_at_the_ids_of_stand_ins():
    class Stand(list):
        pid, camera, name = -5, 0, "stand-in"

    with pytest.raises(ValueError, match=r"'d', 'stand-in': pid must be -1 \(junk\)"):
        TrackletData([], tracklets((1, 1)), [*tracklets((1, 2)), Stand()], "d").check_retrieval()


def test_junk_is_not_trained_on(caplog):
    data = TrackletData(tracklets((5, 1), (-1, 1), (6, 1)), [], [], "d")
    assert data.label_map == {5: 0, 6: 1}
    assert [t.pid for t in data.train] == [5, 6]
    assert "d: 1 training tracklets of pid -1 (junk) are left out" in caplog.text
    with pytest.raises(ValueError, match="no training tracklet"):
        _ = TrackletData(tracklets((-1, 1)), [], []).label_map


def test_people_in_train_and_test_are_named(caplog):
    test = tracklets((1, 1), (2, 1)), tracklets((1, 2), (2, 2), (0, 2))
    TrackletData(tracklets((3, 1)), *test).check_retrieval()
    assert not caplog.text
    TrackletData(tracklets((3, 1), (2, 1), (0, 1)), *test, "d").check_retrieval()
    assert "data set 'd': 2 people are in both train and test (0, 2)" in caplog.text


def test_a_set_with_train_only_can_be_trained():
    train = TrackletData(tracklets((3, 1)), [], [], "d")
    assert train.check_training() is train
    with pytest.raises(ValueError, match="no gallery tracklet"):
        TrackletData(tracklets((3, 1)), tracklets((1, 1)), [], "d").check_training()
    with pytest.raises(ValueError, match="no training tracklet"):
        TrackletData([], tracklets((1, 1)), tracklets((1, 2)), "d").check_training()


def test_long_objects_print_short():
    many = Tracklet([picture()] * 500, 3, 2, "0003/2_1")
    assert repr(many) == "Tracklet('0003/2_1', pid=3, camera=2, 500 frames)"
    assert repr(TrackletData([many], [], [many] * 2, "d")) == "TrackletData('d', train=1, query=0, gallery=2)"


def test_unreadable_frames_are_listed_at_once(tmp_path):
    good, some, none = (of(noise(tmp_path / name, n)) for n, name in enumerate(("good", "some", "none")))
    (tmp_path / "some" / "1.png").write_bytes(b"no image")
    for file in (tmp_path / "none").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    errors = unreadable([good, some, none])
    bad = [tmp_path / "some" / "1.png", *(tmp_path / "none" / f"{i}.png" for i in range(3))]
    assert len(errors) == 4
    assert all(str(path) in str(error) for path, error in zip(bad, errors, strict=True))
    kept, again = skip_unreadable([good, some, none])
    assert list(map(str, again)) == list(map(str, errors))
    assert kept[0] is good
    assert [path.name for path in kept[1].frames] == ["0.png", "2.png"]
    assert (kept[1].pid, kept[1].camera, kept[1].name) == (1, -1, "some")
    assert len(kept) == 2
    flow = [np.full((2, 6, 4), i, np.float32) for i in range(3)]
    (with_flow,), _ = skip_unreadable([replace(some, flow=flow)])
    assert [float(x[0, 0, 0]) for x in with_flow.load_flow([0, 1])] == [0, 2]


def test_windows_are_tracklets_of_their_own():
    frames = [np.full((2, 2, 3), i, np.uint8) for i in range(17)]
    flow = [np.full((2, 2, 2), i, np.float32) for i in range(17)]
    long, short = Tracklet(frames, 3, 2, "long", flow), Tracklet(frames[:5], 4, 1, "short")
    cut = windows([long, short], 8, 4)
    assert [(t.pid, t.camera, len(t)) for t in cut] == [(3, 2, 8)] * 3 + [(4, 1, 5)]
    for start, t in zip((0, 4, 8), cut, strict=False):
        assert [int(f[0, 0, 0]) for f in t.load(range(8))] == list(range(start, start + 8))
        assert [int(f[0, 0, 0]) for f in t.load_flow([0, 7])] == [start, start + 7]
        with pytest.raises(IndexError):
            t.load([8])
    assert len({t.name for t in cut}) == 4
    assert cut[3] is short
    data = TrackletData(cut, [], [])
    assert data.label_map == {3: 0, 4: 1}
    with pytest.raises(ValueError, match="at least 1"):
        windows([long], 0, 4)
