"""Clips -> embeddings: frame encoders, models made of one and an aggregator, and how to build, save and load them.

timm is imported when the first backbone is named, huggingface_hub when the first model is saved or loaded.
"""

from .convert import convert_gltr, convert_grl
from .encoder import FrameEncoder, create_encoder, register_encoder
from .factory import create_model, list_models
from .star import LSTA, StarEncoder
from .tracklet import TrackletModel
from .weights import LoadReport, load_weights, read_checkpoint, unwrap

__all__ = [
    "LSTA",
    "FrameEncoder",
    "LoadReport",
    "StarEncoder",
    "TrackletModel",
    "convert_gltr",
    "convert_grl",
    "create_encoder",
    "create_model",
    "list_models",
    "load_weights",
    "read_checkpoint",
    "register_encoder",
    "unwrap",
]
