"""What the models of this folder check in every call."""

from torch import Tensor

__all__ = ["check_images"]


def check_images(name: str, images: Tensor, channels: int, lead: str = "N") -> None:
    """Raises unless ``images`` is a floating-point tensor ``[lead, channels, H, W]``."""
    wanted = f"[{lead}, {channels}, H, W]"
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{name} must be a normalised floating-point tensor {wanted}, got {got}.")
    if images.dim() != lead.count(",") + 4 or images.shape[-3] != channels:
        raise ValueError(f"{name} must have the shape {wanted}, got {list(images.shape)}.")
