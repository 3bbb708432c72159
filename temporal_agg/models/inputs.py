"""What the models of this folder want of images."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["check_images", "fastest_memory_format", "forwards", "narrow_in_float32", "weights_laid_out"]

NARROW = 32  # channels


def check_images(name: str, images: Tensor, channels: int, lead: str = "N") -> None:
    """Raises unless ``images`` is a floating-point tensor ``[lead, channels, H, W]``."""
    wanted = f"[{lead}, {channels}, H, W]"
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{name} must be a normalised floating-point tensor {wanted}, got {got}.")
    if images.dim() != lead.count(",") + 4 or images.shape[-3] != channels:
        raise ValueError(f"{name} must have the shape {wanted}, got {list(images.shape)}.")


def fastest_memory_format(module: nn.Module) -> torch.memory_format:
    """The layout in which a network wants its images: ``channels_last`` for convolutional ones, else
    ``contiguous_format``.

    What counts is that of the layers with weights more than one in 16 is a convolution wider than 1x1: 32 % of
    resnet50's are, 20 % of efficientnet_b0's, 9 % of maxvit_nano's; Swin and ViT have one in 50, their patch embedding.
    The layout passes on from layer to layer. Weights may stay as they are, but 3x3 convolutions then turn theirs in
    every pass, which :func:`weights_laid_out` spares them.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    wide = sum(isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1) for layer in layers)
    return torch.channels_last if 16 * wide > len(layers) else torch.contiguous_format


@contextmanager
def weights_laid_out(module: nn.Module, memory_format: torch.memory_format) -> Iterator[None]:
    """The same values in another layout, as copies that go afterwards: the module's own tensors come back."""
    own: list[tuple[nn.Parameter, Tensor]] = []
    try:
        with torch.inference_mode(False), torch.no_grad():
            for weight in module.parameters():
                data = weight.data
                plain = type(data) is Tensor and data.dim() == 4 and not data.is_inference()
                if plain and not data.is_contiguous(memory_format=memory_format):
                    own.append((weight, data))
                    weight.data = data.contiguous(memory_format=memory_format)
        yield
    finally:
        for weight, data in own:
            weight.data = data


def narrow_in_float32(module: nn.Module) -> dict[nn.Conv2d, Callable[[Tensor], Tensor]]:
    """For each convolution with at most 32 channels on one side, what does the same outside autocast.

    That little room carries much in every channel, and the matrix units of a processor gain least from it. In bfloat16
    the lowest cosine with the float32 embeddings of 16 frames of WARD was 0.976 for a trained MobileNetV2, and 0.9997
    with these 14 of its 52 convolutions in float32. ResNet-50 has none. The three channels of an image do not count.
    """

    def outside(conv: nn.Conv2d) -> Callable[[Tensor], Tensor]:
        forward = conv.forward

        def call(x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                return forward(x.to(conv.weight.dtype))

        return call

    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    sides = {c: (c.out_channels, c.in_channels if c.in_channels > 3 else c.out_channels) for c in convs}
    return {conv: outside(conv) for conv, channels in sides.items() if min(channels) <= NARROW}


@contextmanager
def forwards(calls: dict[nn.Conv2d, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Modules that do something else for a while."""
    own = {module: vars(module).get("forward") for module in calls}
    try:
        for module, call in calls.items():
            vars(module)["forward"] = call
        yield
    finally:
        for module, forward in own.items():
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward
