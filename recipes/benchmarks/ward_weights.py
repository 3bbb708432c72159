"""Weights for anyone: systems of the comparison on WARD, trained on all of its 70 people.

    python recipes/benchmarks/ward_weights.py robust,attention --root CVPR2012 --unseen folder:<root> \\
        --backbone-weights mobilenetv2.safetensors --results recipes/benchmarks/results
    python hub/publish.py runs/ward/robust-everybody-rate1 --licence apache-2.0 --dry-run --out hub/<name>

The encoder and each system are trained as ward.py trains them for one half, on everybody, so nobody is left to test
them on. Their metrics are the means over the halves in ward.json, each of a model that had not seen whom it was tested
on; and what they reach on a data set that no model here has seen, beside ImageNet's weights as they are.
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
import train
import ward
from common import METRICS, tested
from torch import Tensor

import temporal_agg
from temporal_agg import data


def reached(model: temporal_agg.TrackletModel, dataset: data.TrackletData, accelerator) -> dict[str, float]:
    found, _ = tested(model, dataset, accelerator)
    return {key: found[key] for key in METRICS}


def of_halves(runs: list[dict]) -> dict[str, float]:
    return {key: float(np.mean([run[key] for run in runs])) for key in METRICS}


def measure(
    job: train.Training, name: str, record: dict, unseen: data.TrackletData, about: str, imagenet: dict[str, float]
) -> tuple[dict, Tensor]:
    """What metrics.json holds, and the embeddings of some of the people that it was trained on, to check copies by."""
    halves = [split for split in record["size"]["splits"] if str(split) in record["results"][name]]
    runs = [record["results"][name][str(split)] for split in halves]
    encoders = [record["encoders"][str(split)]["untrained"] for split in halves]
    metrics = of_halves(runs) | {
        "cmc": [],
        "measured": f"models like this one, each on the half of WARD that it has not seen ({len(halves)} halves)",
        "others": {
            "ImageNet's weights and mean pooling, the same halves": of_halves(encoders),
            f"this model, {about}": reached(job.model, unseen, job.accelerator),
            f"ImageNet's weights and mean pooling, {about}": imagenet,
        },
        "protocol": (
            f"WARD, random halves {', '.join(map(str, halves))} of its 70 people, one to train on and the other one to "
            "test on; this model itself was trained on all of them. Queries of camera 1, gallery of cameras 2 and 3, "
            f"average precision in step form, {job.model.clip.distance} distance"
        ),
    }
    return metrics, embedded(job)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = common.parser_of(__doc__ or "")
    parser.add_argument("names", help="some of: " + ", ".join(ward.SEARCHED))
    parser.add_argument("--root", required=True, help="the clone of the data, or the folder of its images")
    parser.add_argument("--backbone-weights", required=True, help="ImageNet's, for timm's mobilenetv2_100")
    parser.add_argument("--out", type=Path, default=Path("runs/ward"), help="of the run directories")
    parser.add_argument("--results", type=Path, required=True, help="where ward.json is")
    parser.add_argument("--unseen", required=True, help="a data set to test on, name or name:<root>")
    parser.add_argument("--about", default="people that it has never seen", help="what the card says of that data set")
    parser.add_argument("--device", default="auto", help="auto (a GPU when there is one), cpu, cuda or cuda:<number>")
    args = parser.parse_args(argv)
    args.names = [name.strip() for name in args.names.split(",")]
    if unknown := sorted(set(args.names) - set(ward.SEARCHED)):
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(ward.SEARCHED)}")
    return args


def main(argv: list[str] | None = None, size: ward.Size | None = None) -> list[Path]:
    size = size or ward.Size()
    args = parse(sys.argv[1:] if argv is None else argv)
    names = args.names
    places = []
    with common.one_line("ward_weights.py"):
        record = ward.read_record(args.results / "ward.json", size)
        if lacking := [name for name in names if not record["results"].get(name)]:
            raise ValueError(f"{args.results / 'ward.json'} has no half of {', '.join(lacking)}: run ward.py first.")
        (unseen,) = common.open_splits(args.unseen, {}, "0", 0, 0).values()
        unseen.check_retrieval()
        plan = ward.Plan(size, args.root, args.backbone_weights, args.out, args.device)
        accelerator = common.accelerator_of(args.device)
        everybody = ward.split_of(args.root, size, None)
        start = {"img_size": size.size, "backbone_weights": args.backbone_weights}
        imagenet = reached(temporal_agg.create_model(f"mean_{size.backbone}", **start), unseen, accelerator)
        for name in names:
            rate = ward.best(record["search"], name)
            about = {"name": name, "record": record, "unseen": unseen, "about": args.about, "imagenet": imagenet}
            of = functools.partial(measure, **about)
            for part in dict.fromkeys([ward.ENCODER, ward.start_of(name), name]):
                place = ward.place(plan, part, None, rate)
                settings = ward.settings_of(plan, part, None, rate)
                evaluate = of if part == name else nothing
                train.train(place, everybody, settings, {"split_seed": 0}, accelerator, True, evaluate)
            places.append(place)
            print(place)
    return places


def nothing(job: train.Training) -> tuple[dict, Tensor]:
    """Of what systems start from."""
    return {**dict.fromkeys(METRICS, 0.0), "cmc": []}, embedded(job)


def embedded(job: train.Training) -> Tensor:
    """Some of those that it was trained on."""
    return temporal_agg.embed_tracklets(job.model, job.dataset.train[:16], progress=False)


if __name__ == "__main__":
    common.keep_memory()
    common.run(main)
