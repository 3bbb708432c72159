"""Times, and the peak memory of a process of its own, of any work that can be named."""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn

MODES = {"forward": False, "forward + backward": True}
Case = tuple[str, str, argparse.Namespace]  # what, name and settings, as build() takes them


class Work:
    """A module on inputs that are there already; each run is one forward pass, in training with a backward pass.

    Args:
        module: whose mode and gradients are managed.
        call: the forward pass.
        inputs: its arguments, by name.
        leaves: tensors that get gradients in training, beside the module's parameters.
        frames: how many one run processes.
        args: the command's.
    """

    def __init__(
        self,
        module: nn.Module,
        call: Callable[..., Tensor],
        inputs: dict[str, Tensor],
        leaves: list[Tensor],
        frames: int,
        args: argparse.Namespace,
    ):
        self.module, self.call, self.inputs = module, call, inputs
        self.leaves, self.frames, self.args = leaves, frames, args

    def prepare(self, train: bool) -> None:
        self.module.train(train)
        for tensor in [*self.leaves, *self.module.parameters()]:
            tensor.grad = None

    def run(self) -> Tensor:
        train = self.module.training
        autocast = torch.autocast(self.args.device, getattr(torch, self.args.dtype), enabled=is_half(self.args))
        with torch.set_grad_enabled(train), autocast:
            output = self.call(**self.inputs)
        if train:
            output.backward(torch.ones_like(output))
        return output


class Call:
    """Work without a module."""

    def __init__(self, call: Callable):
        self.run = call

    def prepare(self, train: bool) -> None:
        pass


# What builds a work, by the first word of its case; every part of the benchmark adds its own.
BUILDERS: dict[str, Callable[[str, str, argparse.Namespace], Any]] = {}


def build(what: str, name: str, args: argparse.Namespace) -> Any:
    """``what``: an aggregator, its literal form, a backbone, a whole model, or a step of retrieval."""
    return BUILDERS[what](what, name, args)


def is_half(args: argparse.Namespace) -> bool:
    return args.dtype in ("bfloat16", "float16")


def changed(args: argparse.Namespace, **values) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), **values})


def milliseconds(works: dict[str, Any], train: bool, args: argparse.Namespace) -> dict[str, list[float]]:
    """Every work ``repeats`` times, in turns, after one run of each to warm up."""
    times = {key: [] for key in works}
    for repeat in range(args.repeats + 1):
        for key, work in works.items():
            work.prepare(train)
            synchronize(args)
            start = time.perf_counter()
            work.run()
            synchronize(args)
            if repeat > 0:
                times[key].append(1000 * (time.perf_counter() - start))
    return times


def synchronize(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def peak_memory(cases: list[Case], modes: dict[str, bool] = MODES) -> list[dict[str, float | None]]:
    """The peak in MB of each case by mode; None where it could not be measured."""
    runs = [(what, name, vars(args), train) for what, name, args in cases for train in modes.values()]
    if cases[0][2].device == "cuda":
        peaks = [peak_on_gpu(*run) for run in runs]
    elif sys.platform == "linux":
        # With a fixed threshold, large tensors go back to the system when they are freed.
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("speed.py")), "_peak", json.dumps(runs)]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        peaks = [json.loads(line) for line in done.stdout.splitlines()]
    else:
        peaks = [None] * len(runs)
    return [dict(zip(modes, peaks[i : i + len(modes)], strict=True)) for i in range(0, len(peaks), len(modes))]


def peak_on_gpu(what: str, name: str, args: dict, train: bool) -> float:
    work = build(what, name, argparse.Namespace(**args))
    for _ in range(2):  # the first brings in what stays: kernels, workspaces
        work.prepare(train)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work.run()
        torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def peak_on_cpu(what: str, name: str, args: dict, train: bool) -> float:
    args = argparse.Namespace(**args)
    torch.set_num_threads(args.threads)
    small = build(what, name, changed(args, batch=2, frames=1, queries=8, gallery=32, identities=4))
    small.prepare(train)
    small.run()  # brings in what stays: kernels, threads
    del small
    work = build(what, name, args)
    work.prepare(train)
    gc.collect()
    # The high-water mark of getrusage is inherited from the process that started this one; this one starts anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    work.run()
    return high_water() - before


def high_water() -> float:
    """The largest resident memory so far, in MB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e6


def peak_command(args: argparse.Namespace) -> None:
    """Measures each case in a process of its own and prints one JSON value a line.

    The processes are forked from this one, which has imported everything and computed nothing.
    """
    for case in json.loads(args.cases):
        child = os.fork()
        if child == 0:
            try:
                print(json.dumps(peak_on_cpu(*case)), flush=True)
                os._exit(0)
            except BaseException as error:
                print(f"{case[0]} {case[1]}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(1)
        if os.waitpid(child, 0)[1] != 0:  # out of memory, for instance
            print("null", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Results


def row_of(name: str, times: dict[str, list[float]], **about) -> dict:
    """A row of results: medians, all times, and how many times longer each other form takes than ours."""
    median = {form: statistics.median(values) for form, values in times.items()}
    speedup = {form: ms / median["ours"] for form, ms in median.items() if form != "ours"}
    return {"name": name, **about, "ms": median, "all_ms": times, "speedup": speedup}


def result_of(part: str, args: argparse.Namespace, rows: list[dict], **more) -> dict:
    """All numbers of a part with machine, versions and settings; written to ``--out``."""
    half = {"dtype": args.dtype, "tf32": args.device == "cuda" and torch.backends.cudnn.allow_tf32}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # of others too: a busy machine measures badly
    about = {**common.environment(args.device), **half, "load": load}
    result = {"part": part, "environment": about, "settings": vars(args), **more, "rows": rows}
    if args.out:
        common.write_json(Path(args.out).expanduser(), result)
    return result


def heading(result: dict) -> str:
    about = result["environment"]
    tf32 = " (TF32 convolutions)" * about["tf32"]
    versions = f"torch {about['torch']}, numpy {about['numpy']}"
    return f"{about['device']}, {about['threads']} threads, {about['dtype']}{tf32}, {versions}"
