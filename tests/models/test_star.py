import copy
import json

import pytest
import timm.layers.cbam
import torch
from torch.nn import functional as F
from versions import OLD_TIMM

from temporal_agg.aggregators.gsta import GSTA
from temporal_agg.models import LSTA, FrameEncoder, StarEncoder, TrackletModel, create_model, list_models

B, C, H, W = 2, 12, 5, 4


def maps():
    return torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def lsta(variant="lsta"):
    torch.manual_seed(1)
    block = LSTA(C, reduction=4, width=3, variant=variant).double().eval()
    for p in block.parameters():  # no zero biases
        torch.nn.init.normal_(p, std=0.5)
    return block


def literal_channel(m, M):
    """Equation 4, clip by clip."""
    out = []
    for x in M:
        average, highest = x.flatten(1).mean(1), x.flatten(1).max(1).values
        first, second = ((m.squeeze.weight @ v + m.squeeze.bias).clamp(min=0) for v in (average, highest))
        gate = torch.sigmoid(m.excite.weight @ (first + second) + m.excite.bias)
        out.append(torch.stack([x[c] * gate[c] for c in range(C)]))
    return torch.stack(out)


def literal_lsta(m, M, dilations):
    """Equations 4 and 5, pixel by pixel and tap by tap."""
    M_c = literal_channel(m, M)
    out = []
    for x in M_c:
        M_s = torch.stack([x.mean(0), x.max(0).values])
        gate = []
        for y in range(H):
            for z in range(W):
                parts = []
                for conv, d in zip(m.context, dilations, strict=True):
                    total = conv.bias
                    for i in (-1, 0, 1):
                        for j in (-1, 0, 1):
                            if 0 <= y + i * d < H and 0 <= z + j * d < W:
                                total = total + conv.weight[:, :, i + 1, j + 1] @ M_s[:, y + i * d, z + j * d]
                    parts.append(total.clamp(min=0))
                gate.append(torch.sigmoid(m.fuse.weight[0, :, 0, 0] @ torch.cat(parts) + m.fuse.bias[0]))
        out.append(x * torch.stack(gate).view(H, W))
    return torch.stack(out)


def check(m, literal):
    x = maps().requires_grad_()
    got, want = m(x), literal(x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    weight = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view_as(got)
    grads = [torch.autograd.grad((y * weight).sin().sum(), [x, *m.parameters()]) for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_lsta_equals_the_equations():
    m = lsta()
    check(m, lambda x: literal_lsta(m, x, (1, 2, 3)))


def test_lsta_undilated():
    m = lsta("undilated")
    check(m, lambda x: literal_lsta(m, x, (1, 1, 1)))


def test_lsta_without_a_spatial_part():
    m = lsta("no_spatial")
    check(m, lambda x: literal_channel(m, x))


def test_lsta_with_a_7x7_kernel():
    m = lsta("7x7")

    def literal(x):
        M_c = literal_channel(m, x)
        M_s = F.pad(torch.stack([M_c.mean(1), M_c.max(1).values], 1), (3, 3, 3, 3))
        patches = M_s.unfold(2, 7, 1).unfold(3, 7, 1)
        return (
            M_c * torch.sigmoid(torch.einsum("bchwij,cij->bhw", patches, m.spatial.weight[0]) + m.spatial.bias)[:, None]
        )

    check(m, literal)


def test_cbam_variant_is_timms_cbam():
    m = lsta("cbam")
    m.spatial[1].running_var.fill_(0.3)
    other = timm.layers.cbam.CbamModule(C, rd_ratio=1 / 4, rd_divisor=1, spatial_kernel_size=7).double().eval()
    with torch.no_grad():
        other.channel.fc1.weight.copy_(m.squeeze.weight[..., None, None])
        other.channel.fc2.weight.copy_(m.excite.weight[..., None, None])
        other.spatial.conv.conv.weight.copy_(m.spatial[0].weight)
        other.spatial.conv.bn.load_state_dict(m.spatial[1].state_dict())
    torch.testing.assert_close(m(maps()), other(maps()), rtol=1e-9, atol=1e-9)


def test_se_variant_is_timms_squeeze_and_excitation():
    m = lsta("se")
    other = timm.layers.SEModule(C, rd_ratio=1 / 4, rd_divisor=1).double()
    with torch.no_grad():
        for to, linear in ((other.fc1, m.squeeze), (other.fc2, m.excite)):
            to.weight.copy_(linear.weight[..., None, None])
            to.bias.copy_(linear.bias)
    torch.testing.assert_close(m(maps()), other(maps()), rtol=1e-9, atol=1e-9)


def test_lsta_defaults_are_the_papers():
    m = LSTA(256)
    assert m.squeeze.weight.shape == (16, 256)
    assert [c.dilation for c in m.context] == [(1, 1), (2, 2), (3, 3)]
    assert m(torch.randn(1, 256, 7, 3)).shape == (1, 256, 7, 3)
    with pytest.raises(ValueError, match="'no_spatial', 'cbam', 'se', got 'dilated'"):
        LSTA(256, variant="dilated")
    with pytest.raises(ValueError, match="at least 1, got 16 and 0"):
        LSTA(256, width=0)


def frames(N=2, size=(64, 32), dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(N, channels, *size, generator=g, dtype=dtype) for channels in (3, 2)]


def encoder(**kwargs):
    torch.manual_seed(0)
    return StarEncoder("test_resnet", **kwargs)


def literal_encoder(m, rgb, flow=None):
    """Equation 2, then a block after each stage."""
    U = F.max_pool2d(F.relu(m.backbone.bn1(m.backbone.conv1(rgb))), 3, 2, 1)
    if flow is not None:
        conv, norm = m.flow_stem[:2]
        U = U + F.max_pool2d(F.relu(norm(F.conv2d(flow, conv.weight, stride=2, padding=3))), 3, 2, 1)
    for k in range(4):
        U = m.lsta[k](getattr(m.backbone, f"layer{k + 1}")(U))
    return U


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_encoder_equals_the_equations(train):
    m = encoder().double().train(train)
    rgb, flow = frames(dtype=torch.float64)
    other = copy.deepcopy(m)
    got, want = m(rgb, flow), literal_encoder(other, rgb, flow)
    assert got.shape == (2, m.num_features, 2, 1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dict(m.named_buffers()), dict(other.named_buffers()), rtol=1e-9, atol=1e-12)
    for y in (got, want):
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = [{k: p.grad for k, p in e.named_parameters()} for e in (m, other)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(m(rgb), literal_encoder(other, rgb), rtol=1e-9, atol=1e-12)


def test_gradients_with_and_without_flow():
    m = encoder()
    rgb, flow = frames()
    m(rgb, flow).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())
    assert m.flow_stem[0].weight.grad.abs().sum() > 0
    m.zero_grad()
    m(rgb).sum().backward()
    assert {k for k, p in m.named_parameters() if p.grad is None} == {
        k for k, _ in m.named_parameters() if k.startswith("flow_stem.")
    }


def test_encoder_without_a_flow_stem():
    m = encoder(flow=False)
    rgb, flow = frames()
    assert not m.uses_flow
    assert not any("flow" in k for k in m.state_dict())
    assert m(rgb).shape == (2, m.num_features, 2, 1)
    with pytest.raises(ValueError, match="flow=False"):
        m(rgb, flow)


def test_flow_is_divided_by_its_scale():
    rgb, flow = frames()
    got = encoder(flow_scale=4).eval()(rgb, flow)
    assert torch.equal(got, encoder().eval()(rgb, flow / 4))
    with pytest.raises(ValueError, match="positive number of pixels, got 0"):
        encoder(flow_scale=0)


def test_without_attention_it_is_the_two_stem_resnet():
    m = encoder(variant="none").eval()
    rgb, flow = frames()
    assert not any(name.startswith("lsta") for name in m.state_dict())
    assert torch.equal(m(rgb), FrameEncoder.forward(m, rgb))
    assert not torch.allclose(m(rgb, flow), m(rgb))


def test_encoder_options_reach_the_blocks():
    m = encoder(variant="undilated", reduction=4, width=5, last_stride=1)
    assert [block.variant for block in m.lsta] == ["undilated"] * 4
    assert [block.fuse.in_channels for block in m.lsta] == [15] * 4
    assert [block.squeeze.out_features for block in m.lsta] == [8, 12, 12 if OLD_TIMM else 48, 24]
    assert m(*frames()).shape == (2, m.num_features, 4, 2)


def test_gradient_checkpointing_changes_no_gradient():
    runs = []
    for checkpointing in (False, True):
        m = encoder(grad_checkpointing=checkpointing).double().train()
        m(*frames(dtype=torch.float64)).square().sum().backward()
        runs.append({k: p.grad for k, p in m.named_parameters()})
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-12)


def test_encoder_errors():
    m = encoder()
    rgb, flow = frames()
    with pytest.raises(ValueError, match="'se', 'none', got 'dilated'"):
        StarEncoder("test_resnet", variant="dilated")
    with pytest.raises(ValueError, match="ResNet class, got ConvNeXt"):
        StarEncoder("test_convnext")
    with pytest.raises(ValueError, match=r"flow must have the shape \[N, 2, H, W\]"):
        m(rgb, rgb)
    with pytest.raises(ValueError, match=r"flow must fit the frames \[2, 3, 64, 32\], got \[2, 2, 64, 31\]"):
        m(rgb, flow[..., 1:])


def test_resnet50_on_real_sizes():
    m = StarEncoder("resnet50").eval()
    extra = sum(p.numel() for p in m.lsta.parameters()) + sum(p.numel() for p in m.flow_stem.parameters())
    assert sum(p.numel() for p in m.parameters()) == 23_508_032 + extra
    with torch.no_grad():
        assert m(*frames(1, (256, 128))).shape == (1, 2048, 8, 4)


@pytest.mark.parametrize("flow", [False, True])
def test_model_by_name(flow, tmp_path):
    torch.manual_seed(0)
    model = create_model("star_test_resnet", flow=flow, variant="7x7", hidden_features=16).eval()
    assert isinstance(model.encoder, StarEncoder)
    assert isinstance(model.aggregator, GSTA)
    assert (model.clip.length, model.clip.test_sampling, model.clip.distance) == (10, "all", "euclidean")
    clips, flows = (x.unflatten(0, (2, 4)) for x in frames(8))
    kwargs = {"flow": flows} if flow else {}
    got = model(clips, **kwargs)
    want = model.aggregator(literal_encoder(model.encoder, *frames(8)[: 1 + flow]).unflatten(0, (2, 4)))
    torch.testing.assert_close(got, want)

    mask = torch.tensor([[True, False, True, True], [False, True, False, True]])
    padded = {"flow": flows.masked_fill(~mask[..., None, None, None], float("nan"))} if flow else {}
    masked = model(clips.masked_fill(~mask[..., None, None, None], float("nan")), mask, **padded)
    for b in range(2):
        alone = {"flow": flows[b : b + 1, mask[b]]} if flow else {}
        torch.testing.assert_close(masked[b], model(clips[b : b + 1, mask[b]], **alone)[0], rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "star_test_resnet"
    loaded = TrackletModel.from_pretrained(tmp_path)
    assert loaded.encoder.uses_flow == flow
    assert torch.equal(loaded(clips, **kwargs), got)


def test_listed_models():
    assert list_models("star_*") == ["star_resnet101", "star_resnet18", "star_resnet34", "star_resnet50"]
    with pytest.raises(TypeError, match="Its encoder has: flow, variant, reduction, width, flow_scale, last_stride"):
        create_model("star_resnet18", flows=False)
