"""Saved weights, tracklets of any length, and the people who look like one of them.

    python examples/search.py                  # on drawn figures, since no people come with the library
    python examples/search.py <root>           # <root>/{query,gallery}/<pid>/<camera>_<tracklet>/*.jpg

The weights in hub/ were trained on the people of WARD. Others: "hf-hub:owner/name", or "local-dir:runs/mine".
"""

import sys
from pathlib import Path

from temporal_agg import create_model, data, embed_tracklets, retrieval

WEIGHTS = Path(__file__).parents[1] / "hub" / "mean_mobilenetv2_100.ward"


def search(root: str = "", query: int = 0, k: int = 5) -> list[data.Tracklet]:
    """The k gallery tracklets that are nearest to a query."""
    model = create_model(f"local-dir:{WEIGHTS}")
    if root:
        dataset = data.open_dataset("folder", root)
    else:
        dataset = data.open_dataset("synthetic", num_identities=20, length=(6, 14), size=(128, 64), seed=100)
    gallery = embed_tracklets(model, dataset.gallery)
    distances = retrieval.distances(embed_tracklets(model, [dataset.query[query]]), gallery, model.clip.distance)[0]
    found = distances.topk(k, largest=False)
    for rank, (distance, place) in enumerate(zip(found.values, found.indices, strict=True), 1):
        tracklet = dataset.gallery[place]
        hit = "the same person" if tracklet.pid == dataset.query[query].pid else f"person {tracklet.pid}"
        print(f"{rank}: {distance:.3f}  {len(tracklet)} frames in camera {tracklet.camera}, {hit}")
    return [dataset.gallery[place] for place in found.indices]


if __name__ == "__main__":
    search(*sys.argv[1:2])
