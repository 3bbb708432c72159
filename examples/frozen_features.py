"""Frozen features of a foundation model (DINOv2, ...), with only the aggregator trained.

    python examples/frozen_features.py                  # downloads timm's weights of the backbone

The backbone sees every frame once; what it gives is kept (a vector a frame, or maps where the aggregator wants them),
and the aggregator is trained on that without it. Any timm model works: DINOv3, CLIP, SigLIP, a ResNet.
"""

import torch
from torch import Tensor

from temporal_agg import FrameEncoder, TrackletModel, create_aggregator, create_criterion, data


@torch.no_grad()
def encode(encoder: FrameEncoder, tracklet: data.Tracklet, maps: bool) -> Tensor:
    """All frames of a tracklet: [T, C, h, w], or [T, C] where vectors will do."""
    config = encoder.data_config
    transform = data.ClipTransform(
        config["input_size"][1:], config["mean"], config["std"], interpolation=config["interpolation"]
    )
    parts = [encoder(transform(tracklet.load(part))) for part in torch.arange(len(tracklet)).split(64)]
    features = torch.cat(parts)
    return features if maps else features.mean((2, 3))


def train(dataset: data.TrackletData, encoder: FrameEncoder, name: str, steps: int, length: int = 8) -> TrackletModel:
    encoder.eval().requires_grad_(False)
    aggregator = create_aggregator(name, encoder.num_features)
    criterion = create_criterion(name, len(dataset.label_map), aggregator)
    optimizer = torch.optim.Adam([*aggregator.parameters(), *criterion.parameters()], lr=1e-3)

    features = [encode(encoder, tracklet, aggregator.needs_maps) for tracklet in dataset.train]
    batches = data.IdentityBatchSampler([t.pid for t in dataset.train], identities_per_batch=4, clips_per_identity=4)
    generator = torch.Generator().manual_seed(0)
    step = 0
    while step < steps:
        batches.set_epoch(step)
        for draws in batches:
            clips, masks = [], []
            for draw in draws:
                frames, mask = data.sample_frames(len(features[draw.index]), length, "chunks", generator=generator)
                clips.append(features[draw.index][frames])
                masks.append(mask)
            labels = torch.tensor([dataset.label_map[dataset.train[draw.index].pid] for draw in draws])
            details = aggregator(torch.stack(clips), torch.stack(masks), return_details=True)
            losses = criterion(details, labels)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            criterion.after_step()
            step += 1
    print(f"{step} steps: " + ", ".join(f"{key} {value:.3f}" for key, value in losses.items()))
    return TrackletModel(encoder, aggregator)


if __name__ == "__main__":
    people = data.open_dataset("synthetic", num_identities=16)
    dino = FrameEncoder("vit_small_patch14_dinov2", pretrained=True, img_size=(252, 126))
    train(people, dino, "gltr", steps=200).save_pretrained("runs/frozen-dinov2-gltr")
