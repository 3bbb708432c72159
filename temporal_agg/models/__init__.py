"""Clips -> embeddings: frame encoders, models made of one and an aggregator, and how to build, save and load them."""

from .encoder import FrameEncoder
from .factory import create_model, list_models
from .star import LSTA, StarEncoder
from .tracklet import TrackletModel

__all__ = ["LSTA", "FrameEncoder", "StarEncoder", "TrackletModel", "create_model", "list_models"]
