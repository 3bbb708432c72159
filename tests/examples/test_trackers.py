"""The examples for trackers, driven with the real packages; each test is skipped where its packages are missing."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Colours
from test_inference import embed

from temporal_agg import Tracklet, TrackletModel, create_aggregator
from temporal_agg.aggregators import ClipConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def model():
    return TrackletModel(Colours(), create_aggregator("mean", 3), ClipConfig(4)).eval()


def scene(time):
    """A BGR frame, and the boxes in it: red leaves and comes back elsewhere; then blue comes, who is new."""
    frame = np.full((100, 300, 3), 128, np.uint8)
    boxes = {"green": (10 + time, 10, 40 + time, 90)}
    if time < 20:
        boxes["red"] = (150 + time, 10, 180 + time, 90)
    elif time >= 60:
        boxes["red"] = (260 - (time - 60), 10, 290 - (time - 60), 90)
    if time >= 70:
        boxes["blue"] = (150, 5, 175, 85)
    for name, (x1, y1, x2, y2) in boxes.items():
        frame[y1:y2, x1:x2] = COLOURS[name][::-1]
    return frame, boxes


def example(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_track_supervision():
    sv = pytest.importorskip("supervision", reason="needs supervision")
    trackers = pytest.importorskip("trackers", reason="needs trackers")
    linked = example("track_supervision").LinkedTracker(
        model(), trackers.ByteTrackTracker(lost_track_buffer=10), threshold=0.3, min_frames=3
    )
    numbers = {}
    for time in range(100):
        frame, boxes = scene(time)
        xyxy = np.array(list(boxes.values()), dtype=float)
        got = linked.update(frame, sv.Detections(xyxy, confidence=np.full(len(xyxy), 0.9)))
        for box, number in zip(got.xyxy, got.tracker_id, strict=True):
            name = next(name for name, known in boxes.items() if np.allclose(known, box))
            if number >= 0:
                numbers.setdefault(name, set()).add(int(number))
    assert {len(found) for found in numbers.values()} == {1}, "red has its number again"
    assert len(set().union(*numbers.values())) == 3, "and nobody else's"
    assert len(linked.stream) == 3, "a lost track is replaced by the one that it goes on as"


def test_deep_sort():
    pytest.importorskip("deep_sort_realtime.deepsort_tracker", reason="needs deep_sort_realtime")
    people = example("deep_sort").DeepSortPeople(model(), max_age=60, n_init=3, max_cosine_distance=0.2)
    names, crops = {}, {}
    for time in range(100):
        frame, boxes = scene(time)
        for track in people.update(frame, list(boxes.values()), [0.9] * len(boxes)):
            if track.is_confirmed() and track.time_since_update == 0:
                box = track.to_ltrb(orig=True)
                name = next(name for name, known in boxes.items() if np.allclose(known, box))
                names.setdefault(name, set()).add(track.track_id)
                x1, y1, x2, y2 = boxes[name]
                crops.setdefault(track.track_id, []).append(frame[y1:y2, x1:x2, ::-1].copy())
    assert {len(found) for found in names.values()} == {1}
    ids, rows = people.stream.embeddings()
    assert sorted(ids) == sorted(crops)
    want = embed(model(), [Tracklet(crops[track], 1) for track in ids])
    torch.testing.assert_close(rows, want, rtol=1e-4, atol=1e-5)
    assert people.update(np.zeros((50, 50, 3), np.uint8), [], []) is not None
