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
import dataclasses
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# Before torch is imported: threads that spin while they wait take the processor from the loader.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import accelerate
import numpy as np
import safetensors.torch
import torch
import yaml
from torch import Tensor

import temporal_agg
from temporal_agg import data, plot, retrieval
from temporal_agg._files import replace_file
from temporal_agg.data.flow import flow_file

RANKS = (1, 5, 10, 20)


# ----------------------------------------------------------------------------------------------------------------------
# Used by train.py, too


def write_text(path: Path, content: str) -> None:
    replace_file(path, lambda temporary: temporary.write_text(content))


def open_splits(spec: str, options: dict, split: str, identity_splits: int, seed: int) -> dict[int, data.TrackletData]:
    """The splits that were asked for, by number.

    Args:
        spec: name or name:<root>.
        options: of the data set.
        split: a number, or all; of a benchmark that comes with several, or of the random identity splits.
        identity_splits: how many random identity splits to make; 0: the data set's own.
        seed: draws those.
    """
    name, _, root = spec.partition(":")
    if identity_splits:
        splits = data.identity_splits(data.open_dataset(name, root or None, **options), identity_splits, seed)
    elif data.num_splits(name) > 1:
        wanted = split if split == "all" else int(split or 0)
        splits = data.open_splits(name, root or None, split=wanted, **options)
        return dict(enumerate(splits)) if split == "all" else {wanted: splits[0]}
    else:
        splits = [data.open_dataset(name, root or None, **options)]
    if split in ("", "all"):
        return dict(enumerate(splits))
    if not 0 <= int(split) < len(splits):
        raise ValueError(f"split must be 0 to {len(splits) - 1} or all, got {split}.")
    return {int(split): splits[int(split)]}


def embed(
    model: temporal_agg.TrackletModel,
    tracklets: Sequence[data.Tracklet],
    accelerator: accelerate.Accelerator,
    frames_per_batch: int = 256,
) -> Tensor:
    """Every process embeds its share of the tracklets; all of them get all embeddings ``[N, D]``, in order."""
    rank, world = accelerator.process_index, accelerator.num_processes
    rows = torch.zeros(-(-len(tracklets) // world), model.num_features)
    share = tracklets[rank::world]
    if share:
        rows[: len(share)] = temporal_agg.embed_tracklets(
            model,
            share,
            frames_per_batch=frames_per_batch,
            device=accelerator.device,
            progress=accelerator.is_main_process,
        )
    if world == 1:
        return rows
    rows = accelerator.gather(rows.to(accelerator.device)).cpu()
    return rows.unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1)[: len(tracklets)]


def embed_test(model, dataset: data.TrackletData, accelerator, frames_per_batch: int = 256) -> tuple[Tensor, Tensor]:
    """The embeddings of queries and gallery; what is in both is embedded once."""
    own = dataset.query_index
    alone = [query for query, i in zip(dataset.query, own, strict=True) if i < 0]
    embeddings = embed(model, [*dataset.gallery, *alone], accelerator, frames_per_batch)
    place = iter(range(len(dataset.gallery), len(embeddings)))
    return embeddings[[next(place) if i < 0 else i for i in own]], embeddings[: len(dataset.gallery)]


def score(distances, dataset: data.TrackletData, ap: str = "step", ranks=RANKS) -> retrieval.RetrievalMetrics:
    """The data set's protocol."""
    sides = (dataset.query, dataset.gallery)
    ids = ([getattr(t, key) for t in side] for side in sides for key in ("pid", "camera"))
    return retrieval.evaluate(distances, *ids, query_index=dataset.query_index, ranks=ranks, ap=ap)


def summary(metrics: retrieval.RetrievalMetrics) -> dict:
    """What is written down of an evaluation."""
    result = {"map": float(metrics.map), "minp": float(metrics.minp)}
    result |= {f"rank{k}": float(metrics.rank(k)) for k in RANKS}
    result["queries_without_match"] = metrics.queries_without_match
    result["cmc"] = [round(float(value), 6) for value in metrics.cmc]
    return result


def cell(values: Sequence[float]) -> str:
    """Per cent; several values as mean and standard deviation."""
    values = 100 * np.array(values)
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def layout(rows: list[list[str]]) -> str:
    """Rows of text as a table with its first column on the left; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def draw(path: Path, figure: Callable[[], object]) -> None:
    """Saves a figure, or says what it needs."""
    try:
        figure = figure()
    except ImportError as error:
        print(f"No {path.name}: {error}")
        return
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def key_values(items: Sequence[str]) -> dict:
    """KEY=VALUE ... -> dict, the values read as YAML.

    Raises:
        ValueError: an item without "=".
    """
    if any("=" not in item for item in items):
        raise ValueError(f"takes KEY=VALUE, got {' '.join(items)}")
    return {key: yaml.safe_load(value) for key, value in (item.split("=", 1) for item in items)}


# ----------------------------------------------------------------------------------------------------------------------
# Embeddings on disk


def fingerprint(model: temporal_agg.TrackletModel, tracklets: Sequence[data.Tracklet]) -> str:
    """Changes with the weights, the clips, the input and every frame (a file: its path, size and time of change)."""
    digest = hashlib.sha256(f"{temporal_agg.__version__} {model.clip} {model.data_config}".encode())

    def file(path: str | os.PathLike) -> None:
        status = os.stat(path)
        digest.update(f" {path} {status.st_size} {status.st_mtime_ns}".encode())

    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for tracklet in tracklets:
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
    key = fingerprint(model, [*dataset.gallery, *dataset.query])
    file = directory / f"embeddings-{key}{'' if precision == 'no' else '-' + precision}.safetensors"
    accelerator.wait_for_everyone()
    if file.is_file():
        try:
            stored = safetensors.torch.load_file(file)
            accelerator.print(f"{file}: embeddings are used again.")
            return stored["query"], stored["gallery"]
        except (safetensors.SafetensorError, KeyError):
            accelerator.print(f"{file} cannot be read; the tracklets are embedded again.")
    with accelerator.autocast():
        query, gallery = embed_test(model, dataset, accelerator, frames_per_batch)
    if accelerator.is_main_process:
        for old in directory.glob("embeddings-*.safetensors"):
            old.unlink()
        stored = {"query": query.contiguous(), "gallery": gallery.contiguous()}
        replace_file(file, lambda temporary: safetensors.torch.save_file(stored, temporary))
    return query, gallery


# ----------------------------------------------------------------------------------------------------------------------
# The command


def load_model(name: str, clip: dict) -> temporal_agg.TrackletModel:
    model = temporal_agg.create_model(f"local-dir:{name}" if os.path.isdir(name) else name)
    if clip:
        known = [field.name for field in dataclasses.fields(model.clip)]
        unknown = sorted(set(clip) - set(known))
        if unknown:
            raise ValueError(f"--clip has no {', '.join(unknown)}; it has {', '.join(known)}")
        model.clip = dataclasses.replace(model.clip, **clip)
    return model


def settings_of(run: str) -> dict:
    try:
        return json.loads((Path(run) / "settings.json").read_text())["settings"]
    except FileNotFoundError:
        raise ValueError(f"{run} does not say what to evaluate on: pass --data.") from None


def own_data(run: str) -> dict:
    """The data that a run was trained for."""
    settings = settings_of(run)
    spec = f"{settings['data']}:{settings['root']}" if settings["root"] else settings["data"]
    return {
        "spec": spec,
        "options": settings["data_options"],
        "split": settings["split"],
        "identity_splits": settings["identity_splits"],
        "seed": settings["split_seed"],
    }


def source_of(name: str, args: argparse.Namespace) -> tuple[dict, str | None]:
    """What to evaluate on, and where its flow is. A benchmark on which the run was trained is split as it was there."""
    if not args.data:
        return own_data(name), args.flow_root or settings_of(name).get("flow_root")
    source = {"spec": args.data, "options": args.data_options, "split": args.split, "identity_splits": 0, "seed": 0}
    benchmark = args.data.partition(":")[0]
    if not args.split and benchmark not in ("folder", "csv") and (Path(name) / "settings.json").is_file():
        own = own_data(name)
        if own["spec"].partition(":")[0] == benchmark:
            source |= {key: own[key] for key in ("split", "identity_splits", "seed")}
    return source, args.flow_root


def evaluate_split(model, number: int, dataset: data.TrackletData, directory: Path, args, accelerator) -> list[dict]:
    """One evaluation, and another one with re-ranking where that was asked for."""
    dataset.check_retrieval()
    if accelerator.is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
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
    write_text(directory / "metrics.json", json.dumps(results, indent=2) + "\n")
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
    about, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "run directories, hf-hub:owner/repository[@revision] or names of create_model; several: mean and deviation"
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
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"), help="auto: a GPU when there is one")
    parser.add_argument("--out", help="where results go; default: <run directory>/evaluation")
    args = parser.parse_args(argv)
    for name in ("data_options", "clip"):
        try:
            setattr(args, name, key_values(getattr(args, name)))
        except ValueError as error:
            parser.error(f"--{name.replace('_', '-')} {error}")
    if args.split not in ("", "all") and not args.split.isdigit():
        parser.error(f"--split must be a number or all, got {args.split!r}")
    if not args.data and (args.split or args.data_options):
        parser.error("--split and --data-options are of --data: a run's own data are as its settings say")
    return args


def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    args = parse(sys.argv[1:] if argv is None else argv)
    accelerator = accelerate.Accelerator(cpu=args.device == "cpu", mixed_precision=args.mixed_precision)
    results: dict[str, list[dict]] = {}
    places: dict[str, Path] = {}
    try:
        for name in args.models:
            model = load_model(name, args.clip).to(accelerator.device)
            source, flow_root = source_of(name, args)
            splits = open_splits(**source)
            if flow_root:
                splits = {k: dataset.with_flow_root(flow_root) for k, dataset in splits.items()}
            if model.encoder.uses_flow:
                for dataset in splits.values():
                    data.check_flow([*dataset.query, *dataset.gallery])
            is_run = os.path.isdir(name)
            base = Path(args.out or (Path(name) / "evaluation" if is_run else "evaluation"))
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
                row += evaluate_split(model, number, dataset, directory, args, accelerator)
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"evaluate.py: {error}") from error
    if accelerator.is_main_process:
        print("\n" + table(results))
    accelerator.end_training()
    return results


if __name__ == "__main__":
    main()
