"""Weight files: reading them, checking them, and putting them into a model."""

import _codecs
import hashlib
import logging
import os
import pickle
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

__all__ = ["LoadReport", "load_weights", "read_checkpoint"]

_log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
_WRAPPERS = ("state_dict", "model")  # what torchreid and fast-reid call the weights in a checkpoint
_PARTS = ("", "encoder.", "encoder.backbone.", "aggregator.")  # of a TrackletModel, that a file may be of

# Checkpoints often hold a NumPy number beside the weights (the best rank-1); what that takes, and no more.
_scalar = np.float64().__reduce__()[0]
_NUMBERS = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    (np.dtype, "numpy.dtype"),
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    _codecs.encode,
]


class LoadReport(NamedTuple):
    """What :func:`load_weights` did.

    Attributes:
        loaded: the model's tensors that were set.
        missing: the model's tensors that the file does not have; they stayed what they were.
        unexpected: the file's tensors that the model does not have, by their names in the file.
        mismatched: the model's tensors that have another shape in the file; they stayed what they were.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]


def load_weights(model: nn.Module, path: str | os.PathLike, strict: bool = True) -> LoadReport:
    """Loads weights into a model, in place.

    With ``strict=False`` what fits is loaded and the rest is reported. The file may then come from elsewhere: also a
    ``torch.save`` file (read with ``weights_only=True``), wrapped in a checkpoint (``state_dict``, ``model``), behind
    prefixes (``module.``, ``backbone.``, ``base.``, ...), of the whole model or only of its encoder, backbone or
    aggregator, with a classifier that the model does not have.

    Args:
        model: a :class:`TrackletModel`, or any module.
        path: a ``.safetensors`` file, or a directory with ``model.safetensors``.
        strict: every key must be the model's, and the other way round.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file; strict: keys or shapes that are not the model's (the message names them);
            else: a file of which nothing fits.
    """
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS
    if strict and path.suffix != ".safetensors" and path.is_file():
        raise ValueError(
            f"{path}: only .safetensors files are loaded, since unpickling can run code. load_weights(model, path, "
            "strict=False) takes a torch.save file of tensors, and reports what fitted."
        )
    weights = read_checkpoint(path)
    wanted = model.state_dict()
    names = {key: key for key in weights} if strict else _matched(weights, wanted)
    fits = {
        name: weights[key] for key, name in names.items() if name in wanted and weights[key].shape == wanted[name].shape
    }
    found = set(names.values())
    report = LoadReport(
        loaded=tuple(name for name in wanted if name in fits),
        missing=tuple(name for name in wanted if name not in found),
        unexpected=tuple(key for key in weights if names.get(key) not in wanted),
        mismatched=tuple(name for name in wanted if name in found and name not in fits),
    )
    if strict and (report.missing or report.unexpected or report.mismatched):
        file = {name: weights[key] for key, name in names.items()}
        shapes = [f"{name} {list(file[name].shape)} for {list(wanted[name].shape)}" for name in report.mismatched]
        problems = {"missing": report.missing, "unexpected": report.unexpected, "of another shape": shapes}
        lists = "; ".join(_shortened(kind, names) for kind, names in problems.items() if names)
        raise ValueError(f"{path} does not fit the model: {lists}. Build the model with the options it was saved with.")
    if not fits:
        raise ValueError(f"nothing in {path} fits the model: it has {_shortened('tensors', list(weights))}.")
    model.load_state_dict(fits, strict=False)
    if not strict:
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in report._asdict().items())
        _log.info("%s: %s", path, counts)
    return report


def read_checkpoint(path: str | os.PathLike) -> dict[str, Tensor]:
    """Reads the tensors of a ``.safetensors`` or ``torch.save`` file by name, on the CPU, without running its code.

    What a checkpoint wraps them in (``state_dict``, ``model``) and a ``module.`` in front of all names are taken off;
    what is no tensor is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a broken file, or one that holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; expected a .safetensors file or a directory with {WEIGHTS}.")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            with open(path, "rb") as file:
                pickled = file.read(2) in (b"PK", b"\x80\x02")
            if pickled:
                raise ValueError(
                    f"{path} is a pickle (of torch.save) under the name of a safetensors file. It is not loaded, since "
                    "unpickling can run code."
                ) from error
            raise ValueError(f"{path} is no complete safetensors file: {error}.") from error
    with open(path, "rb") as file:
        start = file.read(20)
    if start and not start.startswith((b"PK", b"\x80")):
        raise ValueError(
            f"{path} is no file of torch.save, it begins with {start!r}: a pointer of git LFS, or a web page in "
            "place of the download?"
        )
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and reading it could run code: save its state dict alone, where you "
            "trust it."
        ) from error
    except (EOFError, IndexError, RuntimeError, struct.error) as error:
        raise ValueError(f"{path} is no complete torch.save file: {error}.") from error
    while isinstance(content, dict) and (inside := [key for key in _WRAPPERS if isinstance(content.get(key), dict)]):
        content = content[inside[0]]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no state dict, but {type(content).__name__}.")
    weights = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    while weights and all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
    return weights


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


def _matched(weights: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, str]:
    """The file's names -> the model's: the prefix taken off and the one put on with which most tensors fit."""
    off = {""}
    for key in weights:
        words = key.split(".")[:-1]
        off |= {".".join(words[:i]) + "." for i in range(1, min(len(words), 3) + 1)}
    best, names = (0, 0), {}
    for before in sorted(off, key=len):
        for part in _PARTS:
            pairs = {key: part + key.removeprefix(before) for key in weights if key.startswith(before)}
            pairs = {key: name for key, name in pairs.items() if name in wanted}
            fits = sum(weights[key].shape == wanted[name].shape for key, name in pairs.items())
            if (fits, len(pairs)) > best:
                best, names = (fits, len(pairs)), pairs
    return names


def _shortened(kind: str, names) -> str:
    return f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
