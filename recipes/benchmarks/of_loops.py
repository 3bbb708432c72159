"""What embedding and training cost, against nothing but the network."""

import argparse
import copy
import dataclasses
import inspect
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import train
from measuring import BUILDERS, Call, changed, heading, milliseconds, peak_memory, result_of, row_of, synchronize
from settings import Settings

import temporal_agg
from temporal_agg import data
from temporal_agg.inference import FrameRunner


def drawn(size: str, count: int, frames: int) -> list[data.Tracklet]:
    """Tracklets in memory, of noise."""
    height, width = common.image_size(size)
    rng = np.random.default_rng(0)
    return [
        data.Tracklet(list(rng.integers(0, 256, (frames, height, width, 3), np.uint8)), i // 2, i % 2, str(i))
        for i in range(count)
    ]


def fastest(model: temporal_agg.TrackletModel) -> temporal_agg.TrackletModel:
    """With its weights in the memory format that suits the backbone."""
    model.encoder.to(memory_format=model.encoder.memory_format)
    return model


def embed_command(args: argparse.Namespace) -> dict:
    """Whole tracklets by embed_tracklets, against the backbone alone on frames that are there already.

    With a half precision beside it, the backbone as timm makes it (contiguous), on whole batches, as well.
    """
    torch.set_num_threads(args.threads)
    tracklets = drawn(args.size, args.tracklets, args.frames)
    count, rows = args.tracklets * args.frames, []
    for name in args.models:
        print(f"time: embed {name}", file=sys.stderr, flush=True)
        model = temporal_agg.create_model(f"mean_{name}", img_size=common.image_size(args.size)).eval().to(args.device)
        options: dict[str, Any] = {"frames_per_batch": args.frames_per_batch, "device": args.device, "progress": False}
        works = {"ours": Call(partial(temporal_agg.embed_tracklets, model, tracklets, **options))}
        bare = fastest(copy.deepcopy(model)).encoder
        frames = torch.randn(count, 3, *common.image_size(args.size), device=args.device)
        # On a CPU the network is fastest on few frames at once, ours or not.
        at_once = FrameRunner(model, frames_per_batch=args.frames_per_batch).size
        works["backbone"] = Call(partial(alone, bare, frames.split(at_once)))
        if "precision" in inspect.signature(temporal_agg.embed_tracklets).parameters and args.half:
            half = partial(temporal_agg.embed_tracklets, model, tracklets, precision=args.half, **options)
            works[args.half] = Call(half)
            plain = copy.deepcopy(model).encoder
            works["contiguous"] = Call(partial(alone, plain, frames.split(args.frames_per_batch)))
        rows.append(row_of(f"mean_{name}", milliseconds(works, False, args), frames=count))
    result = result_of("embed", args, rows)
    print(heading(result))
    lines = [["", *(f"{form}, frames/s" for form in rows[0]["ms"]), "of the backbone"]]
    for row in rows:
        speeds = [f"{1000 * row['frames'] / ms:.1f}" for ms in row["ms"].values()]
        lines.append([row["name"], *speeds, f"{row['speedup']['backbone']:.1%}"])
    print(common.layout(lines))
    return result


@torch.inference_mode()
def alone(encoder: torch.nn.Module, batches: Sequence[torch.Tensor]) -> None:
    for batch in batches:
        encoder(batch)


def stream_command(args: argparse.Namespace) -> dict:
    """Tracks by TrackletStream, one crop of each at a time and all embeddings read, against the backbone alone."""
    torch.set_num_threads(args.threads)
    height, width = common.image_size(args.size)
    rng, rows = np.random.default_rng(0), []
    sides = [rng.integers(side // 2, 2 * side, args.tracks) for side in (height, width)]  # as a detector's boxes are
    crops = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in zip(*sides, strict=True)]
    for name in args.models:
        print(f"time: stream {name}", file=sys.stderr, flush=True)
        model = temporal_agg.create_model(name, img_size=(height, width)).eval().to(args.device)
        stream: temporal_agg.TrackletStream[int] = temporal_agg.TrackletStream(model)
        bare = fastest(copy.deepcopy(model)).encoder
        frames = torch.randn(args.tracks, 3, height, width, device=args.device)
        works = {
            "ours": Call(partial(grow, stream, crops, args.steps)),
            "backbone": Call(partial(alone, bare, frames.split(stream.runner.size) * args.steps)),
        }
        rows.append(row_of(name, milliseconds(works, False, args), frames=args.tracks * args.steps))
        rows[-1]["bytes a track"] = stream.nbytes(0)
    result = result_of("stream", args, rows)
    print(heading(result))
    lines = [["", "a frame of the video, ms", "backbone, ms", "times the backbone", "bytes a track"]]
    for row in rows:
        ms = [f"{value / args.steps:.1f}" for value in row["ms"].values()]
        lines.append([row["name"], *ms, f"{1 / row['speedup']['backbone']:.3f}", str(row["bytes a track"])])
    print(common.layout(lines))
    return result


def grow(stream: temporal_agg.TrackletStream[int], crops: list[np.ndarray], steps: int) -> None:
    for _ in range(steps):
        stream.update(crops, range(len(crops)))
        stream.embeddings()


def train_command(args: argparse.Namespace) -> dict:
    """Steps of train.py (loader, transfer, bookkeeping) against a bare loop over batches that are there already."""
    torch.set_num_threads(args.threads)
    rows = []
    for model in args.models:
        print(f"time: train {model}", file=sys.stderr, flush=True)
        name, _, size = model.partition("@")
        size = size or args.size
        tracklets = drawn(size, 2 * args.identities * args.steps, args.frames)
        dataset = data.TrackletData(tracklets, tracklets[:4], tracklets[:4], name="noise")
        accelerator = common.accelerator_of(args.device)
        settings = Settings(
            model=f"mean_{name}", size=size, identities=args.identities, clip_length=args.frames, warmup=0.0,
            workers=args.workers, eval_untrained=False, save_every=10**9,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            job = train.prepare(Path(folder), dataset, settings, accelerator, False)
            job.loader.batch_sampler.sampler.set_epoch(0)
            batches = [{k: v.to(accelerator.device) for k, v in batch.items()} for batch in job.loader]
            bare, ours = [], []
            for epoch in range(args.repeats + 1):  # in turns, because a machine's speed drifts; the first warms up
                bare.append(bare_loop(job, batches, args))
                job.settings = dataclasses.replace(settings, epochs=epoch + 1)
                before = job.progress["seconds"]
                train.run_epochs(job)
                ours.append(1000 * (job.progress["seconds"] - before) / len(batches))
        frames = 2 * args.identities * args.frames
        rows.append(row_of(f"mean_{name} {size}", {"ours": ours[1:], "bare": bare[1:]}, frames=frames))
    result = result_of("train", args, rows)
    print(heading(result))
    lines = [["", "a step, ms", "of a bare loop, ms", "speed of the bare loop"]]
    for row in rows:
        ms = row["ms"]
        lines.append([row["name"], f"{ms['ours']:.1f}", f"{ms['bare']:.1f}", f"{row['speedup']['bare']:.1%}"])
    print(common.layout(lines))
    return result


def bare_loop(job: train.Training, batches: list[dict], args: argparse.Namespace) -> float:
    """Milliseconds a batch."""
    job.wrapped.train()
    synchronize(args)
    start = time.perf_counter()
    for batch in batches:
        details = job.wrapped(batch["clip"], None, return_details=True)
        job.criterion(details, batch["label"])["loss"].backward()
        job.optimizer.step()
        job.optimizer.zero_grad()
    synchronize(args)
    return 1000 * (time.perf_counter() - start) / len(batches)


def build_long(what: str, name: str, args: argparse.Namespace) -> Call:
    """One tracklet of many small frames through embed_tracklets; ``name``: an aggregator."""
    size = common.image_size(args.size)
    model = temporal_agg.create_model(f"{name}_{args.backbone}", img_size=size).eval().to(args.device)
    options: dict[str, Any] = {"frames_per_batch": args.frames_per_batch, "device": args.device, "progress": False}
    return Call(partial(temporal_agg.embed_tracklets, model, drawn(args.size, 1, args.frames), **options))


BUILDERS["long"] = build_long


def long_command(args: argparse.Namespace) -> dict:
    """One long tracklet by embed_tracklets: time against mean pooling, and memory beside model and frames."""
    torch.set_num_threads(args.threads)
    build_long("long", "mean", changed(args, frames=args.frames_per_batch)).run()  # brings in what stays
    seconds: dict[str, float] = {}
    for name in dict.fromkeys(["mean", *args.names]):
        print(f"time: {args.frames} frames, {name}", file=sys.stderr, flush=True)
        work = build_long("long", name, args)
        start = time.perf_counter()
        work.run()
        seconds[name] = 1000 * (time.perf_counter() - start)
    rows = [
        row_of(name, {"ours": [seconds[name]], "mean": [seconds["mean"]]}, frames=args.frames) for name in args.names
    ]
    if args.memory:
        peaks = peak_memory([("long", name, args) for name in args.names], {"run": False})
        for row, peak in zip(rows, peaks, strict=True):
            row["peak_mb"] = {"ours": peak["run"]}
    result = result_of("long", args, rows)
    print(f"{heading(result)}; {args.frames} frames {args.size}, {args.backbone}")
    lines = [["", "s", "of mean pooling, s", "memory, MB"]]
    for row in rows:
        seconds = [f"{row['ms'][form] / 1000:.2f}" for form in ("ours", "mean")]
        peak = row.get("peak_mb", {}).get("ours")
        lines.append([row["name"], *seconds, "-" if peak is None else f"{peak:.0f}"])
    print(common.layout(lines))
    return result
