"""The manifest of weights: ``manifest.json``, one entry for each weight file, by the name that create_model knows.

An entry with ``released: false`` is a plan: where the weights will be and how they are to be made. Nothing in it says
that they exist.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .._files import locked, read_json, replace_file

__all__ = ["Weights", "find", "owner", "read", "write"]

PATH = Path(__file__).with_name("manifest.json")


@dataclass(frozen=True)
class Weights:
    """What the manifest says about one weight file.

    Attributes:
        name: ``<model>.<tag>``, such as ``loga_resnet50.mars``.
        released: False: planned.
        repo: ``<owner>/<repository>`` on the Hub.
        revision: the commit; None = not released.
        sha256: of ``model.safetensors``; None = not known yet.
        size: of that file, in bytes.
        training_data: what it was trained on, pretraining included.
        training_data_licence: the terms of that data.
        licence: of the weights.
        metrics: measured by this project: ``map``, ``rank1``, ...; None = not measured.
        protocol: how they were measured.
        command: that trains it.
    """

    name: str
    released: bool
    repo: str
    revision: str | None
    sha256: str | None
    size: int | None
    training_data: str
    training_data_licence: str
    licence: str | None
    metrics: dict[str, float] | None
    protocol: str
    command: str


def owner() -> str:
    """Who releases weights that name no other repository."""
    return _content(PATH)["owner"]


def read() -> dict[str, Weights]:
    """All entries by name. The first of a model is its default.

    Raises:
        ValueError: the file is damaged.
    """
    content = _content(PATH)
    return {
        name: Weights(name=name, **{**entry, "repo": entry["repo"].replace("{owner}", content["owner"])})
        for name, entry in content["weights"].items()
    }


def write(weights: Weights, path: Path) -> None:
    """Puts an entry into a manifest, in the place of one of the same name; the file is replaced as a whole.

    Raises:
        Busy: another process is writing it.
        OSError: it cannot be written.
        ValueError: what is there is no manifest.
    """
    path = Path(path)
    with locked(path.with_name(f".{path.name}.lock"), str(path)):
        content = _content(path)
        content["weights"][weights.name] = {key: value for key, value in asdict(weights).items() if key != "name"}
        text = json.dumps(content, indent=2) + "\n"
        replace_file(path, lambda new: new.write_text(text, encoding="utf-8"))


_KINDS = {
    "released": (bool,),
    "size": (int, type(None)),
    "metrics": (dict, type(None)),
    **dict.fromkeys(("revision", "sha256", "licence"), (str, type(None))),
}


def _content(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content.get("owner"), str) or not isinstance(content.get("weights"), dict):
        raise ValueError(f"{path}: expected a manifest, a JSON object with 'owner' and 'weights'.")
    names = {field.name for field in fields(Weights)} - {"name"}
    for name, entry in content["weights"].items():
        if not isinstance(entry, dict) or entry.keys() != names:
            raise ValueError(f"{path}: the entry {name!r} must have {', '.join(sorted(names))}, and nothing else.")
        for key, value in entry.items():
            if not isinstance(value, _KINDS.get(key, (str,))):
                raise ValueError(f"{path}: {key} of the entry {name!r} cannot be {value!r}.")
    return content


def find(name: str, tag: str | None = None) -> Weights:
    """The entry for ``<model>`` or ``<model>.<tag>``.

    Raises:
        ValueError: two different tags, or no such entry (the message lists what there is).
    """
    model, _, own = name.partition(".")
    if own and tag and own != tag:
        raise ValueError(f"two tags were given: {own!r} in {name!r}, and pretrained_tag={tag!r}.")
    tag = own or tag
    entries = read()
    for entry in entries.values():
        if entry.name == f"{model}.{tag}" or (not tag and entry.name.startswith(f"{model}.")):
            return entry
    released = [entry.name for entry in entries.values() if entry.released]
    planned = [entry.name for entry in entries.values() if not entry.released]
    wanted = f"{model}.{tag}" if tag else model
    raise ValueError(
        f"no weights have been released or planned for {wanted!r} (released: {', '.join(released) or 'none'}; planned: "
        f"{', '.join(planned) or 'none'}). Use backbone_pretrained=True to start from timm's backbone weights, or "
        "checkpoint_path=... for your own."
    )
