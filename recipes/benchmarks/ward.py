"""The comparison on WARD: every aggregator on real people, under one backbone, one start and one budget.

    git clone https://github.com/iN1k1/CVPR2012
    python recipes/benchmarks/ward.py --root CVPR2012 --backbone-weights mobilenetv2.safetensors --jobs 2

The weights are ImageNet's for timm's mobilenetv2_100. For each split of WARD one encoder is trained from them on single
frames; every variant goes on from it, with the same steps, clips, frames and augmentation. A learning rate is chosen
for each pooling and each system with its own loss on split 0, from the same few, and split 0 is then left out; with
another loss they keep it. The rest of a variant is its own: the aggregator, the loss, how a tracklet is cut in a test,
and the distance.

Tests: the test half as it is, and with faults put into its tracklets, queries and gallery alike, drawn from a fixed
seed: a run of frames that show another person of the same camera, or in which half of the frame shows one, or whose
boxes are off. The clean test and those with other people are done once more with outlier_mask before the aggregator.
What is there to tell aggregator and loss apart has the clean test alone.

Every training is a run directory of recipes/train.py under --out. What is measured goes into ward.json in --results, at
once; the same command goes on from there, on another machine as well. Splits are done one by one, and the tables
(ward.md, ward.png) are of those that are whole.
"""

import argparse
import dataclasses
import functools
import hashlib
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import comparison
import numpy as np
import torch
import train
from common import draw, tested, write_json, write_text
from comparison import (
    CONTROLS,
    POOLINGS,
    REFERENCE,
    SAME_LOSS,
    SYSTEMS,
    Variant,
    gap,
    interval,
    loss_table,
    markdown,
    signed,
)
from settings import Settings
from torch import Tensor
from torchvision.transforms.v2 import functional as images

import temporal_agg
from temporal_agg import data
from temporal_agg.files import read_json


@dataclass(frozen=True)
class Size:
    """How large the comparison is; the same for all of its trainings."""

    backbone: str = "mobilenetv2_100"
    # The first layers keep ImageNet's filters (their BatchNorm goes on counting): a step then takes half the time.
    frozen: tuple[str, ...] = ("conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2")
    size: tuple[int, int] = (128, 64)
    frames: int = 6  # of a clip
    identities: int = 6  # in a batch, two clips each
    epochs: int = 20  # of the variants: 120 batches
    encoder_epochs: int = 67  # 201 batches of 96 single frames
    encoder_lr: float = 3e-4
    # Learning rate of the encoder, and how many times that all that is new has.
    rates: tuple[tuple[float, float], ...] = ((3e-4, 1.0), (1e-4, 10.0), (3e-4, 10.0))
    shares: tuple[tuple[str, float], ...] = (("foreign", 0.2), ("foreign", 0.3), ("occlusion", 0.3), ("bad boxes", 0.3))
    search: int = 0  # the split of the learning rates
    splits: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9)
    seed: int = 0  # of everything that is drawn but the splits and the faults


# The common start as it is, tested with the mean and with the robust mean: nothing is trained.
START = "start"
STILL = {START: POOLINGS["mean"], f"{START}: robust": POOLINGS["robust"]}
SEARCHED = {**POOLINGS, **SYSTEMS}  # each with its own loss
SHOWN = {**STILL, **SEARCHED}  # in the main tables, with every test
VARIANTS = {**SEARCHED, **SAME_LOSS, **CONTROLS, **STILL}
REASONS = {  # why a system ends where it ends, with --reasons: the clean test alone
    **{f"{START}: {name}": variant for name, variant in SYSTEMS.items()},  # its new layers as they are drawn
    "gsta: no pyramid term": dataclasses.replace(SYSTEMS["gsta"], criterion_options={"pyramid_weight": 0.0}),
}
LONGER = 3  # times the steps, with --longer,
TRAINED_LONGER = (REFERENCE, *SYSTEMS)  # of these
ENCODER, STAGE = "encoder", "gltr: stage 1"
STARTS = {  # what is trained first; GLTR's first stage trains the embedding of its frames (Sec. 4.2)
    ENCODER: Variant("mean", {}, "baseline"),
    STAGE: Variant("gltr", {"dtp": False, "tsa": False}, "gltr"),
}


# ----------------------------------------------------------------------------------------------------------------------
# Data: every frame decoded once


@functools.cache
def decoded(root: str, backbone: str, size: tuple[int, int]) -> dict[str, list[np.ndarray]]:
    """Every tracklet's frames, resized as the backbone wants them, by the tracklet's name."""
    resize = data.ClipTransform.for_model(temporal_agg.create_model(f"mean_{backbone}", img_size=size)).resize
    sides = [data.open_dataset("ward", root, split=0, cameras=cameras) for cameras in ("1-2,3", "2-1,3")]
    tracklets = {t.name: t for side in sides for t in (*side.train, *side.query, *side.gallery)}
    return {
        name: [frame.permute(1, 2, 0).numpy() for frame in resize(t.load(range(len(t))))]
        for name, t in tracklets.items()
    }


@functools.lru_cache(maxsize=4)
def split_of(root: str, size: Size, split: int | None) -> data.TrackletData:
    """``split``: None = everybody to train on."""
    frames = decoded(root, size.backbone, size.size)
    dataset = data.open_dataset("ward", root, split=split or 0, everybody=split is None)

    def in_memory(side: Sequence[data.Tracklet]) -> list[data.Tracklet]:
        return [data.Tracklet(frames[t.name], t.pid, t.camera, t.name) for t in side]

    train, query, gallery = map(in_memory, (dataset.train, dataset.query, dataset.gallery))
    return data.TrackletData(train, query, gallery, name=dataset.name)


def off(frame: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a box shows that is off by up to 0.3 of its width, 0.2 of its height, and 0.8 to 1.3 times as large.

    Beyond the frame its border goes on.
    """
    height, width = frame.shape[:2]
    scale, dx, dy = rng.uniform([0.8, -0.3, -0.2], [1.3, 0.3, 0.2])
    room = [width // 2, height // 2]
    tall, wide = round(scale * height), round(scale * width)
    top = room[1] + round(height * (0.5 + dy)) - tall // 2
    left = room[0] + round(width * (0.5 + dx)) - wide // 2
    padded = images.pad(torch.from_numpy(frame).permute(2, 0, 1), room, padding_mode="edge")
    cut = images.resized_crop(padded, top, left, tall, wide, [height, width], antialias=True)
    return cut.permute(1, 2, 0).numpy()


def with_fault(dataset: data.TrackletData, fault: str, share: float, split: int) -> data.TrackletData:
    """The test half with a fault in a run of each tracklet's frames; the same whenever it is asked for."""
    everybody = [*dataset.query, *dataset.gallery]

    def faulty(tracklet: data.Tracklet) -> data.Tracklet:
        rng = np.random.default_rng((split, tracklet.pid, tracklet.camera))  # the same run, whatever the fault
        frames = [np.asarray(frame) for frame in tracklet.frames]
        run, place = comparison.intrusion(tracklet, everybody, share, rng)
        other = [np.asarray(frame) for frame in everybody[place].frames]
        for i in run:
            foreign, half = other[i % len(other)], frames[i].shape[1] // 2
            if fault == "foreign":
                frames[i] = foreign
            elif fault == "occlusion":
                frames[i] = np.concatenate([foreign[:, :half], frames[i][:, half:]], 1)
            else:
                frames[i] = off(frames[i], rng)
        return dataclasses.replace(tracklet, frames=frames)

    query, gallery = ([faulty(t) for t in side] for side in (dataset.query, dataset.gallery))
    return data.TrackletData([], query, gallery, name=f"{dataset.name}, {fault} {share}")


def key_of(fault: str, share: float) -> str:
    return f"{fault} {100 * share:.0f} %"


@functools.lru_cache(maxsize=1)
def tests_of(root: str, size: Size, split: int) -> dict[str, data.TrackletData]:
    dataset = split_of(root, size, split)
    faults = {key_of(*fault): with_fault(dataset, *fault, split) for fault in size.shares}
    return {"clean": dataset, **faults}


# ----------------------------------------------------------------------------------------------------------------------
# One training and its tests


@dataclass(frozen=True)
class Plan:
    """Where everything is."""

    size: Size
    root: str
    weights: str  # ImageNet's
    out: Path
    device: str = "auto"
    bars: bool = True


def settings_of(plan: Plan, name: str, split: int | None, rate: int, longer: int = 1) -> Settings:
    """Of a variant or of what it starts from.

    Args:
        split: None = everybody.
        rate: which of ``size.rates``.
        longer: times the steps.
    """
    size = plan.size
    variant, single = {**VARIANTS, **REASONS, **STARTS}[name], name in STARTS
    (lr, factor), epochs = size.rates[rate], size.epochs
    if name == ENCODER:
        (lr, factor), epochs = (size.encoder_lr, 1.0), size.encoder_epochs
    return Settings(
        data="ward",
        root=plan.root,
        data_options={"everybody": True} if split is None else {},
        split=str(split or 0),
        model=f"{variant.model}_{size.backbone}",
        model_options=variant.options,
        backbone_weights=plan.weights if name == ENCODER else "",
        criterion=variant.criterion,
        criterion_options=variant.criterion_options,
        init=str(place(plan, start_of(name), split, rate)) if name != ENCODER else "",
        size="x".join(map(str, size.size)),
        clip_length=1 if single else size.frames,
        identities=size.identities * (2 if single else 1),
        clips=8 if single else 2,
        epochs=0 if name.startswith(START) else longer * epochs,
        lr=lr,
        head_lr_factor=factor,
        lr_factors={f"encoder.backbone.{part}": 0.0 for part in size.frozen},
        seed=1000 * size.seed + (split or 0),
        eval_untrained=name == ENCODER and split is not None,
        save_every=0 if name == ENCODER else 10**6,
        keep=1,
        workers=0,
    )


def system_of(name: str) -> str:
    """Whose variant it is."""
    return name.removeprefix(f"{START}: ").partition(":")[0]


def start_of(name: str) -> str:
    return STAGE if name != STAGE and {**VARIANTS, **REASONS}[name].model == STARTS[STAGE].model else ENCODER


def place(plan: Plan, name: str, split: int | None, rate: int, longer: int = 1) -> Path:
    label = name.replace(": ", "-").replace(" ", "_").replace("'", "")
    of = "everybody" if split is None else f"split{split}"
    label = f"{label}-{of}" + ("" if name == ENCODER else f"-rate{rate}")
    return plan.out / (label + (f"-times{longer}" if longer > 1 else ""))


@contextmanager
def remembering(model: Any) -> Iterator[None]:
    """The encoder meets every frame once, in however many tests it stands."""
    known: dict[bytes, Tensor] = {}
    encode = model.encode_frames

    def remembered(frames: Tensor, flow: Tensor | None = None) -> Tensor:
        keys = [hashlib.blake2b(frame.tobytes(), digest_size=16).digest() for frame in frames.cpu().numpy()]
        new = {key: i for i, key in enumerate(keys) if key not in known}
        if new:
            known.update(zip(new, encode(frames[list(new.values())]), strict=True))
        return torch.stack([known[key] for key in keys])

    model.encode_frames = remembered
    try:
        yield
    finally:
        del model.encode_frames


def rejecting(key: str) -> str:
    """The same test with outlier_mask before the aggregator."""
    return f"{key}, outliers rejected"


def rejected(keys: Iterable[str]) -> list[str]:
    """The tests that are done in this way as well: with other people, and, beside them, without."""
    foreign = [key for key in keys if key.startswith("foreign")]
    return ["clean", *foreign] if foreign else []


def measure(job: train.Training, tests: dict[str, data.TrackletData], start: float) -> tuple[dict, Tensor]:
    """What metrics.json holds: of the clean test in full, of the others mAP and rank-1."""
    metrics: dict[str, Any] = {"processor_seconds": round(time.process_time() - start, 1), "tests": {}}
    first = None
    with remembering(job.model):
        again = {rejecting(key): key for key in rejected(tests)}
        for key in (*tests, *again):
            test = tests[again.get(key, key)]
            found, gallery = tested(job.model, test, job.accelerator, 256, job.shows_progress, key in again)
            metrics["tests"][key] = {"map": found["map"], "rank1": found["rank1"]}
            first = first or (found, gallery)
    assert first is not None
    metrics["num_features"] = first[1].shape[1]
    metrics["losses"] = [round(entry["loss"], 4) for entry in job.progress["history"]]  # epoch by epoch
    return {**metrics, **first[0]}, first[1]


def run(plan: Plan, name: str, split: int, rate: int, longer: int = 1) -> dict:
    """Trains a variant, and what it starts from where that is not there, and tests it; what is finished is read."""
    if name != ENCODER and not (place(plan, start_of(name), split, rate) / "metrics.json").exists():
        run(plan, start_of(name), split, rate)
    dataset = split_of(plan.root, plan.size, split)
    tests = {"clean": dataset}
    if name in SHOWN and split != plan.size.search and longer == 1:
        tests = tests_of(plan.root, plan.size, split)
    job = {"variant": name, "split": split, "rate": rate, **({"longer": longer} if longer > 1 else {})}
    evaluate = functools.partial(measure, tests=tests, start=time.process_time())
    accelerator = common.accelerator_of(plan.device)
    directory = place(plan, name, split, rate, longer)
    try:
        metrics = train.train(
            directory,
            dataset,
            settings_of(plan, name, split, rate, longer),
            {"split_seed": 0},
            accelerator,
            plan.bars,
            evaluate,
        )
    except ValueError as error:
        if name in STARTS or "loss is" not in str(error):
            raise
        return {**job, "failed": str(error).removeprefix(f"{directory}: ")}
    return {**job, **{key: metrics[key] for key in KEPT if key in metrics}}


KEPT = (
    "tests",
    "criterion",
    "distance",
    "aggregator_parameters",
    "num_features",
    "losses",
    "processor_seconds",
    "untrained",
    *common.METRICS,  # of the clean test
)


# ----------------------------------------------------------------------------------------------------------------------
# All of them


def run_all(
    plan: Plan,
    record: dict,
    names: Sequence[str],
    splits: Sequence[int],
    jobs: int,
    longer: bool,
    keep: Callable[[dict], None],
) -> None:
    """The encoders and the search, then split by split, then the longer trainings.

    ``record`` gets what is measured, and ``keep`` is called with each new measure.
    """
    size, search, results = plan.size, record["search"], record["results"]
    encoders = [split for split in (size.search, *splits) if str(split) not in record["encoders"]]
    wanted = [(ENCODER, split, 0) for split in encoders]
    wanted += [
        (name, size.search, rate)
        for name in names
        for rate in range(len(size.rates))
        if name in SEARCHED and str(rate) not in search.get(name, {})
    ]
    for result in comparison.run_jobs(run, [(plan, *job) for job in wanted], jobs):
        if result["variant"] == ENCODER:
            record["encoders"][str(result["split"])] = result
        else:
            search.setdefault(result["variant"], {})[str(result["rate"])] = result
        keep(result)
    wanted = [
        (name, split, best(search, name))
        for split in splits
        for name in names
        if str(split) not in results.get(name, {})
    ]
    for result in comparison.run_jobs(run, [(plan, *job) for job in wanted], jobs):
        results.setdefault(result["variant"], {})[str(result["split"])] = result
        keep(result)
    wanted = [
        (name, split, best(search, name), LONGER)
        for split in splits
        for name in names
        if longer and name in TRAINED_LONGER and str(split) not in record["longer"].get(name, {})
    ]
    for result in comparison.run_jobs(run, [(plan, *job) for job in wanted], jobs):
        record["longer"].setdefault(result["variant"], {})[str(result["split"])] = result
        keep(result)


def step_times(plan: Plan, name: str, repeats: int = 5) -> list[float]:
    """Milliseconds of single steps of a variant's training, on noise."""
    print(f"time: {name}", file=sys.stderr, flush=True)
    size, times = plan.size, []
    frames = np.random.default_rng(0).integers(0, 256, (2 * size.identities, size.frames, *size.size, 3), np.uint8)
    clips = [data.Tracklet(list(clip), i // 2, i % 2, str(i)) for i, clip in enumerate(frames)]
    settings = dataclasses.replace(settings_of(plan, name, size.search, 0), init="", warmup=0.0)
    with tempfile.TemporaryDirectory() as folder:
        dataset = data.TrackletData(clips, clips[:2], clips[:2], name="noise")
        job = train.prepare(Path(folder), dataset, settings, common.accelerator_of(plan.device), False)
        for epoch in range(repeats + 1):  # of one step each; the first one warms up
            job.settings = dataclasses.replace(settings, epochs=epoch + 1)
            before = job.progress["seconds"]
            train.run_epochs(job)
            times.append(round(1000 * (job.progress["seconds"] - before), 1))
    return times[1:]


def best(search: dict, name: str) -> int:
    """The rate with the highest mAP on the split of the search, of the variant's model with its own loss."""
    found = {
        int(rate): result["tests"]["clean"]["map"]
        for rate, result in search.get(system_of(name), {}).items()
        if "tests" in result
    }
    return max(found, key=lambda rate: (found[rate], -rate)) if found else 0


# ----------------------------------------------------------------------------------------------------------------------
# What a person reads


def gather(record: dict, names: Sequence[str]) -> tuple[list[int], dict]:
    """The splits that are whole, and by variant, without those that failed, every measure as a list over these."""
    results = record["results"]
    splits = [s for s in record["size"]["splits"] if all(str(s) in results.get(name, {}) for name in names)]
    variants: dict[str, dict] = {}
    for name in names if splits else ():
        runs = [results[name][str(split)] for split in splits]
        if any("failed" in run for run in runs):
            continue
        variants[name] = {
            key: runs[0][key] for key in ("criterion", "distance", "aggregator_parameters", "num_features")
        }
        for metric in ("map", "rank1"):
            variants[name][metric] = {key: [run["tests"][key][metric] for run in runs] for key in runs[0]["tests"]}
    return splits, variants


def reasons_table(record: dict) -> str:
    """What the systems are before anything of theirs is trained, and without what may hold them back."""
    rows = []
    for name in [name for name in REASONS if name in record["results"]]:
        system = system_of(name)
        splits, variants = gather(record, [START, system, name])
        if len(variants) == 3:
            row = [name, ", ".join(map(str, splits)), comparison.measured(variants, name, "clean")]
            rows.append([*row, gap(variants, name, START, "clean"), gap(variants, system, name, "clean")])
    return markdown(["", "splits", "mAP", f"minus {START}", "the trained system minus this"], rows) if rows else ""


def main_table(variants: dict, keys: Sequence[str]) -> str:
    rows = []
    for name in [name for name in SHOWN if name in variants]:
        row = [name, *(comparison.measured(variants, name, "clean", metric) for metric in ("map", "rank1"))]
        row += [gap(variants, name, REFERENCE, "clean", metric) for metric in ("map", "rank1")]
        row += [gap(variants, name, REFERENCE, key) for key in keys if key != "clean"]
        rows.append([*row, "" if name in STILL else variants[name]["criterion"]])
    faults = [f"{key}: minus {REFERENCE}" for key in keys if key != "clean"]
    head = ["", "mAP", "rank-1", f"mAP minus {REFERENCE}", f"rank-1 minus {REFERENCE}", *faults, "loss"]
    return markdown(head, rows)


def faults_table(variants: dict, keys: Sequence[str]) -> str:
    names = [name for name in SHOWN if name in variants]
    return markdown(
        ["", *keys], [[name, *(comparison.measured(variants, name, key) for key in keys)] for name in names]
    )


def rejection_table(variants: dict, keys: Sequence[str]) -> str:
    """What outlier_mask before the aggregator gains or loses, in the tests that are done both ways."""
    both = [key for key in rejected(keys) if any(rejecting(key) in of["map"] for of in variants.values())]
    rows = []
    for name in [name for name in SHOWN if name in variants]:
        row = [name]
        for key in both:
            found = variants[name]["map"][rejecting(key)]
            gain = signed(*interval(np.subtract(found, variants[name]["map"][key])))
            row += [comparison.with_half(f"{interval(found)[0]:.1f}", interval(found)[1]), gain]
        rows.append(row)
    head = [cell for key in both for cell in (rejecting(key), "gain")]
    return markdown(["", *head], rows) if both else ""


def cost_table(record: dict, variants: dict) -> str:
    times, rows = record["steps"].get("ms", {}), []
    for name in [name for name in (*POOLINGS, *SYSTEMS) if name in variants]:
        own = variants[name]
        row = [name, f"{own['aggregator_parameters']:,}", str(own["num_features"]), own["distance"]]
        rows.append(row + ([f"{np.median(times[name]):.0f}" if name in times else ""] if times else []))
    head = ["", "parameters of the aggregator", "numbers in an embedding", "distance"]
    return markdown(head + (["a step, ms"] if times else []), rows)


def search_table(record: dict, names: Sequence[str]) -> str:
    rates = record["size"]["rates"]
    rows = []
    for name in [name for name in names if name in record["search"]]:
        found = record["search"][name]
        cells = [
            "failed" if "failed" in found[str(i)] else f"{100 * found[str(i)]['tests']['clean']['map']:.1f}"
            for i in range(len(rates))
            if str(i) in found
        ]
        cells = [f"**{cell}**" if i == best(record["search"], name) else cell for i, cell in enumerate(cells)]
        rows.append([name, *cells, *[""] * (len(rates) - len(cells))])
    return markdown(["", *(f"{lr:g}, new layers x {factor:g}" for lr, factor in rates)], rows)


def longer_table(record: dict) -> str:
    """Short and long trainings of the splits on which all were trained for longer; differences are paired."""
    names = [name for name in TRAINED_LONGER if name in record["longer"]]
    parts = [{**record, "results": record[part]} for part in ("results", "longer")]
    splits = [split for split in gather(parts[0], names)[0] if split in gather(parts[1], names)[0]]
    both = [gather({**part, "size": {"splits": splits}}, names)[1] for part in parts]
    rows = []
    for name in [name for name in names if all(name in variants for variants in both)]:
        maps = [variants[name]["map"]["clean"] for variants in both]
        losses = [np.mean([part["results"][name][str(split)]["losses"][-1] for split in splits]) for part in parts]
        row = [name, *(comparison.measured(variants, name, "clean") for variants in both)]
        row += [
            signed(*interval(np.subtract(maps[1], maps[0]))),
            *(gap(variants, name, REFERENCE, "clean") for variants in both),
        ]
        rows.append([*row, *(f"{loss:.2f}" for loss in losses)])
    times = f"{LONGER} times the steps"
    head = ["", "mAP", times, "gain", f"minus {REFERENCE}", f"minus {REFERENCE}, {times}", "last loss", times]
    return f"On splits {', '.join(map(str, splits))}, each with its own loss.\n\n{markdown(head, rows)}" if rows else ""


def said(variants: dict, keys: Sequence[str]) -> str:
    """What the intervals support, test by test."""
    if REFERENCE not in variants:
        return ""
    names = [*POOLINGS, *SYSTEMS]
    lines = [f"- {key}. {comparison.supported(variants, names, REFERENCE, key)}" for key in keys]
    pairs = [(name, f"mean: {name}'s loss") for name in SYSTEMS if name in variants]
    below = [a for a, b in pairs if b in variants and sum(comparison.difference(variants, a, b, "clean")) < 0]
    held = [a for a, b in pairs if b in variants and a not in below]
    for what, some in (("Not below", held), ("Below", below)):
        if some:
            lines.append(f"- clean, each with its own loss. {what} mean pooling with the same loss: {', '.join(some)}.")
    return "\n".join(lines)


def is_below(variants: dict, name: str, other: str) -> bool:
    """By the interval, on the clean test."""
    if name not in variants or other not in variants:
        return False
    mean, half = comparison.difference(variants, name, other, "clean")
    return mean < -half


def against_papers(variants: dict) -> str:
    """Every paper has its system above the average of its frames: which are not, and what the controls say of it."""
    lines = []
    for name in [name for name in SYSTEMS if is_below(variants, name, REFERENCE)]:
        held = []
        if is_below(variants, f"mean: {name}'s loss", REFERENCE):
            held.append("mean pooling with its loss is, too, so its loss is a reason")
        if is_below(variants, name, f"{name}: common loss"):
            held.append("it is higher with the common loss, so its own loss is a reason")
        if is_below(variants, f"{name}: common loss", REFERENCE):
            held.append("it is with the common loss, too, so its aggregator is a reason")
        controls = [control for control in (f"mean: {name}'s loss", f"{name}: common loss") if control in variants]
        no_control = "no control is" if controls else "no control was trained"
        why = "; ".join(held) or f"{no_control}, so the reason is not known"
        lines.append(f"- `{name}` is below mean pooling, against its paper: {why}.")
    return "\n".join(lines)


def seeds_table(record: dict, other: dict) -> str:
    """The differences from mean pooling beside those of another seed, and of both: each split the mean of the two."""
    names = [name for name in SHOWN if all(name in of["results"] for of in (other, record))]
    splits = [split for split in gather(record, names)[0] if split in gather(other, names)[0]]
    seeds = [gather({**of, "size": {"splits": splits}}, names)[1] for of in (other, record)]
    rows, keys = [], ["clean", *(key_of(*fault) for fault in record["size"]["shares"])]
    both: dict[str, dict] = {
        name: {"map": {key: np.mean([variants[name]["map"][key] for variants in seeds], 0) for key in keys}}
        for name in names
        if all(name in variants for variants in seeds)
    }
    for name in [name for name in both if name != REFERENCE]:
        cells = [gap(variants, name, REFERENCE, "clean") for variants in (*seeds, both)]
        rows.append([name, *cells, *(gap(both, name, REFERENCE, key) for key in keys if key != "clean")])
    titles = [f"clean: seed {of['size']['seed']}" for of in (other, record)]
    head = ["", *titles, "clean: both", *(f"{key}: both" for key in keys if key != "clean")]
    which = ", ".join(map(str, splits))
    intro = f"## Beside seed {other['size']['seed']}\n\nmAP minus that of mean pooling, on splits {which}."
    return f"{intro}\n\n{markdown(head, rows)}\n\n" if rows else ""


def before(record: dict) -> str:
    """ImageNet's weights as they are, and the encoders, on all splits that have one."""
    splits = [split for split in record["size"]["splits"] if str(split) in record["encoders"]]
    found = [record["encoders"][str(split)] for split in splits]
    if not found:
        return ""

    def cells(measures: list[dict]) -> str:
        both = [interval([m[metric] for m in measures]) for metric in ("map", "rank1")]
        return "mAP {}, rank-1 {}".format(*(comparison.with_half(f"{mean:.1f}", half) for mean, half in both))

    untrained, trained = cells([f["untrained"] for f in found]), cells([f["tests"]["clean"] for f in found])
    which = ", ".join(map(str, splits))
    return f"Mean pooling on splits {which}: ImageNet's weights as they are, {untrained}; the encoders, {trained}."


def text(record: dict, names: Sequence[str], other: dict | None = None) -> str:
    """The page; ``other``: what it is held against, of another seed."""
    size = record["size"]
    splits, variants = gather(record, names)
    height, width = size["size"]
    people = 35
    batches = size["epochs"] * math.ceil(people / size["identities"])
    clips = 2 * size["identities"]
    keys = ["clean", *(key_of(*fault) for fault in size["shares"])]
    failed = sorted({name for name in names for run in record["results"].get(name, {}).values() if "failed" in run})
    failures = (
        f"Not in the tables, because a training's loss was not finite: {', '.join(failed)}.\n\n" if failed else ""
    )
    anew = f" All but halves and faults is drawn with seed {size['seed']}." if size["seed"] else ""
    intro = f"""# Comparison on WARD

Each split: 35 people to train on, 35 others to test on, queries of camera 1, gallery of cameras 2 and 3.
{size["backbone"]} on {height}x{width} frames, from ImageNet's weights; then one encoder for each split, trained on its
single frames ({size["encoder_epochs"] * 3} batches of 96); from it every variant, {batches} batches of {clips} clips of
{size["frames"]} frames. The stem and the first three groups of blocks stay frozen. Learning rates: the best of
{len(size["rates"])} on split {size["search"]}, which is not in the result, for each with its own loss. GLTR has a
first stage of its own on top, for the embedding of its frames. What is not called otherwise has the common loss:
cross-entropy and batch-hard triplet (cosine) behind a BatchNorm. STAR's backbone needs a ResNet and is not here; `gsta`
is its other half.{anew}
"""
    devices = "\n".join("{device}, torch {torch}. `python {command}`".format(**of) for of in record["environments"])
    of_steps = f"A step is forward, loss, backward and optimiser for {clips} clips, the backbone's part included, on "
    of_steps = of_steps + "{device}, {threads} threads. ".format(**record["steps"]) if record["steps"] else ""
    search, of = search_table(record, names), f", of seed {record['rates_of']}" if "rates_of" in record else ""
    search = f"\n## Learning rates\n\nmAP in % on split {size['search']}{of}.\n\n{search}\n" if record["search"] else ""
    if reasons := reasons_table(record):
        search = f"\n## Before and without\n\n{reasons}\n{search}"
    if longer := longer_table(record):
        search = f"\n## More steps\n\n{longer}\n{search}"
    count = len(size["splits"])
    if not splits:
        state = f"**No split of {count} is whole yet: the comparison is not finished.**\n\n{before(record)}"
        return f"{intro}\n{state}\n{search}\n{devices}\n"
    rejection = rejection_table(variants, keys)
    apart = loss_table(variants, list(SYSTEMS), "clean") if variants.keys() & {*SAME_LOSS, *CONTROLS} else ""
    if apart:
        apart = f"""## Aggregator and loss apart

Differences in mAP on the clean test.

{apart}

"""
    seeds = seeds_table(record, other) if other else ""
    if rejection:
        rejection = f"""
## Foreign frames rejected

mAP with `outlier_mask` before the aggregator, which is trained as before and has never met it; and what that gains.

{rejection}
"""
    return f"""{intro}
**{len(splits)} of {count} splits are whole** ({", ".join(map(str, splits))}). mAP and rank-1 in %, mean ± half of the
95 % confidence interval over these splits (Student's t); differences are paired, split by split. The splits share their
70 people, so the intervals are of the draw of the halves, not of another 70 people. Bold: the interval leaves out zero;
of twenty such differences one does so by chance. `start` is the common start: the encoder as it is.

{before(record)}

{main_table(variants, keys)}

![mAP of each variant less that of mean pooling, with intervals, for each test](ward.png)

{said(variants, keys)}
{against_papers(variants)}

{failures}{seeds}{apart}## With faults in the tracklets

mAP. A run of each tracklet's frames, of queries and gallery: another person of the same camera in its place (foreign),
over half of it (occlusion), or the box off its person (bad boxes).

{faults_table(variants, keys)}
{rejection}
## What it costs

{of_steps}Time and memory of the aggregators alone, on larger maps: the page on speed.

{cost_table(record, variants)}
{search}
{devices}
"""


def figure(record: dict, names: Sequence[str]):
    """Paired differences from mean pooling with their intervals, a panel for each test."""
    from matplotlib.figure import Figure

    splits, variants = gather(record, names)
    keys = ["clean", *(key_of(*fault) for fault in record["size"]["shares"])]
    rows = [name for name in SHOWN if name in variants and name != REFERENCE][::-1]
    drawing = Figure(figsize=(2.4 * len(keys) + 2, 0.26 * len(rows) + 1.2), layout="constrained")
    for ax, key in zip(drawing.subplots(1, len(keys), sharey=True, squeeze=False)[0], keys, strict=True):
        for y, name in enumerate(rows):
            mean, half = comparison.difference(variants, name, REFERENCE, key)
            clear = abs(mean) > half
            bar = {"fmt": "o", "color": "#0072b2" if clear else "#999999", "markersize": 4, "elinewidth": 1.3}
            ax.errorbar([mean], [y], xerr=[half if math.isfinite(half) else 0.0], **bar)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_title(key, fontsize=9)
        ax.set_yticks(range(len(rows)), rows, fontsize=8)
        ax.grid(axis="x", alpha=0.25)
    drawing.supxlabel(f"mAP minus {REFERENCE}, points; 95 % confidence intervals over {len(splits)} splits", fontsize=9)
    return drawing


# ----------------------------------------------------------------------------------------------------------------------
# The command


def parse(argv: list[str], size: Size | None = None) -> argparse.Namespace:
    parser = common.parser_of(__doc__ or "")
    parser.add_argument("--root", help="the clone of the data, or the folder of its images")
    parser.add_argument("--backbone-weights", default="", help="ImageNet's, for timm's mobilenetv2_100")
    parser.add_argument("--splits", default="", help="some of: 1,2,...,9; default: all")
    parser.add_argument("--longer", action="store_true", help=f"train systems {LONGER} times as long, too")
    text = "try what may hold the systems back, too: " + ", ".join(REASONS)
    parser.add_argument("--reasons", action="store_true", help=text)
    parser.add_argument("--steps", action="store_true", help="time a step of each, on a quiet machine, and no more")
    parser.add_argument("--seed", type=int, default=0, help="of the trainings; each wants its own --out and --results")
    text = "a --results of seed 0, to take the learning rates from and to be held against"
    parser.add_argument("--beside", type=Path, help=text)
    parser.add_argument("--tables", action="store_true", help="write tables and figure of ward.json, train nothing")
    comparison.add_arguments(parser, "ward", list(VARIANTS))
    args = parser.parse_args(argv)
    comparison.check_arguments(parser, args, list(VARIANTS))
    args.only += REASONS if args.reasons else []
    known = [str(split) for split in (size or Size()).splits]
    asked = [split.strip() for split in args.splits.split(",") if split.strip()] or known
    if not set(asked) <= set(known):
        parser.error(f"--splits must be some of {','.join(known)}, got {args.splits!r}")
    args.splits = [int(split) for split in known if split in asked]
    if not args.tables and not args.root:
        parser.error("--root: where does WARD lie? git clone https://github.com/iN1k1/CVPR2012")
    return args


MEASURES = {"map": common.is_share, "rank1": common.is_share}
RUN = {
    "tests": {"clean": MEASURES, str: MEASURES},
    "criterion": str,
    "distance": str,
    "aggregator_parameters": int,
    "num_features": int,
    "processor_seconds": common.is_number,
}


def read_record(file: Path, size: Size) -> dict:
    """What was measured before, or nothing yet.

    Raises:
        ValueError: it is no such record, or one of other settings.
    """
    wanted = dataclasses.asdict(size)
    wanted = {
        key: list(map(list, v)) if key in ("rates", "shares") else list(v) if isinstance(v, tuple) else v
        for key, v in wanted.items()
    }
    if not file.exists():
        parts = ("encoders", "search", "results", "longer", "steps")
        return {"size": wanted, "environments": [], **{part: {} for part in parts}}
    record = read_json(file)
    common.check_form(file, record, dict.fromkeys(("size", "encoders", "search", "results", "longer", "steps"), dict))
    if record["size"] != wanted:
        changed = [key for key in wanted if record["size"].get(key) != wanted[key]]
        raise ValueError(f"{file} was measured with other settings ({', '.join(changed)}): choose another --results.")
    common.check_form(file, record, {"environments": [dict.fromkeys(("device", "torch", "command"), str)]})
    if record["steps"]:
        common.check_form(file, record["steps"], {"device": str, "threads": int, "ms": {str: is_times}}, "steps")
    common.check_form(file, record["encoders"], {str: {**RUN, "untrained": MEASURES}}, "encoders")
    common.check_form(file, record["longer"], {str: {str: dict}}, "longer")
    keys = ["clean", *(key_of(*fault) for fault in size.shares)]
    every = RUN | {"tests": {str: MEASURES, **dict.fromkeys([*keys, *map(rejecting, rejected(keys))], MEASURES)}}
    for group in ("search", "longer", "results"):
        common.check_form(file, record[group], {str: {str: dict}}, group)
        for name, runs in record[group].items():
            done = {split: run for split, run in runs.items() if "failed" not in run}
            form = every if group == "results" and name in SHOWN else RUN
            common.check_form(file, done, {str: form}, f"{group}[{name!r}]")
    return record


def is_times(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(common.is_number, value))


def main(argv: list[str] | None = None, size: Size | None = None) -> dict:
    size = size or Size()
    args = parse(sys.argv[1:] if argv is None else argv, size)
    size = dataclasses.replace(size, seed=args.seed)
    with common.one_line("ward.py"):
        args.results.mkdir(parents=True, exist_ok=True)
        file = args.results / "ward.json"
        record = read_record(file, size)
        other = None
        if args.beside:
            if not (args.beside / "ward.json").is_file():
                raise FileNotFoundError(f"no ward.json in {args.beside}: --beside wants the --results of seed 0.")
            other = read_record(args.beside / "ward.json", dataclasses.replace(size, seed=0))
            record["search"], record["rates_of"] = other["search"], 0
        if not args.tables:
            device = common.accelerator_of(args.device).device
            command = f"recipes/benchmarks/ward.py --root <clone> --backbone-weights <file> --jobs {args.jobs}"
            command += f" --seed {args.seed}" if args.seed else ""
            about = {**common.environment(device), "command": command, "threads": comparison.threads(args.jobs)}
            machine = [about[key] for key in ("device", "torch")]
            if machine not in [[of[key] for key in ("device", "torch")] for of in record["environments"]]:
                record["environments"].append(about)

            def keep(result: dict) -> None:
                write_json(file, record)
                report(result)

            plan = Plan(size, args.root, args.backbone_weights, args.out, args.device, args.jobs == 1)
            if args.steps:
                times = {name: step_times(plan, name) for name in args.only if name in SEARCHED}
                record["steps"] = {"device": about["device"], "threads": torch.get_num_threads(), "ms": times}
                write_json(file, record)
            else:
                run_all(plan, record, args.only, args.splits, args.jobs, args.longer, keep)
        names = [name for name in args.only if name in VARIANTS]
        write_text(args.results / "ward.md", text(record, names, other))
        if gather(record, names)[0]:
            draw(args.results / "ward.png", lambda: figure(record, names))
    return record


def report(result: dict) -> None:
    what = f"{result['variant']}, split {result['split']}, rate {result['rate']}"
    clean = result.get("tests", {}).get("clean")
    found = (
        f"mAP {100 * clean['map']:.1f}, rank-1 {100 * clean['rank1']:.1f}" if clean else result.get("failed", "trained")
    )
    print(f"{what}: {found}", flush=True)


if __name__ == "__main__":
    common.run(main)
