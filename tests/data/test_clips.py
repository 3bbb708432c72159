import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from temporal_agg.data import (
    ClipDataset,
    ClipTransform,
    Draw,
    IdentityBatchSampler,
    Tracklet,
    TrackletBatchSampler,
    collate_clips,
)
from temporal_agg.data.sampling import sample_frames


def numbered(pid, length, camera=1):
    """A tracklet whose frame i is 10 * pid + i everywhere."""
    return Tracklet([np.full((8, 4, 3), 10 * pid + i, np.uint8) for i in range(length)], pid, camera)


class Values:
    """A transform that keeps each frame's value and adds what the generator draws."""

    def __call__(self, frames, generator):
        noise = torch.randint(2**14, (), generator=generator) / 2**14  # exact in float32
        return torch.stack([frame[:, :1, :1].float() for frame in frames]) + noise


TRACKLETS = [numbered(pid, 3 * pid, camera=pid % 2) for pid in range(1, 8)]
LABELS = {pid: pid - 1 for pid in range(1, 8)}


def dataset(**kwargs):
    return ClipDataset(TRACKLETS, LABELS, kwargs.pop("transform", Values()), **kwargs)


@pytest.mark.parametrize("policy", ["random", "adjacent", "chunks", "even", "all"])
@pytest.mark.parametrize("fill", ["repeat", "last", "mask"])
def test_items_hold_the_frames_that_the_policy_draws(policy, fill):
    data = dataset(length=8, policy=policy, fill=fill)
    assert len(data) == 7
    for index, tracklet in enumerate(TRACKLETS):
        item = data[index]
        n, pid = len(tracklet), tracklet.pid
        T = n if policy == "all" else 8
        frames = item["clip"][:, 0, 0, 0].floor().long() - 10 * pid
        assert item["clip"].shape == (T, 3, 1, 1)
        assert (item["label"], item["pid"], item["camera"], item["index"]) == (pid - 1, pid, tracklet.camera, index)
        assert item["clip"].frac().unique().numel() == 1, "one draw for the clip"
        if n <= 8 or policy in ("even", "all"):
            indices, mask = sample_frames(n, 8, policy, fill=fill)
            assert torch.equal(frames, indices)
            assert torch.equal(item["mask"], mask)
        else:
            assert item["mask"].all()
            assert (frames.diff() >= 0).all()


def test_a_clip_is_a_function_of_seed_epoch_index_and_number():
    data = dataset(length=4)
    data.set_epoch(2)
    want = data[6]["clip"]
    assert torch.equal(data[6]["clip"], want)
    assert torch.equal(dataset(length=4)[Draw(6, 0, 2)]["clip"], want)
    others = [dataset(length=4, seed=1)[Draw(6, 0, 2)], data[Draw(6, 1, 2)], data[Draw(6, 0, 3)]]
    assert all(not torch.equal(other["clip"], want) for other in others)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(data[6]["clip"], want)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_frame_of_every_tracklet_once():
    data = dataset(length=1, policy="each")
    loader = DataLoader(
        data, batch_sampler=TrackletBatchSampler([len(t) for t in TRACKLETS], 12), collate_fn=collate_clips
    )
    clips = torch.cat([batch["clip"] for batch in loader])
    assert clips.shape == (84, 1, 3, 1, 1)
    values = sorted(clips[:, 0, 0, 0, 0].floor().long().tolist())
    assert values == sorted(10 * t.pid + i for t in TRACKLETS for i in range(len(t)))


def loaded(workers, epochs=(0, 1)):
    transform = ClipTransform((16, 8), train=True, pad=2, erasing=0.5)
    data = dataset(length=3, transform=transform)
    sampler = IdentityBatchSampler([t.pid for t in TRACKLETS], 3, 2)
    loader = DataLoader(
        data, batch_sampler=sampler, collate_fn=collate_clips, num_workers=workers, persistent_workers=workers > 0
    )
    out = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        out.append(list(loader))
    return out


def test_workers_change_nothing_and_see_the_epoch():
    alone, helped = loaded(0), loaded(2)
    for epoch in range(2):
        for a, b in zip(alone[epoch], helped[epoch], strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(alone[0][0]["clip"], alone[1][0]["clip"])
    only_second = loaded(0, epochs=(1,))[0]
    assert all(torch.equal(a["clip"], b["clip"]) for a, b in zip(only_second, alone[1], strict=True))


def test_persistent_workers_see_the_epoch_of_plain_indices():
    data = dataset(length=2)
    loader = DataLoader(data, batch_size=7, collate_fn=collate_clips, num_workers=1, persistent_workers=True)
    for epoch in (0, 5):
        data.set_epoch(epoch)
        (batch,) = loader
        assert torch.equal(batch["clip"], torch.stack([data[i]["clip"] for i in range(7)]))
        assert torch.equal(batch["clip"], torch.stack([dataset(length=2)[Draw(i, 0, epoch)]["clip"] for i in range(7)]))


def test_collate_pads_to_the_longest_clip():
    data = dataset(policy="all")
    batch = collate_clips([data[2], data[0], data[1]])
    assert batch["clip"].shape == (3, 9, 3, 1, 1)
    assert batch["mask"].dtype == torch.bool
    assert batch["mask"].sum(1).tolist() == [9, 3, 6]
    assert (batch["mask"].int().diff(dim=1) <= 0).all(), "padding stands at the end"
    assert (batch["clip"][~batch["mask"]] == 0).all()
    assert torch.equal(batch["clip"][1, :3], data[0]["clip"])
    assert batch["label"].tolist() == [2, 0, 1]
    assert batch["pid"].tolist() == [3, 1, 2]
    assert batch["index"].tolist() == [2, 0, 1]
    assert batch["label"].dtype == torch.int64


def test_errors():
    with pytest.raises(ValueError, match=r"no class for the identities \[7\]"):
        ClipDataset(TRACKLETS, {pid: pid for pid in range(1, 7)}, Values())
    with pytest.raises(ValueError, match="got 'dense'"):
        dataset(policy="dense")
    with pytest.raises(ValueError, match="'zero'"):
        dataset(fill="zero")
