"""Maps -> embedding. Importing this folder registers every aggregator file in it."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from .base import Aggregator, Details, MaskedBatchNorm  # noqa: E402
from .registry import ClipConfig, create_aggregator, list_aggregators, register_aggregator  # noqa: E402

__all__ = [
    "Aggregator",
    "ClipConfig",
    "Details",
    "MaskedBatchNorm",
    "create_aggregator",
    "list_aggregators",
    "register_aggregator",
]
