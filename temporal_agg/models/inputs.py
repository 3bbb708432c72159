"""What the models of this folder want of images."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["check_images", "exact_convolutions", "fastest_memory_format", "forwards", "weights_laid_out"]

NARROW = 32  # channels
ALIGNED = 64  # elements: where each copy of a weight begins


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
    """The same values in another layout, as copies that go afterwards: the module's own tensors come back.

    The copies of a type lie in one block. One by one they would fill the holes of the heap that the activations of one
    pass leave to the next, and the C library would get those page by page in every pass: in eight passes of a ResNet-50
    275,000 page faults, 140,000 with one block, on a CPU where each takes four microseconds.
    """
    own: list[tuple[nn.Parameter, Tensor]] = []
    try:
        with torch.inference_mode(False), torch.no_grad():
            for weight in module.parameters():
                data = weight.data
                plain = type(data) is Tensor and data.dim() == 4 and not data.is_inference()
                if plain and not data.is_contiguous(memory_format=memory_format):
                    own.append((weight, data))
            for dtype, device in {(data.dtype, data.device) for _, data in own}:
                alike = [(weight, data) for weight, data in own if (data.dtype, data.device) == (dtype, device)]
                sizes = [math.ceil(data.numel() / ALIGNED) * ALIGNED for _, data in alike]
                copies = torch.empty(sum(sizes), dtype=dtype, device=device).split(sizes)
                for (weight, data), copy in zip(alike, copies, strict=True):
                    strides = torch.empty_like(data, device="meta", memory_format=memory_format).stride()
                    weight.data = copy.as_strided(data.shape, strides).copy_(data)
        yield
    finally:
        for weight, data in own:
            weight.data = data


def exact_convolutions(module: nn.Module) -> dict[nn.Conv2d, Callable[[Tensor], Tensor]]:
    """For each convolution that bears bfloat16 badly, what does the same outside autocast.

    These are the narrow ones, of at most 32 channels on one side (an image's three do not count), where every channel
    carries much, and the depthwise ones; matrix units gain least from both. A trained MobileNetV2's lowest cosine with
    its float32 embeddings of 16 frames of WARD is 0.976 in bfloat16, 0.9997 with the narrow ones in float32, 0.9999
    with both (30 of its 52). ResNet-50 has none.
    """

    def outside(conv: nn.Conv2d) -> Callable[[Tensor], Tensor]:
        forward = conv.forward

        def call(x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                return forward(x.to(conv.weight.dtype))

        return call

    def is_delicate(conv: nn.Conv2d) -> bool:
        sides = (conv.out_channels, conv.in_channels if conv.in_channels > 3 else conv.out_channels)
        return min(sides) <= NARROW or conv.groups == conv.in_channels > 1

    return {m: outside(m) for m in module.modules() if isinstance(m, nn.Conv2d) and is_delicate(m)}


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
