"""Models by name: ``<aggregator>_<timm model>``."""

import dataclasses
import difflib
import fnmatch
import inspect
import logging
import os

import timm

from ..aggregators.registry import ClipConfig, aggregator_options, create_aggregator, list_aggregators, registry_entry
from . import hub, manifest
from .encoder import FrameEncoder, check_backbone_name
from .star import StarEncoder
from .tracklet import TrackletModel
from .weights import load_weights

__all__ = ["create_model", "list_models"]

_log = logging.getLogger(__name__)

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
    pretrained_tag: str | None = None,
    backbone_pretrained: bool = False,
    checkpoint_path: str | os.PathLike | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    **kwargs,
) -> TrackletModel:
    """Builds a model by name.

    Nothing is downloaded unless ``pretrained``, ``backbone_pretrained`` or an ``hf-hub:`` name asks for it, and the
    backbone's weights never where full weights follow.

    Args:
        name: ``<aggregator>_<timm model>[.<weights>]``, such as ``gltr_convnext_tiny``: any of
            :func:`list_aggregators` or ``star``, before any timm model that gives maps; or a saved model,
            ``local-dir:<path>`` or ``hf-hub:<owner>/<repo>[@<revision>]``.
        pretrained: load the weights that were released for this name, with the options and the preprocessing that they
            were trained with, where ``kwargs`` do not say otherwise. Their checksum is checked. Weights that are only
            planned are looked for on the Hub all the same.
        pretrained_tag: which of them; also behind the name, as in ``loga_resnet50.mars``. None = the first in the
            manifest.
        backbone_pretrained: load timm's weights into the backbone. Nothing to do where full weights are loaded.
        checkpoint_path: load these weights: a ``.safetensors`` file, or a directory that ``save_pretrained`` wrote.
        revision: for ``hf-hub:`` names and ``pretrained``: a branch, tag or commit.
        cache_dir: where downloads are kept; None = where huggingface_hub keeps them.
        **kwargs: options of the encoder (see :class:`FrameEncoder`, :class:`StarEncoder`) and of the aggregator;
            ``clip``: a :class:`ClipConfig`, or a dict of those of its fields that differ from the aggregator's default.
            ``last_stride`` defaults to what the aggregator's paper uses, where the backbone has one.

    Returns:
        The model, on the CPU; ``pretrained`` and saved models in evaluation mode, new ones in training mode.

    Raises:
        ValueError: an unknown aggregator, backbone or source (the message has the nearest names), weights that do not
            fit or have another checksum, or ``pretrained`` where none are released or planned.
        TypeError: an unknown option (the message lists those there are).
        FileNotFoundError: planned weights that have not been released yet (the message says what to do meanwhile), and
            what :meth:`TrackletModel.from_pretrained` does not find.
    """
    if pretrained_tag is not None and not pretrained:
        raise ValueError(f"pretrained_tag={pretrained_tag!r} goes with pretrained=True only.")
    if name.startswith(("hf-hub:", "local-dir:")):
        if kwargs or pretrained or backbone_pretrained or checkpoint_path is not None:
            raise TypeError(f"{name!r} comes with its weights and options: pass the name, revision and cache_dir only.")
        return TrackletModel.from_pretrained(name.removeprefix("local-dir:"), revision=revision, cache_dir=cache_dir)
    if any(c in name for c in ":/\\"):
        raise ValueError(
            f"{name!r} is not the name of a model: use 'hf-hub:<owner>/<repo>' for one on the Hub, 'local-dir:<path>' "
            "for a directory, or '<aggregator>_<timm model>' for a new one."
        )
    if revision is not None and not pretrained:
        raise ValueError(f"revision goes with hf-hub: names and pretrained, got revision={revision!r} for {name!r}.")
    weights = None
    if pretrained:
        if checkpoint_path is not None:
            raise ValueError("pretrained=True and checkpoint_path both name full weights: pass one of them.")
        weights = manifest.find(name, pretrained_tag)
        name = weights.name.partition(".")[0]

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
    clip = kwargs.get("clip")
    _check_clip(clip)
    if weights is not None:
        return _load_released(weights, revision, cache_dir, kwargs)

    encoder = encoder_class(
        backbone,
        pretrained=backbone_pretrained and checkpoint_path is None,
        **{k: v for k, v in kwargs.items() if k in encoder_options},
    )
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
        length = {} if aggregator.clip_length is None else {"length": aggregator.clip_length}
        clip = dataclasses.replace(entry.clip, **{**length, **clip})
    model = TrackletModel(encoder, aggregator, clip)
    if checkpoint_path is not None:
        load_weights(model, checkpoint_path)
    return model


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """The tested names that match a shell-style ``pattern``, sorted. Any other timm model works behind a prefix too.

    Args:
        pattern: such as ``"gltr_*"``.
        pretrained: only the names of released weights, such as ``loga_resnet50.mars``; planned ones are no such names.
    """
    names = {weights.name for weights in manifest.read().values() if weights.released}
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


def _check_clip(clip: ClipConfig | dict | None) -> None:
    fields = [f.name for f in dataclasses.fields(ClipConfig)]
    unknown = sorted(set(clip) - set(fields)) if isinstance(clip, dict) else []
    if unknown:
        raise TypeError(f"clip has no field {', '.join(unknown)}; it has: {', '.join(fields)}.")


def _load_released(
    weights: manifest.Weights, revision: str | None, cache_dir: str | os.PathLike | None, kwargs: dict
) -> TrackletModel:
    """The model of an entry of the manifest, with the options that it was trained with, but for ``kwargs``."""
    sha256 = weights.sha256 if revision in (None, weights.revision) else None
    try:
        directory = hub.download(weights.repo, revision or weights.revision, cache_dir, sha256)
    except (ConnectionError, FileNotFoundError) as error:
        if weights.released:
            raise
        raise FileNotFoundError(
            f"the weights {weights.name} are planned and had not been released when this version of temporal-agg was; "
            f"they will be at {weights.repo} on the Hub ({error}) Until then: backbone_pretrained=True starts from "
            f"timm's backbone weights, checkpoint_path=... loads your own, and `{weights.command}` trains them."
        ) from error
    if not weights.released:
        _log.warning("%s is on the Hub, but not in this version's manifest: update temporal-agg.", weights.name)
    config = hub.read_config(directory / hub.CONFIG)
    if config["architecture"].partition(".")[0] != weights.name.partition(".")[0]:
        raise ValueError(f"{weights.repo} holds a {config['architecture']}, expected {weights.name}: report it.")
    model = hub.build(TrackletModel, directory / hub.CONFIG, **{k: v for k, v in kwargs.items() if v is not None})
    load_weights(model, directory)
    return model.eval()
