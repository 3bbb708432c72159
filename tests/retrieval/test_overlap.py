"""Tracklets that have frames in common."""

import numpy as np
import pytest

from temporal_agg.retrieval import _overlap
from temporal_agg.retrieval._overlap import overlaps


def tracklets(rng, count):
    return [rng.integers(0, 12, rng.integers(0, 6)).astype("<u8").tobytes() for _ in range(count)]


def frames(marks):
    return [marks[i : i + 8] for i in range(0, len(marks), 8)]


def naive(queries, gallery, most):
    """Frame by frame; one that comes twice in a tracklet, or in many tracklets of the gallery, counts for nothing."""
    once = [[{x for x in frames(t) if frames(t).count(x) == 1} for t in side] for side in (queries, gallery)]
    found = {}
    for i, own in enumerate(once[0]):
        for j, other in enumerate(once[1]):
            both = [x for x in own & other if sum(x in t for t in once[1]) <= most]
            if both:
                found[i, j] = len(both) / min(len(frames(queries[i])), len(frames(gallery[j])))
    return found


@pytest.mark.parametrize("most", [100, 2])
def test_the_same_as_frame_by_frame(most, monkeypatch):
    monkeypatch.setattr(_overlap, "COMMON", most)
    monkeypatch.setattr(_overlap, "PIECE", 3)
    rng = np.random.default_rng(0)
    some = 0
    for _ in range(60):
        queries, gallery = tracklets(rng, rng.integers(0, 6)), tracklets(rng, rng.integers(0, 6))
        rows, columns, parts = overlaps(queries, gallery)
        got = list(zip(rows.tolist(), columns.tolist(), strict=True))
        assert got == sorted(got)
        assert dict(zip(got, parts.tolist(), strict=True)) == naive(queries, gallery, most)
        some += len(got)
    assert some > 30
