"""Tracklets -> training clips, as a torch data set."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .samplers import Draw
from .sampling import FILLS, TRAIN_POLICIES, sample_frames, seeded_generator
from .tracklet import Tracklet, check_flow

__all__ = ["ClipDataset", "collate_clips"]


class ClipDataset(Dataset):
    """One random clip of a tracklet for each draw; what is random is a function of (seed, epoch, index, number) alone.

    Workers, world size and the order of the draws change nothing. Ask for a :class:`~temporal_agg.data.Draw`, as
    ``IdentityBatchSampler`` does, or for a plain index (then number is 0 and the epoch that of :meth:`set_epoch`).

    Args:
        tracklets: to draw from.
        label_map: identity -> class index (``TrackletData.label_map``).
        transform: ``(frames, generator) -> clip``, with flow ``(frames, generator, flow) -> (clip, flow)``
            (:class:`~temporal_agg.data.ClipTransform`).
        length: frames per clip.
        policy: which frames (:func:`~temporal_agg.data.sample_frames`).
        fill: what fills the clip of a shorter tracklet (same place).
        seed: >= 0.
        flow: read optical flow too; that of a frame points to the tracklet's next one, whatever the policy draws.

    Raises:
        ValueError: an identity without a label, an unknown policy or fill.
        FlowError: a tracklet without optical flow, where it is wanted.
    """

    def __init__(
        self,
        tracklets: Sequence[Tracklet],
        label_map: Mapping[int, int],
        transform: Callable,
        *,
        length: int = 8,
        policy: str = "chunks",
        fill: str = "repeat",
        seed: int = 0,
        flow: bool = False,
    ):
        unknown = sorted({t.pid for t in tracklets} - set(label_map))
        if unknown:
            raise ValueError(f"label_map has no class for the identities {unknown[:5]}: build it from these tracklets.")
        if policy not in TRAIN_POLICIES or fill not in FILLS:
            raise ValueError(
                f"policy must be one of {', '.join(TRAIN_POLICIES)} and fill one of {', '.join(FILLS)}, got {policy!r} "
                f"and {fill!r}."
            )
        if flow:
            check_flow(tracklets)
        self.tracklets = tracklets
        self.label_map = dict(label_map)
        self.transform = transform
        self.length = length
        self.policy = policy
        self.fill = fill
        self.seed = seed
        self.flow = flow
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by persistent workers, too

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch's clips plain indices stand for; call it before each epoch. A ``Draw`` carries its own."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.tracklets)

    def __getitem__(self, draw: Draw | int) -> dict:
        """Draws a clip.

        Returns:
            ``clip`` float32 ``[T, 3, H, W]``, ``flow`` float32 ``[T, 2, H, W]`` where it is wanted, ``mask`` bool
            ``[T]`` (True = a real frame), and the integers ``label``, ``pid``, ``camera``, ``index``.
        """
        index, number, epoch = draw if isinstance(draw, Draw) else (draw, 0, int(self._epoch))
        tracklet = self.tracklets[index]
        generator = seeded_generator(self.seed, epoch, index, number)
        indices, mask = sample_frames(
            len(tracklet), self.length, self.policy, fill=self.fill, generator=generator, number=number
        )
        distinct, places = indices.unique(return_inverse=True)
        frames = tracklet.load(distinct.tolist())
        if self.flow:
            clip, flow = self.transform(frames, generator, tracklet.load_flow(distinct.tolist()))
            tensors = {"clip": clip[places], "flow": flow[places]}
        else:
            tensors = {"clip": self.transform(frames, generator)[places]}
        return {
            **tensors,
            "mask": mask,
            "label": self.label_map[tracklet.pid],
            "pid": tracklet.pid,
            "camera": tracklet.camera,
            "index": index,
        }


def collate_clips(items: Sequence[dict]) -> dict[str, Tensor]:
    """Batches the items of a :class:`ClipDataset`; clips shorter than the longest are padded with masked zeros.

    Returns:
        ``clip`` ``[B, T, 3, H, W]``, ``flow`` ``[B, T, 2, H, W]`` where the items have it, ``mask`` bool ``[B, T]``,
        and int64 ``[B]``: ``label``, ``pid``, ``camera``, ``index``.
    """
    batch = {key: torch.tensor([item[key] for item in items]) for key in ("label", "pid", "camera", "index")}
    for key in ("clip", "mask", "flow"):
        if key in items[0]:
            batch[key] = torch.nn.utils.rnn.pad_sequence([item[key] for item in items], batch_first=True)
    return batch
