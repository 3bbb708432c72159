"""Embeddings -> distances -> CMC and mAP."""

from .distances import distances
from .evaluate import RetrievalMetrics, evaluate

__all__ = ["RetrievalMetrics", "distances", "evaluate"]
