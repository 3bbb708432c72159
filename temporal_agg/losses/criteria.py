"""One training criterion per paper: what an aggregator hands out, plus identities -> loss terms by name.

Classifiers, lookup tables and centres live here and not in the models, so that weights are free of any data set.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..aggregators.base import Aggregator, Details, at_least_float32
from .triplet import TripletLoss

__all__ = ["Criterion", "create_criterion", "list_criteria"]


class Criterion(nn.Module):
    """Base class: a subclass implements :meth:`terms` and says how the terms are weighted.

    Terms are computed in at least float32, whatever the autocast type.

    Attributes:
        weights: the factor of each term in the total, by name; a term that is not named counts once.
    """

    weights: Mapping[str, float] = MappingProxyType({})

    def forward(self, details: Details, labels: Tensor) -> dict[str, Tensor]:
        """Computes every term.

        Args:
            details: what the model returned with ``return_details=True`` for B clips.
            labels: int64 ``[B]``, class indices from 0 to ``num_classes - 1``.

        Returns:
            Each term by name, unweighted, and ``"loss"``, their weighted sum.
        """
        supervised = {name: at_least_float32(tensor) for name, tensor in details.supervised.items()}
        details = details._replace(embedding=at_least_float32(details.embedding), supervised=supervised)
        with torch.autocast(details.embedding.device.type, enabled=False):
            terms = self.terms(details, labels)
        return {**terms, "loss": sum(self.weights.get(name, 1.0) * term for name, term in terms.items())}

    def terms(self, details: Details, labels: Tensor) -> dict[str, Tensor]:
        """The terms by name, unweighted. To be implemented by the subclass."""
        raise NotImplementedError

    def after_step(self) -> None:
        """To be called after each optimizer step: what is updated outside autograd (lookup tables) is updated now."""


_CRITERIA: dict[str, Callable[..., Criterion]] = {}


def register_criterion(name: str) -> Callable[[type[Criterion]], type[Criterion]]:
    """Registers a criterion class, built as ``cls(num_classes, model, **options)``, under ``name``."""

    def register(cls: type[Criterion]) -> type[Criterion]:
        _CRITERIA[name] = cls
        return cls

    return register


def list_criteria() -> list[str]:
    """The names that :func:`create_criterion` takes, sorted."""
    return sorted(_CRITERIA)


def create_criterion(name: str, num_classes: int, model: nn.Module, **kwargs) -> Criterion:
    """Builds the training criterion of a paper.

    Args:
        name: one of :func:`list_criteria`.
        num_classes: identities in the training set.
        model: the :class:`TrackletModel` (or bare :class:`Aggregator`) whose details it will get; read for its widths.
        **kwargs: options of that criterion (see its class).

    Raises:
        ValueError: an unknown name (the message has the nearest ones), or fewer than one class.
        TypeError: an unknown option.
    """
    if name not in _CRITERIA:
        near = difflib.get_close_matches(name, _CRITERIA, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"no criterion is named {name!r}; {hint}All: {', '.join(list_criteria())}.")
    if num_classes < 1:
        raise ValueError(f"num_classes must be the number of training identities (>= 1), got {num_classes}.")
    options = [p for p in inspect.signature(_CRITERIA[name]).parameters if p not in ("num_classes", "model")]
    unknown = sorted(set(kwargs) - set(options))
    if unknown:
        raise TypeError(
            f"criterion {name!r} has no option {', '.join(unknown)}; it has: {', '.join(options) or 'none'}."
        )
    return _CRITERIA[name](num_classes, model, **kwargs)


def aggregator_of(model: nn.Module) -> Aggregator:
    """The aggregator of a model, or the aggregator itself."""
    return getattr(model, "aggregator", model)


def initial_classifier(in_features: int, num_classes: int, bias: bool = True) -> nn.Linear:
    """A linear classifier with small normal weights (standard deviation 1e-3), so that training starts at uniform."""
    classifier = nn.Linear(in_features, num_classes, bias=bias)
    nn.init.normal_(classifier.weight, std=1e-3)
    if bias:
        nn.init.zeros_(classifier.bias)
    return classifier


@register_criterion("baseline")
class BaselineCriterion(Criterion):
    """Cross-entropy over identities + batch-hard triplet, both on the embedding.

    Args:
        num_classes: identities in the training set.
        model: read for the embedding's width.
        margin: of the triplet loss; None = soft margin.
        label_smoothing: of the cross-entropy, 0 to 1.
        mining: ``hard`` or ``random`` (see :class:`TripletLoss`).
    """

    def __init__(
        self,
        num_classes: int,
        model: nn.Module,
        margin: float | None = 0.3,
        label_smoothing: float = 0.0,
        mining: str = "hard",
    ):
        super().__init__()
        self.classifier = initial_classifier(aggregator_of(model).num_features, num_classes)
        self.cross_entropy = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.triplet = TripletLoss(margin, mining)

    def terms(self, details: Details, labels: Tensor) -> dict[str, Tensor]:
        return {
            "cross_entropy": self.cross_entropy(self.classifier(details.embedding), labels),
            "triplet": self.triplet(details.embedding, labels),
        }
