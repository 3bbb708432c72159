"""The criteria of LOGA and GLTR against loops over anchors and classes."""

import pytest
import torch
from torch import nn

from temporal_agg import Details, create_aggregator, create_criterion

N, CLASSES = 8, 5
LABELS = torch.tensor([0, 0, 3, 3, 1, 1, 4, 4])
exact = {"rtol": 1e-9, "atol": 1e-9}


def prepared(name, **options):
    torch.manual_seed(0)
    aggregator = create_aggregator(name, 6)
    criterion = create_criterion(name, CLASSES, aggregator, **options).double()
    x = torch.randn(N, aggregator.num_features, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        for p in criterion.parameters():
            p += 0.3 * torch.randn(p.shape, dtype=torch.float64)
    mask = torch.ones(N, 1, dtype=torch.bool)
    return criterion, x, Details(x, mask, mask.double(), {}, {})


def literal_cross_entropy(classifier, x):
    total = 0
    for row, label in zip(x, LABELS, strict=True):
        logits = [w @ row + b for w, b in zip(classifier.weight, classifier.bias, strict=True)]
        total = total - (logits[label].exp() / sum(z.exp() for z in logits)).log()  # Eq. 10
    return total / N


@pytest.mark.parametrize("mining", ["random", "hard"])
def test_loga(mining):
    """Two clips of each identity: one positive. Random: the loss is one that some choice of negatives gives."""
    generator = torch.Generator().manual_seed(3)
    criterion, x, details = prepared("loga", mining=mining, generator=generator)
    terms = criterion(details, LABELS)
    assert set(terms) == {"cross_entropy", "triplet", "loss"}
    torch.testing.assert_close(terms["cross_entropy"], literal_cross_entropy(criterion.classifier, x), **exact)
    torch.testing.assert_close(terms["loss"], terms["cross_entropy"] + terms["triplet"], **exact)  # Eq. 12
    per_anchor = []
    for i in range(N):
        d = [(x[i] - x[j]).square().sum().sqrt() for j in range(N) if LABELS[j] != LABELS[i]]
        positive = (x[i] - x[i ^ 1]).square().sum().sqrt()
        per_anchor.append(torch.stack([(0.3 + positive - z).clamp(min=0) for z in d]))  # Eq. 11
    worst = sum(t.max() for t in per_anchor) / N
    if mining == "hard":
        torch.testing.assert_close(terms["triplet"], worst, **exact)
    else:
        assert terms["triplet"] < worst
        draws = torch.stack([criterion(details, LABELS)["triplet"] for _ in range(400)]).detach()
        expected = sum(t.mean() for t in per_anchor) / N
        assert abs(draws.mean() - expected) < 4 * draws.std() / 20
        generator.manual_seed(3)
        assert criterion(details, LABELS)["triplet"] == terms["triplet"]


def test_loga_gradients():
    criterion, x, details = prepared("loga", mining="hard")
    parameters = [x, *criterion.parameters()]
    got = torch.autograd.grad(criterion(details, LABELS)["loss"], parameters)
    triplet = 0
    for i in range(N):
        nearest = torch.stack([(x[i] - x[j]).norm() for j in range(N) if LABELS[j] != LABELS[i]]).min()
        triplet = triplet + (0.3 + (x[i] - x[i ^ 1]).norm() - nearest).clamp(min=0) / N
    want = torch.autograd.grad(literal_cross_entropy(criterion.classifier, x) + triplet, parameters)
    torch.testing.assert_close(got, want, **exact)


def test_gltr():
    criterion, x, details = prepared("gltr")
    terms = criterion(details, LABELS)
    assert set(terms) == {"cross_entropy", "loss"}
    want = literal_cross_entropy(criterion.classifier, x)
    parameters = [x, *criterion.parameters()]
    torch.testing.assert_close(terms["loss"], want, **exact)
    torch.testing.assert_close(
        torch.autograd.grad(terms["loss"], parameters), torch.autograd.grad(want, parameters), **exact
    )


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_gltr_released_head(train):
    criterion, x, details = prepared("gltr_released")
    assert [type(layer) for layer in criterion.classifier] == [nn.BatchNorm1d, nn.ReLU, nn.Dropout, nn.Linear]
    norm, _, dropout, linear = criterion.train(train).classifier
    assert (norm.num_features, dropout.p, linear.out_features) == (512, 0.5, CLASSES)
    torch.manual_seed(7)
    got = criterion(details, LABELS)["loss"]
    mean, var = (x.mean(0), x.var(0, unbiased=False)) if train else (torch.zeros_like(x[0]), torch.ones_like(x[0]))
    y = ((x - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias).clamp(min=0)
    if train:
        torch.manual_seed(7)
        kept = nn.functional.dropout(torch.ones_like(y))  # 0 or 2
        assert abs((kept == 0).double().mean() - 0.5) < 0.05
        y = y * kept
    torch.testing.assert_close(got, literal_cross_entropy(linear, y), **exact)


@pytest.mark.parametrize("name", ["loga", "gltr", "gltr_released"])
def test_training_starts_at_uniform_and_comes_down(name):
    torch.manual_seed(0)
    aggregator = create_aggregator(name, 6)
    criterion = create_criterion(name, CLASSES, aggregator)
    centres = torch.randn(CLASSES, 1, 6)
    T = aggregator.clip_length or 4
    images = {"frames": torch.randn(N, T, 3, 8, 4)} if aggregator.needs_frames else {}
    optimizer = torch.optim.Adam([*aggregator.parameters(), *criterion.parameters()], 3e-3)
    losses = []
    for _ in range(60):
        features = centres[LABELS] + 0.1 * torch.randn(N, T, 6)
        terms = criterion(aggregator(features, return_details=True, **images), LABELS)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(terms["cross_entropy"].item())
        if losses[-1] < 0.5 * losses[0]:
            break
    assert abs(losses[0] - torch.tensor(CLASSES).log()) < 0.1
    assert losses[-1] < 0.5 * losses[0]
