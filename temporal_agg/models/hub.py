"""Models to and from a directory or the Hub: ``config.json`` says how to build one, ``model.safetensors`` fills it.

The two belong together. Each save gives both one mark, made of the weights; a pair whose marks differ is refused.
Files are replaced one at a time, so a new config waits beside the old one until its weights are there: whenever the
process is killed, what is read is the old pair or the new one.
"""

import hashlib
import json
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import safetensors.torch
import torch
from torch import Tensor, nn

from .._files import locked, read_json, replace_file, utf8_name
from . import manifest
from .config import CONFIG, build, describe
from .config import read as read_config
from .tracklet import TrackletModel
from .weights import WEIGHTS, check_sha256, load_weights, path_of, plain_state, unwrap

__all__ = ["download", "is_repository", "load", "push", "read_config", "restore", "save", "upload"]

_WAITING = f".{CONFIG}.next"  # the config of weights that are about to arrive
_LOCK = ".save.lock"


def save(model: nn.Module, directory: str | os.PathLike) -> None:
    """What :meth:`TrackletModel.save_pretrained` does. The model may be wrapped (:func:`unwrap`)."""
    config = describe(model)
    model = unwrap(model)
    state = model.state_dict()
    # Copies: safetensors takes neither tensors that share memory nor strided ones (channels_last).
    weights = {
        name: state[key].detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, key in plain_state(model).items()
    }
    config["weights"] = _mark(weights)
    metadata = {"format": "pt", "library": "temporal_agg", "architecture": config["architecture"]}
    metadata |= {**config["versions"], "weights": config["weights"]}

    def write_weights(path: Path) -> None:
        try:
            safetensors.torch.save_file(weights, path, metadata)
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error
        _sort_metadata(path)

    def write_config(path: Path) -> None:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    directory = path_of(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory / _LOCK, str(directory)):
        _settle(directory)
        try:
            replace_file(directory / _WAITING, write_config)
            replace_file(directory / WEIGHTS, write_weights)
        finally:
            _settle(directory)


def load(
    source: str | os.PathLike,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    cls: type[TrackletModel] = TrackletModel,
) -> TrackletModel:
    """What :meth:`TrackletModel.from_pretrained` does."""
    return restore(resolve_directory(source, revision, cache_dir), cls)


def restore(directory: Path, cls: type[TrackletModel] = TrackletModel, **changes: Any) -> TrackletModel:
    """The model that a directory holds, in evaluation mode; ``changes`` as for :func:`~.config.build`.

    Raises:
        ValueError: config and weights cannot be used, or do not belong together.
    """
    config, weights = config_in(directory), directory / WEIGHTS
    marks = read_config(config).get("weights"), _mark_of(weights)
    if None not in marks and marks[0] != marks[1]:
        raise ValueError(
            f"{config} and {weights} do not belong together: they are of two saves. Copy both files of one save, or "
            "save the model again."
        )
    numbers = 0
    # "meta" takes no memory, whatever the config asks for. RuntimeError: timm 1.0.8's convnext and swin read numbers
    # off tensors while they are built, and stay unchecked.
    with suppress(ValueError, RuntimeError), torch.device("meta"):
        numbers = sum(value.numel() for value in build(config, cls, **changes).state_dict().values())
    if numbers > weights.stat().st_size:
        raise ValueError(
            f"{config} describes a model of {numbers:,} numbers, which {weights} with its "
            f"{weights.stat().st_size:,} bytes cannot hold: they do not belong together."
        )
    model = build(config, cls, **changes)
    try:
        load_weights(model, weights)
    except ValueError as error:
        raise ValueError(f"{error} ({config} says which options these are.)") from error
    return model.eval()


def push(
    model: nn.Module, repo_id: str, revision: str | None, private: bool, token: str | None, commit_message: str
) -> str:
    """What :meth:`TrackletModel.push_to_hub` does."""
    with tempfile.TemporaryDirectory() as directory:
        save(model, directory)
        return upload(directory, repo_id, revision, private, token, commit_message)


def config_in(directory: Path) -> Path:
    """The config of the weights in a directory: of a save that was killed before its last step, the one that waits."""
    waiting = directory / _WAITING
    with suppress(OSError, ValueError):
        if (mark := read_json(waiting).get("weights")) is not None and mark == _mark_of(directory / WEIGHTS):
            return waiting
    return directory / CONFIG


def _settle(directory: Path) -> None:
    """Ends a save: the config that waits takes its place if its weights are there, and goes if not."""
    waiting = directory / _WAITING
    if config_in(directory) == waiting:
        os.replace(waiting, directory / CONFIG)
    else:
        waiting.unlink(missing_ok=True)


def _mark(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _mark_of(path: Path) -> str | None:
    """The mark that a save gave a weight file; None: none, or no such file."""
    with suppress(OSError, safetensors.SafetensorError):
        with utf8_name(path) as name, safetensors.safe_open(name, "pt") as file:
            return (file.metadata() or {}).get("weights")
    return None


def is_repository(name: str) -> bool:
    """Whether it is a name as the Hub has them, <owner>/<repo>."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII) is not None


def resolve_directory(source: str | os.PathLike, revision: str | None, cache_dir: str | os.PathLike | None) -> Path:
    """A directory with a saved model: the one given, or a download of ``hf-hub:<owner>/<repo>[@<revision>]``."""
    if str(source).startswith("hf-hub:"):
        repo, _, at = str(source).removeprefix("hf-hub:").partition("@")
        if at and revision and at != revision:
            raise ValueError(f"two revisions were given: {at!r} in {str(source)!r}, and revision={revision!r}.")
        if not is_repository(repo):
            raise ValueError(f"a model on the Hub is named hf-hub:<owner>/<repo>[@<revision>], got {str(source)!r}.")
        return download(repo, at or revision, cache_dir)
    if revision is not None:
        raise ValueError(f"revision goes with hf-hub: names only, got revision={revision!r} for {str(source)!r}.")
    directory = path_of(source)
    for path in (directory, config_in(directory), directory / WEIGHTS):
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
        cache = None if cache_dir is None else path_of(cache_dir)
        return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision, cache_dir=cache))
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
        folder_path=Path(directory),
        revision=revision,
        commit_message=commit_message,
        allow_patterns=files,
    )
    return info.oid


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
