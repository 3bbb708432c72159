"""Files -> clips: readers, frame sampling, identity sampling, clip transforms, synthetic tracklets."""

from .clips import ClipDataset, collate_clips
from .readers import identity_splits, open_dataset, parse_data_spec, read_csv, read_folder
from .samplers import Draw, IdentityBatchSampler
from .sampling import cut_tracklet, sample_frames
from .synthetic import synthetic_data
from .tracklet import ImageError, Tracklet, TrackletData
from .transforms import ClipTransform

__all__ = [
    "ClipDataset",
    "ClipTransform",
    "Draw",
    "IdentityBatchSampler",
    "ImageError",
    "Tracklet",
    "TrackletData",
    "collate_clips",
    "cut_tracklet",
    "identity_splits",
    "open_dataset",
    "parse_data_spec",
    "read_csv",
    "read_folder",
    "sample_frames",
    "synthetic_data",
]
