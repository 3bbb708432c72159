import math

import pytest
import torch
from torch.nn import functional as F

from temporal_agg.losses import TripletLoss


def batch(labels, D=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.tensor(labels)
    return torch.randn(len(labels), D, generator=g, dtype=torch.float64).requires_grad_(), labels


def naive(x, labels, margin):
    """Eq. 5 of arXiv:1703.07737, anchor by anchor."""
    terms = []
    for a in range(len(x)):
        d = [(x[a] - x[j]).square().sum().sqrt() if j != a else x.new_zeros(()) for j in range(len(x))]
        positives = [d[j] for j in range(len(x)) if j != a and labels[j] == labels[a]]
        negatives = [d[j] for j in range(len(x)) if labels[j] != labels[a]]
        if positives and negatives:
            difference = max(positives) - min(negatives)
            terms.append(F.softplus(difference) if margin is None else (difference + margin).clamp(min=0))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("margin", [0.3, 5.0, None])
@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 2, 3], [4, 4, 4, 4, 7]])
def test_batch_hard_equals_the_loop_with_gradients(margin, labels):
    x, y = batch(labels)
    want = naive(x, y, margin)
    (expected,) = torch.autograd.grad(want, x)
    got = TripletLoss(margin)(x, y)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], expected, rtol=1e-9, atol=1e-9)


def test_batch_hard_agrees_with_pytorch_metric_learning():
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import BatchHardMiner

    x, y = batch([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], D=16)
    other = TripletMarginLoss(margin=20.0)  # a margin at which every triplet is active: its mean skips inactive ones
    other.distance.normalize_embeddings = False
    miner = BatchHardMiner()
    miner.distance.normalize_embeddings = False
    torch.testing.assert_close(TripletLoss(20.0)(x, y), other(x, y, miner(x, y)))


@pytest.mark.parametrize("mining", ["hard", "random"])
@pytest.mark.parametrize("margin", [0.3, None])
@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 1, 2], [5]], ids=["one identity", "one sample each", "one sample"])
def test_a_batch_without_a_triplet_gives_a_differentiable_zero(mining, margin, labels):
    x, y = batch(labels)
    loss = TripletLoss(margin, mining)(x, y)
    loss.backward()
    assert loss == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_identical_embeddings_have_finite_gradients():
    x = torch.ones(6, 4, requires_grad=True)
    loss = TripletLoss(0.3)(x, torch.tensor([0, 0, 1, 1, 2, 2]))
    loss.backward()
    assert math.isclose(loss.item(), 0.3, rel_tol=1e-6)
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.slow
def test_random_mining_draws_every_triplet_evenly_and_from_its_generator():
    x = torch.tensor([[0.0], [1.0], [3.0], [100.0], [200.0]])
    y = torch.tensor([0, 0, 0, 1, 2])
    loss = TripletLoss(1e4, "random", torch.Generator().manual_seed(3))
    values = torch.stack([loss(x, y) for _ in range(4000)]) - 1e4
    # The mean over each anchor's positives minus the mean over its negatives; anchors 3 and 4 have no positive.
    d = (x - x.T).abs()
    positives, negatives = torch.tensor([2.0, 1.5, 2.5]), d[:3, 3:].mean(1)
    assert abs(values.mean() - (positives - negatives).mean()) < 2.5  # standard error about 0.5
    again = TripletLoss(1e4, "random", torch.Generator().manual_seed(3))
    assert torch.equal(torch.stack([again(x, y) for _ in range(5)]) - 1e4, values[:5])


def test_float16_embeddings_are_measured_in_float32():
    x = torch.tensor([[300.0, 0.0], [0.0, 0.0], [0.0, 400.0], [0.0, 0.0]], dtype=torch.float16)
    loss = TripletLoss(0.0)(x, torch.tensor([0, 0, 1, 1]))
    assert loss.dtype == torch.float32
    assert loss == 175.0  # the four anchors: 300 - 300, 300 - 0, 400 - 400, 400 - 0


def test_cosine_distance():
    x, labels = torch.randn(6, 5).double(), torch.tensor([0, 0, 1, 1, 2, 2])
    terms = []
    for i in range(6):
        d = [1 - float(torch.cosine_similarity(x[i], x[j], dim=0)) for j in range(6)]
        farthest = max(d[j] for j in range(6) if j != i and labels[j] == labels[i])
        terms.append(max(0.0, 0.3 + farthest - min(d[j] for j in range(6) if labels[j] != labels[i])))
    assert float(TripletLoss(distance="cosine")(x, labels)) == pytest.approx(sum(terms) / 6, rel=1e-9)
    torch.testing.assert_close(
        TripletLoss(distance="cosine")(7 * x, labels), TripletLoss(distance="cosine")(x, labels), rtol=1e-9, atol=1e-9
    )
    for margin in (float("nan"), float("inf"), -0.1):
        with pytest.raises(ValueError, match="margin must be a number of at least 0, or None"):
            TripletLoss(margin)
    with pytest.raises(ValueError, match="'euclidean' or 'cosine', got 'dot'"):
        TripletLoss(distance="dot")
