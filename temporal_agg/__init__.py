"""Temporal aggregators for video person re-identification, over the frame features of any timm backbone."""

from .aggregators import (
    Aggregator,
    ClipConfig,
    Details,
    create_aggregator,
    list_aggregators,
    register_aggregator,
)

__version__ = "0.1.0"

__all__ = [
    "Aggregator",
    "ClipConfig",
    "Details",
    "create_aggregator",
    "list_aggregators",
    "register_aggregator",
]
