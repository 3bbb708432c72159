"""GeM over time: the generalised mean of the frame vectors.

Radenović, Tolias, Chum: Fine-tuning CNN Image Retrieval with No Human Annotation, TPAMI 2018.

The paper pools the places of a map; here the frames of a clip are pooled, each an average-pooled vector (ours). p = 1
is the mean, and p to infinity the maximum.
"""

import torch
from torch import Tensor, nn

from .. import masked
from .base import Aggregator, Details, frame_vectors
from .pooling import Sums
from .registry import ClipConfig, Paper, register_aggregator

__all__ = ["GeM"]

PAPER = Paper(
    name="GeM",
    title="Fine-tuning CNN Image Retrieval with No Human Annotation",
    authors=("Filip Radenović", "Giorgos Tolias", "Ondřej Chum"),
    venue="IEEE Transactions on Pattern Analysis and Machine Intelligence",
    year=2018,
    url="https://arxiv.org/abs/1711.02512",
)


@register_aggregator("gem", clip=ClipConfig(length=4), paper=PAPER)
class GeM(Aggregator):
    """f_c = (mean over the real frames of x_c^p)^(1/p), D = C.

    Values below ``eps`` count as ``eps``: the features are those behind a ReLU, as the paper has them; of others, what
    is negative is lost. A frame's weight is its share of the sum, the mean over the channels.

    Args:
        in_features: C.
        p: the exponent at the start; the paper's is 3.
        learn: whether p is trained. It is one for all channels; the paper's formula has one for each.
        eps: the smallest value that counts.

    Raises:
        ValueError: ``p`` or ``eps`` that is not positive.
    """

    streaming_reason = ""

    def __init__(self, in_features: int, p: float = 3.0, learn: bool = True, eps: float = 1e-6):
        if p <= 0 or eps <= 0:
            raise ValueError(f"GeM: p and eps must be positive, got {p} and {eps}.")
        super().__init__(in_features, in_features)
        self.p = nn.Parameter(torch.tensor(float(p)), requires_grad=learn)
        self.eps = eps

    def aggregate(self, features: Tensor, mask: Tensor, frames: Tensor | None) -> Details:
        powers = masked.zero(self._powers(features), mask)
        weights = (powers / powers.sum(1, keepdim=True)).mean(2)
        return Details(self._root(masked.mean(powers, mask)).to(features.dtype), mask, weights, {}, {})

    def _powers(self, features: Tensor) -> Tensor:
        x = masked.at_least_float32(frame_vectors(features))
        return x.clamp(min=self.eps) ** self.p.to(x.dtype)

    def _root(self, mean: Tensor) -> Tensor:
        return mean ** (1 / self.p.to(mean.dtype))

    def _begin(self, batch: int, like: Tensor) -> Sums:
        return Sums.begin(batch, self.in_features, like)

    def _update(self, state: Sums, features: Tensor, mask: Tensor) -> Sums:
        return state.add(self._powers(features), mask)

    def _read(self, state: Sums) -> Tensor:
        return self._root(state.mean())
