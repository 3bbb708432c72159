"""Files -> clips: readers, optical flow, frame and identity sampling, clip transforms, synthetic tracklets."""

from .benchmarks import read_duke, read_duke_si, read_ilids_vid, read_ls_vid, read_mars, read_prid2011
from .clips import ClipDataset, collate_clips
from .datasets import num_splits, open_dataset, open_splits, parse_data_spec
from .flow import FlowError
from .readers import identity_splits, read_csv, read_folder
from .samplers import Draw, IdentityBatchSampler, PairBatchSampler, TrackletBatchSampler
from .sampling import ClipConfig, cut_tracklet, sample_frames
from .synthetic import synthetic_data
from .tracklet import ImageError, Tracklet, TrackletData, check_flow
from .transforms import ClipTransform

__all__ = [
    "ClipConfig",
    "ClipDataset",
    "ClipTransform",
    "Draw",
    "FlowError",
    "IdentityBatchSampler",
    "ImageError",
    "PairBatchSampler",
    "Tracklet",
    "TrackletBatchSampler",
    "TrackletData",
    "check_flow",
    "collate_clips",
    "cut_tracklet",
    "identity_splits",
    "num_splits",
    "open_dataset",
    "open_splits",
    "parse_data_spec",
    "read_csv",
    "read_duke",
    "read_duke_si",
    "read_folder",
    "read_ilids_vid",
    "read_ls_vid",
    "read_mars",
    "read_prid2011",
    "sample_frames",
    "synthetic_data",
]
