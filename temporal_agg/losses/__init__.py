"""Terms of which the papers' criteria are made, and others can be: tensors and labels -> one scalar."""

from .consistency import ConsistencyLoss
from .oim import OIMLoss
from .pyramid import PyramidRankingLoss
from .triplet import TripletLoss
from .verification import VerificationLoss

__all__ = ["ConsistencyLoss", "OIMLoss", "PyramidRankingLoss", "TripletLoss", "VerificationLoss"]
