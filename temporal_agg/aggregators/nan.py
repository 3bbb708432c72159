"""NAN: two cascaded attention blocks over the frame vectors, blind to their order.

Yang, Ren, Zhang, Chen, Wen, Li, Hua: Neural Aggregation Network for Video Face Recognition, CVPR 2017.

The paper aggregates face features of unit length; here the vectors are taken as they come (ours).
"""

import torch
from torch import Tensor, nn

from .. import masked
from .base import Aggregator, Details, Frames, frame_vectors, weighted_sum
from .registry import ClipConfig, Paper, register_aggregator

__all__ = ["NAN"]

PAPER = Paper(
    name="NAN",
    title="Neural Aggregation Network for Video Face Recognition",
    authors=("Jiaolong Yang", "Peiran Ren", "Dongqing Zhang", "Dong Chen", "Fang Wen", "Hongdong Li", "Gang Hua"),
    venue="IEEE Conference on Computer Vision and Pattern Recognition (CVPR)",
    year=2017,
    url="https://arxiv.org/abs/1603.05474",
)


@register_aggregator("nan", clip=ClipConfig(length=4), paper=PAPER)
class NAN(Aggregator):
    """Block 0 weighs the frames by a learned kernel q0, block 1 by a kernel made of block 0's result; D = C.

    Block: e_k = q . f_k, a = softmax(e), r = sum_k a_k f_k. Between them q1 = tanh(W r0 + b). The
    embedding is r1, and the frame weights are its a. q0, W and b start at zero, so that the embedding starts as the
    mean (ours).

    A stream keeps every frame's vector: q1 depends on all frames, and then weighs all of them anew.

    Args:
        in_features: C.
    """

    streaming_reason = ""

    def __init__(self, in_features: int):
        super().__init__(in_features, in_features)
        self.score = nn.Linear(in_features, 1, bias=False)  # q0
        self.kernel = nn.Linear(in_features, in_features)  # W, b
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.kernel.weight)
        nn.init.zeros_(self.kernel.bias)

    def aggregate(self, features: Tensor, mask: Tensor, frames: Tensor | None) -> Details:
        return self._attend(frame_vectors(features), mask)

    def _attend(self, f: Tensor, mask: Tensor) -> Details:
        r0 = weighted_sum(f, masked.softmax(self.score(f).squeeze(-1), mask))
        q1 = self.kernel(r0).tanh()
        a = masked.softmax(torch.einsum("btc,bc->bt", f, q1.to(f.dtype)), mask)
        return Details(weighted_sum(f, a), mask, a, {}, {})

    def _begin(self, batch: int, like: Tensor) -> Frames:
        return Frames.begin(batch, self.in_features, like)

    def _update(self, state: Frames, features: Tensor, mask: Tensor) -> Frames:
        return state.add(frame_vectors(features), mask)

    def _read(self, state: Frames) -> Details:
        return self._attend(self._like_parameters(state.vectors), state.mask)
