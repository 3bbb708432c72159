"""The smallest model of every timm model family (a file of timm.models) gives maps and trains.

The list is generated: ``python tests/models/smallest_models.py``. With ALL_FAMILIES=1 in the environment families whose
smallest model has more than 100 M parameters run too (they need some 12 GB and minutes).
"""

import gc
import json
import os
import warnings
from pathlib import Path

import pytest
import timm
import torch

from temporal_agg.models import FrameEncoder

LISTED = json.loads(Path(__file__).with_name("smallest_models.json").read_text())
LARGE = 100_000_000


def release(version):
    return tuple(int(part) for part in version.split(".")[:3])


# Older versions lack the maps of some families, take some at their own size only, and keep parameters that go unused.
OLDER = release(timm.__version__) < release(LISTED["timm"])
OWN_SIZE = {  # what timm allows at one size only, or at square ones
    "byoanet": (256, 256),
    "convit": (224, 224),
    "crossvit": (240, 240),
    "efficientformer": (224, 224),
    "mvitv2": (224, 224),
    "nest": (224, 224),
}
PARTLY_FROZEN = {"coat", "crossvit", "hrnet", "efficientvim"}  # branches that end beside the maps; the last by timm


@pytest.fixture(autouse=True)
def free():
    yield
    gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize("family", LISTED["families"])
def test_family_gives_maps_and_trains(family):
    name, count = LISTED["families"][family].values()
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    if count > LARGE and not os.environ.get("ALL_FAMILIES"):
        pytest.skip(f"{name}, the smallest, has {count / 1e6:.0f} M parameters: set ALL_FAMILIES=1 to run it")
    torch.manual_seed(0)
    try:
        encoder = FrameEncoder(name).train()
    except TypeError as error:
        if not OLDER or "forward_intermediates" not in str(error):
            raise
        pytest.skip(f"timm {timm.__version__} gives no maps of {name}")
    _, H, W = encoder.data_config["input_size"]
    assert OLDER or OWN_SIZE.get(family) == (H, W) or (H in range(252, 257) and W in range(126, 129))
    maps = encoder(torch.randn(2, 3, H, W))
    h, w = maps.shape[2:]
    assert maps.shape[:2] == (2, encoder.num_features)
    assert h > w if H > W else h == w
    (maps * torch.randn_like(maps)).sum().backward()
    trained = {k: p for k, p in encoder.named_parameters() if p.requires_grad}
    assert [k for k, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []
    if family not in PARTLY_FROZEN and not OLDER:
        assert len(trained) == len(list(encoder.parameters()))


def test_the_list_is_not_stale():
    new = sorted(set(timm.list_modules()) - set(LISTED["families"]))
    if new:
        warnings.warn(
            f"timm {timm.__version__} has families that are not tested: {', '.join(new)}; run "
            "python tests/models/smallest_models.py",
            stacklevel=1,
        )
    assert len(LISTED["families"]) >= 98
