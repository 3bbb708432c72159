"""norfair with tracklet embeddings: a lost track and a new one are compared as tracklets, not frame by frame.

Written for norfair 2.3.0. norfair keeps some detections of a track, spread over its life (``past_detections``); their
features are computed once, when a person is detected, and the aggregator turns those of a track into one embedding.

    reid = TrackletDistance(create_model("local-dir:runs/mine"))
    tracker = norfair.Tracker(
        distance_function="iou", distance_threshold=0.7, initialization_delay=3, past_detections_length=8,
        reid_distance_function=reid, reid_distance_threshold=0.3, reid_hit_counter_max=300,
    )
    for frame in video:                                   # uint8 RGB [H, W, 3]
        tracks = tracker.update(reid.detections(frame, boxes_of(frame)))     # boxes [N, 4]: x1, y1, x2, y2
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from norfair import Detection
from norfair.tracker import TrackedObject
from torch.nn import functional as F

from temporal_agg import TrackletModel, data


class TrackletDistance:
    """Cosine distance between the tracklet embeddings of two tracks, for ``reid_distance_function``.

    Args:
        model: with any aggregator that does not want the frames themselves (all but loga).
    """

    def __init__(self, model: TrackletModel):
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.transform = data.ClipTransform.for_model(model)
        self.known = WeakKeyDictionary()  # track -> its newest detection, its embedding then

    @torch.inference_mode()
    def detections(self, frame: np.ndarray, boxes: Sequence[Sequence[float]]) -> list[Detection]:
        """The detections of a frame, each with the feature map of its crop. Boxes outside the frame are left out."""
        height, width = frame.shape[:2]
        boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
        corners = np.clip(boxes.round().astype(int), 0, (width, height, width, height))
        seen = (corners[:, 2:] > corners[:, :2]).all(1)
        if not seen.any():
            return []
        crops = [torch.from_numpy(frame[y1:y2, x1:x2].copy()).permute(2, 0, 1) for x1, y1, x2, y2 in corners[seen]]
        maps, _ = self.model.frame_features(self.transform(crops).to(self.device))
        return [Detection(box.reshape(2, 2), embedding=m) for box, m in zip(boxes[seen], maps, strict=True)]

    @torch.inference_mode()
    def embed(self, track: TrackedObject) -> torch.Tensor:
        newest = track.past_detections[-1]
        if track not in self.known or self.known[track][0] is not newest:
            maps = torch.stack([detection.embedding for detection in track.past_detections])
            self.known[track] = newest, F.normalize(self.model.aggregator(maps[None]), dim=1)[0]
        return self.known[track][1]

    def __call__(self, new_track: TrackedObject, lost_track: TrackedObject) -> float:
        return 1 - float(self.embed(new_track) @ self.embed(lost_track))
