"""Frames of a tracklet -> one normalised clip, with the same random draw for all of its frames."""

import functools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, overload

import torch
from torch import Tensor

__all__ = ["ClipTransform"]

FILLS = ("zero", "random")
ASPECT = (0.3, 3.3)  # height / width of an erased rectangle
CPU = torch.device("cpu")  # said everywhere, so that the caller's default device and type do not matter


@functools.cache
def import_torchvision() -> ModuleType:
    """torchvision's transforms, imported for the first clip: that takes as long as torch, and much does without."""
    import torchvision

    torchvision.disable_beta_transforms_warning()  # torchvision 0.15 says about the next line that it may change
    from torchvision.transforms import v2

    return v2


class ClipTransform:
    """Resizes each frame, then in training flips, crops and erases the clip as a whole, then normalises.

    In a test the two halves can be had one by one, so that frames travel as bytes and are normalised where they are
    needed: ``transform.normalize(transform.resize(frames))`` is ``transform(frames)``.

    Optical flow goes through the same draws: resizing scales its vectors, a flip also turns dx round, what a crop pads
    has none; it is neither erased nor normalised.

    Args:
        size: (height, width) of the clip.
        mean: of each channel, for values in 0..1.
        std: of each channel.
        interpolation: ``bilinear``, ``bicubic`` or another one of torchvision; always with antialiasing.
        train: apply what follows.
        flip: probability of a horizontal flip.
        pad: black pixels added on each side before a random crop of ``size``.
        random_crop: resize to this multiple of ``size`` (9/8, say) before a random crop of ``size``.
        erasing: probability of erasing a rectangle, of 0.3 to 3.3 times its width in height.
        erasing_per_frame: draw that for each frame anew, not once for the clip.
        erasing_fill: ``zero``: 2 to 33 % of the frame become 0 after normalisation (the mean colour), as torchvision
            has it. ``random``: 2 to 40 % get random colours, a colour for each pixel and the same in all frames, drawn
            as Random Erasing's Algorithm 1 does (Zhong et al., AAAI 2020).

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        size: Sequence[int],
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        interpolation: str = "bilinear",
        *,
        train: bool = False,
        flip: float = 0.5,
        pad: int = 0,
        random_crop: float = 1.0,
        erasing: float = 0.0,
        erasing_per_frame: bool = False,
        erasing_fill: str = "zero",
    ):
        if not _are_numbers(size, 2) or min(size) < 1 or any(side != int(side) for side in size):
            raise ValueError(f"size must be (height, width) in pixels, got {size!r}.")
        if not _are_numbers((random_crop, pad), 2) or random_crop < 1 or pad < 0 or pad != int(pad):
            raise ValueError(
                f"random_crop must be at least 1 and pad a whole number of at least 0, got {random_crop!r} and {pad!r}."
            )
        if not _are_numbers((flip, erasing), 2) or not (0 <= flip <= 1 and 0 <= erasing <= 1):
            raise ValueError(f"flip and erasing are probabilities, got {flip!r} and {erasing!r}.")
        if erasing_fill not in FILLS:
            raise ValueError(f"erasing_fill must be one of {', '.join(FILLS)}, got {erasing_fill!r}.")
        if not _are_numbers(mean, 3) or not _are_numbers(std, 3) or min(std) <= 0:
            raise ValueError(f"mean and std must be three numbers each, std above 0, got {mean!r} and {std!r}.")
        v2 = import_torchvision()
        kinds = [mode.value for mode in v2.InterpolationMode]
        if interpolation not in kinds:
            raise ValueError(f"interpolation must be one of {', '.join(kinds)}, got {interpolation!r}.")
        self.size = (int(size[0]), int(size[1]))
        self.train = train
        self.interpolation = v2.InterpolationMode(interpolation)
        self.mean = 255 * torch.tensor(mean, dtype=torch.float32, device=CPU).view(3, 1, 1)
        self.std = 255 * torch.tensor(std, dtype=torch.float32, device=CPU).view(3, 1, 1)
        self.resized = [round(side * random_crop) for side in self.size] if train else list(self.size)
        self.flip = flip
        self.pad = int(pad)
        self.crops = pad > 0 or random_crop > 1
        self.erasing = erasing
        self.erasing_per_frame = erasing_per_frame
        self.erasing_fill = erasing_fill

    @classmethod
    def for_model(cls, model: Any, train: bool = False, **augmentation: Any) -> "ClipTransform":
        """The transform that a model's frames want: size, mean, std and interpolation of ``model.data_config``.

        Args:
            model: a :class:`~temporal_agg.TrackletModel` or :class:`~temporal_agg.FrameEncoder`.
            train: for training.
            **augmentation: ``flip``, ``pad`` and so on.
        """
        config = model.data_config
        return cls(
            config["input_size"][1:],
            config["mean"],
            config["std"],
            config["interpolation"],
            train=train,
            **augmentation,
        )

    @overload
    def __call__(
        self, frames: Sequence[Tensor], generator: torch.Generator | None = None, flow: None = None
    ) -> Tensor: ...

    @overload
    def __call__(
        self, frames: Sequence[Tensor], generator: torch.Generator | None, flow: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def __call__(
        self, frames: Sequence[Tensor], generator: torch.Generator | None = None, *, flow: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]: ...

    def __call__(
        self,
        frames: Sequence[Tensor],
        generator: torch.Generator | None = None,
        flow: Sequence[Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Makes a clip.

        Args:
            frames: uint8 ``[3, h, w]`` each, of any sizes.
            generator: draws what is random; None = torch's global generator. The same state gives the same clip.
            flow: optical flow (dx, dy), float32 ``[2, h, w]`` for each frame, in pixels of its own size.

        Returns:
            float32 ``[T, 3, H, W]``; with flow also the flow in pixels of the clip, float32 ``[T, 2, H, W]``.

        Raises:
            ValueError: flow of another number of frames.
        """
        if flow is not None and len(flow) != len(frames):
            raise ValueError(f"expected the flow of {len(frames)} frames, got {len(flow)}.")
        clip = self.resize(frames)
        moved = None if flow is None else self.resize_flow(flow)
        if self.train:
            seed = int(torch.randint(2**62, (), generator=generator, device=CPU))
            clip, moved = self._augment(clip, moved, torch.Generator(device=CPU).manual_seed(seed))
        else:
            clip = self.normalize(clip)
        return clip if moved is None else (clip, moved)

    def resize(self, frames: Sequence[Tensor]) -> Tensor:
        """Frames, uint8 ``[3, h, w]`` each -> uint8 ``[T, 3, H, W]``; in training of the size before the crop."""
        F = import_torchvision().functional
        return torch.stack(
            [F.resize(frame, self.resized, interpolation=self.interpolation, antialias=True) for frame in frames]
        )

    def resize_flow(self, flow: Sequence[Tensor]) -> Tensor:
        """Flow, float32 ``[2, h, w]`` each, in pixels of its size -> ``[T, 2, H, W]``, in pixels of that size."""
        F, (height, width) = import_torchvision().functional, self.resized
        return torch.stack(
            [
                F.resize(vectors, self.resized, antialias=True)
                * _numbers(width / vectors.shape[2], height / vectors.shape[1])
                for vectors in flow
            ]
        )

    def normalize(self, clip: Tensor) -> Tensor:
        """uint8 ``[..., 3, H, W]`` on any device -> float32 there: (value / 255 - mean) / std."""
        mean, std = (x.to(clip.device, non_blocking=True) for x in (self.mean, self.std))
        return clip.to(torch.float32, copy=True).sub_(mean).div_(std)

    def _augment(self, clip: Tensor, flow: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        if _uniform(generator) < self.flip:
            clip = clip.flip(-1)
            flow = None if flow is None else flow.flip(-1) * _numbers(-1.0, 1.0)
        if self.crops:
            F = import_torchvision().functional
            spare = [have + 2 * self.pad - side for have, side in zip(self.resized, self.size, strict=True)]
            corner = [_integer(room + 1, generator) for room in spare]
            clip = F.crop(F.pad(clip, [self.pad]), *corner, *self.size)
            flow = None if flow is None else F.crop(F.pad(flow, [self.pad]), *corner, *self.size)
        clip = self.normalize(clip)
        for part in clip.split(1) if self.erasing_per_frame else [clip]:
            self._erase(part, generator)
        return clip, flow

    def _erase(self, clip: Tensor, generator: torch.Generator) -> None:
        """Erases the same rectangle of all frames ``[T, 3, H, W]``, in place."""
        if not _uniform(generator) < self.erasing:
            return
        size = (clip.shape[2], clip.shape[3])
        place = _paper_rectangle(size, generator) if self.erasing_fill == "random" else _rectangle(size, generator)
        if place is None:
            return
        top, left, height, width = place
        fill = torch.zeros((), dtype=torch.float32, device=CPU)
        if self.erasing_fill == "random":
            colours = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8, device=CPU)
            fill = self.normalize(colours)
        clip[..., top : top + height, left : left + width] = fill


def _are_numbers(values: Any, count: int) -> bool:
    """Whether it is a sequence of so many finite numbers; true and false are none."""
    try:
        numbers = [float(value) for value in values if not isinstance(value, (bool, str))]
    except (TypeError, ValueError):
        return False
    return len(numbers) == len(values) == count and all(map(math.isfinite, numbers))


Rectangle = tuple[int, int, int, int]  # top, left, height, width


def _rectangle(size: tuple[int, int], generator: torch.Generator, tries: int = 10) -> Rectangle | None:
    """2 to 33 % of a frame; aspects and their inverses equally likely, every place that fits equally likely."""
    low, high = (math.log(aspect) for aspect in ASPECT)
    for _ in range(tries):
        area = size[0] * size[1] * _uniform(generator, 0.02, 0.33)
        aspect = math.exp(_uniform(generator, low, high))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < size[0] and width < size[1]:
            top, left = (_integer(have - side + 1, generator) for have, side in zip(size, (height, width), strict=True))
            return top, left, height, width
    return None


def _paper_rectangle(size: tuple[int, int], generator: torch.Generator, tries: int = 1000) -> Rectangle | None:
    """Random Erasing, Algorithm 1: area, aspect and corner are uniform; drawn again until it lies inside."""
    for _ in range(tries):
        area = size[0] * size[1] * _uniform(generator, 0.02, 0.4)
        aspect = _uniform(generator, *ASPECT)
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        top, left = (_integer(side, generator) for side in size)
        if top + height <= size[0] and left + width <= size[1]:
            return top, left, height, width
    return None


def _uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return float(torch.empty(1, dtype=torch.float32, device=CPU).uniform_(low, high, generator=generator))


def _integer(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (1,), generator=generator, device=CPU))


def _numbers(*values: float) -> Tensor:
    """One factor for dx, one for dy."""
    return torch.tensor(values, dtype=torch.float32, device=CPU).view(2, 1, 1)
