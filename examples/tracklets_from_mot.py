"""MOT-format sequences -> tracklets in the folder layout of temporal-agg, to train on, to test with, or to embed.

    python examples/tracklets_from_mot.py MOT17-02-FRCNN MOT17-04-FRCNN --out people        # frames and gt/gt.txt
    python examples/tracklets_from_mot.py sequence --boxes tracks.txt --cameras 3 --out people   # a tracker's result

A sequence is a folder with img1/<frame>.jpg and gt/gt.txt, whose lines are frame, id, left, top, width, height, then
what the tool adds: --columns says what, where the file leaves it open (docs/own_data.md). A CSV file with a header will
do as well. What is left out is printed, by reason. The sequence becomes

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
import io
import json
import math
import os
import random
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from temporal_agg.data import open_image
from temporal_agg.data.boxes import Box, crop, people_in, read_boxes
from temporal_agg.data.images import is_image
from temporal_agg.files import locked, print_any_name, read_json, read_text, replace_file

TILE, COLUMNS, LABEL = (64, 128), 8, 200  # of the contact sheet, in pixels


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

    def __init__(self, folder: Path, boxes: Path | None, args: argparse.Namespace):
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}: expected one with img1/ and gt/gt.txt.")
        self.name = folder.resolve().name
        images = image_folder(folder)
        self.paths: dict[int, Path] = {}
        for path in sorted(images.glob("*")):
            if is_image(path.name) and re.fullmatch("[0-9]+", path.stem):  # label files may lie beside the frames
                other = self.paths.setdefault(int(path.stem), path)
                if other != path:
                    raise ValueError(f"{other} and {path.name} are the same frame: remove one of them.")
        if not self.paths:
            raise FileNotFoundError(
                f"no frame in {images}: expected images named by their numbers, 000001.jpg (in the imDir of "
                f"{folder / 'seqinfo.ini'}, else in img1)."
            )
        self.span = min(self.paths), max(self.paths)
        self.size = open_image(self.paths[self.span[0]]).size
        file = boxes or folder / "gt" / "gt.txt"
        self.found = read_boxes(file, args.columns, **box_filters(args), truth=boxes is None)
        first, last = self.found.boxes[0].frame, self.found.boxes[-1].frame
        start, end = self.span
        if (first == start - 1 and last < end) or (last == end + 1 and first > start):
            raise ValueError(
                f"{file} has boxes in the frames {first} to {last}, and the images are {start} to {end}: one of them "
                "counts from 0, and people would be cut out of the frame beside theirs. Number the images as the boxes "
                "are; where an image is only missing, take its boxes out."
            )

    def frames(self, numbers: list[int]) -> Iterator[tuple[int, Image.Image | OSError]]:
        for number in numbers:
            try:
                if number not in self.paths:
                    raise FileNotFoundError(f"{self.name} has boxes in frame {number}, but no image of it.")
                image = open_image(self.paths[number])
                if image.size != self.size:
                    own, first = ("x".join(map(str, size)) for size in (image.size, self.size))
                    raise OSError(f"{self.paths[number]} has {own} pixels, where the first frame has {first}.")
                yield number, image
            except OSError as error:
                yield number, error


def image_folder(folder: Path) -> Path:
    """Where a sequence's frames are: seqinfo.ini may say it; else in img1, or beside each other in the folder."""
    file = folder / "seqinfo.ini"
    if not file.is_file():
        return folder / "img1" if (folder / "img1").is_dir() else folder
    text, name = read_text(file), "img1"
    if not re.search(r"^\s*\[", text, re.MULTILINE):
        print(f"{file} has no [Sequence] line: it is read as if it had.", file=sys.stderr)
        text = f"[Sequence]\n{text}"
    info = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        info.read_string(text, str(file))
    except configparser.Error as error:
        raise ValueError(f"{file} is no ini file: {error}.") from error
    for section in info.sections():
        name = info.get(section, "imDir", fallback=name)
    return folder / name


# ----------------------------------------------------------------------------------------------------------------------
# Boxes -> tracklets -> files; tracklets_from_video.py uses this, too


def cut_tracklets(sources: list[Sequence], args: argparse.Namespace) -> list[Cut]:
    cuts, first_pid = [], 0
    for number, source in enumerate(sources):
        found, by_id = source.found, defaultdict(list)
        least = {"visibility": args.visibility, "min_height": args.min_height, "occlusion": args.occlusion}
        for box in people_in(found.boxes, source.size, found.dropped, **least):
            by_id[box.id].append(box)
        start, end = source.span
        for track, boxes in sorted(by_id.items()):
            runs: dict[tuple, list[Box]] = defaultdict(list)
            run = 0
            for before, box in zip([boxes[0], *boxes], boxes, strict=False):
                run += box.frame - before.frame > args.max_gap
                period = (box.frame - start) * args.cameras // (end - start + 1)
                runs[min(max(period, 0), args.cameras - 1), run].append(box)
            for (period, _), own in sorted(runs.items()):
                kept = own[:: args.stride]
                if len(kept) < args.min_length:
                    found.dropped[f"in tracklets of less than {args.min_length} frames"] += len(own)
                    continue
                found.dropped[f"between every {args.stride} frames"] += len(own) - len(kept)
                pid = track if args.shared_ids else first_pid + track
                cuts.append(Cut(source, pid, number * args.cameras + period, kept))
        first_pid += max(box.id for box in found.boxes) + 1
        print(f"{source.name}: {found.report()}")
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


def write_tracklets(splits: dict[str, list[Cut]], out: Path, margin: float, skip_unreadable: bool) -> int:
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
    written, errors = 0, []
    for source, frames in wanted.items():
        for number, image in source.frames(sorted(frames)):
            bad = isinstance(image, OSError)
            if bad:
                errors.append(str(image))
            for box, temporary, final in frames[number]:
                if not bad:
                    write_jpeg(temporary / f"{number:06d}.jpg", crop(image, box, margin), 95)
                left[final] -= not bad or skip_unreadable
                if not left[final] and any(temporary.iterdir()):
                    os.replace(temporary, final)
                    written += 1
                elif not left[final]:
                    temporary.rmdir()
    if errors:
        listed = "".join(f"\n  {error}" for error in dict.fromkeys(errors))
        if not skip_unreadable:
            raise OSError(f"{len(errors)} frames cannot be read; --skip-unreadable leaves them out:{listed}")
        print(f"{len(errors)} frames cannot be read and are left out:{listed}", file=sys.stderr)
    return written


def write_jpeg(path: Path, image: Image.Image, quality: int) -> None:
    """Writes all of it or raises; Pillow alone takes no notice when a full disk takes only a part."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    path.write_bytes(content.getvalue())


def contact_sheet(splits: dict[str, list[Cut]], out: Path, rows: int, seed: int) -> Image.Image:
    """One row a tracklet, its frames evenly spaced; tracklets of the same person stand together."""
    people = defaultdict(list)
    for split, cuts in splits.items():
        for cut in cuts:
            people[cut.pid].append((split, cut))
    pids = sorted(people)
    random.Random(seed).shuffle(pids)
    there = {pid: [(split, cut) for split, cut in people[pid] if (out / split / cut.folder).is_dir()] for pid in pids}
    chosen = [(pid, *item) for pid in pids for item in there[pid]][:rows]
    sheet = Image.new("RGB", (LABEL + COLUMNS * TILE[0], len(chosen) * TILE[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (pid, split, cut) in enumerate(chosen):
        y = row * TILE[1]
        text = f"{pid:04d}  {split}\ncamera {cut.camera}\n{cut.source.name}\nframes {cut.boxes[0].frame} to "
        draw.text((8, y + 8), f"{text}{cut.boxes[-1].frame}\n{len(cut.boxes)} of them kept", fill="black")
        new = row == 0 or chosen[row - 1][0] != pid
        draw.line((0 if new else LABEL, y, sheet.width, y), fill="black" if new else "lightgray", width=2 if new else 1)
        files = sorted(p for p in (out / split / cut.folder).iterdir() if is_image(p.name))
        for column, place in enumerate(np.unique(np.linspace(0, len(files) - 1, COLUMNS).round().astype(int))):
            tile = ImageOps.contain(open_image(files[place]), (TILE[0] - 4, TILE[1] - 6))
            sheet.paste(tile, (LABEL + column * TILE[0] + 2, y + 3))
    return sheet


def check_settings(out: Path, settings: dict) -> None:
    """Refuses a folder that other settings have filled."""
    file = out / "settings.json"
    settings = json.loads(json.dumps(settings, default=str))
    if file.is_file():
        before = read_json(file)
        changed = [k for k in sorted({*before, *settings}) if before.get(k) != settings.get(k)]
        if changed:
            was = "; ".join(f"{k}: was {before.get(k)}, is {settings.get(k)}" for k in changed)
            raise ValueError(f"{out} was made with other settings ({was}): choose another --out, or remove it.")
    elif out.exists() and any(not path.name.startswith(f".{file.name}.") for path in out.iterdir()):
        raise FileExistsError(f"{out} holds other things already: choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda temporary: temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8"))


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
    add("--confidence", type=float, default=0.0, help="least confidence of a tracker's boxes, where it is known (0)")
    add("--columns", help="of the files of boxes: mot-gt, mot15-gt, mot, boxmot, visdrone, or names: frame,id,left,...")
    add("--classes", type=int, nargs="+", metavar="N", help="that are people (what the columns' tool has for them)")
    add("--skip-unreadable", action="store_true", help="leave frames out that cannot be read, and list them")
    add("--sheet", type=int, default=40, help="tracklets on the contact sheet (40)")
    add("--seed", type=int, default=0, help="draws the people for testing (0)")


def box_filters(args: argparse.Namespace) -> dict:
    return {"classes": args.classes, "confidence": args.confidence}


def make(sources: list, args: argparse.Namespace) -> None:
    if min(args.cameras, args.stride, args.min_length, args.sheet) < 1 or not 0 <= args.test < 1:
        raise ValueError("--cameras, --stride, --min-length and --sheet must be at least 1, --test from 0 to below 1.")
    shares = args.visibility, args.occlusion
    sizes = args.margin, args.min_height, args.max_gap, args.confidence
    if not (all(0 <= x <= 1 for x in shares) and all(0 <= x < math.inf for x in sizes)):
        raise ValueError(
            "--visibility and --occlusion are shares, from 0 to 1, and --margin, --min-height, --max-gap and "
            f"--confidence numbers of at least 0; got {', '.join(f'{x:g}' for x in (*shares, *sizes))}."
        )
    cuts = cut_tracklets(sources, args)
    splits = split_people(cuts, args.test, args.seed)
    boxes = hashlib.sha256(repr([(cut.folder, cut.boxes) for cut in cuts]).encode()).hexdigest()[:16]
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "sheet")}
    out = args.out.expanduser().resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.with_name(f".{out.name}.lock"), str(args.out)):
        check_settings(out, {**settings, "content of the boxes": boxes})
        written = write_tracklets(splits, out, args.margin, args.skip_unreadable)
        sheet = contact_sheet(splits, out, args.sheet, args.seed)
        replace_file(out / "contact_sheet.jpg", lambda temporary: write_jpeg(temporary, sheet, 90))
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
    common_arguments(parser)
    args = parser.parse_args(argv)
    try:
        if args.boxes and len(args.sequences) > 1:
            raise ValueError("--boxes goes with a single sequence.")
        twice = [s for s, count in Counter(s.expanduser().resolve() for s in args.sequences).items() if count > 1]
        if twice:
            raise ValueError(f"{twice[0]} is given twice: each of its people would become two.")
        make([Sequence(s.expanduser(), args.boxes, args) for s in args.sequences], args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{Path(__file__).name}: {error}") from error


if __name__ == "__main__":
    print_any_name()
    main()
