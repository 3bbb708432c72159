"""Makes every figure that README and docs show, in docs/images/: python docs/make_figures.py

The model is the demonstration in hub/, the tracklets are synthetic. For the papers' figures their aggregators are
trained for some seconds on its frozen features, each with its own loss: the figures show what the maps look like, not
what the methods are worth.
"""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from temporal_agg import (
    Aggregator,
    ClipConfig,
    TrackletModel,
    create_aggregator,
    create_criterion,
    create_model,
    data,
    embed_tracklets,
    plot,
    retrieval,
)

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "images"
DEMONSTRATION = ROOT / "hub" / "attention_resnet10t.synthetic"
PAPERS = {
    "loga": {"clip_length": 8, "scale": 16.0},
    "grl": {},
    "gltr": {},
    "fgra": {"num_regions": 3, "reduced_features": 256},
}
LENGTH = 8  # frames of a clip
STEPS = 40
TRACKLET = 48  # somebody walks past


def main() -> None:
    OUT.mkdir(exist_ok=True)
    demonstration = create_model(f"local-dir:{DEMONSTRATION}").eval()
    options = json.loads((DEMONSTRATION / "settings.json").read_text(encoding="utf-8"))["settings"]["data_options"]
    draw_results(demonstration, data.open_dataset("synthetic", **options))
    people = data.open_dataset("synthetic", **{**options, "size": (128, 64), "length": (LENGTH, LENGTH)})
    tracklet = people.gallery[TRACKLET]
    save(plot.frame_weights(demonstration, tracklet), "frame_weights")
    train = people.train[:80]  # 20 people
    images = torch.stack([transform(demonstration)(t.load(range(LENGTH))) for t in train])
    with torch.inference_mode():
        maps = torch.stack([demonstration.encode_frames(clip) for clip in images])
    for name, extra in PAPERS.items():
        aggregator = trained(create_aggregator(name, maps.shape[2], **extra), name, train, maps.clone(), images)
        clip = ClipConfig(length=LENGTH, test_sampling="even")
        save(plot.maps(TrackletModel(demonstration.encoder, aggregator, clip), tracklet), name)


def transform(model: TrackletModel) -> data.ClipTransform:
    return data.ClipTransform.for_model(model)


def trained(aggregator: Aggregator, name: str, tracklets, maps: torch.Tensor, images: torch.Tensor) -> Aggregator:
    """Trains an aggregator with its paper's loss, on batches of two tracklets each of eight people."""
    torch.manual_seed(0)
    pids = sorted({t.pid for t in tracklets})
    labels = torch.tensor([pids.index(t.pid) for t in tracklets])
    criterion = create_criterion(name, num_classes=len(pids), model=aggregator)
    optimizer = torch.optim.AdamW([*aggregator.parameters(), *criterion.parameters()], lr=1e-3)
    for _ in range(STEPS):
        some = torch.randperm(len(pids))[:8]
        batch = torch.cat([(labels == label).nonzero().flatten()[torch.randperm(4)[:2]] for label in some])
        frames = images[batch] if aggregator.needs_frames else None
        loss = criterion(aggregator(maps[batch], frames=frames, return_details=True), labels[batch])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        criterion.after_step()
    return aggregator


def save(figure, name: str) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=82)
    pixels = np.asarray(Image.open(buffer).convert("RGB"), np.float32)
    # The noise of the frames makes most of the file: coarser steps, but not in the pale colours of maps.
    pale = pixels.min(2, keepdims=True) > 180
    coarse = np.where(pale, pixels, ((pixels / 12).round() * 12).clip(max=255))
    Image.fromarray(coarse.astype(np.uint8)).save(OUT / f"{name}.png", optimize=True)
    print(f"docs/images/{name}.png: {(OUT / f'{name}.png').stat().st_size // 1000} kB")


def draw_results(demonstration: TrackletModel, people: data.TrackletData) -> None:
    sides = (people.query, people.gallery)
    curves = {}
    fresh = TrackletModel(demonstration.encoder, create_aggregator("mean", demonstration.encoder.num_features))
    for label, model in {"attention": demonstration, "mean of the same frames": fresh}.items():
        query, gallery = (embed_tracklets(model, side, progress=False) for side in sides)
        distances = retrieval.distances(query, gallery, demonstration.clip.distance)
        metrics = retrieval.evaluate_tracklets(distances, *sides)
        curves[f"{label}: mAP {100 * metrics.map:.1f}"] = metrics.cmc
        if model is demonstration:
            rows = [0, 5, 9]
            titles = [f"person {people.query[row].pid}, camera {people.query[row].camera}" for row in rows]
            options = {"query_index": people.query_index, "ranks": 6, "titles": titles}
            save(plot.ranked_lists(distances, *sides, rows, **options), "ranked_lists")
            save(plot.embedding_map(gallery[:20], [t.pid for t in people.gallery[:20]]), "embedding_map")
    save(plot.cmc(curves), "cmc")


if __name__ == "__main__":
    main()
