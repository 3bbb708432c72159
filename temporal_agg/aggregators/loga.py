"""LOGA: local-global associative assembling of the frames of a clip.

Li, Huang, Gong: Local-Global Associative Frame Assemble in Video Re-ID, BMVC 2021, Sec. 3.

The frames of a clip are slots: LAQ has a weight for each, so the clip length is fixed and the order matters. A padded
frame enters LAQ as zeros, and gets no weight; the statistics of K and V are those of the real frames.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import masked
from ..losses import TripletLoss
from .base import Aggregator, Details, MapKind, check_range, frame_vectors, weighted_sum
from .pooling import BaselineCriterion
from .registry import ClipConfig, Paper, register_aggregator

__all__ = ["GCQ", "LAQ", "LOGA", "LOGACriterion"]

PAPER = Paper(
    name="LOGA",
    title="Local-Global Associative Frame Assemble in Video Re-ID",
    authors=("Qilei Li", "Jiabo Huang", "Shaogang Gong"),
    venue="British Machine Vision Conference (BMVC)",
    year=2021,
    url="https://arxiv.org/abs/2110.12018",
    results={
        "mars": (89.5, 84.1),
        "duke": (97.0, 96.6),
        "duke-si": (81.0, 76.6),
        "ilids-vid": (91.3, None),
        "prid-2011": (95.9, None),
    },
)


class LAQ(nn.Module):
    """Local aligned quality: one weight for each frame, from a convolution over the parts of all frames (Eqs. 5, 6).

    A frame is flattened to H*W values and cut into M = floor(H*W / S) parts of S values in a row; what is left over is
    dropped. The T frames are the channels of the convolution.

    As printed nothing nonlinear stands between the convolution and the mean over parts, so :meth:`forward` takes the
    mean first, and one product with S numbers per frame is left. It follows that a frame's weight depends on no more
    than the S means of every S-th value of each frame: its brightness. Over 99.7 % of the variance of those numbers was
    that of the mean pixel (measured); ``nonlinearity`` changes it. :meth:`part_scores` has the parts one by one.

    The paper's frames have one channel; ours is the mean of the channels given. The convolution's bias, and the MLP's,
    which starts at 1 (the softmax does not see it, and no unit starts dead), are ours.

    Args:
        clip_length: T.
        part_size: S, values in a part.
        nonlinearity: between convolution and mean: None, as printed, or ``relu`` (ours), under which a part counts by
            what is in it.

    Raises:
        ValueError: an unknown nonlinearity.
    """

    def __init__(self, clip_length: int = 10, part_size: int = 10, nonlinearity: str | None = None):
        super().__init__()
        if nonlinearity not in (None, "relu"):
            raise ValueError(f"LAQ: nonlinearity must be None or 'relu', got {nonlinearity!r}.")
        self.nonlinearity = nonlinearity
        self.clip_length = clip_length
        self.part_size = part_size
        self.convolution = nn.Conv1d(clip_length, clip_length, part_size, stride=part_size)  # F
        self.mlp = nn.Linear(clip_length, clip_length)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.convolution.reset_parameters()
        self.mlp.reset_parameters()
        nn.init.ones_(self.mlp.bias)

    def forward(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weighs the frames.

        Args:
            frames: ``[B, T, channels, H, W]``: normalised images, or feature maps.
            mask: bool ``[B, T]``, True = a real frame; None = all are real.

        Returns:
            w_l ``[B, T]`` in at least float32; a row sums to 1, padding gets 0.

        Raises:
            ValueError: another T, or fewer than S values in a frame.
        """
        mask = self._check(frames, mask)
        if self.nonlinearity == "relu":
            pooled = self.part_scores(frames, mask).mean(2)
            return masked.softmax(self.mlp(pooled).relu(), mask)
        S = self.part_size
        parts = frames.flatten(3)[..., : frames.shape[3] * frames.shape[4] // S * S].unflatten(3, (-1, S))
        strided_means = masked.zero(parts.mean((2, 3)), mask)  # [B, T, S]
        pooled = self.convolution(strided_means).squeeze(2)  # Pooling(w~_l), Eqs. 5 and 6
        return masked.softmax(self.mlp(pooled).relu(), mask)  # Eq. 6

    def part_scores(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """The importance of each part of each frame, w~_l of Eq. 5: ``[B, T, M]``. Arguments as in :meth:`forward`."""
        mask = self._check(frames, mask)
        scores = self.convolution(masked.zero(frames.mean(2).flatten(2), mask))  # Eq. 5
        return scores if self.nonlinearity is None else scores.relu()

    def _check(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        T, S = self.clip_length, self.part_size
        if frames.dim() != 5 or frames.shape[1] != T or frames.shape[3] * frames.shape[4] < S:
            raise ValueError(
                f"LAQ: expected frames of the shape [B, {T}, channels, H, W] with H*W >= part_size = {S}, got "
                f"{list(frames.shape)}. Cut clips of {T} frames, or build it with other clip_length and part_size."
            )
        return masked.all_real(frames) if mask is None else mask

    def extra_repr(self) -> str:
        return f"clip_length={self.clip_length}, part_size={self.part_size}, nonlinearity={self.nonlinearity!r}"


class GCQ(nn.Module):
    """Global correlated quality: one weight for each frame, from its correlation with a prototype (Eqs. 7, 8).

    A bias in front of a BatchNorm, and the shift of K's BatchNorm in front of the softmax, would cancel: there is none.

    Args:
        in_features: D.
        scale: divides the logits; None = as printed, ``sqrt`` = sqrt(D), or a number. They are sums over D products of
            unit variance: as printed, at D = 2048 an untrained model gives nearly all weight to one frame, and wrecks
            its backbone: the frame vectors' gradient through the logits is 53 times that through p at the start, and
            0.25 times with ``sqrt`` (measured).

    Raises:
        ValueError: another word, or a number that is not positive.
    """

    def __init__(self, in_features: int, scale: float | str | None = None):
        super().__init__()
        if scale == "sqrt":
            scale = in_features**0.5
        if scale is not None and (isinstance(scale, str) or not scale > 0):
            raise ValueError(f"GCQ: scale must be None, 'sqrt' or a positive number, got {scale!r}.")
        self.scale = scale
        self.query = nn.Linear(in_features, in_features, bias=False)
        self.query_norm = masked.BatchNorm(in_features)
        self.key = nn.Linear(in_features, in_features, bias=False)
        self.key_norm = masked.BatchNorm(in_features, bias=False)
        self.value = nn.Linear(in_features, in_features, bias=False)
        self.value_norm = masked.BatchNorm(in_features)

    def forward(self, prototype: Tensor, embeddings: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weighs the frames.

        Args:
            prototype: p ``[B, D]``; or ``[B, T, D]``, a query for each frame: self-attention, averaged over the real
                queries.
            embeddings: E ``[B, T, D]``.
            mask: bool ``[B, T]``, True = a real frame; None = all are real.

        Returns:
            w_g ``[B, T]`` in at least float32, and V w_g ``[B, D]``.
        """
        mask = masked.all_real(embeddings) if mask is None else mask
        per_frame = prototype.dim() == 3
        q = self.query_norm(masked.at_least_float32(self.query(prototype)), mask if per_frame else None)
        K = self.key_norm(masked.at_least_float32(self.key(embeddings)), mask)
        V = self.value_norm(self.value(embeddings), mask)
        # The printed form is summed in float32 under autocast too: its logits are large, rounding moves the weights.
        logits = q @ K.mT if per_frame else (K * q[:, None]).sum(2)  # K^T q
        if self.scale is not None:
            logits = logits / self.scale
        weights = masked.softmax(logits, mask[:, None] if per_frame else mask)  # Eq. 7
        if per_frame:
            weights = masked.mean(weights, mask)  # V is applied linearly: the mean over queries can come first
        return weights, weighted_sum(V, weights)  # Eq. 8

    def extra_repr(self) -> str:
        return "" if self.scale is None else f"scale={self.scale}"


class LOGACriterion(BaselineCriterion):
    """LOGA (BMVC 2021, Eqs. 10-12): cross-entropy + triplet, one random positive and negative for each anchor.

    Args:
        num_classes: identities in the training set.
        model: read for the embedding's width.
        margin: of the triplet loss.
        mining: ``random`` as printed, or ``hard``, as in the work that the paper cites for the loss.
        generator: draws the triplets; None = torch's global generator.
        neck: a BatchNorm in front of classifier and triplet, as in the released code of the work whose settings LOGA
            shares (AP3D); the paper has none.
        distance: of the triplet: ``euclidean``, or ``cosine`` as in that code.

    Neck, cosine triplet, the last layer at zero and logits over sqrt(D) together brought 22.7 -> 64.0 mAP in the study
    of drawn figures (mean pooling: 66.1; one seed).
    """

    def __init__(
        self,
        num_classes: int,
        model: nn.Module,
        margin: float | None = 0.3,
        mining: str = "random",
        generator: torch.Generator | None = None,
        neck: bool = False,
        distance: str = "euclidean",
    ):
        super().__init__(num_classes, model, neck=neck)
        self.triplet = TripletLoss(margin, mining, generator, distance)  # Eq. 11


@register_aggregator(
    "loga",
    criterion=LOGACriterion,
    clip=ClipConfig(length=10, train_sampling="adjacent"),
    last_stride=1,
    paper=PAPER,
)
class LOGA(Aggregator):
    """LAQ's weights make a prototype of the clip, GCQ's correlations with it a residual; D = C.

    The last Linear starts at zero, so that the embedding starts as p, to which it adds a residual (ours). The frame
    weights are (w_l + w_g) / 2; ``maps`` has both, ``laq`` and ``gcq`` ``[B, T]``, and those of :meth:`inspect` the
    parts of Fig. 7, too.

    Args:
        in_features: C.
        clip_length: T, the only number of frames it takes (any, with ``assembly="gcq"``).
        part_size: S of LAQ.
        assembly: how LAQ and GCQ are joined (the paper's Figs. 4, 5). ``associatively``: LOGA. ``laq``: LAQ alone,
            x = p. ``gcq``: GCQ alone, w_l uniform. ``separately``: two branches side by side, ``[p, m + FC(V w_g)]``
            with the plain mean m as the prototype of the second; 2C wide. ``directly``: self-attention over the frames
            rescaled by w_l; x = the sum of those (which is p) + FC(the mean of what they attend to). The paper does
            not give the formulas of the last two; ours.
        quality: what LAQ reads: ``frames``, the images, as in the paper; or ``features``, the maps, for who has only
            those (ours).
        scale: of GCQ: None, as printed, ``sqrt`` (the recipe's) or a number.
        nonlinearity: of LAQ: None, as printed, or ``relu``.
    """

    def __init__(
        self,
        in_features: int,
        clip_length: int = 10,
        part_size: int = 10,
        *,
        assembly: str = "associatively",
        quality: str = "frames",
        scale: float | str | None = None,
        nonlinearity: str | None = None,
    ):
        assemblies = ("associatively", "separately", "directly", "laq", "gcq")
        if assembly not in assemblies:
            raise ValueError(f"LOGA: assembly must be one of {', '.join(assemblies)}, got {assembly!r}.")
        if quality not in ("frames", "features"):
            raise ValueError(f"LOGA: quality must be 'frames' or 'features', got {quality!r}.")
        check_range(1, clip_length=clip_length, part_size=part_size)
        super().__init__(in_features, 2 * in_features if assembly == "separately" else in_features)
        self.assembly = assembly
        self.maps = {"laq": MapKind(("frames",), "share", "LAQ's w_l (Eq. 6)", over="frames")}
        if assembly != "laq":
            self.maps["gcq"] = MapKind(("frames",), "share", "GCQ's w_g (Eq. 7)", over="frames")
        if assembly != "gcq":
            places = ("parts",) if quality == "frames" else ("height", "width")
            self.maps["parts"] = MapKind(("frames", *places), "signed", "LAQ's parts (Eq. 5)")
        self.quality = quality
        if assembly != "gcq":
            self.clip_length = clip_length
            self.needs_frames = quality == "frames"
            self.needs_maps = quality == "features"
            self.laq = LAQ(clip_length, part_size, nonlinearity)
        if assembly != "laq":
            self.gcq = GCQ(in_features, scale)
            self.fc = nn.Linear(in_features, in_features)
            nn.init.zeros_(self.fc.weight)
            nn.init.zeros_(self.fc.bias)

    def aggregate(self, features: Tensor, mask: Tensor, frames: Tensor | None) -> Details:
        e = frame_vectors(features)
        if self.assembly == "gcq":
            w_l = masked.uniform(mask, e)
        else:
            w_l = self.laq(features if self.quality == "features" or frames is None else frames, mask)  # Eq. 1
        p = weighted_sum(e, w_l)  # Eq. 2
        if self.assembly == "laq":
            return Details(p, mask, w_l, {"laq": w_l}, {})
        if self.assembly == "separately":
            m = masked.mean(e, mask)
            w_g, attended = self.gcq(m, e, mask)
            x = torch.cat([p, m + self.fc(attended)], 1)
        elif self.assembly == "directly":
            rescaled = e * w_l.to(e.dtype)[..., None]
            w_g, attended = self.gcq(rescaled, rescaled, mask)
            x = p + self.fc(attended)
        else:
            w_g, attended = self.gcq(p, e, mask)  # Eqs. 3, 7, 8
            x = p + self.fc(attended)  # Eqs. 4, 9
        return Details(x, mask, (w_l + w_g) / 2, {"laq": w_l, "gcq": w_g}, {})

    def finer_maps(self, features: Tensor, mask: Tensor, frames: Tensor | None, details: Details) -> dict[str, Tensor]:
        """``parts`` ``[B, T, M]`` as LAQ scores them; of feature maps ``[B, T, H, W]``, 0 at what makes no part."""
        if self.assembly == "gcq":
            return {}
        if self.quality == "frames" and frames is not None:
            return {"parts": masked.zero(self.laq.part_scores(frames, mask), mask)}
        scores = masked.zero(self.laq.part_scores(features, mask), mask).repeat_interleave(self.laq.part_size, 2)
        H, W = features.shape[3:]
        return {"parts": F.pad(scores, (0, H * W - scores.shape[2])).unflatten(2, (H, W))}

    @property
    def streaming_reason(self) -> str:
        if self.clip_length is not None:
            return f"its clips have exactly {self.clip_length} frames, and LAQ has a weight for each place; embed clips"
        return "GCQ compares every frame with the mean of all of them; embed clips"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, assembly={self.assembly!r}, quality={self.quality!r}"
