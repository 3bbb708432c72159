"""Temporal aggregators for video person re-identification, over the frame features of any timm backbone."""

from . import data, losses, masked, plot, retrieval
from ._version import __version__ as __version__
from .aggregators import (
    Aggregator,
    ClipConfig,
    Criterion,
    Details,
    MapKind,
    Paper,
    create_aggregator,
    create_criterion,
    list_aggregators,
    list_criteria,
    register_aggregator,
    register_criterion,
)
from .aggregators.fgra import FGRA, GAM, SpatialAttention, TemporalAlignment, TemporalAttention
from .aggregators.gltr import DTP, GLTR, TSA
from .aggregators.grl import EMU, GCE, GRL, TRL
from .aggregators.gsta import GSTA, ConvLSTM
from .aggregators.loga import GCQ, LAQ, LOGA
from .aggregators.robust import Purity, biweight_mean, geometric_median, outlier_mask, tracklet_purity
from .data import Tracklet
from .export import export_onnx
from .inference import embed_tracklets
from .models import FrameEncoder, TrackletModel, create_model, list_models, load_weights
from .models.star import LSTA
from .retrieval import evaluate, rerank
from .stream import TrackletStream, crop_embedder

__all__ = [
    "DTP",
    "EMU",
    "FGRA",
    "GAM",
    "GCE",
    "GCQ",
    "GLTR",
    "GRL",
    "GSTA",
    "LAQ",
    "LOGA",
    "LSTA",
    "TRL",
    "TSA",
    "Aggregator",
    "ClipConfig",
    "ConvLSTM",
    "Criterion",
    "Details",
    "FrameEncoder",
    "MapKind",
    "Paper",
    "Purity",
    "SpatialAttention",
    "TemporalAlignment",
    "TemporalAttention",
    "Tracklet",
    "TrackletModel",
    "TrackletStream",
    "biweight_mean",
    "create_aggregator",
    "create_criterion",
    "create_model",
    "crop_embedder",
    "data",
    "embed_tracklets",
    "evaluate",
    "export_onnx",
    "geometric_median",
    "list_aggregators",
    "list_criteria",
    "list_models",
    "load_weights",
    "losses",
    "masked",
    "outlier_mask",
    "plot",
    "register_aggregator",
    "register_criterion",
    "rerank",
    "retrieval",
    "tracklet_purity",
]
