"""Clips -> embeddings: frame encoders, models made of one and an aggregator, and how to build, save and load them."""

from .convert import convert_gltr, convert_grl
from .encoder import FrameEncoder
from .factory import create_model, list_models
from .star import LSTA, StarEncoder
from .tracklet import TrackletModel
from .weights import LoadReport, load_weights, read_checkpoint

__all__ = [
    "LSTA",
    "FrameEncoder",
    "LoadReport",
    "StarEncoder",
    "TrackletModel",
    "convert_gltr",
    "convert_grl",
    "create_model",
    "list_models",
    "load_weights",
    "read_checkpoint",
]
