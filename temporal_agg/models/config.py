"""A model as JSON, and back: ``config.json`` says how to build it, and everything in it is checked when it is read."""

import dataclasses
import inspect
import json
import math
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .._files import read_json
from .._options import LARGEST, check_types, fits
from .._version import __version__
from ..aggregators.registry import ClipConfig, create_aggregator, registry_entry
from .encoder import FrameEncoder, create_encoder, encoder_class, name_aliases
from .tracklet import TrackletModel
from .weights import unwrap

__all__ = ["build", "describe", "read"]

CONFIG = "config.json"
FORMAT = 1
_KINDS: dict[str, type] = {
    "format": int,
    "architecture": str,
    "encoder": dict,
    "aggregator": dict,
    "clip": dict,
    "data_config": dict,
    "versions": dict,
}
_OPTIONAL: dict[str, type] = {"weights": str}
_NOT_IN_CONFIG = {"pretrained", "grad_checkpointing"}  # arguments that leave the loaded model what it is
_DATA = ("input_size", "mean", "std", "interpolation")
_BRIGHTEST = 255  # of any pixel, in any unit
_INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "nearest-exact", "lanczos", "hamming", "box")  # torchvision's

Model = TypeVar("Model", bound=TrackletModel)


def describe(model: nn.Module) -> dict[str, Any]:
    """What ``config.json`` says about a :class:`TrackletModel`: every argument that it was built with.

    Raises:
        TypeError: no :class:`TrackletModel`, also not inside ``DataParallel`` or ``torch.compile``.
        ValueError: the encoder or the aggregator was built by hand.
    """
    model = unwrap(model)
    if not isinstance(model, TrackletModel):
        raise TypeError(f"expected a TrackletModel, as create_model builds it, got {type(model).__name__}.")
    encoder, aggregator = unwrap(model.encoder), unwrap(model.aggregator)
    said = encoder.config if isinstance(encoder, FrameEncoder) else None
    if said is None or encoder_class(said["backbone"]) is not type(encoder):
        raise ValueError(
            "the encoder cannot be described in config.json: build it from the name of a timm model, as in "
            'FrameEncoder("resnet50") or create_model("mean_resnet50"); or keep model.state_dict() yourself.'
        )
    options: Any = aggregator.config
    if options is None:
        raise ValueError(
            "the aggregator cannot be described in config.json: build it with create_aggregator(name, in_features), "
            "registering your own class with @register_aggregator; or keep model.state_dict() yourself."
        )
    parameters = inspect.signature(registry_entry(options["name"]).build).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    config = {
        "format": FORMAT,
        "architecture": architecture(options["name"], said["backbone"]),
        "encoder": dict(said),
        "aggregator": {**defaults, **options},
        "clip": dataclasses.asdict(model.clip),
        "data_config": model.data_config,
        "versions": {"temporal_agg": __version__, "timm": version("timm"), "torch": str(torch.__version__)},
    }
    try:
        json.dumps(config)
    except TypeError as error:
        raise ValueError(
            f"the model was built with options that config.json cannot hold ({error}): use numbers, strings, lists and "
            "dicts only."
        ) from error
    if lost := _left_out(config):
        raise ValueError(f"config.json would not say all that the model was built with: {', '.join(lost)} is missing.")
    return config


def architecture(aggregator: str, backbone: str) -> str:
    """What ``create_model`` calls the two; a system's own name where it has one (``star_resnet50``)."""
    for alias, (name, prefix) in name_aliases().items():
        if name == aggregator and backbone.startswith(prefix):
            return f"{alias}_{backbone.removeprefix(prefix)}"
    return f"{aggregator}_{backbone}"


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a ``config.json`` and checks every field of it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no config that this version can read; the message names the file and the field.
    """
    path = Path(path)
    try:
        config = read_json(path)
        _check(config)
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error
    return config


def differences(model: nn.Module, path: str | os.PathLike) -> list[str]:
    """The options in which a model is not the one that a ``config.json`` describes, each with both values."""
    ours, theirs = describe(model), read(path)
    return [
        f"{part}.{key} is {ours[part].get(key)!r}, there {theirs[part].get(key)!r}"
        for part in ("encoder", "aggregator")
        for key in {**ours[part], **theirs[part]}
        if key != "img_size" and json.dumps(ours[part].get(key)) != json.dumps(theirs[part].get(key))
    ]


def build(path: str | os.PathLike, cls: type[Model] = TrackletModel, **changes: Any) -> Model:  # type: ignore[assignment]
    """The model that a ``config.json`` describes, without its weights.

    Args:
        path: of ``config.json``.
        cls: what is built of encoder and aggregator.
        **changes: options in the place of those that it says: of the encoder, the aggregator, and ``clip``.

    Raises:
        OSError: it cannot be read.
        ValueError: it describes nothing that can be built; the message names the file.
    """
    config = read(path)
    encoder_options, options, clip_options = config["encoder"], config["aggregator"], config["clip"]
    change = changes.pop("clip", {})
    clip_options |= dataclasses.asdict(change) if isinstance(change, ClipConfig) else change
    if "backbone_kwargs" in changes:
        changes["backbone_kwargs"] = {**encoder_options["backbone_kwargs"], **changes["backbone_kwargs"]}
    for key, value in changes.items():
        (options if key in options else encoder_options)[key] = value
    try:
        encoder = create_encoder(**encoder_options)
        aggregator = create_aggregator(**options)
        clip = ClipConfig(**clip_options)
        # What it was trained with, whatever this version of timm would say.
        encoder.data_config = {
            key: tuple(value) if isinstance(value, list) else value for key, value in config["data_config"].items()
        } | ({"input_size": encoder.data_config["input_size"]} if "img_size" in changes else {})
        return cls(encoder, aggregator, clip)
    except ImportError:
        raise
    except Exception as error:  # a file can say anything, and what timm or an aggregator raises at it is not listed
        raise ValueError(
            f"{path} describes no model that can be built here ({type(error).__name__}: {error}); it was written by "
            f"{config['versions']}."
        ) from error


def _check(config: dict[str, Any]) -> None:
    """Raises ValueError unless a config is one of this format whose every field can be used."""
    number = config.get("format")
    if type(number) is not int or number != FORMAT:
        raise ValueError(
            f"expected a temporal-agg config of format {FORMAT}, got format {number!r}: it was written by another "
            "library, or by a newer version of this one (pip install -U temporal-agg)."
        )
    missing, unknown = sorted(_KINDS.keys() - config.keys()), sorted(config.keys() - _KINDS.keys() - _OPTIONAL.keys())
    if missing or unknown:
        raise ValueError(f"missing keys: {missing or 'none'}; unknown keys: {unknown or 'none'}.")
    for key, kind in {**_KINDS, **_OPTIONAL}.items():
        if key in config and not isinstance(config[key], kind):
            raise ValueError(f"{key} must be a JSON {_JSON[kind]}, got {config[key]!r}.")
    _check_numbers("", config)
    encoder, aggregator = config["encoder"], config["aggregator"]
    for part, key in ((encoder, "backbone"), (aggregator, "name")):
        if not isinstance(part.get(key), str):
            raise ValueError(f"expected the name of a model in {key!r}, got {part.get(key)!r}.")
    lost = _left_out(config)
    if lost:
        raise ValueError(
            f"it does not say all that the model was built with: {', '.join(lost)} is missing. Add the values that the "
            "weights were trained with."
        )
    _check_options("encoder", encoder, encoder_class(encoder["backbone"]))
    _check_options("aggregator", aggregator, registry_entry(aggregator["name"]).build)
    _check_options("clip", config["clip"], ClipConfig)
    if lost := sorted({field.name for field in dataclasses.fields(ClipConfig)} - config["clip"].keys()):
        raise ValueError(f"clip.{', clip.'.join(lost)} is missing.")
    if config["architecture"] != (name := architecture(aggregator["name"], encoder["backbone"])):
        raise ValueError(f"architecture is {config['architecture']!r}, but encoder and aggregator make {name!r}.")
    _check_data(config["data_config"], encoder["img_size"])
    for key, value in config["versions"].items():
        if not isinstance(value, str):
            raise ValueError(f"versions.{key} must be a string, got {value!r}.")


def _check_data(data: dict[str, Any], img_size: list[int]) -> None:
    if data.keys() != set(_DATA):
        raise ValueError(f"data_config must have {', '.join(_DATA)} and nothing else, got {', '.join(data) or 'none'}.")
    size, interpolation = data["input_size"], data["interpolation"]
    if not fits(size, tuple[int, int, int]) or size[0] != 3 or min(size) < 1:
        raise ValueError(f"data_config.input_size must be [3, height, width], got {size!r}.")
    if size[1:] != img_size:
        raise ValueError(f"data_config.input_size is {size}, but encoder.img_size {img_size}: they must be the same.")
    for key in ("mean", "std"):
        least = 1e-6 if key == "std" else -_BRIGHTEST
        if not fits(data[key], tuple[float, float, float]) or not all(least <= x <= _BRIGHTEST for x in data[key]):
            raise ValueError(
                f"data_config.{key} must be three numbers from {least} to {_BRIGHTEST}, got {data[key]!r}."
            )
    if interpolation not in _INTERPOLATIONS:
        raise ValueError(
            f"data_config.interpolation must be one of {', '.join(_INTERPOLATIONS)}, got {interpolation!r}."
        )


def _check_numbers(where: str, value: Any) -> None:
    """Raises ValueError where a number is not finite, or larger than any size of a model."""
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_numbers(f"{where}.{key}" if where else str(key), item)
    elif isinstance(value, (int, float)) and not (math.isfinite(value) and (type(value) is float or value <= LARGEST)):
        raise ValueError(f"{where} must be a finite number, whole ones at most {LARGEST:,}, got {value!r:.40}.")


def _check_options(part: str, said: dict[str, Any], build: Callable[..., Any]) -> None:
    """Raises ValueError unless what is said are options that ``build`` has, of the types that it declares."""
    parameters = inspect.signature(build).parameters
    if unknown := sorted(said.keys() - (parameters.keys() - _NOT_IN_CONFIG) - {"name"}):
        raise ValueError(f"this version's {part} has no option {', '.join(unknown)}.")
    try:
        check_types(f"{part}.", build, said)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _left_out(config: dict[str, Any]) -> list[str]:
    """The constructor arguments of encoder and aggregator that a config does not say."""
    encoder, aggregator = config["encoder"], config["aggregator"]
    lost = []
    for part, said, build in (
        ("encoder", encoder, encoder_class(encoder["backbone"])),
        ("aggregator", aggregator, registry_entry(aggregator["name"]).build),
    ):
        for parameter in inspect.signature(build).parameters.values():
            variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if parameter.name not in {*said, *_NOT_IN_CONFIG} and not variadic:
                lost.append(f"{part}.{parameter.name}")
    return lost


_JSON = {dict: "object", str: "string", int: "number"}
