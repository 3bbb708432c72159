"""A fast-reid head and meta architecture for clips: an aggregator in the place of the head's pooling.

Written for fastreid 1.4.0. Import this file before ``build_model``, and set beside your usual configuration

    cfg.MODEL.META_ARCHITECTURE = "ClipBaseline"
    cfg.MODEL.HEADS.NAME = "ClipHead"
    cfg.MODEL.HEADS.AGGREGATOR = "attention"  # any name of list_aggregators() but loga, which wants the frames too

Batches are those of fast-reid with clips for images: ``{"images": [B, T, 3, H, W], "targets": [B], ...}``. The neck,
the classifiers (Linear, ArcSoftmax, ...), the losses and the evaluation are fast-reid's own.
"""

from fastreid.config import configurable
from fastreid.modeling.heads import REID_HEADS_REGISTRY, EmbeddingHead
from fastreid.modeling.meta_arch import META_ARCH_REGISTRY, Baseline
from torch import Tensor, nn

from temporal_agg import create_aggregator


class ClipPool(nn.Module):
    """Maps [B * T, C, h, w] -> [B, D, 1, 1], as a pooling layer of fast-reid gives."""

    def __init__(self, aggregator: nn.Module):
        super().__init__()
        self.aggregator = aggregator
        self.length = 1  # T of the batch

    def forward(self, maps: Tensor) -> Tensor:
        return self.aggregator(maps.unflatten(0, (-1, self.length)))[..., None, None]


@REID_HEADS_REGISTRY.register()
class ClipHead(EmbeddingHead):
    @configurable
    def __init__(self, *, aggregator, feat_dim, **options):
        aggregator = create_aggregator(aggregator, feat_dim)
        super().__init__(feat_dim=aggregator.num_features, **options)
        self.pool_layer = ClipPool(aggregator)

    @classmethod
    def from_config(cls, cfg):
        return {**super().from_config(cfg), "aggregator": cfg.MODEL.HEADS.AGGREGATOR}


@META_ARCH_REGISTRY.register()
class ClipBaseline(Baseline):
    def preprocess_image(self, batched_inputs):
        clips = super().preprocess_image(batched_inputs)  # the mean and standard deviation spread over B and T
        self.heads.pool_layer.length = clips.shape[1]
        return clips.flatten(0, 1)
