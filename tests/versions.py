"""What the oldest versions (floors.txt) lack: reasons to skip, and stand-ins for timm's smallest models."""

from pathlib import Path

import pytest
import timm
import torch
from timm.models import register_model
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def needs_torch(oldest: str, what: str) -> pytest.MarkDecorator:
    reason = f"{what}: needs torch >= {oldest}, this is {torch.__version__}"
    return pytest.mark.skipif(tuple(map(int, oldest.split("."))) > TORCH, reason=reason)


def skip_without(cls: type, method: str) -> None:
    """Skips where this timm's family has no such method."""
    if not hasattr(cls, method):
        pytest.skip(f"{cls.__name__} has no {method} in timm {timm.__version__}")


needs_exporter = needs_torch("2.9", "compile, export and ONNX")

OLD_TIMM = "test_resnet" not in timm.list_models()  # 1.0.8
# What a program run by a test begins with, for it to have the stand-ins too.
BEGIN = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import versions\n" if OLD_TIMM else ""

if OLD_TIMM:
    HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 0.95}
    SMALL = {"input_size": (3, 160, 160), "pool_size": (5, 5), "num_classes": 1000, "hf_hub_id": "timm/", **HALF}
    default_cfgs = timm.models.generate_default_cfgs(
        {
            "test_resnet.r160_in1k": {
                **SMALL,
                "interpolation": "bilinear",
                "first_conv": "conv1.0",
                "classifier": "fc",
            },
            "test_convnext.r160_in1k": {
                **SMALL,
                "interpolation": "bicubic",
                "first_conv": "stem.0",
                "classifier": "head.fc",
            },
        }
    )

    def _build(cls, name, pretrained, **options):
        return timm.models.build_model_with_cfg(cls, name, pretrained, **options)

    @register_model
    def test_resnet(pretrained, **options):
        widths = {"stem_width": 16, "stem_type": "deep", "avg_down": True, "channels": (32, 48, 48, 96)}
        return _build(
            ResNet, "test_resnet", pretrained, **{"block": BasicBlock, "layers": (1, 1, 1, 1), **widths, **options}
        )

    @register_model
    def test_convnext(pretrained, **options):
        sizes = {"depths": (1, 2, 4, 2), "dims": (24, 32, 48, 64), "act_layer": "gelu_tanh"}
        features = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
        return _build(ConvNeXt, "test_convnext", pretrained, feature_cfg=features, **{**sizes, **options})
