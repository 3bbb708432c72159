"""Pyramid ranking regulariser (Wu, Zhu, Gong: Spatio-Temporal Associative Representation, BMVC 2019, Sec. 3.4)."""

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .. import masked
from .._options import checked
from ._checks import check_labels, check_tensor
from .triplet import TripletLoss

__all__ = ["PyramidRankingLoss"]


class PyramidRankingLoss(nn.Module):
    """Batch-hard triplets on each horizontal stripe of a pyramid over the frames' maps (Eqs. 9 and 10).

    A stripe of a frame is average-pooled to a vector; a stripe of a clip is the temporal average plus the temporal
    maximum of those, over real frames (the printed sum over L frames cancels the 1 / L). Each stripe looks for its own
    hardest positive and negative. Anchors without a positive or a negative are left out of a stripe's mean; a batch
    with none at all gives a differentiable zero. Stripes of a map whose height does not divide follow adaptive
    pooling: stripe z of G covers rows floor(z H / G) to ceil((z + 1) H / G), the last one excluded.

    Args:
        margin: of the triplets (alpha_1), in the features' units.
        stripes: the number of stripes of each pyramid level, G.
    """

    @checked
    def __init__(self, margin: float = 0.4, stripes: tuple[int, ...] = (1, 2, 4)):
        super().__init__()
        if not stripes or min(stripes) < 1:
            raise ValueError(f"stripes must be numbers of at least 1, one for each pyramid level, got {stripes!r}.")
        self.stripes = tuple(stripes)
        self.triplet = TripletLoss(margin)

    def forward(self, features: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes the loss.

        Args:
            features: the frames' maps ``[B, T, C, H, W]``.
            labels: integers ``[B]``.
            mask: bool ``[B, T]``, True = a real frame; None = all are real.

        Raises:
            TypeError: no tensors, or of other kinds of numbers.
            ValueError: shapes that do not fit each other.
        """
        check_tensor("PyramidRankingLoss", "features", features)
        labels = check_labels("PyramidRankingLoss", labels)
        if features.dim() != 5 or labels.shape != features.shape[:1]:
            raise ValueError(
                f"expected features [B, T, C, H, W] and labels [B], got {list(features.shape)} and "
                f"{list(labels.shape)}."
            )
        if mask is None:
            mask = masked.all_real(features)
        masked.check(mask, (features.shape[0], features.shape[1]))
        rows = masked.at_least_float32(features).mean(4)  # [B, T, C, H]: read once, pooled by each level
        levels = []
        for stripes in self.stripes:
            pooled = F.adaptive_avg_pool1d(rearrange(rows, "b t c h -> (b t) c h"), stripes)
            pooled = rearrange(pooled, "(b t) c g -> b t c g", b=len(labels))
            highest = pooled.masked_fill(~mask[..., None, None], float("-inf")).amax(1)
            vectors = masked.mean(pooled, mask) + highest  # [B, C, G]: F_Ta + F_Tm
            levels.append(sum(self.triplet(v, labels) for v in vectors.unbind(2)) / stripes)  # Eq. 10
        return sum(levels) / len(levels)  # Eq. 9; the mean over the batch is the triplet's

    def extra_repr(self) -> str:
        return f"stripes={self.stripes}"
