import math

import pytest
import torch

from temporal_agg import Details, create_aggregator, create_criterion
from temporal_agg.losses import PyramidRankingLoss, TripletLoss

LABELS = torch.tensor([0, 0, 1, 1, 0])


def maps(height, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(5, 4, 6, height, 3, generator=g, dtype=dtype)


def literal(features, labels, mask, margin):
    """Equations 9 and 10, index by index; the printed sums over L and their 1 / L are kept."""
    B, _, _, H, _ = features.shape
    G = (1, 2, 4)
    total = 0
    for j in range(B):
        for stripes in G:
            for z in range(stripes):
                rows = slice(z * H // stripes, math.ceil((z + 1) * H / stripes))
                clips = []  # per clip, the sum over its L frames of F_Ta + F_Tm
                for b in range(B):
                    frames = [f[:, rows].mean((1, 2)) for f, real in zip(features[b], mask[b], strict=True) if real]
                    average = sum(frames) / len(frames)
                    highest = torch.stack(frames).max(0).values
                    clips.append((sum((average + highest) for _ in frames), len(frames)))

                def distance(a, b, clips=clips):
                    return (clips[a][0] / clips[a][1] - clips[b][0] / clips[b][1]).square().sum().sqrt()

                positives = [distance(j, b) for b in range(B) if b != j and labels[b] == labels[j]]
                negatives = [distance(j, b) for b in range(B) if labels[b] != labels[j]]
                total = total + (margin + max(positives) - min(negatives)).clamp(min=0) / stripes
    return total / (B * len(G))


@pytest.mark.parametrize("height", [8, 7, 3], ids=["divides", "does not divide", "less than the stripes"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_equals_the_equations(height, masked):
    mask = torch.rand(5, 4, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else torch.ones(5, 4) > 0
    mask[:, 1] = True
    x, y = maps(height).requires_grad_(), maps(height).requires_grad_()
    filled = x.masked_fill(~mask[..., None, None, None], float("nan"))  # what padding holds does not matter
    got = PyramidRankingLoss(0.5)(filled, LABELS, mask if masked else None)
    want = literal(y, LABELS, mask, 0.5)
    assert want > 0.1
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    got.backward()
    want.backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("labels", [(0, 0, 0, 0, 0), (0, 1, 2, 3, 4)], ids=["one identity", "no positives"])
def test_without_triplets_it_is_a_differentiable_zero(labels):
    x = maps(8).requires_grad_()
    loss = PyramidRankingLoss()(x, torch.tensor(labels))
    loss.backward()
    assert loss == 0
    assert x.grad.eq(0).all()


def test_half_precision_maps_are_pooled_in_float32():
    x = maps(8, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = PyramidRankingLoss()(x, LABELS)
    torch.testing.assert_close(got, PyramidRankingLoss()(x.float(), LABELS), rtol=0, atol=0)


def test_errors():
    with pytest.raises(ValueError, match=r"labels \[B\], got \[5, 4, 6, 8, 3\] and \[4\]"):
        PyramidRankingLoss()(maps(8), LABELS[:4])
    with pytest.raises(ValueError, match=r"mask must have the shape \[B, T\] = \[5, 4\], got \[5, 3\]"):
        PyramidRankingLoss()(maps(8), LABELS, torch.ones(5, 3, dtype=torch.bool))


@pytest.mark.parametrize("name", ["star", "gsta"])
def test_the_criterion_of_star(name):
    aggregator = create_aggregator("gsta", 6, hidden_features=4)
    criterion = create_criterion(name, 2, aggregator)
    mask = torch.tensor([[True, False, True, True]] * 5)
    details = aggregator(maps(8, torch.float32), mask, return_details=True)
    assert isinstance(details, Details)
    terms = criterion(details, LABELS)
    logits = details.embedding @ criterion.classifier.weight.T
    want = -logits.log_softmax(1).gather(1, LABELS[:, None]).mean()
    torch.testing.assert_close(terms["cross_entropy"], want)
    torch.testing.assert_close(terms["triplet"], TripletLoss(0.4)(details.embedding, LABELS))
    torch.testing.assert_close(terms["pyramid"], literal(maps(8, torch.float32), LABELS, mask, 0.4))
    total = terms["cross_entropy"] + terms["triplet"] + 0.1 * terms["pyramid"]
    torch.testing.assert_close(terms["loss"], total)
    without = create_criterion(name, 2, aggregator, pyramid_weight=0.0)(details._replace(supervised={}), LABELS)
    assert set(without) == {"cross_entropy", "triplet", "loss"}
    torch.testing.assert_close(without["loss"], without["cross_entropy"] + terms["triplet"])
