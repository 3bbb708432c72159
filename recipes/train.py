"""The reference recipe: trains models on tracklets, evaluates them, and writes one run directory for each.

    python recipes/train.py                                             # mean, attention pooling; synthetic tracklets
    python recipes/train.py --data folder:/data/mine --model gltr_resnet50 --size 256x128 --pretrained
    python recipes/train.py --data folder:/data/small --identity-splits 5        # repeated splits for a small set
    python recipes/train.py --config recipes/configs/grl_mars.yaml --root /data/mars      # a paper's own settings
    python recipes/train.py --config mine.yaml --epochs 60                       # YAML, overridden by the command line
    torchrun --nproc_per_node 4 recipes/train.py ...                             # several GPUs; or accelerate launch
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_endpoint host:29500 recipes/train.py ...      # on every node

A run directory (``<out>/<name>/``) holds settings.json (every setting, versions, git revision), log.jsonl (one line per
epoch), metrics.json, config.json + model.safetensors (the trained model), reference.safetensors (its embeddings of the
first gallery tracklets), cmc.png, and checkpoints/. The same command goes on where a killed run stopped; a directory of
other settings is refused, never overwritten.

Several processes share one global batch: each embeds its part, and all of them compute the loss on the whole. That is
the result of one process, but for BatchNorm in training, whose statistics are those of each process's part of the batch
(--sync-batchnorm: of the whole, in the backbone, on GPUs). Run directories must be on a disk that all nodes see.
"""

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
import os
import pickle
import platform
import subprocess
import sys
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

# Before torch is imported: threads that spin while they wait take the processor from the loader.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import accelerate
import numpy as np
import safetensors.torch
import timm
import torch
import yaml
from evaluate import cell, draw, embed_test, key_values, layout, open_splits, score, summary, write_text
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

import temporal_agg
from temporal_agg import data, plot, retrieval
from temporal_agg._files import replace_file
from temporal_agg.aggregators import create_criterion, registry_entry


def option(default, help: str):
    kind = {"default_factory": type(default)} if default in ({}, []) else {"default": default}
    return dataclasses.field(**kind, metadata={"help": help})


@dataclass
class Settings:
    """Every setting with its reason; the YAML keys and the command line have the same names."""

    # What is trained on what.
    data: str = option("synthetic", "synthetic, folder:<root>, csv:<file>, mars:<root>, ... (or the root apart)")
    root: str = option("", "where the data set lies, if --data has its name alone")
    data_options: dict = option({}, "options of that data set, e.g. num_identities=24 seed=1")
    flow_root: str = option("", "where compute_flow.py --out put optical flow (STAR); default: beside the frames")
    split: str = option("", "of a data set with several: a number, or all for one run each (default: 0)")
    identity_splits: int = option(0, "pool all identities and train on K random halves; 0: the data set's own split")
    model: str = option("mean_resnet10t,attention_resnet10t", "one or several of temporal_agg.list_models(), by comma")
    model_options: dict = option({}, "keyword arguments of create_model, e.g. quality=features")
    criterion: str = option("", "one of temporal_agg.list_criteria(); default: the model's own, else baseline")
    criterion_options: dict = option({}, "keyword arguments of create_criterion, e.g. margin=0.5")
    pretrained: bool = option(False, "start the backbone from timm's weights (downloads them)")
    init: str = option("", "start from the encoder of this run directory; what STAR adds to one starts afresh")
    stages: list = option([], "trainings in a row, as changes to these settings; each starts from the encoder before")

    # Input. 128x64 trains on a CPU; the papers use 256x128.
    size: str = option("128x64", "height x width of a frame in pixels")
    clip_length: int = option(0, "frames per training clip; 0: the model's own")
    flip: float = option(0.5, "chance that a clip is mirrored: people walk both ways")
    pad: int = option(4, "pixels added around a frame before it is cropped back: boxes are never exact")
    random_crop: float = option(1.0, "resize to this multiple of the size before a random crop")
    erasing: float = option(0.0, "chance that a rectangle of a clip is erased (for long trainings)")
    erasing_per_frame: bool = option(False, "erase another rectangle in each frame")

    # Batches; all counts are over all processes.
    sampler: str = option("identity", "identity (P x K), pairs (across cameras), tracklets or frames (each once)")
    identities: int = option(8, "P, identities per batch; fewer when the data set has fewer")
    clips: int = option(2, "K, clips per identity, so that triplets exist")
    batch_size: int = option(8, "of the other samplers: pairs, tracklets or frames")
    accumulate: int = option(1, "batches per optimizer step; each is mined on its own")

    # Optimisation. Adam at 1e-3 suits small backbones from scratch; fine-tuning wants about 3e-4.
    epochs: int = option(40, "passes over what the sampler counts: identities, tracklets or frames")
    optimizer: str = option("adamw", "adamw, adam or sgd")
    momentum: float = option(0.9, "of sgd")
    nesterov: bool = option(True, "of sgd")
    lr: float = option(1e-3, "peak learning rate")
    head_lr_factor: float = option(1.0, "times the learning rate for all that is new: aggregator and criterion")
    lr_factors: dict = option({}, "the same for single modules of the model, e.g. aggregator.gce=1.0")
    weight_decay: float = option(5e-4, "L2; of adamw: decoupled")
    no_decay_norms: bool = option(True, "no weight decay for the model's biases and norms; papers mostly decay all")
    warmup: float = option(0.1, "share of the steps in which the learning rate rises from 0")
    schedule: str = option("cosine", "cosine (to 0), constant, or step (x 0.1 at times)")
    step_epochs: int = option(0, "of step: every so many epochs")
    step_milestones: list = option([], "of step: after these epochs")

    # The run.
    seed: int = option(0, "of initialisation, sampling and augmentation")
    out: str = option("runs", "where run directories are made")
    name: str = option("", "of the run; default: made of data, model and seed; several models add theirs")
    eval_untrained: bool = option(True, "evaluate before training, too")
    eval_every: int = option(0, "evaluate every so many epochs; 0: only before and after training")
    save_every: int = option(0, "write a checkpoint every so many batches; 0: after every epoch")
    keep: int = option(2, "the newest checkpoints kept")
    workers: int = option(1, "loader processes")
    frames_per_batch: int = option(256, "frames in one pass of the backbone when evaluating")
    device: str = option("auto", "auto (a GPU when there is one) or cpu")
    mixed_precision: str = option("no", "no, bf16 or fp16, in training")
    grad_checkpointing: bool = option(False, "compute the backbone's activations twice instead of keeping them")
    sync_batchnorm: bool = option(False, "BatchNorm of the backbone over all processes (GPUs)")
    find_unused_parameters: bool = option(False, "of several processes, for losses that leave parts without gradients")
    compile: bool = option(False, "torch.compile")
    tensorboard: bool = option(False, "also write TensorBoard events")


CHOICES = {
    "sampler": ("identity", "pairs", "tracklets", "frames"),
    "optimizer": ("adamw", "adam", "sgd"),
    "schedule": ("cosine", "constant", "step"),
    "device": ("auto", "cpu"),
    "mixed_precision": ("no", "bf16", "fp16"),
}


def read_config(file: Path) -> dict:
    """A YAML file; what it says goes over the file that it names as its base, in the same folder."""
    values = {str(k).replace("-", "_"): v for k, v in (yaml.safe_load(file.read_text()) or {}).items()}
    base = values.pop("base", None)
    return {**read_config(file.parent / base), **values} if base else values


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
        elif field.name == "stages":
            continue  # in YAML only
        elif isinstance(default, list):
            parser.add_argument(flag, nargs="*", type=int, metavar="INT", help=text)
        else:
            shown = f" ({default})" if default not in ("", 0) else ""
            parser.add_argument(flag, type=type(default), metavar=type(default).__name__.upper(), help=text + shown)
    args = vars(parser.parse_args(argv))

    values = {}
    config = args.pop("config")
    if config:
        try:
            values = read_config(Path(config))
        except FileNotFoundError as error:
            parser.error(f"--config: there is no file {error.filename}")
    for key, value in args.items():
        if isinstance(getattr(Settings(), key), dict) and value is not None:
            try:
                value = key_values(value)
            except ValueError as error:
                parser.error(f"--{key.replace('_', '-')} {error}")
        if value is not None:
            values[key] = value
    try:
        settings = checked(values)
        for i, stage in enumerate(settings.stages):
            if not isinstance(stage, dict):
                raise ValueError(f"stages[{i}] must be settings by name, got {stage!r}")
            settings.stages[i] = {str(k).replace("-", "_"): v for k, v in stage.items()}
            checked({**dataclasses.asdict(settings), "stages": [], **settings.stages[i]})
    except ValueError as error:
        parser.error(str(error))
    return settings


def checked(values: dict) -> Settings:
    """Settings of the right names, types and choices.

    Raises:
        ValueError: what is wrong with one of them.
    """
    defaults = dataclasses.asdict(Settings())
    values = dict(values)
    for key, value in values.items():
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1)
            raise ValueError(f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        wanted = type(defaults[key])
        if type(value) is int and wanted in (float, str):
            values[key] = wanted(value)
        elif type(value) is not wanted:
            raise ValueError(f"{key} must be {wanted.__name__}, got {value!r}")
        if values[key] not in CHOICES.get(key, [values[key]]):
            raise ValueError(f"--{key.replace('_', '-')} must be one of {', '.join(CHOICES[key])}, got {value!r}")
    settings = Settings(**values)
    if settings.split not in ("", "all") and not settings.split.isdigit():
        raise ValueError(f"split must be a number or all, got {settings.split!r}")
    for key in ("accumulate", "keep", "batch_size", "identities", "clips"):
        if getattr(settings, key) < 1:
            raise ValueError(f"{key} must be at least 1, got {getattr(settings, key)}")
    if settings.schedule == "step" and not settings.step_epochs and not settings.step_milestones:
        raise ValueError("schedule 'step' needs step_epochs or step_milestones")
    try:
        image_size(settings)
    except ValueError:
        raise ValueError(f"--size must be HEIGHTxWIDTH, such as 256x128, got {settings.size!r}") from None
    return settings


def image_size(settings: Settings) -> tuple[int, int]:
    height, width = map(int, settings.size.lower().split("x"))
    return height, width


# ----------------------------------------------------------------------------------------------------------------------
# Building blocks


def build_model(name: str, settings: Settings) -> temporal_agg.TrackletModel:
    options = dict(settings.model_options)
    if name.startswith("star_") and settings.data == "synthetic":
        options.setdefault("flow", False)  # drawn figures have none; for other data: recipes/compute_flow.py
    if settings.clip_length:
        options["clip"] = {**options.get("clip", {}), "length": settings.clip_length}
    if settings.grad_checkpointing:
        options["grad_checkpointing"] = True
    return temporal_agg.create_model(
        name, backbone_pretrained=settings.pretrained, img_size=image_size(settings), **options
    )


def default_criterion(model: temporal_agg.TrackletModel) -> str:
    """The paper's own criterion, where the aggregator has one."""
    return registry_entry(model.aggregator.config["name"]).default_criterion


def build_optimizer(settings: Settings, model: nn.Module, criterion: nn.Module) -> torch.optim.Optimizer:
    """Groups by learning rate and decay; a criterion may ask for settings of its own (FGRA's centres)."""
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        factor = 1.0 if name.startswith("encoder.") else settings.head_lr_factor
        for prefix, value in settings.lr_factors.items():
            factor = float(value) if name.startswith(prefix) else factor
        groups[factor, parameter.ndim >= 2 or not settings.no_decay_norms].append(parameter)
    groups = [
        {"params": parameters, "lr": settings.lr * factor, "weight_decay": settings.weight_decay * decayed}
        for (factor, decayed), parameters in groups.items()
    ]
    groups += [{"lr": settings.lr * settings.head_lr_factor, **group} for group in criterion.parameter_groups()]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "sgd":
        momentum = {"momentum": settings.momentum, "nesterov": settings.nesterov}
        return torch.optim.SGD(groups, settings.lr, weight_decay=settings.weight_decay, **momentum)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, settings.lr, weight_decay=settings.weight_decay)


def lr_factor(settings: Settings, epoch: float) -> float:
    """The learning rate's factor after some epochs, parts of one included."""
    progress = epoch / settings.epochs
    if progress < settings.warmup:
        return progress / settings.warmup
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "step":
        passed = sum(epoch >= milestone for milestone in settings.step_milestones)
        return 0.1 ** (passed + (int(epoch // settings.step_epochs) if settings.step_epochs else 0))
    return 0.5 * (1 + math.cos(math.pi * (progress - settings.warmup) / (1 - settings.warmup)))


class Batches(Sampler):
    """The batches of a sampler from one on, for an epoch that was interrupted."""

    def __init__(self, sampler: Sampler):
        self.sampler, self.first = sampler, 0

    def __iter__(self) -> Iterator[list[data.Draw]]:
        return islice(iter(self.sampler), self.first, None)

    def __len__(self) -> int:
        return len(self.sampler)


def build_sampler(settings: Settings, tracklets, labels: list[int], rank: int, world: int) -> Batches:
    shared = {"seed": settings.seed, "rank": rank, "world_size": world}
    cameras = [t.camera for t in tracklets]
    if settings.sampler == "identity":
        identities = min(settings.identities, len(set(labels)) // world * world)
        return Batches(data.IdentityBatchSampler(labels, identities, settings.clips, cameras=cameras, **shared))
    if settings.sampler == "pairs":
        pairs = min(settings.batch_size, len(tracklets) // world * world)
        return Batches(data.PairBatchSampler(labels, pairs, cameras=cameras, **shared))
    counts = [1 if settings.sampler == "tracklets" else len(t) for t in tracklets]
    return Batches(data.TrackletBatchSampler(counts, min(settings.batch_size, sum(counts) // world * world), **shared))


def build_loader(settings: Settings, model, dataset: data.TrackletData, labels: dict, accelerator) -> DataLoader:
    config, clip = model.data_config, model.clip
    transform = data.ClipTransform(
        config["input_size"][1:],
        config["mean"],
        config["std"],
        config["interpolation"],
        train=True,
        flip=settings.flip,
        pad=settings.pad,
        random_crop=settings.random_crop,
        erasing=settings.erasing,
        erasing_per_frame=settings.erasing_per_frame,
    )
    clips = data.ClipDataset(
        dataset.train,
        labels,
        transform,
        length=clip.length,
        policy=clip.train_sampling,
        # A backbone's BatchNorm cannot skip padding: short tracklets are filled by repetition in training.
        fill="repeat" if clip.fill == "mask" else clip.fill,
        seed=settings.seed,
        flow=model.encoder.uses_flow,
    )
    own = [labels[t.pid] for t in dataset.train]
    return DataLoader(
        clips,
        batch_sampler=build_sampler(settings, dataset.train, own, accelerator.process_index, accelerator.num_processes),
        num_workers=settings.workers,
        persistent_workers=settings.workers > 0,
        collate_fn=data.collate_clips,
        pin_memory=accelerator.device.type == "cuda",
    )


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


def evaluate(model, dataset: data.TrackletData, accelerator, settings: Settings) -> tuple[dict, Tensor]:
    """The data set's own protocol, by the model's own distance; and the gallery's embeddings."""
    if accelerator.num_processes > 1:  # since the last forward each process has statistics of its own in BatchNorm
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
    queries, gallery = embed_test(model, dataset, accelerator, settings.frames_per_batch)
    return summary(score(retrieval.distances(queries, gallery, model.clip.distance), dataset)), gallery


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
NOT_COMPARED = (
    "root",
    "flow_root",
    "out",
    "name",
    "model",
    "workers",
    "frames_per_batch",
    "device",
    "tensorboard",
    "keep",
    "stages",
)


def tracklets_of(dataset: data.TrackletData) -> str:
    """Changes with the tracklets of a data set, but not with where they lie: ``root`` may differ."""
    sides = (dataset.train, dataset.query, dataset.gallery)
    return hashlib.sha256(repr([[(t.pid, t.camera, len(t)) for t in side] for side in sides]).encode()).hexdigest()[:16]


def open_run(directory: Path, name: str, settings: Settings, extra: dict, accelerator) -> None:
    """Makes the run directory, or checks that it belongs to the same settings."""
    file = directory / "settings.json"
    resolved = {**dataclasses.asdict(settings), "model": name, **extra}
    if settings.init:  # of a stage: in the run directory, wherever that lies
        resolved["init"] = os.path.relpath(settings.init, directory)
    if file.exists():
        before = {**dataclasses.asdict(Settings()), **json.loads(file.read_text())["settings"]}
        changed = [k for k in resolved if resolved[k] != before.get(k) and (k == "model" or k not in NOT_COMPARED)]
        if changed:
            what = ", ".join(f"{k}: {before.get(k)!r} there, {resolved[k]!r} now" for k in changed)
            raise SystemExit(f"{directory} holds a run with other settings ({what}). Choose another --name or --out.")
    elif accelerator.is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"settings": resolved, "environment": environment(accelerator)}, indent=2) + "\n")


def checkpoints(directory: Path) -> list[Path]:
    """From the newest to the oldest."""
    return sorted((directory / "checkpoints").glob("batch-*.ckpt"), reverse=True)


def save_checkpoint(directory: Path, batches: int, keep: int, state: dict) -> None:
    """Writes a checkpoint after so many batches, then deletes the oldest."""

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    folder = directory / "checkpoints"
    folder.mkdir(exist_ok=True)
    for half in folder.glob(".*.tmp"):  # of a process that was killed as it wrote
        half.unlink()
    replace_file(folder / f"batch-{batches:09d}.ckpt", write)
    for old in checkpoints(directory)[keep:]:
        old.unlink()


def load_checkpoint(directory: Path, device: torch.device) -> dict | None:
    """The newest that can be read."""
    for path in checkpoints(directory):
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            tqdm.write(f"{path} cannot be read ({error}); the one before is tried.")
    return None


def run_stages(name: str, directory: Path, dataset, settings: Settings, extra: dict, accelerator) -> dict:
    """All stages of one run; each but the last in a directory of its own inside."""
    init = settings.init
    *first, last = settings.stages or [{}]
    for i, changes in enumerate(first, 1):
        stage = checked({**dataclasses.asdict(settings), "stages": [], "init": init, **changes})
        init = str(directory / f"stage{i}")
        train(changes.get("model", name), Path(init), dataset, stage, extra, accelerator)
    last = checked({**dataclasses.asdict(settings), "init": init, **last})
    return train(name, directory, dataset, last, extra, accelerator)


def start_from(encoder: nn.Module, run: str) -> None:
    """Takes the encoder of a run; what STAR adds to a backbone stays as it is where that run has none of it."""
    own = {key: value for key, value in encoder.state_dict().items() if not key.startswith("backbone.")}
    encoder.load_state_dict(own | temporal_agg.create_model(f"local-dir:{run}").encoder.state_dict())


def train(name: str, directory: Path, dataset: data.TrackletData, settings: Settings, extra: dict, accelerator) -> dict:
    """Trains one model in one run directory, or goes on with it, and returns its metrics."""
    main, device = accelerator.is_main_process, accelerator.device
    accelerator.wait_for_everyone()
    open_run(directory, name, settings, {**extra, "tracklets": tracklets_of(dataset)}, accelerator)
    finished = directory / "metrics.json"
    if finished.exists():
        accelerator.print(f"{directory}: finished before; its metrics are read, nothing is trained.")
        return json.loads(finished.read_text())

    start = time.perf_counter()
    torch.manual_seed(settings.seed)
    labels = dataset.label_map
    model = build_model(name, settings)
    if settings.init:
        start_from(model.encoder, settings.init)
    if settings.sync_batchnorm and device.type == "cuda" and accelerator.num_processes > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device)
    criterion_name = settings.criterion or default_criterion(model)
    criterion = create_criterion(criterion_name, len(labels), model, **settings.criterion_options).to(device)
    optimizer = build_optimizer(settings, model, criterion)
    peaks = [group["lr"] for group in optimizer.param_groups]
    loader = build_loader(settings, model, dataset, labels, accelerator)
    sampler = loader.batch_sampler
    if settings.compile:
        model.compile()

    # What a checkpoint holds beside weights. All that is random is a function of the seed and of the place in training.
    progress = {"epoch": 0, "batch": 0, "seconds": 0.0, "sums": {}, "history": [], "untrained": {}}
    state = load_checkpoint(directory, device)
    if state:
        model.load_state_dict(state["model"])
        criterion.load_state_dict(state["criterion"])
        optimizer.load_state_dict(state["optimizer"])
        progress = state["progress"]
        accelerator.print(f"{directory}: goes on in epoch {progress['epoch'] + 1}, batch {progress['batch'] + 1}.")
    elif settings.eval_untrained:
        progress["untrained"], _ = evaluate(model, dataset, accelerator, settings)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if state and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])

    def save() -> None:
        if main:
            state = {"model": model.state_dict(), "criterion": criterion.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "progress": progress}
            state |= {"scaler": accelerator.scaler.state_dict()} if accelerator.scaler is not None else {}
            save_checkpoint(directory, progress["epoch"] * len(sampler) + progress["batch"], settings.keep, state)

    def buffers() -> list[Tensor]:
        return [*model.buffers(), *criterion.buffers()]

    writer = None
    if settings.tensorboard and main:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(directory))

    done = progress["epoch"] * len(sampler) + progress["batch"]
    bar = tqdm(total=settings.epochs * len(sampler), initial=done, desc=name, disable=not main, unit="batch")
    for epoch in range(progress["epoch"], settings.epochs):
        clock = time.perf_counter()
        sampler.sampler.set_epoch(epoch)
        sampler.first = progress["batch"]
        sums = defaultdict(float, progress["sums"])
        wrapped.train()
        criterion.train()
        group: list[dict] = []  # the batches of one optimizer step
        start_of_last = (len(sampler) - 1) // settings.accumulate * settings.accumulate
        factor = lr_factor(settings, epoch + start_of_last / len(sampler))  # if the epoch's batches are done already
        for i, batch in enumerate(loader, progress["batch"]):
            torch.manual_seed(hash_seed(settings.seed, epoch, i))  # dropout, random mining: the same after a restart
            first = i - i % settings.accumulate
            factor = lr_factor(settings, epoch + first / len(sampler))
            for parameters, peak in zip(optimizer.param_groups, peaks, strict=True):
                parameters["lr"] = peak * factor
            size = min(settings.accumulate, len(sampler) - first)
            last = i == first + size - 1
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            mask = None if batch["mask"].all() else batch["mask"]
            counted = [buffer.clone() for buffer in buffers()]
            with nullcontext() if last else accelerator.no_sync(wrapped):
                details = wrapped(batch["clip"], mask, flow=batch.get("flow"), return_details=True)
                target = batch["label"]
                if accelerator.num_processes > 1:
                    details, target = gather(details, target)
                terms = criterion(details, target)
                if not terms["loss"].isfinite():
                    for buffer, before in zip(buffers(), counted, strict=True):
                        buffer.copy_(before)  # BatchNorm has counted the batch
                    if all(p.isfinite().all() for p in (*model.parameters(), *criterion.parameters())):
                        save()
                    pids = sorted(pid for pid, label in labels.items() if label in target.tolist())
                    bar.close()
                    raise SystemExit(
                        f"{directory}: the loss is {terms['loss'].item()} in epoch {epoch + 1}, batch {i + 1}, "
                        f"identities {pids}. The last sound state is saved. Look at their frames, or try a "
                        "smaller --lr, a longer --warmup, or --mixed-precision bf16 in place of fp16."
                    )
                accelerator.backward(terms["loss"] / size)
            group.append({key: value.item() for key, value in terms.items()})
            bar.update()
            if not last:
                continue
            for parameter in criterion.parameters():  # equal on all processes, but for the last bit on GPUs
                if accelerator.num_processes > 1 and parameter.grad is not None:
                    parameter.grad = accelerator.reduce(parameter.grad, "mean")
            optimizer.step()
            optimizer.zero_grad()
            criterion.after_step()
            for terms in group:
                for key, value in terms.items():
                    sums[key] += value
            group.clear()
            bar.set_postfix({key: f"{value / (i + 1):.3f}" for key, value in sums.items()})
            progress |= {"batch": i + 1, "sums": dict(sums)}
            if settings.save_every and (i + 1) // settings.save_every > first // settings.save_every:
                progress["seconds"] += time.perf_counter() - clock
                clock = time.perf_counter()
                save()
        progress["seconds"] += time.perf_counter() - clock
        entry = {"epoch": epoch + 1, "lr": peaks[0] * factor, "train_seconds": round(progress["seconds"], 3)}
        entry |= {key: value / len(sampler) for key, value in sums.items()}
        if settings.eval_every and (epoch + 1) % settings.eval_every == 0 and epoch + 1 < settings.epochs:
            entry |= {key: v for key, v in evaluate(model, dataset, accelerator, settings)[0].items() if key != "cmc"}
        progress |= {"epoch": epoch + 1, "batch": 0, "sums": {}, "history": [*progress["history"], entry]}
        if not settings.save_every or epoch + 1 == settings.epochs:
            save()
        if main:
            write_text(directory / "log.jsonl", "".join(json.dumps(line) + "\n" for line in progress["history"]))
            for key, value in entry.items():
                if writer and key != "epoch":
                    writer.add_scalar(key, value, epoch + 1)
    bar.close()

    trained, gallery = evaluate(model, dataset, accelerator, settings)
    metrics = {
        **trained,
        "untrained": {key: value for key, value in progress["untrained"].items() if key != "cmc"},
        "model": name,
        "data": dataset.name,
        "criterion": criterion_name,
        "distance": model.clip.distance,
        "seed": settings.seed,
        "epochs": settings.epochs,
        "train_seconds": round(progress["seconds"], 2),
        "seconds": round(time.perf_counter() - start, 2),
        "queries": len(dataset.query),
        "gallery": len(dataset.gallery),
        "aggregator_parameters": sum(p.numel() for p in model.aggregator.parameters()),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if main:
        model.save_pretrained(directory)
        reference = {"gallery": gallery[:16].contiguous()}
        replace_file(directory / "reference.safetensors", lambda path: safetensors.torch.save_file(reference, path))
        write_text(finished, json.dumps(metrics, indent=2) + "\n")  # last: a run that has it is whole
    return metrics


def hash_seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1


# ----------------------------------------------------------------------------------------------------------------------
# What a person reads


COLUMNS = ("map", "rank1", "rank5", "rank10")


def table(runs: dict[str, list[dict]]) -> str:
    """One row per model; several splits as mean and standard deviation."""
    rows = [["model", "mAP", "rank-1", "rank-5", "rank-10", "untrained mAP", "untrained rank-1", "seconds"]]
    for name, all_metrics in runs.items():
        row = [name] + [cell([m[key] for m in all_metrics]) for key in COLUMNS]
        before = [m["untrained"] for m in all_metrics if m["untrained"]]
        row += [cell([m[key] for m in before]) if before else "-" for key in ("map", "rank1")]
        rows.append([*row, f"{sum(m['seconds'] for m in all_metrics):.0f}"])
    return layout(rows)


def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    settings = parse_settings(sys.argv[1:] if argv is None else argv)
    accelerator = accelerate.Accelerator(
        cpu=settings.device == "cpu",
        mixed_precision=settings.mixed_precision,
        kwargs_handlers=[
            accelerate.DistributedDataParallelKwargs(find_unused_parameters=settings.find_unused_parameters)
        ],
    )
    names = [name.strip() for name in settings.model.split(",")]
    spec = f"{settings.data}:{settings.root}" if settings.root else settings.data
    try:  # what is wrong with the command shows now, and not after the first model is trained
        splits = open_splits(spec, settings.data_options, settings.split, settings.identity_splits, settings.seed)
        if settings.flow_root:
            splits = {k: split.with_flow_root(settings.flow_root) for k, split in splits.items()}
        uses_flow = [build_model(name, settings).encoder.uses_flow for name in names]
        for split in splits.values():
            split.check_retrieval()
            if any(uses_flow):
                data.check_flow([*split.train, *split.query, *split.gallery])
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"train.py: {error}") from error
    base = settings.name or f"{settings.data.split(':')[0]}-seed{settings.seed}"
    runs, directories = {}, []
    for name in names:
        results = []
        for k, split in splits.items():
            run_name = base if settings.name and len(names) == 1 else f"{base}-{name}"
            run_name += f"-split{k}" if len(splits) > 1 or settings.split else ""
            directory = Path(settings.out) / run_name
            own = dataclasses.replace(settings, seed=settings.seed + k, split=str(k))
            extra = {"split_seed": settings.seed}
            results.append(run_stages(name, directory, split, own, extra, accelerator))
            directories.append(directory)
        runs[name] = results
    if accelerator.is_main_process:
        curves = {
            f"{name} (mAP {100 * np.mean([m['map'] for m in results]):.1f})": np.mean([m["cmc"] for m in results], 0)
            for name, results in runs.items()
        }
        title = f"{splits[min(splits)].name}, {results[0]['queries']} queries"
        for directory in directories:
            draw(directory / "cmc.png", lambda: plot.cmc(curves, title))
        print("\n" + table(runs))
        print(f"\nRuns: {', '.join(str(d) for d in directories)}")
    accelerator.end_training()
    return runs


if __name__ == "__main__":
    main()
