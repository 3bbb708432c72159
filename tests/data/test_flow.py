import json

import numpy as np
import pytest
import torch
from PIL import Image

from temporal_agg.data import (
    ClipDataset,
    ClipTransform,
    Draw,
    FlowError,
    Tracklet,
    TrackletData,
    check_flow,
    collate_clips,
    read_folder,
    synthetic_data,
)
from temporal_agg.data.flow import encode_flow, flow_file, flow_header, write_flow
from temporal_agg.data.tracklet import FrameFiles

SIZE = (12, 8)


def motion(count, scale=2.0, seed=0):
    rng = np.random.default_rng(seed)
    return [(scale * rng.standard_normal((2, *SIZE))).astype(np.float32) for _ in range(count)]


def write(path, flow):
    write_flow(path, [encode_flow(pixels) for pixels in flow], SIZE, {})


def frames_in(folder, count=5):
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03d}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(np.full((16, 8, 3), i, np.uint8)).save(path)
    return paths


def with_flow(folder, count=5, root=None, **kwargs):
    tracklet = Tracklet(frames_in(folder, count), pid=1, name="0001/1_0001", flow=root)
    flow = motion(count - 1, **kwargs)
    write(flow_file(tracklet.frames, root), flow)
    return tracklet, flow


def test_flow_comes_back_to_half_a_step(tmp_path):
    tracklet, flow = with_flow(tmp_path / "a")
    for i, got in zip((3, 0, 2, 0), tracklet.load_flow(torch.tensor([3, 0, 2, 0])), strict=True):
        assert got.dtype == torch.float32
        assert got.shape == (2, *SIZE)
        assert np.abs(got.numpy() - flow[i]).max() <= 1 / 32 + 1e-6
    fast, flow = with_flow(tmp_path / "b", scale=30.0)  # beyond 127 steps of 1/16 pixel
    for got, want in zip(fast.load_flow(range(4)), flow, strict=True):
        largest = np.abs(want).max()
        assert largest > 60
        assert np.abs(got.numpy() - want).max() <= largest / 254 * 1.001
    still, _ = with_flow(tmp_path / "c", scale=0.0)
    assert all(flow.count_nonzero() == 0 for flow in still.load_flow(range(5)))


def test_the_last_frame_repeats_the_one_before(tmp_path):
    tracklet, _ = with_flow(tmp_path / "a", 3)
    flow = tracklet.load_flow(range(3))
    assert torch.equal(flow[2], flow[1])
    assert not torch.equal(flow[1], flow[0])
    alone, _ = with_flow(tmp_path / "b", 1)
    assert torch.equal(alone.load_flow([0])[0], torch.zeros(2, *SIZE))


def test_only_the_frames_asked_for_are_decoded(tmp_path, monkeypatch):
    tracklet, _ = with_flow(tmp_path, 40)
    seen, open_image = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: seen.append(1) or open_image(*args, **kwargs))
    tracklet.load_flow([20, 3])
    assert len(seen) == 2
    tracklet.load_flow([])
    assert len(seen) == 2


def test_each_tracklet_of_a_folder_has_a_file_of_its_own(tmp_path):
    paths = frames_in(tmp_path, 6)
    parts = [paths[:3], paths[:4], paths[::2], paths[3:]]
    files = {flow_file(part) for part in parts}
    assert len(files) == 4
    assert {file.parent for file in files} == {tmp_path}
    assert flow_file([str(p) for p in paths]) == flow_file(paths), "strings and paths are the same files"
    names = np.array([path.name.encode() for path in paths])
    assert flow_file(FrameFiles(str(tmp_path), names)) == flow_file(paths)
    elsewhere = frames_in(tmp_path / "moved", 6)
    assert flow_file(elsewhere).name == flow_file(paths).name, "a data set can be moved"
    assert flow_file([paths[0], elsewhere[1]]).name != flow_file([paths[0], paths[1]]).name


def test_readers_do_not_take_flow_for_frames(tmp_path):
    tracklet, _ = with_flow(tmp_path / "train" / "0001" / "1_0001")
    (read,) = read_folder(tmp_path).train
    assert list(map(str, read.frames)) == list(map(str, tracklet.frames))
    assert len(read.load_flow(range(5))) == 5


def test_a_root_of_its_own(tmp_path):
    root = tmp_path / "flow"
    tracklet, _ = with_flow(tmp_path / "data" / "train" / "0001" / "1_0001", root=root)
    assert not list((tmp_path / "data").rglob("*.flow"))
    own = Tracklet(tracklet.frames, pid=2, flow=motion(5))
    data = TrackletData([Tracklet(tracklet.frames, pid=1), own], [], [], name="d").with_flow_root(root)
    assert data.name == "d"
    assert all(map(torch.equal, data.train[0].load_flow(range(5)), tracklet.load_flow(range(5))))
    assert data.train[1] is own
    arrays = Tracklet([np.zeros((4, 4, 3), np.uint8)], pid=1)
    for other in (synthetic_data(num_identities=4), TrackletData([], [arrays], [own, arrays])):
        assert other.with_flow_root(root).query_index == other.query_index


def test_missing_flow_names_the_remedy(tmp_path):
    tracklet = Tracklet(frames_in(tmp_path), pid=1, name="0001/1_0001")
    with pytest.raises(FlowError, match=r"'0001/1_0001' has no optical flow: there is no file .*\.flow") as error:
        tracklet.load_flow([0])
    assert "python recipes/compute_flow.py --data" in str(error.value)
    assert str(flow_file(tracklet.frames)) in str(error.value)
    assert isinstance(error.value, OSError)
    write(flow_file(tracklet.frames[:4]), motion(3))
    with pytest.raises(FlowError, match="there is no file"):  # that is the flow of other frames
        tracklet.load_flow([0])


def test_damaged_flow_names_the_file(tmp_path):
    tracklet, _ = with_flow(tmp_path)
    path = flow_file(tracklet.frames)
    whole = path.read_bytes()
    header = whole.index(b"\n") + 1
    cases = {
        "empty": b"",
        "text": b"hello\n",
        "cut in the header": whole[: header // 2],
        "cut in the index": whole[: header + 20],
        "cut in the images": whole[:-1],
        "longer": whole + b"\0",
        "another version": whole.replace(b'"version": 1', b'"version": 2'),
        "another length": whole.replace(b'"frames": 5', b'"frames": 4'),
    }
    for content in cases.values():
        path.write_bytes(content)
        with pytest.raises(FlowError, match="Delete the file and compute it again") as error:
            tracklet.load_flow([])
        assert str(path) in str(error.value)
    path.write_bytes(whole[:-80] + bytes(80))  # within the last image
    tracklet.load_flow([0])
    with pytest.raises(FlowError, match=r"Delete the file"):
        tracklet.load_flow([3])
    path.write_bytes(whole)
    other = Tracklet(frames_in(tmp_path, 6), pid=1)
    path.rename(flow_file(other.frames))
    with pytest.raises(FlowError, match="it is of 5 frames, and the tracklet has 6"):
        other.load_flow([0])


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    tracklet, flow = with_flow(tmp_path)
    path = flow_file(tracklet.frames)
    before = path.read_bytes()

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write(path, flow[::-1])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".png"] == [path.name]


def test_flow_that_is_none_is_refused():
    for bad in (np.full((2, *SIZE), np.nan, np.float32), np.zeros((*SIZE, 2), np.float32), np.zeros((2, 3))):
        with pytest.raises(ValueError, match=r"finite and of the shape \[2, h, w\]"):
            encode_flow(bad)


def test_the_header_is_a_line_of_text(tmp_path):
    tracklet, _ = with_flow(tmp_path)
    path = flow_file(tracklet.frames)
    assert flow_header(path) == json.loads(path.read_bytes().splitlines()[0])
    assert flow_header(path)["size"] == list(SIZE)


def test_flow_in_memory():
    flow = motion(3)
    tracklet = Tracklet([np.zeros((4, 4, 3), np.uint8)] * 3, pid=1, flow=flow)
    (got,) = tracklet.load_flow([2])
    assert np.array_equal(got.numpy(), flow[2])
    got.zero_()
    assert flow[2].any(), "what is loaded is a copy"
    with pytest.raises(ValueError, match="3 frames and flow for 2"):
        Tracklet(tracklet.frames, pid=1, flow=flow[:2])
    with pytest.raises(FlowError, match=r"identity 1.*floating-point array \[2, h, w\], got int64 \[12, 8, 2\]"):
        Tracklet(tracklet.frames, pid=1, flow=[np.zeros((12, 8, 2), np.int64)] * 3).load_flow([0])
    with pytest.raises(FlowError, match="frames in memory have no file"):
        Tracklet(tracklet.frames, pid=1).load_flow([])


def test_synthetic_tracklets_refuse():
    data = synthetic_data(num_identities=4)
    with pytest.raises(FlowError, match=r"synthetic 0.*flow=False"):
        check_flow(data.train)
    with pytest.raises(FlowError, match="no optical flow"):
        ClipDataset(data.train, data.label_map, ClipTransform((8, 4)), flow=True)


def tracklet_with_marked_flow(pid, length):
    """The flow of frame i is (i, -i) everywhere, in pixels of 8 x 4."""
    flow = [np.broadcast_to(np.array([i, -i], np.float32)[:, None, None], (2, 8, 4)) for i in range(length)]
    return Tracklet([np.full((16, 8, 3), i, np.uint8) for i in range(length)], pid, flow=flow)


@pytest.mark.parametrize("policy", ["random", "chunks", "all"])
def test_items_carry_the_flow_of_their_frames(policy):
    tracklets = [tracklet_with_marked_flow(pid, length) for pid, length in enumerate((3, 9, 20))]
    transform = ClipTransform((16, 8), (0, 0, 0), (1 / 255,) * 3)
    data = ClipDataset(tracklets, {0: 0, 1: 1, 2: 2}, transform, length=6, policy=policy, flow=True)
    plain = ClipDataset(tracklets, {0: 0, 1: 1, 2: 2}, transform, length=6, policy=policy)
    items = [data[Draw(i)] for i in range(3)]
    for i, item in enumerate(items):
        frames = item["clip"][:, 0, 0, 0].round()  # frame i has the value i
        assert item["flow"].shape == (len(frames), 2, 16, 8)
        assert torch.allclose(item["flow"], torch.stack([2 * frames, -2 * frames], 1)[..., None, None])
        assert torch.equal(item["clip"], plain[Draw(i)]["clip"]), "flow takes no draw of its own"
        assert "flow" not in plain[i]
    batch = collate_clips(items)
    assert batch["flow"].shape == (*batch["clip"].shape[:2], 2, 16, 8)
    assert batch["flow"][~batch["mask"]].count_nonzero() == 0
    assert "flow" not in collate_clips([plain[0]])


def test_missing_flow_shows_before_the_first_epoch(tmp_path):
    tracklets = [with_flow(tmp_path / "a")[0], Tracklet(frames_in(tmp_path / "b"), pid=1, name="b")]
    transform = ClipTransform(SIZE)
    with pytest.raises(FlowError, match="'b' has no optical flow"):
        ClipDataset(tracklets, {1: 0}, transform, flow=True)
    ClipDataset(tracklets, {1: 0}, transform)
