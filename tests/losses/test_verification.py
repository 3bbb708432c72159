"""The verification loss against a loop over pairs."""

import pytest
import torch
from torch.nn import functional as F

from temporal_agg.losses import VerificationLoss

C = 6
LABELS = torch.tensor([4, 4, 0, 0, 4, 4, 7, 7])  # the person of pairs 0 and 2 is the same
exact = {"rtol": 1e-9, "atol": 1e-9}


@pytest.mark.parametrize("training", [True, False])
def test_equals_the_loop_over_pairs(training):
    torch.manual_seed(0)
    loss = VerificationLoss(C).double().train(training)
    with torch.no_grad():
        for p in loss.parameters():
            p += 0.5 * torch.randn(p.shape, dtype=torch.float64)
        loss.norm.running_mean.uniform_()
        loss.norm.running_var.uniform_(0.5, 1.5)
    mean, var = loss.norm.running_mean.clone(), loss.norm.running_var.clone()
    x = F.normalize(torch.randn(len(LABELS), C, dtype=torch.float64)).requires_grad_()

    pairs = [(j, k) for j in range(0, len(x), 2) for k in range(1, len(x), 2)]
    z = torch.stack([(x[j] - x[k]) ** 2 for j, k in pairs])
    if training:
        batch_mean, batch_var = z.mean(0), z.var(0, unbiased=False)
        want_buffers = 0.9 * mean + 0.1 * batch_mean, 0.9 * var + 0.1 * z.var(0)
    else:
        batch_mean, batch_var = want_buffers = mean, var
    z = (z - batch_mean) / (batch_var + 1e-5).sqrt() * loss.norm.weight + loss.norm.bias
    total = 0
    for (j, k), row in zip(pairs, z, strict=True):
        different, same = (loss.classifier.weight @ row + loss.classifier.bias).exp()
        probability, y = same / (same + different), float(LABELS[j] == LABELS[k])
        total = total - (y * probability.log() + (1 - y) * (1 - probability).log())  # Eq. 11
    want = total / len(pairs)

    got = loss(x, LABELS)
    torch.testing.assert_close(got, want, **exact)
    inputs = [x, *loss.parameters()]
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), **exact)
    torch.testing.assert_close((loss.norm.running_mean, loss.norm.running_var), want_buffers, **exact)


def test_half_precision_input_gives_a_float32_loss():
    loss, x = VerificationLoss(C), F.normalize(torch.randn(len(LABELS), C)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(x, LABELS)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, loss(x.float(), LABELS))


def test_other_batches_than_pairs_are_errors():
    loss = VerificationLoss(C)
    for labels in ([0, 0, 1], [0, 1, 1, 0], []):
        with pytest.raises(ValueError, match=r"batches of pairs.*\[" + ", ".join(map(str, labels))):
            loss(torch.zeros(len(labels), C), torch.tensor(labels, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[4, 6\] and \[2\]"):
        loss(torch.zeros(4, C), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=rf"expected embeddings \[N, {C}\].*got \[2, {C + 1}\]"):
        loss(torch.zeros(2, C + 1), torch.zeros(2, dtype=torch.int64))
