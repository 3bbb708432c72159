"""Optical flow on disk: one small file per tracklet, of which single frames can be read.

A file holds, in this order:

* one line of JSON: ``format``, ``version``, ``frames`` (n), ``size`` (height and width) and ``settings``;
* n - 1 index entries (little-endian): where the flow of a frame ends (uint64, counted from the end of the index) and
  its step (float32);
* n - 1 greyscale PNG images ``[2 height, width]``, dx above dy: the value v stands for (v - 128) * step pixels.

The flow of the last frame is that of the one before it, and zero in a tracklet of one frame; it is not stored.
"""

import io
import json
import os
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .._files import replace_file

__all__ = ["FlowError", "encode_flow", "flow_file", "flow_header", "read_flow", "write_flow"]

SUFFIX = ".flow"
FORMAT = {"format": "temporal-agg flow", "version": 1}
STEP = 1 / 16  # pixels: the finest step; frames whose motion needs more than 127 of them get a coarser one
ENTRY = np.dtype([("end", "<u8"), ("step", "<f4")])
COMMAND = "python recipes/compute_flow.py --data <the data set>"


class FlowError(OSError):
    """Optical flow that is missing or cannot be used; the message names its file and what to do."""


def flow_file(frames: Sequence[str | Path], root: str | Path | None = None) -> Path:
    """The file of a tracklet's flow: named by its first frame, and by a checksum of the names of all of them.

    It lies beside the first frame; or below ``root``, in the place that the first frame has below ``/``.
    """
    first = Path(frames[0])
    folder = os.fspath(frames[0]).removesuffix(first.name)
    paths = (os.fspath(frame) for frame in frames)
    names = "\n".join(p[len(folder) :] if p.startswith(folder) else os.path.relpath(p, folder or ".") for p in paths)
    name = f"{first.stem}.{blake2b(os.fsencode(names), digest_size=4).hexdigest()}{SUFFIX}"
    if root is None:
        return first.with_name(name)
    first = first.absolute()
    return Path(root, *first.parts[1:-1], name)


def encode_flow(pixels: np.ndarray) -> tuple[float, bytes]:
    """What a file keeps of the flow from one frame to the next: a step and an image.

    Args:
        pixels: ``[2, height, width]``: dx (to the right) and dy (down), in pixels of that size. They are rounded to
            1/16 pixel, or to 1/127 of the largest of them if that is more.

    Raises:
        ValueError: an array of another shape, or with values that are not finite.
    """
    if pixels.ndim != 3 or len(pixels) != 2 or not np.isfinite(pixels).all():
        raise ValueError(f"flow must be finite and of the shape [2, h, w]; got the shape {list(pixels.shape)}.")
    step = float(np.float32(max(STEP, np.abs(pixels).max() / 127)))
    levels = (np.rint(pixels / step) + 128).astype(np.uint8)
    image = io.BytesIO()
    Image.fromarray(levels.reshape(-1, pixels.shape[2])).save(image, "png")
    return step, image.getvalue()


def write_flow(path: str | Path, flow: Sequence[tuple[float, bytes]], size: tuple[int, int], settings: dict) -> int:
    """Writes the flow of a tracklet of n frames; a killed process leaves no file of that name, or the old one.

    Args:
        path: where; folders are made.
        flow: the n - 1 results of :func:`encode_flow`, from each frame to the next.
        size: (height, width) of all of them.
        settings: how it was made, kept in the file.

    Returns:
        The file's size in bytes.
    """
    path = Path(path)
    header = FORMAT | {"frames": len(flow) + 1, "size": list(size), "settings": settings}
    index = np.empty(len(flow), ENTRY)
    index["end"] = np.cumsum([len(image) for _, image in flow])
    index["step"] = [step for step, _ in flow]
    content = (json.dumps(header).encode() + b"\n", index.tobytes(), *(image for _, image in flow))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: temporary.write_bytes(b"".join(content)))
    return sum(map(len, content))


def read_flow(path: str | Path, indices: Iterable[int], num_frames: int, owner: str) -> list[Tensor]:
    """Reads the flow of single frames.

    Args:
        path: the tracklet's file.
        indices: of the frames, in the order wanted.
        num_frames: of the tracklet.
        owner: what messages call the tracklet.

    Returns:
        One float32 tensor ``[2, height, width]`` each, in pixels of that size.

    Raises:
        FlowError: no such file, or one that is damaged or made for another number of frames.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is no regular file")
        with open(path, "rb") as file:
            header, index, start = _head(file)
            if header["frames"] != num_frames:
                raise ValueError(f"it is of {header['frames']} frames, and the tracklet has {num_frames}")
            return [_read(file, header["size"], index, start, i) for i in indices]
    except FileNotFoundError as error:
        raise FlowError(
            f"{owner} has no optical flow: there is no file {path}. Compute it ({COMMAND}), or build the model with "
            "flow=False."
        ) from error
    except IndexError:
        raise
    except Exception as error:  # a damaged image: OSError, SyntaxError, struct.error, ...
        raise FlowError(_damaged(path, error)) from error


def flow_header(path: str | Path) -> dict:
    """The first line of a file, after a check that the file is whole.

    Raises:
        FileNotFoundError: no such file.
        FlowError: a damaged file.
    """
    with open(path, "rb") as file:
        try:
            return _head(file)[0]
        except Exception as error:
            raise FlowError(_damaged(path, error)) from error


def _damaged(path: str | Path, error: Exception) -> str:
    return (
        f"cannot read the optical flow {path}: {error or type(error).__name__}. Delete the file and compute it again: "
        f"{COMMAND}."
    )


def _head(file: io.BufferedReader) -> tuple[dict, np.ndarray, int]:
    """Header, index, and where the images start."""
    header = json.loads(file.readline(65536))
    if not isinstance(header, dict) or {key: header.get(key) for key in FORMAT} != FORMAT:
        raise ValueError("it is no flow file of this version")
    content = file.read((header["frames"] - 1) * ENTRY.itemsize)
    index, start = np.frombuffer(content, ENTRY), file.tell()
    size = os.fstat(file.fileno()).st_size
    if len(index) != header["frames"] - 1 or size != start + (int(index["end"][-1]) if len(index) else 0):
        raise ValueError("it is cut off")
    return header, index, start


def _read(file: io.BufferedReader, size: list[int], index: np.ndarray, start: int, frame: int) -> Tensor:
    if not 0 <= frame <= len(index):
        raise IndexError(f"the tracklet has the frames 0 to {len(index)}, got {frame}.")
    if not len(index):
        return torch.zeros(2, *size, dtype=torch.float32, device="cpu")
    frame = min(frame, len(index) - 1)
    begin = int(index["end"][frame - 1]) if frame else 0
    file.seek(start + begin)
    with Image.open(io.BytesIO(file.read(int(index["end"][frame]) - begin)), formats=["PNG"]) as image:
        levels = torch.from_numpy(np.array(image))
    return (levels.view(2, *size).to(torch.float32) - 128) * float(index["step"][frame])
