"""Online Instance Matching loss (Xiao et al., CVPR 2017, arXiv:1604.01850; its part with labels), as GRL uses it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import masked
from .._options import checked
from ._checks import check_labels, check_tensor

__all__ = ["OIMLoss"]


class OIMLoss(nn.Module):
    """Cross-entropy of the similarities to a table that holds one vector per identity.

    loss = cross_entropy(scale * x . table^T, label), mean over the real samples. The table is a buffer, learned by
    moving averages instead of gradients: :meth:`forward` in training mode remembers its samples, and
    :meth:`after_step`, to be called after each optimizer step, takes them up. So every loss of a step, gradient
    accumulation included, reads the table as it stood before the step. In training without :meth:`after_step` the
    remembered samples pile up.

    The loss does not communicate. With several processes, give each of them the gathered samples of all, in the same
    order: the tables then stay equal by themselves.

    Args:
        num_classes: identities; labels are 0 to ``num_classes - 1``.
        in_features: D.
        scale: the factor of the similarities (an inverse temperature).
        momentum: the share of the old vector in an update.
    """

    table: Tensor

    @checked
    def __init__(self, num_classes: int, in_features: int, scale: float = 30.0, momentum: float = 0.5):
        super().__init__()
        if min(num_classes, in_features) < 1:
            raise ValueError(f"num_classes and in_features must be >= 1, got {num_classes} and {in_features}.")
        if not (0 < scale < float("inf") and 0 <= momentum <= 1):
            raise ValueError(f"scale must be above 0 and momentum a share, from 0 to 1, got {scale} and {momentum}.")
        self.scale = scale
        self.momentum = momentum
        self.register_buffer("table", torch.zeros(num_classes, in_features))
        self._samples: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        turn: int | Tensor = 0,
        ahead: bool = False,
    ) -> Tensor:
        """Computes the loss, and in training mode remembers the samples for :meth:`after_step`.

        Args:
            embeddings: ``[N, D]``, L2-normalised.
            labels: int64 ``[N]``.
            mask: bool ``[N]``, the samples that count, for the loss and for the table; None = all.
            turn: of all samples, or of each ``[N]``: the samples of a step enter the table by turn, lowest first,
                whatever the order of the calls.
            ahead: in training the gradient is taken with the table as the samples remembered so far will leave it; the
                value is not. It is what comes of code that updates its table in the backward pass.

        Raises:
            TypeError: no tensors, or of other kinds of numbers.
            ValueError: shapes that do not fit each other or the table, or labels out of range.
        """
        classes, D = self.table.shape
        check_tensor("OIMLoss", "embeddings", embeddings)
        labels = check_labels("OIMLoss", labels, classes)
        if mask is None:
            mask = torch.ones(labels.shape, dtype=torch.bool, device=labels.device)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"OIMLoss: mask must be a bool tensor [N] (True = it counts), got {got}.")
        if labels.dim() != 1 or embeddings.shape != (*labels.shape, D) or mask.shape != labels.shape:
            raise ValueError(
                f"expected embeddings [N, {D}], labels [N] and mask [N], got {list(embeddings.shape)}, "
                f"{list(labels.shape)} and {list(mask.shape)}."
            )
        with torch.autocast(embeddings.device.type, enabled=False):
            x = masked.at_least_float32(embeddings)
            similarities = x @ self.table.to(x.dtype).T
            if ahead and self.training:
                moved = x @ self._taken_up().to(x.dtype).T
                similarities = similarities.detach() + (moved - moved.detach())
            loss = F.cross_entropy(self.scale * similarities, labels, reduction="none")
        if self.training:
            turns = torch.as_tensor(turn, device=labels.device).expand(labels.shape)
            self._samples.append((turns, x.detach(), labels, mask))
        return torch.where(mask, loss, 0).sum() / mask.sum().clamp(min=1)

    @torch.no_grad()
    def after_step(self) -> None:
        """Takes up the remembered samples, in order: row = m * row + (1 - m) * x, then L2-normalised."""
        if self._samples:
            self.table.copy_(self._taken_up())
            self._samples = []

    @torch.no_grad()
    def _taken_up(self) -> Tensor:
        """The table with the remembered samples, by turn."""
        table = self.table.clone()
        if not self._samples:
            return table
        turns, x, labels, mask = (torch.cat(column) for column in list(zip(*self._samples, strict=True)))
        in_turn = turns.argsort(stable=True)
        in_turn = in_turn[mask[in_turn]]
        x, labels = x[in_turn], labels[in_turn]
        # Identities do not touch each other's rows: one round takes the k-th sample of every identity that has one.
        order = labels.argsort(stable=True)
        rows, counts = labels.unique(return_counts=True)
        first = counts.cumsum(0) - counts
        for k in range(max(counts.tolist(), default=0)):
            more = counts > k
            row = rows[more]
            update = self.momentum * table[row] + (1 - self.momentum) * x[order[first[more] + k]].to(table.dtype)
            table[row] = F.normalize(masked.at_least_float32(update), dim=1).to(table.dtype)
        return table

    def extra_repr(self) -> str:
        return f"{list(self.table.shape)}, scale={self.scale}, momentum={self.momentum}"
