"""What somebody writes who uses the library and a type checker: ``mypy`` runs over it (it is no test of its own)."""

from pathlib import Path

import torch
from torch import Tensor

import temporal_agg
from temporal_agg import ClipConfig, Details, Tracklet, TrackletModel, data, retrieval
from temporal_agg.retrieval import RetrievalMetrics


def train_step(model: TrackletModel, clips: Tensor, labels: Tensor, lr: float = 1e-3) -> float:
    criterion = temporal_agg.create_criterion("baseline", num_classes=10, model=model)
    optimizer = torch.optim.Adam([*model.parameters(), *criterion.parameters()], lr=lr)
    details: Details = model(clips, return_details=True)
    loss: Tensor = criterion(details, labels)["loss"]
    loss.backward()
    optimizer.step()
    return float(loss)


def evaluate(model: TrackletModel, root: Path) -> RetrievalMetrics:
    dataset = data.open_dataset("folder", root)
    queries: Tensor = temporal_agg.embed_tracklets(model, dataset.query, precision="float32")
    gallery: Tensor = temporal_agg.embed_tracklets(model, dataset.gallery)
    distances: Tensor = retrieval.distances(queries, gallery, model.clip.distance)
    return retrieval.evaluate_tracklets(distances, dataset.query, dataset.gallery)


def embedding_of(model: TrackletModel, files: list[Path]) -> Tensor:
    clip: ClipConfig = model.clip
    indices, mask = clip.cut(len(files))
    assert indices.shape == mask.shape
    embedding: Tensor = model(torch.zeros(1, clip.length, 3, 64, 32))
    return embedding + temporal_agg.embed_tracklets(model, [Tracklet(files, pid=0)])
