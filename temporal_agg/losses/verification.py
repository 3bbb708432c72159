"""Verification loss over the pairs of a batch (Liu et al., CVPR 2021, arXiv:2103.04337, Eq. 11)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import masked
from .._options import checked
from ._checks import check_labels, check_tensor

__all__ = ["VerificationLoss"]


class VerificationLoss(nn.Module):
    """Binary cross-entropy of "same person?" over all pairs of a probe and a gallery clip of the batch.

    The paper leaves the similarity open; as in the released code it is the softmax of
    Linear(C, 2)(BatchNorm((p - g)^2)), whose second entry is the probability of "same".

    Args:
        in_features: C.
    """

    @checked
    def __init__(self, in_features: int):
        super().__init__()
        if in_features < 1:
            raise ValueError(f"in_features must be >= 1, got {in_features}.")
        self.norm = nn.BatchNorm1d(in_features)
        self.classifier = nn.Linear(in_features, 2)
        nn.init.normal_(self.classifier.weight, std=1e-3)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Computes the loss, the mean over the (N/2)^2 pairs.

        Args:
            embeddings: ``[N, C]``, L2-normalised; samples 2j and 2j + 1 are a probe and a gallery clip of one person.
                In training, BatchNorm needs more than one pair: N >= 4.
            labels: integers ``[N]``.

        Raises:
            TypeError: no tensors, or of other kinds of numbers.
            ValueError: shapes that do not fit each other, or a batch that is not made of such pairs.
        """
        check_tensor("VerificationLoss", "embeddings", embeddings)
        labels = check_labels("VerificationLoss", labels)
        C = self.norm.num_features
        if labels.dim() != 1 or embeddings.shape != (*labels.shape, C):
            raise ValueError(
                f"expected embeddings [N, {C}] and labels [N], got {list(embeddings.shape)} and {list(labels.shape)}."
            )
        probes, gallery = labels[0::2], labels[1::2]
        if len(labels) % 2 or len(labels) == 0 or not (masked.is_compiling() or torch.equal(probes, gallery)):
            raise ValueError(
                "the verification loss takes batches of pairs: samples 2j and 2j + 1 must be of one person, got the "
                f"labels {labels.tolist()}. Use the paired batch sampler."
            )
        with torch.autocast(embeddings.device.type, enabled=False):
            x = masked.at_least_float32(embeddings)
            difference = (x[0::2, None] - x[None, 1::2]).square().flatten(0, 1)
            same = (probes[:, None] == gallery).flatten()
            # Eq. 11: of two classes, softmax and binary cross-entropy are the cross-entropy.
            return F.cross_entropy(self.classifier(self.norm(difference)), same.long())
