"""Aggregators by name. A new one is one file in this folder and one decorator; nothing else has to be told."""

import difflib
import fnmatch
import inspect
from collections.abc import Callable
from dataclasses import dataclass

from ..data.sampling import ClipConfig
from .base import Aggregator

__all__ = ["ClipConfig", "create_aggregator", "list_aggregators", "register_aggregator"]


@dataclass(frozen=True)
class _Entry:
    build: Callable[..., Aggregator]
    clip: ClipConfig
    last_stride: int


_REGISTRY: dict[str, _Entry] = {}
_DEFAULT_CLIP = ClipConfig()


def register_aggregator(
    name: str, *, clip: ClipConfig = _DEFAULT_CLIP, last_stride: int = 2
) -> Callable[[Callable[..., Aggregator]], Callable[..., Aggregator]]:
    """Registers an :class:`Aggregator` subclass, or a function that builds one, under ``name``.

    Args:
        name: what ``create_aggregator`` and the prefix of ``create_model`` call it; letters, digits and ``_``.
        clip: how its paper cuts tracklets: the default of models built with it.
        last_stride: the stride of a ResNet's last stage in its paper: the default of models built with it.
    """

    def register(build: Callable[..., Aggregator]) -> Callable[..., Aggregator]:
        if name in _REGISTRY:
            raise ValueError(f"an aggregator named {name!r} is registered already: choose another name.")
        _REGISTRY[name] = _Entry(build, clip, last_stride)
        return build

    return register


def list_aggregators(pattern: str = "*") -> list[str]:
    """The registered names that match a shell-style ``pattern``, sorted."""
    return sorted(fnmatch.filter(_REGISTRY, pattern))


def create_aggregator(name: str, in_features: int, **kwargs) -> Aggregator:
    """Builds an aggregator by name.

    Args:
        name: one of :func:`list_aggregators`.
        in_features: C, the channels of the frame features it will get.
        **kwargs: options of that aggregator (see its class).

    Raises:
        ValueError: an unknown name (the message has the nearest ones).
        TypeError: an unknown option (the message lists the options it has).
    """
    entry = registry_entry(name)
    options = aggregator_options(name)
    unknown = sorted(set(kwargs) - set(options))
    if unknown:
        raise TypeError(
            f"aggregator {name!r} has no option {', '.join(unknown)}; it has: {', '.join(options) or 'none'}."
        )
    aggregator = entry.build(in_features, **kwargs)
    aggregator.config = {"name": name, "in_features": in_features, **kwargs}
    return aggregator


def aggregator_options(name: str) -> list[str]:
    """The names of the keyword arguments that ``create_aggregator(name, ...)`` takes."""
    parameters = list(inspect.signature(registry_entry(name).build).parameters)
    return [p for p in parameters if p != "in_features"]


def registry_entry(name: str) -> _Entry:
    """What is registered under ``name``; the error for an unknown name has the nearest ones."""
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"no aggregator is named {name!r}; {hint}All: {', '.join(list_aggregators())}.")
    return _REGISTRY[name]
