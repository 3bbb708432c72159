"""Which frames of a tracklet make a clip: one random clip in training, all clips of the tracklet in a test."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["ClipConfig", "cut_tracklet", "sample_frames", "seeded_generator"]

CPU = torch.device("cpu")  # said everywhere, so that the caller's default device does not matter

FILLS = ("repeat", "last", "mask")
TRAIN_POLICIES = ("random", "adjacent", "chunks", "even", "each", "all")
TEST_POLICIES = ("dense", "all", "chunks", "even")
TAILS = ("fill", "shift")
DISTANCES = ("cosine", "euclidean", "dot")

_CHOICES = {  # of ClipConfig's fields
    "train_sampling": TRAIN_POLICIES,
    "test_sampling": TEST_POLICIES,
    "fill": FILLS,
    "tail": TAILS,
    "distance": DISTANCES,
}


@dataclass(frozen=True)
class ClipConfig:
    """How a system wants tracklets cut into clips, and its embeddings compared.

    Attributes:
        length: frames per clip.
        stride: in a ``dense`` test, frames between the starts of successive clips; None = ``length`` (no overlap).
        train_sampling: the policy that draws a training clip (``temporal_agg.data.sample_frames``).
        test_sampling: the policy that cuts a test tracklet (``temporal_agg.data.cut_tracklet``); the tracklet's
            embedding is the mean of its clips' embeddings, not normalised before.
        fill: what fills a clip that is longer than its tracklet: ``repeat`` cyclically, repeat the ``last`` frame, or
            pad with a ``mask``.
        tail: the last window of a ``dense`` test, when it would run over the end: ``fill`` it as above, or ``shift``
            it back.
        distance: ``cosine``, ``euclidean`` or ``dot``.

    Example:
        >>> from temporal_agg import ClipConfig
        >>> clip = ClipConfig(length=4, test_sampling="dense", fill="mask")
        >>> indices, mask = clip.cut(6)  # of a tracklet of 6 frames
        >>> indices.tolist()
        [[0, 1, 2, 3], [4, 5, 5, 5]]
        >>> mask[1].tolist()
        [True, True, False, False]
    """

    length: int = 8
    stride: int | None = None
    train_sampling: str = "chunks"
    test_sampling: str = "dense"
    fill: str = "repeat"
    tail: str = "fill"
    distance: str = "cosine"

    def __post_init__(self):
        for name in ("length", "stride"):
            value = getattr(self, name)
            if value is None and name == "stride":
                continue
            if type(value) is not int or value < 1:
                raise ValueError(f"clip.{name} must be a whole number of frames, at least 1, got {value!r}.")
        if self.stride is not None and self.stride > self.length:
            raise ValueError(
                f"clip.stride must be 1 to length = {self.length} (a larger one would leave frames out), got "
                f"{self.stride}."
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"clip.{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")

    def cut(self, num_frames: int) -> tuple[Tensor, Tensor]:
        """Cuts a test tracklet of ``num_frames`` frames into N clips, as :func:`cut_tracklet` does.

        Returns:
            Frame indices, int64 ``[N, L]``, and the mask, bool ``[N, L]``, True = real.
        """
        return cut_tracklet(
            num_frames, self.length, self.test_sampling, stride=self.stride, fill=self.fill, tail=self.tail
        )


def seeded_generator(*key: int) -> torch.Generator:
    """A generator whose state is a function of the integers (>= 0) in ``key``; unlike keys give unrelated streams."""
    if min(key) < 0:
        raise ValueError(f"seeds and epochs must be 0 or more, got {min(key)}.")
    return torch.Generator(device=CPU).manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def sample_frames(
    num_frames: int,
    length: int,
    policy: str = "chunks",
    *,
    fill: str = "repeat",
    generator: torch.Generator | None = None,
    number: int = 0,
) -> tuple[Tensor, Tensor]:
    """Draws one training clip.

    Args:
        num_frames: frames of the tracklet, n.
        length: frames of the clip, L.
        policy: ``random``: distinct frames; ``adjacent``: consecutive frames from a random start; ``chunks``:
            restricted random sampling, one random frame from each of L chunks of ceil(n / L) frames, the last frame
            repeated to fill them; ``even``: the middle frames of L equal parts, nothing random; ``each``: in turn every
            window of consecutive frames (with L = 1 every frame), nothing random; ``all``: every frame, whatever L is.
            Frames are in temporal order.
        fill: what follows the frames of a tracklet with n < L: ``repeat`` them cyclically, repeat the ``last``, or pad
            and ``mask`` the padding.
        generator: draws; None = torch's global generator.
        number: for ``each``: the start of the window, modulo the number of windows.

    Returns:
        Frame indices, int64 ``[L]``, and the mask, bool ``[L]``, True = real (padding points at the last frame).

    Raises:
        ValueError: an unknown policy or fill, or a number below 1.
    """
    _check(num_frames, length, policy, TRAIN_POLICIES, fill)
    n = num_frames
    if policy == "all":
        return _whole(n)
    if n < length:
        return _filled(torch.zeros(1, dtype=torch.int64, device=CPU), n, length, fill, squeeze=True)
    if policy == "random":
        indices = torch.randperm(n, generator=generator, device=CPU)[:length].sort().values
    elif policy == "adjacent":
        indices = torch.randint(n - length + 1, (1,), generator=generator, device=CPU) + _count(length)
    elif policy == "each":
        indices = number % (n - length + 1) + _count(length)
    elif policy == "chunks":
        chunk = math.ceil(n / length)
        within = torch.randint(chunk, (length,), generator=generator, device=CPU)
        indices = (_count(length) * chunk + within).clamp(max=n - 1)
    else:
        indices = _even(n, length)
    return indices, torch.ones(length, dtype=torch.bool, device=CPU)


def cut_tracklet(
    num_frames: int,
    length: int,
    policy: str = "dense",
    *,
    stride: int | None = None,
    fill: str = "repeat",
    tail: str = "fill",
) -> tuple[Tensor, Tensor]:
    """Cuts a test tracklet into N clips; nothing is random.

    Args:
        num_frames: frames of the tracklet, n.
        length: frames of a clip, L.
        policy: ``dense``: a window every ``stride`` frames until the last frame is covered; ``all``: one clip of every
            frame, whatever L is; ``chunks``: one clip of the first frame of each of L chunks of ceil(n / L) frames, the
            last frame repeated to fill them; ``even``: one clip of the middle frames of L equal parts.
        stride: frames between the starts of dense windows, 1 to L; None = L.
        fill: what follows the frames of a window that runs over the end (n < L included): ``repeat`` its frames
            cyclically, repeat the ``last``, or pad and ``mask`` the padding.
        tail: the last dense window of a tracklet with n >= L: ``fill`` it, or ``shift`` it back to end with
            the tracklet.

    Returns:
        Frame indices, int64 ``[N, L]``, and the mask, bool ``[N, L]``, True = real (padding points at the last frame).

    Raises:
        ValueError: an unknown policy, fill or tail, or a number out of range.
    """
    _check(num_frames, length, policy, TEST_POLICIES, fill)
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}.")
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(f"stride must be 1 to length = {length} (a larger one would leave frames out), got {stride}.")
    n = num_frames
    if policy == "all":
        indices, mask = _whole(n)
        return indices[None], mask[None]
    if policy == "dense" or n < length:
        count = math.ceil(max(n - length, 0) / stride) + 1
        starts = _count(count) * stride
        if tail == "shift":
            starts = starts.clamp(max=max(n - length, 0))
        return _filled(starts, n, length, fill)
    indices = (_count(length) * math.ceil(n / length)).clamp(max=n - 1) if policy == "chunks" else _even(n, length)
    return indices[None], torch.ones(1, length, dtype=torch.bool, device=CPU)


def _count(n: int) -> Tensor:
    return torch.arange(n, device=CPU)


def _whole(n: int) -> tuple[Tensor, Tensor]:
    return _count(n), torch.ones(n, dtype=torch.bool, device=CPU)


def _even(n: int, length: int) -> Tensor:
    return (2 * _count(length) + 1) * n // (2 * length)


def _filled(starts: Tensor, n: int, length: int, fill: str, squeeze: bool = False) -> tuple[Tensor, Tensor]:
    """Windows of ``length`` frames from each start, those that run over frame n - 1 filled."""
    offsets = _count(length)
    real = offsets < (n - starts)[:, None]
    if fill == "repeat":
        offsets = offsets % (n - starts).clamp(max=length)[:, None]
    indices = (starts[:, None] + offsets).clamp(max=n - 1)
    mask = real if fill == "mask" else torch.ones_like(real)
    return (indices[0], mask[0]) if squeeze else (indices, mask)


def _check(num_frames: int, length: int, policy: str, policies: tuple[str, ...], fill: str) -> None:
    if num_frames < 1 or length < 1:
        raise ValueError(f"num_frames and length must be at least 1, got {num_frames} and {length}.")
    if policy not in policies:
        raise ValueError(f"policy must be one of {', '.join(policies)}, got {policy!r}.")
    if fill not in FILLS:
        raise ValueError(f"fill must be one of {', '.join(FILLS)}, got {fill!r}.")
