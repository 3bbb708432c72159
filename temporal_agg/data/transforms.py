"""Frames of a tracklet -> one normalised clip, with the same random draw for all of its frames."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

__all__ = ["ClipTransform"]


class ClipTransform:
    """Resizes each frame, then in training flips, crops and erases the clip as a whole, then normalises.

    Args:
        size: (height, width) of the clip.
        mean: of each channel, for values in 0..1.
        std: of each channel.
        interpolation: ``bilinear``, ``bicubic`` or another one of torchvision; always with antialiasing.
        train: apply what follows.
        flip: probability of a horizontal flip.
        pad: black pixels added on each side before a random crop of ``size``.
        random_crop: resize to this multiple of ``size`` (9/8, say) before a random crop of ``size``.
        erasing: probability of erasing a rectangle (to 0 after normalisation).

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        size: tuple[int, int],
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        interpolation: str = "bilinear",
        *,
        train: bool = False,
        flip: float = 0.5,
        pad: int = 0,
        random_crop: float = 1.0,
        erasing: float = 0.0,
    ):
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be (height, width) in pixels, got {size}.")
        if random_crop < 1 or pad < 0:
            raise ValueError(f"random_crop must be at least 1 and pad at least 0, got {random_crop} and {pad}.")
        if not (0 <= flip <= 1 and 0 <= erasing <= 1):
            raise ValueError(f"flip and erasing are probabilities, got {flip} and {erasing}.")
        self.size = tuple(size)
        self.train = train
        self.interpolation = v2.InterpolationMode(interpolation)
        self.mean = 255 * torch.tensor(mean).view(3, 1, 1)
        self.std = 255 * torch.tensor(std).view(3, 1, 1)
        self.resized = [round(side * random_crop) for side in size] if train else list(size)
        crops = pad or random_crop > 1
        self.augment = v2.Compose(
            [v2.RandomHorizontalFlip(flip)] + [v2.RandomCrop(self.size, padding=pad or None)] * bool(crops)
        )
        self.erase = v2.RandomErasing(erasing)

    def __call__(self, frames: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Makes a clip.

        Args:
            frames: uint8 ``[3, h, w]`` each, of any sizes.
            generator: draws what is random; None = torch's global generator. The same state gives the same clip.

        Returns:
            float32 ``[T, 3, H, W]``.
        """
        clip = torch.stack(
            [F.resize(frame, self.resized, interpolation=self.interpolation, antialias=True) for frame in frames]
        )
        if not self.train:
            return self._normalise(clip)
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng(devices=[]):  # the transforms draw from the global generator: lend it to them
            torch.default_generator.manual_seed(seed)
            return self.erase(self._normalise(self.augment(clip)))

    def _normalise(self, clip: Tensor) -> Tensor:
        return clip.float().sub_(self.mean).div_(self.std)
