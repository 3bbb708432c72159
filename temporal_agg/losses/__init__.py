"""Embeddings, and what else an aggregator hands out, plus identities -> scalar terms."""

from .criteria import Criterion, create_criterion, list_criteria
from .triplet import TripletLoss

__all__ = [
    "Criterion",
    "TripletLoss",
    "create_criterion",
    "list_criteria",
]
