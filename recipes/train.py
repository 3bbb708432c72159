"""The reference recipe: trains models on tracklets, evaluates them, and writes one run directory for each.

    python recipes/train.py                                             # mean, attention pooling; synthetic tracklets
    python recipes/train.py --data folder:/data/mine --model gltr_resnet50 --size 256x128 --backbone-pretrained
    python recipes/train.py --data folder:/data/small --identity-splits 5        # repeated splits for a small set
    python recipes/train.py --config grl.yaml --data mars:/data/mars             # a paper's own settings
    python recipes/train.py --config mine.yaml --epochs 60                       # YAML, overridden by the command line
    torchrun --nproc_per_node 4 recipes/train.py ...                             # several GPUs; or accelerate launch
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_endpoint host:29500 recipes/train.py ...      # on every node

A run directory (``<out>/<name>/``) holds settings.json (every setting, versions, git revision), log.jsonl (one line per
epoch), metrics.json, config.json + model.safetensors (the trained model), reference.safetensors (its embeddings of the
first gallery tracklets), cmc.png, and checkpoints/. The same command goes on where a killed run stopped; a directory of
other settings is refused, never overwritten. A data set with several splits is one run for each.

Several processes share one global batch: each embeds its part, and all of them compute the loss on the whole. That is
the result of one process, but for BatchNorm in training, whose statistics are those of each process's part of the batch
(--sync-batchnorm: of the whole, in the backbone, on GPUs). Run directories must be on a disk that all nodes see.
"""

import dataclasses
import difflib
import hashlib
import io
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import accelerate
import common
import numpy as np
import torch
from common import cell, draw, layout, start_workers, tested, write_json, write_tensors, write_text
from settings import DEFAULTS, NOT_COMPARED, Settings, names_of, parse, stages_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

import temporal_agg
from temporal_agg import data, plot
from temporal_agg.aggregators import create_criterion, registry_entry
from temporal_agg.files import replace_file, sweep

# ----------------------------------------------------------------------------------------------------------------------
# Building blocks


def build_model(settings: Settings, weights: bool = True) -> temporal_agg.TrackletModel:
    """The model, with the weights that it starts from, or (``weights=False``) without."""
    options = dict(settings.model_options)
    if settings.clip_length:
        options["clip"] = {**options.get("clip", {}), "length": settings.clip_length}
    if settings.grad_checkpointing:
        options["grad_checkpointing"] = True
    if weights and settings.backbone_weights:
        options["backbone_weights"] = settings.backbone_weights
    size = common.image_size(settings.size)
    given = {"pretrained": settings.pretrained, "backbone_pretrained": settings.backbone_pretrained and weights}
    return temporal_agg.create_model(settings.model, **given, img_size=size, **options)


def build_criterion(settings: Settings, model: temporal_agg.TrackletModel, num_classes: int) -> tuple[str, nn.Module]:
    """The criterion that was asked for, or the paper's own, where the aggregator has one; and its name."""
    default = registry_entry(model.aggregator.config["name"]).default_criterion
    name = settings.criterion or default
    return name, create_criterion(name, num_classes, model, **settings.criterion_options)


def build_optimizer(settings: Settings, model: nn.Module, criterion: nn.Module) -> torch.optim.Optimizer:
    """Groups by learning rate and decay; a criterion may ask for settings of its own (FGRA's centres)."""
    by_kind = defaultdict(list)
    for name, parameter in model.named_parameters():
        factor = 1.0 if name.startswith("encoder.") else settings.head_lr_factor
        for module, value in settings.lr_factors.items():
            factor = float(value) if name == module or name.startswith(f"{module}.") else factor
        parameter.requires_grad_(factor > 0)  # a backbone whose first layers are frozen trains in half the time
        by_kind[factor, parameter.ndim >= 2 or not settings.no_decay_norms].append(parameter)
    groups: list[dict] = [
        {"params": parameters, "lr": settings.lr * factor, "weight_decay": settings.weight_decay * decayed}
        for (factor, decayed), parameters in by_kind.items()
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

    def __init__(self, sampler):
        self.sampler, self.first = sampler, 0

    def __iter__(self) -> Iterator[list[data.Draw]]:
        return islice(iter(self.sampler), self.first, None)

    def __len__(self) -> int:
        return len(self.sampler)


def build_sampler(settings: Settings, tracklets, labels: list[int], rank: int, world: int) -> Batches:
    shared: dict[str, Any] = {"seed": settings.seed, "rank": rank, "world_size": world}
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
    clip = model.clip
    augmentation = ("flip", "pad", "random_crop", "erasing", "erasing_per_frame", "erasing_fill")
    chances = {name: getattr(settings, name) for name in augmentation}
    transform = data.ClipTransform.for_model(model, train=True, **chances)
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


def start_from(model: temporal_agg.TrackletModel, run: str) -> None:
    """Takes the encoder of a run; what STAR adds to a backbone stays as it is where that run has none of it.

    Where the run's aggregator has the same name, with other options or not, what both have of it is taken, too: GLTR's
    first stage trains the embedding of its frames (ICCV 2019, Sec. 4.2), and the second goes on from it.
    """
    before = temporal_agg.create_model(f"local-dir:{run}")
    own = {key: value for key, value in model.encoder.state_dict().items() if not key.startswith("backbone.")}
    try:
        model.encoder.load_state_dict(own | before.encoder.state_dict())
    except RuntimeError as error:
        raise ValueError(f"the encoder of {run} does not fit this model: {common.one_line_of(error)}") from error
    if model.aggregator.config["name"] == before.aggregator.config["name"]:
        state = model.aggregator.state_dict()
        both = {k: v for k, v in before.aggregator.state_dict().items() if k in state and v.shape == state[k].shape}
        model.aggregator.load_state_dict(state | both)


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


def hash_seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1


# ----------------------------------------------------------------------------------------------------------------------
# The run directory


def tracklets_of(dataset: data.TrackletData) -> str:
    """Changes with the tracklets of a data set, but not with where they lie: ``root`` may differ."""
    sides = (dataset.train, dataset.query, dataset.gallery)
    return hashlib.sha256(repr([[(t.pid, t.camera, len(t)) for t in side] for side in sides]).encode()).hexdigest()[:16]


def open_run(directory: Path, settings: Settings, extra: dict, accelerator) -> None:
    """Makes the run directory, or checks that it belongs to the same settings.

    Raises:
        ValueError: it belongs to others, or to no run.
    """
    file = directory / "settings.json"
    resolved = {**dataclasses.asdict(settings), **extra}
    if settings.init:  # of a stage: in the run directory, wherever that lies
        resolved["init"] = os.path.relpath(settings.init, directory)
    if file.exists():
        before = {**DEFAULTS, **common.read_run(directory)[0]}
        changed = [k for k in resolved if resolved[k] != before.get(k) and (k == "model" or k not in NOT_COMPARED)]
        if changed:
            what = ", ".join(f"{k}: {before.get(k)!r} there, {resolved[k]!r} now" for k in changed)
            raise ValueError(f"{directory} holds a run with other settings ({what}). Choose another --name or --out.")
    elif directory.exists() and any(not path.name.startswith(".") for path in directory.iterdir()):
        raise ValueError(
            f"{directory} holds files of something else (no settings.json). Choose another --name or --out."
        )
    elif accelerator.is_main_process:
        about = common.environment(accelerator.device, accelerator.num_processes)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(file, {"settings": resolved, "environment": about})


def checkpoints(directory: Path) -> list[Path]:
    """From the newest to the oldest."""
    return sorted((directory / "checkpoints").glob("batch-*.ckpt"), reverse=True)


def save_checkpoint(directory: Path, batches: int, keep: int, state: dict) -> None:
    """Writes a checkpoint after so many batches, its checksum behind it, then deletes older ones but for ``keep``."""
    content = io.BytesIO()
    torch.save(state, content)
    content.write(hashlib.sha256(content.getbuffer()).digest())
    folder = directory / "checkpoints"
    folder.mkdir(exist_ok=True)
    path = folder / f"batch-{batches:09d}.ckpt"
    replace_file(path, lambda temporary: temporary.write_bytes(content.getbuffer()))
    for old in [other for other in checkpoints(directory) if other <= path][keep:]:
        old.unlink()


def load_checkpoint(directory: Path) -> dict | None:
    """The newest that is not damaged, on the CPU; None where there is none at all.

    Raises:
        OSError: one cannot be read, which is no damage.
        ValueError: all are damaged, or one is sound and still cannot be used.
    """
    for path in checkpoints(directory):
        content = path.read_bytes()
        body, checksum = content[:-32], content[-32:]
        if hashlib.sha256(body).digest() != checksum:
            tqdm.write(f"{path} cannot be read: it is damaged (another checksum); the one before is tried.")
            continue
        try:
            return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path} is whole, but torch {torch.__version__} cannot load it: {error}") from error
    if checkpoints(directory):
        raise ValueError(
            f"no checkpoint in {directory / 'checkpoints'} can be read: all are damaged. Nothing is changed there. "
            "Restore one, or delete the folder to train from the start."
        )
    return None


def check_finished(directory: Path) -> None:
    """Raises a ValueError unless the model that a finished run has trained is there and can be loaded."""
    try:
        temporal_agg.create_model(f"local-dir:{directory}")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{directory / 'metrics.json'} says that this run is finished, but its model cannot be loaded: "
            f"{common.one_line_of(error)} Restore the file, or delete metrics.json: the same command then goes on from "
            "the newest checkpoint."
        ) from error


# ----------------------------------------------------------------------------------------------------------------------
# One training


@dataclass
class Training:
    """What one training works on. All that is random in it is a function of the seed and of the place in training."""

    directory: Path
    dataset: data.TrackletData
    settings: Settings
    accelerator: accelerate.Accelerator
    model: Any
    wrapped: Any  # the same, for several processes and mixed precision
    criterion: Any
    criterion_name: str
    optimizer: Any
    loader: DataLoader
    progress: dict  # what a checkpoint holds beside weights
    shows_progress: bool

    @property
    def steps(self) -> int:
        return len(self.loader.batch_sampler)  # type: ignore[arg-type]

    def save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        state = {"model": self.model.state_dict(), "criterion": self.criterion.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "progress": self.progress}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        batches = self.progress["epoch"] * self.steps + self.progress["batch"]
        save_checkpoint(self.directory, batches, self.settings.keep, state)

    def write_log(self) -> None:
        if self.accelerator.is_main_process and self.progress["history"]:
            lines = [json.dumps(line) + "\n" for line in self.progress["history"]]
            write_text(self.directory / "log.jsonl", "".join(lines))

    def evaluate(self) -> tuple[dict, Tensor]:
        """The data set's own protocol, by the model's own distance; and the gallery's embeddings."""
        if self.accelerator.num_processes > 1:  # BatchNorm's statistics are each process's own since the last forward
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        options = (self.settings.frames_per_batch, self.shows_progress)
        return tested(self.model, self.dataset, self.accelerator, *options)


def prepare(directory: Path, dataset: data.TrackletData, settings: Settings, accelerator, bars: bool) -> Training:
    """Builds all of a training, in the state of its newest checkpoint or at its start."""
    device = accelerator.device
    torch.manual_seed(settings.seed)
    labels = dataset.label_map
    model = build_model(settings)
    if settings.init:
        start_from(model, settings.init)
    if settings.sync_batchnorm and device.type == "cuda" and accelerator.num_processes > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device)
    model.encoder.to(memory_format=model.encoder.memory_format)
    criterion_name, criterion = build_criterion(settings, model, len(labels))
    criterion = criterion.to(device)
    optimizer = build_optimizer(settings, model, criterion)
    loader = build_loader(settings, model, dataset, labels, accelerator)
    if settings.compile:
        model.compile()
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    progress = {"epoch": 0, "batch": 0, "seconds": 0.0, "sums": {}, "history": [], "untrained": {}}
    state = load_checkpoint(directory)
    if state:
        try:
            model.load_state_dict(state["model"])
            criterion.load_state_dict(state["criterion"])
            optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"the checkpoints of {directory} cannot go on here: {common.one_line_of(error)}"
            ) from error
        progress = state["progress"]
        accelerator.print(f"{directory}: goes on in epoch {progress['epoch'] + 1}, batch {progress['batch'] + 1}.")
    parts = (directory, dataset, settings, accelerator, model, model, criterion, criterion_name, optimizer, loader)
    job = Training(*parts, progress, bars)
    if state:
        job.write_log()  # it may have been killed between a checkpoint and its line
    elif settings.eval_untrained:
        progress["untrained"], _ = job.evaluate()
    job.wrapped, job.optimizer = accelerator.prepare(model, optimizer)
    if state and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return job


Evaluation = Callable[[Training], tuple[dict, Tensor]]


def train(
    directory: Path,
    dataset: data.TrackletData,
    settings: Settings,
    extra: dict,
    accelerator,
    bars: bool = True,
    evaluate: Evaluation = Training.evaluate,
) -> dict:
    """Trains one model in one run directory, or goes on with it, and returns its metrics.

    Args:
        directory: of the run.
        dataset: to train and evaluate on.
        settings: of this training, with one model.
        extra: what settings.json says beside them.
        accelerator: where it runs.
        bars: show progress.
        evaluate: what is measured in the end: at least what :meth:`Training.evaluate` gives.

    Raises:
        Busy: another process trains there.
        OSError: a file that cannot be read or written.
        ValueError: settings, data, files that do not fit.
    """
    accelerator.wait_for_everyone()
    open_run(directory, settings, {**extra, "tracklets": tracklets_of(dataset)}, accelerator)
    finished = directory / "metrics.json"
    if not finished.exists():
        with common.held(directory, accelerator):
            if not finished.exists():  # another command may have finished it while this one waited
                return train_held(directory, dataset, settings, accelerator, bars, evaluate)
    if accelerator.is_main_process:
        common.sweep_lock(directory)
    metrics = common.read_metrics(finished)
    check_finished(directory)
    accelerator.print(f"{directory}: finished before; its metrics are read, nothing is trained.")
    return metrics


def train_held(
    directory: Path,
    dataset: data.TrackletData,
    settings: Settings,
    accelerator,
    bars: bool,
    evaluate: Evaluation,
) -> dict:
    """The same, in a directory that no other command works in."""
    start = time.perf_counter()
    if accelerator.is_main_process:
        sweep(directory / "checkpoints")
    job = prepare(directory, dataset, settings, accelerator, bars)
    run_epochs(job)
    metrics, gallery = evaluate(job)
    metrics |= about(job, time.perf_counter() - start)
    if accelerator.is_main_process:
        job.model.save_pretrained(directory)
        write_tensors(directory / "reference.safetensors", {"gallery": gallery[:16]})
        write_json(directory / "metrics.json", metrics)  # last: a run that has it is whole
    return metrics


def run_epochs(job: Training) -> None:
    """The training loop, from where the job stands to its last epoch."""
    total, done = job.settings.epochs * job.steps, job.progress["epoch"] * job.steps + job.progress["batch"]
    hidden = not (job.accelerator.is_main_process and job.shows_progress)
    with tqdm(total=total, initial=done, desc=job.settings.model, disable=hidden, unit="batch") as bar:
        train_epochs(job, bar)


def train_epochs(job: Training, bar: tqdm) -> None:
    settings, progress, accelerator = job.settings, job.progress, job.accelerator
    main, steps = accelerator.is_main_process, job.steps
    writer = None
    if settings.tensorboard and main:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(job.directory))
    for epoch in range(progress["epoch"], settings.epochs):
        clock = time.perf_counter()
        sampler: Any = job.loader.batch_sampler
        sampler.sampler.set_epoch(epoch)
        sampler.first = progress["batch"]
        sums = defaultdict(float, progress["sums"])
        job.wrapped.train()
        job.criterion.train()
        batches = start_workers(job.loader)
        for first in range(progress["batch"], steps, settings.accumulate):  # of an optimizer step
            set_lr(job, epoch, first)
            size = min(settings.accumulate, steps - first)
            group = []
            for i, batch in enumerate(islice(batches, size), first):
                group.append(backward(job, batch, epoch, i, first + size - 1))
                bar.update()
            for parameter in job.criterion.parameters():  # equal on all processes, but for the last bit on GPUs
                if accelerator.num_processes > 1 and parameter.grad is not None:
                    parameter.grad = accelerator.reduce(parameter.grad, "mean")
            job.optimizer.step()
            job.optimizer.zero_grad()
            job.criterion.after_step()
            for terms in group:
                for key, value in terms.items():
                    sums[key] += value
            passed = first + size
            bar.set_postfix({key: f"{value / passed:.3f}" for key, value in sums.items()}, refresh=False)
            progress |= {"batch": passed, "sums": dict(sums)}
            if settings.save_every and passed // settings.save_every > first // settings.save_every:
                progress["seconds"] += time.perf_counter() - clock
                clock = time.perf_counter()
                job.save()
        progress["seconds"] += time.perf_counter() - clock
        set_lr(job, epoch, (steps - 1) // settings.accumulate * settings.accumulate)  # the last one of the epoch
        group = job.optimizer.param_groups[0]
        entry = {"epoch": epoch + 1, "lr": group["lr"], "train_seconds": round(progress["seconds"], 3)}
        entry |= {key: value / steps for key, value in sums.items()}
        if settings.eval_every and (epoch + 1) % settings.eval_every == 0 and epoch + 1 < settings.epochs:
            entry |= {key: value for key, value in job.evaluate()[0].items() if key != "cmc"}
        progress |= {"epoch": epoch + 1, "batch": 0, "sums": {}, "history": [*progress["history"], entry]}
        if not settings.save_every or epoch + 1 == settings.epochs:
            job.save()
        job.write_log()
        for key, value in entry.items():
            if writer and key != "epoch":
                writer.add_scalar(key, value, epoch + 1)
    if writer:
        writer.close()


def set_lr(job: Training, epoch: int, batch: int) -> None:
    """The learning rates of the step that begins with this batch."""
    factor = lr_factor(job.settings, epoch + batch / job.steps)
    for group in job.optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def backward(job: Training, batch: dict[str, Tensor], epoch: int, i: int, last: int) -> dict[str, float]:
    """Adds the gradients of batch ``i`` to those of its step, which ends with batch ``last``; returns the loss's terms.

    Raises:
        ValueError: the loss is not finite; the state before the batch is saved.
    """
    accelerator, accumulate = job.accelerator, job.settings.accumulate
    torch.manual_seed(hash_seed(job.settings.seed, epoch, i))  # dropout, random mining: the same after a restart
    mask_needed = not bool(batch["mask"].all())
    batch = {key: value.to(accelerator.device, non_blocking=True) for key, value in batch.items()}
    buffers = [*job.model.buffers(), *job.criterion.buffers()]
    counted = [buffer.clone() for buffer in buffers]
    with nullcontext() if i == last else accelerator.no_sync(job.wrapped):
        mask, target = batch["mask"] if mask_needed else None, batch["label"]
        details = job.wrapped(batch["clip"], mask, flow=batch.get("flow"), return_details=True)
        if accelerator.num_processes > 1:
            details, target = gather(details, target)
        terms = job.criterion(details, target)
        accelerator.backward(terms["loss"] / (last % accumulate + 1))
    # The device is waited for once, after it has got all of its work.
    values = dict(zip(terms, torch.stack([term.detach() for term in terms.values()]).tolist(), strict=True))
    if math.isfinite(values["loss"]):
        return values
    for buffer, before in zip(buffers, counted, strict=True):
        buffer.copy_(before)  # BatchNorm has counted the batch
    if all(p.isfinite().all() for p in (*job.model.parameters(), *job.criterion.parameters())):
        job.save()
    pids = sorted(pid for pid, label in job.dataset.label_map.items() if label in target.tolist())
    raise ValueError(
        f"{job.directory}: the loss is {values['loss']} in epoch {epoch + 1}, batch {i + 1}, identities {pids}. The "
        "last sound state is saved. Look at their frames, or try a smaller --lr, a longer --warmup, or "
        "--mixed-precision bf16 in place of fp16."
    )


def about(job: Training, seconds: float) -> dict:
    """What metrics.json says beside the measures."""
    model, settings = job.model, job.settings
    return {
        "untrained": {key: value for key, value in job.progress["untrained"].items() if key != "cmc"},
        "model": settings.model,
        "data": job.dataset.name,
        "criterion": job.criterion_name,
        "distance": model.clip.distance,
        "seed": settings.seed,
        "epochs": settings.epochs,
        "train_seconds": round(job.progress["seconds"], 2),
        "seconds": round(seconds, 2),
        "queries": len(job.dataset.query),
        "gallery": len(job.dataset.gallery),
        "aggregator_parameters": sum(p.numel() for p in model.aggregator.parameters()),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


# ----------------------------------------------------------------------------------------------------------------------
# The command


def try_out(stages: list[Settings]) -> list[bool]:
    """Builds models and criteria of all stages without weights, so that what is wrong shows before anything is loaded.

    Returns:
        Which of them take optical flow.

    Raises:
        ValueError: settings that do not fit each other, or match nothing.
    """
    modules: set[str] = set()
    flow = []
    for settings in stages:
        model = build_model(settings, weights=False)
        name, criterion = build_criterion(settings, model, 2)
        pairs = settings.sampler == "pairs" or (settings.sampler == "identity" and settings.clips % 2 == 0)
        if getattr(criterion, "wants_pairs", False) and not pairs:
            raise ValueError(
                f"criterion {name!r} compares clips two by two, the first with the second of one person: it needs "
                f"--sampler pairs, or identity with an even number of clips; got {settings.sampler}, "
                f"{settings.clips} clips."
            )
        modules |= {key for key, _ in (*model.named_modules(), *model.named_parameters())}
        flow.append(model.encoder.uses_flow)
        if settings.init and not (Path(settings.init) / "config.json").is_file():
            raise ValueError(f"init: {settings.init} is no run directory with a trained model (no config.json).")
    unknown = sorted(set(stages[0].lr_factors) - modules)
    if unknown:
        near = difflib.get_close_matches(unknown[0], modules, n=2, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"lr_factors: the model has no module {', '.join(unknown)}{hint}")
    return flow


def without_flow(settings: Settings, dataset: data.TrackletData) -> Settings:
    """A model that takes optical flow is built without it for tracklets that can have none, unless it is asked for."""
    if "flow" in settings.model_options or all(hasattr(t, "load_flow") for t in dataset.train):
        return settings
    return dataclasses.replace(settings, model_options={**settings.model_options, "flow": False})


def open_data(settings: Settings) -> dict[int, data.TrackletData]:
    """The splits to train on, which can be trained and evaluated on."""
    spec = f"{settings.data}:{settings.root}" if settings.root else settings.data
    splits = common.open_splits(spec, settings.data_options, settings.split, settings.identity_splits, settings.seed)
    if settings.flow_root:
        splits = {k: split.with_flow_root(settings.flow_root) for k, split in splits.items()}
    for split in splits.values():
        split.check_training().check_retrieval()
    return splits


def run_stages(directory: Path, dataset: data.TrackletData, stages: list[Settings], extra: dict, accelerator) -> dict:
    """All stages of one run; each but the last in a directory of its own inside, and started from the one before."""
    places = [directory / f"stage{i}" for i in range(1, len(stages))] + [directory]
    for i in range(1, len(stages)):
        if not stages[i].init or stages[i].init == stages[0].init:
            stages[i] = dataclasses.replace(stages[i], init=str(places[i - 1]))
    open_run(directory, stages[-1], {**extra, "tracklets": tracklets_of(dataset)}, accelerator)
    *_, metrics = (train(*run, extra, accelerator) for run in zip(places, [dataset] * len(places), stages, strict=True))
    return metrics


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


def parse_settings(argv: list[str]) -> Settings:
    return parse(argv, __doc__ or "")


@common.own_defaults()
def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    settings = parse_settings(sys.argv[1:] if argv is None else argv)
    with common.one_line("train.py", TypeError):  # what is wrong with the command shows before a model is trained
        unused = accelerate.DistributedDataParallelKwargs(find_unused_parameters=settings.find_unused_parameters)
        accelerator = common.accelerator_of(settings.device, settings.mixed_precision, kwargs_handlers=[unused])
        names = names_of(settings)
        plans = {name: stages_of(name, settings) for name in names}
        flow = {name: try_out(stages) for name, stages in plans.items()}
        splits = open_data(settings)
        for name, stages in plans.items():
            for i, stage in enumerate(stages):
                if flow[name][i]:
                    stages[i] = stage = without_flow(stage, splits[min(splits)])
                if flow[name][i] and stage.model_options.get("flow", True):
                    for split in splits.values():
                        data.check_flow([*split.train, *split.query, *split.gallery])
    base = settings.name or f"{settings.data.split(':')[0]}-seed{settings.seed}"
    runs: dict[str, list[dict]] = {}
    directories = []
    with common.one_line("train.py"):
        for name, stages in plans.items():
            for k, split in splits.items():
                run_name = base if settings.name and len(names) == 1 else f"{base}-{name}"
                run_name += f"-split{k}" if len(splits) > 1 or settings.split else ""
                directories.append(Path(settings.out).expanduser() / run_name)
                own = [dataclasses.replace(stage, seed=stage.seed + k, split=str(k)) for stage in stages]
                extra = {"split_seed": settings.seed}
                runs.setdefault(name, []).append(run_stages(directories[-1], split, own, extra, accelerator))
        if accelerator.is_main_process:
            report(runs, directories, splits[min(splits)].name)
    accelerator.end_training()
    return runs


def report(runs: dict[str, list[dict]], directories: list[Path], title: str) -> None:
    """The table, and the curves in every run directory."""
    curves = {
        f"{name} (mAP {100 * np.mean([m['map'] for m in results]):.1f})": np.mean([m["cmc"] for m in results], 0)
        for name, results in runs.items()
    }
    title += f", {next(reversed(runs.values()))[-1]['queries']} queries"
    for directory in directories:
        draw(directory / "cmc.png", lambda: plot.cmc(curves, title))
    print("\n" + table(runs))
    print(f"\nRuns: {', '.join(str(d) for d in directories)}")


if __name__ == "__main__":
    common.keep_memory()
    common.run(main)
