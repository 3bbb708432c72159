"""The video re-identification benchmarks on disk -> :class:`TrackletData`, in their authors' layouts. None is shipped.

All readers take ``check_counts``: False reads a copy whose counts differ from the published ones (a subset, say), which
they otherwise refuse; what was found is logged beside what was published. And ``cache``: False neither reads nor writes
the index of the frames, which is kept in ``$TEMPORAL_AGG_CACHE`` (else ``$XDG_CACHE_HOME/temporal-agg``, else
``~/.cache/temporal-agg``) and used until one of the folders or list files that it was made from changes.

All raise ``FileNotFoundError`` for a missing file or folder, ``ValueError`` for what does not fit (a name, a row, a
count) and ``ImportError`` where the ``benchmarks`` extra is missing; the messages name the path.
"""

import logging
import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence, Sized
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .._files import read_json
from .disk import AGAIN, Disk, Parts, files_of, matrix
from .images import is_image
from .readers import SPLITS
from .sampling import CPU
from .tracklet import Tracklet, TrackletData

__all__ = ["read_duke", "read_duke_si", "read_ilids_vid", "read_ls_vid", "read_mars", "read_prid2011", "read_ward"]

_logger = logging.getLogger(__name__)


class _Published(NamedTuple):
    title: str
    layout: str
    frames: str  # per tracklet; rounded, and counted in more than one way, hence logged but not checked
    counts: dict[str, int]


PUBLISHED = {
    "mars": _Published(
        "MARS",
        "<root>/{bbox_train,bbox_test}/0001/0001C1T0001F001.jpg and <root>/info/{train_name.txt,test_name.txt,"
        "tracks_train_info.mat,tracks_test_info.mat,query_IDX.mat}",
        "2-920, mean 58",
        {
            "lines of info/train_name.txt": 509_914, "lines of info/test_name.txt": 681_089,
            "training tracklets": 8_298, "training identities": 625, "test tracklets": 12_180,
            "junk tracklets": 870, "distractor tracklets": 3_248, "test identities": 634, "queries": 1_980,
            "query identities": 626, "gallery tracklets": 11_310, "gallery tracklets without the queries": 9_330,
            "cameras": 6,
        },
    ),
    "duke": _Published(
        "DukeMTMC-VideoReID",
        "<root>/{train,query,gallery}/0001/0001/0001_C6_F0099_X30823.jpg",
        "mean 168, longest 9,324",
        {
            "training tracklets": 2_196, "training identities": 702, "queries": 702, "query identities": 702,
            "queries in the gallery": 702, "gallery tracklets": 2_636, "gallery identities": 1_110,
            "distractor identities": 408, "cameras": 8,
        },
    ),
    "duke-si": _Published(
        "Duke-SI",
        "<root>/{train,query,gallery}/0001/abc0001/c6_030823.jpg",
        "unknown",
        {
            "training tracklets": 5_803, "training identities": 702, "queries": 701, "gallery tracklets": 6_143,
            "test identities": 1_086,
        },
    ),
    "ilids-vid": _Published(
        "iLIDS-VID",
        "<root>/i-LIDS-VID/sequences/{cam1,cam2}/person001/*.png and "
        "<root>/train-test people splits/train_test_splits_ilidsvid.mat",
        "23-192, mean 73",
        {"persons": 300, "tracklets": 600, "splits": 10, "persons in a split": 300},
    ),
    "prid-2011": _Published(
        "PRID-2011",
        "<root>/prid_2011/multi_shot/{cam_a,cam_b}/person_0001/0001.png, or without prid_2011",
        "5-675, mean 100",
        {"splits": 10, "persons in use": 178},
    ),
    "ls-vid": _Published(
        "LS-VID",
        "<root>/list_sequence/list_seq_{train,val,test}.txt and <root>/test/data/info_test.mat (or below <root>/info: "
        "list_sequence/, data/), and the images that the lists name",
        "mean 200",
        {
            "training tracklets": 2_831, "training identities": 842, "validation tracklets": 779,
            "validation identities": 200, "test tracklets": 11_333, "test identities": 2_730, "queries": 3_504,
            "cameras": 15,
        },
    ),
    "ward": _Published(
        "WARD",
        "<root>/toolbox/Datasets/WARD/000100010001.png (root may be that folder)",
        "10-66, mean 23",
        {"persons": 70, "cameras": 3, "tracklets": 210, "frames": 4_786},
    ),
}  # fmt: skip

# File names. The first groups say whose tracklet it is, the others are the place in it (Disk.in_order).
_MARS = re.compile(r"^(\d{4}|00-1)C(\d)T(\d+)F(\d+)\.\w+$", re.MULTILINE)
_DUKE = re.compile(r"^(\d+)_?C(\d+)_?F(\d+)_?[XD](\d+)\.\w+$", re.MULTILINE)
_DUKE_SI = re.compile(r"^[^\n](\d)[^_\n]*_(\d+)\.\w+$", re.MULTILINE)
_NUMBERED = re.compile(r"^(.*?)(\d+)\.\w+$", re.MULTILINE)
_LS_VID = re.compile(r"^[^_\n]*_[^_\n]*_(\d+)_.*?(\d+)\.\w+$", re.MULTILINE)
_WARD = re.compile(r"^(\d{4})(\d{4})(\d{4})\.\w+$", re.MULTILINE)

_NOT_REFUSED = {"persons in use"}  # copies of PRID-2011 differ in it
_PRID_PAIRED = 200  # PRID-2011: up to here a number is one person in both cameras, above it two persons
_PRID_MIN_FRAMES = 22


def read_mars(
    root: str | Path,
    *,
    queries_in_gallery: bool = True,
    labels: str = "original",
    check_counts: bool = True,
    cache: bool = True,
) -> TrackletData:
    """Reads MARS (Zheng et al., ECCV 2016).

    The gallery is every test tracklet but the junk (person folder ``00-1``): 11,310, queries and distractors (``0000``,
    pid 0) included. ``bbox_train/bbox_train/`` and ``bbox_test/bbox_test/`` are read, too.

    Args:
        root: the folder with ``bbox_train``, ``bbox_test`` and ``info``.
        queries_in_gallery: False leaves the queries out of the gallery (9,330 tracklets), as some codebases do; 140
            queries then have no match, which ``evaluate`` counts as ``queries_without_match``.
        labels: ``original``, or ``corrected``: the test identities of ``info/clean_tracks_test_info.mat`` (CF-AAN, CVPR
            workshops 2021; also found in ``root`` itself), and ``Tracklet.ambiguous_pid`` where it names somebody else
            who is seen as well. Queries that are nobody's by these are left out. Counts that the labels change are not
            compared.
        check_counts: see the module docstring, as for ``cache``.
    """
    if labels not in ("original", "corrected"):
        raise ValueError(f"labels must be 'original' or 'corrected', got {labels!r}.")
    corrected = labels == "corrected"
    disk = _Benchmark("mars", root, cache, "-corrected" if corrected else "")
    train, test = disk.index(partial(_index_mars, corrected=corrected)).values()
    query = disk.rows(test, "info/query_IDX.mat", "query_IDX")
    queries = len(query)
    nobody = [t.name for t in query if t.pid <= 0]
    if nobody and corrected:
        _logger.info("%s: %d queries are nobody's by the corrected labels and left out.", disk.root, len(nobody))
        query = [t for t in query if t.pid > 0]
    elif nobody:
        raise ValueError(f"{disk.at('info/query_IDX.mat')}: the query {nobody[0]} is junk or a distractor. {AGAIN}")
    left_out = set() if queries_in_gallery else set(map(id, query))
    gallery = [t for t in test if t.pid >= 0 and id(t) not in left_out]
    counts = {
        "training tracklets": len(train),
        "training identities": _distinct("pid", train),
        "test tracklets": len(test),
        "junk tracklets": sum(t.pid < 0 for t in test),
        "distractor tracklets": sum(t.pid == 0 for t in test),
        "test identities": len({t.pid for t in test if t.pid > 0}),
        "queries": queries,
        "query identities": _distinct("pid", query),
        "gallery tracklets" if queries_in_gallery else "gallery tracklets without the queries": len(gallery),
        "cameras": _distinct("camera", train, test),
    }
    if corrected:
        for what in ("junk tracklets", "distractor tracklets", "test identities", "query identities"):
            del counts[what]
        counts = {what: n for what, n in counts.items() if not what.startswith("gallery")}
    return disk.finish(train, query, gallery, counts, check_counts, ", corrected labels" if corrected else "")


def _index_mars(disk: Disk, corrected: bool) -> Parts:
    parts: Parts = {"train": [], "test": []}
    for part, tracklets in parts.items():
        lists, info = f"info/{part}_name.txt", f"info/tracks_{part}_info.mat"
        lines = disk.text(lists).split()
        disk.found[f"lines of {lists}"] = len(lines)
        if corrected and part == "test":
            info = disk.find("info/clean_tracks_test_info.mat", "clean_tracks_test_info.mat")
            rows = matrix(disk.at(info), None, columns=6)
        else:
            rows = matrix(disk.at(disk.find(info)), f"track_{part}_info", columns=4)
            rows = np.column_stack([rows, rows[:, 2], np.zeros(len(rows), np.int64)])
        images, folder, present = disk.find(f"bbox_{part}/bbox_{part}", f"bbox_{part}"), "", set[str]()
        for number, (first, last, pid, camera, counts, other) in enumerate(rows.tolist(), 1):
            where = f"{disk.at(info)}, row {number}"
            if not 1 <= first <= last <= len(lines):
                raise ValueError(
                    f"{where}: frames {first} to {last} are not among the {len(lines):,} lines of {disk.at(lists)}. "
                    f"{AGAIN}"
                )
            names, said = disk.in_order(lines[first - 1 : last], _MARS, 2, f"{disk.at(lists)}, lines {first}-{last}")
            if (-1 if said[0] == "00-1" else int(said[0]), int(said[1])) != (pid, camera):
                raise ValueError(f"{where} says pid {pid} and camera {camera}, but names the file {names[0]}. {AGAIN}")
            if folder != f"{images}/{said[0]}":
                folder = f"{images}/{said[0]}"
                present = set(os.listdir(disk.at(disk.find(folder))))
            if not present.issuperset(names):
                missing = [name for name in names if name not in present]
                raise FileNotFoundError(
                    f"no image {disk.at(folder)}/{missing[0]}, nor {len(missing) - 1} others of its tracklet, though "
                    f"{disk.at(lists)} lists them. {AGAIN}"
                )
            if counts < -1:
                raise ValueError(f"{where}: the new pid {counts} is none: expected -1 (junk) or more. {AGAIN}")
            name = f"{part}/{names[0].partition('F')[0]}"
            tracklets.append(disk.tracklet(folder, names, counts, camera, name, other if other > 0 else None))
    return parts


def read_duke(root: str | Path, *, check_counts: bool = True, cache: bool = True) -> TrackletData:
    """Reads DukeMTMC-VideoReID (Wu et al., CVPR 2018): ``{train,query,gallery}/<pid>/<tracklet>/*.jpg``.

    The queries are part of the gallery. Names without underscores (older copies) and with ``D`` for ``X`` (distractors)
    are read; frame numbers may have gaps. Its authors have withdrawn the data set: this is for those who hold it.
    """
    disk = _Benchmark("duke", root, cache)
    train, query, gallery = disk.index(_index_duke).values()

    def key(t: Tracklet) -> tuple:
        return (*t.name.split("/")[1:], t.camera, files_of(t).names.tobytes())

    copies = {key(t): t for t in gallery}
    query = [copies.get(key(t), t) for t in query]
    persons = {t.pid for t in query}
    counts = {
        "training tracklets": len(train),
        "training identities": _distinct("pid", train),
        "queries": len(query),
        "query identities": len(persons),
        "queries in the gallery": len(set(map(id, query)) & set(map(id, gallery))),
        "gallery tracklets": len(gallery),
        "gallery identities": _distinct("pid", gallery),
        "distractor identities": len({t.pid for t in gallery} - persons),
        "cameras": _distinct("camera", train, query, gallery),
    }
    return disk.finish(train, query, gallery, counts, check_counts)


def _index_duke(disk: Disk) -> Parts:
    parts: Parts = {part: [] for part in SPLITS}
    for part, tracklets in parts.items():
        for person in disk.folders(part, r"\d+"):
            for folder in (f"{part}/{person}/{name}" for name in disk.folders(f"{part}/{person}", r"\d+")):
                names, (pid, camera) = disk.images(folder, _DUKE, 2)
                if int(pid) != int(person):
                    raise ValueError(
                        f"{disk.at(folder)}/{names[0]} is of person {pid}, its folder of {person}. {AGAIN}"
                    )
                tracklets.append(disk.tracklet(folder, names, int(pid), int(camera), folder))
    return parts


def read_duke_si(root: str | Path, *, check_counts: bool = True, cache: bool = True) -> TrackletData:
    """Reads Duke-SI (1,788 persons, 12,647 tracklets): ``{train,query,gallery}/<pid>/<tracklet>/c6_030823.jpg``.

    As its author's loader reads it: the second character of a file's name is the camera, the number behind ``_`` orders
    the frames. Tracklet folders of query and gallery are named by three characters and a number, those of train by
    anything. The queries are not in the gallery.
    """
    disk = _Benchmark("duke-si", root, cache)
    train, query, gallery = disk.index(_index_duke_si).values()
    counts = {
        "training tracklets": len(train),
        "training identities": _distinct("pid", train),
        "queries": len(query),
        "gallery tracklets": len(gallery),
        "test identities": _distinct("pid", query, gallery),
    }
    return disk.finish(train, query, gallery, counts, check_counts)


def _index_duke_si(disk: Disk) -> Parts:
    parts: Parts = {part: [] for part in SPLITS}
    for part, tracklets in parts.items():
        for person in disk.folders(part, r"\d+"):
            for name in disk.folders(f"{part}/{person}", r".+" if part == "train" else r".{3}\d+"):
                folder = f"{part}/{person}/{name}"
                names, (camera,) = disk.images(folder, _DUKE_SI, 1)
                tracklets.append(disk.tracklet(folder, names, int(person), int(camera), folder))
    return parts


def read_ilids_vid(
    root: str | Path, split: int = 0, *, swap_halves: bool = False, check_counts: bool = True, cache: bool = True
) -> TrackletData:
    """Reads iLIDS-VID (Wang et al., ECCV 2014). Queries are from cam1, the gallery is from cam2.

    Args:
        root: the folder with ``i-LIDS-VID`` and ``train-test people splits``.
        split: 0 to 9; results are the mean and standard deviation over all ten.
        swap_halves: the first half of a split's persons is tested on and the last half trained on; True swaps them
            (published codebases disagree).
        check_counts: see the module docstring, as for ``cache``.
    """
    disk = _Benchmark("ilids-vid", root, cache)
    base = disk.find("i-LIDS-VID/sequences")
    first, second = disk.index(partial(_index_pairs, base=base, cameras=("cam1", "cam2"))).values()
    alone = sorted({t.pid for t in first} ^ {t.pid for t in second})
    if alone:
        raise ValueError(f"{disk.at(base)}: person {alone[0]} is in one of cam1 and cam2 only. {AGAIN}")
    file = disk.at(disk.find("train-test people splits/train_test_splits_ilidsvid.mat"))
    splits = matrix(file, "ls_set")
    places = splits[disk.split(splits, split)] - 1
    if len(set(places.tolist())) < len(places) or places.min() < 0 or places.max() >= len(first):
        raise ValueError(
            f"{file}, row {split + 1}: expected places among the {len(first)} person folders, each once, got places "
            f"from {places.min() + 1} to {places.max() + 1}, {len(set(places.tolist()))} of {len(places)} different. "
            f"{AGAIN}"
        )
    half = len(places) // 2
    test, train = (places[half:], places[:half]) if swap_halves else (places[:half], places[half:])
    counts = {
        "persons": len(first),
        "tracklets": len(first) + len(second),
        "splits": len(splits),
        "persons in a split": len(places),
    }
    return disk.finish(*_paired(first, second, train, test), counts, check_counts, f", split {split}")


def read_prid2011(root: str | Path, split: int = 0, *, check_counts: bool = True, cache: bool = True) -> TrackletData:
    """Reads PRID-2011 (Hirzer et al., SCIA 2011). Queries are from cam_a, the gallery is from cam_b.

    The persons above 200 are left out: beyond, equal numbers are different persons in the two cameras.
    ``<root>/splits_prid2011.json`` may list the ten splits: ``[{"train": [person folders], "test": [...]}, ...]``.
    Without it they are drawn, always the same: halves of the persons who are in both cameras with more than 21 frames
    in each. How many these are is logged, and any number is taken.

    Args:
        root: the folder with ``prid_2011/multi_shot`` or ``multi_shot``.
        split: 0 to 9; results are the mean and standard deviation over all ten.
        check_counts: see the module docstring, as for ``cache``; here it is the number of splits in the json file.
    """
    disk = _Benchmark("prid-2011", root, cache)
    base = disk.find("prid_2011/multi_shot", "multi_shot")
    first, second = disk.index(partial(_index_pairs, base=base, cameras=("cam_a", "cam_b"))).values()
    in_second = {t.pid: t for t in second}
    first = [t for t in first if t.pid in in_second and t.pid <= _PRID_PAIRED]
    second = [in_second[t.pid] for t in first]
    file = disk.at("splits_prid2011.json")
    if os.path.exists(file):
        splits = _json_splits(file, {t.name.partition("/")[2]: i for i, t in enumerate(first)})
    else:
        usable = [
            i for i, pair in enumerate(zip(first, second, strict=True)) if min(map(len, pair)) >= _PRID_MIN_FRAMES
        ]
        if len(usable) < 2:
            raise ValueError(
                f"{disk.at(base)}: a split needs 2 persons or more with more than 21 frames in both cameras, found "
                f"{len(usable)}. {AGAIN}"
            )
        splits = _halves(usable)
    train, test = splits[disk.split(splits, split)]
    counts = {"splits": len(splits), "persons in use": len(train) + len(test)}
    return disk.finish(*_paired(first, second, train, test), counts, check_counts, f", split {split}")


def _halves(items: Sequence[int], count: int = 10) -> list[tuple[list[int], list[int]]]:
    """Random halves of the items, always the same."""
    generator = torch.Generator(device=CPU).manual_seed(0)
    orders = [torch.randperm(len(items), generator=generator, device=CPU).tolist() for _ in range(count)]
    half = len(items) // 2
    return [([items[i] for i in order[:half]], [items[i] for i in order[half:]]) for order in orders]


def _json_splits(file: str, places: dict[str, int]) -> list[tuple[list[int], list[int]]]:
    listed = read_json(file, list)
    try:
        splits = [
            ([places[person] for person in split["train"]], [places[person] for person in split["test"]])
            for split in listed
        ]
        if not splits or any(not train or not test for train, test in splits):
            raise ValueError("no split, or one with an empty half")
        if any(len({*train, *test}) < len(train) + len(test) for train, test in splits):
            raise ValueError("a person who is listed twice in one split")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{file}: expected [{{"train": [...], "test": [...]}}, ...] with the names of person folders up to '
            f"{_PRID_PAIRED} that are in both cameras, got {error!r}. Correct or remove the file."
        ) from error
    return splits


def _index_pairs(disk: Disk, base: str, cameras: Sequence[str]) -> Parts:
    parts: Parts = {camera: [] for camera in cameras}
    for number, (camera, tracklets) in enumerate(parts.items(), 1):
        for person in disk.folders(f"{base}/{camera}", r"person_?\d+"):
            folder = f"{base}/{camera}/{person}"
            names, _ = disk.images(folder, _NUMBERED, 1)
            pid = int(person.removeprefix("person").removeprefix("_"))
            tracklets.append(disk.tracklet(folder, names, pid, number, f"{camera}/{person}"))
    return parts


def _paired(
    first: list[Tracklet], second: list[Tracklet], train: Iterable[int], test: Iterable[int]
) -> tuple[list[Tracklet], list[Tracklet], list[Tracklet]]:
    """Train, query and gallery from the places of the persons to train and to test on."""
    train, test = sorted(train), sorted(test)
    return [t for i in train for t in (first[i], second[i])], [first[i] for i in test], [second[i] for i in test]


def read_ls_vid(
    root: str | Path, *, subset: str = "test", check_counts: bool = True, cache: bool = True
) -> TrackletData:
    """Reads LS-VID (Li et al., ICCV 2019). The gallery is every tracklet of the subset, queries included.

    Args:
        root: the folder with ``list_sequence`` (or ``info/list_sequence``).
        subset: ``test``, or ``val``: the validation persons. The paper does not say which of their tracklets are
            queries; ours: those of an ``info_val.mat`` beside ``info_test.mat``, else each person's first tracklet in
            each camera.
        check_counts: see the module docstring, as for ``cache``.
    """
    if subset not in ("test", "val"):
        raise ValueError(f"subset must be 'test' or 'val', got {subset!r}.")
    disk = _Benchmark("ls-vid", root, cache, subset)
    train, gallery = disk.index(partial(_index_ls_vid, subset=subset)).values()
    files = [f"{folder}/data/info_{subset}.mat" for folder in ("test", "info")]
    if subset == "test" or any(os.path.exists(disk.at(file)) for file in files):
        query = disk.rows(gallery, disk.find(*files), "query", hdf5=True)
    else:
        first: dict[tuple[int, int], Tracklet] = {}
        for t in gallery:
            first.setdefault((t.pid, t.camera), t)
        query = list(first.values())
    counts = {"training tracklets": len(train), "training identities": _distinct("pid", train)}
    if subset == "test":
        counts |= {"test tracklets": len(gallery), "test identities": _distinct("pid", gallery), "queries": len(query)}
        counts["cameras"] = _distinct("camera", train, gallery)
    else:
        counts |= {"validation tracklets": len(gallery), "validation identities": _distinct("pid", gallery)}
    return disk.finish(train, query, gallery, counts, check_counts, f", {subset}")


def _index_ls_vid(disk: Disk, subset: str) -> Parts:
    parts: Parts = {"train": [], subset: []}
    for part, tracklets in parts.items():
        file = disk.find(f"list_sequence/list_seq_{part}.txt", f"info/list_sequence/list_seq_{part}.txt")
        folder: str | None = None
        images: list[str] = []
        for number, line in enumerate(disk.text(file).split("\n"), 1):
            where = f"{disk.at(file)}, line {number}"
            match = re.fullmatch(r"(\S.*?)\s+(-?\d+)\s*", line)
            if not match:
                raise ValueError(f"{where}: expected '<beginning of the paths> <pid>', got {line!r}. {AGAIN}")
            path, _, prefix = match[1].rpartition("/")
            if folder != path:
                folder, images = path, sorted(filter(is_image, os.listdir(disk.at(disk.find(path)))))
            names = images[bisect_left(images, prefix) : bisect_left(images, prefix + chr(0x10FFFF))]
            if prefix[-1:].isdigit():  # 0001_1 is no beginning of 0001_10, unless it breaks off within a number
                names = [name for name in names if not name[len(prefix)].isdigit()] or names
            if not names:
                raise FileNotFoundError(f"{where}: there is no image {disk.at(match[1])}*. {AGAIN}")
            if len(match[2]) > 9:
                raise ValueError(f"{where}: {match[2][:20]}... is no pid. {AGAIN}")
            names, (camera,) = disk.in_order(names, _LS_VID, 1, where)
            name = f"{part}/{match[1].rstrip('_/')}"
            tracklets.append(disk.tracklet(path, names, int(match[2]), int(camera), name))
    return parts


def read_ward(
    root: str | Path,
    split: int = 0,
    *,
    cameras: str = "1-2,3",
    everybody: bool = False,
    check_counts: bool = True,
    cache: bool = True,
) -> TrackletData:
    """Reads WARD (Martinel and Micheloni, CVPR workshops 2012): 70 persons, a tracklet in each of three cameras.

    Anyone can have it: ``git clone https://github.com/iN1k1/CVPR2012``. The splits are ours, as is which camera's
    tracklets are the queries: ten random halves of the persons, always the same, of which the first half is trained on
    (in all cameras) and the second one is tested on. Copies in another format (JPEG) are read as well.

    Args:
        root: the clone, or the folder of the images itself.
        split: 0 to 9; results are the mean and standard deviation over all ten.
        cameras: the cameras of the queries, ``-``, and those of the gallery: ``1-2,3``, or for comparison with papers
            ``1-2``, ``1-3`` and ``2-3``.
        everybody: all persons are trained on, and nobody is left to test on: for weights that are given away.
        check_counts: see the module docstring, as for ``cache``.
    """
    match = re.fullmatch(r"([1-3](?:,[1-3])*)-([1-3](?:,[1-3])*)", cameras)
    if not match:
        raise ValueError(f"cameras must be those of the queries and of the gallery, such as '1-2,3', got {cameras!r}.")
    of_query, of_gallery = (set(map(int, part.split(","))) for part in match.groups())
    disk = _Benchmark("ward", root, cache)
    folder = disk.find("toolbox/Datasets/WARD", "Datasets/WARD", "WARD", "")
    (tracklets,) = disk.index(partial(_index_ward, folder=folder)).values()
    persons = sorted({t.pid for t in tracklets})
    splits = _halves(persons)
    train, test = map(set, splits[disk.split(splits, split)])
    if everybody:
        train, test = set(persons), set()
    counts = {
        "persons": len(persons),
        "cameras": _distinct("camera", tracklets),
        "tracklets": len(tracklets),
        "frames": sum(map(len, tracklets)),
    }
    return disk.finish(
        [t for t in tracklets if t.pid in train],
        [t for t in tracklets if t.pid in test and t.camera in of_query],
        [t for t in tracklets if t.pid in test and t.camera in of_gallery],
        counts,
        check_counts,
        ", everybody" if everybody else f", split {split}, cameras {cameras}",
    )


def _index_ward(disk: Disk, folder: str) -> Parts:
    found: dict[str, list[str]] = {}
    names, _ = disk.images(folder, _WARD, 0)
    for name in names:
        found.setdefault(name[:8], []).append(name)
    tracklets = []
    for key, own in found.items():
        frames = [name[:12] for name in own]
        twice = next((name for name, other in pairwise(frames) if name == other), None)
        if twice:
            raise ValueError(f"{disk.at(folder)} has the image {twice} more than once. {AGAIN}")
        pid, camera = int(key[:4]), int(key[4:])
        tracklets.append(disk.tracklet(folder, own, pid, camera, f"{key[:4]}/{camera}"))
    return {"all": tracklets}


def _distinct(what: str, *parts: list[Tracklet]) -> int:
    return len({getattr(t, what) for part in parts for t in part})


class _Benchmark(Disk):
    """A benchmark's folder, of which the right counts are known."""

    def __init__(self, name: str, root: str | Path, cache: bool, variant: str = ""):
        title, layout, self.frames, self.published = PUBLISHED[name]
        super().__init__(root, title, layout, name + variant if cache else "")

    def rows(self, tracklets: list[Tracklet], file: str, key: str, hdf5: bool = False) -> list[Tracklet]:
        """The tracklets that a file's row of numbers, from 1, stands for."""
        file = self.at(self.find(file))
        numbers = matrix(file, key, rows=1, hdf5=hdf5)[0].tolist()
        wrong = [number for number in numbers if not 1 <= number <= len(tracklets)]
        if wrong:
            raise ValueError(
                f"{file}: expected rows from 1 to {len(tracklets):,}, the number of tracklets, got {wrong[0]}. {AGAIN}"
            )
        return [tracklets[number - 1] for number in numbers]

    def split(self, splits: Sized, split: int) -> int:
        """The split that was asked for, if there is one."""
        if split not in range(len(splits)):
            raise ValueError(f"{self.title} has the splits 0 to {len(splits) - 1}, got {split!r}.")
        return split

    def finish(
        self,
        train: list[Tracklet],
        query: list[Tracklet],
        gallery: list[Tracklet],
        counts: dict[str, int],
        check_counts: bool,
        note: str = "",
    ) -> TrackletData:
        """Logs the counts beside the published ones, compares them, and keeps the index."""
        counts = {what: n for what, n in (self.found | counts).items() if what in self.published}
        said = {what: f"{what} {n:,} (published {self.published[what]:,})" for what, n in counts.items()}
        lengths = [len(t) for t in {id(t): t for t in (*train, *query, *gallery)}.values()]
        cameras: dict[int, set[int]] = {}
        for t in gallery:
            cameras.setdefault(t.pid, set()).add(t.camera)
        name = f"{self.title} in {self.root}{note}"
        _logger.info(
            "%s: %s, frames per tracklet %d-%d, mean %.0f (published %s), queries without a match %d",
            *(name, ", ".join(said.values()), min(lengths), max(lengths), sum(lengths) / len(lengths), self.frames),
            sum(not cameras.get(t.pid, set()) - {t.camera} for t in query),
        )
        wrong = [said[what] for what, n in counts.items() if n != self.published[what] and what not in _NOT_REFUSED]
        if wrong and check_counts:
            raise ValueError(
                f"{self.root} is not {self.title} as published: found {', '.join(wrong)}. {AGAIN} Or read what is "
                "there with check_counts=False."
            )
        self.save()
        return TrackletData(train, query, gallery, name)
