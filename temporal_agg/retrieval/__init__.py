"""Embeddings -> distances -> CMC, mAP and open-set figures; search, re-ranking, linking."""

from .ann import faiss_index, load_index, save_index, search_index
from .contact_sheet import contact_sheet
from .distances import distances
from .evaluate import RetrievalMetrics, evaluate, evaluate_tracklets
from .link import BCubed, bcubed, link
from .open_set import Calibration, OpenSetMetrics, calibrate, open_set
from .rerank import rerank, rerank_distances
from .search import SearchResult, search

__all__ = [
    "BCubed",
    "Calibration",
    "OpenSetMetrics",
    "RetrievalMetrics",
    "SearchResult",
    "bcubed",
    "calibrate",
    "contact_sheet",
    "distances",
    "evaluate",
    "evaluate_tracklets",
    "faiss_index",
    "link",
    "load_index",
    "open_set",
    "rerank",
    "rerank_distances",
    "save_index",
    "search",
    "search_index",
]
