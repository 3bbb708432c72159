"""Triplet loss with batch-hard mining (Hermans et al., arXiv:1703.07737, Eq. 5) or one random triplet per anchor."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import masked
from .._options import checked
from ._checks import check_labels, check_tensor

__all__ = ["TripletLoss", "euclidean_distances"]


def euclidean_distances(x: Tensor, y: Tensor) -> Tensor:
    """Pairwise Euclidean distances ``[N, D], [M, D] -> [N, M]`` in at least float32.

    The gradient at distance 0 is 0, so that identical embeddings never give NaN. Differences are summed directly for
    batches, so near-identical vectors keep their digits.
    """
    with torch.autocast(x.device.type, enabled=False):
        return torch.cdist(
            masked.at_least_float32(x), masked.at_least_float32(y), compute_mode="donot_use_mm_for_euclid_dist"
        )


class TripletLoss(nn.Module):
    """max(0, margin + d(anchor, positive) - d(anchor, negative)), mean over the anchors.

    An anchor's positives exclude itself; anchors without a positive or a negative are left out of the mean, and a batch
    with none at all gives a differentiable zero.

    Args:
        margin: in the embedding's units; None = the soft margin ``log(1 + exp(d_ap - d_an))``.
        mining: ``hard``: the farthest positive and the nearest negative in the batch; ``random``: one of each, drawn
            uniformly for each anchor.
        generator: draws the random triplets; None = torch's global generator.
        distance: ``euclidean``, or ``cosine``: 1 - cosine.
    """

    @checked
    def __init__(
        self,
        margin: float | None = 0.3,
        mining: str = "hard",
        generator: torch.Generator | None = None,
        distance: str = "euclidean",
    ):
        super().__init__()
        if distance not in ("euclidean", "cosine"):
            raise ValueError(f"distance must be 'euclidean' or 'cosine', got {distance!r}.")
        self.distance = distance
        if mining not in ("hard", "random"):
            raise ValueError(f"mining must be 'hard' or 'random', got {mining!r}.")
        if margin is not None and (isinstance(margin, bool) or not 0 <= margin < float("inf")):
            raise ValueError(f"margin must be a number of at least 0, or None for a soft margin, got {margin!r}.")
        self.margin = margin
        self.mining = mining
        self.generator = generator

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Computes the loss.

        Args:
            embeddings: ``[N, D]``.
            labels: integers ``[N]``.

        Raises:
            TypeError: no tensors, or of other kinds of numbers.
            ValueError: shapes that do not fit each other.
        """
        check_tensor("TripletLoss", "embeddings", embeddings)
        labels = check_labels("TripletLoss", labels)
        if embeddings.dim() != 2 or labels.shape != embeddings.shape[:1]:
            raise ValueError(
                f"expected embeddings [N, D] and labels [N], got {list(embeddings.shape)} and {list(labels.shape)}."
            )
        if self.distance == "cosine":
            with torch.autocast(embeddings.device.type, enabled=False):
                unit = F.normalize(masked.at_least_float32(embeddings), dim=1)
                distances = 1 - unit @ unit.T
        else:
            distances = euclidean_distances(embeddings, embeddings)
        same = labels[:, None] == labels
        positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        inf = float("inf")
        if self.mining == "hard":
            farthest = distances.detach().masked_fill(~positive, -inf).argmax(1, keepdim=True)
            nearest = distances.detach().masked_fill(same, inf).argmin(1, keepdim=True)
        else:
            farthest, nearest = self._draw(positive), self._draw(~same)
        difference = (distances.gather(1, farthest) - distances.gather(1, nearest)).squeeze(1)
        loss = F.softplus(difference) if self.margin is None else F.relu(difference + self.margin)
        valid = positive.any(1) & ~same.all(1)
        return torch.where(valid, loss, 0).sum() / valid.sum().clamp(min=1)

    def _draw(self, allowed: Tensor) -> Tensor:
        device = self.generator.device if self.generator is not None else allowed.device
        key = torch.rand(allowed.shape, generator=self.generator, device=device).to(allowed.device)
        return key.masked_fill(~allowed, -1).argmax(1, keepdim=True)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, mining={self.mining!r}, distance={self.distance!r}"
