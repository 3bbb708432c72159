"""Files -> :class:`TrackletData`: the layouts for one's own tracklets, and repeated identity splits."""

import csv
import io
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .._files import read_text
from .images import IMAGE_SUFFIXES, is_image
from .sampling import CPU
from .tracklet import IDS, Tracklet, TrackletData, check_ids, distinct

__all__ = ["identity_splits", "read_csv", "read_folder"]

SPLITS = ("train", "query", "gallery")
COLUMNS = ("split", "pid", "camera", "tracklet", "path")
NOT_DATA = (".", "@", "__")  # what systems and archives leave behind: the beginnings of their folders' names
LAYOUT = "<root>/{train,query,gallery}/<pid>/<camera>_<tracklet>/<frame>.jpg"

_logger = logging.getLogger(__name__)


def read_folder(root: str | Path) -> TrackletData:
    """Reads ``<root>/{train,query,gallery}/<pid>/<camera>_<tracklet>/*.jpg|png``.

    ``pid`` and ``camera`` are integers from 0 (pid -1: junk, which is not trained on and ignored in an evaluation;
    camera -1: unknown), ``tracklet`` is any text. The frames of a tracklet are sorted by the numbers in their names
    (``9.jpg`` before ``10.jpg``). Hidden files and files that are no images are left out. A set may have only
    ``train``, or only ``query`` and ``gallery``. ``~`` is the home directory.

    Raises:
        FileNotFoundError: no such folder, or none of the three splits in it.
        ValueError: a folder whose name does not fit or that holds no image.
    """
    root = Path(os.path.expanduser(root))
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: expected {LAYOUT}. Check the path.")
    found = [split for split in SPLITS if (root / split).is_dir()]
    if not found or ("query" in found) != ("gallery" in found):
        missing = " and ".join(str(root / split) for split in SPLITS if split not in found)
        raise FileNotFoundError(
            f"no folder {missing}: expected {LAYOUT}, with train, with query and gallery, or with all three."
        )
    data = {split: list(_folder_tracklets(root / split)) for split in found}
    for split, tracklets in data.items():
        if not tracklets:
            raise ValueError(f"{root / split} holds no tracklet: expected {LAYOUT}. Fill the folder or remove it.")
    train, query, gallery = (data.get(split, []) for split in SPLITS)
    return TrackletData(train, query, gallery, str(root))


def _folder_tracklets(split: Path) -> Iterator[Tracklet]:
    for person in _subfolders(split):
        if not re.fullmatch(r"-?\d+", person.name):
            raise ValueError(
                f"{person} should be named by an identity, an integer such as 0012: expected {LAYOUT}. Rename it."
            )
        tracklets = _subfolders(person)
        if not tracklets:
            raise ValueError(f"{person} holds no tracklet: expected {LAYOUT}. Fill the folder or remove it.")
        for folder in tracklets:
            match = re.fullmatch(r"(-?\d+)_(.+)", folder.name)
            if not match:
                raise ValueError(
                    f"{folder} should be named <camera>_<tracklet>, such as 2_0001 (-1_0001: camera unknown): "
                    f"expected {LAYOUT}. Rename it."
                )
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries]
            images = [name for name in names if is_image(name)]
            if not images:
                raise ValueError(
                    f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)}): a tracklet needs at least one frame. "
                    "Fill the folder or remove it."
                )
            if len(images) < len(names):
                _logger.debug("%s: left out %d entries that are no images", folder, len(names) - len(images))
            frames = [folder / name for name in sorted(images, key=frame_order)]
            name = f"{split.name}/{person.name}/{folder.name}"
            pid, camera = int(person.name), int(match[1])
            check_ids(pid, camera, str(folder))
            yield Tracklet(frames, pid, camera, name)


def _subfolders(folder: Path) -> list[Path]:
    """The folders in ``folder`` in natural order; images beside them mean that a level is missing."""
    with os.scandir(folder) as listing:
        entries = list(listing)
    for entry in entries:
        if entry.is_file() and is_image(entry.name):
            raise ValueError(f"the image {entry.path} lies where only folders are expected: the layout is {LAYOUT}.")
    names = [e.name for e in entries if e.is_dir() and not e.name.startswith(NOT_DATA)]
    return [folder / name for name in sorted(names, key=frame_order)]


def frame_order(name: str) -> list[str | int]:
    """Sort key that compares the numbers in a name as numbers."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def read_csv(file: str | Path) -> TrackletData:
    """Reads a CSV file with the columns ``split,pid,camera,tracklet,path``: one row a frame, in order.

    ``split`` is train, query or gallery; paths are relative to the folder of the CSV file; pid and camera as in
    :func:`read_folder`. Rows with the same split, pid, camera and tracklet are one tracklet. The file is UTF-8, or
    UTF-16 with a mark; columns may be separated by commas, semicolons or tabs, as spreadsheets do.

    Raises:
        FileNotFoundError: no such file, or a row whose image does not exist.
        ValueError: a missing column, or a row with a wrong value (the message has its line).
    """
    file = Path(os.path.expanduser(file))
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}: expected a CSV file with the columns {','.join(COLUMNS)}.")
    tracklets: dict[tuple[str, int, int, str], list[Path]] = {}
    for where, row in read_table(file, COLUMNS):
        key, name = _csv_row(row, where)
        path = file.parent / name
        if not os.path.exists(path):
            raise FileNotFoundError(f"{where}: no image {path} (paths are relative to the CSV file's folder).")
        tracklets.setdefault(key, []).append(path)
    if not tracklets:
        raise ValueError(f"{file} has no row below its header: expected one row a frame.")
    data: dict[str, list[Tracklet]] = {split: [] for split in SPLITS}
    for (split, pid, camera, tracklet), frames in tracklets.items():
        data[split].append(Tracklet(frames, pid, camera, f"{split}/{pid}/{camera}_{tracklet}"))
    return TrackletData(data["train"], data["query"], data["gallery"], str(file))


def read_table(
    file: Path, columns: Sequence[str], aliases: Mapping[str, str] | None = None, comments: bool = False
) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV file below its header, which must name ``columns``: where each is, and its cells by column.

    Cells are stripped of white space; those that a row lacks are "". Names of columns are read in any case, and by
    their ``aliases``; ``comments``: lines that begin with # say nothing.

    Raises:
        ValueError: no such header, or what is no CSV; the message names file and line.
    """
    text = read_text(file)
    if comments:
        text = re.sub(r"^[ \t]*#.*$", "", text, flags=re.MULTILINE)
    header = text.lstrip("\n").partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    names: list[str] | None = None
    try:
        for cells in reader:
            if not any(map(str.strip, cells)):
                continue
            if names is None:
                names = [(aliases or {}).get(name, name) for name in (cell.strip().lower() for cell in cells)]
                _check_header(file, names, columns)
                continue
            row = dict(zip(names, map(str.strip, cells), strict=False))
            yield f"{file}, line {reader.line_num}", {**dict.fromkeys(names, ""), **row}
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}. Is a quotation mark left open?") from error
    if names is None:
        _check_header(file, [], columns)


def _check_header(file: Path, names: Sequence[str], columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in names]
    if missing:
        found = ",".join(names) or "an empty file"
        raise ValueError(
            f"{file}: the first line should name the columns {','.join(columns)}, separated by commas, semicolons or "
            f"tabs; missing {', '.join(missing)} in {found[:200]!r}."
        )


def _csv_row(row: dict[str, str], where: str) -> tuple[tuple[str, int, int, str], str]:
    split, pid, camera, tracklet, path = (row[column] for column in COLUMNS)
    if split not in SPLITS:
        raise ValueError(f"{where}: split must be one of {', '.join(SPLITS)}, got {split[:40]!r}.")
    ids = {}
    for column, value in (("pid", pid), ("camera", camera)):
        if not re.fullmatch(r"-?\d+", value):
            hint = " (-1: unknown)" if column == "camera" else ""
            raise ValueError(f"{where}: {column} must be an integer{hint}, got {value[:40]!r}.")
        ids[column] = int(value) if len(value) < 1000 else IDS  # Python reads some thousand digits at most
    check_ids(ids["pid"], ids["camera"], where)
    if not path:
        raise ValueError(f"{where}: path is empty; expected an image file.")
    return (split, ids["pid"], ids["camera"], tracklet), path


def identity_splits(data: TrackletData, k: int, seed: int = 0) -> list[TrackletData]:
    """Splits a small data set ``k`` times into random halves of its identities, one to train on and one to test on.

    The tracklets of all its splits are pooled, copies and links of one once (:func:`query_index`). A test identity's
    tracklets of its first camera become queries, the others gallery (where cameras are unknown: its first tracklet is
    the query). An identity that could not be matched (one tracklet, or one camera while the set has several) is only
    ever trained on; junk (pid -1) is left out. A set from a single camera is taken as one with unknown cameras, since
    an evaluation ignores the same camera.

    Args:
        data: the set; it need not have all three splits.
        k: how many splits; a smaller ``k`` gives the first ones of a larger.
        seed: draws them.

    Raises:
        ValueError: k < 1, or fewer than four identities that can be matched.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    tracklets = distinct(t for t in (*data.train, *data.query, *data.gallery) if t.pid >= 0)
    if len({t.camera for t in tracklets}) == 1:
        tracklets = [replace(t, camera=-1) for t in tracklets]
    people: dict[int, list[Tracklet]] = {}
    for t in tracklets:
        people.setdefault(t.pid, []).append(t)

    def can_match(own: list[Tracklet]) -> bool:
        return len(own) > 1 and (own[0].camera == -1 or len({t.camera for t in own}) > 1)

    matched = sorted(pid for pid, own in people.items() if can_match(own))
    if len(matched) < 4:
        raise ValueError(
            f"identity splits need at least 4 identities with tracklets in two cameras (or two tracklets where cameras "
            f"are unknown); data set {data.name!r} has {len(matched)}."
        )
    alone = [t for pid in sorted(people.keys() - set(matched)) for t in people[pid]]
    generator = torch.Generator(device=CPU).manual_seed(seed)
    splits = []
    for i in range(k):
        order = [matched[j] for j in torch.randperm(len(matched), generator=generator, device=CPU).tolist()]
        half = len(order) // 2
        train = [t for pid in sorted(order[:half]) for t in people[pid]] + alone
        query, gallery = [], []
        for pid in sorted(order[half:]):
            own = sorted(people[pid], key=lambda t: t.camera)
            first = sum(t.camera == own[0].camera for t in own) if own[0].camera != -1 else 1
            query += own[:first]
            gallery += own[first:]
        splits.append(TrackletData(train, query, gallery, f"{data.name}, identity split {i + 1} of {k}"))
    return splits
