"""The manifest of weights: ``manifest.json``, one entry for each weight file, by the name that create_model knows.

An entry with ``released: false`` is a plan: where the weights will be and how they are to be made. Nothing in it says
that they exist.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

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
    return json.loads(PATH.read_text(encoding="utf-8"))["owner"]


def read() -> dict[str, Weights]:
    """All entries by name. The first of a model is its default."""
    content = json.loads(PATH.read_text(encoding="utf-8"))
    return {
        name: Weights(name=name, **{**entry, "repo": entry["repo"].format(owner=content["owner"])})
        for name, entry in content["weights"].items()
    }


def write(weights: Weights, path: Path) -> None:
    """Puts an entry into a manifest, in the place of one of the same name."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["weights"][weights.name] = {key: value for key, value in asdict(weights).items() if key != "name"}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
