import numpy as np
import pytest
import torch
from PIL import Image

from temporal_agg.data import ImageError, Tracklet, TrackletData


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
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    for name in [*cases, "missing.jpg", "deep.png"]:
        tracklet = Tracklet([whole, tmp_path / name], pid=1, name="0001/1_0001")
        tracklet.load([0])
        with pytest.raises(ImageError) as error:
            tracklet.load([0, 1])
        assert isinstance(error.value, OSError)
        assert str(tmp_path / name) in str(error.value)
        assert "frame 1 of tracklet '0001/1_0001'" in str(error.value)


def test_arrays_of_another_kind_are_refused():
    for bad in (picture().astype(np.float32), picture()[..., 0], picture().transpose(2, 0, 1)):
        with pytest.raises(ImageError, match=r"identity 7, camera -1 must be a uint8 RGB array \[h, w, 3\]"):
            Tracklet([bad], pid=7).load([0])


def test_a_tracklet_has_frames():
    with pytest.raises(ValueError, match="'x' has no frame"):
        Tracklet([], pid=1, name="x")
    with pytest.raises(TypeError, match="sequence of paths"):
        Tracklet("folder", pid=1)


def tracklets(*pairs):
    return [Tracklet([f"{pid}_{camera}.jpg"], pid, camera) for pid, camera in pairs]


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
    with pytest.raises(ValueError, match="1 query tracklets of persons below 0"):
        TrackletData([], tracklets((1, 1), (-1, 1)), tracklets((1, 2)), "d").check_retrieval()


def test_query_index_finds_a_query_in_the_gallery():
    gallery = tracklets((1, 1), (2, 1), (3, 1))
    array = Tracklet([picture()], 4)
    query = [*tracklets((3, 1), (8, 1)), array, Tracklet([picture()], 4)]
    assert TrackletData([], query, [*gallery, array]).query_index == [2, -1, 3, -1]
