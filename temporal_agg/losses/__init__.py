"""Terms that belong to no paper's system alone: tensors and labels -> one scalar."""

from .consistency import ConsistencyLoss
from .oim import OIMLoss
from .pyramid import PyramidRankingLoss
from .triplet import TripletLoss
from .verification import VerificationLoss

__all__ = ["ConsistencyLoss", "OIMLoss", "PyramidRankingLoss", "TripletLoss", "VerificationLoss"]
