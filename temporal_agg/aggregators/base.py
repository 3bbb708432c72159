"""The contract that every aggregator keeps: frame features and a mask in, one embedding per clip out.

Conventions shared by all aggregators:

* ``features`` are maps ``[B, T, C, H, W]``; aggregators with ``needs_maps = False`` also take vectors ``[B, T, C]``.
* ``mask`` is bool ``[B, T]``, True = a real frame. A masked clip gives the result of the clip made of its real frames
  alone, wherever the padding stands, in evaluation and in training.
* Softmax weights and BatchNorm moments are computed in at least float32, whatever the autocast type.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree

__all__ = ["Aggregator", "Details", "MaskedBatchNorm"]


class Details(NamedTuple):
    """What an aggregator can tell about a clip.

    Attributes:
        embedding: ``[B, D]``.
        mask: ``[B, T]``, True = a real frame.
        frame_weights: ``[B, T]``, how much each frame counted; 0 for padding, a row sums to 1.
        maps: finer forms of the weights, by name (see the aggregator).
        supervised: extra tensors that the paper's losses need, by name (see the aggregator).
    """

    embedding: Tensor
    mask: Tensor
    frame_weights: Tensor
    maps: dict[str, Tensor]
    supervised: dict[str, Tensor]


# torch.export.save needs a name for a NamedTuple that it meets in a model's output.
_pytree._register_namedtuple(Details, serialized_type_name="temporal_agg.Details")


class Aggregator(nn.Module):
    """Base class: checks the input once, then hands clean tensors to :meth:`aggregate`.

    A subclass implements :meth:`aggregate`, says what it needs by the class attributes, and registers itself with
    :func:`~temporal_agg.aggregators.registry.register_aggregator`.

    Args:
        in_features: C, the channels of a frame's features.
        num_features: D, the width of the embedding.

    Attributes:
        clip_length: the only T it takes, or None for any T >= 1.
        needs_maps: False: also takes vectors ``[B, T, C]``.
        needs_frames: True: forward wants ``frames=[B, T, 3, H, W]``.
        is_recurrent: True: loops over the frames, so that compiled and exported graphs serve one T each.
    """

    clip_length: int | None = None
    needs_maps: bool = False
    needs_frames: bool = False
    is_recurrent: bool = False
    config: dict | None = None  # how create_aggregator built it; None when built by hand

    def __init__(self, in_features: int, num_features: int):
        super().__init__()
        if in_features < 1:
            raise ValueError(f"in_features must be the number of feature channels (>= 1), got {in_features}.")
        self.in_features = in_features
        self.num_features = num_features

    def forward(
        self,
        features: Tensor,
        mask: Tensor | None = None,
        *,
        frames: Tensor | None = None,
        return_details: bool = False,
    ) -> Tensor | Details:
        """Aggregates the frames of each clip.

        Args:
            features: ``[B, T, C, H, W]`` (or ``[B, T, C]`` unless ``needs_maps``), floating point.
            mask: bool ``[B, T]``, True = a real frame; None = all are real.
            frames: ``[B, T, 3, H', W']``, the normalised images, for aggregators with ``needs_frames``.
            return_details: return :class:`Details` instead of the embedding alone.

        Returns:
            The embedding ``[B, D]``, or :class:`Details` when asked.

        Raises:
            TypeError: a tensor of the wrong kind.
            ValueError: a wrong shape, or a clip without any real frame (checked in eager mode only).
        """
        self._check(features, mask, frames)
        if mask is None:
            mask = all_real(features)
        else:
            features = zero_padding(features, mask)
            frames = frames if frames is None else zero_padding(frames, mask)
        details = self.aggregate(features, mask, frames)
        return details if return_details else details.embedding

    def aggregate(self, features: Tensor, mask: Tensor, frames: Tensor | None) -> Details:
        """The paper's formulas, on checked input whose padded entries are 0. To be implemented by the subclass."""
        raise NotImplementedError

    def _check(self, features: Tensor, mask: Tensor | None, frames: Tensor | None) -> None:
        name = type(self).__name__
        wanted = "[B, T, C, H, W]" if self.needs_maps else "[B, T, C, H, W] or [B, T, C]"
        if not isinstance(features, Tensor) or not features.is_floating_point():
            got = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"{name}: features must be a floating-point tensor {wanted}, got {got}.")
        if features.dim() not in ((5,) if self.needs_maps else (3, 5)):
            raise ValueError(f"{name}: features must have the shape {wanted}, got {list(features.shape)}.")
        B, T, C = features.shape[:3]
        if self.in_features != C:
            raise ValueError(
                f"{name}: expected C = in_features = {self.in_features} channels in dimension 2 of {wanted}, got {C} "
                f"in {list(features.shape)}. Build the aggregator with in_features={C}, or move the channels there."
            )
        if B < 1 or T < 1:
            raise ValueError(f"{name}: expected at least one clip of at least one frame, got {list(features.shape)}.")
        if self.clip_length is not None and self.clip_length != T:
            raise ValueError(
                f"{name}: takes clips of exactly {self.clip_length} frames, got {T}. Cut the tracklet into clips of "
                f"{self.clip_length} frames (repeat or pad with a mask), or build it with clip_length={T}."
            )
        if mask is not None:
            check_mask(mask, (B, T))
            if not torch.compiler.is_compiling() and not mask.any(1).all():
                empty = (~mask.any(1)).nonzero().flatten().tolist()
                raise ValueError(f"{name}: every clip needs a real frame, but the mask has none for clips {empty}.")
        if self.needs_frames and frames is None:
            raise ValueError(f"{name}: reads the images too: pass frames=[B, T, 3, H, W], the normalised clip.")
        if frames is not None and (frames.dim() != 5 or frames.shape[:2] != (B, T) or frames.shape[2] != 3):
            raise ValueError(f"{name}: frames must have the shape {[B, T, 3]} + [H, W], got {list(frames.shape)}.")

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.num_features}"


class MaskedBatchNorm(nn.modules.batchnorm._NormBase):
    """BatchNorm over the real entries only; parameters and buffers are named as in ``nn.BatchNorm1d`` / ``2d``.

    It is not a ``_BatchNorm`` to torch, so that ``convert_sync_batchnorm`` (whose layers know no mask) leaves it alone.
    Moments are taken in at least float32, the mean first and then the centred second moment.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: the step of the running statistics.
        bias: False leaves the shift out, where what follows would cancel it.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, *, bias: bool = True):
        super().__init__(num_features, eps, momentum)
        if not bias:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalises each channel.

        Args:
            x: ``[*mask.shape, C, *spatial]``; without a mask ``[N, C, *spatial]``. Padding must be finite.
            mask: bool, one value for each leading entry of ``x``; None = all are real.

        Returns:
            The shape and dtype of ``x``. Padded entries are finite and mean nothing.

        Raises:
            ValueError: in training, when the shape alone leaves one value per channel.
        """
        lead = 1 if mask is None else mask.dim()
        if x.dim() <= lead or x.shape[lead] != self.num_features:
            raise ValueError(f"expected {self.num_features} channels in dimension {lead}, got {list(x.shape)}.")
        values = at_least_float32(x)
        if not self.training:
            flat = values.flatten(0, lead - 1)
            return (
                F.batch_norm(flat, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
                .view(x.shape)
                .to(x.dtype)
            )

        if x.numel() == x.shape[lead]:
            raise ValueError(
                f"BatchNorm needs more than one value per channel in training, got {list(x.shape)}: use batches of at "
                "least two clips, or call .eval()."
            )
        if mask is None:
            mask = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        space = list(range(lead + 1, x.dim()))
        count = mask.sum() * (x[(0,) * lead].numel() // self.num_features)

        def moment(v: Tensor) -> Tensor:
            v = v.sum(space) if space else v
            return zero_padding(v, mask).sum(list(range(lead))) / count.clamp(min=1)

        # Only the centred values are kept for the backward pass.
        channel = (self.num_features,) + (1,) * len(space)
        mean = moment(values)
        centred = values - mean.view(channel)
        var = moment(centred.square())
        self.update(mean, var, count)
        scale = (torch.rsqrt(var + self.eps) * self.weight).view(channel)
        y = centred * scale if self.bias is None else torch.addcmul(self.bias.view(channel), centred, scale)
        return y.to(x.dtype)

    @torch.no_grad()
    def update(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Moves the running statistics towards moments over ``count`` entries; ``count == 0`` leaves them alone."""
        step = self.momentum * (count > 0).to(mean.dtype)
        unbiased = var * count / (count - 1).clamp(min=1)
        self.running_mean += step * (mean - self.running_mean)
        self.running_var += step * (unbiased - self.running_var)
        self.num_batches_tracked += count > 0


def check_mask(mask: Tensor, shape: tuple[int, int]) -> None:
    """Raises unless ``mask`` is a bool tensor of the clips' ``shape`` (B, T)."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor (True = a real frame), got {got}; use mask.bool().")
    if mask.shape != tuple(shape):
        raise ValueError(f"mask must have the shape [B, T] = {list(shape)}, got {list(mask.shape)}.")


def all_real(x: Tensor) -> Tensor:
    """The mask of clips ``x`` ``[B, T, ...]`` without padding."""
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay what they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def zero_padding(x: Tensor, mask: Tensor) -> Tensor:
    """Zeros the entries of ``x`` ``[*mask.shape, ...]`` where ``mask`` is False, NaN included."""
    return torch.where(mask.reshape(mask.shape + (1,) * (x.dim() - mask.dim())), x, 0)


def frame_vectors(features: Tensor) -> Tensor:
    """Average-pools maps ``[B, T, C, H, W]`` to ``[B, T, C]``; vectors pass through."""
    return features.mean((3, 4)) if features.dim() == 5 else features


def masked_softmax(logits: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """Softmax over the real entries in at least float32; ``mask`` broadcasts to ``logits``, padding gets 0."""
    return at_least_float32(logits).masked_fill(~mask, float("-inf")).softmax(dim)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real frames: ``[B, T, ...]`` -> ``[B, ...]``."""
    total = at_least_float32(zero_padding(x, mask)).sum(1)
    return (total / mask.sum(1).view((-1,) + (1,) * (total.dim() - 1))).to(x.dtype)


def uniform_weights(mask: Tensor, like: Tensor) -> Tensor:
    """The frame weights of an average, 1 / (real frames): ``[B, T]`` in the type of ``like``, at least float32."""
    weights = at_least_float32(mask.to(like.dtype))
    return weights / weights.sum(1, keepdim=True)


def weighted_sum(x: Tensor, weights: Tensor) -> Tensor:
    """``sum_t weights[b, t] x[b, t, :]``: ``[B, T, C]`` -> ``[B, C]``."""
    return torch.einsum("bt,btc->bc", weights.to(x.dtype), x)


def compaction_order(mask: Tensor) -> Tensor:
    """Indices ``[B, T]`` that move the real frames of each clip to the front, in order.

    The sort keys are unique, so that an unstable sort (the only one that exporters take) gives this one answer.
    The inverse order is ``order.argsort(1)``.
    """
    t = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, t, t + mask.shape[1]).argsort(1)


def take_frames(x: Tensor, order: Tensor) -> Tensor:
    """Reorders frames: ``x[b, order[b, t]]`` for ``x`` ``[B, T, ...]``."""
    return x.gather(1, order.view(order.shape + (1,) * (x.dim() - 2)).expand_as(x))
