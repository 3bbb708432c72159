"""The robust means: literal loops, scipy's minimiser, breakdown, invariance, and what they do to foreign frames."""

import math

import numpy as np
import pytest
import torch

from temporal_agg import biweight_mean, create_aggregator, geometric_median, outlier_mask, tracklet_purity
from temporal_agg.aggregators import robust

B, T, C = 3, 9, 4
MASK = torch.tensor(
    [[1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0, 0, 0, 0], [1, 0, 1, 1, 1, 0, 0, 1, 0]], dtype=torch.bool
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def split(x, mask=MASK):
    return [list(clip[real]) for clip, real in zip(x, mask, strict=True)]


def literal_biweight(frames, start, c, rounds):
    centre = start
    for _ in range(rounds):
        distances = [math.dist(f, centre) for f in frames]
        reach = c * sorted(distances)[(len(frames) - 1) // 2]
        weights = [(1 - (d / reach) ** 2) ** 2 if d < reach else float(reach == 0) for d in distances]
        centre = sum(w * f for w, f in zip(weights, frames, strict=True)) / sum(weights)
    return centre, weights


def test_geometric_median_minimises_the_sum_of_distances():
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is the oracle")
    x = random(B, T, C)
    got = geometric_median(x, MASK, rounds=200)
    for frames, median in zip(split(x), got, strict=True):
        points = np.stack([f.numpy() for f in frames])

        def total(c, points=points):
            return np.linalg.norm(points - c, axis=1).sum()

        want = optimize.minimize(total, points.mean(0), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
        assert total(median.numpy()) <= want.fun + 1e-6


@pytest.mark.parametrize("start", ["median", "mean"])
@pytest.mark.parametrize("c", [1.5, 2.0, 4.0])
def test_biweight_mean_is_its_definition(start, c):
    x = random(B, T, C)
    centre, weights = biweight_mean(x, MASK, c, 7, start, return_weights=True)
    starts = geometric_median(x, MASK, 7) if start == "median" else torch.stack([sum(f) / len(f) for f in split(x)])
    for b, frames in enumerate(split(x)):
        if len(frames) == 1:
            want, w = frames[0], [1.0]
        else:
            want, w = literal_biweight(frames, starts[b], c, 7)
        torch.testing.assert_close(centre[b], want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(weights[b, MASK[b]], torch.tensor(w, dtype=torch.float64), rtol=1e-7, atol=1e-9)
        assert weights[b, ~MASK[b]].eq(0).all()


@pytest.mark.parametrize("estimate", [geometric_median, biweight_mean])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_breakdown_point_is_one_half(estimate, dtype):
    """Whatever finite values stand in 4 of 9 frames, the estimate stays near the other five; with 5 it does not."""
    x = random(20, T, C).to(dtype)
    reach = x.norm(dim=2).amax()
    largest = torch.finfo(dtype).max
    for bad in range(1, 5):
        clips = []
        for garbage in (3.0, 1e3, 1e9, -1e18, largest, -largest):
            for places in (torch.ones(bad, C), torch.rand(bad, C)):  # the same one, and several
                clips.append(x.clone())
                clips[-1][:, T - bad :] = garbage * places.to(dtype)
        estimates = estimate(torch.cat(clips)).unflatten(0, (-1, len(x)))
        assert (estimates - x[:, : T - bad].mean(1)).norm(dim=2).max() < 4 * reach
    y = x.clone()
    y[:, 4:] = 1e9
    assert estimate(y).abs().min() > 1e8
    assert biweight_mean(torch.cat([x, x[:, :1] + 1e9], 1), start="mean").isfinite().all()


def test_move_turn_and_stretch_go_through():
    x, shift = random(B, T, C), random(C, seed=1)
    turn = torch.linalg.qr(random(C, C, seed=2)).Q
    for estimate in (geometric_median, biweight_mean):
        want = estimate(x, MASK)
        got = estimate(1e-3 * x @ turn + shift, MASK)
        # The start of the iteration, the median of each channel, does not turn.
        torch.testing.assert_close(got, 1e-3 * want @ turn + shift, rtol=1e-4, atol=1e-6)


def test_equal_frames_and_one_foreign_one():
    x = torch.ones(1, 5, 3)
    x[:, 4] = 7
    for estimate in (geometric_median, biweight_mean):
        torch.testing.assert_close(estimate(x), torch.ones(1, 3), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(estimate(x[:, :4]), torch.ones(1, 3))
    x.requires_grad_()
    biweight_mean(x).square().sum().backward()
    assert x.grad.isfinite().all()


def people(share, seed=0):
    """Unit vectors around one of two people; the given share of each clip's frames is of the other one."""
    g = torch.Generator().manual_seed(seed)
    own, other = torch.randn(16, 1, 32, generator=g), torch.randn(16, 1, 32, generator=g)
    foreign = torch.zeros(16, 20, dtype=torch.bool)
    foreign[:, 3 : 3 + round(20 * share)] = True
    x = torch.where(foreign[..., None], other, own) + 0.3 * torch.randn(16, 20, 32, generator=g)
    return x, foreign, own[:, 0]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.45])
def test_foreign_frames_are_not_believed(share):
    x, foreign, own = people(share)
    details = create_aggregator("robust", 32)(x, return_details=True)
    assert details.frame_weights[foreign].abs().max() < 1e-3
    assert torch.equal(outlier_mask(x, c=2.0), details.frame_weights > 0)
    assert not outlier_mask(x)[foreign].any()
    assert torch.cosine_similarity(details.embedding, own).min() > 0.98
    assert torch.cosine_similarity(create_aggregator("mean", 32)(x), own).min() < 0.98
    keep = outlier_mask(x, ~foreign)
    assert keep[~foreign].float().mean() > 0.9
    assert not keep[foreign].any()


def test_outlier_mask_keeps_half_of_the_real_frames():
    x, mask = torch.randn(50, 7, 5), torch.rand(50, 7) < 0.6
    mask[:, 0] = True
    keep = outlier_mask(x[..., None, None].expand(-1, -1, -1, 3, 2), mask)
    assert torch.equal(keep, outlier_mask(x, mask))
    assert not (keep & ~mask).any()
    assert (2 * keep.sum(1) >= mask.sum(1)).all()


def test_gradients():
    x = random(2, 5, 3).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    for estimate in (geometric_median, biweight_mean):
        assert torch.autograd.gradcheck(lambda x, f=estimate: f(x, mask, rounds=5), x)


def test_errors_say_what_came():
    for wrong, message in (
        ({"c": 1.0}, "c must be above 1, got 1.0"),
        ({"rounds": 0}, "rounds must be from 1 to 1000, got 0"),
        ({"rounds": 1001}, "got 1001"),
        ({"start": "medoid"}, "start must be 'median' or 'mean', got 'medoid'"),
    ):
        with pytest.raises(ValueError, match=message):
            create_aggregator("robust", 8, **wrong)
    with pytest.raises(ValueError, match="c must be a finite number, got nan"):
        create_aggregator("robust", 8, c=float("nan"))


def literal_purity(frames, least):
    """Every way to cut, one after the other."""
    n, found = len(frames), (-math.inf, 1.0, -1, -1)
    frames = [f / f.norm() for f in frames]
    for start in range(1, n):
        for stop in range(start + least, n + 1):
            run, rest = frames[start:stop], frames[:start] + frames[stop:]
            if len(rest) < least:
                continue
            means = [sum(part) / len(part) for part in (run, rest)]
            within = sum(math.dist(f, m) ** 2 for part, m in zip((run, rest), means, strict=True) for f in part)
            if -within > found[0] + 1e-9:
                found = (-within, float(torch.cosine_similarity(*means, dim=0)), start, stop)
    return found[1:]


@pytest.mark.parametrize("pairs", [1 << 22, 50])
@pytest.mark.parametrize("least", [1, 2, 4])
def test_purity_is_its_definition(least, pairs, monkeypatch):
    monkeypatch.setattr(robust, "PAIRS", pairs)
    x = random(6, T, C, seed=3)
    mask = torch.cat([MASK, MASK.flip(1)])
    x[~mask] = float("nan")
    got = tracklet_purity(x, mask, least)
    for b, frames in enumerate(split(x, mask)):
        score, start, stop = literal_purity(frames, least)
        assert got.score[b] == pytest.approx(score, abs=1e-6)
        real = mask[b].nonzero().flatten().tolist()
        assert (got.start[b], got.stop[b]) == ((-1, -1) if start < 0 else (real[start], real[stop - 1] + 1))


def test_purity_knows_a_second_person_and_the_place():
    """The run of another person's frames, to the frame; a track that changes hands does it at ``start``."""
    x, _, _ = people(0.3)
    one, _, _ = people(0.0)
    found = tracklet_purity(x)
    assert found.score.max() < tracklet_purity(one).score.min() - 0.3
    assert set(zip(found.start.tolist(), found.stop.tolist(), strict=True)) == {(3, 9)}
    rolled = tracklet_purity(x.roll(-3, 1))  # the foreign frames come first
    assert set(zip(rolled.start.tolist(), rolled.stop.tolist(), strict=True)) == {(6, 20)}
    torch.testing.assert_close(rolled.score, found.score)
    torch.testing.assert_close(tracklet_purity(7 * x[..., None, None].expand(-1, -1, -1, 3, 2)).score, found.score)
    assert tracklet_purity(x[:, :1].expand(-1, 9, -1)).score.sub(1).abs().max() < 1e-6
    with pytest.raises(ValueError, match="least must be at least 1 frame, got 0"):
        tracklet_purity(x, least=0)
