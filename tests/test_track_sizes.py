"""What a track keeps, in bytes: as docs/tracking.md has it, and growing only where it must.

python tests/test_track_sizes.py writes the table.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from temporal_agg.aggregators import create_aggregator, list_aggregators
from temporal_agg.aggregators.registry import registry_entry
from temporal_agg.models import TrackletModel
from temporal_agg.stream import TrackletStream

PAGE = Path(__file__).parents[1] / "docs" / "tracking.md"
BEGIN, END = "<!-- bytes a track -->", "<!-- end of bytes a track -->"
C, MAPS, SIZE = 512, (8, 4), (64, 32)  # resnet18 at 256x128; the frames are smaller here, and LOGA's images with them
GROWING = {"gltr": 129, "gltr_released": 129, "nan": 513, "robust": 513}  # numbers a frame, one of them the mask


class Maps(nn.Module):
    num_features = C
    data_config = {"input_size": (3, *SIZE), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear"}  # noqa: RUF012
    config = None

    def forward(self, frames, flow=None):
        return frames.mean((1, 2, 3)).view(-1, 1, 1, 1).expand(-1, C, *MAPS) + torch.linspace(0, 1, C).view(-1, 1, 1)


def sizes(name):
    """Bytes of a track after 1 and 2 frames where the aggregator streams, else after 64 and 128."""
    aggregator = create_aggregator(name, C).eval()
    clip = registry_entry(name).clip
    if aggregator.supports_streaming:
        clip = type(clip)(clip.length, test_sampling="all")
    stream = TrackletStream(TrackletModel(Maps(), aggregator, clip))
    frame, found = np.zeros((*SIZE, 3), np.uint8), []
    for count in (1, 1) if aggregator.supports_streaming else (64, 64):
        stream.update([frame] * count, [0] * count)
        found.append(stream.nbytes(0))
    return aggregator, clip, found


def row(name):
    aggregator, clip, (early, late) = sizes(name)
    if not aggregator.supports_streaming:
        window = f"features of the last {clip.length} frames, and a sum"
        what = window if clip.test_sampling == "dense" else "features of at most 64 frames"
        return f"| `{name}` | {early:,} | {what} |"
    step = late - early
    what = f"{step:,} more with every frame" if step else "stays as it is"
    return f"| `{name}` | {early - step:,} | {what} |"


def table():
    head = ["| aggregator | bytes | |", "|---|---|---|"]
    return "\n".join([BEGIN, "", *head, *map(row, list_aggregators()), "", END])


@pytest.mark.parametrize("name", re.findall(r"^\| `(\w+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
def test_a_state_grows_only_where_it_must(name):
    aggregator, _, (early, late) = sizes(name)
    if not aggregator.supports_streaming:
        assert late == early, "windows keep as many frames as they have, however many came"
    numbers = GROWING.get(name, 0)
    assert late - early == (4 * (numbers - 1) + 1 if numbers else 0)
    assert row(name) in PAGE.read_text(encoding="utf-8"), "run: python tests/test_track_sizes.py"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(f"{BEGIN}.*{END}", table(), text, flags=re.DOTALL), encoding="utf-8")
