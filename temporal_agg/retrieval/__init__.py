"""Embeddings -> distances -> CMC and mAP; re-ranking."""

from .distances import distances
from .evaluate import RetrievalMetrics, evaluate
from .rerank import rerank, rerank_distances

__all__ = ["RetrievalMetrics", "distances", "evaluate", "rerank", "rerank_distances"]
