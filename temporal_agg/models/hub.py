"""Models to and from a directory: ``config.json`` says how to build one, ``model.safetensors`` has its weights."""

import dataclasses
import json
import os
from pathlib import Path

import huggingface_hub
import safetensors.torch
import timm
import torch
from torch import nn

from ..aggregators.registry import ClipConfig, create_aggregator
from .encoder import FrameEncoder
from .star import StarEncoder

__all__ = ["HubMixin"]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FORMAT = 1  # of config.json
_KEYS = {"format", "architecture", "encoder", "aggregator", "clip", "data_config", "versions"}

ENCODERS = {"frame": FrameEncoder, "star": StarEncoder}

RELEASED: dict[str, str] = {}  # model name -> "<owner>/<repo>@<revision>"; nothing has been released yet


class HubMixin:
    """``save_pretrained`` and ``from_pretrained`` for :class:`TrackletModel`."""

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes ``config.json`` and ``model.safetensors``.

        Each file is written under a temporary name and renamed, so that an interrupted call leaves no broken file.

        Args:
            directory: made if it does not exist; files of an earlier call are replaced.

        Raises:
            ValueError: the encoder or the aggregator was built by hand, so that nothing says how to build it again.
        """
        config = json.dumps(describe(self), indent=2) + "\n"
        # Copies: safetensors takes neither tensors that share memory nor strided ones (channels_last).
        weights = {
            key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for key, value in self.state_dict().items()
        }
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        metadata = {"format": "pt", "library": "temporal_agg"}
        _replace(directory / WEIGHTS, lambda path: safetensors.torch.save_file(weights, path, metadata))
        _replace(directory / CONFIG, lambda path: path.write_text(config, encoding="utf-8"))

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
    ) -> nn.Module:
        """Builds a saved model and loads its weights, in evaluation mode.

        Args:
            source: a directory, or ``hf-hub:<owner>/<repo>[@<revision>]``.
            revision: the branch, tag or commit of the Hub repository.
            cache_dir: where downloads are kept; None = where huggingface_hub keeps them.

        Returns:
            The model, on the CPU.

        Raises:
            FileNotFoundError: no such directory, or a file is missing in it.
            ValueError: ``config.json`` describes no model that this version can build, or the weights do not fit.
        """
        directory = resolve_directory(source, revision, cache_dir)
        config = read_config(directory / CONFIG)
        encoder = dict(config["encoder"])
        kind = encoder.pop("type", None)
        if kind not in ENCODERS:
            raise ValueError(f"{directory / CONFIG}: unknown encoder type {kind!r}; known: {', '.join(ENCODERS)}.")
        try:
            encoder = ENCODERS[kind](**{**encoder, "pretrained": False})
            aggregator = create_aggregator(**config["aggregator"])
            clip = ClipConfig(**config["clip"])
        except TypeError as error:
            raise ValueError(
                f"{directory / CONFIG} does not fit this version of temporal-agg ({error}); it was written by "
                f"{config['versions']}."
            ) from error
        data_config = {k: tuple(v) if isinstance(v, list) else v for k, v in config["data_config"].items()}
        encoder.data_config = data_config  # what it was trained with, whatever this version of timm would say
        model = cls(encoder, aggregator, clip)
        load_weights(model, directory / WEIGHTS)
        return model.eval()


def describe(model: nn.Module) -> dict:
    """What ``config.json`` says about a :class:`TrackletModel`."""
    encoder, aggregator = model.encoder, model.aggregator
    kind = next((kind for kind, cls in ENCODERS.items() if type(encoder) is cls), None)
    if kind is None or encoder.config is None:
        raise ValueError(
            "the encoder cannot be described in config.json: build it from the name of a timm model, as in "
            'FrameEncoder("resnet50") or create_model("mean_resnet50"); or keep model.state_dict() yourself.'
        )
    if aggregator.config is None:
        raise ValueError(
            "the aggregator cannot be described in config.json: build it with create_aggregator(name, in_features), "
            "registering your own class with @register_aggregator; or keep model.state_dict() yourself."
        )
    from .. import __version__

    config = {
        "format": FORMAT,
        "architecture": f"{aggregator.config['name'] if kind == 'frame' else kind}_{encoder.config['backbone']}",
        "encoder": {"type": kind, **encoder.config},
        "aggregator": aggregator.config,
        "clip": dataclasses.asdict(model.clip),
        "data_config": encoder.data_config,
        "versions": {"temporal_agg": __version__, "timm": timm.__version__, "torch": torch.__version__},
    }
    try:
        json.dumps(config)
    except TypeError as error:
        raise ValueError(
            f"the model was built with options that config.json cannot hold ({error}): use numbers, strings, lists and "
            "dicts only."
        ) from error
    return config


def read_config(path: Path) -> dict:
    """Reads and checks a ``config.json``."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no valid JSON: {error}.") from error
    version = config.get("format") if isinstance(config, dict) else None
    if version != FORMAT:
        raise ValueError(
            f"{path}: expected a temporal-agg config of format {FORMAT}, got format {version}: it was written by "
            "another library, or by a newer version of this one."
        )
    missing, unknown = sorted(_KEYS - set(config)), sorted(set(config) - _KEYS)
    if missing or unknown:
        raise ValueError(f"{path}: missing keys: {missing or 'none'}; unknown keys: {unknown or 'none'}.")
    return config


def load_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Loads a ``.safetensors`` file, or the ``model.safetensors`` of a directory, into a model: every key, exactly.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or keys or shapes that are not the model's (the message names them).
    """
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; expected a .safetensors file or a directory with {WEIGHTS}.")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path}: only .safetensors files are loaded, since unpickling can run code. Convert it once, with "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), ...)."
        )
    try:
        weights = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no complete safetensors file: {error}.") from error
    wanted = model.state_dict()
    problems = {
        "missing": sorted(set(wanted) - set(weights)),
        "unexpected": sorted(set(weights) - set(wanted)),
        "of another shape": [
            f"{k} {list(weights[k].shape)} for {list(v.shape)}"
            for k, v in wanted.items()
            if k in weights and weights[k].shape != v.shape
        ],
    }
    if any(problems.values()):
        lists = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for kind, names in problems.items()
            if names
        )
        raise ValueError(f"{path} does not fit the model: {lists}. Build the model with the options it was saved with.")
    model.load_state_dict(weights)


def resolve_directory(source: str | os.PathLike, revision: str | None, cache_dir: str | os.PathLike | None) -> Path:
    """A directory with a saved model: the one given, or a download of ``hf-hub:<owner>/<repo>[@<revision>]``."""
    if str(source).startswith("hf-hub:"):
        repo, _, at = str(source).removeprefix("hf-hub:").partition("@")
        if at and revision and at != revision:
            raise ValueError(f"two revisions were given: {at!r} in {str(source)!r}, and revision={revision!r}.")
        files = [
            huggingface_hub.hf_hub_download(repo, name, revision=at or revision, cache_dir=cache_dir)
            for name in (CONFIG, WEIGHTS)
        ]
        return Path(files[0]).parent
    if revision is not None:
        raise ValueError(f"revision goes with hf-hub: names only, got revision={revision!r} for {str(source)!r}.")
    directory = Path(source)
    for path in (directory, directory / CONFIG, directory / WEIGHTS):
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: expected a directory that save_pretrained wrote, or "
                "hf-hub:<owner>/<repo> for a model on the Hub."
            )
    return directory


def _replace(path: Path, write) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
