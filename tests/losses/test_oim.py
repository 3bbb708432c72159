"""OIM against a loop over samples, one table row at a time."""

import pytest
import torch
from torch.nn import functional as F

from temporal_agg.losses import OIMLoss

N, D, CLASSES = 12, 6, 5
LABELS = torch.tensor([3, 0, 3, 3, 1, 0, 4, 3, 1, 1, 0, 3])  # identity 2 never comes
exact = {"rtol": 1e-9, "atol": 1e-9}


def unit(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=-1).requires_grad_()


def table_loss(**options):
    """A loss whose table is filled, but for the row of identity 0."""
    loss = OIMLoss(CLASSES, D, **options).double()
    loss.table[1:] = unit(CLASSES - 1, D, seed=9).detach()
    return loss


def literal_loss(table, x, labels, scale=30.0):
    total = 0
    for row, label in zip(x, labels.tolist(), strict=True):
        logits = [scale * (row @ w) for w in table]
        total = total - (logits[label] - torch.stack(logits).exp().sum().log())
    return total / len(x)


def literal_update(table, x, labels, momentum=0.5):
    table = table.clone()
    for row, label in zip(x.detach(), labels.tolist(), strict=True):
        table[label] = momentum * table[label] + (1 - momentum) * row
        table[label] /= table[label].norm()
    return table


def test_two_steps_equal_the_loop():
    loss = table_loss(scale=10.0, momentum=0.7)
    for step in range(2):
        x, table = unit(N, D, seed=step), loss.table.clone()
        got = loss(x, LABELS)
        want = literal_loss(table, x, LABELS, 10.0)
        torch.testing.assert_close(got, want, **exact)
        torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x), **exact)
        assert torch.equal(loss.table, table), "the table must not change before after_step"
        loss.after_step()
        torch.testing.assert_close(loss.table, literal_update(table, x, LABELS, 0.7), **exact)
        assert torch.equal(loss.table[2], table[2])
    before = loss.table.clone()
    loss.after_step()
    assert torch.equal(loss.table, before), "samples must be taken up once"


def test_starts_at_zero_and_is_a_buffer():
    loss = OIMLoss(CLASSES, D)
    assert list(loss.state_dict()) == ["table"]
    assert not list(loss.parameters())
    torch.testing.assert_close(loss(unit(N, D).float(), LABELS), torch.tensor(float(CLASSES)).log())
    loss.after_step()
    torch.testing.assert_close(loss.table.norm(dim=1), torch.tensor([1.0, 1, 0, 1, 1]))


def test_masked_samples_enter_neither_loss_nor_table():
    x, mask = unit(N, D), torch.arange(N) % 3 != 1
    loss, short = table_loss(), table_loss()
    bad = torch.where(mask[:, None], x, float("nan"))
    got, want = loss(bad, LABELS, mask), short(x[mask], LABELS[mask])
    torch.testing.assert_close(got, want, **exact)
    for part in (loss, short):
        part.after_step()
    torch.testing.assert_close(loss.table, short.table, **exact)
    table = loss.table.clone()
    assert loss(x, LABELS, torch.zeros(N, dtype=torch.bool)) == 0
    loss.after_step()
    assert torch.equal(loss.table, table)


def test_gradient_accumulation_is_exact():
    """Parts of a batch, one after the other, are the batch: same losses, same table; with two turns as well."""
    x, y = unit(N, D), unit(N, D, seed=1)
    whole, parts = table_loss(), table_loss()
    want = whole(y, LABELS, turn=1) + whole(x, LABELS, turn=0)
    got = 0
    for i in range(0, N, 4):
        piece = slice(i, i + 4)
        got = got + (parts(x[piece], LABELS[piece], turn=0) + parts(y[piece], LABELS[piece], turn=1)) / 3
    torch.testing.assert_close(got, want, **exact)
    torch.testing.assert_close(torch.autograd.grad(got, (x, y)), torch.autograd.grad(want, (x, y)), **exact)
    table = literal_update(literal_update(whole.table, x, LABELS), y, LABELS)
    for loss in (whole, parts):
        loss.after_step()
        torch.testing.assert_close(loss.table, table, **exact)


def test_evaluation_leaves_the_table_alone():
    loss = table_loss().eval()
    table = loss.table.clone()
    loss(unit(N, D), LABELS)
    loss.after_step()
    assert torch.equal(loss.table, table)


def test_half_precision_input_gives_a_float32_loss():
    loss = OIMLoss(CLASSES, D)
    loss.table.copy_(unit(CLASSES, D, seed=9))
    x = unit(N, D).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(x, LABELS)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, literal_loss(loss.table, x.float(), LABELS))


def test_errors_say_what_came():
    for options in ({"scale": 0}, {"scale": float("nan")}, {"momentum": 1.1}, {"momentum": float("nan")}):
        with pytest.raises(ValueError, match="scale must be above 0 and momentum a share"):
            OIMLoss(CLASSES, D, **options)
    loss, x = OIMLoss(CLASSES, D), torch.zeros(N, D)
    with pytest.raises(ValueError, match=rf"embeddings \[N, {D}\].*got \[12, 5\]"):
        loss(x[:, 1:], LABELS)
    with pytest.raises(ValueError, match=r"got \[12, 6\], \[11\]"):
        loss(x, LABELS[1:])
    with pytest.raises(ValueError, match=r"\[12\] and \[3\]"):
        loss(x, LABELS, torch.ones(3, dtype=torch.bool))


def test_turns_of_single_samples_and_the_table_ahead():
    """Samples enter by their turn. With ``ahead`` the value is that of the table as it stood, and the gradient that of
    the table as the samples remembered so far will leave it."""
    loss, early, x = table_loss(), unit(N, D), unit(N, D, seed=1)
    table, turns = loss.table.clone(), torch.arange(N) % 2
    loss(early, LABELS, turn=turns)
    got = loss(x, LABELS, turn=turns + 2, ahead=True)
    torch.testing.assert_close(got, literal_loss(table, x, LABELS), **exact)
    order = turns.argsort(stable=True)
    ahead = literal_update(table, early[order], LABELS[order])
    shares = [
        (30 * (row @ table.T)).softmax(0) - F.one_hot(label, CLASSES) for row, label in zip(x, LABELS, strict=True)
    ]
    want = torch.stack([30 / N * (share @ ahead) for share in shares])
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], want, **exact)
    loss.after_step()
    torch.testing.assert_close(loss.table, literal_update(ahead, x[order], LABELS[order]), **exact)
