"""Stands in for torchreid 1.4.0: a model with ``featuremaps``, and the video engine."""

from . import engine, models

__all__ = ["engine", "models"]
