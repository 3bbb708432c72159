"""What a mask means."""

import copy

import pytest
import torch
from torch import nn
from versions import needs_exporter

from temporal_agg import create_aggregator, masked

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_masked_batch_norm_in_half_precision(dtype):
    """Every parameter and buffer in half precision: computed in float32, in both modes, and the statistics move."""
    norm = masked.BatchNorm(4)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand(4) + 0.5)
    norm.to(dtype)
    same = copy.deepcopy(norm).float()
    x, mask = torch.randn(3, 5, 4).to(dtype), torch.rand(3, 5) < 0.6
    for train in (False, True):
        got, want = norm.train(train)(x, mask), same.train(train)(x.float(), mask)
        assert got.dtype == dtype
        torch.testing.assert_close(got, want.to(dtype))
    torch.testing.assert_close(norm.running_mean, same.running_mean.to(dtype), rtol=0.01, atol=0.01)


def test_not_compiling():
    """Also where torch has no torch.compiler (2.0), or one without the question (2.1)."""
    assert masked.is_compiling() is False


@needs_exporter
def test_compiling():
    seen = torch.compile(lambda x: x + int(masked.is_compiling()), backend="eager", fullgraph=True)(torch.zeros(()))
    assert seen == 1


def test_a_mask_of_another_kind_gets_help():
    x = torch.rand(2, 3, 8)
    mean = create_aggregator("mean", 8)
    with pytest.raises(TypeError, match=r"got list; for the clips' lengths: torch.arange\(3\) < torch.as_tensor"):
        mean(x, [3, 2])
    with pytest.raises(TypeError, match=r"got torch.int64; for the clips' lengths: torch.arange\(3\)"):
        mean(x, torch.tensor([3, 2]))
    with pytest.raises(TypeError, match=r"got torch.float32; use mask.bool\(\)"):
        mean(x, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\[B, T\] = \[2, 3\], got \[1, 3\]"):
        mean(x, torch.ones(1, 3, dtype=torch.bool))
