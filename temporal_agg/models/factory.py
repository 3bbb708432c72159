"""Models by name: ``<aggregator>_<timm model>``."""

import dataclasses
import difflib
import fnmatch
import inspect
import os

import timm

from ..aggregators.registry import ClipConfig, aggregator_options, create_aggregator, list_aggregators, registry_entry
from . import hub
from .encoder import FrameEncoder, check_backbone_name
from .star import StarEncoder
from .tracklet import TrackletModel

__all__ = ["create_model", "list_models"]

# Prefixes that are no aggregator's name: encoder and aggregator.
_PREFIXES = {"star": (StarEncoder, "gsta")}

_BACKBONES = (
    "convnext_tiny",
    "efficientnet_b0",
    "resnet18",
    "resnet50",
    "swin_tiny_patch4_window7_224",
    "vit_small_patch16_224",
)
_STAR_BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    backbone_pretrained: bool = False,
    checkpoint_path: str | os.PathLike | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    **kwargs,
) -> TrackletModel:
    """Builds a model by name.

    Nothing is downloaded unless ``pretrained``, ``backbone_pretrained`` or an ``hf-hub:`` name asks for it.

    Args:
        name: ``<aggregator>_<timm model>[.<weights>]``, such as ``gltr_convnext_tiny``: any of
            :func:`list_aggregators` or ``star``, before any timm model that gives maps; or a saved model,
            ``local-dir:<path>`` or ``hf-hub:<owner>/<repo>[@<revision>]``.
        pretrained: load the weights that were released for this name.
        backbone_pretrained: load timm's weights into the backbone. Nothing to do where full weights are loaded.
        checkpoint_path: load these weights: a ``.safetensors`` file, or a directory that ``save_pretrained`` wrote.
        revision: for ``hf-hub:`` names: a branch, tag or commit.
        cache_dir: where downloads are kept; None = where huggingface_hub keeps them.
        **kwargs: options of the encoder (see :class:`FrameEncoder`, :class:`StarEncoder`) and of the aggregator;
            ``clip``: a :class:`ClipConfig`, or a dict of those of its fields that differ from the aggregator's default.
            ``last_stride`` defaults to what the aggregator's paper uses, where the backbone has one.

    Returns:
        The model, on the CPU; saved models in evaluation mode, new ones in training mode.

    Raises:
        ValueError: an unknown aggregator, backbone or source (the message has the nearest names), weights that do not
            fit, or ``pretrained`` where no weights have been released.
        TypeError: an unknown option (the message lists those there are).
    """
    if name.startswith(("hf-hub:", "local-dir:")):
        if kwargs or pretrained or backbone_pretrained or checkpoint_path is not None:
            raise TypeError(f"{name!r} comes with its weights and options: pass the name, revision and cache_dir only.")
        return TrackletModel.from_pretrained(name.removeprefix("local-dir:"), revision=revision, cache_dir=cache_dir)
    if any(c in name for c in ":/\\"):
        raise ValueError(
            f"{name!r} is not the name of a model: use 'hf-hub:<owner>/<repo>' for one on the Hub, 'local-dir:<path>' "
            "for a directory, or '<aggregator>_<timm model>' for a new one."
        )
    if revision is not None:
        raise ValueError(f"revision goes with hf-hub: names only, got revision={revision!r} for {name!r}.")
    source = None
    if pretrained:
        if checkpoint_path is not None:
            raise ValueError("pretrained=True and checkpoint_path both name full weights: pass one of them.")
        if name not in hub.RELEASED:
            raise ValueError(
                f"no weights have been released for {name!r} (released: {', '.join(hub.RELEASED) or 'none'}). Use "
                "backbone_pretrained=True to start from timm's backbone weights, or checkpoint_path=... for your own."
            )
        source = "hf-hub:" + hub.RELEASED[name]
        name = name.partition(".")[0]

    prefix, backbone = _split(name)
    encoder_class, aggregator_name = _PREFIXES.get(prefix, (FrameEncoder, prefix))
    encoder_options = [
        p for p in inspect.signature(encoder_class).parameters if p not in ("backbone", "pretrained", "kwargs")
    ]
    options = aggregator_options(aggregator_name)
    unknown = sorted(set(kwargs) - {*encoder_options, *options, "clip"})
    if unknown:
        raise TypeError(
            f"model {name!r} has no option {', '.join(unknown)}. Its encoder has: {', '.join(encoder_options)}; its "
            f"aggregator: {', '.join(options) or 'none'}; and there is clip."
        )

    full = source is not None or checkpoint_path is not None
    encoder = encoder_class(
        backbone,
        pretrained=backbone_pretrained and not full,
        **{k: v for k, v in kwargs.items() if k in encoder_options},
    )
    entry = registry_entry(aggregator_name)
    if entry.last_stride == 1 and kwargs.get("last_stride") is None and encoder.has_last_stride:
        encoder.remove_last_stride()
    clip = kwargs.get("clip")
    length = clip.get("length") if isinstance(clip, dict) else getattr(clip, "length", None)
    if "clip_length" in options and length is not None:
        kwargs.setdefault("clip_length", length)  # clips of another length want an aggregator built for them
    aggregator = create_aggregator(
        aggregator_name, encoder.num_features, **{k: v for k, v in kwargs.items() if k in options}
    )
    model = TrackletModel(encoder, aggregator, _clip(clip, entry.clip, aggregator.clip_length))
    if source is not None:
        checkpoint_path = hub.resolve_directory(source, None, cache_dir)
    if checkpoint_path is not None:
        hub.load_weights(model, checkpoint_path)
    return model


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """The tested names that match a shell-style ``pattern``, sorted. Any other timm model works behind a prefix too.

    Args:
        pattern: such as ``"gltr_*"``.
        pretrained: only those with released weights.
    """
    names = set(hub.RELEASED)
    if not pretrained:
        names |= {f"{a}_{b}" for a in list_aggregators() for b in _BACKBONES}
        names |= {f"{p}_{b}" for p in _PREFIXES for b in _STAR_BACKBONES}
    return sorted(fnmatch.filter(names, pattern))


def _split(name: str) -> tuple[str, str]:
    """``gltr_released_resnet50`` -> (``gltr_released``, ``resnet50``); the longest prefix that is known wins."""
    prefixes = sorted({*list_aggregators(), *_PREFIXES}, key=len, reverse=True)
    for prefix in prefixes:
        if name.startswith(prefix + "_"):
            backbone = name.removeprefix(prefix + "_")
            check_backbone_name(backbone)
            return prefix, backbone
    if timm.is_model(name) or name in prefixes:
        hint = f"for example {name}_resnet50" if name in prefixes else f"for example mean_{name}"
        raise ValueError(f"a model is named '<aggregator>_<timm model>', {hint}; got {name!r}.")
    near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(
        f"no aggregator's name starts {name!r}; {hint}Names are '<aggregator>_<timm model>' with one of: "
        f"{', '.join(sorted(prefixes))}."
    )


def _clip(clip: ClipConfig | dict | None, default: ClipConfig, length: int | None) -> ClipConfig | None:
    if not isinstance(clip, dict):
        return clip
    fields = [f.name for f in dataclasses.fields(ClipConfig)]
    unknown = sorted(set(clip) - set(fields))
    if unknown:
        raise TypeError(f"clip has no field {', '.join(unknown)}; it has: {', '.join(fields)}.")
    return dataclasses.replace(default, **{**({} if length is None else {"length": length}), **clip})
