"""Computes the optical flow that STAR takes: TV-L1, from each frame of a tracklet to its next one.

    python recipes/compute_flow.py --data folder:/data/mine
    python recipes/compute_flow.py --data mars:/data/mars --out /scratch/mars-flow --workers 16   # a read-only data set

It needs OpenCV with its contrib modules: pip install temporal-agg[flow].

Every tracklet of every split gets one file: beside its first frame, or, with --out, in the same place below that folder
(`dataset.with_flow_root(folder)` then points the loader there). Flow is computed on grey frames of --size and kept at
--stored-size, its vectors in pixels of the stored size. By default that is half the size of the papers' frames: 2 to 6
kB a frame, where the full size takes 10 to 15 kB. Halving loses 4 % of the mean motion, less than what two settings of
TV-L1 differ by.

The same command goes on where it was stopped: finished tracklets are skipped, and a file that was not finished has
another name. Files of other settings are refused unless --overwrite is given. A tracklet that fails is reported at the
end, and the others are finished first; the exit code is then 1.

TV-L1 takes 0.1 to 1 s a frame on one core: some hundred core hours for a million frames. Its settings are OpenCV's, but
for --epsilon: at OpenCV's 0.01 it takes two to nine times as long, and brings a frame no nearer to the next one.
"""

import argparse
import inspect
import math
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import common
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from temporal_agg import data
from temporal_agg.data.flow import encode_flow, flow_file, flow_header, write_flow
from temporal_agg.data.tracklet import Tracklet, tracklet_key
from temporal_agg.inference import allowed_cores

try:
    import cv2

    cv2.optflow.DualTVL1OpticalFlow_create  # noqa: B018
except (ImportError, AttributeError) as error:
    raise SystemExit(
        f"compute_flow.py: TV-L1 is in OpenCV's contrib modules ({error}): pip install temporal-agg[flow]. Uninstall "
        "other OpenCV packages (opencv-python, opencv-python-headless) first."
    ) from error

PART = 32  # frames


def image_size(text: str) -> tuple[int, int]:
    height, width = common.image_size(text)
    if height < 16 or width < 16:
        raise ValueError
    return height, width


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = common.parser_of(__doc__ or "")
    parser.add_argument("--data", required=True, help="folder:<root>, csv:<file>, mars:<root>, ...")
    parser.add_argument("--data-options", nargs="+", default=[], metavar="KEY=VALUE", help="options of that data set")
    parser.add_argument("--out", type=Path, help="a folder for the files; default: beside the frames")
    parser.add_argument("--size", type=image_size, default="256x128", help="height x width of the frames (256x128)")
    parser.add_argument("--stored-size", type=image_size, default="128x64", help="of the flow that is kept (128x64)")
    parser.add_argument("--epsilon", type=float, default=0.02, help="when TV-L1 stops; smaller is slower (0.02)")
    parser.add_argument(
        "--workers",
        type=int,
        default=allowed_cores(),
        help="processes; 0: this one alone",
    )
    parser.add_argument("--overwrite", action="store_true", help="compute everything anew")
    args = parser.parse_args(argv)
    try:
        args.data_options = common.key_values(args.data_options)
    except ValueError as error:
        parser.error(f"--data-options {error}")
    if not (math.isfinite(args.epsilon) and args.epsilon > 0) or args.workers < 0:
        parser.error("--epsilon must be above 0, and --workers at least 0")
    if any(stored > side for stored, side in zip(args.stored_size, args.size, strict=True)):
        parser.error(f"--stored-size must not exceed --size, got {args.stored_size} and {args.size}")
    return args


class Parts(Dataset):
    """The work in parts of a few frames, so that many processes share a long tracklet.

    An item is the tracklet's number, the first frame and how many, their encoded flow, and any error.
    """

    def __init__(self, tracklets: list[Tracklet], args: argparse.Namespace):
        self.tracklets = tracklets
        self.args = args
        self.parts = [(i, first) for i, t in enumerate(tracklets) for first in range(0, len(t), PART)]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, part: int) -> tuple[int, int, int, list[tuple[float, bytes]], str]:
        i, first = self.parts[part]
        tracklet = self.tracklets[i]
        count, flow, error = min(PART, len(tracklet) - first), [], ""
        try:
            flow = compute(tracklet, range(first, min(first + PART + 1, len(tracklet))), self.args)
        except Exception as problem:
            error = f"{problem or type(problem).__name__}"
        return i, first, count, flow, error


def compute(tracklet: Tracklet, frames: range, args: argparse.Namespace) -> list[tuple[float, bytes]]:
    """The flow from each of these frames to the next of them."""
    cv2.setNumThreads(1)  # the processes are the parallelism, and their number does not change the result
    cv2.ocl.setUseOpenCL(False)
    method = cv2.optflow.DualTVL1OpticalFlow_create(epsilon=args.epsilon)
    height, width = args.stored_size
    scale = np.array([width / args.size[1], height / args.size[0]], np.float32)  # of dx, dy
    flow, before = [], None
    for i in frames:
        frame = grey(tracklet.load([i])[0], args.size)
        if before is not None:
            pixels = cv2.resize(method.calc(before, frame, None), (width, height), interpolation=cv2.INTER_AREA) * scale
            flow.append(encode_flow(pixels.transpose(2, 0, 1)))
        before = frame
    return flow


def grey(frame: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    pixels = cv2.cvtColor(frame.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2GRAY)
    shrinks = pixels.shape[0] >= size[0] and pixels.shape[1] >= size[1]
    return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def settings(args: argparse.Namespace) -> dict:
    return {"method": "TV-L1", "epsilon": args.epsilon, "size": list(args.size), "stored_size": list(args.stored_size)}


def distinct_tracklets(args: argparse.Namespace) -> list[Tracklet]:
    dataset = data.parse_data_spec(args.data, **args.data_options)
    tracklets = {tracklet_key(t): t for t in (*dataset.train, *dataset.query, *dataset.gallery)}
    if not all(isinstance(t, Tracklet) for t in tracklets.values()):
        raise ValueError(f"the tracklets of {args.data} are no files: there is nowhere to keep their optical flow.")
    return list(tracklets.values())


def is_finished(tracklet: Tracklet, args: argparse.Namespace) -> bool:
    """Whether there is a whole file of these settings; one of other settings is an error."""
    path = flow_file(tracklet.frames, args.out)
    try:
        header = flow_header(path)
    except (FileNotFoundError, data.FlowError):
        return False
    if header.get("settings") != settings(args):
        raise ValueError(
            f"{path} was made with other settings ({header.get('settings')}; now {settings(args)}). Give the same, "
            "or another --out; or --overwrite to compute everything anew."
        )
    return header["frames"] == len(tracklet)


def check_writable(tracklet: Tracklet, args: argparse.Namespace) -> None:
    """Says so before the first hour of work, and not after."""
    folder = flow_file(tracklet.frames, args.out).parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write to {folder}: give a folder for the flow, --out FOLDER.")


@common.own_defaults()
def main(argv: list[str] | None = None) -> int:
    args = arguments(sys.argv[1:] if argv is None else argv)
    with common.one_line("compute_flow.py", TypeError):
        tracklets = distinct_tracklets(args)
        missing = [t for t in tracklets if args.overwrite or not is_finished(t, args)]
        if missing:
            check_writable(missing[0], args)
        return compute_all(tracklets, missing, args)


def compute_all(tracklets: list[Tracklet], missing: list[Tracklet], args: argparse.Namespace) -> int:
    """Computes what is missing and says what was done; 1 if something failed."""

    start, frames, size = time.perf_counter(), 0, 0
    parts = Parts(missing, args)
    workers = min(args.workers, len(parts))
    options = {"in_order": False} if "in_order" in inspect.signature(DataLoader).parameters else {}  # since torch 2.6
    prefetch = 2 if workers else None
    loader = DataLoader(parts, batch_size=None, num_workers=workers, prefetch_factor=prefetch, **options)
    done: dict[int, dict[int, list]] = defaultdict(dict)  # of tracklets that are not finished: first frame -> flow
    errors: dict[int, str] = {}
    with tqdm(total=sum(map(len, missing)), desc="flow", unit="frame") as bar:
        for i, first, count, flow, error in common.start_workers(loader):
            bar.update(count)
            if i in errors:
                continue
            done[i][first] = flow
            if not error and len(done[i]) == len(range(0, len(missing[i]), PART)):
                whole = [step for _, steps in sorted(done.pop(i).items()) for step in steps]
                try:
                    path = flow_file(missing[i].frames, args.out)
                    size += write_flow(path, whole, args.stored_size, settings(args))
                    frames += len(missing[i])
                except OSError as problem:
                    error = str(problem)
            if error:
                errors[i] = error
                done.pop(i, None)
                bar.set_postfix(failed=len(errors))
    seconds = time.perf_counter() - start
    print(f"{len(tracklets)} tracklets: {len(missing) - len(errors)} computed, ", end="")
    print(f"{len(tracklets) - len(missing)} there already, {len(errors)} failed.")
    if frames:
        print(f"{frames} frames in {seconds:.0f} s ({1000 * seconds / frames:.0f} ms, {size / frames:.0f} bytes each).")
    for i, error in sorted(errors.items()):
        print(f"failed: {missing[i].name or missing[i].frames[0]}: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    common.run(main)
