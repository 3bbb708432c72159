"""What a mask means."""

import pytest
import torch
from torch import nn

from temporal_agg import masked

exact = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 2)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_masked_batch_norm_is_batch_norm_over_the_real_entries(shape, bias):
    """Outputs, gradients and, over several steps, running statistics, all in float64."""
    ours, torchs = masked.BatchNorm(4, bias=bias).double(), (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(4)
    torchs.double()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        mask = torch.rand(3, 5, generator=generator) < 0.6
        x = torch.randn(3, 5, *shape[1:], generator=generator, dtype=torch.float64) * 3 + 7
        x.masked_fill_(~mask.view(3, 5, *[1] * (len(shape) - 1)), 1e3)
        x.requires_grad_()
        got, want = ours(x, mask)[mask], torchs(x[mask])
        torch.testing.assert_close(got, want, **exact)
        got, want = (torch.autograd.grad(y.pow(3).sum(), x)[0] for y in (got, want))
        torch.testing.assert_close(got[mask], want[mask], rtol=1e-9, atol=1e-9)
    assert not bias or set(ours.state_dict()) == set(torchs.state_dict())
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, torchs.state_dict()[key], **exact)
    torch.testing.assert_close(ours.eval()(x[mask]), torchs.eval()(x[mask]), **exact)


def test_masked_batch_norm_without_a_real_entry_learns_nothing():
    norm = masked.BatchNorm(4)
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    assert norm(torch.randn(3, 5, 4), torch.zeros(3, 5, dtype=torch.bool)).isfinite().all()
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
