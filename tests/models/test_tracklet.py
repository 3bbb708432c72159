"""What every model promises, over a tiny backbone: one per registered aggregator."""

import copy

import pytest
import torch
from helpers import small
from torch import nn
from versions import needs_exporter

from temporal_agg.aggregators import ClipConfig, create_aggregator, list_aggregators
from temporal_agg.models import FrameEncoder, StarEncoder, TrackletModel, create_model

SIZE = (128, 64)  # maps of 4 x 2, or 8 x 4 with last_stride=1


def build(name, **kwargs):
    torch.manual_seed(0)
    return create_model(f"{name}_test_resnet", img_size=SIZE, **kwargs)


@pytest.fixture(scope="module", params=list_aggregators())
def model(request):
    """The tests that train it take a copy."""
    return build(request.param, **small(request.param)).eval()


def clips(model, B=2, T=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T or min(model.clip.length, model.aggregator.clip_length or 4), 3, *SIZE, generator=generator)


def test_shapes(model):
    x = clips(model)
    embedding = model(x)
    assert embedding.shape == (2, model.num_features)
    details = model(x, return_details=True)
    assert torch.equal(details.embedding, embedding)
    assert details.frame_weights.shape == details.mask.shape == x.shape[:2]
    assert model.data_config["input_size"] == (3, *SIZE)
    maps = model.encode_frames(x[0])
    assert maps.shape[:2] == (x.shape[1], model.encoder.num_features)


def test_forward_is_encoder_then_aggregator(model):
    x = clips(model)
    maps = torch.stack([model.encode_frames(clip) for clip in x])
    frames = x if model.aggregator.needs_frames else None
    torch.testing.assert_close(model(x), model.aggregator(maps, frames=frames), rtol=1e-4, atol=1e-5)


def test_the_two_halves_make_the_whole(model):
    x = clips(model)
    features, images = model.frame_features(x.flatten(0, 1))
    assert features.dim() == (4 if model.aggregator.needs_maps else 2)
    assert (images is not None) == model.aggregator.needs_frames
    images = images if images is None else images.unflatten(0, x.shape[:2])
    features = features.unflatten(0, x.shape[:2])
    details = model.aggregate(features, images=images, return_details=True)
    want = model(x, return_details=True)
    assert torch.equal(details.embedding, want.embedding)
    assert torch.equal(details.frame_weights, want.frame_weights)
    assert torch.equal(model.aggregate(features, images=images), want.embedding)


def test_masked_clip_equals_the_clip_of_its_real_frames(model):
    if model.aggregator.clip_length:
        pytest.skip("its clip length is fixed: positions matter by definition")
    x = clips(model, T=5)
    mask = torch.tensor([[False, True, False, True, True], [True, True, False, False, False]])
    got = model(x.masked_fill(~mask[..., None, None, None], float("nan")), mask)
    for b in range(2):
        torch.testing.assert_close(got[b], model(x[b, mask[b]][None])[0], rtol=1e-4, atol=1e-5)


def test_nan_in_padding_never_spreads(model):
    model = copy.deepcopy(model).train()
    x = clips(model)
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[0, 1:3] = False
    x[0, 1:3] = float("nan")
    x.requires_grad_()
    embedding = model(x, mask)
    assert embedding.isfinite().all()
    (embedding * torch.randn_like(embedding)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert x.grad[~mask].eq(0).all()
    assert x.grad[mask].isfinite().all()
    assert all(b.isfinite().all() for b in model.buffers())


def test_every_parameter_has_a_gradient(model):
    model = copy.deepcopy(model).train()
    details = model(clips(model), return_details=True)
    sum((t * torch.randn_like(t)).sum() for t in (details.embedding, *details.supervised.values())).backward()
    assert [k for k, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_saved_and_loaded_it_is_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    other = TrackletModel.from_pretrained(tmp_path)
    x = clips(model)
    assert torch.equal(other(x), model(x))
    assert other.clip == model.clip
    assert other.data_config == model.data_config
    assert not other.training


@pytest.mark.slow
@needs_exporter
def test_mean_compiles_and_exports():
    model = build("mean").eval()
    x, mask = clips(model), torch.tensor([[True, True, False, True], [True, False, False, False]])
    want = model(x, mask)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask), want)
    program = torch.export.export(model, (x,), {"mask": mask})
    torch.testing.assert_close(program.module()(x, mask=mask), want)


def test_inputs_are_checked():
    model = build("mean")
    x = clips(model)
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    with pytest.raises(ValueError, match=r"clips must have the shape \[B, T, 3, H, W\], got \[2, 3, 128, 64\]"):
        model(x[:, 0])
    with pytest.raises(ValueError, match=r"got \[2, 4, 1, 128, 64\]"):
        model(x[:, :, :1])
    with pytest.raises(TypeError, match=r"torch\.uint8"):
        model(x.byte())
    with pytest.raises(ValueError, match=r"mask must have the shape \[B, T\] = \[2, 4\], got \[2, 3\]"):
        model(x, mask[:, 1:])
    with pytest.raises(TypeError, match=r"mask.bool\(\)"):
        model(x, mask.long())
    with pytest.raises(ValueError, match="star_"):
        model(x, flow=torch.zeros(2, 4, 2, *SIZE))
    mask[1] = False
    with pytest.raises(ValueError, match=r"clips \[1\]"):
        model(x, mask)


def test_flow_reaches_the_encoder():
    torch.manual_seed(0)
    model = create_model("star_test_resnet", img_size=SIZE).eval()
    assert isinstance(model.encoder, StarEncoder)
    x = clips(model)
    flow = torch.randn(2, 4, 2, *SIZE)
    mask = torch.tensor([[True, True, False, True], [True, True, True, True]])
    want = model(x, mask, flow=flow)
    assert not torch.allclose(want, model(x, mask))
    garbage = flow.clone()
    garbage[0, 2] = float("nan")
    torch.testing.assert_close(model(x, mask, flow=garbage), want)
    with pytest.raises(ValueError, match=r"flow must fit the clips .*got \[2, 3, 2, 128, 64\]"):
        model(x, flow=flow[:, 1:])
    with pytest.raises(ValueError, match=r"\[B, T, 2, H, W\]"):
        model(x, flow=x)


def test_clip_configuration():
    encoder = FrameEncoder("test_resnet", img_size=SIZE)

    def clip(name, clip=None, **kwargs):
        return TrackletModel(encoder, create_aggregator(name, encoder.num_features, **kwargs), clip).clip

    assert clip("mean") == ClipConfig(length=4)
    assert clip("loga").length == 10
    assert clip("loga", clip_length=6).length == 6
    assert clip("mean", ClipConfig(length=3)).length == 3
    with pytest.raises(ValueError, match=r"exactly 10 frames, but clip.length is 3"):
        clip("loga", ClipConfig(length=3))
    with pytest.raises(ValueError, match=r"gives 96 channels and the aggregator takes 95"):
        TrackletModel(encoder, create_aggregator("mean", 95))


def test_any_module_can_be_the_encoder():
    class Pixels(nn.Module):
        num_features = 3
        data_config = {"input_size": (3, 8, 4)}  # noqa: RUF012

        def forward(self, frames, flow=None):
            return frames

    model = TrackletModel(nn.DataParallel(Pixels()), create_aggregator("mean", 3))
    assert model.data_config == {"input_size": (3, 8, 4)}
    x = torch.randn(2, 4, 3, 8, 4)
    torch.testing.assert_close(model(x), x.mean((1, 3, 4)))
