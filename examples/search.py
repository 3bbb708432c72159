"""Saved weights, tracklets of any length, and the people who look like one of them.

    python examples/search.py

The demonstration weights in hub/ were trained on drawn figures: they show how it goes, and are worth nothing on people.
With your own: "local-dir:runs/mine" or "hf-hub:owner/name", and data.open_dataset("folder", root).
"""

from pathlib import Path

from temporal_agg import create_model, data, embed_tracklets, retrieval

WEIGHTS = Path(__file__).parents[1] / "hub" / "attention_resnet10t.synthetic"


def search(query: int = 0, k: int = 5) -> list[data.Tracklet]:
    """The k gallery tracklets that are nearest to a query."""
    model = create_model(f"local-dir:{WEIGHTS}")
    dataset = data.open_dataset(
        "synthetic", num_identities=20, length=(6, 14), size=(64, 32), seed=100
    )  # nobody it was trained on
    gallery = embed_tracklets(model, dataset.gallery)
    distances = retrieval.distances(embed_tracklets(model, [dataset.query[query]]), gallery, model.clip.distance)[0]
    found = distances.topk(k, largest=False)
    for rank, (distance, place) in enumerate(zip(found.values, found.indices, strict=True), 1):
        tracklet = dataset.gallery[place]
        hit = "the same person" if tracklet.pid == dataset.query[query].pid else f"person {tracklet.pid}"
        print(f"{rank}: {distance:.3f}  {len(tracklet)} frames in camera {tracklet.camera}, {hit}")
    return [dataset.gallery[place] for place in found.indices]


if __name__ == "__main__":
    search()
