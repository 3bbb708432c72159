"""Models and aggregators as ONNX files, for onnxruntime and other engines (``pip install temporal-agg[export]``)."""

import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

from ._files import locked, replace_file
from ._version import __version__
from .aggregators import Aggregator
from .aggregators.registry import registry_entry
from .models import TrackletModel
from .models.config import describe

__all__ = ["export_onnx"]

OLDEST = (2, 9)  # of torch
LIMIT = 2**31 - 2**24  # bytes that one ONNX file can hold, less some for the graph


def export_onnx(
    model: TrackletModel | Aggregator,
    path: str | os.PathLike,
    *,
    clip_length: int | None = None,
    mask: bool = True,
    map_size: tuple[int, int] | None = None,
    frame_size: tuple[int, int] | None = None,
) -> None:
    """Writes an ONNX file that computes what the model computes in evaluation mode, in float32.

    The batch is free. So is the clip length, but for recurrent aggregators (lstm, gsta, grl), whose steps are written
    out one by one, and for those with a fixed length (loga): a file of theirs takes clips of one length, and through
    the mask shorter ones too.

    What cannot be written: more than 2 GB of weights (530 M parameters); modules that let data decide what is computed.
    Of the model families of timm 1.0.31 that is gemma4_vit, which reads the size of its maps off a tensor; the smallest
    model of each of the others has been checked.

    Inputs of a model: ``clips`` ``[batch, length, 3, H, W]``, normalised, and ``flow`` ``[batch, length, 2, H, W]`` if
    its encoder has a stem for it. Of an aggregator: ``features``, ``[batch, length, C, h, w]`` or ``[batch, length,
    C]``, and ``frames`` ``[batch, length, 3, H, W]`` if it reads the images. Of both: ``mask`` bool ``[batch,
    length]``, True = a real frame, at least one in each clip (which an ONNX file cannot check). Output: ``embedding``
    ``[batch, D]``.

    The file's metadata has ``architecture``, ``temporal_agg`` (the version) and, as JSON, ``clip_length`` (null = any);
    of a model also ``input_size``, ``mean``, ``std``, ``interpolation`` and ``clip`` (how it cuts tracklets, and
    compares embeddings). Before it is written, under a temporary name that is then changed, onnxruntime runs it on a
    batch of another size and has to come to the model's embeddings.

    Args:
        model: a model, or an aggregator alone; on any device, in any mode. It is not changed.
        path: of the file, in a folder that exists.
        clip_length: the only length that the file takes; None = any length where that is possible, else the one that
            the model's clips have.
        mask: False leaves that input out: every frame is real then.
        map_size: height and width of the maps, for an aggregator alone; None = it gets vectors.
        frame_size: height and width of the images, for an aggregator alone that reads them.

    Raises:
        ImportError: the extra ``export`` is not installed, or torch is older than 2.9.
        OSError: another process writes the same file.
        FileNotFoundError: the folder does not exist.
        TypeError: neither a model nor an aggregator.
        ValueError: a length or size that does not fit, or more than 2 GB of weights, which one file cannot hold.
        RuntimeError: the model cannot be exported, or its file computes something else. The cause is attached.

    Example:
        >>> import onnxruntime
        >>> from temporal_agg import create_model, export_onnx
        >>> model = create_model("mean_resnet10t", img_size=(64, 32))
        >>> export_onnx(model, "model.onnx")  # onnxruntime has computed the model's embeddings with it
        >>> onnxruntime.InferenceSession("model.onnx").get_inputs()[0].shape
        ['batch', 'length', 3, 64, 32]
    """
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if version < OLDEST:
        raise ImportError(f"ONNX files need torch >= 2.9, got {torch.__version__}: pip install -U torch torchvision.")
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "ONNX files need onnx, onnxscript and onnxruntime: pip install temporal-agg[export]"
        ) from error
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist: make it first.")
    if not isinstance(model, (TrackletModel, Aggregator)):
        raise TypeError(
            f"expected a TrackletModel or an Aggregator, got {type(model).__name__}: pass the model itself, not a "
            "wrapper of it (model.module of DistributedDataParallel, model._orig_mod of torch.compile)."
        )
    size = sum(4 * x.numel() for x in model.state_dict().values())
    if size > LIMIT:
        raise ValueError(f"the weights take {size / 1e9:.1f} GB, and an ONNX file holds 2 GB: use a smaller backbone.")
    length = _length(model, clip_length)
    shapes = _inputs(model, map_size, frame_size)
    dims = {0: torch.export.Dim("batch", min=1)}
    if length is None:
        dims[1] = torch.export.Dim("length", min=1)
    frozen: Any = copy.deepcopy(model).float().cpu().eval()
    for module in frozen.modules():
        if hasattr(module, "fused_attn"):  # timm's switch; torch's exporter does not know all the shapes that it takes
            module.fused_attn = False
    tensors = _tensors(shapes, 2, length or 3, mask)  # what is free must not be 0 or 1 here
    first, *others = tensors
    try:
        with torch.enable_grad():  # GRL then attends all of its steps at once: a smaller graph
            program = torch.export.export(
                frozen,
                (tensors[first],),
                {name: tensors[name] for name in others},
                dynamic_shapes=dict.fromkeys(tensors, dims),
                strict=False,
            )
        onnx_program: Any = torch.onnx.export(
            program,
            input_names=list(tensors),
            output_names=["embedding"],
            dynamic_shapes={first: dims, **dict.fromkeys(others)},  # here for the names of the dimensions only
            dynamo=True,
            verbose=False,
        )
        onnx_program.model.metadata_props.update(_metadata(model, length))
        content = onnx_program.model_proto.SerializeToString()
        tensors = _tensors(shapes, 3, length or 5, mask)  # sizes that the graph has not seen
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {name: tensor.numpy() for name, tensor in tensors.items()})
        with torch.no_grad():
            want = frozen(**tensors)
        difference = float((torch.from_numpy(got) - want).norm() / want.norm().clamp(min=1e-6))
        if not difference < 1e-3:
            raise ArithmeticError(f"onnxruntime's embeddings differ from torch's by {difference:.1%}")
    except Exception as error:
        free = " A fixed length may help: clip_length=..." if length is None else ""
        raise RuntimeError(
            f"{_architecture(model)} cannot be exported to ONNX: {type(error).__name__} (above).{free} If it is the "
            "backbone that cannot, export the aggregator alone and run the backbone elsewhere. In modules of your own, "
            "take sizes from x.shape (len(x) would be fixed in the file), and let no data decide what is computed."
        ) from error

    with locked(path.with_name(f".{path.name}.lock"), str(path)):
        replace_file(path, lambda temporary: temporary.write_bytes(content))


def _tensors(shapes: dict[str, tuple[int, ...]], batch: int, length: int, mask: bool) -> dict[str, torch.Tensor]:
    """Random inputs, in the order of ``forward``'s arguments; the first clip has one real frame."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        tensors[name] = torch.rand(batch, length, *shape, generator=generator)
        if mask and len(tensors) == 1:
            tensors["mask"] = torch.ones(batch, length, dtype=torch.bool)
            tensors["mask"][0, 1:] = False
    return tensors


def _length(model: TrackletModel | Aggregator, wanted: int | None) -> int | None:
    """The clip length of the file; None = any."""
    aggregator, clip = (model.aggregator, model.clip) if isinstance(model, TrackletModel) else (model, None)
    fixed = aggregator.clip_length
    if wanted is not None:
        if wanted < 1 or fixed not in (None, wanted):
            takes = "at least one frame" if fixed is None else f"exactly {fixed} frames"
            raise ValueError(f"{type(aggregator).__name__} takes clips of {takes}, got clip_length={wanted}.")
        return wanted
    if fixed is not None or not aggregator.is_recurrent:
        return fixed
    if clip is not None:
        return clip.length
    if aggregator.config is None:
        raise ValueError(f"{type(aggregator).__name__} is recurrent: say for which clip_length the file shall be.")
    return registry_entry(aggregator.config["name"]).clip.length


def _inputs(
    model: TrackletModel | Aggregator, map_size: tuple[int, int] | None, frame_size: tuple[int, int] | None
) -> dict[str, tuple[int, ...]]:
    """The inputs beside the mask, by name, with their shapes behind batch and length."""
    if isinstance(model, TrackletModel):
        if map_size is not None or frame_size is not None:
            raise ValueError("map_size and frame_size are for an aggregator alone: a model has its own input size.")
        _, *size = model.data_config["input_size"]
        return {"clips": (3, *size), **({"flow": (2, *size)} if getattr(model.encoder, "uses_flow", False) else {})}
    name = type(model).__name__
    if model.needs_maps and map_size is None:
        raise ValueError(f"{name} wants maps: pass map_size=(height, width), that of your backbone's maps.")
    if model.needs_frames == (frame_size is None):
        what = "reads the images too: pass" if model.needs_frames else "does not read the images: leave out"
        raise ValueError(f"{name} {what} frame_size=(height, width), that of the images.")
    return {
        "features": (model.in_features, *(map_size or ())),
        **({"frames": (3, *frame_size)} if frame_size is not None else {}),
    }


def _metadata(model: TrackletModel | Aggregator, length: int | None) -> dict[str, str]:
    metadata = {"architecture": _architecture(model), "temporal_agg": __version__, "clip_length": json.dumps(length)}
    if isinstance(model, TrackletModel):
        metadata |= {key: json.dumps(value) for key, value in model.data_config.items()}
        metadata["clip"] = json.dumps(dataclasses.asdict(model.clip))
    return metadata


def _architecture(model: TrackletModel | Aggregator) -> str:
    """Its name for ``create_model`` or ``create_aggregator``; the classes' names if it was built by hand."""
    if isinstance(model, Aggregator):
        return model.config["name"] if model.config else type(model).__name__
    try:
        return describe(model)["architecture"]
    except ValueError:
        backbone = getattr(model.encoder, "backbone", model.encoder)
        return f"{_architecture(model.aggregator)} on {type(backbone).__name__}"
