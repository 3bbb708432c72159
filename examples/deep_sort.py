"""deep_sort_realtime with embeddings of temporal-agg: of each crop to join frames by, of each track to search with.

Written for deep_sort_realtime 1.3.2 (pip install deep-sort-realtime).

    people = DeepSortPeople(create_model("local-dir:runs/mine"))
    for frame in video:                                    # uint8 BGR [H, W, 3], as OpenCV reads it
        tracks = people.update(frame, boxes, scores)       # boxes [N, 4]: left, top, right, bottom
    ids, embeddings = people.stream.embeddings()           # of all tracks, from all of their crops
"""

from typing import Any

import numpy as np
from deep_sort_realtime.deepsort_tracker import DeepSort

from temporal_agg import TrackletModel, TrackletStream, crop_embedder


class DeepSortPeople:
    """DeepSort, and the tracklet embedding of every confirmed track.

    Args:
        model: turns crops into embeddings.
        **options: of ``DeepSort``, such as ``max_age`` and ``max_cosine_distance``.
    """

    def __init__(self, model: TrackletModel, **options: Any):
        self.tracker = DeepSort(embedder=None, **options)
        self.embed = crop_embedder(model, channels="bgr")
        self.stream: TrackletStream[str] = TrackletStream(model)

    def update(self, frame: np.ndarray, boxes: np.ndarray, scores: np.ndarray) -> list[Any]:
        """The tracks after the next frame, those that it did not show among them."""
        boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
        boxes = boxes[kept := (boxes[:, 2:] > boxes[:, :2]).all(1)]
        scores = np.asarray(scores, dtype=float)[kept]
        found = [
            ([left, top, right - left, bottom - top], score, "person")
            for (left, top, right, bottom), score in zip(boxes.tolist(), scores.tolist(), strict=True)
        ]
        tracks = self.tracker.update_tracks(found, embeds=self.embed(frame, boxes).numpy())
        crops, ids = [], []
        height, width = frame.shape[:2]
        for track in tracks:
            if track.is_confirmed() and track.time_since_update == 0:
                left, top, right, bottom = np.round(track.to_ltrb(orig=True)).astype(int)
                crop = frame[max(0, top) : min(height, bottom), max(0, left) : min(width, right), ::-1]
                if crop.size:
                    crops.append(np.ascontiguousarray(crop))
                    ids.append(track.track_id)
        self.stream.update(crops, ids)
        return tracks
