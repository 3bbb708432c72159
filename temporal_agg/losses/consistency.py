"""Consistency regularization of aligned regions: Chen et al., AAAI 2020 (FGRA), Eqs. 3 and 12."""

import torch
from torch import Tensor, nn

from .. import masked
from .._options import checked
from ._checks import check_labels, check_tensor

__all__ = ["ConsistencyLoss"]


class ConsistencyLoss(nn.Module):
    """Squared distances of a clip's region features to their centres, summed over regions and frames, mean over clips.

    The paper builds on the center loss (Wen et al., ECCV 2016) and trains the centres at a learning rate of their own,
    so they are parameters: one for each identity and region, zero at the start (ours). Eq. 3 to the letter has the mean
    of the clip's own features as centre instead: ``num_classes=None``. Neither form divides by the number of frames.

    Args:
        num_classes: identities that have centres; None = the clip's own means, and no parameters.
        num_regions: N_s. Needed for centres only.
        in_features: C. Needed for centres only.
    """

    @checked
    def __init__(self, num_classes: int | None = None, num_regions: int = 4, in_features: int = 2048):
        super().__init__()
        self.centres = None
        if num_classes is not None:
            if min(num_classes, num_regions, in_features) < 1:
                raise ValueError(
                    "num_classes, num_regions and in_features must be >= 1, "
                    f"got {num_classes}, {num_regions}, {in_features}."
                )
            self.centres = nn.Parameter(torch.zeros(num_classes, num_regions, in_features))

    def forward(self, regions: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes the loss.

        Args:
            regions: ``[B, T, N_s, C]``, the aligned features F.
            labels: int64 ``[B]``, from 0 to ``num_classes - 1``; unused by the clip's own means.
            mask: bool ``[B, T]``, True = a real frame; None = all are real.

        Raises:
            TypeError: no tensors, or of other kinds of numbers.
            ValueError: shapes that do not fit each other or the centres, or labels out of range.
        """
        check_tensor("ConsistencyLoss", "regions", regions)
        labels = check_labels("ConsistencyLoss", labels, None if self.centres is None else len(self.centres))
        if regions.dim() != 4 or labels.shape != regions.shape[:1]:
            raise ValueError(
                f"expected regions [B, T, N_s, C] and labels [B], got {list(regions.shape)} and {list(labels.shape)}."
            )
        if mask is None:
            mask = masked.all_real(regions)
        masked.check(mask, (regions.shape[0], regions.shape[1]))
        regions = masked.at_least_float32(regions)
        if self.centres is None:
            centres = masked.mean(regions, mask)
        elif self.centres.shape[1:] == regions.shape[2:]:
            centres = self.centres[labels]
        else:
            raise ValueError(
                f"the centres are for regions [B, T, {', '.join(map(str, self.centres.shape[1:]))}], got "
                f"{list(regions.shape)}: build the loss with their num_regions and in_features."
            )
        difference = masked.zero(regions - centres.unsqueeze(1), mask)
        return difference.square().sum() / len(regions)  # Eqs. 3, 12

    def extra_repr(self) -> str:
        return "centres=own mean" if self.centres is None else f"centres={list(self.centres.shape)}"
