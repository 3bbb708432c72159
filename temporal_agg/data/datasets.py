"""Data sets by name."""

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path

from .benchmarks import read_duke, read_duke_si, read_ilids_vid, read_ls_vid, read_mars, read_prid2011, read_ward
from .readers import read_csv, read_folder
from .synthetic import synthetic_data
from .tracklet import TrackletData

__all__ = ["num_splits", "open_dataset", "open_splits", "parse_data_spec"]

_DATASETS: dict[str, Callable[..., TrackletData]] = {
    "csv": read_csv,
    "duke": read_duke,
    "duke-si": read_duke_si,
    "folder": read_folder,
    "ilids-vid": read_ilids_vid,
    "ls-vid": read_ls_vid,
    "mars": read_mars,
    "prid-2011": read_prid2011,
    "synthetic": synthetic_data,
    "ward": read_ward,
}
_SPLITS = {"ilids-vid": 10, "prid-2011": 10, "ward": 10}


def open_dataset(name: str, root: str | Path | None = None, **options) -> TrackletData:
    """Opens a data set by name.

    Args:
        name: ``mars``, ``duke``, ``duke-si``, ``ilids-vid``, ``prid-2011``, ``ls-vid``, ``ward``, ``folder``, ``csv``
            or ``synthetic``.
        root: the folder or file that it lies in (``~`` is the home directory); none for ``synthetic``.
        **options: further arguments of its reader.

    Raises:
        ValueError: an unknown name (the message has the nearest), or a root that is missing or not wanted.
        TypeError: an unknown option (the message lists those it has).

    Example:
        >>> from temporal_agg.data import open_dataset
        >>> people = open_dataset("synthetic", num_identities=4, num_cameras=2)  # or open_dataset("folder", "<root>")
        >>> people
        TrackletData('synthetic', train=8, query=4, gallery=4)
    """
    reader = _reader(name)
    parameters = list(inspect.signature(reader).parameters.values())
    takes_root = parameters[0].default is inspect.Parameter.empty
    if takes_root and root is None:
        raise ValueError(f"data set {name!r} needs the path that it lies in: root=..., or {name}:<path>.")
    if root is not None and not takes_root:
        raise ValueError(f"data set {name!r} lies in no file, got root={str(root)!r}: leave it out.")
    known = [p.name for p in parameters[takes_root:]]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"data set {name!r} has no option {', '.join(unknown)}; it has: {', '.join(known) or 'none'}.")
    for p in parameters:
        if p.name in options and not _is_like(options[p.name], p.default):
            raise TypeError(f"data set {name!r}: {p.name} must be like {p.default!r}, got {options[p.name]!r}.")
    return reader(root, **options) if takes_root else reader(**options)


def _is_like(value: object, default: object) -> bool:
    """Whether an option is of the kind that it has by default: yes or no, a whole number, text, or several of them."""
    if isinstance(default, (bool, str)):
        return isinstance(value, type(default))
    if isinstance(default, int):
        return hasattr(value, "__index__") and not isinstance(value, bool)
    if isinstance(default, tuple):
        return isinstance(value, (list, tuple)) and len(value) == len(default) and all(map(_is_like, value, default))
    return True


def _reader(name: str) -> Callable[..., TrackletData]:
    if name not in _DATASETS:
        near = difflib.get_close_matches(name, _DATASETS, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"no data set is named {name!r}; {hint}All: {', '.join(sorted(_DATASETS))}.")
    return _DATASETS[name]


def parse_data_spec(spec: str, **options) -> TrackletData:
    """Opens what a command line calls ``synthetic``, ``mars:<root>`` or ``csv:<file>`` (see :func:`open_dataset`)."""
    name, _, root = spec.partition(":")
    return open_dataset(name, root or None, **options)


def num_splits(name: str) -> int:
    """How many train/test splits a data set has: 10 for ``ilids-vid``, ``prid-2011`` and ``ward``, 1 for the others.

    Raises:
        ValueError: an unknown name.
    """
    _reader(name)
    return _SPLITS.get(name, 1)


def open_splits(name: str, root: str | Path | None = None, split: int | str = "all", **options) -> list[TrackletData]:
    """Opens all splits of a data set, or one: a list of one for a set that has only one.

    Args:
        name: see :func:`open_dataset`, as ``root`` and ``**options``.
        root: the folder or file that it lies in.
        split: which, from 0; or ``"all"``.

    Raises:
        ValueError: no such split, and as :func:`open_dataset`.
        TypeError: as :func:`open_dataset`.
    """
    count = num_splits(name)
    if split != "all" and split not in range(count):
        raise ValueError(
            f"data set {name!r} has {count} split(s): split must be 'all' or 0 to {count - 1}, got {split!r}."
        )
    if count == 1:
        return [open_dataset(name, root, **options)]
    return [open_dataset(name, root, split=i, **options) for i in (range(count) if split == "all" else (split,))]
