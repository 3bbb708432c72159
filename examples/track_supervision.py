"""Trackers of Roboflow's `trackers` with tracklet embeddings: who was lost and comes back gets the same number again.

Written for trackers 2.6.1 and supervision 0.31.2 (pip install trackers supervision). The tracker joins the boxes of
successive frames, by their place alone; the embedding of a new track, from all crops that it has had, is compared with
those of the tracks that were lost before.

    people = LinkedTracker(create_model("local-dir:runs/mine"), ByteTrackTracker())
    for frame in sv.get_video_frames_generator("door.mp4"):       # uint8 BGR [H, W, 3]
        detections = people.update(frame, detector(frame))        # sv.Detections, with numbers in tracker_id
"""

from typing import Any

import numpy as np
import supervision as sv
import torch
from torch.nn import functional as F

from temporal_agg import TrackletModel, TrackletStream


class LinkedTracker:
    """A tracker whose tracks get the numbers of people.

    Args:
        model: turns crops into embeddings.
        tracker: of `trackers`, or anything whose ``update`` takes and returns ``sv.Detections``.
        threshold: the largest cosine distance between two tracks of one person.
        min_frames: crops that a track must have before it is compared; its number is -1 until then.
        memory: frames for which a lost track is remembered.
        bgr: the order of the frames' channels, as OpenCV has it; False = RGB.
    """

    def __init__(
        self,
        model: TrackletModel,
        tracker: Any,
        *,
        threshold: float = 0.3,
        min_frames: int = 5,
        memory: int = 900,
        bgr: bool = True,
    ):
        self.stream: TrackletStream[int] = TrackletStream(model)
        self.tracker, self.bgr = tracker, bgr
        self.threshold, self.min_frames, self.memory = threshold, min_frames, memory
        self.person: dict[int, int] = {}  # of a track that has been compared
        self.count: dict[int, int] = {}  # crops of each track
        self.seen: dict[int, int] = {}  # when it was seen last
        self.time = 0
        self.people = 0

    def update(self, frame: np.ndarray, detections: sv.Detections) -> sv.Detections:
        """The tracked detections of the next frame, with the number of a person (or -1) as ``tracker_id``."""
        self.time += 1
        tracked = self.tracker.update(detections)
        ids = np.asarray(tracked.tracker_id)
        crops, tracks = [], []
        for box, track in zip(tracked.xyxy, ids.tolist(), strict=True):
            crop = sv.crop_image(frame, box)
            if track >= 0 and crop.size:
                crops.append(np.ascontiguousarray(crop[..., ::-1] if self.bgr else crop))
                tracks.append(track)
                self.count[track] = self.count.get(track, 0) + 1
                self.seen[track] = self.time
        self.stream.update(crops, tracks)
        for track in tracks:
            if track not in self.person and self.count[track] >= self.min_frames:
                self.person[track] = self._link(track)
        for track in [track for track, last in self.seen.items() if self.time - last > self.memory]:
            self._forget(track)
        tracked.tracker_id = np.array([self.person.get(track, -1) for track in ids.tolist()], dtype=int)
        return tracked

    def _link(self, track: int) -> int:
        """The person of the nearest lost track, whose place this track takes; or somebody new."""
        lost = [other for other in self.person if self.seen[other] < self.time]
        if lost:
            gallery = F.normalize(torch.stack([self.stream.embedding(other) for other in lost]), dim=1)
            distances = 1 - gallery @ F.normalize(self.stream.embedding(track), dim=0)
            if distances.min() <= self.threshold:
                found = lost[int(distances.argmin())]
                person = self.person[found]
                self._forget(found)
                return person
        self.people += 1
        return self.people - 1

    def _forget(self, track: int) -> None:
        self.stream.drop(track)
        for known in (self.person, self.count, self.seen):
            known.pop(track, None)
