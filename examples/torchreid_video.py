"""torchreid's video engine with an aggregator in the place of its average over frames.

Written for torchreid 1.4.0 (github.com/KaiyangZhou/deep-person-reid) and 0.2.5 of the package index, which has the same
interface. torchreid classifies every frame for itself in training and averages frames in evaluation; here a clip stays
a clip in both, so that the aggregator is trained.

    python examples/torchreid_video.py <root of the data sets>
"""

import sys

import torchreid
from torch import Tensor, nn

from temporal_agg import create_aggregator


class ClipModel(nn.Module):
    """A torchreid model's maps, then an aggregator: clips [B, S, 3, H, W] -> what torchreid's engines expect.

    Args:
        backbone: a model of torchreid.models that has ``featuremaps`` (resnet*, osnet*, mobilenetv2, mlfn, ...).
        in_features: channels of its maps: 2048 of resnet50, 512 of osnet_x1_0.
        num_classes: identities in training.
        aggregator: any name of list_aggregators() that does not want the frames themselves (all but loga).
    """

    def __init__(self, backbone: nn.Module, in_features: int, num_classes: int, aggregator: str = "attention"):
        super().__init__()
        self.backbone = backbone
        self.aggregator = create_aggregator(aggregator, in_features)
        self.bottleneck = nn.BatchNorm1d(self.aggregator.num_features)
        self.classifier = nn.Linear(self.aggregator.num_features, num_classes)
        for unused in ("global_avgpool", "fc", "classifier"):  # of the frames
            setattr(backbone, unused, None)

    def forward(self, clips: Tensor):
        maps = self.backbone.featuremaps(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
        embeddings = self.aggregator(maps)
        if not self.training:
            return embeddings
        return self.classifier(self.bottleneck(embeddings)), embeddings  # as a model of loss="triplet"


class ClipEngine(torchreid.engine.VideoTripletEngine):
    """Hands clips over whole: no flattening into frames before the model, no average after it."""

    def parse_data_for_train(self, data):
        return data["img"], data["pid"]

    def extract_features(self, input):
        return self.model(input)


def main(root: str) -> None:
    datamanager = torchreid.data.VideoDataManager(
        root=root,
        sources="mars",
        height=256,
        width=128,
        batch_size_train=16,
        seq_len=8,
        num_instances=4,
        train_sampler="RandomIdentitySampler",
    )
    people = datamanager.num_train_pids
    backbone = torchreid.models.build_model("resnet50", people, loss="triplet")
    model = ClipModel(backbone, 2048, people).cuda()
    optimizer = torchreid.optim.build_optimizer(model, optim="adam", lr=0.0003)
    scheduler = torchreid.optim.build_lr_scheduler(optimizer, lr_scheduler="single_step", stepsize=20)
    engine = ClipEngine(datamanager, model, optimizer, scheduler=scheduler)
    engine.run(save_dir="log/resnet50-attention-mars", max_epoch=60, dist_metric="cosine")


if __name__ == "__main__":
    main(sys.argv[1])
