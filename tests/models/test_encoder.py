import copy

import pytest
import timm
import torch
from timm.layers import BlurPool2d
from timm.models.nest import Nest
from torch import nn
from versions import OLD_TIMM, skip_without

from temporal_agg.models import FrameEncoder
from temporal_agg.models.encoder import create_encoder

SMALL = (64, 32)


def frames(encoder, B=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, *encoder.data_config["input_size"], generator=generator)


def timm_twin(encoder, **kwargs):
    """timm's own model with the encoder's weights."""
    model = timm.create_model(encoder.config["backbone"], num_classes=0, **kwargs)
    model.load_state_dict(encoder.backbone.state_dict(), strict=False)
    return model.eval()


def test_cnn_maps_are_timms():
    encoder = FrameEncoder("resnet18", img_size=SMALL).eval()
    x = frames(encoder)
    assert torch.equal(encoder(x), timm_twin(encoder).forward_features(x))


def test_nhwc_maps_are_turned():
    if OLD_TIMM:
        pytest.skip("timm 1.0.8 has no test_mambaout")
    encoder = FrameEncoder("test_mambaout", img_size=SMALL).eval()
    x = frames(encoder)
    maps = encoder(x)
    assert maps.shape == (2, encoder.num_features, 2, 1)
    torch.testing.assert_close(maps, timm_twin(encoder).forward_features(x).permute(0, 3, 1, 2))


@pytest.mark.parametrize("registers", [0, 4])
def test_prefix_tokens_are_no_part_of_the_map(registers):
    encoder = FrameEncoder("test_vit", img_size=SMALL, backbone_kwargs={"reg_tokens": registers}).eval()
    x = frames(encoder)
    tokens = timm_twin(encoder, img_size=SMALL, reg_tokens=registers).forward_features(x)[:, 1 + registers :]
    assert tokens.shape[1] == 8
    torch.testing.assert_close(encoder(x), tokens.transpose(1, 2).unflatten(2, (4, 2)))


def test_channels_are_those_of_the_map():
    encoder = FrameEncoder("test_efficientnet", img_size=SMALL)
    assert encoder.num_features == encoder(frames(encoder)).shape[1] == 64
    assert timm.create_model("test_efficientnet", num_classes=0).num_features == 256


def test_preprocessing_is_timms():
    for name in ("test_vit", "test_resnet.r160_in1k"):
        want = timm.data.resolve_model_data_config(timm.create_model(name))
        got = FrameEncoder(name, img_size=SMALL).data_config
        assert got == {**{k: want[k] for k in ("mean", "std", "interpolation")}, "input_size": (3, *SMALL)}


def test_patches_of_14_get_252_by_126():
    one_block = {"depth": 1}
    encoder = FrameEncoder("vit_small_patch14_dinov2", backbone_kwargs=one_block)
    assert encoder.data_config["input_size"] == (3, 252, 126)
    assert encoder(frames(encoder)).shape == (2, 384, 18, 9)
    with pytest.raises(ValueError, match=r"\(256, 128\) .*but \(252, 126\)"):
        FrameEncoder("vit_small_patch14_dinov2", backbone_kwargs=one_block, img_size=(256, 128))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_small_frames(name):
    encoder = FrameEncoder(name, img_size=(128, 64))
    maps = encoder(frames(encoder))
    assert encoder.data_config["input_size"] == (3, 128, 64)
    assert maps.shape[2] == 2 * maps.shape[3]


def test_models_of_one_size_keep_it_and_say_so():
    skip_without(Nest, "forward_intermediates")
    encoder = FrameEncoder("nest_tiny")
    assert encoder.data_config["input_size"] == (3, 224, 224)
    assert encoder.config["img_size"] == [224, 224]
    with pytest.raises(ValueError, match=r"img_size = \(256, 128\).*square"):
        FrameEncoder("nest_tiny", img_size=(256, 128))


def test_impossible_sizes_are_errors():
    with pytest.raises(ValueError, match=r"\(100, 50\) .*but \(96, 48\)"):
        FrameEncoder("test_vit", img_size=(100, 50))
    for size in [(0, 128), (256,), (64.0, 32.0), "64x32", (True, True)]:
        with pytest.raises(ValueError, match="height and width"):
            FrameEncoder("test_vit", img_size=size)
    with pytest.raises(ValueError, match=r"such as \(256, 128\), got 64: for square frames write \(64, 64\)"):
        FrameEncoder("test_vit", img_size=64)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", torch.channels_last),
        ("efficientnet_b0", torch.channels_last),
        ("convnext_tiny", torch.channels_last),
        ("swin_tiny_patch4_window7_224", torch.contiguous_format),
        ("test_vit", torch.contiguous_format),
    ],
)
def test_memory_format_is_that_of_convolutions_or_of_transformers(name, expected):
    with torch.device("cpu" if OLD_TIMM else "meta"):  # timm 1.0.8 reads numbers off tensors
        assert FrameEncoder(name).memory_format is expected


STRIDED = {  # a 1x1 convolution follows the strided operation in each of them
    "plain": ("resnet26", {}),
    "average-pooled shortcut": ("resnet26d", {}),
    "3x3 shortcut": ("resnet26", {"down_kernel_size": 3}),
    "blurred": ("resnet26", {"aa_layer": BlurPool2d}),
    "averaged": ("resnet26", {"aa_layer": nn.AvgPool2d}),
    "res2net": ("res2net50_14w_8s", {}),
    "resnest": ("resnest14d", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", STRIDED)
def test_last_stride_one_only_adds_positions(kind):
    """The stage's first block gives at even positions what it gave before."""
    name, kwargs = STRIDED[kind]
    kwargs = {"zero_init_last": False, "layers": (1, 1, 1, 1), **kwargs}
    torch.manual_seed(0)
    strided = FrameEncoder(name, img_size=SMALL, backbone_kwargs=kwargs).eval()
    dense = copy.deepcopy(strided)
    dense.remove_last_stride()
    block, other = strided.backbone.layer4[0], dense.backbone.layer4[0]
    for size in ((8, 4), (7, 5)):
        if kind == "averaged" and size == (7, 5):  # plain average pooling drops the odd row
            continue
        x = torch.randn(2, strided.backbone.feature_info[-2]["num_chs"], *size)
        y = other(x.clone())
        assert y.shape[2:] == size
        torch.testing.assert_close(y[..., ::2, ::2], block(x.clone()), rtol=1e-4, atol=1e-5)
    assert list(strided.state_dict()) == list(dense.state_dict())
    assert dense.backbone.feature_info[-1]["reduction"] == 16


def test_last_stride_one_is_not_dilation():
    """timm's output_stride=16 with the dilation taken back is the same function."""
    torch.manual_seed(0)
    kwargs = {"zero_init_last": False}
    encoder = FrameEncoder("resnet18", last_stride=1, img_size=(128, 64), backbone_kwargs=kwargs).eval()
    dilated = timm_twin(encoder, output_stride=16)
    x = frames(encoder)
    assert encoder(x).shape == dilated.forward_features(x).shape == (2, 512, 8, 4)
    assert (encoder(x) - dilated.forward_features(x)).abs().max() > 0.01
    for module in dilated.layer4.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.dilation = module.padding = (1, 1)
    torch.testing.assert_close(encoder(x), dilated.forward_features(x))


def test_last_stride_errors():
    with pytest.raises(ValueError, match=r"ConvNeXt has no last stride.*ResNet family"):
        FrameEncoder("test_convnext", last_stride=1)
    with pytest.raises(ValueError, match="without output_stride"):
        FrameEncoder("test_resnet", last_stride=1, backbone_kwargs={"output_stride": 16})
    with pytest.raises(ValueError, match="must be 1, 2 or None, got 0"):
        FrameEncoder("test_resnet", last_stride=0)
    assert FrameEncoder("test_resnet", last_stride=2).config["last_stride"] is None


def saved_bytes(encoder, x):
    """Bytes that autograd keeps for the backward pass, and the gradients."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        maps = encoder(x)
    maps.square().sum().backward()
    return sum(kept.values()), [p.grad for p in encoder.parameters()]


def test_gradient_checkpointing_keeps_less_and_gives_the_same():
    torch.manual_seed(0)
    plain = FrameEncoder("test_vit", img_size=SMALL)
    checkpointed = FrameEncoder("test_vit", img_size=SMALL, grad_checkpointing=True)
    checkpointed.load_state_dict(plain.state_dict())
    x = frames(plain)
    (many, want), (few, got) = saved_bytes(plain, x), saved_bytes(checkpointed, x)
    torch.testing.assert_close(got, want)
    if OLD_TIMM and few == many:
        pytest.skip("timm 1.0.8 keeps everything in ViT's forward_intermediates, as if nothing had been asked for")
    assert few < many / 2


def test_instances():
    model = timm.create_model("test_resnet").eval()
    model.layer1.train()
    x = torch.randn(2, 3, 64, 32)
    want = copy.deepcopy(model).forward_features(x)
    encoder = FrameEncoder(model)
    assert encoder.config is None
    assert encoder.data_config["input_size"] == (3, 256, 128)
    assert torch.equal(encoder(x), want)
    assert [model.training, model.layer1.training, model.layer2.training] == [False, True, False]

    vit = timm.create_model("vit_tiny_patch16_224", img_size=(96, 48), depth=1)
    assert FrameEncoder(vit).data_config["input_size"] == (3, 96, 48)
    resized = FrameEncoder(vit, img_size=(128, 64))
    assert resized(torch.randn(1, 3, 128, 64)).shape == (1, 192, 8, 4)


def test_instance_errors():
    with pytest.raises(TypeError, match="Conv2d has no forward_intermediates"):
        FrameEncoder(nn.Conv2d(3, 8, 3))
    with pytest.raises(TypeError, match="without features_only"):
        FrameEncoder(timm.create_model("test_resnet", features_only=True))
    with pytest.raises(TypeError, match="not with an instance"):
        FrameEncoder(timm.create_model("test_resnet"), pretrained=True)


def test_only_what_the_maps_do_not_need_is_frozen():
    if not hasattr(timm.models.coat.CoaT, "forward_intermediates"):
        pytest.skip(f"timm {timm.__version__} gives no maps of CoaT")
    encoder = FrameEncoder("coat_tiny", img_size=SMALL)
    frozen = {k for k, p in encoder.named_parameters() if not p.requires_grad}
    encoder.requires_grad_(True)
    encoder(frames(encoder)).sum().backward()
    assert frozen == {k for k, p in encoder.named_parameters() if p.grad is None} != set()


@pytest.mark.parametrize("name", ["mobilenetv2_050", "convnext_atto"])
def test_a_head_is_taken_out_in_every_version_of_timm(name):
    """Not all versions prune it, and weights would fit the version that saved them alone."""
    encoder = FrameEncoder(name, img_size=SMALL).eval()
    heads = ("conv_head", "bn2", "head", "classifier")
    assert not [key for key in encoder.backbone.state_dict() if key.split(".")[0] in heads]
    whole = timm.create_model(name, num_classes=0).eval()
    extra = whole.load_state_dict(encoder.backbone.state_dict(), strict=False)
    assert not extra.unexpected_keys
    x = frames(encoder)
    (want,) = whole.forward_intermediates(x, indices=[-1], intermediates_only=True)
    assert torch.equal(encoder(x), want)


@torch.no_grad()
def test_building_without_gradients_freezes_nothing():
    assert all(p.requires_grad for p in FrameEncoder("test_vit", img_size=SMALL).parameters())


def test_config_rebuilds():
    torch.manual_seed(0)
    for kwargs in ({"last_stride": 1}, {"backbone_kwargs": {"drop_path_rate": 0.1}}, {"img_size": [128, 64]}):
        encoder = FrameEncoder("test_resnet", **kwargs).eval()
        other = FrameEncoder(**encoder.config).eval()
        other.load_state_dict(encoder.state_dict())
        x = frames(encoder)
        assert torch.equal(encoder(x), other(x))
        assert encoder.config == other.config
        assert encoder.data_config == other.data_config


def test_building_draws_nothing_but_the_weights():
    torch.manual_seed(3)
    encoder = FrameEncoder("test_resnet", img_size=SMALL)
    after = torch.rand(1)
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=0)
    assert torch.rand(1) == after
    assert torch.equal(model.conv1[0].weight, encoder.backbone.conv1[0].weight)


def test_names_are_checked():
    with pytest.raises(ValueError, match=r"no model named 'resnet5'; did you mean .*'resnet50'"):
        FrameEncoder("resnet5")
    with pytest.raises(ValueError, match=r"no weights tagged 'nothing'; it has: .*a1_in1k"):
        FrameEncoder("resnet50.nothing")
    with pytest.raises(ValueError, match="pass the instance"):
        FrameEncoder("hf-hub:timm/resnet50.a1_in1k")
    with pytest.raises(TypeError, match="backbone_kwargs cannot have img_size"):
        FrameEncoder("test_resnet", backbone_kwargs={"img_size": 64})


def test_frames_are_checked():
    encoder = FrameEncoder("test_resnet", img_size=SMALL)
    x = frames(encoder)
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\], got \[2, 1, 64, 32\]"):
        encoder(x[:, :1])
    with pytest.raises(ValueError, match=r"got \[3, 64, 32\]"):
        encoder(x[0])
    with pytest.raises(TypeError, match=r"floating-point tensor .*got torch.uint8"):
        encoder(x.byte())
    with pytest.raises(ValueError, match="star_"):
        encoder(x, torch.randn(2, 2, 64, 32))


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "resnet10t",
            {"grad_checkpointing": "x"},
            TypeError,
            r"checkpointing must be True or False, got 'x' \(str",
        ),
        ("resnet10t", {"backbone_kwargs": "x"}, TypeError, "backbone_kwargs must be a dict or None, got 'x'"),
        ("lsta_resnet10t", {"width": "8"}, TypeError, "encoder of 'lsta_resnet10t': width must be a whole number"),
        ("lsta_resnet10t", {"width": 10**9}, ValueError, "width must be at most 65,536, got 1000000000"),
        ("lsta_resnet10t", {"flow_scale": []}, TypeError, r"flow_scale must be a number, got \[\]"),
        ("resnet10t", {"img_size": 256}, ValueError, r"such as \(256, 128\), got 256"),
    ],
)
def test_options_of_wrong_types_are_named(name, options, error, message):
    with pytest.raises(error, match=message):
        create_encoder(name, **options)
