import torch
from torch import nn
from torch.nn import functional as F

from fastreid.config import configurable

from .registry import Registry

REID_HEADS_REGISTRY = Registry()


@REID_HEADS_REGISTRY.register()
class EmbeddingHead(nn.Module):
    """Maps [N, C, h, w] -> pool_layer -> bottleneck -> features; in training also the classifier's outputs."""

    @configurable
    def __init__(self, *, feat_dim, embedding_dim, num_classes, neck_feat, with_bnneck):
        super().__init__()
        self.pool_layer = nn.AdaptiveAvgPool2d(1)
        self.neck_feat = neck_feat
        reduce = [nn.Conv2d(feat_dim, embedding_dim, 1, bias=False)] if embedding_dim else []
        feat_dim = embedding_dim or feat_dim
        self.bottleneck = nn.Sequential(*reduce, *([nn.BatchNorm2d(feat_dim)] if with_bnneck else []))
        self.weight = nn.Parameter(0.01 * torch.randn(num_classes, feat_dim))

    @classmethod
    def from_config(cls, cfg):
        heads = cfg.MODEL.HEADS
        names = ("EMBEDDING_DIM", "NUM_CLASSES", "NECK_FEAT", "WITH_BNNECK")
        return {"feat_dim": cfg.MODEL.BACKBONE.FEAT_DIM, **{name.lower(): heads[name] for name in names}}

    def forward(self, features, targets=None):
        pooled = self.pool_layer(features)
        after = self.bottleneck(pooled)[..., 0, 0]
        if not self.training:
            return after
        logits = F.linear(after, self.weight)
        chosen = after if self.neck_feat == "after" else pooled[..., 0, 0]
        return {"cls_outputs": logits, "pred_class_logits": logits, "features": chosen}
