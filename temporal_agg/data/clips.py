"""Tracklets -> training clips, as a torch data set."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from .samplers import Draw
from .sampling import CPU, FILLS, TRAIN_POLICIES, sample_frames, seeded_generator
from .tracklet import Tracklet, check_flow, check_tracklets

__all__ = ["ClipDataset", "collate_clips"]

SHARED_MEMORY = "/dev/shm"  # of Linux; elsewhere it has no size of its own


class ClipDataset(Dataset):
    """One random clip of a tracklet for each draw.

    Asked for a :class:`~temporal_agg.data.Draw`, as this package's batch samplers do, the clip is a function of (seed,
    epoch, index, number) alone: workers, world size and the order of the draws change nothing.

    Asked for a plain index, as other samplers do (``shuffle=True``, Lightning, ``MPerClassSampler``), it is drawn from
    torch's global generator of the process that makes it: a new clip each time, other ones in each worker, the same
    again after ``torch.manual_seed`` with as many workers.

    Args:
        tracklets: to draw from.
        label_map: identity -> class index (``TrackletData.label_map``).
        transform: ``(frames, generator) -> clip``, with flow ``(frames, generator, flow) -> (clip, flow)``
            (:class:`~temporal_agg.data.ClipTransform`).
        length: frames per clip.
        policy: which frames (:func:`~temporal_agg.data.sample_frames`).
        fill: what fills the clip of a shorter tracklet (same place).
        seed: >= 0; of the draws of our batch samplers.
        flow: read optical flow too; that of a frame points to the tracklet's next one, whatever the policy draws.

    Raises:
        ValueError: junk (pid -1), an identity without a label, an unknown policy or fill.
        FlowError: a tracklet without optical flow, where it is wanted.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from temporal_agg.data import ClipDataset, ClipTransform, collate_clips, open_dataset
        >>> people = open_dataset("synthetic", num_identities=4)
        >>> transform = ClipTransform((64, 32), train=True)
        >>> clips = ClipDataset(people.train, people.label_map, transform, length=4)
        >>> loader = DataLoader(clips, batch_size=2, shuffle=True, collate_fn=collate_clips)
        >>> batch = next(iter(loader))
        >>> batch["clip"].shape, batch["mask"].shape, batch["label"].shape
        (torch.Size([2, 4, 3, 64, 32]), torch.Size([2, 4]), torch.Size([2]))
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
        check_tracklets(tracklets)
        junk = [t for t in tracklets if t.pid < 0]
        if junk:
            raise ValueError(
                f"{len(junk)} tracklets are junk (pid {junk[0].pid}), such as {junk[0].name!r}, which is never trained "
                "on: leave them out, as TrackletData(...).train does."
            )
        unknown = sorted({t.pid for t in tracklets} - set(label_map))
        if unknown:
            raise ValueError(f"label_map has no class for the identities {unknown[:5]}: build it from these tracklets.")
        if policy not in TRAIN_POLICIES or fill not in FILLS:
            raise ValueError(
                f"policy must be one of {', '.join(TRAIN_POLICIES)} and fill one of {', '.join(FILLS)}, got {policy!r} "
                f"and {fill!r}."
            )
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}.")
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

    def __len__(self) -> int:
        return len(self.tracklets)

    def __getitem__(self, draw: Draw | int) -> dict:
        """Draws a clip.

        Returns:
            ``clip`` float32 ``[T, 3, H, W]``, ``flow`` float32 ``[T, 2, H, W]`` where it is wanted, ``mask`` bool
            ``[T]`` (True = a real frame), and the integers ``label``, ``pid``, ``camera``, ``index``.
        """
        if isinstance(draw, Draw):
            index, number = draw.index, draw.number
            generator = seeded_generator(self.seed, draw.epoch, index, number)
        else:
            index, number = int(draw), 0
            generator = torch.Generator(device=CPU).manual_seed(int(torch.randint(2**62, (), device=CPU)))
            if self.policy == "each":
                number = int(torch.randint(2**31, (), generator=generator, device=CPU))
        tracklet = self.tracklets[index]
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

    A worker of a ``DataLoader`` hands its batches over in shared memory while half of that stays free. Where there is
    less, as in a container with 64 MB of it, they go through the worker's pipe instead: slower, and the same bit by
    bit. torch's own collating knows nothing of this, and then waits for ever.

    Returns:
        ``clip`` ``[B, T, 3, H, W]``, ``flow`` ``[B, T, 2, H, W]`` where the items have it, ``mask`` bool ``[B, T]``,
        and int64 ``[B]``: ``label``, ``pid``, ``camera``, ``index``.
    """
    batch = {
        key: torch.tensor([item[key] for item in items], dtype=torch.int64, device=CPU)
        for key in ("label", "pid", "camera", "index")
    }
    for key in ("clip", "mask", "flow"):
        if key in items[0]:
            batch[key] = torch.nn.utils.rnn.pad_sequence([item[key] for item in items], batch_first=True)
    worker = get_worker_info()
    return batch if worker is None or _share(batch, worker.num_workers) else _ByValue(batch)


def _share(batch: Mapping[str, Tensor], workers: int) -> bool:
    """Moves a batch into shared memory, if all workers of all processes can do so at once and half stays free."""
    try:
        disk = os.statvfs(SHARED_MEMORY)
    except (AttributeError, OSError):
        return True
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    workers *= int(processes) if processes.isdecimal() else 1
    size = sum(tensor.numel() * tensor.element_size() for tensor in batch.values())
    if (disk.f_bavail - disk.f_blocks / 2) * disk.f_frsize < workers * size:
        return False
    try:
        for tensor in batch.values():
            tensor.share_memory_()
    except (OSError, RuntimeError):  # somebody else was faster
        return False
    return True


class _ByValue(dict):
    """Tensors that another process gets as a plain dictionary of copies."""

    def __reduce__(self) -> tuple:
        return _tensors, ({key: value.numpy() for key, value in self.items()},)


def _tensors(arrays: dict[str, Any]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(array) for key, array in arrays.items()}
