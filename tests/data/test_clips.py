import os
import types

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from temporal_agg.data import (
    ClipDataset,
    ClipTransform,
    Draw,
    IdentityBatchSampler,
    PairBatchSampler,
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
    want = data[Draw(6, 0, 2)]["clip"]
    assert torch.equal(data[Draw(6, 0, 2)]["clip"], want)
    assert torch.equal(dataset(length=4)[Draw(6, 0, 2)]["clip"], want)
    others = [dataset(length=4, seed=1)[Draw(6, 0, 2)], data[Draw(6, 1, 2)], data[Draw(6, 0, 3)]]
    assert all(not torch.equal(other["clip"], want) for other in others)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(data[Draw(6, 0, 2)]["clip"], want)
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


def plain_epochs(workers, epochs=3, persistent=False, **kwargs):
    """The clips of every epoch of a loader that shuffles, by tracklet."""
    data = dataset(length=2, policy="random", **kwargs)
    loader = DataLoader(
        data, 1, shuffle=True, collate_fn=collate_clips, num_workers=workers, persistent_workers=persistent
    )
    return [{int(batch["index"]): batch["clip"] for batch in loader} for _ in range(epochs)]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_plain_indices_draw_anew_and_again_after_manual_seed(workers, persistent):
    torch.manual_seed(5)
    epochs = plain_epochs(workers, persistent=persistent)
    assert all(len(epoch) == 7 for epoch in epochs)
    for index in range(7):
        assert len({epoch[index].sum().item() for epoch in epochs}) == 3, "another draw in each epoch"
    torch.manual_seed(5)
    again = plain_epochs(workers, persistent=persistent)
    for a, b in zip(epochs, again, strict=True):
        assert all(torch.equal(a[index], b[index]) for index in range(7))
    torch.manual_seed(6)
    assert not torch.equal(plain_epochs(workers, persistent=persistent)[0][0], epochs[0][0])


def test_workers_draw_differently():
    data = ClipDataset([TRACKLETS[6]] * 8, LABELS, Values(), length=4)
    torch.manual_seed(0)
    (batch,) = DataLoader(data, 8, collate_fn=collate_clips)
    assert batch["clip"].flatten(1).unique(dim=0).shape[0] == 8
    parts = list(DataLoader(data, 4, collate_fn=collate_clips, num_workers=2))
    assert torch.cat([part["clip"] for part in parts]).flatten(1).unique(dim=0).shape[0] == 8


def test_each_with_plain_indices_comes_to_every_window():
    data = dataset(length=1, policy="each")
    torch.manual_seed(0)
    seen = {int(data[6]["clip"][0, 0, 0, 0].floor()) for _ in range(300)}
    assert seen == {70 + i for i in range(21)}


@pytest.mark.parametrize("sampler", [IdentityBatchSampler, PairBatchSampler, TrackletBatchSampler])
def test_lightning_reaches_the_epoch_of_our_batch_samplers(sampler):
    """Lightning and others call ``loader.batch_sampler.sampler.set_epoch(epoch)``."""
    args = ([t.pid for t in TRACKLETS], 3, 2)
    batches = sampler(*(args if sampler is IdentityBatchSampler else args[:2]))
    loader = DataLoader(dataset(length=2), batch_sampler=batches, collate_fn=collate_clips)
    epochs = []
    for epoch in (0, 1, 0):
        loader.batch_sampler.sampler.set_epoch(epoch)
        epochs.append([batch["clip"] for batch in loader])
    assert all(torch.equal(a, b) for a, b in zip(epochs[0], epochs[2], strict=True))
    assert not torch.equal(epochs[0][0], epochs[1][0])


def drawn():
    transform = ClipTransform(
        (16, 8), train=True, pad=2, random_crop=9 / 8, erasing=1.0, erasing_fill="random", erasing_per_frame=True
    )
    out = []
    for policy in ("random", "adjacent", "chunks", "even", "each", "all"):
        data = dataset(length=3, policy=policy, transform=transform)
        for batches in (
            IdentityBatchSampler([t.pid for t in TRACKLETS], 3, 2),
            PairBatchSampler([t.pid for t in TRACKLETS], 3),
            TrackletBatchSampler([1] * 7, 3),
        ):
            out.append(collate_clips([data[draw] for draw in next(iter(batches))]))  # a loader of torch's draws itself
    return out


@pytest.mark.parametrize("default", ["float64", "bfloat16", "meta"])
def test_the_default_type_and_device_do_not_matter(default):
    """Notebooks and other libraries set them."""
    want = drawn()
    try:
        if default == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, default))
        got = drawn()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            assert a[key].device.type == "cpu"
            assert torch.equal(a[key], b[key])


def test_collate_pads_to_the_longest_clip():
    data = dataset(policy="all")
    batch = collate_clips([data[Draw(i)] for i in (2, 0, 1)])
    assert batch["clip"].shape == (3, 9, 3, 1, 1)
    assert batch["mask"].dtype == torch.bool
    assert batch["mask"].sum(1).tolist() == [9, 3, 6]
    assert (batch["mask"].int().diff(dim=1) <= 0).all(), "padding stands at the end"
    assert (batch["clip"][~batch["mask"]] == 0).all()
    assert torch.equal(batch["clip"][1, :3], data[Draw(0)]["clip"])
    assert batch["label"].tolist() == [2, 0, 1]
    assert batch["pid"].tolist() == [3, 1, 2]
    assert batch["index"].tolist() == [2, 0, 1]
    assert batch["label"].dtype == torch.int64


@pytest.mark.skipif(not hasattr(os, "fork"), reason="what is faked here reaches forked workers only")
@pytest.mark.parametrize(("free", "total", "shared"), [(2**30, 2**30, True), (2**26, 2**30, False), (0, 2**26, False)])
def test_workers_leave_a_small_shared_memory_alone(free, total, shared, monkeypatch):
    """In a container with 64 MB, torch's way ends in a worker's traceback, and a parent that waits for ever."""
    sizes = types.SimpleNamespace(f_bavail=free // 4096, f_frsize=4096, f_blocks=total // 4096)
    monkeypatch.setattr(os, "statvfs", lambda path: sizes)
    items = [
        {"clip": torch.rand(i, 3, 4, 2), "flow": torch.rand(i, 2, 4, 2), "mask": torch.ones(i) > 0}
        | {"label": 1, "pid": 2, "camera": 3, "index": i}
        for i in range(1, 5)
    ]
    options = {"batch_size": 2, "collate_fn": collate_clips, "multiprocessing_context": "fork", "num_workers": 2}
    want = [collate_clips(items[:2]), collate_clips(items[2:])]
    got = list(DataLoader(items, **options))
    for batch, right in zip(got, want, strict=True):
        assert type(batch) is dict
        assert list(batch) == list(right)
        assert all(torch.equal(batch[key], right[key]) for key in right)
        assert {tensor.is_shared() for tensor in batch.values()} == {shared}
        batch["clip"] += 1  # writable, as ever


def test_errors():
    with pytest.raises(ValueError, match=r"no class for the identities \[7\]"):
        ClipDataset(TRACKLETS, {pid: pid for pid in range(1, 7)}, Values())
    with pytest.raises(ValueError, match="got 'dense'"):
        dataset(policy="dense")
    with pytest.raises(ValueError, match="'zero'"):
        dataset(fill="zero")
    with pytest.raises(ValueError, match="seed must be 0 or more"):
        dataset(seed=-1)
    with pytest.raises(ValueError, match=r"1 tracklets are junk \(pid -1\).*never trained"):
        ClipDataset([*TRACKLETS, Tracklet([np.zeros((8, 4, 3), np.uint8)], -1)], {**LABELS, -1: 7}, Values())
    with pytest.raises(ValueError, match="labels must be 0 or more, got -1: junk"):
        IdentityBatchSampler([1, 2, -1], 2, 2)
