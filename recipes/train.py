"""The reference recipe: trains models on tracklets, evaluates them, and writes one run directory for each.

    python recipes/train.py                                             # mean, attention pooling; synthetic tracklets
    python recipes/train.py --data folder:/data/mine --model gltr_resnet50 --size 256x128 --pretrained
    python recipes/train.py --data folder:/data/small --identity-splits 5        # repeated splits for a small set
    python recipes/train.py --config mine.yaml --epochs 60                       # YAML, overridden by the command line
    torchrun --nproc_per_node 4 recipes/train.py ...                             # several GPUs (or nodes)

A run directory (``<out>/<name>/``) holds settings.json (every setting, versions, git revision), log.jsonl (one line per
epoch), metrics.json, config.json + model.safetensors (the trained model), cmc.png, and last.ckpt while training. The
same command goes on where a killed run stopped; a run directory with other settings is refused, never overwritten.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

# Before torch is imported: threads that spin while they wait take the processor from the loader.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import accelerate
import numpy as np
import timm
import torch
import yaml
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import temporal_agg
from temporal_agg import data, retrieval
from temporal_agg.losses import create_criterion, list_criteria


def option(default, help: str):
    kind = {"default_factory": dict} if default == {} else {"default": default}
    return dataclasses.field(**kind, metadata={"help": help})


@dataclass
class Settings:
    """Every setting with its reason; the YAML keys and the command line have the same names."""

    # What is trained on what.
    data: str = option("synthetic", "synthetic, folder:<root> or csv:<file>")
    data_options: dict = option({}, "options of that data set, e.g. num_identities=24 seed=1")
    identity_splits: int = option(0, "pool all identities and train on K random halves; 0: the data set's own split")
    model: str = option("mean_resnet10t,attention_resnet10t", "one or several of temporal_agg.list_models(), by comma")
    model_options: dict = option({}, "keyword arguments of create_model, e.g. quality=features")
    criterion: str = option("", "one of temporal_agg.list_criteria(); default: the model's own, else baseline")
    criterion_options: dict = option({}, "keyword arguments of create_criterion, e.g. margin=0.5")
    pretrained: bool = option(False, "start the backbone from timm's weights (downloads them)")

    # Input. 128x64 trains on a CPU; the papers use 256x128.
    size: str = option("128x64", "height x width of a frame in pixels")
    clip_length: int = option(0, "frames per training clip; 0: the model's own")
    flip: float = option(0.5, "chance that a clip is mirrored: people walk both ways")
    pad: int = option(4, "pixels added around a frame before it is cropped back: boxes are never exact")
    erasing: float = option(0.0, "chance that a rectangle of a clip is erased (for long trainings)")

    # Batches: P identities x K clips, so that triplets exist.
    identities: int = option(8, "P, identities per batch over all processes; fewer when the data set has fewer")
    clips: int = option(2, "K, clips per identity")

    # Optimisation. Adam at 1e-3 suits small backbones from scratch; fine-tuning wants about 3e-4.
    epochs: int = option(40, "passes over the training identities")
    optimizer: str = option("adamw", "adamw, adam or sgd (Nesterov momentum 0.9)")
    lr: float = option(1e-3, "peak learning rate")
    weight_decay: float = option(5e-4, "not applied to biases and norms")
    warmup: float = option(0.1, "share of the steps in which the learning rate rises from 0")
    schedule: str = option("cosine", "cosine (to 0) or constant")

    # The run.
    seed: int = option(0, "of initialisation, sampling and augmentation")
    out: str = option("runs", "where run directories are made")
    name: str = option("", "of the run; default: made of data, model and seed; several models add theirs")
    eval_every: int = option(0, "evaluate every so many epochs; 0: only before and after training")
    workers: int = option(1, "loader processes")
    device: str = option("auto", "auto (a GPU when there is one) or cpu")
    mixed_precision: str = option("no", "no, bf16 or fp16")
    tensorboard: bool = option(False, "also write TensorBoard events")


def parse_settings(argv: list[str]) -> Settings:
    """YAML first, then the command line; unknown keys are refused with the nearest one."""
    parser = argparse.ArgumentParser(
        usage="train.py [--config FILE.yaml] [--SETTING VALUE ...]",
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="settings by name; the command line overrides them")
    for field in dataclasses.fields(Settings):
        flag, default = "--" + field.name.replace("_", "-"), getattr(Settings(), field.name)
        text = field.metadata["help"].replace("%", "%%")
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif isinstance(default, dict):
            parser.add_argument(flag, nargs="+", metavar="KEY=VALUE", help=text)
        else:
            shown = f" ({default})" if default not in ("", 0) else ""
            parser.add_argument(flag, type=type(default), metavar=type(default).__name__.upper(), help=text + shown)
    args = vars(parser.parse_args(argv))

    values = {}
    config = args.pop("config")
    if config:
        if not os.path.isfile(config):
            parser.error(f"--config: there is no file {config}")
        values = {str(k).replace("-", "_"): v for k, v in (yaml.safe_load(Path(config).read_text()) or {}).items()}
    for key, value in args.items():
        if isinstance(value, list):
            if any("=" not in item for item in value):
                parser.error(f"--{key.replace('_', '-')} takes KEY=VALUE, got {' '.join(value)}")
            value = {k: yaml.safe_load(v) for k, v in (item.split("=", 1) for item in value)}
        if value is not None:
            values[key] = value
    defaults = dataclasses.asdict(Settings())
    for key, value in values.items():
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1)
            parser.error(f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        wanted = type(defaults[key])
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            values[key] = float(value)
        elif type(value) is not wanted:
            parser.error(f"{key} must be {wanted.__name__}, got {value!r}")
    settings = Settings(**values)
    for key, known in {
        "optimizer": ("adamw", "adam", "sgd"),
        "schedule": ("cosine", "constant"),
        "device": ("auto", "cpu"),
        "mixed_precision": ("no", "bf16", "fp16"),
    }.items():
        if getattr(settings, key) not in known:
            parser.error(f"--{key.replace('_', '-')} must be one of {', '.join(known)}, got {getattr(settings, key)!r}")
    try:
        image_size(settings)
    except ValueError:
        parser.error(f"--size must be HEIGHTxWIDTH, such as 256x128, got {settings.size!r}")
    return settings


def image_size(settings: Settings) -> tuple[int, int]:
    height, width = map(int, settings.size.lower().split("x"))
    return height, width


# ----------------------------------------------------------------------------------------------------------------------
# Building blocks


def build_model(name: str, settings: Settings) -> temporal_agg.TrackletModel:
    options = dict(settings.model_options)
    if name.startswith("star_"):
        options.setdefault("flow", False)  # no data set read here carries optical flow
    if settings.clip_length:
        options["clip"] = {**options.get("clip", {}), "length": settings.clip_length}
    return temporal_agg.create_model(
        name, backbone_pretrained=settings.pretrained, img_size=image_size(settings), **options
    )


def default_criterion(model: temporal_agg.TrackletModel) -> str:
    """The paper's own criterion, where the aggregator has one."""
    name = model.aggregator.config["name"]
    return name if name in list_criteria() else "baseline"


def build_optimizer(settings: Settings, model: nn.Module, criterion: nn.Module) -> torch.optim.Optimizer:
    """No decay for norms and biases; a criterion may ask for settings of its own (FGRA's centres)."""
    decayed, plain = [], []
    for parameter in model.parameters():
        (plain if parameter.ndim < 2 else decayed).append(parameter)
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}, *criterion.parameter_groups()]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, settings.lr, weight_decay=settings.weight_decay)


def lr_factor(settings: Settings, progress: float) -> float:
    """The learning rate's factor at a share of the training, from 0 to 1."""
    if progress < settings.warmup:
        return progress / settings.warmup
    if settings.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (progress - settings.warmup) / (1 - settings.warmup)))


def gather(details: temporal_agg.Details, labels: Tensor) -> tuple[temporal_agg.Details, Tensor]:
    """The global batch on every process, with gradients. Each process then computes the same loss; averaging the
    model's gradients over the processes gives those of one process with the whole batch."""
    from torch.distributed.nn.functional import all_gather

    def whole(x: Tensor) -> Tensor:
        return torch.cat(all_gather(x.contiguous()))

    details = temporal_agg.Details(
        whole(details.embedding),
        whole(details.mask),
        whole(details.frame_weights),
        {},
        {name: whole(tensor) for name, tensor in details.supervised.items()},
    )
    return details, whole(labels)


def embed(model, tracklets, accelerator: accelerate.Accelerator, progress: bool) -> Tensor:
    """Every process embeds its share of the tracklets; all of them get all embeddings, in order."""
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = range(rank, len(tracklets), world)
    share = [tracklets[i] for i in mine]
    embeddings = (
        temporal_agg.embed_tracklets(model, share, device=accelerator.device, progress=progress) if share else []
    )
    pairs = gather_object(list(zip(mine, embeddings, strict=True)))
    return torch.stack([embedding for _, embedding in sorted(pairs, key=lambda pair: pair[0])])


def evaluate(model, dataset: data.TrackletData, accelerator) -> tuple[dict, np.ndarray]:
    """The data set's own protocol: queries against the gallery, by the model's own distance."""
    main = accelerator.is_main_process
    queries = embed(model, dataset.query, accelerator, main)
    gallery = embed(model, dataset.gallery, accelerator, main)
    metrics = retrieval.evaluate(
        retrieval.distances(queries, gallery, model.clip.distance),
        *([getattr(t, key) for t in side] for side in (dataset.query, dataset.gallery) for key in ("pid", "camera")),
        query_index=dataset.query_index,
        ranks=(1, 5, 10, 20),
    )
    summary = {"map": float(metrics.map), "minp": float(metrics.minp)}
    summary |= {f"rank{k}": float(metrics.rank(k)) for k in (1, 5, 10, 20)}
    return summary, np.asarray(metrics.cmc)


def write_text(path: Path, content: str) -> None:
    """A killed process leaves the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content)
    os.replace(temporary, path)


def git_revision() -> str | None:
    try:
        here = Path(__file__).parent
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(accelerator) -> dict:
    device = accelerator.device
    return {
        "command": " ".join(sys.argv),
        "git": git_revision(),
        "temporal_agg": temporal_agg.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
    }


# ----------------------------------------------------------------------------------------------------------------------
# One run


# Settings that may differ between a killed run and the command that goes on with it.
NOT_COMPARED = ("out", "name", "model", "workers", "device", "tensorboard", "identity_splits")


def open_run(directory: Path, name: str, settings: Settings, accelerator) -> None:
    """Makes the run directory, or checks that it belongs to the same settings."""
    file = directory / "settings.json"
    resolved = {k: v for k, v in dataclasses.asdict(settings).items() if k not in NOT_COMPARED} | {"model": name}
    if file.exists():
        before = json.loads(file.read_text())["settings"]
        changed = [k for k in resolved if resolved[k] != before.get(k)]
        if changed:
            what = ", ".join(f"{k}: {before.get(k)!r} there, {resolved[k]!r} now" for k in changed)
            raise SystemExit(f"{directory} holds a run with other settings ({what}). Choose another --name or --out.")
    elif accelerator.is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"settings": resolved, "environment": environment(accelerator)}, indent=2) + "\n")


def save_checkpoint(path: Path, **parts) -> None:
    temporary = path.with_name(path.name + ".tmp")
    torch.save(parts, temporary)
    os.replace(temporary, path)


def train(name: str, directory: Path, dataset: data.TrackletData, settings: Settings, accelerator) -> dict:
    """Trains one model in one run directory, or goes on with it, and returns its metrics."""
    main = accelerator.is_main_process
    accelerator.wait_for_everyone()
    open_run(directory, name, settings, accelerator)
    finished = directory / "metrics.json"
    if finished.exists():
        accelerator.print(f"{directory}: finished before; its metrics are read, nothing is trained.")
        return json.loads(finished.read_text())

    start = time.perf_counter()
    torch.manual_seed(settings.seed)
    random.seed(settings.seed)
    labels = dataset.label_map
    model = build_model(name, settings).to(accelerator.device)
    criterion_name = settings.criterion or default_criterion(model)
    criterion = create_criterion(criterion_name, len(labels), model, **settings.criterion_options)
    criterion = criterion.to(accelerator.device)
    optimizer = build_optimizer(settings, model, criterion)
    peaks = [group["lr"] for group in optimizer.param_groups]

    config, clip = model.data_config, model.clip
    transform = data.ClipTransform(
        config["input_size"][1:],
        config["mean"],
        config["std"],
        config["interpolation"],
        train=True,
        flip=settings.flip,
        pad=settings.pad,
        erasing=settings.erasing,
    )
    # A backbone's BatchNorm cannot skip padding: short tracklets are filled by repetition in training.
    fill = "repeat" if clip.fill == "mask" else clip.fill
    clips = data.ClipDataset(
        dataset.train,
        labels,
        transform,
        length=clip.length,
        policy=clip.train_sampling,
        fill=fill,
        seed=settings.seed,
    )
    sampler = data.IdentityBatchSampler(
        [labels[t.pid] for t in dataset.train],
        min(settings.identities, len(labels)),
        settings.clips,
        seed=settings.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        cameras=[t.camera for t in dataset.train],
    )
    loader = DataLoader(
        clips,
        batch_sampler=sampler,
        num_workers=settings.workers,
        persistent_workers=settings.workers > 0,
        collate_fn=data.collate_clips,
        pin_memory=accelerator.device.type == "cuda",
    )

    checkpoint, first_epoch, seconds, history = directory / "last.ckpt", 0, 0.0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=accelerator.device, weights_only=True)
        model.load_state_dict(state["model"])
        criterion.load_state_dict(state["criterion"])
        optimizer.load_state_dict(state["optimizer"])
        first_epoch, seconds = state["epoch"], state["seconds"]
        untrained, history = state["untrained"], state["history"]
        accelerator.print(f"{directory}: goes on after epoch {first_epoch}.")
    else:
        untrained, _ = evaluate(model, dataset, accelerator)
    wrapped, optimizer = accelerator.prepare(model, optimizer)

    writer = None
    if settings.tensorboard and main:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(directory))

    steps = settings.epochs * len(sampler)
    bar = tqdm(total=steps, initial=first_epoch * len(sampler), desc=name, disable=not main, unit="step")
    for epoch in range(first_epoch, settings.epochs):
        epoch_start = time.perf_counter()
        sampler.set_epoch(epoch)
        torch.manual_seed(hash_seed(settings.seed, epoch))  # dropout, random mining: the same after a restart
        wrapped.train()
        criterion.train()
        sums = defaultdict(float)
        for i, batch in enumerate(loader):
            factor = lr_factor(settings, (epoch * len(sampler) + i) / steps)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            batch = {key: value.to(accelerator.device, non_blocking=True) for key, value in batch.items()}
            mask = None if batch["mask"].all() else batch["mask"]
            details = wrapped(batch["clip"], mask, return_details=True)
            target = batch["label"]
            if accelerator.num_processes > 1:
                details, target = gather(details, target)
            terms = criterion(details, target)
            if not terms["loss"].isfinite():
                pids = sorted({dataset.train[j].pid for j in batch["index"].tolist()})
                raise SystemExit(
                    f"{directory}: the loss is {terms['loss'].item()} in epoch {epoch + 1}, identities {pids}. "
                    "Try a smaller --lr, or --mixed-precision bf16 in place of fp16."
                )
            optimizer.zero_grad()
            accelerator.backward(terms["loss"])
            optimizer.step()
            criterion.after_step()
            for key, value in terms.items():
                sums[key] += value.item()
            bar.update()
            bar.set_postfix({key: f"{value / (i + 1):.3f}" for key, value in sums.items()})
        seconds += time.perf_counter() - epoch_start
        entry = {"epoch": epoch + 1, "lr": peaks[0] * factor, "seconds": time.perf_counter() - epoch_start}
        entry |= {key: value / len(sampler) for key, value in sums.items()}
        if settings.eval_every and (epoch + 1) % settings.eval_every == 0 and epoch + 1 < settings.epochs:
            entry |= evaluate(model, dataset, accelerator)[0]
        history.append(entry)
        if main:
            write_text(directory / "log.jsonl", "".join(json.dumps(line) + "\n" for line in history))
            save_checkpoint(
                checkpoint,
                model=model.state_dict(),
                criterion=criterion.state_dict(),
                optimizer=optimizer.state_dict(),
                epoch=epoch + 1,
                untrained=untrained,
                seconds=seconds,
                history=history,
            )
            for key, value in entry.items():
                if writer and key != "epoch":
                    writer.add_scalar(key, value, epoch + 1)
    bar.close()

    trained, cmc = evaluate(model, dataset, accelerator)
    metrics = {
        **trained,
        "cmc": [round(float(value), 6) for value in cmc],
        "untrained": untrained,
        "model": name,
        "data": dataset.name,
        "criterion": criterion_name,
        "seed": settings.seed,
        "epochs": settings.epochs,
        "train_seconds": round(seconds, 2),
        "seconds": round(time.perf_counter() - start, 2),
        "queries": len(dataset.query),
        "gallery": len(dataset.gallery),
        "aggregator_parameters": sum(p.numel() for p in model.aggregator.parameters()),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if main:
        model.save_pretrained(directory)
        write_text(finished, json.dumps(metrics, indent=2) + "\n")  # last: a run that has it is whole
        checkpoint.unlink(missing_ok=True)
    return metrics


def hash_seed(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch) % 2**63


# ----------------------------------------------------------------------------------------------------------------------
# What a person reads


COLUMNS = ("map", "rank1", "rank5", "rank10")


def table(runs: dict[str, list[dict]]) -> str:
    """One row per model; several splits as mean and standard deviation."""

    def cell(values: list[float]) -> str:
        values = 100 * np.array(values)
        return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")

    rows = [["model", "mAP", "rank-1", "rank-5", "rank-10", "untrained mAP", "untrained rank-1", "seconds"]]
    for name, all_metrics in runs.items():
        row = [name] + [cell([m[key] for m in all_metrics]) for key in COLUMNS]
        row += [cell([m["untrained"][key] for m in all_metrics]) for key in ("map", "rank1")]
        rows.append([*row, f"{sum(m['seconds'] for m in all_metrics):.0f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def draw_cmc(path: Path, runs: dict[str, list[dict]], title: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        tqdm.write("No CMC figure: it needs matplotlib (pip install temporal-agg[plot]).")
        return
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, all_metrics in runs.items():
        curve = 100 * np.mean([m["cmc"][:20] for m in all_metrics], 0)
        label = f"{name} (mAP {100 * np.mean([m['map'] for m in all_metrics]):.1f})"
        axes.plot(range(1, len(curve) + 1), curve, marker="o", markersize=3, label=label)
    axes.set(xlabel="rank", ylabel="queries with a match up to this rank, %", title=title)
    axes.set_xticks([1, 5, 10, 15, 20])
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    temporary = path.with_name("cmc.tmp.png")
    figure.savefig(temporary, dpi=150)
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    settings = parse_settings(sys.argv[1:] if argv is None else argv)
    accelerator = accelerate.Accelerator(cpu=settings.device == "cpu", mixed_precision=settings.mixed_precision)
    names = [name.strip() for name in settings.model.split(",")]
    try:  # what is wrong with the command shows now, and not after the first model is trained
        dataset = data.parse_data_spec(settings.data, **settings.data_options)
        splits = [dataset]
        if settings.identity_splits:
            splits = data.identity_splits(dataset, settings.identity_splits, settings.seed)
        for split in splits:
            split.check_retrieval()
        for name in names:
            build_model(name, settings)
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"train.py: {error}") from error
    base = settings.name or f"{settings.data.split(':')[0]}-seed{settings.seed}"
    runs, directories = {}, []
    for name in names:
        results = []
        for k, split in enumerate(splits):
            run_name = base if settings.name and len(names) == 1 else f"{base}-{name}"
            run_name += f"-split{k}of{len(splits)}" if settings.identity_splits else ""
            directory = Path(settings.out) / run_name
            results.append(
                train(name, directory, split, dataclasses.replace(settings, seed=settings.seed + k), accelerator)
            )
            directories.append(directory)
        runs[name] = results
    if accelerator.is_main_process:
        for directory in directories:
            draw_cmc(directory / "cmc.png", runs, f"{dataset.name}, {len(splits[0].query)} queries")
        print("\n" + table(runs))
        print(f"\nRuns: {', '.join(str(d) for d in directories)}")
    accelerator.end_training()
    return runs


if __name__ == "__main__":
    main()
