"""Weight files: reading them, checking them, and putting them into a model."""

import hashlib
import logging
import math
import os
import pickle
import re
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from .._files import utf8_name

__all__ = ["LoadReport", "load_weights", "read_checkpoint", "unwrap"]

_log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
_PARTS = ("", "encoder.", "encoder.backbone.", "aggregator.")  # of a TrackletModel, that a file may be of

# What checkpoints call the weights in them; where there are several, the first is taken, and the log says so.
_WRAPPERS = (
    "state_dict",
    "model",
    "net_dict",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "params",
    "weights",
    "teacher",
    "state_dict_ema",
    "model_ema",
    "ema",
)
_DEPTH = 16  # dicts in dicts that are looked into
_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # begins what torch.save wrote before it wrote zip files


class LoadReport(NamedTuple):
    """What :func:`load_weights` did.

    Attributes:
        loaded: the model's tensors that were set.
        missing: the model's tensors that the file does not have; they stayed what they were.
        unexpected: the file's tensors that the model does not have, by their names in the file.
        mismatched: the model's tensors that have another shape or another kind of numbers in the file; they stayed what
            they were.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    def __repr__(self) -> str:
        lists = self._asdict()
        found = [f"{len(lists.pop('loaded'))} loaded", *(_shortened(kind, names) for kind, names in lists.items())]
        return f"LoadReport({'; '.join(found)})"


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``DataParallel``, ``DistributedDataParallel`` and what ``torch.compile`` returns, in any order.

    Raises:
        TypeError: a model whose weights are spread over processes (FSDP).
    """
    while (inner := _wrapped(model)) is not None:
        model = getattr(model, inner)
    if type(model).__name__.startswith(("FullySharded", "FSDP")):
        raise TypeError(
            f"{type(model).__name__} has only a share of the weights in each process: gather them first "
            "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True)."
        )
    return model


def plain_state(model: nn.Module) -> dict[str, str]:
    """The names of a module's tensors without what wrappers inside it put there -> the names that they have."""
    inserted = [
        (f"{name}." if name else "", f"{inner}.")
        for name, module in model.named_modules()
        if (inner := _wrapped(module)) is not None
    ]
    names = {}
    for name in model.state_dict():
        plain = name
        for before, inner in sorted(inserted, key=lambda pair: len(pair[0]), reverse=True):
            if plain.startswith(before + inner):
                plain = before + plain[len(before + inner) :]
        names[plain] = name
    return names


def load_weights(
    model: nn.Module, path: str | os.PathLike, strict: bool = True, *, prefix: str | None = None
) -> LoadReport:
    """Loads weights into a model, in place.

    With ``strict=False`` what fits is loaded and the rest is reported. The file may then come from elsewhere: also a
    ``torch.save`` file (read with ``weights_only=True``), wrapped in a checkpoint (``state_dict``, ``model``,
    ``net_dict``, ...), behind prefixes (``module.``, ``backbone.``, ``base.``, ...), of the whole model or only of its
    encoder, backbone or aggregator, with a classifier that the model does not have.

    Args:
        model: a :class:`TrackletModel`, or any module; also inside ``DataParallel`` or ``torch.compile``.
        path: a ``.safetensors`` file, or a directory with ``model.safetensors``.
        strict: every key must be the model's, and the other way round.
        prefix: takes only what the file has behind it, such as ``teacher.`` of a file that holds two networks.

    Raises:
        FileNotFoundError: no such file.
        TypeError: no path.
        ValueError: another kind of file; weights that are not finite numbers; strict: keys, shapes or kinds of numbers
            that are not the model's (the message names them); else: a file of which nothing fits, or of which two
            networks fit alike.

    Example:
        >>> import torch
        >>> from temporal_agg import create_model, load_weights
        >>> model = create_model("mean_resnet10t", img_size=(64, 32))
        >>> theirs = {f"module.{name}": x for name, x in model.encoder.backbone.state_dict().items()}
        >>> torch.save({"state_dict": {**theirs, "module.fc.bias": torch.zeros(625)}}, "theirs.pth")
        >>> report = load_weights(model, "theirs.pth", strict=False)
        >>> report.missing, report.unexpected
        ((), ('fc.bias',))
    """
    return _load(model, path, strict, prefix)


def load_backbone(backbone: nn.Module, path: str | os.PathLike) -> LoadReport:
    """Loads a file of any origin into a backbone, as far as it fits; the log says what did not.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as :func:`load_weights`, or a file of which less than half of the backbone comes.
    """
    return _load(backbone, path, False, None, at_least=0.5)


def _load(
    model: nn.Module, path: str | os.PathLike, strict: bool, prefix: str | None, at_least: float = 0.0
) -> LoadReport:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"path must be that of a file of weights, got {type(path).__name__}: a state dict of your own goes into "
            "model.load_state_dict, or through torch.save into a file."
        )
    path = path_of(path)
    if path.is_dir():
        path = path / WEIGHTS
    if strict and path.suffix != ".safetensors" and path.is_file():
        raise ValueError(
            f"{path}: only .safetensors files are loaded, since unpickling can run code. load_weights(model, path, "
            "strict=False) takes a torch.save file of tensors, and reports what fitted."
        )
    model = unwrap(model)
    checkpoint = _read(path, prefix)
    weights = checkpoint.tensors
    state, actual = model.state_dict(), plain_state(model)
    wanted = {name: state[key] for name, key in actual.items()}
    names = {key: key for key in weights} if strict else _matched(weights, wanted, path)
    file = {name: weights[key] for key, name in names.items()}
    fits = {name: file[name] for name in wanted if name in file and _fit(file[name], wanted[name])}
    report = LoadReport(
        loaded=tuple(fits),
        missing=tuple(name for name in wanted if name not in file),
        unexpected=tuple(key for key in weights if names.get(key) not in wanted),
        mismatched=tuple(name for name in wanted if name in file and name not in fits),
    )
    others = [f"{name} ({_what(file[name])} for {_what(wanted[name])})" for name in report.mismatched]
    if strict and (report.missing or report.unexpected or report.mismatched):
        problems = {"missing": report.missing, "unexpected": report.unexpected, "of another shape or kind": others}
        lists = "; ".join(_shortened(kind, names) for kind, names in problems.items() if names)
        raise ValueError(f"{path} does not fit the model: {lists}. Build the model with the options it was saved with.")
    if not fits or (others and not any(value.is_floating_point() for value in fits.values())):  # but for counters
        found = _shortened("tensors", list(weights)) if weights else "no tensors"
        found += f" ({_shortened('top-level keys', checkpoint.keys)})" if checkpoint.keys else ""
        unlike = f"; of another shape or kind are {', '.join(others[:3])}" if others else ""
        raise ValueError(f"nothing in {path} fits the model: it has {found}{unlike}.")
    bad = [name for name, value in fits.items() if not _finite(value, wanted[name])]
    if bad:
        raise ValueError(
            f"{path} holds NaN or infinite numbers in {_shortened('tensors', bad)}: the training that wrote it had "
            "diverged, or the file is damaged. Nothing was loaded."
        )
    share = sum(value.numel() for value in fits.values()) / max(1, sum(value.numel() for value in wanted.values()))
    if share < at_least:
        raise ValueError(
            f"{path} fits {100 * share:.0f} % of {type(model).__name__} only, so that it seems to be of another model: "
            f"{_shortened('missing', report.missing)}; {_shortened('unexpected', report.unexpected)}; "
            f"{_shortened('of another shape or kind', others)}. Nothing was loaded."
        )
    model.load_state_dict({actual[name]: value for name, value in fits.items()}, strict=False)
    if not strict:
        complete = not report.mismatched and not (at_least and report.missing)
        _log.log(logging.INFO if complete else logging.WARNING, "%s: %r", path, report)
    return report


def read_checkpoint(path: str | os.PathLike, *, prefix: str | None = None) -> dict[str, Tensor]:
    """Reads the tensors of a ``.safetensors`` or ``torch.save`` file by name, on the CPU, without running its code.

    What a checkpoint wraps them in (``state_dict``, ``model``, ``net_dict``, ...) and what ``DataParallel`` and
    ``torch.compile`` put in front of all names are taken off; NumPy arrays become tensors; what is no tensor is left
    out.

    Args:
        path: of the file.
        prefix: takes only what the file has behind it, without it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a broken file, one that holds more than tensors and plain values (the message says what), or one
            that has nothing behind the prefix.
    """
    return _read(path_of(path), prefix).tensors


def path_of(path: str | os.PathLike) -> Path:
    """A path as people write it: with ``~``, or ``local-dir:`` before it."""
    return Path(os.fspath(path).removeprefix("local-dir:")).expanduser()


class _Checkpoint(NamedTuple):
    tensors: dict[str, Tensor]
    keys: list[str]  # at the top of a torch.save file


def _read(path: Path, prefix: str | None) -> _Checkpoint:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; expected a .safetensors file or a directory with {WEIGHTS}.")
    if path.suffix == ".safetensors" or _is_safetensors(path):
        tensors, root, keys = _read_safetensors(path), "", []
    else:
        content = _read_pickle(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds no state dict, but {type(content).__name__}.")
        tensors, keys = _flat(content), [str(key) for key in content]
        root = _root(content, tensors, path)
    inside = {name.removeprefix(root): tensor for name, tensor in tensors.items() if name.startswith(root)}
    if prefix is not None and not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string, the beginning of names in {path}, got {prefix!r}.")
    if prefix is None:
        return _Checkpoint(_without_wrappers(inside), keys)
    for names in (inside, tensors):
        if found := {name.removeprefix(prefix): x for name, x in names.items() if name.startswith(prefix)}:
            return _Checkpoint(_without_wrappers(found), keys)
    first = sorted({name.partition(".")[0] + "." for name in (*inside, *tensors)})
    raise ValueError(f"{path} has nothing behind the prefix {prefix!r}; its names begin with {', '.join(first[:10])}.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with utf8_name(path) as name:
            return safetensors.torch.load_file(name)
    except safetensors.SafetensorError as error:
        with open(path, "rb") as file:
            pickled = file.read(2) in (b"PK", b"\x80\x02")
        if pickled:
            raise ValueError(
                f"{path} is a pickle (of torch.save) under the name of a safetensors file. It is not loaded, since "
                "unpickling can run code."
            ) from error
        raise ValueError(f"{path} is no complete safetensors file: {error}.") from error


def _is_safetensors(path: Path) -> bool:
    """Whether a file of any name begins as safetensors do: the length of a JSON object, and that."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _read_pickle(path: Path) -> Any:
    with open(path, "rb") as file:
        start = file.read(20)
    if start and not start.startswith((b"PK", b"\x80")):
        raise ValueError(
            f"{path} is no file of torch.save, it begins with {start!r}: a pointer of git LFS, a web page in place of "
            "the download, or an archive that has to be unpacked?"
        )
    if _is_torchscript(path):  # torch 2.0 would run it, weights_only or not
        raise ValueError(
            f"{path} is a TorchScript archive, which holds code: save the state dict of the model it was made from."
        )
    try:
        with _numpy_allowed():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|class|function) ([\w.]+\w)", str(error))
        what = refused[1] if refused else str(error).strip().splitlines()[-1]
        if not refused and start.startswith(b"\x80") and _MAGIC not in start:
            what = "it was written by pickle, not by torch.save"
        if what.startswith("numpy.") and not hasattr(torch.serialization, "get_safe_globals"):
            what += ", which torch 2.4 and later can read"
        raise ValueError(
            f"{path} holds more than tensors ({what}), and reading it could run code: save its state dict alone, where "
            "you trust it."
        ) from error
    except Exception as error:  # what torch and its unpickler raise at a damaged or hostile file is not listed anywhere
        raise ValueError(f"{path} is no complete torch.save file: {type(error).__name__}: {error}.") from error


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _flat(content: dict) -> dict[str, Tensor]:
    """All tensors in dicts of dicts, by their keys joined with dots. A dict that is met again is not entered again."""
    tensors: dict[str, Tensor] = {}
    seen = {id(content)}
    todo: list[tuple[str, dict, int]] = [("", content, 0)]
    while todo:
        before, node, depth = todo.pop()
        deeper = []
        for key, value in node.items():
            if not isinstance(key, str) or (not before and key.startswith(("optim", "scheduler", "lr_scheduler"))):
                continue
            if isinstance(value, _Array):
                value = value.tensor()
            if isinstance(value, Tensor):
                tensors[before + key] = value
            elif isinstance(value, dict) and id(value) not in seen and depth < _DEPTH:
                seen.add(id(value))
                deeper.append((f"{before}{key}.", value, depth + 1))
        todo += reversed(deeper)
    return tensors


def _root(content: dict, tensors: Mapping[str, Tensor], path: Path) -> str:
    """What stands before the names of the weights, as the dicts that a checkpoint wraps them in have it."""
    root, node = "", content
    for _ in range(_DEPTH):
        counts = {
            key: sum(name.startswith(f"{root}{key}.") for name in tensors)
            for key, value in node.items()
            if isinstance(key, str) and isinstance(value, dict)
        }
        counts = {key: count for key, count in counts.items() if count}
        known = [key for key in _WRAPPERS if key in counts]
        here = any(isinstance(value, (Tensor, _Array)) for value in node.values())
        if not known and (here or len(counts) != 1):
            break
        key = known[0] if known else next(iter(counts))
        if beside := [other for other, count in counts.items() if other != key and 2 * count >= counts[key]]:
            _log.warning(
                "%s: the weights are those of %r; it also has %s, which prefix=%r takes.",
                path,
                root + key,
                ", ".join(map(repr, beside)),
                f"{root}{beside[0]}.",
            )
        root, node = f"{root}{key}.", node[key]
    return root


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers put there: ``_orig_mod`` anywhere, ``module`` in front of all of them."""
    plain = {re.sub(r"(?:(?<=\.)|^)_orig_mod\.", "", name): tensor for name, tensor in tensors.items()}
    while plain and all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): tensor for name, tensor in plain.items()}
    return plain


def _wrapped(module: nn.Module) -> str | None:
    """The name under which a wrapper holds the module that it wraps; None: it is no wrapper."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    return "_orig_mod" if "_orig_mod" in getattr(module, "_modules", ()) else None


class _Type:
    """Stands for a NumPy dtype in a pickle."""

    def __init__(self, code: str, *_: object):
        self.code = str(code)
        self.order = "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="

    def values(self, raw: bytes) -> np.ndarray | None:
        """The numbers in ``raw``; None where they are none."""
        if not re.fullmatch(r"b1|[iuf][1248]", self.code):
            return None
        dtype = np.dtype(self.order + self.code)
        return np.frombuffer(raw, dtype).astype(dtype.newbyteorder("="))


class _Array:
    """Stands for a NumPy array in a pickle."""

    def __init__(self, *_: object):
        self.state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def tensor(self) -> Tensor | None:
        if len(self.state) != 5 or not isinstance(self.state[2], _Type):
            return None
        _, shape, dtype, fortran, raw = self.state
        values = dtype.values(bytes(raw)) if isinstance(raw, (bytes, bytearray)) else None
        if values is None or math.prod(shape) != values.size:
            return None
        try:
            return torch.from_numpy(values.reshape(shape, order="F" if fortran else "C").copy())
        except (TypeError, ValueError):  # uint16, which torch did not have
            return None


def _number(dtype: _Type, raw: bytes = b"") -> Any:
    values = dtype.values(raw)
    return None if values is None or values.size != 1 else values.item()


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """How a pickle of torch.save writes bytes. No weight file needs another codec, and some codecs take for ever."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"Unsupported function _codecs.encode to {encoding!r}")
    return text.encode("latin1")


def _in_place_of(name: str, call: Callable[..., object]) -> Callable[..., object]:
    """A function that torch's unpickler takes for the global of that name."""

    def stand_in(*args: object) -> object:
        return call(*args)

    stand_in.__module__, _, stand_in.__name__ = name.rpartition(".")
    stand_in.__qualname__ = stand_in.__name__
    return stand_in


# Checkpoints often hold NumPy numbers and arrays (the best rank-1): classes of our own take what a pickle makes of
# them, so that none of NumPy's code runs on a stranger's bytes.
_NUMPY: list[Any] = [
    *(_in_place_of(f"numpy.{core}.multiarray.scalar", _number) for core in ("core", "_core")),
    *(_in_place_of(f"numpy.{core}.multiarray._reconstruct", _Array) for core in ("core", "_core")),
    _in_place_of("numpy.dtype", _Type),
    _in_place_of("numpy.ndarray", _Array),
    _Type,
    _Array,
]
_reading = threading.Lock()  # what torch allows is one list for all threads


@contextmanager
def _numpy_allowed() -> Iterator[None]:
    """Lets torch's unpickler read NumPy's numbers (since torch 2.4), and no text in codecs that it would allow."""
    serialization = torch.serialization
    with _reading:
        allowed: dict[str, Any] = getattr(torch._weights_only_unpickler, "_get_allowed_globals", dict)()
        encode = allowed.get("_codecs.encode")
        before = serialization.get_safe_globals() if hasattr(serialization, "get_safe_globals") else None
        try:
            if encode is not None:
                allowed["_codecs.encode"] = _latin1
            if before is not None:
                serialization.add_safe_globals(_NUMPY)
            yield
        finally:
            if encode is not None:
                allowed["_codecs.encode"] = encode
            if before is not None:
                serialization.clear_safe_globals()
                serialization.add_safe_globals(before)


def sha256_of(path: str | os.PathLike) -> str:
    """The checksum of a file, read in parts."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Raises ValueError unless the file has this checksum."""
    got = sha256_of(path)
    if got != expected:
        raise ValueError(
            f"{path} is not the file that was released: its sha256 is {got}, expected {expected}. Delete "
            f"{path.resolve()} and load it again; if that does not help, the file on the Hub is another one: do not "
            "use it, and report it."
        )


def _matched(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> dict[str, str]:
    """The file's names -> the model's: the prefix taken off and the one put on with which most tensors fit.

    Raises:
        ValueError: another prefix, of other tensors, does as well.
    """
    off = {""}
    for key in weights:
        words = key.split(".")[:-1]
        off |= {".".join(words[:i]) + "." for i in range(1, min(len(words), _DEPTH) + 1)}
    inner = any(".module." in f".{name}" for name in wanted)  # the model has such a name itself
    found: list[tuple[int, int, str, dict[str, str]]] = []
    for before in sorted(off, key=lambda name: (name.count("."), name)):
        names = {key: key.removeprefix(before) for key in weights if key.startswith(before)}
        if not inner:
            names = {key: name.replace(".module.", ".") for key, name in names.items()}
        for part in _PARTS:
            pairs = {key: part + name for key, name in names.items() if part + name in wanted}
            if pairs:
                fits = sum(_fit(weights[key], wanted[name]) for key, name in pairs.items())
                found.append((fits, len(pairs), before, pairs))
    if not found:
        return {}
    best = max(found, key=lambda match: match[:2])
    for fits, _, before, pairs in found:
        if best[2] and 2 * fits > best[0] and not pairs.keys() & best[3].keys():
            raise ValueError(
                f"{path} holds two networks that fit, behind {min(best[2], before)!r} and {max(best[2], before)!r}: "
                f"say which by prefix={best[2]!r}."
            )
    return best[3]


def _fit(value: Tensor, wanted: Tensor) -> bool:
    plain = value.layout == torch.strided and not (value.is_meta or value.is_quantized)
    return plain and value.shape == wanted.shape and _kind(value) == _kind(wanted)


def _kind(value: Tensor) -> str:
    if value.is_floating_point():
        return "floating point"
    return "complex" if value.is_complex() else "bool" if value.dtype == torch.bool else "integer"


def _what(value: Tensor) -> str:
    kind = "meta " if value.is_meta else "" if value.layout == torch.strided else "sparse "
    return f"{list(value.shape)} {kind}{str(value.dtype).removeprefix('torch.')}"


def _finite(value: Tensor, wanted: Tensor) -> bool:
    return not wanted.is_floating_point() or bool(value.to(wanted.dtype).isfinite().all())


def _shortened(kind: str, names: Iterable[str]) -> str:
    names = list(names)
    return f"{len(names)} {kind}{': ' if names else ''}{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
