import functools

import pytest
import torch

from temporal_agg.data import ClipDataset, ClipTransform, synthetic_data
from temporal_agg.data.synthetic import FAULTS, SyntheticTracklet

OTHERS = tuple(range(50, 60))


def tracklet(pid=1, camera=1, index=0, length=24, **kwargs):
    return SyntheticTracklet(kwargs.pop("seed", 0), index, length, pid, camera, others=OTHERS, **kwargs)


def frames(t):
    return torch.stack(t.load(range(len(t)))).float()


def test_a_frame_is_a_function_of_the_seed_and_its_number():
    faults = dict.fromkeys(FAULTS, 0.8)
    for index in range(4):
        whole = tracklet(index=index, faults=faults).load(range(24))
        torch.manual_seed(index)
        state = torch.get_rng_state()
        again = tracklet(index=index, faults=faults).load([17, 3, 3])
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(a, whole[i]) for a, i in zip(again, (17, 3, 3), strict=True))
        assert again[0].dtype == torch.uint8
        assert again[0].shape == (3, 128, 64)
        assert torch.equal(tracklet(index=index, faults=faults).load([5])[0], whole[5])
    assert not torch.equal(tracklet(seed=1).load([0])[0], tracklet().load([0])[0])
    assert tracklet(size=(64, 48)).load([0])[0].shape == (3, 64, 48)


@functools.cache
def several(fault=FAULTS[0], strength=0.0):
    """The frames of twelve tracklets."""
    faults = {fault: strength}
    return torch.stack([frames(tracklet(index=i, length=12, size=(32, 16), faults=faults)) for i in range(12)])


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_changes_its_frames_alone_and_grows_with_its_strength(fault):
    changed = {s: (several(fault, s) - several()).abs().mean((2, 3, 4)) for s in (0.4, 1.0)}
    assert torch.equal(frames(tracklet(faults={fault: 0.0})), frames(tracklet()))
    share = {strength: (total > 0).float().mean() for strength, total in changed.items()}
    assert 0.05 < share[0.4] < share[1.0] < 0.9
    assert changed[0.4].mean() < changed[1.0].mean()
    assert changed[1.0][changed[1.0] > 0].median() > 5, "it is to be seen"
    if fault == "identity_switch":
        assert (changed[1.0][:, 0] == 0).all(), "a tracklet starts with its own person"
    if fault != "blur":
        runs = (changed[1.0] > 0).int().diff(dim=1).eq(1).sum(1) + (changed[1.0][:, 0] > 0)
        assert runs.max() == 1, "one stretch of frames"


def test_a_switched_frame_shows_the_other_identity():
    for index in range(4):
        shown = frames(tracklet(index=index, length=10, faults={"identity_switch": 1.0}))
        mine = frames(tracklet(index=index, length=10))
        switched = (shown - mine).abs().sum((1, 2, 3)) > 0
        assert switched.any()
        candidates = [frames(tracklet(pid=pid, index=index, length=10)) for pid in OTHERS]
        assert any(torch.equal(shown[switched], c[switched]) for c in candidates)


def test_identities_and_cameras_look_different():
    """Mean colours of stripes, over a tracklet: nearest neighbours in one camera and in another."""

    def describe(pid, camera, index):
        clip = frames(tracklet(pid, camera, index, length=8))[..., 16:48]
        stripes = torch.nn.functional.adaptive_avg_pool2d(clip.mean(0), (16, 1)).flatten()
        return stripes

    people = range(1, 21)
    first = torch.stack([describe(pid, 1, pid) for pid in people])
    same_camera = torch.stack([describe(pid, 1, 100 + pid) for pid in people])
    other_camera = torch.stack([describe(pid, 2, 200 + pid) for pid in people])
    truth = torch.arange(20)
    easy = (torch.cdist(first, same_camera).argmin(1) == truth).float().mean()
    hard = (torch.cdist(first, other_camera).argmin(1) == truth).float().mean()
    assert easy > 0.7, "identities can be told apart"
    assert hard < easy - 0.2, "colours alone do not survive the camera"


def test_a_walk_moves():
    clip = frames(tracklet())
    steps = (clip[1:] - clip[:-1]).abs().mean((1, 2, 3))
    assert (steps > 2).all()


def test_data_set_has_the_numbers_asked_for():
    data = synthetic_data(9, 3, 2, length=(5, 11), seed=4)
    assert {t.pid for t in data.train} == set(range(1, 5))
    assert {t.pid for t in data.query} == {t.pid for t in data.gallery} == set(range(5, 10))
    assert (len(data.train), len(data.query), len(data.gallery)) == (4 * 6, 5 * 3, 5 * 3)
    tracklets = [*data.train, *data.query, *data.gallery]
    lengths = {len(t) for t in tracklets}
    assert min(lengths) >= 5
    assert max(lengths) <= 11
    assert len(lengths) > 3
    assert len({t.index for t in tracklets}) == len(tracklets)
    assert {t.camera for t in data.query} == {1, 2, 3}
    assert data.check_retrieval() is data
    assert data.query_index == [-1] * 15
    train = {t.pid for t in data.train}
    assert all(set(t.others) | {t.pid} == train for t in data.train), "nobody from the test walks through training"
    again = synthetic_data(9, 3, 2, length=(5, 11), seed=4)
    assert torch.equal(again.query[3].load([2])[0], data.query[3].load([2])[0])


def test_it_feeds_a_clip_data_set():
    data = synthetic_data(4, 2, 2, length=(1, 6))
    clips = ClipDataset(data.train, data.label_map, ClipTransform((64, 32), train=True), length=4)
    for i in range(len(clips)):
        assert clips[i]["clip"].shape == (4, 3, 64, 32)
        assert clips[i]["clip"].isfinite().all()


def test_errors():
    with pytest.raises(ValueError, match=r"faults are occlusion, .* got 'rain': 0\.5"):
        synthetic_data(faults={"rain": 0.5})
    with pytest.raises(ValueError, match="got 'blur': 2"):
        synthetic_data(faults={"blur": 2})
    with pytest.raises(ValueError, match="num_identities must be at least 4, got 3"):
        synthetic_data(3)
    with pytest.raises(ValueError, match="num_cameras must be at least 2"):
        synthetic_data(num_cameras=1)
    with pytest.raises(ValueError, match="length must be"):
        synthetic_data(length=(9, 5))
    with pytest.raises(IndexError, match="frames 0 to 23, got 24"):
        tracklet().load([24])


@pytest.mark.parametrize("fault", FAULTS)
def test_frames_that_are_not_struck_are_the_clean_ones(fault):
    (clean, *_), (faulty, *_) = (
        synthetic_data(num_identities=4, num_cameras=2, length=(12, 12), faults=faults, size=(32, 16)).gallery
        for faults in ({}, {fault: 1.0})
    )
    same = [torch.equal(a, b) for a, b in zip(clean.load(range(12)), faulty.load(range(12)), strict=True)]
    struck = faulty.struck(fault)
    assert any(struck)
    assert not all(struck)
    assert all(equal for equal, hit in zip(same, struck, strict=True) if not hit)
    assert not all(same)
    assert not any(clean.struck(fault))
