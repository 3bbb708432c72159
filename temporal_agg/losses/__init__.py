"""Embeddings, and what else an aggregator hands out, plus identities -> scalar terms."""

from .consistency import ConsistencyLoss
from .criteria import Criterion, create_criterion, list_criteria
from .oim import OIMLoss
from .pyramid import PyramidRankingLoss
from .triplet import TripletLoss
from .verification import VerificationLoss

__all__ = [
    "ConsistencyLoss",
    "Criterion",
    "OIMLoss",
    "PyramidRankingLoss",
    "TripletLoss",
    "VerificationLoss",
    "create_criterion",
    "list_criteria",
]
