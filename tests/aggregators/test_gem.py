"""GeM against loops over frames and channels."""

import pytest
import torch

from temporal_agg import create_aggregator
from temporal_agg.aggregators.gem import GeM

B, T, C = 3, 5, 4
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 0, 0], [1, 0, 0, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("p", [1.0, 3.0, 6.5])
def test_gem_is_equation_3(p):
    x = torch.randn(B, T, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gem = GeM(C, p, eps=1e-3).double()
    with torch.no_grad():
        details = gem(x, MASK, return_details=True)
    for b in range(B):
        frames = [t for t in range(T) if MASK[b, t]]
        weights = [0.0] * T
        for channel in range(C):
            powers = {t: max(float(x[b, t, channel]), 1e-3) ** p for t in frames}
            want = (sum(powers.values()) / len(frames)) ** (1 / p)
            assert float(details.embedding[b, channel]) == pytest.approx(want, rel=1e-9)
            for t in frames:
                weights[t] += powers[t] / sum(powers.values()) / C
        assert details.frame_weights[b].tolist() == pytest.approx(weights, rel=1e-9)


def test_from_the_mean_to_the_maximum():
    x = torch.rand(B, T, C) + 0.1
    torch.testing.assert_close(GeM(C, 1.0)(x, MASK), create_aggregator("mean", C)(x, MASK))
    torch.testing.assert_close(
        GeM(C, 300.0).double()(x.double(), MASK).float(), create_aggregator("max", C)(x, MASK), rtol=0.01, atol=0
    )


def test_the_exponent_is_trained_where_asked():
    assert GeM(C).p.requires_grad
    assert not GeM(C, learn=False).p.requires_grad
    with pytest.raises(ValueError, match="must be positive, got 0"):
        GeM(C, 0)
