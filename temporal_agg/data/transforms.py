"""Frames of a tracklet -> one normalised clip, with the same random draw for all of its frames."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

__all__ = ["ClipTransform"]


class ClipTransform:
    """Resizes each frame, then in training flips, crops and erases the clip as a whole, then normalises.

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
        erasing: probability of erasing a rectangle (to 0 after normalisation).
        erasing_per_frame: draw that for each frame anew, not once for the clip.

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
        erasing_per_frame: bool = False,
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
        self.flip = flip
        self.pad = pad
        self.crops = pad > 0 or random_crop > 1
        self.erase = v2.RandomErasing(erasing)
        self.erasing_per_frame = erasing_per_frame

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
        clip = torch.stack(
            [F.resize(frame, self.resized, interpolation=self.interpolation, antialias=True) for frame in frames]
        )
        moved = None if flow is None else torch.stack([self._resize_flow(vectors) for vectors in flow])
        if self.train:
            seed = int(torch.randint(2**62, (), generator=generator))
            with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator: lend it to it
                torch.default_generator.manual_seed(seed)
                clip, moved = self._augment(clip, moved)
        else:
            clip = self._normalise(clip)
        return clip if moved is None else (clip, moved)

    def _augment(self, clip: Tensor, flow: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if torch.rand(1) < self.flip:
            clip = clip.flip(-1)
            flow = flow if flow is None else flow.flip(-1) * torch.tensor([-1.0, 1.0]).view(2, 1, 1)
        if self.crops:
            spare = [have + 2 * self.pad - side for have, side in zip(self.resized, self.size, strict=True)]
            corner = [int(torch.randint(room + 1, (1,))) for room in spare]
            clip, flow = (x if x is None else F.crop(F.pad(x, [self.pad]), *corner, *self.size) for x in (clip, flow))
        clip = self._normalise(clip)
        clip = torch.stack([self.erase(frame) for frame in clip]) if self.erasing_per_frame else self.erase(clip)
        return clip, flow

    def _resize_flow(self, flow: Tensor) -> Tensor:
        scale = torch.tensor([self.resized[1] / flow.shape[2], self.resized[0] / flow.shape[1]])  # of dx, dy
        return F.resize(flow, self.resized, antialias=True) * scale.view(2, 1, 1)

    def _normalise(self, clip: Tensor) -> Tensor:
        return clip.float().sub_(self.mean).div_(self.std)
