"""What losses and criteria are called with: one set of errors for all of them."""

import torch
from torch import Tensor

from .. import masked

__all__ = ["check_labels", "check_tensor"]


def check_tensor(who: str, name: str, x: Tensor) -> None:
    """Raises TypeError unless ``x`` is a tensor of floating point numbers."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{who}: {name} must be a floating point tensor, got {got}.")


def check_labels(who: str, labels: Tensor, num_classes: int | None = None) -> Tensor:
    """The labels in int64: torch takes bytes for a mask where they stand as indices, and refuses shorter types.

    Args:
        who: is called with them, for the message.
        labels: integers of any width.
        num_classes: they must be class indices below it (checked in eager mode only); None: any.

    Raises:
        TypeError: no tensor of whole numbers.
        ValueError: labels out of range.
    """
    whole = isinstance(labels, Tensor) and not (
        labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    )
    if not whole:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{who}: labels must be a tensor of whole numbers [B], int64, got {got}.")
    labels = labels.long()
    if num_classes is not None and not masked.is_compiling() and labels.numel():
        low, high = torch.stack(labels.aminmax()).tolist()
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{who}: labels must be class indices from 0 to num_classes - 1 = {num_classes - 1}, got {low} to "
                f"{high}. Map identities to classes (TrackletData.label_map), and leave junk out."
            )
    return labels
