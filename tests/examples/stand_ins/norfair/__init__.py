"""Stands in for norfair 2.3.0: boxes matched by IoU, lost tracks revived by ``reid_distance_function``."""

from .tracker import Detection, Tracker

__all__ = ["Detection", "Tracker"]
