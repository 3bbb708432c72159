"""Aggregators by name. A new one is one file in this folder and one decorator; nothing else has to be told."""

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from .. import _options
from ..data.sampling import ClipConfig
from .base import Aggregator, Criterion

__all__ = [
    "ClipConfig",
    "Entry",
    "Paper",
    "create_aggregator",
    "create_criterion",
    "list_aggregators",
    "list_criteria",
    "register_aggregator",
    "register_criterion",
    "registry_entry",
]


@dataclass(frozen=True)
class Paper:
    """The paper of a system, for cards, tables and citations.

    Attributes:
        name: what the paper calls its system.
        title: of the paper.
        authors: in order.
        venue: in full, as a bibliography has it.
        year: of the publication.
        url: where it can be read; "" = not known to be free anywhere.
        results: what the paper reports, rank-1 and mAP in percent by data set (``temporal_agg.data``'s names); None =
            not reported. They are not this project's figures.
    """

    name: str
    title: str
    authors: tuple[str, ...]
    venue: str
    year: int
    url: str = ""
    results: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)

    @property
    def bibtex(self) -> str:
        """The BibTeX entry."""
        fields = {
            "title": self.title,
            "author": " and ".join(self.authors),
            "booktitle": self.venue,
            "year": self.year,
            "url": self.url,
        }
        lines = "\n".join(f"  {key} = {{{value}}}," for key, value in fields.items() if value)
        return f"@inproceedings{{{self.name.lower()}{self.year},\n{lines}\n}}"


@dataclass(frozen=True)
class Entry:
    """What is registered under a name.

    Attributes:
        name: of the aggregator.
        build: its class, or a function that builds one, called with ``in_features`` and options.
        criterion: the class of its training criterion; None: ``baseline`` is its default.
        clip: how its paper cuts tracklets.
        last_stride: the stride of a ResNet's last stage in its paper.
        paper: None: a baseline, or one's own.
        note: what a card adds to the paper, such as that it follows the authors' code.
    """

    name: str
    build: Callable[..., Aggregator]
    criterion: Callable[..., Criterion] | None
    clip: ClipConfig
    last_stride: int
    paper: Paper | None
    note: str

    @property
    def default_criterion(self) -> str:
        """The name of the criterion that it trains with by default."""
        return self.name if self.criterion is not None else "baseline"


_REGISTRY: dict[str, Entry] = {}
_CRITERIA: dict[str, Callable[..., Criterion]] = {}
_DEFAULT_CLIP = ClipConfig()

Build = TypeVar("Build", bound=Callable[..., Aggregator])
BuildCriterion = TypeVar("BuildCriterion", bound=Callable[..., Criterion])


def register_aggregator(
    name: str,
    *,
    criterion: Callable[..., Criterion] | None = None,
    clip: ClipConfig = _DEFAULT_CLIP,
    last_stride: int = 2,
    paper: Paper | None = None,
    note: str = "",
) -> Callable[[Build], Build]:
    """Registers an :class:`Aggregator` subclass, or a function that builds one, under ``name``.

    Args:
        name: what ``create_aggregator`` and the prefix of ``create_model`` call it; letters, digits and ``_``.
        criterion: the class of its training criterion, which ``create_criterion`` then knows by the same name; None:
            it trains with ``baseline``.
        clip: how its paper cuts tracklets: the default of models built with it.
        last_stride: the stride of a ResNet's last stage in its paper: the default of models built with it.
        paper: for its card.
        note: what its card adds to the paper.

    Raises:
        ValueError: a name that is taken, or no name.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from temporal_agg import Aggregator, Details, create_aggregator, register_aggregator
        >>> from temporal_agg.aggregators.base import frame_vectors, weighted_sum
        >>> @register_aggregator("longest")
        ... class Longest(Aggregator):
        ...     # The frame vector of the greatest length.
        ...
        ...     def __init__(self, in_features: int):
        ...         super().__init__(in_features, num_features=in_features)
        ...
        ...     def aggregate(self, features, mask, frames):
        ...         x = frame_vectors(features)
        ...         weights = F.one_hot((x.norm(dim=2) + mask).argmax(1), x.shape[1])  # a real one: padding is 0
        ...         return Details(weighted_sum(x, weights), mask, weights.float(), {}, {})
        >>> create_aggregator("longest", in_features=2)(torch.tensor([[[1.0, 0.0], [3.0, 4.0]]]))
        tensor([[3., 4.]])
    """
    _check_new(name, "an aggregator", _REGISTRY)

    def register(build: Build) -> Build:
        _REGISTRY[name] = Entry(name, build, criterion, clip, last_stride, paper, note)
        if criterion is not None:
            register_criterion(name)(criterion)
        return build

    return register


def register_criterion(name: str) -> Callable[[BuildCriterion], BuildCriterion]:
    """Registers a criterion under a name of its own; an aggregator's goes with :func:`register_aggregator`.

    Args:
        name: what ``create_criterion`` calls it. It is built as ``cls(num_classes, model, **options)``.

    Raises:
        ValueError: a name that is taken, or no name.
    """
    _check_new(name, "a criterion", _CRITERIA)

    def register(build: BuildCriterion) -> BuildCriterion:
        _CRITERIA[name] = build
        return build

    return register


def list_aggregators(pattern: str = "*") -> list[str]:
    """The registered names that match a shell-style ``pattern``, sorted.

    Example:
        >>> from temporal_agg import list_aggregators
        >>> list_aggregators("grl*")
        ['grl', 'grl_released']
    """
    return sorted(fnmatch.filter(_REGISTRY, pattern))


def list_criteria(pattern: str = "*") -> list[str]:
    """The names that :func:`create_criterion` takes and that match a shell-style ``pattern``, sorted."""
    return sorted(fnmatch.filter(_CRITERIA, pattern))


def create_aggregator(name: str, in_features: int, **kwargs) -> Aggregator:
    """Builds an aggregator by name.

    Args:
        name: one of :func:`list_aggregators`.
        in_features: C, the channels of the frame features it will get.
        **kwargs: options of that aggregator (see its class).

    Raises:
        ValueError: an unknown name (the message has the nearest ones), or a number out of an option's range.
        TypeError: an unknown option (the message lists the options it has), or a value of another type than the class
            declares.

    Example:
        >>> import torch
        >>> from temporal_agg import create_aggregator
        >>> aggregator = create_aggregator("gltr", in_features=512).eval()
        >>> aggregator(torch.randn(2, 8, 512, 8, 4)).shape  # the maps of 2 clips of 8 frames
        torch.Size([2, 384])
    """
    entry = registry_entry(name)
    _options.check(f"aggregator {name!r}", entry.build, {"in_features": in_features, **kwargs}, ("in_features",))
    _options.check_sizes(f"aggregator {name!r}: ", kwargs)
    aggregator = entry.build(in_features, **kwargs)
    aggregator.config = {"name": name, "in_features": in_features, **kwargs}
    return aggregator


def create_criterion(name: str, num_classes: int, model: nn.Module, **kwargs) -> Criterion:
    """Builds a training criterion by name.

    Args:
        name: one of :func:`list_criteria`: that of an aggregator with a criterion of its own, or ``baseline``, which
            works for every aggregator.
        num_classes: identities in the training set.
        model: the :class:`TrackletModel` (or bare :class:`Aggregator`) whose details it will get; read for its widths.
        **kwargs: options of that criterion (see its class).

    Raises:
        ValueError: an unknown name (the message has the nearest ones), fewer than one class, or a number out of an
            option's range.
        TypeError: an unknown option, a value of another type than the class declares, or a model that does not give
            what the criterion reads.

    Example:
        >>> import torch
        >>> from temporal_agg import create_aggregator, create_criterion
        >>> aggregator = create_aggregator("loga", in_features=64, clip_length=8)
        >>> criterion = create_criterion("loga", num_classes=10, model=aggregator)
        >>> details = aggregator(torch.randn(4, 8, 64), frames=torch.randn(4, 8, 3, 64, 32), return_details=True)
        >>> losses = criterion(details, torch.tensor([0, 0, 7, 7]))
        >>> sorted(losses)
        ['cross_entropy', 'loss', 'triplet']
        >>> losses["loss"].backward()
    """
    build = _known(name, "criterion", _CRITERIA)
    _options.check(f"criterion {name!r}", build, {"num_classes": num_classes, **kwargs}, ("num_classes", "model"))
    return build(num_classes, model, **kwargs)


def aggregator_options(name: str) -> list[str]:
    """The names of the keyword arguments that ``create_aggregator(name, ...)`` takes."""
    parameters = list(inspect.signature(registry_entry(name).build).parameters)
    return [p for p in parameters if p != "in_features"]


def registry_entry(name: str) -> Entry:
    """What is registered under ``name``.

    Raises:
        ValueError: an unknown name (the message has the nearest ones).
    """
    return _known(name, "aggregator", _REGISTRY)


Registered = TypeVar("Registered")


def _known(name: str, what: str, registered: Mapping[str, Registered]) -> Registered:
    if name not in registered:
        near = difflib.get_close_matches(str(name), registered, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"no {what} is named {name!r}; {hint}All: {', '.join(sorted(registered))}.")
    return registered[name]


def _check_new(name: str, what: str, registered: Mapping[str, object]) -> None:
    if name in registered:
        raise ValueError(f"{what} named {name!r} is registered already: choose another name.")
    if not name.isidentifier():
        raise ValueError(
            f"the name of {what} has letters, digits and _ only, and does not start with a digit, got {name!r}."
        )
