"""One training criterion per paper: what an aggregator hands out, plus identities -> loss terms by name.

Classifiers, lookup tables and centres live here and not in the models, so that weights are free of any data set.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..aggregators.base import Aggregator, Details, at_least_float32
from ..aggregators.fgra import FGRA
from ..aggregators.grl import GRL
from .consistency import ConsistencyLoss
from .oim import OIMLoss
from .pyramid import PyramidRankingLoss
from .triplet import TripletLoss
from .verification import VerificationLoss

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

    def parameter_groups(self) -> list[dict]:
        """The parameters for an optimizer; a group has options of its own where the paper trains it by other ones."""
        return [{"params": list(self.parameters())}]


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


@register_criterion("loga")
class LOGACriterion(BaselineCriterion):
    """LOGA (BMVC 2021, Eqs. 10-12): cross-entropy + triplet, one random positive and negative for each anchor.

    Args:
        num_classes: identities in the training set.
        model: read for the embedding's width.
        margin: of the triplet loss.
        mining: ``random`` as printed, or ``hard``, as in the work that the paper cites for the loss.
        generator: draws the triplets; None = torch's global generator.
    """

    def __init__(
        self,
        num_classes: int,
        model: nn.Module,
        margin: float | None = 0.3,
        mining: str = "random",
        generator: torch.Generator | None = None,
    ):
        super().__init__(num_classes, model)
        self.triplet = TripletLoss(margin, mining, generator)  # Eq. 11


@register_criterion("gltr")
class GLTRCriterion(Criterion):
    """GLTR (ICCV 2019): cross-entropy alone, of a linear classifier on the embedding.

    Args:
        num_classes: identities in the training set.
        model: read for the embedding's width.
    """

    def __init__(self, num_classes: int, model: nn.Module):
        super().__init__()
        self.classifier = initial_classifier(aggregator_of(model).num_features, num_classes)

    def terms(self, details: Details, labels: Tensor) -> dict[str, Tensor]:
        return {"cross_entropy": F.cross_entropy(self.classifier(details.embedding), labels)}


@register_criterion("gltr_released")
class ReleasedGLTRCriterion(GLTRCriterion):
    """GLTR's criterion as its authors released it: BatchNorm, ReLU and dropout in front of the classifier.

    Args:
        num_classes: identities in the training set.
        model: read for the embedding's width.
        dropout: the share of entries that are dropped.
    """

    def __init__(self, num_classes: int, model: nn.Module, dropout: float = 0.5):
        super().__init__(num_classes, model)
        width = aggregator_of(model).num_features
        self.classifier = nn.Sequential(nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout), self.classifier)


@register_criterion("gsta")
@register_criterion("star")
class StarCriterion(Criterion):
    """STAR (BMVC 2019, Eqs. 11-13): cross-entropy, batch-hard triplet and 0.1 x the pyramid ranking regulariser.

    The classifier has no bias, as printed. The aggregator must hand out its input maps, as GSTA does.

    Args:
        num_classes: identities in the training set.
        model: read for the embedding's width.
        margin: of the triplet loss and of the regulariser (alpha_2 = alpha_1).
        pyramid_weight: the factor of the regulariser (lambda); 0 leaves it out, and any aggregator will do.
    """

    def __init__(self, num_classes: int, model: nn.Module, margin: float = 0.4, pyramid_weight: float = 0.1):
        super().__init__()
        self.weights = {"pyramid": pyramid_weight}
        self.classifier = initial_classifier(aggregator_of(model).num_features, num_classes, bias=False)
        self.triplet = TripletLoss(margin)
        self.pyramid = PyramidRankingLoss(margin) if pyramid_weight else None

    def terms(self, details: Details, labels: Tensor) -> dict[str, Tensor]:
        terms = {
            "cross_entropy": F.cross_entropy(self.classifier(details.embedding), labels),  # Eq. 11
            "triplet": self.triplet(details.embedding, labels),  # Eq. 12
        }
        if self.pyramid is not None:
            terms["pyramid"] = self.pyramid(details.supervised["features"], labels, details.mask)
        return terms


@register_criterion("fgra")
class FGRACriterion(Criterion):
    """FGRA (AAAI 2020, Eqs. 10-13): cross-entropy and batch-hard triplet, the templates' own, 5e-4 x consistency.

    The paper optimises the reduced templates "independently by the objective function". Read as (ours): one linear
    layer reduces the templates of all regions; each region has a classifier, and cross-entropy and triplet are averaged
    over the regions. The triplet is the mean over anchors (Eq. 10 prints the sum). A model without aligned regions is
    trained by the first two terms alone.

    Args:
        num_classes: identities in the training set.
        model: with an :class:`FGRA` aggregator; read for its widths and regions.
        margin: of both triplet losses.
        consistency_weight: the factor of the consistency term (lambda); 0 leaves it out.
        centres: of the consistency term: ``learned``, one for each identity and region, at a learning rate of 0.03
            without weight decay (the paper gives the rate; no decay is ours); or ``clip``, the clip's own mean (Eq. 3
            to the letter).

    Raises:
        TypeError: a model with another aggregator.
        ValueError: unknown ``centres``.
    """

    def __init__(
        self,
        num_classes: int,
        model: nn.Module,
        margin: float = 0.5,
        consistency_weight: float = 5e-4,
        centres: str = "learned",
    ):
        super().__init__()
        aggregator = aggregator_of(model)
        if not isinstance(aggregator, FGRA):
            raise TypeError(f"criterion 'fgra' reads what the aggregator FGRA gives, got {type(aggregator).__name__}.")
        if centres not in ("learned", "clip"):
            raise ValueError(f"centres must be 'learned' or 'clip', got {centres!r}.")
        self.weights = {"consistency": consistency_weight}
        self.classifier = initial_classifier(aggregator.num_features, num_classes)
        self.triplet = TripletLoss(margin)
        self.template_reduction = self.template_classifiers = self.consistency = None
        if aggregator.gam is not None:
            width, regions = aggregator.local_reduction.out_features, aggregator.num_regions
            self.template_reduction = nn.Linear(aggregator.in_features, width)
            self.template_classifiers = nn.ModuleList(initial_classifier(width, num_classes) for _ in range(regions))
            if consistency_weight:
                self.consistency = ConsistencyLoss(
                    num_classes if centres == "learned" else None, regions, aggregator.in_features
                )

    def terms(self, details: Details, labels: Tensor) -> dict[str, Tensor]:
        terms = {
            "cross_entropy": F.cross_entropy(self.classifier(details.embedding), labels),  # Eq. 11
            "triplet": self.triplet(details.embedding, labels),  # Eq. 10
        }
        if self.template_reduction is not None:
            templates = self.template_reduction(details.supervised["templates"]).unbind(1)
            logits = [classify(x) for classify, x in zip(self.template_classifiers, templates, strict=True)]
            terms["template_cross_entropy"] = sum(F.cross_entropy(x, labels) for x in logits) / len(logits)
            terms["template_triplet"] = sum(self.triplet(x, labels) for x in templates) / len(templates)
        if self.consistency is not None:
            terms["consistency"] = self.consistency(details.supervised["regions"], labels, details.mask)  # Eq. 12
        return terms

    def parameter_groups(self) -> list[dict]:
        centres = [] if self.consistency is None else list(self.consistency.parameters())
        others = [p for p in self.parameters() if all(p is not c for c in centres)]
        groups = [{"params": others}]
        if centres:
            groups.append({"params": centres, "lr": 0.03, "weight_decay": 0.0})
        return groups


@register_criterion("grl")
class GRLCriterion(Criterion):
    """GRL (CVPR 2021, Eqs. 12-14): OIM on frames, OIM on the memory feature, 20 x verification on the pooled feature.

    The paper gives no weights; these are the released code's.

    Args:
        num_classes: identities in the training set.
        model: with a :class:`GRL` aggregator; read for its width.
        losses: the terms to use: ``frame``, ``video`` and ``verification`` (the paper's Table 6 leaves out the first or
            the second), ``global``: OIM on the mean of the clip's maps (alone: the baseline of Table 2).

    Raises:
        TypeError: a model with another aggregator.
        ValueError: unknown losses.
    """

    weights = MappingProxyType({"verification": 20.0})

    def __init__(self, num_classes: int, model: nn.Module, losses: Sequence[str] = ("frame", "video", "verification")):
        super().__init__()
        C = grl_features(model)
        if not losses or not set(losses) <= {"frame", "video", "global", "verification"}:
            raise ValueError(f"losses must name some of frame, video, global and verification, got {losses!r}.")
        self.losses = nn.ModuleDict(
            {name: VerificationLoss(C) if name == "verification" else OIMLoss(num_classes, C) for name in losses}
        )

    def terms(self, details: Details, labels: Tensor) -> dict[str, Tensor]:
        x = details.supervised
        inputs = {
            "frame": frames_of(details, labels),  # Eq. 12
            "video": (x["memory"], labels),  # Eq. 13
            "global": (x["global"], labels),
            "verification": (x["pooled"], labels),  # Eq. 11
        }
        return {name: loss(*inputs[name]) for name, loss in self.losses.items()}

    def after_step(self) -> None:
        update_tables(self)


@register_criterion("grl_released")
class ReleasedGRLCriterion(Criterion):
    """GRL's criterion as its authors released it: OIM thrice, 20 x verification, soft-margin batch-hard triplet.

    Frames and the pooled feature share one OIM table, which takes up the pooled features of a step before its frames;
    the memory feature has its own. All losses read the tables as they stood before the step (ours; the authors' frames
    already see what the pooled features changed). Verification and triplet are on the pooled feature.

    Args:
        num_classes: identities in the training set.
        model: with a :class:`GRL` aggregator; read for its width.

    Raises:
        TypeError: a model with another aggregator.
    """

    weights = MappingProxyType({"verification": 20.0})

    def __init__(self, num_classes: int, model: nn.Module):
        super().__init__()
        C = grl_features(model)
        self.high = OIMLoss(num_classes, C)
        self.low = OIMLoss(num_classes, C)
        self.verification = VerificationLoss(C)
        self.triplet = TripletLoss(margin=None)

    def terms(self, details: Details, labels: Tensor) -> dict[str, Tensor]:
        pooled = details.supervised["pooled"]
        return {
            "pooled": self.high(pooled, labels, turn=0),
            "frame": self.high(*frames_of(details, labels), turn=1),
            "video": self.low(details.supervised["memory"], labels),
            "verification": self.verification(pooled, labels),
            "triplet": self.triplet(pooled, labels),
        }

    def after_step(self) -> None:
        update_tables(self)


def grl_features(model: nn.Module) -> int:
    """C of a model with a :class:`GRL` aggregator; a TypeError for others."""
    aggregator = aggregator_of(model)
    if not isinstance(aggregator, GRL):
        raise TypeError(f"the criteria 'grl' read what the aggregator GRL gives, got {type(aggregator).__name__}.")
    return aggregator.in_features


def frames_of(details: Details, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The frame features of all clips, ``[B*T, C]``, with their labels and mask ``[B*T]``."""
    mask = details.mask
    return details.supervised["frames"].flatten(0, 1), labels[:, None].expand(mask.shape).flatten(), mask.flatten()


def update_tables(criterion: Criterion) -> None:
    """Lets every OIM table of a criterion take up the samples since the last step."""
    for module in criterion.modules():
        if isinstance(module, OIMLoss):
            module.after_step()
