"""MOT-format sequences -> tracklets in the folder layout of temporal-agg, to train on, to test with, or to embed.

    python examples/tracklets_from_mot.py MOT17-02-FRCNN MOT17-04-FRCNN --out people        # frames and gt/gt.txt
    python examples/tracklets_from_mot.py sequence --boxes tracks.txt --cameras 3 --out people   # a tracker's result

A sequence is a folder with img1/<frame>.jpg and gt/gt.txt, whose lines are frame, id, left, top, width, height, then
confidence (of a ground truth: 0 = to be ignored), class and visibility. It becomes

    people/{train,query,gallery}/<pid>/<camera>_<sequence>-<frame>/<frame>.jpg, and people/contact_sheet.jpg

Look at the contact sheet before you train: a row is a tracklet, and rows with the same number should show one person.

A sequence is cut into --cameras periods of equal length, which count as cameras: its people are then looked for at
another time. A tracklet ends where a period ends, and where its person was not seen for more than --max-gap frames.
--test of the people seen in two cameras are for testing; their first camera gives the queries. The same command goes on
where it was stopped, and finished tracklets are not written again.
"""

import argparse
import configparser
import hashlib
import json
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps

TILE, COLUMNS, LABEL = (64, 128), 8, 200  # of the contact sheet, in pixels


class Box(NamedTuple):
    """In pixels; left and top from 0. Visibility is a share, 1 where it is unknown."""

    frame: int
    id: int
    left: float
    top: float
    width: float
    height: float
    visibility: float = 1.0

    @property
    def corners(self) -> tuple[float, float, float, float]:
        return self.left, self.top, self.left + self.width, self.top + self.height

    def share(self, other: tuple[float, float, float, float]) -> float:
        """How much of the box another rectangle covers."""
        x1, y1, x2, y2 = self.corners
        shared = max(min(x2, other[2]) - max(x1, other[0]), 0) * max(min(y2, other[3]) - max(y1, other[1]), 0)
        return shared / (self.width * self.height)


class Cut(NamedTuple):
    """A tracklet to be: whose boxes, and where it goes."""

    source: "Sequence"
    pid: int
    camera: int
    boxes: list[Box]

    @property
    def folder(self) -> str:
        return f"{self.pid:04d}/{self.camera}_{self.source.name}-{self.boxes[0].frame:06d}"


class Sequence:
    """Frames by their numbers, and boxes."""

    def __init__(self, folder: Path, boxes: Path | None, classes: list[int], confidence: float):
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}: expected one with img1/ and gt/gt.txt.")
        info = configparser.ConfigParser()
        info.read(folder / "seqinfo.ini", encoding="utf-8")
        images = folder / info.get("Sequence", "imDir", fallback="img1")
        self.name = folder.resolve().name
        self.paths = {int(p.stem): p for p in images.glob("*") if p.stem.isdigit()}
        if not self.paths:
            raise FileNotFoundError(f"no frame in {images}: expected images named by their numbers, 000001.jpg.")
        self.span = min(self.paths), max(self.paths)
        with Image.open(self.paths[self.span[0]]) as image:
            self.size = image.size
        self.boxes = list(read_boxes(boxes or folder / "gt" / "gt.txt", classes, confidence))

    def frames(self, numbers: list[int]) -> Iterator[tuple[int, Image.Image]]:
        for number in numbers:
            if number not in self.paths:
                raise FileNotFoundError(f"{self.name} has boxes in frame {number}, but no image of it.")
            try:
                with Image.open(self.paths[number]) as image:
                    yield number, image.convert("RGB")
            except OSError as error:
                raise OSError(f"cannot read {self.paths[number]}: {error}.") from error


def read_boxes(file: Path, classes: list[int], confidence: float) -> Iterator[Box]:
    """The boxes of a MOT file that are people; its pixels are counted from 1."""
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}: pass the boxes by --boxes.")
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = [float(value) for value in line.replace(",", " ").split()]
            frame, track, left, top, width, height, *rest = values
        except ValueError:
            raise ValueError(f"{file}, line {number}: expected frame,id,left,top,width,height, got {line!r}.") from None
        if track < 0:
            raise ValueError(f"{file}, line {number}: a box without an identity (id {track:g}): run a tracker first.")
        sure, visibility = rest[0] if rest else 1.0, 1.0
        if len(rest) in (2, 3) and rest[1] > 0:  # a ground truth: its confidence is a flag
            if rest[1] not in classes or not sure:
                continue
            visibility = rest[2] if len(rest) == 3 and rest[2] >= 0 else 1.0
        if sure >= confidence and min(width, height) > 0:
            yield Box(int(frame), int(track), left - 1, top - 1, width, height, visibility)


# ----------------------------------------------------------------------------------------------------------------------
# Boxes -> tracklets -> files; tracklets_from_video.py uses this, too


def cut_tracklets(sources: list[Sequence], args: argparse.Namespace) -> list[Cut]:
    cuts, first_pid = [], 0
    for number, source in enumerate(sources):
        by_frame, by_id = defaultdict(list), defaultdict(list)
        for box in source.boxes:
            by_frame[box.frame].append(box)
        for box in source.boxes:
            # Who stands lower in the picture stands in front.
            front = [b for b in by_frame[box.frame] if b.id != box.id and b.corners[3] > box.corners[3]]
            if (
                min(box.visibility, box.share((0, 0, *source.size))) >= args.visibility
                and box.height >= args.min_height
                and max((box.share(b.corners) for b in front), default=0) <= args.occlusion
            ):
                by_id[box.id].append(box)
        start, end = source.span
        for track, boxes in sorted(by_id.items()):
            boxes.sort()
            runs: dict[tuple, list[Box]] = defaultdict(list)
            run = 0
            for before, box in zip([boxes[0], *boxes], boxes, strict=False):
                run += box.frame - before.frame > args.max_gap
                runs[(box.frame - start) * args.cameras // (end - start + 1), run].append(box)
            for (period, _), kept in sorted(runs.items()):
                if len(kept[:: args.stride]) >= args.min_length:
                    pid = track if args.shared_ids else first_pid + track
                    cuts.append(Cut(source, pid, number * args.cameras + period, kept[:: args.stride]))
        first_pid += max((box.id for box in source.boxes), default=0) + 1
    if not cuts:
        raise ValueError("no tracklet is left: lower --min-length, --min-height or --visibility, or raise --occlusion.")
    return cuts


def split_people(cuts: list[Cut], share: float, seed: int) -> dict[str, list[Cut]]:
    cameras = defaultdict(set)
    for cut in cuts:
        cameras[cut.pid].add(cut.camera)
    matched = sorted(pid for pid, seen in cameras.items() if len(seen) > 1)
    if share and not matched:
        raise ValueError("nobody was seen in two cameras, so nothing can be tested: raise --cameras or pass --test 0.")
    test = set(random.Random(seed).sample(matched, round(share * len(matched))))
    splits = defaultdict(list)
    for cut in cuts:
        first = cut.camera == min(cameras[cut.pid])
        splits["train" if cut.pid not in test else "query" if first else "gallery"].append(cut)
    return splits


def write_tracklets(splits: dict[str, list[Cut]], out: Path, margin: float) -> int:
    """Writes what is not there yet; a tracklet gets its name when it is complete. Returns how many it wrote."""
    wanted = defaultdict(lambda: defaultdict(list))  # source -> frame -> where its crops go
    left = {}
    for split, cuts in splits.items():
        for cut in cuts:
            final = out / split / cut.folder
            temporary = final.with_name(f".tmp-{final.name}")
            if not final.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                left[final] = len(cut.boxes)
                for box in cut.boxes:
                    wanted[cut.source][box.frame].append((box, temporary, final))
    written = len(left)
    for source, frames in wanted.items():
        for number, image in source.frames(sorted(frames)):
            for box, temporary, final in frames[number]:
                x1, y1, x2, y2 = box.corners
                dx, dy = margin * box.width, margin * box.height
                x1, x2 = (round(min(max(x, 0), image.width)) for x in (x1 - dx, x2 + dx))
                y1, y2 = (round(min(max(y, 0), image.height)) for y in (y1 - dy, y2 + dy))
                image.crop((x1, y1, max(x2, x1 + 1), max(y2, y1 + 1))).save(temporary / f"{number:06d}.jpg", quality=95)
                left[final] -= 1
                if not left[final]:
                    os.replace(temporary, final)
    return written


def contact_sheet(splits: dict[str, list[Cut]], out: Path, rows: int, seed: int) -> Image.Image:
    """One row a tracklet, its frames evenly spaced; tracklets of the same person stand together."""
    people = defaultdict(list)
    for split, cuts in splits.items():
        for cut in cuts:
            people[cut.pid].append((split, cut))
    pids = sorted(people)
    random.Random(seed).shuffle(pids)
    chosen = [(pid, *item) for pid in pids for item in people[pid]][:rows]
    sheet = Image.new("RGB", (LABEL + COLUMNS * TILE[0], len(chosen) * TILE[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (pid, split, cut) in enumerate(chosen):
        y = row * TILE[1]
        text = f"{pid:04d}  {split}\ncamera {cut.camera}\n{cut.source.name}\nframes {cut.boxes[0].frame} to "
        draw.text((8, y + 8), f"{text}{cut.boxes[-1].frame}\n{len(cut.boxes)} of them kept", fill="black")
        new = row == 0 or chosen[row - 1][0] != pid
        draw.line((0 if new else LABEL, y, sheet.width, y), fill="black" if new else "lightgray", width=2 if new else 1)
        for column, place in enumerate(np.unique(np.linspace(0, len(cut.boxes) - 1, COLUMNS).round().astype(int))):
            with Image.open(out / split / cut.folder / f"{cut.boxes[place].frame:06d}.jpg") as crop:
                crop = ImageOps.contain(crop, (TILE[0] - 4, TILE[1] - 6))
                sheet.paste(crop, (LABEL + column * TILE[0] + 2, y + 3))
    return sheet


def check_settings(out: Path, settings: dict) -> None:
    """Refuses a folder that other settings have filled."""
    file = out / "settings.json"
    settings = json.loads(json.dumps(settings, default=str))
    if file.is_file():
        before = json.loads(file.read_text())
        changed = [k for k in sorted({*before, *settings}) if before.get(k) != settings.get(k)]
        if changed:
            was = "; ".join(f"{k}: was {before.get(k)}, is {settings.get(k)}" for k in changed)
            raise ValueError(f"{out} was made with other settings ({was}): choose another --out, or remove it.")
    elif out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} holds other things already: choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / ".tmp-settings.json"
    temporary.write_text(json.dumps(settings, indent=1) + "\n")
    os.replace(temporary, file)


def common_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the folder to fill")
    add("--cameras", type=int, default=2, help="periods of equal length that count as cameras (2)")
    add("--test", type=float, default=0.5, help="share of the people for query and gallery; 0: all for training (0.5)")
    add("--shared-ids", action="store_true", help="a number is the same person in all sequences")
    add("--margin", type=float, default=0.05, help="added on each side, as a share of the box (0.05)")
    add("--visibility", type=float, default=0.5, help="least visible share; never more than what is in the frame (0.5)")
    add("--occlusion", type=float, default=0.5, help="greatest share behind one person in front (0.5)")
    add("--min-height", type=float, default=48, help="of a box, in pixels (48)")
    add("--min-length", type=int, default=8, help="frames of a tracklet (8)")
    add("--max-gap", type=int, default=10, help="frames without the person before a new tracklet begins (10)")
    add("--stride", type=int, default=1, help="keep every n-th frame (1)")
    add("--confidence", type=float, default=0.0, help="least confidence of a tracker's boxes (0)")
    add("--sheet", type=int, default=40, help="tracklets on the contact sheet (40)")
    add("--seed", type=int, default=0, help="draws the people for testing (0)")


def make(sources: list, args: argparse.Namespace) -> None:
    if min(args.cameras, args.stride, args.min_length, args.sheet) < 1 or not 0 <= args.test < 1:
        raise ValueError("--cameras, --stride, --min-length and --sheet must be at least 1, --test from 0 to below 1.")
    cuts = cut_tracklets(sources, args)
    splits = split_people(cuts, args.test, args.seed)
    boxes = hashlib.sha256(repr([(cut.folder, cut.boxes) for cut in cuts]).encode()).hexdigest()[:16]
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "sheet")}
    check_settings(args.out, {**settings, "content of the boxes": boxes})
    written = write_tracklets(splits, args.out, args.margin)
    temporary = args.out / ".tmp-contact_sheet.jpg"
    contact_sheet(splits, args.out, args.sheet, args.seed).save(temporary, quality=90)
    os.replace(temporary, args.out / "contact_sheet.jpg")
    for split, cuts in sorted(splits.items()):
        people, frames = len({cut.pid for cut in cuts}), sum(len(cut.boxes) for cut in cuts)
        print(f"{split}: {len(cuts)} tracklets of {people} people, {frames} frames")
    print(f"{written} tracklets written; look at {args.out / 'contact_sheet.jpg'}")


def main(argv: list[str] | None = None) -> None:
    about, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sequences", type=Path, nargs="+", help="folders with img1/ and gt/gt.txt")
    parser.add_argument("--boxes", type=Path, help="of a single sequence; default: its gt/gt.txt")
    parser.add_argument("--classes", type=int, nargs="+", default=[1], metavar="N", help="of a ground truth (1)")
    common_arguments(parser)
    args = parser.parse_args(argv)
    try:
        if args.boxes and len(args.sequences) > 1:
            raise ValueError("--boxes goes with a single sequence.")
        make([Sequence(s, args.boxes, args.classes, args.confidence) for s in args.sequences], args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{Path(__file__).name}: {error}") from error


if __name__ == "__main__":
    main()
