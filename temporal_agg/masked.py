"""What a mask means, once for all.

``mask`` is bool ``[B, T]``, True = a real frame, False = padding. A masked clip gives the result of the clip made of
its real frames alone, wherever the padding stands, in evaluation and in training; LOGA alone has a weight for each
place, so that its padding is a place without a frame. What mixes frames or counts them goes through this module::

    from temporal_agg import masked

    masked.mean(x, mask)             # over the real frames
    masked.softmax(logits, mask)     # padding gets 0
    masked.BatchNorm(C)              # its moments are those of the real entries
    masked.take(x, masked.order(mask))    # the real frames first, in order

Softmax weights and BatchNorm moments are computed in at least float32, whatever the autocast type.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "BatchNorm",
    "all_real",
    "at_least_float32",
    "check",
    "is_compiling",
    "mean",
    "order",
    "softmax",
    "take",
    "uniform",
    "zero",
]


def check(mask: Tensor, shape: tuple[int, int]) -> None:
    """Raises unless ``mask`` is a bool tensor of the clips' ``shape`` (B, T).

    Raises:
        TypeError: no bool tensor.
        ValueError: another shape.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        shaped = (
            tuple(mask.shape) if isinstance(mask, Tensor) else (len(mask),) if isinstance(mask, (list, tuple)) else ()
        )
        hint = "use mask.bool()"
        if shaped == tuple(shape)[:1]:
            hint = f"for the clips' lengths: torch.arange({shape[1]}) < torch.as_tensor(lengths)[:, None]"
        raise TypeError(f"mask must be a bool tensor [B, T] (True = a real frame), got {got}; {hint}.")
    if mask.shape != tuple(shape):
        raise ValueError(f"mask must have the shape [B, T] = {list(shape)}, got {list(mask.shape)}.")


def all_real(x: Tensor) -> Tensor:
    """The mask of clips ``x`` ``[B, T, ...]`` without padding."""
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay what they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def zero(x: Tensor, mask: Tensor) -> Tensor:
    """Zeros the entries of ``x`` ``[*mask.shape, ...]`` where ``mask`` is False, NaN included."""
    return torch.where(mask.reshape(mask.shape + (1,) * (x.dim() - mask.dim())), x, 0)


def softmax(logits: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """Softmax over the real entries in at least float32; ``mask`` broadcasts to ``logits``, padding gets 0."""
    return at_least_float32(logits).masked_fill(~mask, float("-inf")).softmax(dim)


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real frames: ``[B, T, ...]`` -> ``[B, ...]``."""
    total = at_least_float32(zero(x, mask)).sum(1)
    return (total / mask.sum(1).view((-1,) + (1,) * (total.dim() - 1))).to(x.dtype)


def uniform(mask: Tensor, like: Tensor) -> Tensor:
    """The frame weights of an average, 1 / (real frames): ``[B, T]`` in the type of ``like``, at least float32."""
    weights = at_least_float32(mask.to(like.dtype))
    return weights / weights.sum(1, keepdim=True)


def order(mask: Tensor) -> Tensor:
    """Indices ``[B, T]`` that move the real frames of each clip to the front, in order.

    The sort keys are unique, so that an unstable sort (the only one that exporters take) gives this one answer.
    The inverse order is ``order.argsort(1)``.
    """
    t = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, t, t + mask.shape[1]).argsort(1)


def take(x: Tensor, order: Tensor) -> Tensor:
    """Reorders frames: ``x[b, order[b, t]]`` for ``x`` ``[B, T, ...]``."""
    return x.gather(1, order.view(order.shape + (1,) * (x.dim() - 2)).expand_as(x))


class BatchNorm(nn.modules.batchnorm._NormBase):
    """BatchNorm over the real entries only; parameters and buffers are named as in ``nn.BatchNorm1d`` / ``2d``.

    It is not a ``_BatchNorm`` to torch, so that ``convert_sync_batchnorm`` (whose layers know no mask) leaves it alone.
    Moments are taken in at least float32, the mean first and then the centred second moment.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: the step of the running statistics.
        bias: False leaves the shift out, where what follows would cancel it.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

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
            state = (self.running_mean, self.running_var, self.weight, self.bias)
            mean, var, weight, bias = (s if s is None else s.to(values.dtype) for s in state)  # half, after .half()
            y = F.batch_norm(values.flatten(0, lead - 1), mean, var, weight, bias, eps=self.eps)
            return y.view(x.shape).to(x.dtype)

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
            return zero(v, mask).sum(list(range(lead))) / count.clamp(min=1)

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


def is_compiling() -> bool:
    """Whether the code is being compiled or exported, where nothing may depend on the data."""
    ask = getattr(getattr(torch, "compiler", None), "is_compiling", None)  # not in torch 2.0 and 2.1
    return ask() if ask is not None else torch._utils.is_compiling()
