"""FGRA: Chen et al., "Frame-Guided Region-Aligned Representation for Video Person Re-Identification", AAAI 2020.

The first frame's stripes are templates; every frame is searched for them channel by channel (GAM), the aligned regions
are summed over time by their similarity to the template, then over regions; a global branch stands beside them.

The similarity maps ``[B, T, N_s, C, H, W]`` are never built. A template is one number per channel, so a similarity map
is a scaled feature map: its BatchNorm moments follow from each frame's mean and variance, and what is used of it are
two means over ``sigmoid(slope * map + offset)``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import masked
from ..losses import ConsistencyLoss, TripletLoss
from .base import Aggregator, Criterion, Details, MapKind, Softmaxed, aggregator_of, check_range, initial_classifier
from .registry import ClipConfig, Paper, register_aggregator

__all__ = ["FGRA", "GAM", "FGRACriterion", "SpatialAttention", "TemporalAlignment", "TemporalAttention"]

PAPER = Paper(
    name="FGRA",
    title="Frame-Guided Region-Aligned Representation for Video Person Re-Identification",
    authors=("Zengqun Chen", "Zhiheng Zhou", "Junchu Huang", "Pengyu Zhang", "Bo Li"),
    venue="AAAI Conference on Artificial Intelligence",
    year=2020,
    results={
        "mars": (87.3, 81.2),
        "ilids-vid": (88.0, 91.9),
        "prid-2011": (95.5, 97.3),
    },
)


class _SimilarityNorm(masked.BatchNorm):
    """The BatchNorm of the similarity maps template * map, as what it makes of a map: slope * map + offset."""

    def forward(  # type: ignore[override]
        self, maps: Tensor, templates: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``maps``, ``templates`` and ``mask`` of :meth:`GAM.forward` -> slope ``[B, N_s, C]`` and offset ``[C]``, in
        at least float32."""
        templates = masked.at_least_float32(templates)
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = self._moments(maps, templates, mask)
        scale = self.weight * torch.rsqrt(var.to(templates.dtype) + self.eps)
        return templates * scale, self.bias - mean * scale

    def _moments(self, maps: Tensor, templates: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of all similarity maps, ``[C]`` each; moves the running statistics."""
        B, T, _, H, W = maps.shape
        N = templates.shape[1]
        if B * T * N * H * W == 1:
            raise ValueError(
                f"BatchNorm needs more than one value per channel in training, got maps {list(maps.shape)} and one "
                "region: use batches of at least two clips, or call .eval()."
            )
        if mask is None:
            mask = masked.all_real(maps)
        real, frames = mask[:, :, None, None], mask.sum()
        frame_mean, frame_var = (moment.unsqueeze(2) for moment in _FrameMoments.apply(maps))
        region_mean = templates.unsqueeze(1) * frame_mean  # [B, T, N_s, C]
        region_var = templates.unsqueeze(1).square() * frame_var
        maps_in_all = frames.clamp(min=1) * N
        mean = torch.where(real, region_mean, 0).sum((0, 1, 2)) / maps_in_all
        var = torch.where(real, region_var + (region_mean - mean).square(), 0).sum((0, 1, 2)) / maps_in_all
        self.update(mean, var, frames * (N * H * W))
        return mean, var


class GAM(nn.Module):
    """Guide alignment module: region-aligned features and similarity scores (Eqs. 1, 2, 5).

    Peak memory is a few feature maps for any number of regions, forward and backward: the gates of one region are
    computed, used and forgotten, and computed again in the backward pass (compiled by Inductor, the backward pass may
    keep up to one map a region). One affine BatchNorm serves all regions; in training its moments, and the running
    statistics, are those over all real frames, regions and pixels (the paper does not say how regions share it; ours).

    Args:
        in_features: C, the channels of maps and templates.
    """

    def __init__(self, in_features: int):
        super().__init__()
        self.norm = _SimilarityNorm(in_features)

    def forward(self, maps: Tensor, templates: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Aligns every frame with every template of its clip.

        Args:
            maps: ``[B, T, C, H, W]``; padding must be finite.
            templates: ``[B, N_s, C]``.
            mask: bool ``[B, T]``, True = a real frame; None = all are real.

        Returns:
            The aligned features F ``[B, T, N_s, C]`` in the type of ``maps``, and the scores s ``[B, T, N_s, C]``,
            between 0 and 1, at least float32. Entries of padded frames mean nothing.

        Raises:
            ValueError: shapes that do not fit each other, or training on one value per channel.
        """
        if maps.dim() != 5 or templates.dim() != 3 or templates.shape[::2] != maps.shape[:3:2]:
            raise ValueError(
                "expected maps [B, T, C, H, W] and templates [B, N_s, C], got "
                f"{list(maps.shape)} and {list(templates.shape)}."
            )
        # Eq. 1 and the BatchNorm: slope * map + offset.
        regions, scores = _GatedMeans.apply(maps, *self.norm(maps, templates, mask))
        return regions.to(maps.dtype), scores


class _FrameMoments(torch.autograd.Function):
    """Mean and biased variance over H, W: ``[B, T, C, H, W]`` -> two of ``[B, T, C]``, keeping only the maps."""

    @staticmethod
    def forward(maps: Tensor) -> tuple[Tensor, Tensor]:
        mean = maps.mean((3, 4), dtype=torch.promote_types(maps.dtype, torch.float32))
        return mean, (maps - mean[..., None, None]).square_().mean((3, 4))

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        maps, mean = ctx.saved_tensors
        pixels = maps.shape[3] * maps.shape[4]
        slope = grad_var * (2 / pixels)
        offset = grad_mean / pixels - slope * mean
        return torch.addcmul(offset[..., None, None], slope[..., None, None], maps).to(maps.dtype)


class _GatedMeans(torch.autograd.Function):
    """Eqs. 2 and 5: with the gates M = sigmoid(slope * map + offset), the means of map * M and of M over H, W.

    ``maps`` ``[B, T, C, H, W]``, ``slope`` ``[B, N_s, C]``, ``offset`` ``[C]`` -> two of ``[B, T, N_s, C]``. Buffers of
    the size of the maps are made once and used by all regions: to allocate one costs more than to fill it.
    """

    @staticmethod
    def forward(maps: Tensor, slope: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        gates = torch.empty_like(maps, dtype=slope.dtype)
        regions, scores = [], []
        for a in slope.unbind(1):
            _fill_gates(gates, maps, a[:, None, :, None, None], offset)
            scores.append(gates.mean((3, 4)))
            regions.append(gates.mul_(maps).mean((3, 4)))
        return torch.stack(regions, 2), torch.stack(scores, 2)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_regions: Tensor, grad_scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps, slope, offset = ctx.saved_tensors
        pixels = maps.shape[3] * maps.shape[4]
        gates = torch.empty_like(maps, dtype=slope.dtype)
        inner = torch.empty_like(gates)
        grad_maps = torch.zeros_like(gates)
        grad_slope, grad_offset = [], torch.zeros_like(offset)
        for i, a in enumerate(slope.unbind(1)):
            a = a[:, None, :, None, None]
            by_region = grad_regions[:, :, i, :, None, None] / pixels
            by_score = grad_scores[:, :, i, :, None, None] / pixels
            _fill_gates(gates, maps, a, offset)
            inner.copy_(by_score.expand_as(inner)).addcmul_(by_region, maps)  # gradient with respect to the gates M,
            inner.mul_(gates).addcmul_(inner, gates, value=-1)  # to what is inside the sigmoid: times M (1 - M)
            grad_maps.addcmul_(by_region, gates).addcmul_(inner, a)
            grad_offset += inner.sum((0, 1, 3, 4))
            grad_slope.append(inner.mul_(maps).sum((1, 3, 4)))
        return grad_maps.to(maps.dtype), torch.stack(grad_slope, 1), grad_offset


def _fill_gates(gates: Tensor, maps: Tensor, slope: Tensor, offset: Tensor) -> None:
    # expand_as: where copy_ has to broadcast, torch 2.9's exporter ties the batch to a size.
    gates.copy_(offset[:, None, None].expand_as(gates)).addcmul_(maps, slope).sigmoid_()


class TemporalAlignment(nn.Module):
    """Temporal alignment score: for each channel a softmax of the scores over time, weighted sum (Eqs. 4, 6)."""

    def forward(self, regions: Tensor, scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Sums the frames.

        Args:
            regions: ``[B, T, N_s, C]``; padding must be finite.
            scores: ``[B, T, N_s, C]``, from :class:`GAM`.
            mask: bool ``[B, T]``.

        Returns:
            ``[B, N_s, C]`` and the weights ``[B, T, N_s, C]``, 0 for padding.
        """
        weights = masked.softmax(scores, mask[:, :, None, None], dim=1)  # Eq. 4
        return (regions * weights.to(regions.dtype)).sum(1), weights  # Eq. 6


class TemporalAttention(nn.Module):
    """One linear score for each vector, softmax over time, weighted sum.

    The paper takes it from Li et al. (CVPR 2018); without a bias, which would cancel in the softmax.

    Args:
        in_features: C.
    """

    def __init__(self, in_features: int):
        super().__init__()
        self.score = nn.Linear(in_features, 1, bias=False)

    def forward(self, vectors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Sums the frames.

        Args:
            vectors: ``[B, T, C]``, or ``[B, T, N_s, C]``: each region gets its own weights. Padding must be finite.
            mask: bool ``[B, T]``.

        Returns:
            ``[B, C]`` or ``[B, N_s, C]``, and the weights ``[B, T]`` or ``[B, T, N_s]``, 0 for padding.
        """
        scores = self.score(vectors).squeeze(-1)
        weights = masked.softmax(scores, mask.view(mask.shape + (1,) * (scores.dim() - 2)), dim=1)
        return torch.einsum("bt...,bt...c->b...c", weights.to(vectors.dtype), vectors), weights


class SpatialAttention(nn.Module):
    """Weights the regions of a clip and sums them (Eqs. 7, 8).

    The convolution has no bias: BatchNorm would cancel it.

    Args:
        in_features: C.
    """

    def __init__(self, in_features: int):
        super().__init__()
        self.conv = nn.Conv1d(in_features, 1, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(1)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Sums the regions: ``[B, N_s, C]`` -> ``[B, C]`` and the weights ``[B, N_s]``."""
        scores = F.relu(self.norm(self.conv(regions.transpose(1, 2)))).squeeze(1)
        weights = masked.at_least_float32(scores).softmax(1)  # Eq. 7
        return torch.einsum("bn,bnc->bc", weights.to(regions.dtype), regions), weights  # Eq. 8


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
        super().__init__(num_classes, model)
        aggregator = aggregator_of(model)
        if not isinstance(aggregator, FGRA):
            raise TypeError(f"criterion 'fgra' reads what the aggregator FGRA gives, got {type(aggregator).__name__}.")
        if centres not in ("learned", "clip"):
            raise ValueError(f"centres must be 'learned' or 'clip', got {centres!r}.")
        check_range(0, consistency_weight=consistency_weight)
        self.weights = {"consistency": consistency_weight}
        self.classifier = initial_classifier(aggregator.num_features, num_classes)
        self.triplet = TripletLoss(margin)
        self.template_reduction: nn.Linear | None = None
        self.template_classifiers: nn.ModuleList | None = None
        self.consistency: ConsistencyLoss | None = None
        if aggregator.gam is not None and aggregator.local_reduction is not None:
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
        if self.template_reduction is not None and self.template_classifiers is not None:
            templates = self.template_reduction(details.supervised["templates"]).unbind(1)
            logits = [classify(x) for classify, x in zip(self.template_classifiers, templates, strict=True)]
            terms["template_cross_entropy"] = sum(F.cross_entropy(x, labels) for x in logits) / len(logits)
            terms["template_triplet"] = sum(self.triplet(x, labels) for x in templates) / len(templates)
        if self.consistency is not None:
            terms["consistency"] = self.consistency(details.supervised["regions"], labels, details.mask)  # Eq. 12
        return terms

    def parameter_groups(self) -> list[dict[str, Any]]:
        centres = [] if self.consistency is None else list(self.consistency.parameters())
        others = [p for p in self.parameters() if all(p is not c for c in centres)]
        groups: list[dict[str, Any]] = [{"params": others}]
        if centres:
            groups.append({"params": centres, "lr": 0.03, "weight_decay": 0.0})
        return groups


class _Seen(NamedTuple):
    """What FGRA keeps of a stream; where there is no local branch, of no regions."""

    templates: Tensor  # [B, N_s, C], of the first frame
    highest: Tensor  # [B], these three of base.Softmaxed, the global branch's
    weight: Tensor  # [B]
    total: Tensor  # [B, C]
    region_highest: Tensor  # [B, N_s], or [B, N_s, C] for the alignment scores
    region_weight: Tensor
    region_total: Tensor  # [B, N_s, C]
    seen: Tensor  # [B], the real frames


@register_aggregator(
    "fgra",
    criterion=FGRACriterion,
    paper=PAPER,
    clip=ClipConfig(length=6, stride=3, train_sampling="random", fill="mask", tail="shift", distance="cosine"),
)
class FGRA(Aggregator):
    """Frame-guided region-aligned representation (Eq. 9): the global and the local vector of a clip.

    The template frame is the first real one; its stripes follow adaptive pooling's rule where the height does not
    divide. Without spatial attention the regions are reduced by one shared layer and concatenated (the paper says so
    for its baseline; the shared layer is ours). The rows of the paper's Table 2:

    1. ``global_branch=False, local_branch="stripes", temporal="average", spatial="concatenation"``
    2. ``local_branch=None``
    3. ``local_branch="stripes", temporal="average", spatial="concatenation"``
    4. ``temporal="average", spatial="concatenation"``
    5. ``temporal="attention", spatial="concatenation"``
    6. ``spatial="concatenation"``
    7. ``spatial="concatenation"``
    8. the default.

    Rows 4 to 6 are without the consistency term: ``consistency_weight=0`` in the criterion.

    ``frame_weights`` are the global branch's temporal attention; without that branch, the mean of the regions' weights.
    ``maps``: ``region_scores`` ``[B, T, N_s]``, how much each frame counted in each region (mean over the channels; it
    sums to 1 over time); ``region_weights`` ``[B, N_s]``, the spatial attention. ``supervised``, with aligned regions:
    ``templates`` ``[B, N_s, C]`` and ``regions`` ``[B, T, N_s, C]``.

    Args:
        in_features: C.
        num_regions: N_s, the templates of a clip.
        reduced_features: the width of the global vector, and of the local one (N_s times that if concatenated).
        global_branch: whether there is one.
        local_branch: ``aligned`` regions, plain ``stripes`` of every frame, or None.
        temporal: how the local branch sums the frames: by temporal ``alignment`` scores, by temporal ``attention``
            (one scorer for all regions: ours), or their ``average``. Unused without a local branch.
        spatial: how it joins the regions: ``attention`` or ``concatenation``. Unused without a local branch.

    Raises:
        ValueError: an unknown value, neither branch, or alignment scores without alignment.
    """

    needs_maps = True

    def __init__(
        self,
        in_features: int,
        num_regions: int = 4,
        reduced_features: int = 1024,
        global_branch: bool = True,
        local_branch: str | None = "aligned",
        temporal: str = "alignment",
        spatial: str = "attention",
    ):
        check_range(1, 1000, num_regions=num_regions)
        check_range(1, reduced_features=reduced_features)
        for option, value, known in (
            ("local_branch", local_branch, ("aligned", "stripes", None)),
            ("temporal", temporal, ("alignment", "attention", "average")),
            ("spatial", spatial, ("attention", "concatenation")),
        ):
            if value not in known:
                raise ValueError(f"{option} must be one of {known}, got {value!r}.")
        if not global_branch and local_branch is None:
            raise ValueError("FGRA needs a branch: global_branch=True, or local_branch='aligned' or 'stripes'.")
        if local_branch == "stripes" and temporal == "alignment":
            raise ValueError("plain stripes have no alignment score: use temporal='average' or 'attention'.")
        local_vectors = 0 if local_branch is None else 1 if spatial == "attention" else num_regions
        super().__init__(in_features, reduced_features * (global_branch + local_vectors))
        self.num_regions = num_regions
        self.local_branch = local_branch
        self.maps = {}
        if local_branch == "aligned":
            gates = "gates of GAM (Eqs. 1, 2), mean over the channels"
            self.maps["gates"] = MapKind(("regions", "frames", "height", "width"), "unit", gates)
        if local_branch is not None:
            self.maps["region_scores"] = MapKind(("frames", "regions"), "share", "weight in a region", over="frames")
            if spatial == "attention":
                self.maps["region_weights"] = MapKind(
                    ("regions",), "share", "spatial attention (Eq. 7)", over="regions"
                )
        self.global_attention: TemporalAttention | None = None
        self.global_reduction: nn.Linear | None = None
        if global_branch:
            self.global_attention = TemporalAttention(in_features)
            self.global_reduction = nn.Linear(in_features, reduced_features)
        self.gam: GAM | None = None
        self.temporal: TemporalAlignment | TemporalAttention | None = None
        self.spatial: SpatialAttention | None = None
        self.local_reduction: nn.Linear | None = None
        if local_branch is not None:
            if local_branch == "aligned":
                self.gam = GAM(in_features)
            if temporal == "alignment":
                self.temporal = TemporalAlignment()
            elif temporal == "attention":
                self.temporal = TemporalAttention(in_features)
            if spatial == "attention":
                self.spatial = SpatialAttention(in_features)
            self.local_reduction = nn.Linear(in_features, reduced_features)

    def aggregate(self, features: Tensor, mask: Tensor, frames: Tensor | None) -> Details:
        vectors, maps, supervised = [], {}, {}
        frame_weights = masked.uniform(mask, features)
        rows = features.sum(4) / features.shape[4]  # [B, T, C, H]: the one pass that vectors and stripes share
        if self.global_attention is not None and self.global_reduction is not None:
            pooled, frame_weights = self.global_attention(rows.mean(3), mask)
            vectors.append(self.global_reduction(pooled))  # f_s,g
        if self.local_reduction is not None:
            regions = self._stripes(rows)
            if self.gam is not None:
                templates = masked.take(regions, masked.order(mask))[:, 0]
                regions, scores = self.gam(features, templates, mask)
                supervised = {"templates": templates, "regions": regions}
            if isinstance(self.temporal, TemporalAlignment):
                pooled, weights = self.temporal(regions, scores, mask)
                weights = weights.mean(3)
            elif self.temporal is not None:
                pooled, weights = self.temporal(regions, mask)
            else:
                pooled = masked.mean(regions, mask)
                weights = masked.uniform(mask, features)[:, :, None].expand(-1, -1, self.num_regions)
            maps["region_scores"] = weights
            if self.spatial is not None:
                pooled, maps["region_weights"] = self.spatial(pooled)
            vectors.append(self.local_reduction(pooled).flatten(1))  # f_s,l
            if self.global_attention is None:
                frame_weights = weights.mean(2)
        return Details(torch.cat(vectors, 1), mask, frame_weights, maps, supervised)  # Eq. 9

    def finer_maps(self, features: Tensor, mask: Tensor, frames: Tensor | None, details: Details) -> dict[str, Tensor]:
        """``gates`` ``[B, N_s, T, H, W]``: where each template is found, the mean of M (Eq. 2) over the channels; with
        BatchNorm's running statistics."""
        if self.gam is None:
            return {}
        norm = self.gam.norm
        scale = norm.weight * torch.rsqrt(masked.at_least_float32(norm.running_var) + norm.eps)
        offset = norm.bias - norm.running_mean * scale
        gates = torch.empty_like(features, dtype=scale.dtype)
        maps = []
        for slope in (details.supervised["templates"] * scale).unbind(1):
            _fill_gates(gates, features, slope[:, None, :, None, None], offset)
            maps.append(masked.zero(gates.mean(2), mask))
        return {"gates": torch.stack(maps, 1)}

    def _stripes(self, rows: Tensor) -> Tensor:
        """``[B, T, C, H]`` -> ``[B, T, N_s, C]``."""
        stripes = F.adaptive_avg_pool1d(rows.flatten(0, 1), self.num_regions)  # [B * T, C, N_s]
        return stripes.transpose(1, 2).unflatten(0, rows.shape[:2])

    @property
    def streaming_reason(self) -> str:
        return "in training its BatchNorm has statistics of the whole clip; call .eval()" if self.training else ""

    def _begin(self, batch: int, like: Tensor) -> _Seen:
        C, N = self.in_features, self.num_regions if self.local_branch else 0
        attended = Softmaxed.begin(batch, (), (C,), like)
        scores, rest = ((N, C), ()) if isinstance(self.temporal, TemporalAlignment) else ((N,), (C,))
        regions = Softmaxed.begin(batch, scores, rest, like)
        return _Seen(like.new_zeros(batch, N, C), *attended, *regions, like.new_zeros(batch, dtype=torch.int64))

    def _update(self, state: _Seen, features: Tensor, mask: Tensor) -> _Seen:
        attended, aligned = Softmaxed(*state[1:4]), Softmaxed(*state[4:7])
        templates = state.templates
        rows = features.sum(4) / features.shape[4]
        if self.global_attention is not None:
            vectors = rows.mean(3)
            attended = attended.add(self.global_attention.score(vectors).squeeze(-1), vectors, mask)
        if self.local_branch is not None:
            regions = self._stripes(rows)
            scores = torch.zeros_like(regions[..., 0])
            if self.gam is not None:
                first = masked.take(regions, masked.order(mask))[:, 0].to(templates.dtype)
                starts = (state.seen == 0) & mask.any(1)
                templates = torch.where(starts[:, None, None], first, templates)
                regions, aligned_scores = self.gam(features, templates.to(regions.dtype), mask)
                if isinstance(self.temporal, TemporalAlignment):
                    scores = aligned_scores
            if isinstance(self.temporal, TemporalAttention):
                scores = self.temporal.score(regions).squeeze(-1)
            aligned = aligned.add(scores, masked.zero(regions, mask), mask)
        return _Seen(templates, *attended, *aligned, state.seen + mask.sum(1))

    def _read(self, state: _Seen) -> Tensor:
        vectors = []
        if self.global_reduction is not None:
            vectors.append(self.global_reduction(self._like_parameters(Softmaxed(*state[1:4]).read())))
        if self.local_reduction is not None:
            pooled = self._like_parameters(Softmaxed(*state[4:7]).read())
            if self.spatial is not None:
                pooled, _ = self.spatial(pooled)
            vectors.append(self.local_reduction(pooled).flatten(1))
        return torch.cat(vectors, 1)
