"""Embeddings that grow, on a MOT sequence: what they add to a tracker, and when several frames beat one.

    python recipes/benchmarks/mot.py MOT17-09 --model runs/mine --out runs/mot
    python recipes/benchmarks/mot.py ADL-Rundle-6 --model mean_mobilenetv2_100 --backbone-weights file --size 128x64

A sequence is a folder with img1/<frame>.jpg, gt/gt.txt and det/det.txt. Needs Roboflow's `trackers` (written for 2.6.1)
and `supervision` (pip install trackers supervision): its ByteTrack joins boxes by their place alone, and its evaluation
gives IDF1, HOTA and MOTA.

Tracking: a track that is new is compared, once it has had some frames, with the tracks that were lost before it began,
and takes the number of the nearest one if that is near enough. With the stream of the model's aggregator, with an
exponential moving average of frame vectors, and with no appearance at all; same boxes, same weights, same tracks. Every
threshold is reported.

Re-association, on the true boxes: everybody's last n frames at one time are the gallery, the n frames of those who are
there a gap later the queries; rank-1 by the gap and by n, n = 1 being one crop.

Features of the boxes are kept in --out: the same command goes on where a killed one stopped. Results: mot.json, mot.md
and mot.png, in --results.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
import torch
from common import draw, read_tensors, write_json, write_tensors, write_text
from study import markdown
from torch import Tensor
from torch.nn import functional as F

import temporal_agg
from temporal_agg.data import open_image
from temporal_agg.data.boxes import read_boxes
from temporal_agg.files import read_number, read_text
from temporal_agg.inference import FrameRunner
from temporal_agg.stream import crop_boxes

THRESHOLDS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)  # cosine distances
FRAMES = (1, 2, 4, 8, 16, 32)  # n of the re-association
GAPS = (1, 15, 30, 60, 120, 240)  # in frames
EVERY = 5  # frames between two times of the re-association
PART = 50  # frames of the sequence whose features are written at a time
NOTHING, STREAM, AVERAGE = "no appearance", "our stream", "moving average"
Embed = Callable[[Tensor], Tensor]  # [B, n, C], tracks in order of time -> [B, D]


class Rows(NamedTuple):
    """Boxes of a sequence with whose they are, in order of time."""

    frame: np.ndarray  # [N]
    id: np.ndarray  # [N]
    corners: np.ndarray  # [N, 4], left, top, right, bottom

    def by_id(self) -> dict[int, np.ndarray]:
        """The places of each id's boxes, in order."""
        return {int(i): np.flatnonzero(self.id == i) for i in np.unique(self.id)}


# ----------------------------------------------------------------------------------------------------------------------
# The sequence, its tracks and their features


def truth(folder: Path) -> Rows:
    boxes = sorted(read_boxes(folder / "gt" / "gt.txt", None, truth=True).boxes, key=lambda box: (box.frame, box.id))
    return Rows(
        np.array([b.frame for b in boxes]), np.array([b.id for b in boxes]), np.array([b.corners for b in boxes])
    )


def detections(file: Path) -> np.ndarray:
    """Lines of frame, anything, left, top, width, height, confidence -> ``[N, 6]``: frame, corners, confidence.

    Raises:
        OSError: it cannot be read.
        ValueError: a line that has no such numbers; the message names it.
    """
    rows = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        words = line.replace(" ", ",").split(",")
        if number == 1 and words[0].strip('"').isalpha():
            continue  # a head
        try:
            frame, _, left, top, width, height, confidence = numbers = [*map(read_number, words[:7])]
            if not all(map(math.isfinite, numbers)):
                raise ValueError("not finite")
        except ValueError as error:
            expected = "expected frame,id,left,top,width,height,confidence"
            raise ValueError(f"{file}, line {number}: {expected}, got {line[:80]!r}.") from error
        rows.append((frame, left, top, left + width, top + height, confidence))
    if not rows:
        raise ValueError(f"{file} has no box.")
    return np.array(rows)


def tracked(found: np.ndarray, last: int, options: dict) -> Rows:
    """The boxes that a tracker of `trackers` joins by their place."""
    import supervision as sv
    from trackers import ByteTrackTracker

    tracker, rows = ByteTrackTracker(**options), []
    for frame in range(1, last + 1):
        now = found[found[:, 0] == frame]
        result = tracker.update(sv.Detections(xyxy=now[:, 1:5], confidence=now[:, 5]))
        for corners, track in zip(result.xyxy, np.asarray(result.tracker_id).tolist(), strict=True):
            if track >= 0:
                rows.append((frame, track, corners))
    if not rows:
        raise ValueError("the tracker made no track: lower --confidence, the least one that begins a track.")
    frames, ids, corners = zip(*rows, strict=True)
    return Rows(np.array(frames), np.array(ids), np.array(corners))


def features_of(model: temporal_agg.TrackletModel, folder: Path, rows: Rows, out: Path, name: str) -> Tensor:
    """The frame vector ``[N, C]`` of each box, in parts that are kept."""
    runner, parts = FrameRunner(model), []
    for start in range(0, int(rows.frame.max()) + 1, PART):
        chosen = (rows.frame >= start) & (rows.frame < start + PART)
        file = out / f"{name}-{start:06d}.safetensors"
        if chosen.any() and not file.exists():
            found = []
            for frame in np.unique(rows.frame[chosen]):
                image = np.asarray(open_image(folder / "img1" / f"{frame:06d}.jpg"))
                crops = crop_boxes(image, rows.corners[rows.frame == frame])
                pixels = [torch.from_numpy(np.ascontiguousarray(crop)).permute(2, 0, 1) for crop in crops]
                with runner.running():
                    x, _ = runner(runner.transform.resize(pixels))
                found.append((x.mean((2, 3)) if x.dim() == 4 else x).float().clone())
            write_tensors(file, {"features": torch.cat(found), "corners": torch.from_numpy(rows.corners[chosen])})
        if chosen.any():
            part = read_tensors(file)
            if not np.array_equal(part["corners"].numpy(), rows.corners[chosen]):
                raise ValueError(f"{file} holds features of other boxes: choose another --out.")
            parts.append(part["features"])
    return torch.cat(parts)


def streamed(model: temporal_agg.TrackletModel) -> Embed:
    """The model's aggregator by begin, update and read, as TrackletStream has it."""
    aggregator: Any = model.aggregator

    def embed(x: Tensor) -> Tensor:
        with torch.inference_mode():
            state = aggregator.update(aggregator.begin(len(x), x), x)
            return F.normalize(aggregator.read(state).embedding.float(), dim=1)

    return embed


def averaged(decay: float) -> Embed:
    """e <- decay e + (1 - decay) x of unit vectors, as trackers have it."""

    def embed(x: Tensor) -> Tensor:
        x = F.normalize(x, dim=2)
        mean = x[:, 0]
        for t in range(1, x.shape[1]):
            mean = F.normalize(decay * mean + (1 - decay) * x[:, t], dim=1)
        return mean

    return embed


# ----------------------------------------------------------------------------------------------------------------------
# Tracking


def linked(rows: Rows, features: Tensor, embed: Embed, threshold: float, least: int, memory: int) -> np.ndarray:
    """The number of each box's person, from those of the tracks.

    Tracks come in the order in which they have had ``least`` boxes; each is compared by those with all boxes of the
    tracks that ended before it began, not longer than ``memory`` frames ago.
    """
    tracks = rows.by_id()
    begin = {t: rows.frame[places[0]] for t, places in tracks.items()}
    end = {t: rows.frame[places[-1]] for t, places in tracks.items()}
    whole = {t: embed(features[places][None])[0] for t, places in tracks.items()}
    person = {t: t for t in tracks}
    last = dict(end)  # when a person was seen last
    order = sorted((t for t in tracks if len(tracks[t]) >= least), key=lambda t: rows.frame[tracks[t][least - 1]])
    for track in order:
        lost = [
            t for t in order if t != track and 0 < begin[track] - end[t] <= memory and last[person[t]] < begin[track]
        ]
        if lost:
            young = embed(features[tracks[track][:least]][None])[0]
            distances = 1 - torch.stack([whole[t] for t in lost]) @ young
            if float(distances.min()) <= threshold:
                person[track] = person[lost[int(distances.argmin())]]
                last[person[track]] = max(last[person[track]], end[track])
    return np.array([person[int(t)] for t in rows.id])


def evaluated(rows: Rows, people: np.ndarray, true: Rows, folder: Path, name: str) -> dict[str, float]:
    """By the evaluation of `trackers`."""
    from trackers.eval import evaluate_mot_sequence

    files = folder / "truth.txt", folder / f"{name.replace(' ', '-')}.txt"
    for file, some, ids in ((files[0], true, true.id), (files[1], rows, people)):
        lines = (
            f"{f},{i},{a:.2f},{b:.2f},{c - a:.2f},{d - b:.2f},1,1,1"  # of class 1, a pedestrian
            for f, i, (a, b, c, d) in zip(some.frame, ids, some.corners, strict=True)
        )
        write_text(file, "\n".join(lines) + "\n")
    found = evaluate_mot_sequence(*files, metrics=["CLEAR", "HOTA", "Identity"])
    return {
        "IDF1": float(found.Identity.IDF1),
        "HOTA": float(found.HOTA.HOTA),
        "AssA": float(found.HOTA.AssA),
        "MOTA": float(found.CLEAR.MOTA),
        "ID switches": int(found.CLEAR.IDSW),
        "people": len(set(people.tolist())),
    }


def tracking(rows: Rows, features: Tensor, true: Rows, embeds: dict[str, Embed], args: argparse.Namespace) -> dict:
    found = {NOTHING: {"-": evaluated(rows, rows.id, true, args.out, NOTHING)}}
    for name, embed in embeds.items():
        found[name] = {}
        for threshold in THRESHOLDS:
            people = linked(rows, features, embed, threshold, args.least, args.memory)
            found[name][str(threshold)] = evaluated(rows, people, true, args.out, f"{name} {threshold}")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Re-association


def windows(true: Rows, n: int, gap: int) -> Iterator[tuple[dict[int, np.ndarray], dict[int, np.ndarray]]]:
    """At every time: the places of everybody's last n boxes until then, and of their first n from a gap later on.

    Who has fewer within 2n frames is left out.
    """
    tracks = true.by_id()
    for time in range(int(true.frame.min()), int(true.frame.max()), EVERY):
        gallery, queries = {}, {}
        for person, places in tracks.items():
            at = true.frame[places]
            before = places[(at <= time) & (at > time - 2 * n)][-n:]
            after = places[(at >= time + gap) & (at < time + gap + 2 * n)][:n]
            if len(before) == n:
                gallery[person] = before
            if len(after) == n:
                queries[person] = after
        queries = {person: places for person, places in queries.items() if person in gallery}
        if len(gallery) > 1 and queries:
            yield gallery, queries


def reassociation(true: Rows, features: Tensor, embed: Embed) -> list[dict]:
    """Rank-1 for each gap and n, how many queries, and what guessing would give.

    Times and persons are those of the longest n, so that every n answers the same questions.
    """
    found = []
    for gap in GAPS:
        asked = list(windows(true, max(FRAMES), gap))
        total = sum(len(queries) for _, queries in asked)
        guess = sum(len(queries) / len(gallery) for gallery, queries in asked)
        for n in FRAMES if total else ():
            right = 0
            for gallery, queries in asked:
                others = embed(torch.stack([features[places[-n:]] for places in gallery.values()]))
                own = embed(torch.stack([features[places[:n]] for places in queries.values()]))
                people = list(gallery)
                right += sum(people[k] == p for k, p in zip((own @ others.T).argmax(1).tolist(), queries, strict=True))
            found.append({"gap": gap, "frames": n, "rank1": right / total, "queries": total, "guess": guess / total})
    return found


# ----------------------------------------------------------------------------------------------------------------------
# What a person reads


def table_of_tracking(found: dict) -> str:
    names = list(found[NOTHING]["-"])
    rows = []
    for name, of in found.items():
        for threshold, values in of.items():
            cells = [f"{v}" if isinstance(v := values[key], int) else f"{100 * v:.1f}" for key in names]
            rows.append([name, threshold, *cells])
    return markdown(["", "threshold", *names], rows)


def table_of_reassociation(found: list[dict]) -> str:
    gaps = list(dict.fromkeys(row["gap"] for row in found))
    value = {(row["gap"], row["frames"]): row for row in found}
    rows = [
        [f"{n}", *(f"{100 * value[gap, n]['rank1']:.1f}" for gap in gaps)]
        for n in dict.fromkeys(row["frames"] for row in found)
    ]
    rows.append(["guessing", *(f"{100 * value[gap, FRAMES[0]]['guess']:.1f}" for gap in gaps)])
    rows.append(["queries", *(f"{value[gap, FRAMES[0]]['queries']}" for gap in gaps)])
    return markdown(["frames", *(f"gap {gap}" for gap in gaps)], rows)


def text(study: dict) -> str:
    best = {name: max(of.values(), key=lambda v: v["IDF1"]) for name, of in study["tracking"].items()}
    says = "; ".join(f"{name} {100 * v['IDF1']:.1f} IDF1, {100 * v['HOTA']:.1f} HOTA" for name, v in best.items())
    people = f"{study['frames']} frames, {study['people']} people, {study['boxes']} true boxes"
    return f"""{study["sequence"]}: {people}; detections `{study["detections"]}`; {study["model"]}.
ByteTrack of trackers {study["trackers"]}. A track is compared when it has {study["least"]} boxes, with those that were
lost for at most {study["memory"]} frames. The moving average keeps {study["decay"]:g}. Thresholds are cosine distances.

At each one's best threshold: {says}.

{table_of_tracking(study["tracking"])}

Re-association, rank-1 in % of the {study["aggregator"]} of as many frames of each person, after a gap in frames:

{table_of_reassociation(study["reassociation"])}
"""


def figure(study: dict):
    """Rank-1 against the gap, a curve for each n; and against n, a curve for each gap."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    found = study["reassociation"]
    value = {(row["gap"], row["frames"]): 100 * row["rank1"] for row in found}
    gaps, frames = (list(dict.fromkeys(row[key] for row in found)) for key in ("gap", "frames"))
    drawing = Figure(figsize=(11, 4), layout="constrained")
    left, right = drawing.subplots(1, 2, sharey=True)
    shade = colormaps["viridis"]
    for k, n in enumerate(frames):
        label = "one crop" if n == 1 else f"{n} frames"
        x = [gap for gap in gaps if (gap, n) in value]
        left.plot(x, [value[gap, n] for gap in x], "o-", color=shade(0.9 * k / len(frames)), label=label, markersize=4)
    left.plot(gaps, [100 * row["guess"] for row in found if row["frames"] == frames[0]], "k:", label="guessing")
    for k, gap in enumerate(gaps):
        x = [n for n in frames if (gap, n) in value]
        right.plot(
            x, [value[gap, n] for n in x], "o-", color=shade(0.9 * k / len(gaps)), label=f"gap {gap}", markersize=4
        )
    for ax, what, ticks in ((left, "gap, frames", gaps), (right, "frames seen of each person", frames)):
        ax.set_xscale("log")
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
        ax.set_xlabel(what)
        ax.grid(alpha=0.25)
        ax.legend(frameon=False, fontsize=8)
    left.set_ylim(0, 102)
    left.set_ylabel("rank-1, %")
    drawing.suptitle(f"{study['sequence']}, re-association by {study['aggregator']} of the frames", fontsize=10)
    return drawing


# ----------------------------------------------------------------------------------------------------------------------
# The command


def build(args: argparse.Namespace) -> temporal_agg.TrackletModel:
    if not args.backbone_weights:
        return common.load_model(args.model, {}).eval()
    options = {"img_size": common.image_size(args.size), "backbone_weights": args.backbone_weights}
    return temporal_agg.create_model(args.model, **options).eval()


def parse(argv: list[str]) -> argparse.Namespace:
    parser = common.parser_of(__doc__ or "")
    add = parser.add_argument
    add("sequence", type=Path, help="a folder with img1/, gt/gt.txt and det/det.txt")
    add("--detections", type=Path, help="another file of boxes: frame,-1,left,top,width,height,confidence")
    add("--model", default="mean_mobilenetv2_100", help="a directory of train.py, or a name with --backbone-weights")
    add("--backbone-weights", default="", help="a file for the backbone; the aggregator must have no weights")
    add("--size", default="128x64", help="height x width of a crop, with --backbone-weights")
    add("--confidence", type=float, default=0.5, help="least one of a detection that begins a track (0.5)")
    add("--least", type=int, default=5, help="boxes of a track before it is compared (5)")
    add("--memory", type=int, default=300, help="frames for which a lost track is remembered (300)")
    add("--decay", type=float, default=0.9, help="what a moving average keeps (0.9)")
    add("--out", type=Path, default=Path("runs/mot"), help="where features and tracks are kept (runs/mot)")
    add("--results", type=Path, help="where mot.json, .md and .png go; default: --out")
    args = parser.parse_args(argv)
    args.detections = args.detections or args.sequence / "det" / "det.txt"
    args.results = args.results or args.out
    if args.least < 1 or args.memory < 1 or not 0 <= args.decay < 1:
        parser.error("--least and --memory must be at least 1, --decay from 0 to below 1")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(sys.argv[1:] if argv is None else argv)
    with common.one_line("mot.py"):
        return measure(args)


def measure(args: argparse.Namespace) -> dict:
    import trackers

    args.out.mkdir(parents=True, exist_ok=True)
    model, true = build(args), truth(args.sequence)
    options = {"track_activation_threshold": args.confidence, "high_conf_det_threshold": args.confidence}
    rows = tracked(detections(args.detections), int(true.frame.max()), options)
    seen = {n: features_of(model, args.sequence, r, args.out, n) for n, r in (("tracks", rows), ("truth", true))}
    embeds = {STREAM: streamed(model), f"{AVERAGE} {args.decay:g}": averaged(args.decay)}
    study = {
        "environment": common.environment("cpu"),
        "sequence": args.sequence.resolve().name,
        "frames": int(true.frame.max()),
        "people": len(np.unique(true.id)),
        "boxes": len(true.frame),
        "detections": f"{args.detections.parent.name}/{args.detections.name}",
        "model": f"`{Path(args.model).name}`"
        + (f" of `{Path(args.backbone_weights).name}`" if args.backbone_weights else ""),
        "aggregator": model.aggregator.config["name"],
        "trackers": getattr(trackers, "__version__", "2.6.1"),
        "least": args.least,
        "memory": args.memory,
        "decay": args.decay,
        "tracking": tracking(rows, seen["tracks"], true, embeds, args),
        "reassociation": reassociation(true, seen["truth"], embeds[STREAM]),
    }
    del study["environment"]["command"]
    args.results.mkdir(parents=True, exist_ok=True)
    write_json(args.results / "mot.json", study)
    write_text(args.results / "mot.md", text(study))
    draw(args.results / "mot.png", lambda: figure(study))
    print(text(study))
    return study


if __name__ == "__main__":
    common.run(main)
