from collections import Counter

import pytest
import torch

from temporal_agg.data import Draw, IdentityBatchSampler, PairBatchSampler, TrackletBatchSampler

# Identity i has i + 1 tracklets, in cameras 0, 1, 2, 0, 1, ...
LABELS = [10 + i for i in range(7) for _ in range(i + 1)]
CAMERAS = [j % 3 for i in range(7) for j in range(i + 1)]


def batches(epoch=0, **kwargs):
    sampler = IdentityBatchSampler(LABELS, kwargs.pop("P", 3), kwargs.pop("K", 4), **kwargs)
    sampler.set_epoch(epoch)
    out = list(sampler)
    assert len(out) == len(sampler)
    return out


def test_batches_are_p_times_k_and_every_identity_comes():
    for epoch in range(5):
        out = batches(epoch, cameras=CAMERAS)
        assert len(out) == 3
        seen = Counter()
        for batch in out:
            counts = Counter(LABELS[draw.index] for draw in batch)
            assert len(counts) == 3, "P distinct identities"
            assert set(counts.values()) == {4}, "K clips each"
            labels = [LABELS[draw.index] for draw in batch]
            assert labels == [label for label in dict.fromkeys(labels) for _ in range(4)], "an identity's clips adjoin"
            seen.update(counts.keys())
        assert set(seen) == set(LABELS)
        assert max(seen.values()) <= 2


def test_tracklets_are_drawn_without_replacement_and_repeated_evenly():
    for epoch in range(20):
        for batch in batches(epoch):
            for label in {LABELS[d.index] for d in batch}:
                own = Counter(d.index for d in batch if LABELS[d.index] == label)
                size = LABELS.count(label)
                assert len(own) == min(size, 4)
                assert max(own.values()) - min(own.values()) <= 1


def test_no_draw_comes_twice_in_an_epoch():
    for epoch in range(5):
        draws = [draw for batch in batches(epoch) for draw in batch]
        assert len(set(draws)) == len(draws)
        assert all(isinstance(draw, Draw) and draw.epoch == epoch for draw in draws)
        numbers = {}
        for draw in draws:
            numbers.setdefault(draw.index, []).append(draw.number)
        assert all(own == list(range(len(own))) for own in numbers.values())


def test_distinct_cameras_come_first():
    seen = set()
    for epoch in range(20):
        for batch in batches(epoch, K=3, cameras=CAMERAS):
            for label in {LABELS[d.index] for d in batch}:
                own = [d.index for d in batch if LABELS[d.index] == label]
                assert len({CAMERAS[i] for i in own}) == min(3, LABELS.count(label))
                seen.update(own)
    assert seen == set(range(len(LABELS))), "the preference shuts no tracklet out"
    uneven = IdentityBatchSampler([0] * 8 + [1], 2, 2, cameras=[5] * 7 + [6] + [5])
    for epoch in range(10):
        uneven.set_epoch(epoch)
        assert 7 in {draw.index for batch in uneven for draw in batch}, "the one tracklet of the other camera"


def test_order_is_a_function_of_seed_and_epoch():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert batches(3) == batches(3)
    assert batches(3) != batches(4)
    assert batches(3) != batches(3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    sampler = IdentityBatchSampler(LABELS, 3, 4)
    assert list(sampler) == list(sampler) == batches(0)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_global_batches(world_size):
    for epoch in range(3):
        whole = batches(epoch, P=4, K=2, cameras=CAMERAS)
        shares = [
            batches(epoch, P=4, K=2, cameras=CAMERAS, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        assert len({len(share) for share in shares}) == 1
        assert [[draw for part in parts for draw in part] for parts in zip(*shares, strict=True)] == whole


def test_errors_say_what_to_change():
    with pytest.raises(ValueError, match=r"which has 7: lower identities_per_batch"):
        IdentityBatchSampler(LABELS, 8, 4)
    with pytest.raises(ValueError, match="multiple of world_size = 2"):
        IdentityBatchSampler(LABELS, 3, 4, world_size=2)
    with pytest.raises(ValueError, match="rank must be 0 to world_size - 1 = 1, got 2"):
        IdentityBatchSampler(LABELS, 4, 4, rank=2, world_size=2)
    with pytest.raises(ValueError, match="one camera for each of the 28 labels, got 27"):
        IdentityBatchSampler(LABELS, 4, 4, cameras=CAMERAS[1:])
    with pytest.raises(ValueError, match="at least 1"):
        IdentityBatchSampler(LABELS, 4, 0)


# People 0 to 3: cameras 0, 0, 1; camera 2 twice; one tracklet; cameras 0, 1, 2.
PAIR_LABELS = [0, 0, 0, 1, 1, 2, 3, 3, 3]
PAIR_CAMERAS = [0, 0, 1, 2, 2, 0, 0, 1, 2]
PARTNERS = [{2}, {2}, {0, 1}, {4}, {3}, {5}, {7, 8}, {6, 8}, {6, 7}]


def pairs(epoch=0, N=4, cameras=PAIR_CAMERAS, **kwargs):
    sampler = PairBatchSampler(PAIR_LABELS, N, cameras=cameras, **kwargs)
    sampler.set_epoch(epoch)
    out = list(sampler)
    assert len(out) == len(sampler)
    return out


def test_every_tracklet_comes_once_as_an_anchor():
    """Nine anchors in batches of four: the last batch ends with the first three again."""
    for epoch in range(10):
        out = pairs(epoch)
        assert [len(batch) for batch in out] == [8, 8, 8]
        anchors = [draw.index for batch in out for draw in batch[::2]]
        assert sorted(anchors[:9]) == list(range(9))
        assert anchors[9:] == anchors[:3]


def test_partners_are_the_same_person_in_another_camera_where_there_is_one():
    seen = [set() for _ in PAIR_LABELS]
    for epoch in range(50):
        for batch in pairs(epoch):
            for anchor, partner in zip(batch[::2], batch[1::2], strict=True):
                seen[anchor.index].add(partner.index)
    assert seen == PARTNERS, "all that are allowed, and no other"
    seen = [set() for _ in PAIR_LABELS]
    for epoch in range(50):
        for batch in pairs(epoch, cameras=None):
            for anchor, partner in zip(batch[::2], batch[1::2], strict=True):
                seen[anchor.index].add(partner.index)
    others = [{j for j, b in enumerate(PAIR_LABELS) if b == a and j != i} or {i} for i, a in enumerate(PAIR_LABELS)]
    assert seen == others


def test_no_clip_comes_twice_in_an_epoch_of_pairs():
    for epoch in range(5):
        draws = [draw for batch in pairs(epoch) for draw in batch]
        assert len(set(draws)) == len(draws)
        assert all(draw.epoch == epoch for draw in draws)


@pytest.mark.parametrize("clips", [[1] * 9, [3, 1, 0, 5, 2]], ids=["one clip each", "frames"])
def test_every_clip_of_every_tracklet_comes_once(clips):
    want = [(index, number) for index, n in enumerate(clips) for number in range(n)]
    sampler = TrackletBatchSampler(clips, 4)
    orders = set()
    for epoch in range(10):
        sampler.set_epoch(epoch)
        out = list(sampler)
        assert [len(batch) for batch in out] == [4] * len(sampler) == [4] * -(-len(want) // 4)
        draws = [draw for batch in out for draw in batch]
        assert sorted((draw.index, draw.number) for draw in draws[: len(want)]) == want
        assert draws[len(want) :] == draws[: -len(want) % 4]
        assert {draw.epoch for draw in draws} == {epoch}
        orders.add(tuple((draw.index, draw.number) for draw in draws))
    assert len(orders) == 10


SAMPLERS = {
    "pairs": lambda **kwargs: PairBatchSampler(PAIR_LABELS, 4, cameras=PAIR_CAMERAS, **kwargs),
    "tracklets": lambda **kwargs: TrackletBatchSampler([2] * 9, 4, **kwargs),
}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_the_other_samplers_are_functions_of_seed_and_epoch(kind):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, other = SAMPLERS[kind](), SAMPLERS[kind](seed=1)
    first = list(one)
    assert first == list(one) == list(SAMPLERS[kind]())
    assert first != list(other)
    one.set_epoch(1)
    assert [[draw._replace(epoch=0) for draw in batch] for batch in one] != first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_other_samplers_batches(kind, world_size):
    whole = list(SAMPLERS[kind]())
    shares = [list(SAMPLERS[kind](rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert [[draw for part in parts for draw in part] for parts in zip(*shares, strict=True)] == whole
    size = len(whole[0]) // world_size
    assert all(len(batch) == size for share in shares for batch in share)
    if kind == "pairs":
        assert all(
            PAIR_LABELS[a.index] == PAIR_LABELS[b.index]
            for share in shares
            for batch in share
            for a, b in zip(batch[::2], batch[1::2], strict=True)
        )


def test_errors_of_the_other_samplers():
    with pytest.raises(ValueError, match=r"needs as many tracklets in the training set, which has 9: lower pairs_per"):
        PairBatchSampler(PAIR_LABELS, 10)
    with pytest.raises(ValueError, match="pairs_per_batch = 3 must be a multiple of world_size = 2"):
        PairBatchSampler(PAIR_LABELS, 3, world_size=2)
    with pytest.raises(ValueError, match="one camera for each of the 9 labels, got 8"):
        PairBatchSampler(PAIR_LABELS, 3, cameras=PAIR_CAMERAS[1:])
    with pytest.raises(ValueError, match="which has 5: lower batch_size"):
        TrackletBatchSampler([2, 3], 6)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        TrackletBatchSampler([2, 3], 0)
