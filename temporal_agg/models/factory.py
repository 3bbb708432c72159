"""Models by name: ``<aggregator>_<backbone>``."""

import dataclasses
import difflib
import fnmatch
import inspect
import logging
import os
from typing import Any

from ..aggregators.registry import ClipConfig, aggregator_options, create_aggregator, list_aggregators, registry_entry
from . import manifest
from .config import CONFIG, differences
from .config import read as read_config
from .encoder import (
    check_backbone_name,
    create_encoder,
    encoder_class,
    is_backbone,
    name_aliases,
    tested_with_prefix,
)
from .star import StarEncoder as StarEncoder  # which registers itself
from .tracklet import TrackletModel
from .weights import load_backbone, load_weights, path_of

__all__ = ["create_model", "list_models"]

_log = logging.getLogger(__name__)

_BACKBONES = (
    "convnext_tiny",
    "efficientnet_b0",
    "resnet18",
    "resnet50",
    "swin_tiny_patch4_window7_224",
    "vit_small_patch16_224",
)


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    pretrained_tag: str | None = None,
    backbone_pretrained: bool = False,
    backbone_weights: str | os.PathLike | None = None,
    checkpoint_path: str | os.PathLike | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    **kwargs: Any,
) -> TrackletModel:
    """Builds a model by name.

    Nothing is downloaded unless ``pretrained``, ``backbone_pretrained`` or an ``hf-hub:`` name asks for it, and the
    backbone's weights never where full weights follow.

    Args:
        name: ``<aggregator>_<backbone>[.<weights>]``, such as ``gltr_convnext_tiny``: any of :func:`list_aggregators`
            before any timm model that gives maps, or before ``lsta_<resnet>``, STAR's backbone
            (``star_<resnet>`` is ``gsta_lsta_<resnet>``); or a saved model, ``local-dir:<path>`` or
            ``hf-hub:<owner>/<repo>[@<revision>]``. Where several aggregators' names begin a name, the longest counts
            whose rest is a backbone.
        pretrained: load the weights that were released for this name, with the options and the preprocessing that they
            were trained with, where ``kwargs`` do not say otherwise. Their checksum is checked. Weights that are only
            planned are an error that says what to do.
        pretrained_tag: which of them; also behind the name, as in ``loga_resnet50.mars``. None = the first in the
            manifest.
        backbone_pretrained: load timm's weights into the backbone. Nothing to do where full weights are loaded.
        backbone_weights: load this file into the backbone, as far as it fits: a ``.safetensors`` or ``torch.save`` file
            of any origin (:func:`load_weights`). The log says what did not fit; less than half is an error.
        checkpoint_path: load these weights: a ``.safetensors`` file, or a directory that ``save_pretrained`` wrote;
            the log says where the options there are others.
        revision: for ``hf-hub:`` names and ``pretrained``: a branch, tag or commit.
        cache_dir: where downloads are kept; None = where huggingface_hub keeps them.
        **kwargs: options of the encoder (see :class:`FrameEncoder`, :class:`StarEncoder`) and of the aggregator;
            ``clip``: a :class:`ClipConfig`, or a dict of those of its fields that differ from the aggregator's default.
            ``last_stride`` defaults to what the aggregator's paper uses, where the backbone has one.

    Returns:
        The model, on the CPU; ``pretrained`` and saved models in evaluation mode, new ones in training mode.

    Raises:
        ValueError: an unknown aggregator, backbone or source (the message has the nearest names), weights that do not
            fit or have another checksum, two weights for one thing, or ``pretrained`` where none are released or
            planned.
        TypeError: an unknown option (the message lists those there are).
        FileNotFoundError: planned weights, which have not been released (the message says what to do meanwhile), and
            what :meth:`TrackletModel.from_pretrained` does not find.

    Example:
        >>> import torch
        >>> from temporal_agg import create_model
        >>> model = create_model("gltr_resnet10t", img_size=(64, 32)).eval()
        >>> model(torch.randn(2, 8, 3, 64, 32)).shape  # 2 clips of 8 frames
        torch.Size([2, 384])
    """
    if not isinstance(name, str):
        raise TypeError(f"a model is named by a string, for a directory 'local-dir:<path>', got {name!r}.")
    if pretrained_tag is not None and not pretrained:
        raise ValueError(f"pretrained_tag={pretrained_tag!r} goes with pretrained=True only.")
    if name.startswith(("hf-hub:", "local-dir:")):
        if kwargs or pretrained or backbone_pretrained or not (backbone_weights is checkpoint_path is None):
            raise TypeError(f"{name!r} comes with its weights and options: pass the name, revision and cache_dir only.")
        return TrackletModel.from_pretrained(name, revision=revision, cache_dir=cache_dir)
    if any(c in name for c in ":/\\~"):
        raise ValueError(
            f"{name!r} is not the name of a model: use 'hf-hub:<owner>/<repo>' for one on the Hub, 'local-dir:<path>' "
            "for a directory, or '<aggregator>_<timm model>' for a new one."
        )
    if revision is not None and not pretrained:
        raise ValueError(f"revision goes with hf-hub: names and pretrained, got revision={revision!r} for {name!r}.")
    if backbone_weights is not None and (pretrained or backbone_pretrained or checkpoint_path is not None):
        raise ValueError(
            "backbone_weights and pretrained, backbone_pretrained or checkpoint_path all name weights of the backbone: "
            "pass one of them."
        )
    weights = None
    if pretrained:
        if checkpoint_path is not None:
            raise ValueError("pretrained=True and checkpoint_path both name full weights: pass one of them.")
        weights = manifest.find(name, pretrained_tag)
        name = weights.name.partition(".")[0]

    aggregator_name, backbone = _split(name)
    encoder_options = [
        p for p in inspect.signature(encoder_class(backbone)).parameters if p not in ("backbone", "pretrained")
    ]
    options = aggregator_options(aggregator_name)
    unknown = sorted(set(kwargs) - {*encoder_options, *options, "clip"})
    if unknown:
        raise TypeError(
            f"model {name!r} has no option {', '.join(unknown)}. Its encoder has: {', '.join(encoder_options)}; its "
            f"aggregator: {', '.join(options) or 'none'}; and there is clip."
        )
    clip = kwargs.get("clip")
    _check_clip(clip)
    if weights is not None:
        return _load_released(weights, revision, cache_dir, kwargs)

    encoder = create_encoder(
        backbone,
        pretrained=backbone_pretrained and checkpoint_path is None,
        **{k: v for k, v in kwargs.items() if k in encoder_options},
    )
    if backbone_weights is not None:
        load_backbone(encoder.backbone, backbone_weights)
    entry = registry_entry(aggregator_name)
    if entry.last_stride == 1 and kwargs.get("last_stride") is None and encoder.has_last_stride:
        encoder.remove_last_stride()
    length = clip.get("length") if isinstance(clip, dict) else getattr(clip, "length", None)
    if "clip_length" in options and length is not None:
        kwargs.setdefault("clip_length", length)  # clips of another length want an aggregator built for them
    aggregator = create_aggregator(
        aggregator_name, encoder.num_features, **{k: v for k, v in kwargs.items() if k in options}
    )
    if isinstance(clip, dict):
        own = {} if aggregator.clip_length is None else {"length": aggregator.clip_length}
        clip = dataclasses.replace(entry.clip, **{**own, **clip})
    model = TrackletModel(encoder, aggregator, clip)
    if checkpoint_path is not None:
        load_weights(model, checkpoint_path)
        if (config := path_of(checkpoint_path) / CONFIG).is_file() and (other := differences(model, config)):
            _log.warning("the weights in %s were trained with other options: %s.", checkpoint_path, "; ".join(other))
    return model


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """The tested names that match a shell-style ``pattern``, sorted. Any other timm model works behind an aggregator's
    name too.

    Args:
        pattern: such as ``"gltr_*"``.
        pretrained: only the names of released weights, such as ``loga_resnet50.mars``; planned ones are no such names.

    Example:
        >>> from temporal_agg import list_models
        >>> list_models("gltr_resnet*")
        ['gltr_resnet18', 'gltr_resnet50']
    """
    names = {weights.name for weights in manifest.read().values() if weights.released}
    if not pretrained:
        special = tested_with_prefix()
        names |= {f"{a}_{b}" for a in list_aggregators() for b in (*_BACKBONES, *special)}
        for alias, (_, prefix) in name_aliases().items():
            names |= {f"{alias}_{b.removeprefix(prefix)}" for b in special if b.startswith(prefix)}
    return sorted(fnmatch.filter(names, pattern))


def _split(name: str) -> tuple[str, str]:
    """``gltr_released_resnet50`` -> (``gltr_released``, ``resnet50``): of the aggregators whose names begin it, the
    longest whose rest is a backbone."""
    known = {**{aggregator: (aggregator, "") for aggregator in list_aggregators()}, **name_aliases()}
    found = [
        (aggregator, prefix + name.removeprefix(f"{begin}_"))
        for begin, (aggregator, prefix) in sorted(known.items(), key=lambda item: -len(item[0]))
        if name.startswith(f"{begin}_")
    ]
    if found:
        best = next((split for split in found if is_backbone(split[1])), found[0])
        check_backbone_name(best[1])
        return best
    if name in known or is_backbone(name):
        hint = f"for example {name}_resnet50" if name in known else f"for example mean_{name}"
        raise ValueError(f"a model is named '<aggregator>_<timm model>', {hint}; got {name!r}.")
    near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(
        f"no aggregator's name starts {name!r}; {hint}Names are '<aggregator>_<timm model>' with one of: "
        f"{', '.join(sorted(known))}."
    )


def _check_clip(clip: Any) -> None:
    if clip is not None and not isinstance(clip, (ClipConfig, dict)):
        raise TypeError(f"clip must be a ClipConfig, or a dict of some of its fields, got {clip!r}.")
    fields = [f.name for f in dataclasses.fields(ClipConfig)]
    unknown = sorted(set(clip) - set(fields)) if isinstance(clip, dict) else []
    if unknown:
        raise TypeError(f"clip has no field {', '.join(unknown)}; it has: {', '.join(fields)}.")


def _load_released(
    weights: manifest.Weights, revision: str | None, cache_dir: str | os.PathLike | None, kwargs: dict[str, Any]
) -> TrackletModel:
    """The model of an entry of the manifest, with the options that it was trained with, but for ``kwargs``."""
    if not weights.released:
        raise FileNotFoundError(
            f"the weights {weights.name} are planned and have not been released: the Hub is not asked for them. Until "
            "then: backbone_pretrained=True starts from timm's backbone weights, checkpoint_path=... loads your "
            f"own, `{weights.command}` trains them, and 'hf-hub:<owner>/<repo>' loads what somebody whom you trust has "
            "published."
        )
    from . import hub

    sha256 = weights.sha256 if revision in (None, weights.revision) else None
    directory = hub.download(weights.repo, revision or weights.revision, cache_dir, sha256)
    said = read_config(directory / hub.CONFIG)["architecture"]
    if _split(said.partition(".")[0]) != _split(weights.name.partition(".")[0]):
        raise ValueError(f"{weights.repo} holds a {said}, expected {weights.name}: report it.")
    return hub.restore(directory, **{key: value for key, value in kwargs.items() if value is not None})
