"""Embeddings on disk, as npz or Parquet: whole tracklets with their names, and what made them.

Both kinds hold the fields of :class:`Embeddings` under their names; those that are None are left out. In an npz file
each is an array: numbers as they are, text as numpy's ``U``, what is said once as an array without dimensions;
``marks`` are uint64, those of all tracklets one after the other, and ``num_marks`` says how many each has. In a
Parquet file (``pip install temporal-agg[parquet]``) what is said of each tracklet is a column (``name``, ``embedding``,
``pid``, ``camera``, ``start``, ``end``, ``frames``, ``purity``, ``change``, ``marks``), and what is said once is JSON
in the schema's metadata under ``temporal-agg``. A name that is no UTF-8 makes ``name`` a column of bytes.
"""

import json
import math
import os
import struct
import zipfile
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._files import locked, replace_file, utf8_name
from ..data.tracklet import IDS, check_ids
from ._arrays import largest_of

if TYPE_CHECKING:
    import pyarrow

__all__ = ["Embeddings", "append_embeddings", "merge_embeddings", "read_embeddings", "write_embeddings"]

SUFFIXES = (".npz", ".parquet")
INFLATED = 100  # times the size of a file on the disk that its content may take in memory; embeddings take 1 to 2
ALWAYS = 1 << 24  # bytes that it may take anyway
KEY = b"temporal-agg"
COLUMNS = {"names": "name", "embeddings": "embedding", "pids": "pid", "cameras": "camera"}  # others: the field's name
NUMBERS, TEXTS = ("pids", "cameras", "start", "end", "change"), ("names", "frames")
MARKS = {"marks", "num_marks"}
UNKNOWN: dict[str, Any] = {**dict.fromkeys(NUMBERS, -1), "frames": "", "purity": math.nan, "marks": b""}
ONCE = {"distance": str, "model": str, "backbone_pretrained": bool, "fingerprint": str, "normalized": bool}
DEFAULTS: dict[str, Any] = {"normalized": False, **dict.fromkeys(UNKNOWN)}


class Embeddings(NamedTuple):
    """The embeddings of N tracklets, by one model.

    Attributes:
        embeddings: float32 ``[N, D]``, finite.
        names: of the tracklets.
        pids: their identities, -1 = junk or unknown; None = unknown for all.
        cameras: -1 = unknown; None = unknown for all.
        distance: how to compare them: ``cosine``, ``euclidean`` or ``dot``.
        model: a directory, a name or a place on the Hub.
        backbone_pretrained: whether the model is timm's backbone under an aggregator without weights.
        fingerprint: of the model; embeddings can be compared where it is the same.
        normalized: whether every embedding has length 1.
        frames: what the files of each tracklet looked like (names, sizes, times); "" = unknown.
        start: the number in the file name of each tracklet's first frame, -1 where there is none.
        end: the same of its last frame; below ``start`` where names do not count upwards.
        purity: how little each tracklet looks like two people, -1 to 1 (:func:`~temporal_agg.tracklet_purity`), NaN =
            unknown; None = unknown for all.
        change: the place, from 0 on, of the frame from which it would show the second one, -1 = unknown.
        marks: 8 bytes for each frame of each tracklet, a hash of its file's content; b"" = unknown.
    """

    embeddings: Tensor
    names: list[str]
    pids: list[int] | None
    cameras: list[int] | None
    distance: str
    model: str
    backbone_pretrained: bool
    fingerprint: str
    normalized: bool = False
    frames: list[str] | None = None
    start: list[int] | None = None
    end: list[int] | None = None
    purity: list[float] | None = None
    change: list[int] | None = None
    marks: list[bytes] | None = None


def write_embeddings(path: str | os.PathLike, found: Embeddings) -> None:
    """Writes an npz or a Parquet file, as its name ends; an older one is replaced once the new one is whole.

    Raises:
        ImportError: Parquet, and pyarrow is not installed.
        OSError: it cannot be written.
        ValueError: another kind of file, or fields that do not fit each other.
    """
    path = Path(path)
    check_kind(path)
    _check(found, str(path))
    found = found._replace(embeddings=found.embeddings.detach().cpu().float())
    write = _write_npz if path.suffix == ".npz" else _write_parquet
    replace_file(path, lambda temporary: write(temporary, found))


def read_embeddings(path: str | os.PathLike, *, mmap: bool = False) -> Embeddings:
    """Reads what :func:`write_embeddings` wrote.

    Args:
        mmap: leave the embeddings of an npz file where they are, checked, and map them into memory: several times as
            fast where the file was used lately, and in memory that others may have when they need it. While the tensor
            lives, the file may be replaced (not on Windows), as all functions here do, but not cut or written into: a
            process that reads what is gone ends. What is written into the tensor stays out of the file.

    Raises:
        FileNotFoundError: no such file.
        ImportError: Parquet, and pyarrow is not installed.
        ValueError: a damaged file, one of another kind, or embeddings that are not finite. The message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected one that `temporal-agg embed` wrote.")
    check_kind(path)
    try:
        fields = _read_npz(path, mmap) if path.suffix == ".npz" else _read_parquet(path)
        if missing := [key for key in Embeddings._fields if key not in {*fields, *DEFAULTS}]:
            raise ValueError(f"it has no {', '.join(missing)}")
        found = Embeddings(**{**DEFAULTS, **fields})
        _check(found, "it")
        _check_finite(found)
        if twice := _twice(found.names):
            raise ValueError(f"two of its tracklets are named {twice}")
    except Exception as error:  # numpy, zipfile, zlib and pyarrow raise what they stumble over
        if isinstance(error, OSError) and error.filename is not None:  # it cannot be opened, say
            raise
        what = str(error) or type(error).__name__
        raise ValueError(f"{path} is no file that `temporal-agg embed` wrote, or it is damaged: {what}.") from error
    return found


def merge_embeddings(*parts: Embeddings) -> Embeddings:
    """One after the other; where some have no identities, cameras or numbers of frames, those are -1.

    Raises:
        ValueError: nothing to merge, embeddings of different models, or a name that comes twice.
    """
    if not parts:
        raise ValueError("there is nothing to merge.")
    first = parts[0]
    for part in parts:
        _check(part, "a part")
        _check_finite(part)
        for field in ("fingerprint", "distance", "normalized"):
            if getattr(part, field) != getattr(first, field):
                raise ValueError(
                    f"these embeddings do not go together: of one part {field} is {getattr(first, field)!r} (by "
                    f"{first.model}), of another {getattr(part, field)!r} (by {part.model}). Embed one of them again."
                )
        if part.embeddings.shape[1] != first.embeddings.shape[1]:
            raise ValueError(
                f"these embeddings have {first.embeddings.shape[1]} and {part.embeddings.shape[1]} numbers."
            )
    names = [name for part in parts for name in part.names]
    if twice := _twice(names):
        raise ValueError(
            f"two tracklets are named {twice}: names must be unique. Rename folders, or embed a folder that "
            "holds both: its tracklets are named by their paths in it."
        )
    columns: dict[str, Any] = {}
    for field, unknown in UNKNOWN.items():
        values = [getattr(part, field) for part in parts]
        if any(value is not None for value in values):
            pairs = zip(parts, values, strict=True)
            columns[field] = [x for part, value in pairs for x in (value or [unknown] * len(part.names))]
    embeddings = torch.cat([part.embeddings for part in parts])
    return first._replace(embeddings=embeddings, names=names, **columns)


def append_embeddings(path: str | os.PathLike, more: Embeddings) -> Embeddings:
    """Adds to a file of embeddings, which is replaced once the new one is whole; the result is returned, too.

    Raises:
        OSError: another process is at work on the file.
        ValueError: as :func:`read_embeddings` and :func:`merge_embeddings`.
    """
    path = Path(path)
    with locked(path.with_name(f".{path.name}.lock"), str(path)):
        found = merge_embeddings(read_embeddings(path), more)
        write_embeddings(path, found)
    return found


def check_kind(path: Path) -> None:
    """Raises unless a file of this name can be written and read here."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"files of embeddings are named *.npz or *.parquet, got {path}.")
    if path.suffix == ".parquet":
        _parquet()


# ----------------------------------------------------------------------------------------------------------------------
# The two kinds


def _read_npz(path: Path, mmap: bool) -> dict[str, Any]:
    arrays: dict[str, np.ndarray] = {}
    with open(path, "rb") as file:  # once, as it may be replaced at any moment
        with zipfile.ZipFile(file) as archive:
            _bound(path, sum(member.file_size for member in archive.infolist()))
            for name in archive.namelist():  # a field whose name is damaged would be missing
                archive.open(name).close()
            mapped = _mapped(file, archive, "embeddings.npy") if mmap else None
        if mapped is not None:
            arrays["embeddings"] = mapped
        file.seek(0)
        with np.load(file, allow_pickle=False) as stored:
            wanted = [key for key in (*Embeddings._fields, "num_marks") if key in stored.files and key not in arrays]
            arrays |= {key: stored[key] for key in wanted}
    fields: dict[str, Any] = {}
    for key, array in arrays.items():
        kinds = "f" if key in ("embeddings", "purity") else "iu" if key in {*NUMBERS, *MARKS} else "U"
        dimensions = 2 if key == "embeddings" else 1
        if key in ONCE:
            kinds, dimensions = "b" if ONCE[key] is bool else "U", 0
        if array.dtype.kind not in kinds or array.ndim != dimensions:
            what = {"f": "floating-point", "iu": "integers", "U": "text", "b": "a bool"}[kinds]
            raise ValueError(f"{key} should be {what} of {dimensions} dimensions, got {array.dtype} {array.shape}")
        fields[key] = _tensor(array) if key == "embeddings" else array if key in MARKS else array.tolist()
    if fields.keys() & MARKS:
        fields["marks"] = _cut(fields.get("marks"), fields.pop("num_marks", None))
    return fields


def _mapped(file: IO[bytes], archive: zipfile.ZipFile, name: str) -> np.ndarray | None:
    """A float32 array of an npz file, in the file; None where it must be unpacked, or is missing."""
    if name not in archive.namelist():
        return None
    about = archive.getinfo(name)
    with archive.open(name) as member:
        if about.compress_type != zipfile.ZIP_STORED or np.lib.format.read_magic(member) != (1, 0):
            return None
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        header = member.tell()
    file.seek(about.header_offset + 26)
    lengths = struct.unpack("<HH", file.read(4))  # of the name and of what else stands before the member
    start = file.tell() + sum(lengths)
    whole = min(shape, default=0) >= 0 and header + 4 * math.prod(shape) == about.file_size
    if fortran or dtype != np.dtype("<f4") or not whole or (start + header) % 4:
        return None
    try:
        content = np.memmap(file, np.uint8, "c", start, (about.file_size,))
    except (OSError, ValueError):  # some file systems map nothing; a file that is cut
        return None
    if zlib.crc32(content.data) != about.CRC:
        raise zipfile.BadZipFile(f"Bad CRC-32 for file {name!r}")
    return content[header:].view(dtype).reshape(shape)


def _cut(marks: np.ndarray | None, counts: np.ndarray | None) -> list[bytes]:
    """What is stored of all tracklets together -> of each."""
    if marks is None or counts is None or marks.dtype != np.uint64:
        raise ValueError("marks, uint64, and num_marks go together")
    if (counts < 0).any() or (counts > len(marks)).any() or counts.sum() != len(marks):
        raise ValueError("marks and num_marks do not fit each other")
    flat, ends = marks.astype("<u8").tobytes(), [0, *(8 * counts.astype(np.int64).cumsum()).tolist()]
    return [flat[start:end] for start, end in pairwise(ends)]


def _write_npz(path: Path, found: Embeddings) -> None:
    given = {key: value for key, value in found._asdict().items() if value is not None}
    marks = given.pop("marks", None)
    arrays: dict[str, Any] = {key: np.asarray(value) for key, value in given.items()}
    if marks is not None:
        arrays["marks"] = np.frombuffer(b"".join(marks), "<u8")
        arrays["num_marks"] = np.array([len(mark) // 8 for mark in marks], np.int64)
    with open(path, "wb") as file:  # savez would add .npz to a name
        np.savez(file, **arrays)


def _read_parquet(path: Path) -> dict[str, Any]:
    pa, pq = _parquet()
    with utf8_name(path) as name:
        file = pq.ParquetFile(name, memory_map=True, page_checksum_verification=True)
    groups = range(file.metadata.num_row_groups)
    _bound(path, sum(file.metadata.row_group(i).total_byte_size for i in groups))
    about = json.loads((file.schema_arrow.metadata or {}).get(KEY, b"{}"))
    if not isinstance(about, dict) or not about:
        raise ValueError(f"its schema has no metadata {KEY.decode()!r}")
    fields: dict[str, Any] = {}
    for key, kind in ONCE.items():
        if key in about:
            if type(about[key]) is not kind:
                raise ValueError(f"{key} should be {kind.__name__}, got {about[key]!r}")
            fields[key] = about[key]
    columns = {key: COLUMNS.get(key, key) for key in Embeddings._fields if key not in ONCE}
    table = file.read([name for name in columns.values() if name in file.schema_arrow.names])
    for key, name in columns.items():
        if name in table.column_names:
            fields[key] = _column(pa, key, table[name])
    return fields


def _column(pa: Any, key: str, column: "pyarrow.ChunkedArray") -> Any:
    """A field of :class:`Embeddings` from its column."""
    kind = column.type
    if column.null_count:
        raise ValueError(f"{key}: {column.null_count} rows are empty")
    if key == "embeddings":
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            raise ValueError(f"{key} should be lists of numbers, got {kind}")
        if not pa.types.is_floating(kind.value_type):
            raise ValueError(f"{key} should be floating-point, got {kind}")
        rows = []
        for chunk in column.chunks:
            values = chunk.flatten().to_numpy(zero_copy_only=False)
            width = len(values) // max(len(chunk), 1)
            if (np.asarray(chunk.value_lengths() if not pa.types.is_fixed_size_list(kind) else width) != width).any():
                raise ValueError(f"{key} have different lengths")
            rows.append(values.reshape(len(chunk), width))
        return _tensor(np.concatenate(rows) if rows else np.empty((0, 0), np.float32))
    if key in NUMBERS or key == "purity":
        fits, what = (pa.types.is_integer, "integers") if key in NUMBERS else (pa.types.is_floating, "floating-point")
        if not fits(kind):
            raise ValueError(f"{key} should be {what}, got {kind}")
        return column.to_pylist()
    if key == "marks":
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise ValueError(f"marks should be bytes, got {kind}")
        return column.to_pylist()
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)):
        raise ValueError(f"{key} should be text, got {kind}")
    return [x if isinstance(x, str) else x.decode("utf-8", "surrogateescape") for x in column.to_pylist()]


def _write_parquet(path: Path, found: Embeddings) -> None:
    pa, pq = _parquet()
    columns = {}
    for key, value in found._asdict().items():
        if value is None or key in ONCE:
            continue
        if key == "embeddings":
            flat = pa.array(value.float().contiguous().numpy().reshape(-1))
            value = pa.FixedSizeListArray.from_arrays(flat, value.shape[1])
        elif key in TEXTS:
            texts = [text.encode("utf-8", "surrogateescape") for text in value]
            value = pa.array(texts if any(_foreign(text) for text in value) else value)
        else:
            kinds_of = {"marks": pa.binary(), "purity": pa.float64()}
            value = pa.array(value, kinds_of.get(key, pa.int64()))
        columns[COLUMNS.get(key, key)] = value
    about = {key: getattr(found, key) for key in ONCE}
    table = pa.table(columns).replace_schema_metadata({KEY: json.dumps(about).encode()})
    with utf8_name(path, "wb") as name:
        pq.write_table(table, name, write_page_checksum=True)


def _parquet() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install temporal-agg[parquet]") from error
    return pyarrow, pyarrow.parquet


def _tensor(array: np.ndarray) -> Tensor:
    with np.errstate(over="ignore"):  # what overflows is not finite, and refused
        return torch.from_numpy(np.require(array, np.float32, ["C", "W"]))


def _bound(path: Path, size: int) -> None:
    """Raises where a small file would fill the memory."""
    if size > INFLATED * path.stat().st_size + ALWAYS:
        raise ValueError(f"{path.stat().st_size} bytes would become {size}")


def _foreign(text: str) -> bool:
    """Whether a name holds bytes that are no UTF-8 (as surrogates, PEP 383)."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _check(found: Embeddings, what: str) -> None:
    """Raises unless the fields fit each other."""
    shape = list(found.embeddings.shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{what} should have embeddings [N, D], at least one, got {shape}")
    for field in ("names", *UNKNOWN):
        values = getattr(found, field)
        if values is not None and len(values) != shape[0]:
            raise ValueError(f"{what} has {shape[0]} embeddings and {len(values)} {field}")
    if not all(_are_ids(values) for values in (found.pids, found.cameras) if values is not None):
        unknown = [-1] * shape[0]
        for name, pid, camera in zip(found.names, found.pids or unknown, found.cameras or unknown, strict=True):
            check_ids(pid, camera, f"{what} (pids and cameras of {name!r})")
    for field in ("start", "end", "change"):
        if (least := min(getattr(found, field) or [0])) < -1:
            raise ValueError(f"{what} has {least} in {field}, where frames are counted from 0, and -1 is unknown")
    wrong = next((score for score in found.purity or [] if abs(score) > 1), None)  # NaN is unknown
    if wrong is not None:
        raise ValueError(f"{what} has a purity of {wrong}, which is from -1 to 1, or NaN where it is unknown")
    if found.marks is not None and any(len(mark) % 8 for mark in found.marks):
        raise ValueError(f"{what} should have marks of 8 bytes for each frame")
    if found.distance not in ("cosine", "euclidean", "dot"):
        raise ValueError(f"{what} should have the distance cosine, euclidean or dot, got {found.distance!r}")


def _are_ids(values: list[int]) -> bool:
    """Whether there is nothing to look for one by one."""
    return set(map(type, values)) == {int} and min(values) >= -1 and max(values) < IDS


def _twice(names: list[str]) -> str:
    """What says which names come more than once; empty where none does."""
    if len(set(names)) == len(names):
        return ""
    first, *others = [name for name, count in Counter(names).items() if count > 1]
    return f"{first!r} and {len(others)} more" if others else repr(first)


def _check_finite(found: Embeddings) -> None:
    wrong = (~largest_of(found.embeddings).isfinite()).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(
            f"the embeddings of {len(wrong)} tracklets are not finite numbers, the first that of "
            f"{found.names[wrong[0]]!r}"
        )
