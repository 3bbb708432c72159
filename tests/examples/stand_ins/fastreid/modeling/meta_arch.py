import torch
from torch import nn
from torch.nn import functional as F

from fastreid.config import configurable

from .heads import REID_HEADS_REGISTRY
from .registry import Registry

META_ARCH_REGISTRY = Registry()


@META_ARCH_REGISTRY.register()
class Baseline(nn.Module):
    @configurable
    def __init__(self, *, backbone, heads, pixel_mean, pixel_std, loss_kwargs=None):
        super().__init__()
        self.backbone = backbone
        self.heads = heads
        self.loss_kwargs = loss_kwargs
        for name, value in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(value).view(1, -1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg):
        return {
            "backbone": nn.Conv2d(3, cfg.MODEL.BACKBONE.FEAT_DIM, 8, 8),
            "heads": REID_HEADS_REGISTRY[cfg.MODEL.HEADS.NAME](cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "loss_kwargs": {"loss_names": cfg.MODEL.LOSSES.NAME},
        }

    def preprocess_image(self, batched_inputs):
        images = batched_inputs["images"] if isinstance(batched_inputs, dict) else batched_inputs
        return images.sub_(self.pixel_mean).div_(self.pixel_std)

    def forward(self, batched_inputs):
        features = self.backbone(self.preprocess_image(batched_inputs))
        if not self.training:
            return self.heads(features)
        outputs = self.heads(features, batched_inputs["targets"])
        return {"loss_cls": F.cross_entropy(outputs["cls_outputs"], batched_inputs["targets"])}


def build_model(cfg):
    return META_ARCH_REGISTRY[cfg.MODEL.META_ARCHITECTURE](cfg).to(cfg.MODEL.DEVICE)
