"""Files -> clips: readers, optical flow, frame and identity sampling, clip transforms, synthetic tracklets."""

from .benchmarks import read_duke, read_duke_si, read_ilids_vid, read_ls_vid, read_mars, read_prid2011, read_ward
from .clips import ClipDataset, collate_clips
from .datasets import num_splits, open_dataset, open_splits, parse_data_spec
from .flow import FlowError
from .images import ImageError, open_image
from .readers import identity_splits, read_csv, read_folder
from .samplers import Draw, IdentityBatchSampler, PairBatchSampler, TrackletBatchSampler
from .sampling import ClipConfig, cut_tracklet, sample_frames
from .synthetic import synthetic_data
from .tracklet import Tracklet, TrackletData, check_flow, query_index, skip_unreadable, unreadable, windows
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
    "open_image",
    "open_splits",
    "parse_data_spec",
    "query_index",
    "read_csv",
    "read_duke",
    "read_duke_si",
    "read_folder",
    "read_ilids_vid",
    "read_ls_vid",
    "read_mars",
    "read_prid2011",
    "read_ward",
    "sample_frames",
    "skip_unreadable",
    "synthetic_data",
    "unreadable",
    "windows",
]
