"""Maps -> embedding. Importing this folder registers every aggregator file in it."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from .base import Aggregator, Criterion, Details, MapKind, join, take  # noqa: E402
from .registry import (  # noqa: E402
    ClipConfig,
    Entry,
    Paper,
    create_aggregator,
    create_criterion,
    list_aggregators,
    list_criteria,
    register_aggregator,
    register_criterion,
    registry_entry,
)

__all__ = [
    "Aggregator",
    "ClipConfig",
    "Criterion",
    "Details",
    "Entry",
    "MapKind",
    "Paper",
    "create_aggregator",
    "create_criterion",
    "join",
    "list_aggregators",
    "list_criteria",
    "register_aggregator",
    "register_criterion",
    "registry_entry",
    "take",
]
