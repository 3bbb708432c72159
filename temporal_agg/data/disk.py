"""What the readers of benchmarks need of a disk: listings, matrices, and an index that is kept between runs."""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .._files import read_text, replace_file
from .images import is_image
from .readers import NOT_DATA
from .tracklet import FrameFiles, Tracklet, check_ids

AGAIN = "Unpack or copy the data set again."

Parts = dict[str, list[Tracklet]]

_logger = logging.getLogger(__name__)


def matrix(
    file: str, key: str | None, rows: int | None = None, columns: int | None = None, hdf5: bool = False
) -> np.ndarray:
    """A matrix of integers, which Matlab may have saved as floating point, of the given size.

    Args:
        file: a Matlab file.
        key: its name in the file; None = the only one there.
        rows: how many it must have.
        columns: how many it must have.
        hdf5: a file of Matlab 7.3 or later.
    """
    try:
        if hdf5:
            from h5py import File
        else:
            from scipy.io import loadmat
    except ImportError as error:
        library = "h5py" if hdf5 else "scipy"
        raise ImportError(f"reading {file} needs {library}: pip install temporal-agg[benchmarks].") from error
    try:
        if not os.path.isfile(file):
            raise ValueError("it is no regular file")
        if hdf5:
            with File(file, "r") as opened:
                values = opened[key][()]
        else:
            found = loadmat(file)
            if key is None:
                (key,) = (name for name in found if not name.startswith("__"))
            values = found[key]
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
            raise ValueError(f"it is {getattr(values, 'dtype', '')} {type(values).__name__}, no matrix of numbers")
        with np.errstate(invalid="ignore"):  # NaN is found below
            result = values.astype(np.int64)
    except Exception as error:  # the libraries raise what they stumble over
        raise ValueError(f"{file}: the matrix {key or ''!r} cannot be read ({error!r}). {AGAIN}") from error
    fits = result.ndim == 2 and rows in (None, result.shape[0]) and columns in (None, result.shape[1])
    if not fits or not result.size or (result != values).any():
        raise ValueError(
            f"{file}: expected {key!r} to be a matrix of integers [{rows or 'n'}, {columns or 'n'}], got "
            f"{values.dtype} {list(values.shape)}. {AGAIN}"
        )
    return result


class Disk:
    """A data set's folder: lists and reads what lies in it, and keeps the index of its tracklets.

    Args:
        root: the folder.
        title: what messages call the data set.
        layout: how it lies on disk, for messages.
        cache: a name for its index, or "" to keep none.
    """

    VERSION = 2  # of the cached index

    def __init__(self, root: str | Path, title: str, layout: str, cache: str):
        self.root, self.title, self.layout = os.path.expanduser(os.fspath(root)), title, layout
        self.started = time.time_ns()
        self.stamps: dict[str, list[int]] = {}  # of all that has been listed and read
        self.found: dict[str, int] = {}  # counts that are part of the index
        self.unsaved: tuple | None = None
        self.cache = self.owner = ""
        if cache:
            base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
            folder = os.path.expanduser(os.environ.get("TEMPORAL_AGG_CACHE") or os.path.join(base, "temporal-agg"))
            key = hashlib.sha256(os.fsencode(os.path.realpath(self.root))).hexdigest()
            self.owner = f"{cache} {key}"  # whose index it is: of this data set, in this folder
            self.cache = os.path.join(folder, f"{cache}-{key[:16]}.npz")
        self.find("")
        self.stamps.clear()  # what else lies beside the data set is not part of it

    def at(self, path: str) -> str:
        return os.path.join(self.root, path)

    def stamp(self, path: str) -> list[int]:
        info = os.stat(self.at(path))
        return [info.st_mtime_ns, info.st_ctime_ns, info.st_size, info.st_ino]

    def find(self, *choices: str) -> str:
        """The first of these paths (relative to the root) that exists."""
        for path in choices:
            try:
                self.stamps[path] = self.stamp(path)
                return path
            except (FileNotFoundError, NotADirectoryError):
                pass
        raise FileNotFoundError(
            f"no {' or '.join(map(self.at, choices))}: {self.title} lies in {self.layout}. Check the path. {AGAIN}"
        )

    def text(self, file: str) -> str:
        path = self.at(self.find(file))
        if not os.path.isfile(path):
            raise ValueError(f"{path} is no regular file: {self.title} lies in {self.layout}. {AGAIN}")
        text = read_text(path).strip()
        if not text:
            raise ValueError(f"{self.at(file)} is empty. {AGAIN}")
        return text

    def folders(self, path: str, pattern: str) -> list[str]:
        """The names of the folders in a folder, sorted."""
        with os.scandir(self.at(self.find(path))) as entries:
            names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(NOT_DATA))
        wrong = [name for name in names if not re.fullmatch(pattern, name)]
        if wrong or not names:
            found = f"a folder {wrong[0]!r}" if wrong else "no folder"
            raise ValueError(f"{self.at(path)} has {found}: {self.title} lies in {self.layout}. {AGAIN}")
        return names

    def images(self, path: str, pattern: re.Pattern, shared: int) -> tuple[list[str], tuple[str, ...]]:
        """:meth:`in_order` of all images in a folder."""
        names = [name for name in os.listdir(self.at(self.find(path))) if is_image(name)]
        if not names:
            raise ValueError(f"{self.at(path)} has no image: a tracklet needs at least one frame. {AGAIN}")
        return self.in_order(names, pattern, shared, self.at(path))

    def in_order(
        self, names: list[str], pattern: re.Pattern, shared: int, where: str
    ) -> tuple[list[str], tuple[str, ...]]:
        """A tracklet's names, sorted, and what they say.

        The first ``shared`` groups of the pattern must be the same in all; the others are the numbers to sort by.
        """
        groups = pattern.findall("\n".join(names))
        if len(groups) != len(names):
            wrong = next(name for name in names if not pattern.fullmatch(name))
            raise ValueError(f"{where}: no frame is named {wrong!r}: {self.title} lies in {self.layout}. {AGAIN}")
        said = groups[0][:shared]
        for name, group in zip(names, groups, strict=True):
            if group[:shared] != said:
                raise ValueError(
                    f"{where}: {names[0]} and {name} are in one tracklet, but of different persons or cameras. {AGAIN}"
                )
        order = sorted((list(map(int, group[shared:])), name) for group, name in zip(groups, names, strict=True))
        return [name for _, name in order], said

    def tracklet(
        self, folder: str, names: list[str], pid: int, camera: int, name: str, ambiguous_pid: int | None = None
    ) -> Tracklet:
        check_ids(pid, camera, self.at(folder))
        frames = FrameFiles(self.at(folder), np.array([os.fsencode(n) for n in names]))
        return Tracklet(frames, pid, camera, name, ambiguous_pid=ambiguous_pid)

    def index(self, build: Callable[["Disk"], Parts]) -> Parts:
        """The tracklets by part, as ``build`` finds them, or found them before if nothing has changed since."""
        if not self.cache:
            return build(self)
        try:
            return self.load()
        except Exception as error:  # whatever is wrong with the cache, the files themselves are there
            _logger.debug("%s: no index in %s (%r)", self.root, self.cache, error)
        parts = build(self)
        self.unsaved = (parts, dict(self.stamps), self.found)
        return parts

    def load(self) -> Parts:
        with np.load(self.cache, allow_pickle=False) as file:
            meta, names, numbers = json.loads(file["meta"].tobytes()), file["names"], file["numbers"].tolist()
        stamps = meta["stamps"]
        if meta["version"] != self.VERSION or meta["owner"] != self.owner or not stamps:
            raise ValueError("another index")
        if any(self.stamp(path) != was for path, was in stamps.items()):
            raise ValueError("out of date")
        folders = [self.at(folder) for folder in meta["folders"]]
        parts: Parts = {part: [] for part in meta["parts"]}
        stop = 0
        for name, (part, folder, pid, camera, length, other) in zip(meta["names"], numbers, strict=True):
            start, stop = stop, stop + length
            frames = FrameFiles(folders[folder], names[start:stop])
            tracklet = Tracklet(frames, pid, camera, name, ambiguous_pid=None if other < 0 else other)
            parts[meta["parts"][part]].append(tracklet)
        self.found = meta["found"]
        return parts

    def save(self) -> None:
        """Writes an index that was not there: call it once the data set has proved to be as it should."""
        if not self.unsaved:
            return
        parts, stamps, found = self.unsaved
        # A folder that changes again within one tick of the file system's clock looks as it did before.
        if max(changed for changed, *_ in stamps.values()) > self.started - 2_000_000_000:
            return
        tracklets = [(i, t, files_of(t)) for i, part in enumerate(parts.values()) for t in part]
        folders = {folder: i for i, folder in enumerate(dict.fromkeys(files.folder for _, _, files in tracklets))}
        meta = {
            "version": self.VERSION,
            "owner": self.owner,
            "stamps": stamps,
            "found": found,
            "parts": list(parts),
            "folders": [os.path.relpath(folder, self.root) for folder in folders],
            "names": [t.name for _, t, _ in tracklets],
        }
        rows = [
            (i, folders[files.folder], t.pid, t.camera, len(t), -1 if t.ambiguous_pid is None else t.ambiguous_pid)
            for i, t, files in tracklets
        ]

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez(
                    file,
                    meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
                    numbers=np.array(rows, np.int64),
                    names=np.concatenate([files.names for _, _, files in tracklets]),
                )

        try:
            os.makedirs(os.path.dirname(self.cache), exist_ok=True)
            replace_file(self.cache, write)
        except OSError as error:
            _logger.debug("%s: the index was not written to %s (%s)", self.root, self.cache, error)


def files_of(tracklet: Tracklet) -> FrameFiles:
    """The frames of a tracklet that :meth:`Disk.tracklet` has made."""
    assert isinstance(tracklet.frames, FrameFiles)
    return tracklet.frames
