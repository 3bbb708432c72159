"""The maps that only figures need, against loops over the real frames of each clip."""

import pytest
import torch
from torch import nn

from temporal_agg import create_aggregator

B, T, C, H, W = 3, 6, 8, 4, 3
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0], [1, 0, 0, 1, 1, 0]], dtype=torch.bool)
exact = {"rtol": 1e-9, "atol": 1e-9}


def inspected(name, frames=None, **options):
    torch.manual_seed(0)
    aggregator = create_aggregator(name, C, **options).double().eval()
    with torch.no_grad():
        for p in aggregator.parameters():
            p += 0.1 * torch.randn_like(p)
        for key, b in aggregator.named_buffers():
            if key.endswith("running_mean"):
                b += 0.1 * torch.randn_like(b)
            elif key.endswith("running_var"):
                b *= 1 + torch.rand_like(b)
    features = torch.randn(B, T, C, H, W, dtype=torch.float64)
    with torch.no_grad():
        return aggregator, features, aggregator.inspect(features, MASK, frames=frames)


def literal_memory(emu, g, low):
    """Eq. 8 from the mean of the clip's low-correlation maps on, for direction g; the memory after each frame met."""
    layers = []
    for layer in emu.res:
        if isinstance(layer, nn.Conv2d):
            out = layer.out_channels // emu.directions
            conv = nn.Conv2d(
                layer.in_channels // emu.directions, out, layer.kernel_size, padding=layer.padding, bias=False
            )
            conv.weight = nn.Parameter(layer.weight[g * out : (g + 1) * out])
            layers.append(conv)
        elif layer.__class__.__name__ == "BatchNorm":
            n = layer.num_features // emu.directions
            part = slice(g * n, (g + 1) * n)
            norm = nn.BatchNorm2d(n).double().eval()
            norm.load_state_dict({k: v if v.dim() == 0 else v[part] for k, v in layer.state_dict().items()})
            layers.append(norm)
        else:
            layers.append(nn.ReLU())
    res = nn.Sequential(*layers)
    memory, after = low.mean(0), []
    for frame in low:
        total = memory + frame
        memory = (res(total[None])[0] + total).relu()
        after.append(memory)
    return after


@pytest.mark.parametrize("name", ["grl", "grl_released"])
@pytest.mark.parametrize(
    "directions", [("forward", "backward"), ("backward", "forward"), ("forward",), ("backward",)], ids="-".join
)
@torch.no_grad()
def test_memory_of_grl(name, directions):
    aggregator, features, details = inspected(name, directions=directions)
    got = details.maps["memory"]
    if len(directions) == 1:
        got = got[:, None]
        assert directions[0] in aggregator.maps["memory"].title
    for row, direction in enumerate(sorted(directions, reverse=True)):  # forward first
        for b in range(B):
            real = MASK[b].nonzero().flatten()
            low = features[b, real] * (1 - details.maps["correlation"][b, real][:, None])
            step = -1 if direction == "backward" else 1
            after = literal_memory(aggregator.trl.emu, directions.index(direction), low.flip(0) if step == -1 else low)
            torch.testing.assert_close(got[b, row, real], torch.stack(after[::step]).mean(1), **exact)
        assert (got[:, row][~MASK] == 0).all()


def test_no_memory_without_memory_blocks():
    aggregator, _, details = inspected("grl", memory=False)
    assert set(details.maps) == set(aggregator.maps) == {"correlation", "attention"}


@pytest.mark.parametrize("quality", ["frames", "features"])
@torch.no_grad()
def test_parts_of_loga(quality):
    frames = torch.randn(B, T, 3, 8, 5, dtype=torch.float64)
    aggregator, features, details = inspected("loga", frames, clip_length=T, part_size=5, quality=quality)
    read = (frames if quality == "frames" else features) * MASK[..., None, None, None]
    convolution, got = aggregator.laq.convolution, details.maps["parts"]
    places = read.shape[3] * read.shape[4]
    assert got.shape == ((B, T, 8) if quality == "frames" else (B, T, H, W))
    for b in range(B):
        flat = read[b].mean(1).flatten(1)
        for t in range(T):
            for k in range(places // 5):
                want = (convolution.weight[t] * flat[:, 5 * k : 5 * k + 5]).sum() + convolution.bias[t]
                part = got[b, t, k] if quality == "frames" else got[b, t].flatten()[5 * k : 5 * k + 5]
                torch.testing.assert_close(part, (want if MASK[b, t] else 0 * want).expand_as(part), **exact)
    if quality == "features":
        assert (got.flatten(2)[..., places // 5 * 5 :] == 0).all()


def test_loga_without_laq_has_no_parts():
    aggregator, _, details = inspected("loga", assembly="gcq")
    assert set(details.maps) == set(aggregator.maps) == {"laq", "gcq"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gltr", {}),
        ("gltr", {"normalize": "none"}),
        ("gltr", {"dtp": False}),
        ("gltr", {"tsa": False}),
        ("gltr", {"dtp": False, "tsa": False}),
        ("gltr_released", {}),
    ],
    ids=str,
)
@torch.no_grad()
def test_stages_of_gltr(name, options):
    aggregator, features, details = inspected(name, embed_features=4, **options)
    maps = details.maps
    last = "gathered" if aggregator.tsa is not None else "local" if aggregator.dtp is not None else "embedded"
    assert set(maps) == set(aggregator.maps)
    for b in range(B):
        real = MASK[b].nonzero().flatten()
        x = torch.stack([aggregator.embed.weight @ features[b, t].mean((1, 2)) + aggregator.embed.bias for t in real])
        torch.testing.assert_close(maps["embedded"][b, real], x, **exact)
        if aggregator.dtp is not None:  # against its own loops in test_gltr.py
            x = aggregator.dtp(x[None])[0]
            torch.testing.assert_close(maps["local"][b, real], x, **exact)
        if aggregator.tsa is not None:
            torch.testing.assert_close(maps["gathered"][b, real], aggregator.tsa(x[None])[0], **exact)
        torch.testing.assert_close(maps["mean"][b], maps[last][b, real].mean(0), **exact)  # Eq. 4
    torch.testing.assert_close(maps["mean"], details.embedding, **exact)
    for stage in {"embedded", "local", "gathered"} & set(maps):
        assert (maps[stage][~MASK] == 0).all()


@torch.no_grad()
def test_gates_of_fgra():
    aggregator, features, details = inspected("fgra", num_regions=3, reduced_features=4)
    norm, got = aggregator.gam.norm, details.maps["gates"]
    for b in range(B):
        real = MASK[b].nonzero().flatten()
        for n, (low, high) in enumerate([(0, 2), (1, 3), (2, 4)]):  # floor and ceiling of thirds of 4 rows
            template = features[b, real[0], :, low:high].mean((1, 2))
            for t in real:
                similarity = template[:, None, None] * features[b, t]  # Eq. 1
                normed = (similarity - norm.running_mean[:, None, None]) / (norm.running_var + norm.eps).sqrt()[
                    :, None, None
                ]
                gate = (norm.weight[:, None, None] * normed + norm.bias[:, None, None]).sigmoid()  # Eq. 2
                torch.testing.assert_close(got[b, n, t], gate.mean(0), **exact)
        assert (got[b, :, ~MASK[b]] == 0).all()


@pytest.mark.parametrize("local", ["stripes", None])
def test_no_gates_without_alignment(local):
    aggregator, _, details = inspected("fgra", local_branch=local, temporal="average")
    assert "gates" not in aggregator.maps
    assert set(details.maps) == set(aggregator.maps)


@pytest.mark.parametrize("name", ["grl", "gltr", "fgra"])
def test_batch_norm_counts_once_in_training(name):
    """And what the loss needs for its backward is still there."""
    torch.manual_seed(0)
    aggregator = create_aggregator(name, C).double().train()
    other = create_aggregator(name, C).double().train()
    other.load_state_dict(aggregator.state_dict())
    features = torch.randn(B, T, C, H, W, dtype=torch.float64)
    with torch.random.fork_rng():
        details = aggregator.inspect(features)
    other(features)
    for (key, got), want in zip(aggregator.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(got, want), key
    details.embedding.sum().backward()
