"""Losses and miners of pytorch-metric-learning on tracklet embeddings.

    pip install pytorch-metric-learning
    python examples/metric_learning.py

Written for pytorch-metric-learning 2.9. Its losses take embeddings [B, D] and labels [B], which is what a model gives.
"""

import torch
from pytorch_metric_learning import losses, miners
from torch.utils.data import DataLoader

from temporal_agg import TrackletModel, create_model, data


def train(dataset: data.TrackletData, model: TrackletModel, epochs: int) -> list[float]:
    miner = miners.MultiSimilarityMiner()
    metric_loss = losses.MultiSimilarityLoss()
    class_loss = losses.ArcFaceLoss(len(dataset.label_map), model.num_features)  # a loss with weights of its own
    optimizer = torch.optim.Adam([*model.parameters(), *class_loss.parameters()], lr=3e-4)

    config = model.data_config
    transform = data.ClipTransform(
        config["input_size"][1:], config["mean"], config["std"], config["interpolation"], train=True
    )
    batches = data.IdentityBatchSampler([t.pid for t in dataset.train], identities_per_batch=4, clips_per_identity=4)
    clips = data.ClipDataset(dataset.train, dataset.label_map, transform, length=4)
    loader = DataLoader(clips, batch_sampler=batches, collate_fn=data.collate_clips)
    history = []
    model.train()
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for batch in loader:
            embeddings, labels = model(batch["clip"], batch["mask"]), batch["label"]
            loss = metric_loss(embeddings, labels, miner(embeddings, labels)) + class_loss(embeddings, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        print(f"epoch {epoch}: loss {history[-1]:.3f}")
    return history


if __name__ == "__main__":
    people = data.open_dataset("synthetic", num_identities=16)
    train(people, create_model("attention_resnet18", img_size=(128, 64)), epochs=5)
