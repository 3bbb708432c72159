import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Colours
from torch import nn

from temporal_agg import FrameEncoder, TrackletModel, create_aggregator, create_model, data

EXAMPLES = Path(__file__).parents[2] / "examples"
STAND_INS = Path(__file__).with_name("stand_ins")


@pytest.fixture
def example(monkeypatch):
    """Loads an example, with stand-ins for the packages that are not installed."""

    def load(name, package=None):
        monkeypatch.syspath_prepend(str(EXAMPLES))  # as when it is run as a script
        if package and importlib.util.find_spec(package) is None:
            monkeypatch.syspath_prepend(str(STAND_INS))
        spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="module")
def people():
    return data.synthetic_data(num_identities=8, num_cameras=2, length=(6, 10), size=(64, 32), faults={})


@pytest.mark.slow
def test_training_loop(example, people, capsys):
    torch.manual_seed(0)
    loop = example("training_loop")
    model = loop.train(people, epochs=20)
    # Four people are enough to learn by heart, not to recognise others.
    metrics = loop.test(model, data.TrackletData([], people.train, people.train))
    assert metrics.map > 0.6
    history = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert history[-1] < 0.1 * history[0]


@pytest.mark.slow
def test_metric_learning(example, people):
    torch.manual_seed(0)
    history = example("metric_learning").train(people, create_model("mean_resnet10t", img_size=(32, 16)), epochs=5)
    assert history[-1] < 0.9 * history[0]


@pytest.mark.parametrize("name", ["gltr", "grl"])  # on vectors, on maps
def test_frozen_features(example, people, name, tmp_path):
    torch.manual_seed(0)
    encoder = FrameEncoder("test_vit", img_size=(32, 16))
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    model = example("frozen_features").train(people, encoder, name, steps=2)
    assert all(torch.equal(value, before[key]) for key, value in model.encoder.state_dict().items())
    fresh = create_aggregator(name, encoder.num_features)
    assert any(not torch.equal(a, b) for a, b in zip(fresh.parameters(), model.aggregator.parameters(), strict=True))
    model.save_pretrained(tmp_path)


def test_torchreid(example, tmp_path):
    torch.manual_seed(0)
    video = example("torchreid_video", "torchreid")

    class Loaders:
        """What torchreid's VideoDataManager hands to an engine."""

        def __init__(self, clips, pids):
            batch = {"img": clips, "pid": pids, "camid": torch.arange(len(pids)) % 2}
            self.train_loader = [batch]
            self.test_loader = {"people": {"query": [batch], "gallery": [{**batch, "camid": 1 - batch["camid"]}]}}
            self.sources = ["people"]
            self.num_train_pids = 2

    clips, pids = torch.randn(4, 5, 3, 64, 32), torch.tensor([0, 0, 1, 1])
    backbone = video.torchreid.models.build_model("osnet_x0_25", 2, loss="triplet", pretrained=False, use_gpu=False)
    model = video.ClipModel(backbone, 128 if "osnet" in type(backbone).__name__.lower() else 512, 2)
    before = [p.clone() for p in model.aggregator.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    engine = video.ClipEngine(Loaders(clips, pids), model, optimizer, scheduler=scheduler, use_gpu=False)
    engine.run(save_dir=str(tmp_path), max_epoch=1, dist_metric="cosine", ranks=[1])
    assert any(not torch.equal(a, b) for a, b in zip(before, model.aggregator.parameters(), strict=True))
    with torch.no_grad():
        maps = torch.stack([backbone.featuremaps(clip) for clip in clips])
        torch.testing.assert_close(engine.extract_features(clips), model.aggregator(maps), rtol=1e-3, atol=1e-5)


def test_fastreid(example):
    torch.manual_seed(0)
    example("fastreid_head", "fastreid")
    from fastreid.config import get_cfg
    from fastreid.modeling.meta_arch import build_model
    from fastreid.utils.events import EventStorage

    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.DEPTH, cfg.MODEL.BACKBONE.FEAT_DIM, cfg.MODEL.BACKBONE.PRETRAIN = "18x", 512, False
    cfg.MODEL.HEADS.NUM_CLASSES, cfg.MODEL.HEADS.WITH_BNNECK = 2, True
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.HEADS.NAME, cfg.MODEL.HEADS.AGGREGATOR = "ClipBaseline", "ClipHead", "gltr"
    model = build_model(cfg)
    clips = 255 * torch.rand(4, 5, 3, 64, 32)
    with EventStorage():
        losses = model.train()({"images": clips.clone(), "targets": torch.tensor([0, 0, 1, 1])})
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.heads.pool_layer.parameters())

    model.eval()
    with torch.no_grad():
        found = model({"images": clips[:, :3].clone(), "targets": torch.zeros(4)})  # another length
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
        maps = torch.stack([model.backbone((clip[:3] - mean) / std) for clip in clips])
        expected = model.heads.bottleneck(model.heads.pool_layer.aggregator(maps)[..., None, None])[..., 0, 0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reid", [True, False])
def test_tracker(example, reid):
    module = example("tracker", "norfair")
    from norfair import Tracker

    distance = module.TrackletDistance(TrackletModel(Colours(), create_aggregator("mean", 3)))
    options = {"reid_distance_function": distance, "reid_distance_threshold": 0.3, "reid_hit_counter_max": 100}
    tracker = Tracker(
        "iou", 0.7, hit_counter_max=5, initialization_delay=3, past_detections_length=4, **(options if reid else {})
    )
    red, green, blue = np.eye(3, dtype=np.uint8) * 255
    identities = {}
    for time in range(60):
        frame = np.full((60, 200, 3), 128, np.uint8)
        boxes = {"green": (10 + time, 5, 30 + time, 55)}
        if time < 15:
            boxes["red"] = (100 + time, 5, 120 + time, 55)
        elif time >= 35:
            boxes["red"] = (190 - (time - 35), 5, 210 - (time - 35), 55)  # somewhere else; partly outside
        if time >= 40:
            boxes["blue"] = (120, 5, 140, 55)
        for name, (x1, y1, x2, y2) in boxes.items():
            frame[y1:y2, x1:x2] = {"red": red, "green": green, "blue": blue}[name]
        tracks = tracker.update(distance.detections(frame, [*boxes.values(), (300, 0, 320, 50)]))
        for track in tracks:
            colour = (
                track.last_detection.embedding.mean((-2, -1))
                if track.last_detection.embedding.dim() == 3
                else (track.last_detection.embedding)
            )
            identities.setdefault(("red", "green", "blue")[int(colour.argmax())], set()).add(track.id)
    assert len(identities["green"]) == len(identities["blue"]) == 1
    assert len(identities["red"]) == (1 if reid else 2)
    assert len(set().union(*identities.values())) == (3 if reid else 4)
    mean = torch.stack([d.embedding for d in tracks[0].past_detections]).mean(0)
    torch.testing.assert_close(distance.embed(tracks[0]), nn.functional.normalize(mean, dim=0))


@pytest.mark.slow
def test_search_finds_the_same_person(example, capsys):
    found = example("search").search(query=0, k=3)
    assert [line[:2] for line in capsys.readouterr().out.splitlines()[-3:]] == ["1:", "2:", "3:"]
    query = data.open_dataset("synthetic", num_identities=20, length=(6, 14), size=(128, 64), seed=100).query[0]
    assert query.pid in [t.pid for t in found]
