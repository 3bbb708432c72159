"""Embeddings -> distances -> CMC and mAP; search, re-ranking."""

from .distances import distances
from .evaluate import RetrievalMetrics, evaluate
from .rerank import rerank, rerank_distances
from .search import SearchResult, search

__all__ = ["RetrievalMetrics", "SearchResult", "distances", "evaluate", "rerank", "rerank_distances", "search"]
