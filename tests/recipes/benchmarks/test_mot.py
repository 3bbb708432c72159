"""Tracks of a MOT sequence: boxes are read, tracks linked and found again as a loop would; the page is the file's."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F


@pytest.fixture(scope="module")
def mot(recipe):
    return recipe("mot")


def rows_of(mot, tracks):
    """Tracks as {id: frames}, in order of time."""
    found = sorted((frame, i) for i, frames in tracks.items() for frame in frames)
    frames, ids = zip(*found, strict=True)
    return mot.Rows(np.array(frames), np.array(ids), np.zeros((len(ids), 4)))


def look(person, width=8):
    return F.one_hot(torch.tensor(person), width).float()


def test_boxes_with_and_without_a_head(mot, tmp_path):
    lines = "1,-1,10,20,30,40,0.5,-1,-1,-1\n2,-1,1,2,3,4,0.9\n"
    for head in ("", "frame,id,bb_left,bb_top,bb_width,bb_height,conf,x,y,z\n"):
        (tmp_path / "det.txt").write_text(head + lines)
        assert mot.detections(tmp_path / "det.txt").tolist() == [[1, 10, 20, 40, 60, 0.5], [2, 1, 2, 4, 6, 0.9]]
    for wrong in ("3,-1,left", "3,-1,1,2,3,4,1_0", "3,-1,1,2,inf,4,1", "3,-1,1,2,3,4"):
        (tmp_path / "det.txt").write_text(f"{lines}{wrong}\n")
        with pytest.raises(ValueError, match=r"det\.txt, line 3: expected frame,id,left"):
            mot.detections(tmp_path / "det.txt")


def test_the_moving_average_is_its_formula(mot):
    x = torch.rand(4, 3)
    unit = x / x.norm(dim=1, keepdim=True)
    want = unit[0]
    for row in unit[1:]:
        want = 0.9 * want + 0.1 * row
        want = want / want.norm()
    torch.testing.assert_close(mot.averaged(0.9)(x[None])[0], want)


def test_a_lost_track_gets_its_number_back(mot):
    """3 is 1 again. 4 looks like 2 who is still there; 5 looks like nobody; 6 has too few frames; 7 comes too late."""
    tracks = {
        1: range(1, 10), 2: range(1, 40), 3: range(20, 30), 4: range(15, 40), 5: range(30, 40), 6: range(50, 52),
        7: range(200, 210),
    }  # fmt: skip
    person = {1: 1, 2: 2, 3: 1, 4: 2, 5: 3, 6: 1, 7: 1}
    rows = rows_of(mot, tracks)
    features = torch.stack([look(person[int(i)]) for i in rows.id])
    people = mot.linked(rows, features, mot.averaged(0.9), threshold=0.3, least=5, memory=100)
    assert {int(i): int(p) for i, p in zip(rows.id, people, strict=True)} == {1: 1, 2: 2, 3: 1, 4: 4, 5: 5, 6: 6, 7: 7}


def test_reassociation_asks_the_same_for_every_n(mot, monkeypatch):
    monkeypatch.setattr(mot, "FRAMES", (1, 3))
    monkeypatch.setattr(mot, "GAPS", (5, 500))
    rows = rows_of(mot, {i: range(1, 60) for i in range(3)})
    features = torch.stack([look(int(i)) for i in rows.id])
    found = mot.reassociation(rows, features, lambda x: F.normalize(x.mean(1), dim=1))
    assert [(row["gap"], row["frames"]) for row in found] == [(5, 1), (5, 3)], "nobody is there after the longer gap"
    assert {row["rank1"] for row in found} == {1.0}
    assert [row["guess"] for row in found] == pytest.approx([1 / 3, 1 / 3])
    assert len({row["queries"] for row in found}) == 1


def test_tracks_are_those_of_the_real_package(mot, tmp_path):
    """Two people who walk past each other are two tracks; the evaluation of their own boxes is perfect."""
    pytest.importorskip("trackers", reason="trackers is not installed (pip install trackers supervision)")
    found = np.array(
        [(f, x, 50, x + 40, 150, 0.9) for f in range(1, 31) for x in (10 + 5 * f, 400 - 5 * f + 300)], dtype=float
    )
    rows = mot.tracked(found, 30, {"track_activation_threshold": 0.5, "high_conf_det_threshold": 0.5})
    assert len(set(rows.id.tolist())) == 2
    scores = mot.evaluated(rows, rows.id, rows, tmp_path, "own")
    assert (scores["IDF1"], scores["MOTA"], scores["people"]) == (1.0, 1.0, 2)


def test_the_page_is_that_of_the_kept_file(mot):
    from pathlib import Path

    results = Path(mot.__file__).parent / "results"
    study = json.loads((results / "mot.json").read_text(encoding="utf-8"))
    assert (results / "mot.md").read_text(encoding="utf-8") == mot.text(study)
    page = (Path(mot.__file__).parents[2] / "docs" / "tracking.md").read_text(encoding="utf-8")
    assert "results/mot.md" in page
    assert "results/mot.png" in page
