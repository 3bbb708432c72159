"""NAN against loops over frames."""

import math

import torch

from temporal_agg import create_aggregator

B, T, C = 3, 5, 4
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 0, 0], [1, 0, 0, 1, 1]], dtype=torch.bool)


def block(q, frames):
    """Eqs. 1-3 over a list of vectors."""
    e = [math.exp(sum(float(a) * float(b) for a, b in zip(q, f, strict=True))) for f in frames]
    a = [x / sum(e) for x in e]
    return sum(w * f for w, f in zip(a, frames, strict=True)), a


def test_two_cascaded_blocks():
    torch.manual_seed(0)
    nan, x = create_aggregator("nan", C).double(), torch.randn(B, T, C, dtype=torch.float64)
    with torch.no_grad():
        for p in nan.parameters():
            p.normal_()
    details = nan(x, MASK, return_details=True)
    for b in range(B):
        frames = list(x[b, MASK[b]])
        r0, _ = block(nan.score.weight[0], frames)
        q1 = [
            math.tanh(float(w @ r0) + float(bias)) for w, bias in zip(nan.kernel.weight, nan.kernel.bias, strict=True)
        ]
        r1, a = block(q1, frames)
        torch.testing.assert_close(details.embedding[b], r1)
        torch.testing.assert_close(details.frame_weights[b, MASK[b]], torch.tensor(a, dtype=torch.float64))


def test_it_starts_as_the_mean_and_learns_from_there():
    x = torch.randn(B, T, C)
    nan = create_aggregator("nan", C)
    torch.testing.assert_close(nan(x, MASK), create_aggregator("mean", C)(x, MASK))
    optimizer = torch.optim.SGD(nan.parameters(), lr=1)
    for _ in range(2):
        optimizer.zero_grad()
        nan(x).pow(3).sum().backward()
        optimizer.step()
    assert all(p.abs().max() > 0 for p in nan.parameters())


def test_the_order_does_not_matter():
    torch.manual_seed(0)
    nan, x = create_aggregator("nan", C), torch.randn(B, T, C)
    torch.nn.init.normal_(nan.kernel.weight)
    torch.testing.assert_close(nan(x.flip(1)), nan(x))


def test_a_quantised_stream_equals_its_batch():
    """A quantised layer has no parameters whose type a state could be turned into."""
    torch.manual_seed(0)
    aggregator = create_aggregator("nan", in_features=8).eval()
    torch.nn.init.normal_(aggregator.kernel.weight)
    quantised = torch.ao.quantization.quantize_dynamic(aggregator, {torch.nn.Linear}, dtype=torch.qint8)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        state = quantised.update(quantised.begin(2, x), x)
        torch.testing.assert_close(quantised.read(state).embedding, quantised(x))
