import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from temporal_agg.data import ImageError, Tracklet
from temporal_agg.retrieval import contact_sheet

NAMES = ["7/1_a", '</script><img src=x onerror="alert(1)">', "Łódź ☃", "<!-- & \udcff"]


def page_of(path):
    page = path.read_text(encoding="utf-8")
    return page, json.loads(re.search(r'<script type="application/json" id="content">(.*?)</script>', page, re.S)[1])


@pytest.fixture
def tracklets():
    rng = np.random.default_rng(0)
    return [
        Tracklet([rng.integers(0, 256, (40, 20, 3), np.uint8) for _ in range(n)], 0, camera, name)
        for n, camera, name in zip((1, 3, 9, 20), (1, 2, -1, 1), NAMES, strict=True)
    ]


def test_one_file_that_holds_everything(tracklets, tmp_path):
    contact_sheet(tmp_path / "people.html", tracklets, [0, 0, 2, 1], title="<People>")
    assert [p.name for p in tmp_path.iterdir()] == ["people.html"]
    page, content = page_of(tmp_path / "people.html")
    assert not re.search(r"""(src|href)\s*=\s*["']?(http|//|/)|url\(|import """, page), "nothing comes from elsewhere"
    assert page.count("<script") == page.count("</script>") == 2, "no text ends the script element"
    assert "onerror" not in page.replace(json.dumps(NAMES[1]).replace("<", "\\u003c"), "")
    assert content["title"] == "<People>"
    assert [t["name"] for t in content["tracklets"]] == [*NAMES[:3], "<!-- & ?"]
    assert [t["person"] for t in content["tracklets"]] == [0, 0, 2, 1]
    assert [len(t["images"]) for t in content["tracklets"]] == [1, 3, 4, 4]
    for uri in content["tracklets"][3]["images"]:
        kind, data = uri.split(",")
        assert kind == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (48, 96)


def test_thumbnails_are_the_frames(tmp_path):
    """Evenly spread: of eight frames, four of them the middles of four equal parts."""
    t = Tracklet([np.full((10, 10, 3), 30 * i, np.uint8) for i in range(8)], 0, name="grey")
    contact_sheet(tmp_path / "p.html", [t], [0], height=20)
    images = page_of(tmp_path / "p.html")[1]["tracklets"][0]["images"]
    levels = [np.array(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))).mean() for uri in images]
    np.testing.assert_allclose(levels, [30, 90, 150, 210], atol=3)


def test_errors_say_what_came(tracklets, tmp_path):
    path = tmp_path / "people.html"
    with pytest.raises(ValueError, match=r"labels must have the shape \[4\] to fit 4 tracklets, got \[1\]"):
        contact_sheet(path, tracklets, [0])
    with pytest.raises(ValueError, match="frames must be at least 1"):
        contact_sheet(path, tracklets, [0] * 4, frames=0)
    with pytest.raises(ImageError, match="absent"):
        contact_sheet(path, [Tracklet(["absent.png"], 0)], [0])
    assert not path.exists()
