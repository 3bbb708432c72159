"""Evaluates models on data sets: the table of the papers, as JSON too, with figures.

    python recipes/evaluate.py runs/mine                                 # on the data that it was trained for
    python recipes/evaluate.py runs/mine --data mars:/data/mars --rerank
    python recipes/evaluate.py runs/prid-split*                          # mean and deviation over the splits
    python recipes/evaluate.py hf-hub:owner/repository --data folder:/data/mine --out results
    torchrun --nproc_per_node 4 recipes/evaluate.py ...                  # several GPUs

A model is a run directory of recipes/train.py, a directory that save_pretrained wrote, or a name of the Hub. In it (or
under --out) an evaluation writes <data>/metrics.json, cmc.png, ranked.png (what some queries found, from the worst
average precision to the best), and the embeddings, which are used again only for the same weights, frames, settings.
"""

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import common
import numpy as np
import torch
from common import cell, draw, embed_test, layout, load_model, open_splits, own_data, score, summary, write_json
from torch import Tensor

import temporal_agg
from temporal_agg import data, plot, retrieval
from temporal_agg.data.flow import flow_file

# ----------------------------------------------------------------------------------------------------------------------
# Embeddings on disk


def fingerprint(model: temporal_agg.TrackletModel, *sides: Sequence[data.Tracklet]) -> str:
    """Changes with the model's parts, options and weights, the clips, the input, which tracklets are on which side, and
    every frame and its flow (a file: its path, size and time of change)."""
    parts = [(type(part).__name__, getattr(part, "config", None)) for part in (model.encoder, model.aggregator)]
    digest = hashlib.sha256(f"{temporal_agg.__version__} {parts} {model.clip} {model.data_config}".encode())

    def file(path: str | os.PathLike) -> None:
        status = os.stat(path)
        digest.update(os.fsencode(f" {os.fspath(path)} {status.st_size} {status.st_mtime_ns}"))

    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(f"\n{[len(side) for side in sides]}".encode())
    for tracklet in chain(*sides):
        digest.update(f"\n{len(tracklet)}".encode())
        frames = getattr(tracklet, "frames", None)
        for frame in tracklet.load(range(len(tracklet))) if frames is None else frames:
            if isinstance(frame, (str, os.PathLike)):
                file(frame)
            else:
                digest.update(f" {tuple(frame.shape)}".encode() + np.asarray(frame).tobytes())
        if model.encoder.uses_flow:
            if tracklet.flow is None or isinstance(tracklet.flow, (str, os.PathLike)):
                file(flow_file(tracklet.frames, tracklet.flow))
            else:
                digest.update(b"".join(np.asarray(array).tobytes() for array in tracklet.flow))
    return digest.hexdigest()[:16]


def cached_embeddings(model, dataset, accelerator, directory: Path, frames_per_batch: int) -> tuple[Tensor, Tensor]:
    """Queries and gallery, read if the same model embedded the same frames before."""
    precision = accelerator.mixed_precision
    key = fingerprint(model, dataset.gallery, dataset.query)
    file = directory / f"embeddings-{key}{'' if precision == 'no' else '-' + precision}.safetensors"
    accelerator.wait_for_everyone()
    found = None
    if file.is_file():
        try:
            stored = common.read_tensors(file)
            found = stored["query"], stored["gallery"]
        except (ValueError, KeyError) as error:
            accelerator.print(f"{error} The tracklets are embedded again.")
        else:
            accelerator.print(f"{file}: embeddings are used again.")
    query, gallery = found or embed_test(model, dataset, accelerator, frames_per_batch, mixed_precision=precision)
    if accelerator.is_main_process:
        if found is None:
            common.write_tensors(file, {"query": query, "gallery": gallery})
        for old in directory.glob("embeddings-*.safetensors"):  # of a killed evaluation as well
            if old != file:
                old.unlink()
    return query, gallery


# ----------------------------------------------------------------------------------------------------------------------
# The command


def source_of(name: str, args: argparse.Namespace) -> tuple[dict, str | None]:
    """What to evaluate on, and where its flow is. A benchmark on which the run was trained is split as it was there."""
    if not args.data:
        own = own_data(name)
        return own, args.flow_root or common.read_run(name)[0]["flow_root"]
    split = args.split or "0"  # a model that is not of this data set's run may know the people of the other splits
    source = {"spec": args.data, "options": args.data_options, "split": split, "identity_splits": 0, "seed": 0}
    benchmark = args.data.partition(":")[0]
    if not args.split and benchmark not in ("folder", "csv") and (Path(name) / "settings.json").is_file():
        own = own_data(name)
        if own["spec"].partition(":")[0] == benchmark:
            source |= {key: own[key] for key in ("split", "identity_splits", "seed")}
    return source, args.flow_root


def evaluate_split(model, number: int, dataset: data.TrackletData, directory: Path, args, accelerator) -> list[dict]:
    """One evaluation, and another one with re-ranking where that was asked for."""
    queries, gallery = cached_embeddings(model, dataset, accelerator, directory, args.frames_per_batch)
    if not accelerator.is_main_process:
        return []
    metric = args.distance or model.clip.distance
    plain = retrieval.distances(queries, gallery, metric)
    methods = {"": plain}
    if args.rerank:
        if metric == "cosine":
            queries, gallery = (torch.nn.functional.normalize(x, dim=1) for x in (queries, gallery))
        methods["re-ranked"] = retrieval.rerank(queries, gallery, args.k1, args.k2, args.lambda_value)
    results, curves = [], {}
    for method, distances in methods.items():
        metrics = score(distances, dataset, args.ap)
        results.append({"method": method, "distance": metric, "ap": args.ap, "data": dataset.name, "split": number})
        results[-1] |= {"queries": len(queries), "gallery": len(gallery), **summary(metrics)}
        curves[f"{method or metric} (mAP {100 * metrics.map:.1f})"] = metrics.cmc
    if metrics.queries_without_match:
        print(
            f"{metrics.queries_without_match} of {len(queries)} queries have no match; they are left out of the means."
        )
    write_json(directory / "metrics.json", results)
    if args.figures:
        draw(directory / "cmc.png", lambda: plot.cmc(curves, f"{dataset.name}, {len(queries)} queries"))
        draw(directory / "ranked.png", lambda: ranked_figure(distances.numpy(), dataset, metrics.ap_per_query))
    return results


def ranked_figure(distances: np.ndarray, dataset: data.TrackletData, precisions: np.ndarray, count: int = 8):
    """Queries from the worst average precision to the best, at equal steps of their order."""
    order = np.argsort(precisions)  # NaN, a query without a match, comes last
    order = order[: np.count_nonzero(~np.isnan(precisions))]
    rows = order[np.unique(np.linspace(0, len(order) - 1, count).round().astype(int))]
    titles = [f"AP {100 * precisions[q]:.0f} %" for q in rows]
    return plot.ranked_lists(
        distances, dataset.query, dataset.gallery, rows, query_index=dataset.query_index, titles=titles
    )


def table(results: dict[str, list[dict]]) -> str:
    """One row per model and method; several evaluations of one kind as mean and standard deviation."""
    rows = [["model", "mAP", "rank-1", "rank-5", "rank-10", "rank-20", "mINP", "queries", "gallery"]]
    for name, evaluations in results.items():
        for method in dict.fromkeys(e["method"] for e in evaluations):
            own = [e for e in evaluations if e["method"] == method]
            row = [f"{name} {method}".strip()]
            row += [cell([e[key] for e in own]) for key in ("map", "rank1", "rank5", "rank10", "rank20", "minp")]
            rows.append(row + [f"{np.mean([e[key] for e in own]):.0f}" for key in ("queries", "gallery")])
    return layout(rows)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = common.parser_of(__doc__ or "")
    text = (
        "run directories, hf-hub:owner/repository[@revision] or names of released weights; several: mean and deviation"
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help=text)
    parser.add_argument("--data", help="name or name:<root>; default: the data of the run")
    parser.add_argument("--data-options", nargs="+", default=[], metavar="KEY=VALUE", help="of that data set")
    parser.add_argument("--flow-root", help="where compute_flow.py --out put optical flow; default: beside the frames")
    parser.add_argument("--split", default="", help="of --data: a number, or all (default: 0)")
    parser.add_argument("--clip", nargs="+", default=[], metavar="KEY=VALUE", help="e.g. test_sampling=dense length=8")
    parser.add_argument("--distance", choices=("cosine", "euclidean", "dot"), help="default: the model's own")
    parser.add_argument("--ap", default="step", choices=("step", "trapezoidal"), help="the form of average precision")
    parser.add_argument("--rerank", action="store_true", help="k-reciprocal re-ranking beside the plain result")
    parser.add_argument("--k1", type=int, default=20, help="of re-ranking (20)")
    parser.add_argument("--k2", type=int, default=6, help="of re-ranking (6)")
    parser.add_argument("--lambda-value", type=float, default=0.3, help="of re-ranking (0.3)")
    parser.add_argument("--figures", action=argparse.BooleanOptionalAction, default=True, help="cmc.png, ranked.png")
    parser.add_argument("--frames-per-batch", type=int, default=256, help="frames in one pass of the backbone (256)")
    parser.add_argument("--mixed-precision", default="no", choices=("no", "bf16", "fp16"), help="of the model")
    parser.add_argument("--device", default="auto", help="auto (a GPU when there is one), cpu, cuda or cuda:<number>")
    parser.add_argument("--out", help="where results go; default: <run directory>/evaluation")
    args = parser.parse_args(argv)
    for name in ("data_options", "clip"):
        try:
            setattr(args, name, common.key_values(getattr(args, name)))
        except ValueError as error:
            parser.error(f"--{name.replace('_', '-')} {error}")
    try:
        common.check_split(args.split)
        common.check_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    if args.flow_root and not Path(args.flow_root).expanduser().is_dir():
        parser.error(f"--flow-root: there is no folder {args.flow_root}")
    if args.k1 < 1 or args.k2 < 1 or not 0 <= args.lambda_value <= 1 or args.frames_per_batch < 1:
        parser.error("--k1, --k2 and --frames-per-batch must be at least 1, and --lambda-value between 0 and 1")
    if not args.data and (args.split or args.data_options):
        parser.error("--split and --data-options are of --data: a run's own data are as its settings say")
    return args


@common.own_defaults()
def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    args = parse(sys.argv[1:] if argv is None else argv)
    results: dict[str, list[dict]] = {}
    places: dict[str, Path] = {}
    with common.one_line("evaluate.py", TypeError):
        accelerator = common.accelerator_of(args.device, args.mixed_precision)
        for name in args.models:
            model = load_model(name, args.clip).to(accelerator.device)
            source, flow_root = source_of(name, args)
            splits = open_splits(**source)
            if flow_root:
                splits = {k: dataset.with_flow_root(flow_root) for k, dataset in splits.items()}
            for dataset in splits.values():
                dataset.check_retrieval()
                if model.encoder.uses_flow:
                    data.check_flow([*dataset.query, *dataset.gallery])
            is_run = os.path.isdir(name)
            base = Path(args.out or (Path(name) / "evaluation" if is_run else "evaluation")).expanduser()
            if not is_run or args.out:
                base /= name.rstrip("/").replace("hf-hub:", "").replace("/", "-")
            label, _, root = source["spec"].partition(":")
            if args.data and label in ("folder", "csv"):
                label += f"-{Path(root).resolve().stem}"
            # Runs on several splits are one row: what they measure together is the mean.
            place = Path(re.sub(r"-split\d+$", "", str(Path(name))))
            title = place.name if is_run and places.setdefault(place.name, place) == place else str(place)
            row = results.setdefault(title if is_run else name, [])
            for number, dataset in splits.items():
                directory = base / (f"{label}-split{number}" if number or len(splits) > 1 else label)
                with common.held(directory, accelerator):
                    row += evaluate_split(model, number, dataset, directory, args, accelerator)
    if accelerator.is_main_process:
        print("\n" + table(results))
    accelerator.end_training()
    return results


if __name__ == "__main__":
    common.run(main, "the same command uses what is embedded")
