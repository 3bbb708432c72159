"""What several tests need: small aggregators and encoders, weights away from initial values, gradients of outputs."""

import torch
from torch import nn

from temporal_agg.aggregators.registry import aggregator_options

SMALL = {"hidden_features": 16, "rounds": 5}  # of gsta and lstm, of robust


def small(name):
    """The options with which an aggregator is as small as its options allow."""
    return {key: SMALL[key] for key in SMALL if key in aggregator_options(name)}


def moved(module, by=0.05):
    """The module a little away from its initial values: zero weights and unit norms would hide faults."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p += by * torch.randn(p.shape, generator=g, dtype=p.dtype)
        for key, b in module.named_buffers():
            if key.endswith("running_mean"):
                b += 2 * by * torch.randn(b.shape, generator=g, dtype=b.dtype)
            elif key.endswith("running_var"):
                b *= 1 + torch.rand(b.shape, generator=g, dtype=b.dtype)
    return module


def randomize(module, seed=0):
    """The float64 module with random weights and statistics."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=g, dtype=torch.float64) + 0.2)
        for key, b in module.named_buffers():
            if b.is_floating_point():
                b.copy_(torch.rand(b.shape, generator=g, dtype=torch.float64) + 0.5 * key.endswith("var"))
    return module


def gradients(output, tensors):
    """Of a number that every element of the output moves, each by another weight."""
    weight = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)
    return torch.autograd.grad((output * weight).square().sum(), tensors, retain_graph=True)


class Colours(nn.Module):
    """An encoder: the colours of a frame, on a grid."""

    num_features = 3
    data_config = {  # noqa: RUF012
        "input_size": (3, 16, 8),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "interpolation": "bilinear",
    }

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, frames, flow=None):
        return self.scale * nn.functional.avg_pool2d(frames, 4)
