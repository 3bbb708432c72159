"""Models to and from a directory or the Hub: ``config.json`` says how to build one, ``model.safetensors`` fills it."""

import dataclasses
import inspect
import json
import os
import tempfile
from pathlib import Path

import huggingface_hub
import huggingface_hub.errors
import safetensors.torch
import timm
import torch
from torch import nn

from .._files import replace_file
from .._version import __version__
from ..aggregators.registry import ClipConfig, create_aggregator, registry_entry
from . import manifest
from .encoder import FrameEncoder
from .star import StarEncoder
from .weights import WEIGHTS, check_sha256, load_weights

__all__ = ["HubMixin"]

CONFIG = "config.json"
FORMAT = 2  # of config.json
_KEYS = {"format", "architecture", "encoder", "aggregator", "clip", "data_config", "versions"}

ENCODERS = {"frame": FrameEncoder, "star": StarEncoder}
_NOT_IN_CONFIG = {"pretrained", "grad_checkpointing"}  # arguments that leave the loaded model what it is

# The arguments that configs of an older format leave out, with the values that they then had. A new argument of an
# encoder or an aggregator raises FORMAT and has its place in the row of the format before.
LEFT_OUT = {
    1: {
        "fgra": {
            "num_regions": 4,
            "reduced_features": 1024,
            "global_branch": True,
            "local_branch": "aligned",
            "temporal": "alignment",
            "spatial": "attention",
        },
        "gltr": {
            "embed_features": 128,
            "branches": 3,
            "pyramid": "dilated",
            "normalize": "softmax",
            "dtp": True,
            "tsa": True,
        },
        "gltr_released": {"embed_features": 128},
        "grl": {"parts": None, "directions": ["forward", "backward"], "enhancement": True, "memory": True},
        "grl_released": {"parts": None, "directions": ["forward", "backward"], "enhancement": True, "memory": True},
        "gsta": {"hidden_features": 512},
        "loga": {
            "clip_length": 10,
            "part_size": 10,
            "assembly": "associatively",
            "quality": "frames",
            "scale": None,
        },
        "lstm": {"hidden_features": 512},
    }
}


class HubMixin:
    """``save_pretrained``, ``push_to_hub`` and ``from_pretrained`` for :class:`TrackletModel`."""

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes ``config.json`` and ``model.safetensors``.

        Both are written under temporary names before either is renamed: an interrupted call leaves what was there.

        Args:
            directory: made if it does not exist; files of an earlier call are replaced.

        Raises:
            ValueError: the encoder or the aggregator was built by hand, so that nothing says how to build it again.
        """
        config = describe(self)
        content = json.dumps(config, indent=2) + "\n"
        # Copies: safetensors takes neither tensors that share memory nor strided ones (channels_last).
        weights = {
            key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for key, value in self.state_dict().items()
        }
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        metadata = {"format": "pt", "library": "temporal_agg", "architecture": config["architecture"]}
        metadata |= config["versions"]

        def write(path: Path) -> None:
            safetensors.torch.save_file(weights, path, metadata)
            _sort_metadata(path)

        def write_config(path: Path) -> None:
            path.write_text(content, encoding="utf-8")
            replace_file(directory / WEIGHTS, write)

        replace_file(directory / CONFIG, write_config)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        private: bool = False,
        token: str | None = None,
        commit_message: str = "Upload model",
    ) -> str:
        """Uploads what :meth:`save_pretrained` writes, in one commit: all of it arrives or nothing does.

        A failed call can be repeated: what has arrived is not sent again.

        Args:
            repo_id: ``<owner>/<repository>``; made if it does not exist.
            revision: a branch, made if it does not exist; None = ``main``.
            private: of a new repository.
            token: None = the one that huggingface_hub has (``hf auth login``, ``HF_TOKEN``).
            commit_message: the first line of the commit's message.

        Returns:
            The commit. ``create_model("hf-hub:<repo_id>@<commit>")`` gets this model whatever is pushed later.

        Raises:
            ValueError: as :meth:`save_pretrained`.
        """
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            return upload(directory, repo_id, revision, private, token, commit_message)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
    ) -> nn.Module:
        """Builds a saved model and loads its weights, in evaluation mode.

        Access to the Hub is huggingface_hub's own: ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HOME`` and ``HF_HUB_OFFLINE``
        work as everywhere.

        Args:
            source: a directory, or ``hf-hub:<owner>/<repo>[@<revision>]``.
            revision: the branch, tag or commit of the Hub repository.
            cache_dir: where downloads are kept; None = where huggingface_hub keeps them.

        Returns:
            The model, on the CPU.

        Raises:
            FileNotFoundError: no such directory, repository or revision, or a file is missing in it.
            PermissionError: a gated repository.
            ConnectionError: offline, and not in the cache.
            ValueError: ``config.json`` describes no model that this version can build, the weights do not fit, or they
                are not those that the manifest has for this commit.
        """
        directory = resolve_directory(source, revision, cache_dir)
        model = build(cls, directory / CONFIG)
        load_weights(model, directory / WEIGHTS)
        return model.eval()


def describe(model: nn.Module) -> dict:
    """What ``config.json`` says about a :class:`TrackletModel`: every argument that it was built with."""
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
    parameters = inspect.signature(registry_entry(aggregator.config["name"]).build).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    config = {
        "format": FORMAT,
        "architecture": f"{aggregator.config['name'] if kind == 'frame' else kind}_{encoder.config['backbone']}",
        "encoder": {"type": kind, **encoder.config},
        "aggregator": {**defaults, **aggregator.config},
        "clip": dataclasses.asdict(model.clip),
        "data_config": encoder.data_config,
        "versions": {"temporal_agg": __version__, "timm": timm.__version__, "torch": str(torch.__version__)},
    }
    try:
        json.dumps(config)
    except TypeError as error:
        raise ValueError(
            f"the model was built with options that config.json cannot hold ({error}): use numbers, strings, lists and "
            "dicts only."
        ) from error
    if lost := _not_in(config):
        raise ValueError(f"config.json would not say all that the model was built with: {', '.join(lost)} is missing.")
    return config


def read_config(path: Path) -> dict:
    """Reads and checks a ``config.json``; what an older format leaves out gets the value that it then had."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no valid JSON: {error}.") from error
    version = config.get("format") if isinstance(config, dict) else None
    if version not in range(1, FORMAT + 1):
        raise ValueError(
            f"{path}: expected a temporal-agg config of format 1 to {FORMAT}, got format {version}: it was written by "
            "another library, or by a newer version of this one (pip install -U temporal-agg)."
        )
    missing, unknown = sorted(_KEYS - set(config)), sorted(set(config) - _KEYS)
    if missing or unknown:
        raise ValueError(f"{path}: missing keys: {missing or 'none'}; unknown keys: {unknown or 'none'}.")
    if config["encoder"].get("type") not in ENCODERS:
        known = ", ".join(ENCODERS)
        raise ValueError(f"{path}: unknown encoder type {config['encoder'].get('type')!r}; known: {known}.")
    for older in range(version, FORMAT):
        for part, kind in (("encoder", "type"), ("aggregator", "name")):
            config[part] = {**LEFT_OUT[older].get(config[part].get(kind), {}), **config[part]}
    if lost := _not_in(config):
        raise ValueError(
            f"{path} does not say all that the model was built with: {', '.join(lost)} is missing. Add the values that "
            "the weights were trained with."
        )
    return config


def build(cls: type, path: Path, **changes) -> nn.Module:
    """The model that a ``config.json`` describes, without its weights.

    Args:
        cls: :class:`TrackletModel`.
        path: of ``config.json``.
        **changes: options in the place of those that it says: of the encoder, the aggregator, and ``clip``.
    """
    config = read_config(path)
    encoder, aggregator, clip = config["encoder"], config["aggregator"], config["clip"]
    change = changes.pop("clip", {})
    clip |= dataclasses.asdict(change) if isinstance(change, ClipConfig) else change
    if "backbone_kwargs" in changes:
        changes["backbone_kwargs"] = {**encoder["backbone_kwargs"], **changes["backbone_kwargs"]}
    for key, value in changes.items():
        (aggregator if key in aggregator else encoder)[key] = value
    kind = encoder.pop("type")
    try:
        encoder = ENCODERS[kind](**{**encoder, "pretrained": False})
        aggregator = create_aggregator(**aggregator)
        clip = ClipConfig(**clip)
    except TypeError as error:
        raise ValueError(
            f"{path} does not fit this version of temporal-agg ({error}); it was written by {config['versions']}."
        ) from error
    # What it was trained with, whatever this version of timm would say.
    data_config = {key: tuple(v) if isinstance(v, list) else v for key, v in config["data_config"].items()}
    if "img_size" in changes:
        data_config["input_size"] = encoder.data_config["input_size"]
    encoder.data_config = data_config
    return cls(encoder, aggregator, clip)


def resolve_directory(source: str | os.PathLike, revision: str | None, cache_dir: str | os.PathLike | None) -> Path:
    """A directory with a saved model: the one given, or a download of ``hf-hub:<owner>/<repo>[@<revision>]``."""
    if str(source).startswith("hf-hub:"):
        repo, _, at = str(source).removeprefix("hf-hub:").partition("@")
        if at and revision and at != revision:
            raise ValueError(f"two revisions were given: {at!r} in {str(source)!r}, and revision={revision!r}.")
        return download(repo, at or revision, cache_dir)
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


def download(repo: str, revision: str | None, cache_dir: str | os.PathLike | None, sha256: str | None = None) -> Path:
    """The directory of a model on the Hub, downloaded unless it is in the cache; the weights' checksum is checked where
    it is given, or known for this commit."""
    config = _download(repo, CONFIG, revision, cache_dir)
    commit = config.parent.name  # what a branch says may change before the next call
    weights = _download(repo, WEIGHTS, commit, cache_dir)
    known = (w.sha256 for w in manifest.read().values() if (w.repo, w.revision) == (repo, commit))
    if sha256 := sha256 or next(known, None):
        check_sha256(weights, sha256)
    return weights.parent


def _download(repo: str, name: str, revision: str | None, cache_dir: str | os.PathLike | None) -> Path:
    errors = huggingface_hub.errors
    where = f"{huggingface_hub.constants.ENDPOINT}/{repo}"
    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision, cache_dir=cache_dir))
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{where} is gated: ask for access there, then log in (hf auth login, or the variable HF_TOKEN)."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{where} does not exist, or is private: check its name; for a private one log in (hf auth login, or the "
            "environment variable HF_TOKEN)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{where} has no revision {revision!r}: look for it under its files and versions."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{name} of {repo}{at} is not in the cache, and {where} could not be reached (HF_HUB_OFFLINE, or no "
            "connection): load it once with a connection, or copy the cache."
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(
            f"{where} has no {name}{at}: it is no model that save_pretrained wrote. Pickles (pytorch_model.bin) are "
            "not loaded."
        ) from error


def upload(
    directory: str | os.PathLike,
    repo_id: str,
    revision: str | None,
    private: bool,
    token: str | None,
    commit_message: str,
    files: list[str] | None = None,
) -> str:
    """Puts the files of a directory, or some, on the Hub in one commit, and returns that."""
    api = huggingface_hub.HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    info = api.upload_folder(
        repo_id=repo_id,
        folder_path=directory,
        revision=revision,
        commit_message=commit_message,
        allow_patterns=files,
    )
    return info.oid


def _not_in(config: dict) -> list[str]:
    """The constructor arguments of encoder and aggregator that a config does not say."""
    encoder, aggregator = config["encoder"], config["aggregator"]
    lost = []
    for part, said, cls in (
        ("encoder", encoder, ENCODERS[encoder["type"]]),
        ("aggregator", aggregator, registry_entry(aggregator.get("name")).build),
    ):
        for parameter in inspect.signature(cls).parameters.values():
            variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if parameter.name not in {*said, *_NOT_IN_CONFIG} and not variadic:
                lost.append(f"{part}.{parameter.name}")
    return lost


def _sort_metadata(path: Path) -> None:
    """safetensors writes its metadata in random order; sorted, equal models are equal files."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(content) <= size:
            file.seek(8)
            file.write(content.ljust(size))
