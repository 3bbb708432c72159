"""What the comparisons share: variants, jobs in several processes, mixed tracklets, paired intervals, what they say."""

import argparse
import dataclasses
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from temporal_agg import data

# t(0.975) for n - 1 degrees of freedom, n = 2, 3, ...
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


@dataclass(frozen=True)
class Variant:
    """One row of a table: a model and its loss."""

    model: str
    options: dict = field(default_factory=dict)
    criterion: str = ""  # the model's own
    criterion_options: dict = field(default_factory=dict)


# Behind a BatchNorm a margin of 0.3 in Euclidean distance is met from the first step on; in cosine distance it is not.
NECK = {"neck": True, "distance": "cosine"}
OF_LOGA = {"margin": 0.3, "neck": True, "distance": "cosine"}  # as recipes/configs/loga.yaml
DENSE = {"clip": {"test_sampling": "dense"}}  # every frame, as in everybody's test
REFERENCE = "mean"
POOLINGS = {
    name: Variant(name, {}, "baseline", NECK) for name in ("mean", "max", "gem", "attention", "nan", "lstm", "robust")
}
SYSTEMS = {
    "loga": Variant("loga", {"scale": "sqrt"}, "loga", OF_LOGA),
    "gsta": Variant("gsta", {"hidden_features": 128, "start": "zero"}, "gsta"),
    "gltr": Variant("gltr", {"start": "small"}, "gltr"),
    "fgra": Variant("fgra", {}, "fgra"),
    "grl": Variant("grl", DENSE, "grl"),
    "gltr_released": Variant("gltr_released", {}, "gltr_released"),
    "grl_released": Variant("grl_released", DENSE, "grl_released"),
}
SAME_LOSS = {
    f"{name}: common loss": dataclasses.replace(variant, criterion="baseline", criterion_options=NECK)
    for name, variant in SYSTEMS.items()
}
# FGRA's is the baselines' with another margin, but for its templates' terms. GRL's reads what GRL alone gives.
CONTROLS = {
    "mean: no neck": Variant("mean", {}, "baseline"),
    "mean: loga's loss": Variant("mean", {}, "loga", OF_LOGA),
    "mean: gsta's loss": Variant("mean", {}, "gsta", {"pyramid_weight": 0.0}),
    "mean: gltr's loss": Variant("mean", {}, "gltr"),
    "mean: fgra's loss": Variant("mean", {}, "baseline", {"margin": 0.5}),
    "mean: gltr_released's loss": Variant("mean", {}, "gltr_released"),
}


# ----------------------------------------------------------------------------------------------------------------------
# Jobs


def threads(jobs: int) -> int:
    return torch.get_num_threads() if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)


def start_job(threads: int) -> None:
    def end_with_parent() -> None:  # a killed study would leave trainings that the next one gets in the way of
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    common.keep_memory()


def run_jobs(work: Callable[..., Any], jobs: Sequence[tuple], processes: int) -> Iterator[Any]:
    """Does the jobs, begun in their order, and gives what each returns as soon as it is there.

    Args:
        work: what each does, a function of a module.
        jobs: its arguments, for each.
        processes: at a time; 1: in this one.

    Raises:
        OSError: the system has no room for them.
        ValueError: one of the processes was killed.
    """
    if processes == 1:
        yield from (work(*job) for job in jobs)
        return
    started = (start_job, (threads(processes),))
    try:
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), *started)
    except OSError as error:
        raise OSError(
            f"{processes} jobs cannot be started ({error}): pass --jobs 1, or give a container more shared memory "
            "(docker run --shm-size 1g)."
        ) from error
    with pool:
        futures = [pool.submit(work, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise ValueError(
                f"a job was killed, mostly for want of memory; the same command goes on ({error})."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def add_arguments(parser: argparse.ArgumentParser, name: str, variants: Sequence[str]) -> None:
    """What every comparison takes."""
    parser.add_argument("--out", type=Path, default=Path(f"runs/{name}"), help="of the run directories")
    parser.add_argument("--results", type=Path, help=f"where {name}.json, {name}.md and {name}.png go; default: --out")
    parser.add_argument("--only", default="", help=f"some of: {', '.join(variants)}")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (1)")
    parser.add_argument("--device", default="auto", help="auto (a GPU when there is one), cpu, cuda or cuda:<number>")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace, variants: Sequence[str]) -> None:
    """Ends the command where they do not fit; ``--only`` becomes a list, in the order of the variants."""
    asked = [name.strip() for name in args.only.split(",") if name.strip()]
    unknown = [name for name in asked if name not in variants]
    if unknown:
        parser.error(f"--only has no {', '.join(map(repr, unknown))}; it has {', '.join(variants)}")
    args.only = [name for name in variants if name in asked or not asked]
    args.results = args.results or args.out
    try:
        common.check_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")


# ----------------------------------------------------------------------------------------------------------------------
# Tracklets that a tracker has mixed up


def intrusion(
    tracklet: data.Tracklet, tracklets: Sequence[data.Tracklet], share: float, rng: np.random.Generator
) -> tuple[range, int]:
    """The run of a tracklet's frames that goes, and whose frames come: the place of another one of its camera."""
    others = [i for i, t in enumerate(tracklets) if t.camera == tracklet.camera and t.pid != tracklet.pid]
    other = others[rng.integers(len(others))]
    count = round(share * len(tracklet))
    start = int(rng.integers(len(tracklet) - count + 1))
    return range(start, start + count), other


# ----------------------------------------------------------------------------------------------------------------------
# What a person reads. Variants are by name: {"map": {test: [a value for each seed or split]}, ...}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % confidence interval by Student's t; both in per cent.

    One value has no interval: half the width is infinite.
    """
    percent, n = 100 * np.asarray(values), len(values)
    half = T_975[n - 2] * percent.std(ddof=1) / math.sqrt(n) if n > 1 else math.inf
    return float(percent.mean()), float(half)


def difference(variants: dict, name: str, other: str, key: str, metric: str = "map") -> tuple[float, float]:
    """The same of the difference between two variants, pair by pair: what makes a world hard cancels."""
    return interval(np.subtract(variants[name][metric][key], variants[other][metric][key]))


def with_half(text: str, half: float) -> str:
    return f"{text} ± {half:.1f}" if math.isfinite(half) else text


def signed(mean: float, half: float) -> str:
    """Bold where the interval leaves out zero."""
    text = with_half(f"{mean:+.1f}", half)
    return f"**{text}**" if abs(mean) > half else text


def measured(variants: dict, name: str, key: str, metric: str = "map") -> str:
    mean, half = interval(variants[name][metric][key])
    return with_half(f"{mean:.1f}", half)


def area(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Under the ROC curve: how often a positive scores higher than a negative, ties half; NaN without both."""
    values, where = np.unique(np.asarray(scores), return_inverse=True)
    of = [np.bincount(where[np.asarray(positive) == kind], minlength=len(values)) for kind in (False, True)]
    below = np.cumsum(of[0]) - of[0] / 2
    pairs = float(of[0].sum() * of[1].sum())
    return float((of[1] * below).sum() / pairs) if pairs else math.nan


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def gap(variants: dict, name: str, other: str, key: str, metric: str = "map") -> str:
    """The paired difference, where there are both."""
    if name not in variants or other not in variants or name == other:
        return ""
    return signed(*difference(variants, name, other, key, metric))


def loss_table(variants: dict, names: Sequence[str], key: str) -> str:
    """Aggregator and loss apart, of the systems that have something to be held against."""
    rows = []
    for name in [name for name in names if name in variants]:
        common_loss, control = f"{name}: common loss", f"mean: {name}'s loss"
        pairs = [(name, control), (common_loss, REFERENCE), (control, REFERENCE), (name, common_loss)]
        row = [gap(variants, *pair, key) for pair in pairs]
        rows += [[name, *row]] if any(row) else []
    head = ["", "minus mean, both with its loss", "minus mean, both with the common loss"]
    return markdown([*head, "mean: its loss minus the common one", "its loss minus the common one"], rows)


def supported(variants: dict, names: Sequence[str], reference: str, key: str) -> str:
    """What may be said about some variants and the reference, and no more; empty without the reference."""
    if reference not in variants:
        return ""
    said: dict[str, list[str]] = {"Above": [], "Below": [], "Not to be told from": []}
    for name in [name for name in names if name in variants and name != reference]:
        mean, half = difference(variants, name, reference, key)
        said["Not to be told from" if abs(mean) <= half else "Above" if mean > 0 else "Below"].append(name)
    return " ".join(f"{what} {reference}: {', '.join(names)}." for what, names in said.items() if names)
