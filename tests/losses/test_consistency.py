import pytest
import torch

from temporal_agg.losses import ConsistencyLoss

B, T, N, C = 3, 4, 2, 5
LABELS = torch.tensor([1, 3, 1])
MASK = torch.tensor([[False, True, True, False], [True, True, True, True], [False, False, False, True]])


def regions_and_loss(num_classes):
    torch.manual_seed(0)
    loss = ConsistencyLoss(num_classes, N, C).double()
    if num_classes is not None:
        assert not loss.centres.any()
        loss.centres.data = torch.randn(num_classes, N, C, dtype=torch.float64)
    return torch.randn(B, T, N, C, dtype=torch.float64, requires_grad=True), loss


def literal(regions, mask, centres=None):
    """Eqs. 3 and 12."""
    total = 0
    for b in range(B):
        frames = [regions[b, t] for t in range(T) if mask[b, t]]
        for i in range(N):
            centre = sum(f[i] for f in frames) / len(frames) if centres is None else centres[LABELS[b], i]
            for f in frames:
                total = total + sum((f[i, c] - centre[c]) ** 2 for c in range(C))
    return total / B


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("num_classes", [4, None], ids=["learned", "own mean"])
def test_is_the_literal_form(num_classes, masked):
    regions, loss = regions_and_loss(num_classes)
    want = literal(regions, MASK if masked else torch.ones(B, T, dtype=torch.bool), loss.centres)
    got = loss(regions, LABELS, MASK if masked else None)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    to = [regions, *loss.parameters()]
    assert len(to) == (1 if num_classes is None else 2)
    for a, b in zip(torch.autograd.grad(got, to), torch.autograd.grad(want, to), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_classes", [4, None], ids=["learned", "own mean"])
def test_padding_may_hold_anything(num_classes):
    regions, loss = regions_and_loss(num_classes)
    garbage = regions.detach().masked_fill(~MASK[..., None, None], float("nan")).requires_grad_()
    value = loss(garbage, LABELS, MASK)
    torch.testing.assert_close(value, loss(regions, LABELS, MASK))
    value.backward()
    assert garbage.grad.isfinite().all()
    assert (garbage.grad[~MASK] == 0).all()


def test_half_precision_is_summed_in_float32():
    regions, loss = regions_and_loss(4)
    half = regions.detach().bfloat16()
    value = loss.float()(half, LABELS, MASK)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(half.float(), LABELS, MASK), rtol=0, atol=0)


def test_errors_say_what_came():
    regions, loss = regions_and_loss(4)
    with pytest.raises(ValueError, match=r"\[3, 4, 2, 5\] and \[2\]"):
        loss(regions, LABELS[:2])
    with pytest.raises(ValueError, match=r"for regions \[B, T, 2, 5\], got \[3, 4, 1, 5\]"):
        loss(regions[:, :, :1], LABELS)
    with pytest.raises(ValueError, match="got 0, 2, 5"):
        ConsistencyLoss(0, N, C)
