"""A plain PyTorch loop: your own CNN, with an aggregator in the place of your average over time.

    python examples/training_loop.py

What is yours: the CNN, the data, the optimizer. What is added: the three lines marked with (+).
"""

import torch
from torch import nn
from torch.utils.data import DataLoader

from temporal_agg import TrackletModel, create_aggregator, create_criterion, data, embed_tracklets, evaluate, retrieval


class YourCNN(nn.Module):
    """Frames [N, 3, H, W] -> maps [N, C, h, w]: the network without its pooling and classifier."""

    num_features = 64
    data_config = {  # noqa: RUF012 - what TrackletModel wants to know, to embed whole tracklets later
        "input_size": (3, 64, 32),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "interpolation": "bilinear",
    }

    def __init__(self):
        super().__init__()
        self.stages = nn.Sequential(self.stage(3, 16), self.stage(16, 32), self.stage(32, 64))

    @staticmethod
    def stage(inputs, outputs):
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, frames, flow=None):
        return self.stages(frames)


def train(dataset: data.TrackletData, epochs: int, name: str = "gltr") -> TrackletModel:
    cnn = YourCNN()
    aggregator = create_aggregator(name, in_features=cnn.num_features)  # (+)
    criterion = create_criterion(name, len(dataset.label_map), aggregator)  # (+) the paper's losses, or your own
    optimizer = torch.optim.Adam([*cnn.parameters(), *aggregator.parameters(), *criterion.parameters()], lr=1e-3)

    config = cnn.data_config
    transform = data.ClipTransform(
        config["input_size"][1:], config["mean"], config["std"], config["interpolation"], train=True
    )
    batches = data.IdentityBatchSampler([t.pid for t in dataset.train], identities_per_batch=4, clips_per_identity=4)
    clips = data.ClipDataset(dataset.train, dataset.label_map, transform, length=6)
    loader = DataLoader(clips, batch_sampler=batches, collate_fn=data.collate_clips)
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for batch in loader:
            maps = cnn(batch["clip"].flatten(0, 1)).unflatten(0, batch["mask"].shape)  # [B, T, C, h, w]
            details = aggregator(maps, batch["mask"], return_details=True)  # (+) details.embedding: [B, D]
            losses = criterion(details, batch["label"])
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            criterion.after_step()
        print(f"epoch {epoch}: loss {losses['loss']:.3f}")
    return TrackletModel(cnn, aggregator)


def test(model: TrackletModel, dataset: data.TrackletData) -> retrieval.RetrievalMetrics:
    query, gallery = (embed_tracklets(model, part) for part in (dataset.query, dataset.gallery))
    labels = ([getattr(t, key) for t in part] for part in (dataset.query, dataset.gallery) for key in ("pid", "camera"))
    return evaluate(retrieval.distances(query, gallery, model.clip.distance), *labels)


if __name__ == "__main__":
    people = data.open_dataset("synthetic", num_identities=16)
    metrics = test(train(people, epochs=10), people)
    print(f"mAP {metrics.map:.3f}, rank-1 {metrics.rank(1):.3f}")
