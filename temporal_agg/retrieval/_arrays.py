"""What people pass as embeddings, numbers and ids -> tensors and arrays to rely on, or a message that helps."""

import operator
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["Array", "Ids", "as_tensors", "ids", "largest_of", "like", "no_nan_rows", "peaks", "whole"]

Array = TypeVar("Array", np.ndarray, Tensor)
Ids = Sequence[int] | np.ndarray | Tensor

_NUMBERS = 2**18  # that are looked at at once, in the processor's caches


def as_tensors(**arrays: np.ndarray | Tensor) -> list[Tensor]:
    """The arrays as floating-point tensors on one device: float64 as it is, all else in float32.

    Raises:
        TypeError: numpy mixed with torch, neither of them, or no real numbers.
        ValueError: different devices.
    """
    names, given = " and ".join(arrays), list(arrays.values())
    if not any(all(isinstance(x, kind) for x in given) for kind in (np.ndarray, Tensor)):
        types = " and ".join(type(x).__name__ for x in given)
        raise TypeError(
            f"{names} must be {len(given)} numpy arrays or {len(given)} torch tensors, got {types}. Lists go through "
            "np.array."
        )
    found = []
    for name, x in arrays.items():
        if x.dtype.kind not in "fiub" if isinstance(x, np.ndarray) else x.is_complex():
            raise TypeError(f"{name} must hold real numbers, got {x.dtype}.")
        if isinstance(x, Tensor):
            if x.layout != torch.strided:
                raise TypeError(f"{name} must be a dense tensor, got {x.layout}: pass {name}.to_dense().")
            x = x.detach()
            found.append(x if x.dtype in (torch.float32, torch.float64) else x.float())
        else:  # torch takes neither read-only nor reversed arrays: np.require copies those, and other types
            wide = x.dtype.kind == "f" and x.dtype.itemsize >= 8
            found.append(torch.from_numpy(np.require(x, np.float64 if wide else np.float32, ["C", "W"])))
    for name, tensor in zip(arrays, found, strict=True):
        if tensor.device != found[0].device:
            raise ValueError(
                f"{names} must be on one device, got {found[0].device} and, for {name}, {tensor.device}: move one to "
                "the other's."
            )
    return found


def peaks(name: str, x: Tensor) -> Tensor:
    """:func:`largest_of` embeddings.

    Raises:
        ValueError: rows that hold NaN or infinity; the message names them.
    """
    largest = largest_of(x)
    no_nan_rows(name, largest)
    return largest


def largest_of(x: Tensor) -> Tensor:
    """The largest absolute value of each row ``[N]``: NaN or infinite if it holds such a number."""
    size = max(1, _NUMBERS // max(1, x.shape[1]))
    largest, room = x.new_empty(len(x)), x.new_empty(min(size, len(x)), x.shape[1])
    for rows, out in zip(x.split(size), largest.split(size), strict=True):
        torch.amax(torch.abs(rows, out=room[: len(rows)]), 1, out=out)
    return largest


def no_nan_rows(name: str, of_rows: Tensor) -> None:
    """Raises where what is known of rows is NaN or infinite."""
    wrong = (~of_rows.isfinite()).nonzero()[:, 0].tolist()
    if wrong:
        shown = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        where = f"{name}[{wrong[0]}] holds" if len(wrong) == 1 else f"{name}: {len(wrong)} rows ({shown}) hold"
        raise ValueError(
            f"{where} NaN or infinity, which is near to nothing and far from nothing. Look for it in the weights, the "
            "frames and the precision that the embeddings were made with, or leave those rows out."
        )


def like(out: Tensor, given: Array) -> Array:
    """A result, of the kind of what was given."""
    return out.numpy() if isinstance(given, np.ndarray) else out


def whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number that is not too small.

    Raises:
        TypeError: no whole number.
        ValueError: below ``least``.
    """
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be a whole number, got {value!r}.") from error
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}.")
    return number


def ids(name: str, given: Ids, length: int, fits: str) -> np.ndarray:
    """Persons, cameras or places as int64 ``[length]``.

    Raises:
        TypeError: no integers.
        ValueError: another shape.
    """
    found = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    if found.shape != (length,):
        raise ValueError(f"{name} must have the shape [{length}] to fit {fits}, got {list(found.shape)}.")
    if found.dtype.kind not in "iu" and length:
        raise TypeError(f"{name} must be integers, got {found.dtype}.")
    return found.astype(np.int64)
