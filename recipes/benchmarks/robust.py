"""Tracklets in which a tracker has mixed people up, on WARD: what pooling loses, and what robust means keep of it.

    python recipes/benchmarks/robust.py --root <clone> --backbone-weights mobilenetv2_100.safetensors --out runs/robust
    python recipes/benchmarks/robust.py --root <clone> --mean 'runs/ward/encoder-split{split}'  # runs of train.py

A run of 0 to 40 % of the frames of every query and gallery tracklet is replaced by frames of another person in the same
camera, for each of WARD's ten splits. Compared on the same frames: the mean, the geometric median and the biweight mean
of the frame vectors of a mean model trained on the split, and the mean behind outlier_mask (ward.py has every trained
aggregator with and without it, on the same tracklets). Whether weights and purity know the foreign frames is the area
under the ROC curve; the same for the faults of synthetic tracklets, with the demonstration model.

A mean model that is not in --mean's place is trained there first. Every split of every model is one file in --out: the
same command goes on where a killed one stopped, and the results are of all that is there (--splits 0,1 does some of
them). Results: robust.json, robust.md and robust.png, in --results.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
import torch
import train
from common import cell, draw, score, summary, write_json, write_text
from comparison import area, intrusion, markdown
from settings import Settings
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from train import build_model

import temporal_agg
from temporal_agg import data, masked, retrieval
from temporal_agg.aggregators.robust import biweight_mean, geometric_median, outlier_mask, tracklet_purity
from temporal_agg.data.synthetic import FAULTS
from temporal_agg.files import read_json
from temporal_agg.inference import FrameRunner

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4)  # of foreign frames
CUTOFFS = (1.5, 2.0, 3.0)  # c of the biweight mean
STRENGTH = 0.6  # of the synthetic faults
DEMONSTRATION = Path(__file__).resolve().parents[2] / "hub" / "attention_resnet10t.synthetic"
RESULTS = Path(__file__).parent / "results"
MEAN, FROZEN, SYNTHETIC = "mean", "frozen", "synthetic"
GOAL = "robust, c = 2"  # is held against the mean
GOALS = (("no foreign frame", 0.0, -1.5), ("20 % foreign", 0.2, 10.0), ("30 % foreign", 0.3, 14.0))
known: dict[str, Tensor] = {}  # what the frozen model sees of each tracklet


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


POOLINGS = {  # of frame vectors [N, T, C] with a mask
    MEAN: masked.mean,
    "mean, unit length": lambda x, mask: masked.mean(unit(x), mask),
    "geometric median": lambda x, mask: geometric_median(unit(x), mask),
    **{f"robust, c = {c:g}": lambda x, mask, c=c: biweight_mean(unit(x), mask, c) for c in CUTOFFS},
    "outlier_mask, then mean": lambda x, mask: masked.mean(x, outlier_mask(x, mask)),
}


# ----------------------------------------------------------------------------------------------------------------------
# Foreign frames


def see(model: temporal_agg.TrackletModel, tracklets: Sequence) -> list[Tensor]:
    """The vectors ``[T, C]`` of each tracklet's frames, on the CPU."""
    runner = FrameRunner(model, frames_per_batch=64)
    with runner.running():
        features = [runner(runner.transform.resize(t.load(range(len(t)))))[0].float().cpu() for t in tracklets]
        return [x.mean((2, 3)) if x.dim() == 4 else x.clone() for x in features]


def intrusions(tracklets: Sequence[data.Tracklet], share: float, split: int) -> list[tuple[range, int]]:
    """For each tracklet the run of its frames that goes, and whose come; ward.py has the same."""
    seeds = [(split, t.pid, t.camera) for t in tracklets]
    return [
        intrusion(t, tracklets, share, np.random.default_rng(seed)) for t, seed in zip(tracklets, seeds, strict=True)
    ]


def mixed(seen: Sequence[Tensor], plan: Sequence[tuple[range, int]]) -> list[Tensor]:
    """The tracklets with their intruders' frames."""
    found = []
    for x, (run, other) in zip(seen, plan, strict=True):
        x = x.clone()
        x[list(run)] = seen[other][[i % len(seen[other]) for i in run]]
        found.append(x)
    return found


def padded(seen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Frame vectors ``[N, T, C]`` and the mask."""
    x = pad_sequence(list(seen), batch_first=True)
    return x, torch.arange(x.shape[1]) < torch.tensor(list(map(len, seen)))[:, None]


# ----------------------------------------------------------------------------------------------------------------------
# Measures


def judged(clean: Sequence[Tensor], seen: Sequence[Tensor], struck: Sequence[Sequence[bool]]) -> dict:
    """How well robust's weights know the struck frames, and purity the tracklets that have some, and their place."""
    x, mask = padded(seen)
    weights = biweight_mean(unit(x), mask, return_weights=True)[1][mask].tolist()
    pure, before = tracklet_purity(x, mask), tracklet_purity(*padded(clean)).score.tolist()
    some = [i for i, hits in enumerate(struck) if any(hits)]
    scores, errors = [float(pure.score[i]) for i in some], []
    for i in some:
        hits = list(struck[i])
        change = hits.index(not hits[0])  # where another person is seen first
        errors.append(abs(int(pure.start[i]) - change))
    return {
        "weights": area([-w for w in weights], [hit for hits in struck for hit in hits]),
        "purity": area([-s for s in scores + before], [True] * len(scores) + [False] * len(before)),
        "exact place": float(np.mean(np.equal(errors, 0))),
        "frames off": float(np.mean(errors)),
    }


def measure(model: temporal_agg.TrackletModel, name: str, dataset: data.TrackletData, split: int) -> dict:
    """Of one model and split: mAP and rank-1 by share of foreign frames and pooling, and the areas."""
    tracklets = [*dataset.query, *dataset.gallery]
    if name == FROZEN:  # the same for all splits
        new = [t for t in tracklets if t.name not in known]
        known.update(zip((t.name for t in new), see(model, new), strict=True))
    seen = [known[t.name] for t in tracklets] if name == FROZEN else see(model, tracklets)
    found, judgements = {}, {}
    with torch.inference_mode():
        for share in SHARES:
            plan = intrusions(tracklets, share, split)
            now = mixed(seen, plan)
            if share:
                struck = [[i in run for i in range(len(x))] for x, (run, _) in zip(now, plan, strict=True)]
                judgements[str(share)] = judged(seen, now, struck)
            rows = {key: pool(*padded(now)) for key, pool in POOLINGS.items()}
            found[str(share)] = {
                key: {k: summary(metrics(embeddings, dataset, model.clip.distance))[k] for k in ("map", "rank1")}
                for key, embeddings in rows.items()
            }
    return {"measures": found, "areas": judgements}


def metrics(embeddings: Tensor, dataset: data.TrackletData, distance: str) -> retrieval.RetrievalMetrics:
    queries, gallery = embeddings[: len(dataset.query)], embeddings[len(dataset.query) :]
    return score(retrieval.distances(queries, gallery, distance), dataset)


def measure_synthetic() -> dict:
    """The same areas for each synthetic fault alone, with the demonstration model."""
    model = temporal_agg.create_model(f"local-dir:{DEMONSTRATION}")
    size, found = model.data_config["input_size"][1:], {}
    for fault in FAULTS:
        kinds = [
            data.synthetic_data(num_identities=40, num_cameras=2, faults=faults, seed=1000, size=size).gallery
            for faults in ({}, {fault: STRENGTH})
        ]
        with torch.inference_mode():
            found[fault] = judged(*(see(model, kind) for kind in kinds), [t.struck(fault) for t in kinds[1]])
    return {"areas": found}


# ----------------------------------------------------------------------------------------------------------------------
# One command


def settings_of(args: argparse.Namespace, split: int) -> Settings:
    """Of the mean model: 200 batches of 8 x 3 clips of 4 frames."""
    return Settings(
        data="ward",
        root=args.root,
        split=str(split),
        model="mean_mobilenetv2_100",
        backbone_weights=args.backbone_weights,
        clip_length=4,
        clips=3,
        epochs=40,
        lr=3e-4,  # 1e-3 ruins pretrained weights
        seed=split,
        eval_untrained=False,
        save_every=20,
        keep=1,
    )


def jobs_of(args: argparse.Namespace) -> list[tuple[str, int]]:
    names = [*([FROZEN] if args.backbone_weights else []), *([] if args.only_frozen else [MEAN])]
    return [(SYNTHETIC, 0), *((name, split) for name in names for split in args.splits)]


def run(args: argparse.Namespace, name: str, split: int) -> dict:
    """One split of one model, or its file of before."""
    file = args.out / f"{name}-split{split}.json"
    if file.exists():
        return read(file)
    if name == SYNTHETIC:
        result = measure_synthetic()
    elif name == FROZEN:
        model = build_model(settings_of(args, split)).eval()
        result = measure(model, name, data.open_dataset("ward", args.root, split=split), split)
    else:
        dataset = data.open_dataset("ward", args.root, split=split)
        place = Path(args.mean.format(split=split))
        if not (place / "metrics.json").exists():
            if not args.backbone_weights:
                raise FileNotFoundError(f"no finished run in {place}: pass --backbone-weights to train it there.")
            accelerator = common.accelerator_of(args.device)
            train.train(place, dataset, settings_of(args, split), {"split_seed": 0}, accelerator)
        device = common.accelerator_of(args.device).device
        model = common.load_model(str(place), {}).to(device).eval()
        result = {"trained": common.read_metrics(place / "metrics.json")["map"], **measure(model, name, dataset, split)}
    result = {"name": name, "split": split, **result}
    write_json(file, result)
    return result


def read(file: Path) -> dict:
    """What was measured of one split before.

    Raises:
        ValueError: the file is no such record; the message names it.
    """
    result = read_json(file)
    common.check_form(file, result, {"name": str, "split": int, "areas": {str: AREAS}})
    name, split = result["name"], result["split"]
    if file.name != f"{name}-split{split}.json":
        raise ValueError(f"{file} is of {name}, split {split}: rename it, or delete it, and it is measured again.")
    if name == SYNTHETIC:
        common.check_form(file, result["areas"], dict.fromkeys(FAULTS, dict), "areas")
        return result
    measures = {key: {"map": common.is_share, "rank1": common.is_share} for key in POOLINGS}
    common.check_form(file, result, {"measures": {str(share): measures for share in SHARES}})
    common.check_form(file, result["areas"], {str(share): dict for share in SHARES if share}, "areas")
    return result


def is_area(value: object) -> bool:
    """NaN where there was nothing to be told apart."""
    return common.is_share(value) or value != value


AREAS = {**dict.fromkeys(("weights", "purity", "exact place"), is_area), "frames off": common.is_number}


def gather(results: Sequence[dict]) -> dict:
    """Lists over the splits instead of single numbers, by model."""

    def joined(values: list):
        first = values[0]
        return {key: joined([v[key] for v in values]) for key in first} if isinstance(first, dict) else values

    names = dict.fromkeys(result["name"] for result in results)
    return {
        name: joined([{k: v for k, v in r.items() if k != "name"} for r in results if r["name"] == name])
        for name in names
    }


# ----------------------------------------------------------------------------------------------------------------------
# What a person reads


def head(what: str) -> list[str]:
    return [what, *(f"{100 * share:g} %" for share in SHARES)]


def maps(measures: dict, key: str) -> list[list[float]]:
    return [measures[str(share)][key]["map"] for share in SHARES]


def table_of_poolings(measures: dict) -> str:
    rows = [[key, *map(cell, maps(measures, key))] for key in measures["0.0"]]
    return markdown(head("foreign frames"), rows)


def table_of_areas(of: dict, kinds: Sequence[str]) -> str:
    rows = []
    found = {f"{kind}, {100 * float(k):g} % foreign": v for kind in kinds for k, v in of[kind]["areas"].items()}
    found |= {f"synthetic, {fault.replace('_', ' ')}": v for fault, v in of[SYNTHETIC]["areas"].items()}
    for what, v in found.items():
        cells = [f"{np.mean(v[key]):.3f}" for key in ("weights", "purity")]
        rows.append([what, *cells, f"{100 * np.mean(v['exact place']):.0f} %", f"{np.mean(v['frames off']):.1f}"])
    return markdown(["", "weights, by frame", "purity, by tracklet", "place exact", "frames off"], rows)


def gains(measures: dict) -> str:
    """Over the mean, split by split, beside what was asked for."""
    rows = []
    for what, share, least in GOALS:
        forms = measures[str(share)]
        gain = 100 * np.subtract(forms[GOAL]["map"], forms[MEAN]["map"])
        deviation = f" ± {gain.std(ddof=1):.1f}" if len(gain) > 1 else ""
        rows.append([what, f"{gain.mean():+.1f}{deviation}", f"{least:+g}", "yes" if gain.mean() >= least else "no"])
    return markdown([f"{GOAL}, minus the mean", "measured", "wanted at least", "held"], rows)


TITLES = {
    MEAN: "Frame vectors trained on WARD, on the other half of each split's people (`mean_mobilenetv2_100`, 128x64)",
    FROZEN: "Frame vectors of the ImageNet weights as they are (`mobilenetv2_100`, 128x64), never trained on people",
}


def text(study: dict) -> str:
    of = study["models"]
    kinds = [kind for kind in TITLES if kind in of]
    parts = []
    for kind in kinds:
        count, measures = len(of[kind]["split"]), of[kind]["measures"]
        title = f"**{TITLES[kind]}**, {count} of WARD's 10 splits:"
        parts += [title, table_of_poolings(measures), *([gains(measures)] if kind == MEAN else [])]
    tables = "\n\n".join(parts)
    return f"""mAP in %, mean ± deviation over the splits. A run of each tracklet's frames, in queries and gallery,
shows another person of the same camera. Queries are of camera 1, the gallery of cameras 2 and 3. Each tracklet is
pooled as a whole.

{tables}

**Who knows the foreign frames?** Areas under the ROC curve: of robust's weights against the frames that are known to be
foreign, and of `tracklet_purity` for tracklets that have such frames against the same ones without; and how often its
place of change is exact, and how many frames off on average. Synthetic: frames struck by one fault (strength
{STRENGTH:g}), frame vectors of `hub/attention_resnet10t.synthetic`.

{table_of_areas(of, kinds)}

torch {study["environment"]["torch"]}, timm {study["environment"]["timm"]}.
"""


COLOURS, MARKERS = ("#000000", "#999999", "#0072b2", "#e69f00", "#d55e00", "#cc79a7", "#009e73"), "os^vDXP"


def figure(study: dict):
    """mAP against the share of foreign frames, for each kind of features."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in TITLES if kind in study["models"]]
    drawing = Figure(figsize=(5 * len(kinds) + 2, 4.2), layout="constrained")
    grid = drawing.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for ax, kind in zip(grid, kinds, strict=True):
        measures = study["models"][kind]["measures"]
        for key, colour, marker in zip(measures["0.0"], COLOURS, MARKERS, strict=True):
            values = 100 * np.array(maps(measures, key)).mean(1)
            ax.plot(100 * np.array(SHARES), values, label=key, color=colour, marker=marker, markersize=5, linewidth=1.4)
        ax.set_title("trained on WARD" if kind == MEAN else "ImageNet weights as they are", fontsize=10)
        ax.set_xlabel("foreign frames in each tracklet, %")
        ax.set_xticks([100 * share for share in SHARES])
        ax.set_ylim(0, 100)
        ax.grid(alpha=0.25)
    grid[0].set_ylabel("mAP, %")
    grid[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawing


def write_results(args: argparse.Namespace, results: Sequence[dict]) -> dict:
    study = {"environment": common.environment("cpu"), "models": gather(results)}
    del study["environment"]["command"]  # it names places of this machine
    args.results.mkdir(parents=True, exist_ok=True)
    write_json(args.results / "robust.json", study)
    write_text(args.results / "robust.md", text(study))
    if any(kind in study["models"] for kind in TITLES):
        draw(args.results / "robust.png", lambda: figure(study))
    print("\n" + text(study))
    return study


def parse(argv: list[str]) -> argparse.Namespace:
    parser = common.parser_of(__doc__ or "")
    parser.add_argument("--root", required=True, help="WARD: the clone, or the folder of its images")
    parser.add_argument("--mean", default="runs/ward/mean-split{split}", help="run directories of the mean model")
    parser.add_argument("--only-frozen", action="store_true", help="train nothing: the backbone as it is, alone")
    parser.add_argument("--splits", default="0,1,2,3,4,5,6,7,8,9", help="by comma (all ten)")
    parser.add_argument("--backbone-weights", default="", help="a file of mobilenetv2_100, to train mean models from")
    parser.add_argument("--out", type=Path, default=Path("runs/robust"), help="where finished splits are (runs/robust)")
    parser.add_argument("--results", type=Path, help="where robust.json, .md and .png go; default: --out")
    parser.add_argument("--device", default="auto", help="auto (a GPU when there is one), cpu, cuda or cuda:<number>")
    args = parser.parse_args(argv)
    try:
        args.splits = [int(split) for split in args.splits.split(",")]
        common.check_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    args.results = args.results or args.out
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(sys.argv[1:] if argv is None else argv)
    with common.one_line("robust.py"):
        args.out.mkdir(parents=True, exist_ok=True)
        jobs = jobs_of(args)
        for k, (name, split) in enumerate(jobs, 1):
            run(args, name, split)
            print(f"[{k}/{len(jobs)}] {name}, split {split}", flush=True)
        done = [read(file) for file in args.out.glob("*-split*.json")]
        return write_results(args, sorted(done, key=lambda result: (result["name"], result["split"])))


if __name__ == "__main__":
    common.run(main)
