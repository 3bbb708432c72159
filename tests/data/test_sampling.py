import math

import pytest
import torch

from temporal_agg.data import cut_tracklet, sample_frames
from temporal_agg.data.sampling import FILLS, TEST_POLICIES, TRAIN_POLICIES, seeded_generator

SIZES = [(n, length) for n in (1, 2, 3, 5, 8, 9, 13, 16, 17, 40) for length in (1, 2, 4, 8)]


def draw(n, length, policy, fill="repeat", seed=0):
    return sample_frames(n, length, policy, fill=fill, generator=torch.Generator().manual_seed(seed))


def filled(frames, length, fill):
    """Naive: the list of frames, brought to a length."""
    frames, mask = list(frames), [True] * len(frames)
    real = len(frames)
    while len(frames) < length:
        frames.append(frames[len(frames) % real] if fill == "repeat" else frames[real - 1])
        mask.append(fill != "mask")
    return frames, mask


@pytest.mark.parametrize("policy", TRAIN_POLICIES)
@pytest.mark.parametrize("fill", FILLS)
def test_training_clips_have_their_shape_and_short_tracklets_are_filled(policy, fill):
    for n, length in SIZES:
        indices, mask = draw(n, length, policy, fill)
        expected = n if policy == "all" else length
        assert indices.shape == mask.shape == (expected,)
        assert indices.dtype == torch.int64
        assert mask.dtype == torch.bool
        assert indices.min() >= 0
        assert indices.max() < n
        if n < length and policy != "all":
            assert (indices.tolist(), mask.tolist()) == filled(range(n), length, fill)
        else:
            assert mask.all()
            assert (indices.diff() >= 0).all(), "frames are in temporal order"


def test_random_frames_are_distinct_and_all_of_them_occur():
    seen = torch.zeros(13)
    for seed in range(300):
        indices, _ = draw(13, 4, "random", seed=seed)
        assert len(set(indices.tolist())) == 4
        seen[indices] += 1
    assert (seen > 50).all(), "each frame is expected 92 times"


def test_adjacent_frames_start_anywhere():
    starts = {tuple(draw(7, 4, "adjacent", seed=seed)[0].tolist()) for seed in range(100)}
    assert starts == {tuple(range(s, s + 4)) for s in range(4)}


def test_each_window_comes_in_turn():
    for n, length in [(5, 1), (7, 3), (4, 4)]:
        windows = [sample_frames(n, length, "each", number=i)[0].tolist() for i in range(2 * (n - length + 1))]
        assert windows == 2 * [list(range(start, start + length)) for start in range(n - length + 1)]


@pytest.mark.parametrize(("n", "length"), [(n, length) for n, length in SIZES if n >= length])
def test_chunks_give_one_frame_each(n, length):
    """Naive: pad with the last frame to whole chunks, take one frame from each."""
    chunk = math.ceil(n / length)
    padded = list(range(n)) + [n - 1] * (chunk * length - n)
    chunks = [padded[i * chunk : (i + 1) * chunk] for i in range(length)]
    seen = [set() for _ in chunks]
    for seed in range(80):
        for i, index in enumerate(draw(n, length, "chunks", seed=seed)[0].tolist()):
            seen[i].add(index)
    if chunk <= 5:
        assert seen == [set(c) for c in chunks]
    else:
        assert all(s <= set(c) for s, c in zip(seen, chunks, strict=True))
    first, mask = cut_tracklet(n, length, "chunks")
    assert first.tolist() == [[c[0] for c in chunks]]
    assert mask.all()


def test_even_frames_are_the_middles_of_equal_parts():
    assert draw(12, 4, "even")[0].tolist() == [1, 4, 7, 10]
    assert draw(9, 1, "even")[0].tolist() == [4]
    for n, length in SIZES:
        indices, _ = draw(n, length, "even", seed=n)
        if n >= length:
            assert indices.tolist() == [math.floor((i + 0.5) * n / length) for i in range(length)]
            assert torch.equal(cut_tracklet(n, length, "even")[0][0], indices)


def test_all_takes_every_frame():
    assert draw(11, 4, "all")[0].tolist() == list(range(11))
    indices, mask = cut_tracklet(11, 4, "all")
    assert indices.tolist() == [list(range(11))]
    assert mask.all()


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("tail", ["fill", "shift"])
def test_dense_windows_against_a_naive_loop(fill, tail):
    for n, length in SIZES:
        for stride in {1, max(1, length // 2), length}:
            windows, masks, start = [], [], 0
            while True:
                at = max(0, n - length) if tail == "shift" and start + length > n else start
                window, mask = filled(range(at, min(at + length, n)), length, fill)
                windows.append(window)
                masks.append(mask)
                if start + length >= n:
                    break
                start += stride
            indices, mask = cut_tracklet(n, length, "dense", stride=stride, fill=fill, tail=tail)
            assert indices.tolist() == windows, (n, length, stride)
            assert mask.tolist() == masks
            assert set(indices[mask].tolist()) == set(range(n)), "every frame is covered"
            assert indices.dtype == torch.int64
            assert mask.dtype == torch.bool
            assert mask.any(1).all()
    assert torch.equal(cut_tracklet(20, 8)[0], cut_tracklet(20, 8, "dense", stride=8, fill="repeat", tail="fill")[0])


@pytest.mark.parametrize("policy", TEST_POLICIES)
def test_test_clips_of_short_tracklets_are_filled(policy):
    for fill in FILLS:
        indices, mask = cut_tracklet(3, 8, policy, fill=fill)
        assert ([indices[0].tolist()], [mask[0].tolist()]) == (indices.tolist(), mask.tolist())
        expected = (list(range(3)), [True] * 3) if policy == "all" else filled(range(3), 8, fill)
        assert (indices[0].tolist(), mask[0].tolist()) == expected


def test_draws_follow_the_generator_and_leave_the_global_one_alone():
    for policy in TRAIN_POLICIES:
        torch.manual_seed(0)
        state = torch.get_rng_state()
        assert torch.equal(draw(40, 8, policy, seed=5)[0], draw(40, 8, policy, seed=5)[0])
        assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(draw(40, 8, "random", seed=5)[0], draw(40, 8, "random", seed=6)[0])
    draws = {
        tuple(torch.randint(2**40, (2,), generator=seeded_generator(a, b)).tolist()) for a in range(9) for b in (0, 1)
    }
    assert len(draws) == 18


def test_errors():
    with pytest.raises(
        ValueError, match=r"policy must be one of random, adjacent, chunks, even, each, all, got 'dense'"
    ):
        sample_frames(9, 4, "dense")
    with pytest.raises(ValueError, match="policy must be one of dense"):
        cut_tracklet(9, 4, "random")
    with pytest.raises(ValueError, match="fill must be one of repeat, last, mask, got 'zero'"):
        sample_frames(9, 4, fill="zero")
    with pytest.raises(ValueError, match="at least 1, got 0 and 4"):
        sample_frames(0, 4)
    with pytest.raises(ValueError, match="tail must be"):
        cut_tracklet(9, 4, tail="drop")
    with pytest.raises(ValueError, match="would leave frames out"):
        cut_tracklet(9, 4, stride=5)
