"""A page of thumbnails on which a person confirms or corrects who is who."""

import base64
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .._files import replace_file
from ._arrays import Ids, ids, whole

__all__ = ["contact_sheet"]

_PAGE = Path(__file__).with_name("contact_sheet.html")


def contact_sheet(
    path: str | os.PathLike,
    tracklets: Sequence[Any],
    labels: Ids,
    *,
    frames: int = 4,
    height: int = 96,
    title: str = "People",
) -> None:
    """Writes one HTML file, which needs nothing else: persons, their tracklets, and buttons to put right what is wrong.

    Tracklets are picked and moved to another person or to a new one; persons are merged and confirmed. The page keeps
    the state in the browser, and "Download CSV" has it with the columns ``name``, ``person`` and ``confirmed``.

    Args:
        path: of the file; replaced as a whole.
        tracklets: ``[N]`` tracklets, or anything with ``name``, ``camera``, ``len()`` and ``load()``.
        labels: ``[N]`` persons, as ``link`` gives them.
        frames: thumbnails of each tracklet, evenly spread over it.
        height: of a thumbnail, in pixels.
        title: of the page.

    Raises:
        TypeError: labels that are no integers.
        ValueError: labels that do not fit; frames or height below 1.
        ImageError: a frame that cannot be read.
        OSError: the file cannot be written.
    """
    frames, height = whole("frames", frames), whole("height", height)
    persons = ids("labels", labels, len(tracklets), f"{len(tracklets)} tracklets").tolist()
    rows = []
    for tracklet, person in zip(tracklets, persons, strict=True):
        count = min(frames, len(tracklet))
        places = [int((2 * i + 1) * len(tracklet) / (2 * count)) for i in range(count)]
        rows.append(
            {
                "name": _printable(str(tracklet.name)),
                "camera": int(tracklet.camera),
                "frames": len(tracklet),
                "person": person,
                "images": [_data_uri(image, height) for image in tracklet.load(places)],
            }
        )
    # Text reaches the page as JSON, of which no part can end the script element, and is shown as text nodes.
    content = json.dumps({"title": _printable(title), "tracklets": rows}).replace("<", "\\u003c")
    page = _PAGE.read_text(encoding="utf-8").replace("{{content}}", content)
    replace_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _data_uri(image: Any, height: int) -> str:
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    picture = picture.resize((max(1, round(picture.width * height / picture.height)), height))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _printable(text: str) -> str:
    """Without the halves of characters that stand for the bytes of names in no encoding."""
    return text.encode("utf-8", "replace").decode()
