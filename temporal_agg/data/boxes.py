"""Boxes of people as trackers and label tools write them -> checked boxes, and their crops.

Text files in the way of MOTChallenge have a box a line and no header: frame, identity, left, top, width, height, and
then what each tool likes. What the columns are is said by the name of a layout (``LAYOUTS``) or as a list of their
names; unsaid, it is told from the content where only one layout fits. CSV files name their columns in the first line.

Everywhere -1 and an empty cell mean "unknown": a box whose identity is below 0 was not tracked and is left out, a
confidence, class or visibility below 0 says nothing against a box.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from .._files import read_number, read_text
from .readers import read_table

__all__ = ["LAYOUTS", "Box", "Boxes", "Layout", "crop", "people_in", "read_boxes"]

Corners = tuple[float, float, float, float]


class Box(NamedTuple):
    """In pixels; left and top from 0. Confidence and visibility are shares, None where unknown."""

    frame: int
    id: int
    left: float
    top: float
    width: float
    height: float
    confidence: float | None = None
    visibility: float | None = None

    @property
    def corners(self) -> Corners:
        """Left, top, right, bottom."""
        return self.left, self.top, self.left + self.width, self.top + self.height

    def share(self, other: Corners) -> float:
        """How much of the box another rectangle covers."""
        x1, y1, x2, y2 = self.corners
        shared = max(min(x2, other[2]) - max(x1, other[0]), 0) * max(min(y2, other[3]) - max(y1, other[1]), 0)
        return shared / (self.width * self.height)


class Layout(NamedTuple):
    """What the columns of a file are.

    Attributes:
        columns: their names; of the unnamed ones (``-``) nothing is read.
        origin: the number of the uppermost and leftmost pixel.
        first_frame: the number of the first frame.
        people: the classes that are people, where the layout says so.
    """

    columns: tuple[str, ...]
    origin: int = 1
    first_frame: int = 1
    people: tuple[int, ...] = ()


_PLACE = ("frame", "id", "left", "top", "width", "height")
_FLAGGED = (*_PLACE, "flag", "class")
LAYOUTS = {
    "mot-gt": Layout((*_FLAGGED, "visibility"), people=(1,)),  # ground truths of MOT16 and later, of CVAT
    "mot15-gt": Layout((*_PLACE, "flag", "-", "-", "-")),  # of MOT15: world coordinates at the end
    "mot": Layout((*_PLACE, "confidence", "-", "-", "-")),  # results of trackers: world coordinates, or -1
    "boxmot": Layout((*_PLACE, "confidence", "class", "detection"), origin=0),  # detection: its place in the frame
    "visdrone": Layout((*_FLAGGED, "truncation", "occlusion"), origin=0, people=(1, 2)),
}
NAMES: tuple[str, ...] = (*_PLACE, "right", "bottom", "confidence", "flag", "class", "visibility")
NAMES += ("truncation", "occlusion", "detection", "-")
ALIASES = {"track_id": "id", "conf": "confidence", "score": "confidence", "cls": "class", "class_id": "class"}
ALIASES |= {"bb_left": "left", "bb_top": "top", "bb_width": "width", "bb_height": "height"}
ALIASES |= {"x1": "left", "y1": "top", "x2": "right", "y2": "bottom"}
ALIASES |= {"x_min": "left", "y_min": "top", "x_max": "right", "y_max": "bottom", "tracker_id": "id"}
ALIASES |= dict.fromkeys(("frame_id", "frame_idx", "frame_index", "frame_number"), "frame")
CONFIDENT = ",".join((*_PLACE, "-", "class", "confidence"))  # of BoxMOT's evaluation, which has 1 where a flag is
VISIBLE = {0: 1.0, 1: 0.75, 2: 0.25}  # of VisDrone's occlusion: none, up to half, more


@dataclass
class Boxes:
    """What a file holds.

    Attributes:
        boxes: those that are people, by frame.
        layout: the layout's name, or the columns.
        first_frame: the number of the first frame, as the file counts.
        rows: how many boxes the file has.
        dropped: how many were left out, by reason.
    """

    boxes: list[Box]
    layout: str
    first_frame: int
    rows: int
    dropped: Counter[str] = field(default_factory=Counter)

    def report(self) -> str:
        """What was read, and what each filter has left out."""
        out = "".join(f"\n  left out: {n} {why}" for why, n in self.dropped.items() if n)
        return f"{self.rows} boxes, read as {self.layout}{out}"


def read_boxes(
    file: str | Path,
    columns: str | None = None,
    *,
    classes: Sequence[int] | None = None,
    confidence: float = 0.0,
    truth: bool = False,
) -> Boxes:
    """Reads a file of boxes: text in the way of MOTChallenge, or CSV with a header.

    Args:
        file: UTF-8, or UTF-16 with a mark; numbers separated by commas or white space, a CSV file by ``,;`` or tabs.
        columns: one of ``LAYOUTS``, or the names of the columns, separated by commas; None = as the header says, or
            told from the content.
        classes: the classes that are people; None = those that the layout has for them.
        confidence: the least one of a box, if it is known.
        truth: the file is known to be a ground truth, where two layouts fit.

    Raises:
        FileNotFoundError: no such file.
        ValueError: columns that cannot be told, a row that is none, no box of a person, several classes and nothing
            that says which are people; the message names the file, and the line.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}: expected boxes, frame,id,left,top,width,height in each line.")
    lines = [(number, line) for number, line in enumerate(read_text(file).split("\n"), 1) if line.strip()]
    lines = [(number, line) for number, line in lines if not line.lstrip().startswith("#")]
    if not lines:
        raise ValueError(f"{file} has no box: it is empty, missing frame, id, left, top, width and height.")
    named = _is_header(lines[0][1])
    told = columns is None and not named  # from the content
    if columns is None and named:
        rows, layout, name = _from_csv(file, lines[0][1])
    else:
        lines = lines[named:]  # the columns that were asked for count
        if not lines:
            raise ValueError(f"{file} has no box below its header.")
        rows = [(f"{file}, line {number}", _numbers(line, f"{file}, line {number}")) for number, line in lines]
        while min(len(values) for _, values in rows) > len(_PLACE) and all(
            math.isnan(values[-1]) for _, values in rows
        ):
            rows = [(where, values[:-1]) for where, values in rows]  # a comma at the end of each line
        name, layout = _layout(file, rows, columns, truth)
    found = Boxes([], name, layout.first_frame, len(rows))
    people = _classes(file, rows, layout, classes)
    for where, values in rows:
        box, why = _box(values, layout, people, confidence, where)
        if box is not None:
            found.boxes.append(box)
        else:
            found.dropped[why] += 1
    known = len({*found.boxes})
    found.boxes = _once(found.boxes, found.dropped)
    if told and len(found.boxes) < known / 2:
        raise ValueError(
            f"{file}: read as {name}, {known - len(found.boxes)} of {known} boxes are of somebody who has another box "
            "in that frame: the columns are others, the file has several cameras, or nobody was tracked. Say what the "
            "columns are by --columns, or make a file of each camera."
        )
    if not found.boxes:
        untracked = found.dropped[UNTRACKED]
        hint = " The boxes have no identity (id -1): run a tracker first." if untracked else ""
        if any(why.startswith(OTHER) for why in found.dropped):
            hint += " --classes says which are people, --columns what the columns are, if they are others."
        raise ValueError(f"{file} has no box of a person: {found.report()}.{hint}")
    return found


def people_in(
    boxes: Iterable[Box],
    size: tuple[int, int],
    dropped: Counter[str],
    *,
    visibility: float = 0.5,
    min_height: float = 48,
    occlusion: float = 0.5,
) -> list[Box]:
    """The boxes in which enough of a person can be seen.

    Args:
        boxes: of one camera.
        size: (width, height) of the frames.
        dropped: counts what is left out, by reason.
        visibility: the least visible share; never more than what lies in the frame.
        min_height: in pixels.
        occlusion: the greatest share behind one other person; who stands lower in the picture stands in front.
    """
    by_frame = defaultdict(list)
    for box in boxes:
        by_frame[box.frame].append(box)
    kept = []
    for own in by_frame.values():
        for box in own:
            inside = box.share((0, 0, *size))
            seen = inside if box.visibility is None else min(box.visibility, inside)
            front = (b for b in own if b.id != box.id and b.corners[3] > box.corners[3])
            if not inside:
                dropped["outside of the frame"] += 1
            elif seen < visibility:
                dropped[f"of a visibility below {visibility:g}"] += 1
            elif box.height < min_height:
                dropped[f"of a height below {min_height:g} pixels"] += 1
            elif max((box.share(b.corners) for b in front), default=0) > occlusion:
                dropped[f"of which more than {occlusion:g} is behind somebody"] += 1
            else:
                kept.append(box)
    return kept


def crop(image: Image.Image, box: Box, margin: float = 0.0) -> Image.Image:
    """What a box shows, with ``margin`` of its size more on each side, as far as the image goes; a pixel at least."""
    x1, y1, x2, y2 = box.corners
    dx, dy = margin * box.width, margin * box.height
    x1, x2 = (round(min(max(x, 0), image.width)) for x in (x1 - dx, x2 + dx))
    y1, y2 = (round(min(max(y, 0), image.height)) for y in (y1 - dy, y2 + dy))
    x1, y1 = min(x1, image.width - 1), min(y1, image.height - 1)
    return image.crop((x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)))


# ----------------------------------------------------------------------------------------------------------------------
# Rows and columns

UNTRACKED = "without an identity (id below 0)"
OTHER = "of other classes than "
Row = list[float]  # NaN: unknown


def _is_header(line: str) -> bool:
    return _number(re.split(r"[,;\s]", line.strip())[0].strip('"')) is None


def _number(word: str) -> float | None:
    try:
        return read_number(word)
    except ValueError:
        return None


def _numbers(line: str, where: str) -> Row:
    separator = next((mark for mark in ",;\t" if mark in line), None)
    words = [word.strip().strip('"') for word in line.split(separator)]
    values = [_number(word) if word else math.nan for word in words]
    if None in values or len(values) < len(_PLACE):
        raise ValueError(f"{where}: expected frame,id,left,top,width,height and so on, got {line[:80]!r}.")
    return [value for value in values if value is not None]


def _from_csv(file: Path, header: str) -> tuple[list[tuple[str, Row]], Layout, str]:
    named = {ALIASES.get(name, name) for name in (word.strip(' "') for word in re.split("[,;\t]", header.lower()))}
    required = (*_PLACE[:4], *(("right", "bottom") if "right" in named else ("width", "height")))
    rows: list[tuple[str, Row]] = []
    names: tuple[str, ...] = required
    for where, cells in read_table(file, required, ALIASES, comments=True):
        names = tuple(name if name in NAMES else "-" for name in cells)
        values = [
            math.nan if not cell or name == "-" else _number(cell)
            for name, cell in zip(names, cells.values(), strict=True)
        ]
        if None in values:
            raise ValueError(f"{where}: expected numbers, got {','.join(cells.values())[:80]!r}.")
        rows.append((where, [value for value in values if value is not None]))
    return rows, Layout(names, origin=0, first_frame=0), f"csv ({_listed(names)})"


def _listed(names: Iterable[str]) -> str:
    return ",".join(name for name in names if name != "-")


def _layout(file: Path, lines: list[tuple[str, Row]], columns: str | None, truth: bool) -> tuple[str, Layout]:
    rows = [row for _, row in lines]
    counts = Counter(map(len, rows))
    n = min(counts)
    if columns is not None:
        if columns in LAYOUTS:
            layout = LAYOUTS[columns]
            return columns, layout._replace(columns=layout.columns[: max(counts)])
        named = [ALIASES.get(name.strip(), name.strip()) for name in columns.split(",")]
        wanted = [name for name in named if name != "-"]
        place = {*_PLACE} <= {*named} or {*_PLACE[:4], "right", "bottom"} <= {*named}
        if not place or not {*named} <= {*NAMES} or len(wanted) > len({*wanted}):
            raise ValueError(
                f"columns must be one of {', '.join(LAYOUTS)}, or names separated by commas, each once: frame, id, "
                f"left, top, width and height (or right and bottom), of {', '.join(NAMES)}; got {columns!r}."
            )
        if n < len(named):
            raise ValueError(f"{file}: a line has {n} columns, and {len(named)} were named: {columns}.")
        return _listed(named), Layout(tuple(named))
    if len(counts) > 1:
        rare = min(counts, key=lambda count: counts[count])
        where = next(where for where, row in lines if len(row) == rare)
        raise ValueError(
            f"{where} has {rare} columns, the lines of the file have {n} to {max(counts)}: correct them, or say what "
            "the columns are by --columns."
        )
    fitting = [name for name, layout in LAYOUTS.items() if _fits(rows, layout.columns)]
    if n <= 7 or (
        n <= 10 and not any(value >= 0 for row in rows for value in row[7:])
    ):  # nothing known behind the seventh
        fitting = [name for name in ("mot-gt" if n < 10 else "mot15-gt", "mot") if name == "mot" or name in fitting]
        fitting = fitting[:1] if truth else ["mot"]
    elif n == 10:
        ground_truth = any(row[6] == 0 or row[7] > 1 for row in rows)  # of no tracker's result
        unlikely = {"mot-gt", "boxmot", "mot15-gt" if "visdrone" in fitting or not truth else "mot"}
        unlikely |= {"mot"} if ground_truth and "visdrone" in fitting else set()
        fitting = [name for name in fitting if name not in unlikely]
    elif {"mot-gt", "boxmot"} <= {*fitting}:
        same = truth or n == 8 or all(row[8] == 1 for row in rows)  # visible, or the second detection: kept
        fitting = ["mot-gt"] if same else ["mot-gt", "boxmot"]
    else:
        fitting = [name for name in fitting if name in ("mot-gt", "boxmot")]
        if fitting == ["mot-gt"] and not truth and all(row[6] == 1 and 0 < row[-1] < 1 for row in rows):
            fitting.append(CONFIDENT)  # nobody is seen whole, or to be ignored: a tracker is never quite sure
    if n > 10 or len(fitting) != 1:
        can = f"can be {' or '.join(fitting)}" if fitting and n <= 10 else "are of no known layout"
        known = "; ".join(f"{name} = {','.join(layout.columns)}" for name, layout in LAYOUTS.items())
        raise ValueError(
            f"{file}: its {n} columns {can}. Say what they are by --columns: a name or a list of columns, '-' for "
            f"those that say nothing ({known})."
        )
    layout = LAYOUTS[fitting[0]]
    used = layout.columns[:n]
    return f"{fitting[0]} ({_listed(used)})", layout._replace(columns=used)


FITS: dict[str, Callable[[float], bool]] = {
    "flag": lambda value: value in (0, 1),
    "class": lambda value: value >= -1 and value == int(value),
    "visibility": lambda value: value == -1 or 0 <= value <= 1,
    "detection": lambda value: value >= -1 and value == int(value),
    "truncation": lambda value: value in (-1, 0, 1),
    "occlusion": lambda value: value in (-1, 0, 1, 2),
}


def _fits(rows: list[Row], columns: tuple[str, ...]) -> bool:
    """Whether the values can be what a layout has in its columns."""
    for row in rows:
        for column, value in zip(columns[6:], row[6:], strict=False):
            if not math.isnan(value) and not (math.isfinite(value) and FITS.get(column, math.isfinite)(value)):
                return False
    if "detection" not in columns[: len(rows[0])]:
        return True
    at = columns.index("detection")  # each comes once in a frame
    places = [(row[0], row[at]) for row in rows if row[at] >= 0]
    return len({*places}) == len(places)


def _classes(file: Path, rows: list[tuple[str, Row]], layout: Layout, classes: Sequence[int] | None) -> set[int] | None:
    """The classes that are people; None = all."""
    if "class" not in layout.columns:
        if classes is not None:
            raise ValueError(f"{file} has no column that is a class: leave --classes out, or say --columns.")
        return None
    if classes is not None or layout.people:
        return set(layout.people if classes is None else classes)
    at = layout.columns.index("class")
    present = sorted({int(values[at]) for _, values in rows if at < len(values) and values[at] >= 0})
    if len(present) > 1:
        raise ValueError(
            f"{file} has boxes of the classes {', '.join(map(str, present))}: say which are people by --classes."
        )
    return None


def _box(values: Row, layout: Layout, people: set[int] | None, confidence: float, where: str) -> tuple[Box | None, str]:
    """The box of a row, or why it is left out."""
    row = dict(zip(layout.columns, values, strict=False))
    row["right"] = row.get("right", row["left"] + row.get("width", 0))
    row["bottom"] = row.get("bottom", row["top"] + row.get("height", 0))
    row["id"] = -1 if math.isnan(row["id"]) else row["id"]  # an empty cell
    place = [row[name] for name in ("frame", "id", "left", "top", "right", "bottom")]
    frame, track, left, top, right, bottom = place
    if not all(map(math.isfinite, place)) or frame != int(frame) or track != int(track) or abs(track) > 2**53:
        raise ValueError(
            f"{where}: frame and id must be integers, and the box finite, got frame {frame:g}, id {track:g}, left "
            f"{left:g}, top {top:g}, right {right:g}, bottom {bottom:g}."
        )

    def known(name: str) -> float | None:
        value = row.get(name, -1)
        return value if value >= 0 else None  # NaN is not

    kind, sure, visibility, hidden = known("class"), known("confidence"), known("visibility"), known("occlusion")
    if hidden is not None:
        visibility = VISIBLE.get(int(hidden), 1.0)
    if track < 0:
        return None, UNTRACKED
    if row.get("flag") == 0:
        return None, "to be ignored (flag 0)"
    if people is not None and kind is not None and kind not in people:
        return None, OTHER + ", ".join(map(str, sorted(people)))
    if right <= left or bottom <= top:
        return None, "without an area"
    if right - left < 1 or bottom - top < 1:
        return None, "of less than a pixel (shares of the picture are no pixels: multiply them by its size)"
    if sure is not None and sure < confidence:
        return None, f"of a confidence below {confidence:g}"
    left, top = left - layout.origin, top - layout.origin
    size = right - layout.origin - left, bottom - layout.origin - top
    return Box(int(frame), int(track), left, top, *size, sure, visibility), ""


def _once(boxes: list[Box], dropped: Counter[str]) -> list[Box]:
    """One box of a person in a frame, the most certain and then the first one; sorted by frame."""
    best: dict[tuple[int, int], Box] = {}
    for box in boxes:
        key = box.frame, box.id
        if key in best:
            dropped["of somebody who has another box in that frame"] += 1
        if key not in best or (box.confidence or 0) > (best[key].confidence or 0):
            best[key] = box
    return sorted(best.values(), key=lambda box: (box.frame, box.id))
