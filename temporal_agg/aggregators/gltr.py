"""GLTR: global-local temporal representations.

Li, Wang, Tian, Gao, Zhang: Global-Local Temporal Representations For Video Person Re-Identification, ICCV 2019, Sec. 3.

The paper and the code that its authors released differ. ``gltr`` follows the paper, ``gltr_released`` the code (see
:class:`ReleasedGLTR`). A 1x1 convolution over time is a Linear on each frame, and is written so.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .. import masked
from .base import (
    Aggregator,
    Criterion,
    Details,
    Frames,
    MapKind,
    aggregator_of,
    check_range,
    frame_vectors,
    initial_classifier,
    weighted_sum,
)
from .registry import ClipConfig, Paper, register_aggregator

__all__ = ["DTP", "GLTR", "TSA", "GLTRCriterion", "ReleasedGLTR", "ReleasedGLTRCriterion", "ReleasedTSA"]

PAPER = Paper(
    name="GLTR",
    title="Global-Local Temporal Representations For Video Person Re-Identification",
    authors=("Jianing Li", "Jingdong Wang", "Qi Tian", "Wen Gao", "Shiliang Zhang"),
    venue="IEEE/CVF International Conference on Computer Vision (ICCV)",
    year=2019,
    url="https://arxiv.org/abs/1908.10049",
    results={
        "mars": (87.02, 78.47),
        "duke": (96.29, 93.74),
        "ilids-vid": (86.0, None),
        "prid-2011": (95.5, None),
        "ls-vid": (63.07, 44.32),
    },
)

WHOLE = 512  # frames up to which M [B, T, T] is made at once
BLOCK = 2**22  # entries of a block of M beyond

# M[s, t]: what frame t takes from frame s.
_TSA_MAP = MapKind(("sources", "frames"), "share", "TSA's mask M (Eq. 3)", over="sources")


class DTP(nn.Module):
    """Dilated temporal pyramid: parallel convolutions over time at several scales, concatenated (Eqs. 2, 5, 6).

    Each sees zeros beyond the first and the last real frame. Eq. 5 is printed off-centre; read as centred.

    Args:
        in_features: d.
        rates: r of each branch; the paper's are 2^(n-1).
        kind: what r means (the paper's Fig. 6). ``dilated``: the dilation of a kernel of 3 frames. ``undilated``: a
            kernel of 2r + 1 frames, the same field. ``pooling``: means of r frames in a row, a kernel of 3 over those,
            each output repeated r times (the paper names temporal pyramid pooling without its form; ours).
        bias: of the convolutions.
        keep_input: the input comes first in the concatenation.

    Attributes:
        num_features: channels of the output, d for each branch (and for the input, when kept).
    """

    def __init__(
        self,
        in_features: int,
        rates: Sequence[int] = (1, 2, 4),
        kind: str = "dilated",
        *,
        bias: bool = True,
        keep_input: bool = False,
    ):
        super().__init__()
        if kind not in ("dilated", "undilated", "pooling"):
            raise ValueError(f"DTP: kind must be 'dilated', 'undilated' or 'pooling', got {kind!r}.")
        if not rates or min(rates) < 1:
            raise ValueError(f"DTP: rates must be one or more integers >= 1, got {rates!r}.")
        self.rates = tuple(rates)
        self.kind = kind
        self.keep_input = keep_input
        self.num_features = in_features * (len(rates) + keep_input)
        self.branches = nn.ModuleList()
        for r in rates:
            kernel = 2 * r + 1 if kind == "undilated" else 3
            dilation = r if kind == "dilated" else 1
            self.branches.append(
                nn.Conv1d(
                    in_features, in_features, kernel, padding=kernel // 2 * dilation, dilation=dilation, bias=bias
                )
            )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolves over the real frames.

        Args:
            x: F ``[B, T, d]``.
            mask: bool ``[B, T]``, True = a real frame; None = all are real. Padding is skipped, wherever it stands.

        Returns:
            F' ``[B, T, num_features]``; padding is 0.
        """
        mask = masked.all_real(x) if mask is None else mask
        order = masked.order(mask)
        compact = masked.take(masked.zero(x, mask), order).mT  # [B, d, T]
        if self.kind == "pooling":
            real = mask.gather(1, order)[:, None].to(x.dtype)
            scales = [self._pooled(compact, real, r, conv) for r, conv in zip(self.rates, self.branches, strict=True)]
        else:
            scales = [branch(compact) for branch in self.branches]  # Eq. 5
        y = torch.cat([compact, *scales] if self.keep_input else scales, 1).mT  # Eq. 6
        return masked.zero(masked.take(y, order.argsort(1)), mask)

    @staticmethod
    def _pooled(x: Tensor, real: Tensor, r: int, branch: nn.Module) -> Tensor:
        T = x.shape[2]
        share = F.avg_pool1d(real, r, ceil_mode=True)  # of the frames in a window, those that are real
        means = F.avg_pool1d(x, r, ceil_mode=True) / share.clamp(min=1 / r)
        return branch(means).repeat_interleave(r, 2)[..., :T]

    def extra_repr(self) -> str:
        return f"rates={self.rates}, kind={self.kind!r}, keep_input={self.keep_input}"


class TSA(nn.Module):
    """Temporal self-attention: every frame gathers from all frames through a T x T mask (Eqs. 3, 7).

    B and C are followed by a BatchNorm, so they have no bias.

    Args:
        in_features: the channels of F', N*d.
        reduction: alpha, of the width inside.
        normalize: ``softmax``: what a frame gathers is a weighted mean over the sources. The paper prints none; the
            work it builds on, and its released code, have it. ``none``: as printed. The mask is then unbounded and what
            a frame gathers grows with T: at the paper's learning rate training diverges within a few steps.
        start: of W: ``zero``, so that the output starts as the input, as in the work it builds on; nothing else of TSA
            then has a gradient at the first step. ``small`` (ours): normal values of standard deviation 0.01; with W
            away from zero TSA learned in a toy with a known answer (72.6 against 67.0 mAP).

    Raises:
        ValueError: an unknown ``normalize`` or ``start``.
    """

    def __init__(self, in_features: int, reduction: int = 2, normalize: str = "softmax", start: str = "zero"):
        super().__init__()
        if start not in ("zero", "small"):
            raise ValueError(f"TSA: start must be 'zero' or 'small', got {start!r}.")
        if normalize not in ("softmax", "none"):
            raise ValueError(f"TSA: normalize must be 'softmax' or 'none', got {normalize!r}.")
        hidden = in_features // reduction
        self.normalize = normalize
        self.b = nn.Linear(in_features, hidden, bias=False)
        self.b_norm = masked.BatchNorm(hidden)
        self.c = nn.Linear(in_features, hidden, bias=False)
        self.c_norm = masked.BatchNorm(hidden)
        self.value = nn.Linear(in_features, hidden)
        self.restore = nn.Linear(hidden, in_features)  # W
        nn.init.normal_(self.restore.weight, std=0.01 if start == "small" else 0.0)
        nn.init.zeros_(self.restore.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """F' -> F'' ``[B, T, N*d]`` (Eq. 7); padding is 0. ``mask``: bool ``[B, T]``, None = all frames are real."""
        mask = masked.all_real(x) if mask is None else mask
        return self.gather(x, self.relations(x, mask), mask)

    def relations(self, x: Tensor, mask: Tensor) -> Tensor:
        """M ``[B, T, T]``, at least float32: what frame t (last index) takes from frame s; 0 at padding."""
        return self._relate(*self._pairs(x, mask), mask, mask)

    def _pairs(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What the sources and what the targets bring to Eq. 7's M: C and B, ``[B, T, hidden]``."""
        return self.c_norm(self.c(x), mask).relu(), self.b_norm(self.b(x), mask).relu()

    def _relate(self, sources: Tensor, targets: Tensor, source: Tensor, target: Tensor) -> Tensor:
        logits = sources @ targets.mT  # M[s, t] = C_s . B_t
        source, target = source[:, :, None], target[:, None]
        M = masked.softmax(logits, source, dim=1) if self.normalize == "softmax" else masked.at_least_float32(logits)
        return torch.where(source & target, M, 0)

    def _given(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Eq. 8's m ``[B, T]``, how much each frame gives, over the number of frames; and M, unless T is large.

        A long tracklet's M is made, summed and forgotten in blocks of targets, in the backward pass too.
        """
        count = mask.sum(1, keepdim=True)
        if masked.is_compiling() or x.shape[1] <= WHOLE:
            M = self.relations(x, mask)
            return M.sum(2) / count, M
        sources, targets = self._pairs(x, mask)

        def given(sources: Tensor, targets: Tensor, target: Tensor) -> Tensor:
            return self._relate(sources, targets, mask, target).sum(2)

        size = max(1, BLOCK // mask.numel())
        m = torch.zeros_like(mask, dtype=masked.at_least_float32(x).dtype)
        for some, target in zip(targets.split(size, 1), mask.split(size, 1), strict=True):
            m = m + checkpoint(given, sources, some, target, use_reentrant=False)
        return m / count, None

    def gather(self, x: Tensor, M: Tensor, mask: Tensor) -> Tensor:
        """Eq. 7 for every frame, ``[B, T, N*d]``."""
        return masked.zero(self.restore(M.mT.to(x.dtype) @ self.value(x)) + x, mask)  # Eq. 7

    def mean(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The mean of Eq. 7 over the real frames, ``[B, N*d]``, Eq. 8's m ``[B, T]``, and M unless T is large.

        Both convolutions are linear and M only mixes frames, so the mean goes first: m(s) = sum_t M[s, t] weighs the
        frames of F', as Eq. 8 has it, and the convolutions see one vector for each clip. Nothing is approximated.
        """
        m, M = self._given(x, mask)
        # Under the softmax m sums to 1, and the value's bias passes through; as printed it counts as often as m says.
        softmax = self.normalize == "softmax"
        gathered = self.value(weighted_sum(x, m)) if softmax else weighted_sum(self.value(x), m)
        return self.restore(gathered) + masked.mean(x, mask), m, M  # Eqs. 4, 7, 8

    def extra_repr(self) -> str:
        return f"normalize={self.normalize!r}"


class ReleasedTSA(TSA):
    """TSA as the authors released it: a non-local block with a softmax over the sources, unscaled.

    Its 1x1 convolutions have biases and neither norm nor ReLU; W is followed by a BatchNorm whose weight and bias start
    at 0.

    Args:
        in_features: the channels of F'.
        reduction: of the width inside.
    """

    def __init__(self, in_features: int, reduction: int = 2):
        nn.Module.__init__(self)
        self.normalize = "softmax"
        hidden = in_features // reduction
        self.theta = nn.Linear(in_features, hidden)
        self.phi = nn.Linear(in_features, hidden)
        self.g = nn.Linear(in_features, hidden)
        self.restore = nn.Linear(hidden, in_features)
        self.restore_norm = masked.BatchNorm(in_features)
        nn.init.zeros_(self.restore_norm.weight)

    def _pairs(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.phi(x), self.theta(x)  # M[s, t] = softmax over s of phi_s . theta_t

    def gather(self, x: Tensor, M: Tensor, mask: Tensor) -> Tensor:
        """The block's output for every frame, ``[B, T, in_features]``."""
        return masked.zero(self.restore_norm(self.restore(M.mT.to(x.dtype) @ self.g(x)), mask) + x, mask)

    def mean(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As :meth:`TSA.mean`; in training the BatchNorm wants every frame first."""
        if self.training:
            whole = self.relations(x, mask)
            return masked.mean(self.gather(x, whole, mask), mask), whole.sum(2) / mask.sum(1, keepdim=True), whole
        m, M = self._given(x, mask)
        return self.restore_norm(self.restore(self.g(weighted_sum(x, m)))) + masked.mean(x, mask), m, M


class GLTRCriterion(Criterion):
    """GLTR (ICCV 2019): cross-entropy alone, of a linear classifier on the embedding.

    Args:
        num_classes: identities in the training set.
        model: read for the embedding's width.
    """

    def __init__(self, num_classes: int, model: nn.Module):
        super().__init__(num_classes, model)
        self.classifier: nn.Module = initial_classifier(aggregator_of(model).num_features, num_classes)

    def terms(self, details: Details, labels: Tensor) -> dict[str, Tensor]:
        return {"cross_entropy": F.cross_entropy(self.classifier(details.embedding), labels)}


@register_aggregator(
    "gltr",
    criterion=GLTRCriterion,
    paper=PAPER,
    clip=ClipConfig(length=16, train_sampling="adjacent", test_sampling="all", distance="euclidean"),
)
class GLTR(Aggregator):
    """Frame embedding, dilated temporal pyramid, temporal self-attention, mean over time: D = N*d (d without DTP).

    The frame weights are Eq. 8's m, how much each frame gives in total: negative parts clipped, then normalised,
    uniform if nothing is left, or without TSA. ``maps["tsa"]`` is M ``[B, T, T]``: what frame t (last index) takes from
    frame s; clips of more than 512 frames have it from :meth:`inspect` alone, and take memory that grows with T.

    The frame embedding is a Linear with bias on the average-pooled map, without norm or ReLU (the paper gives its width
    only; ours).

    Args:
        in_features: C.
        embed_features: d.
        branches: N, of the pyramid, at most 16; their rates are 1, 2, 4, ...
        pyramid: ``dilated``, ``undilated`` or ``pooling`` (see :class:`DTP`).
        normalize: ``softmax`` or ``none`` (see :class:`TSA`).
        dtp: False: TSA alone, on the frame embeddings (the paper's Table 2); D = d, ``branches`` and ``pyramid`` are
            unused.
        tsa: False: DTP alone, the mean of its output (Table 2); ``normalize`` is unused. Without both, the mean of the
            frame embeddings.
        start: of TSA's W, ``zero`` or ``small``.
    """

    def __init__(
        self,
        in_features: int,
        embed_features: int = 128,
        branches: int = 3,
        pyramid: str = "dilated",
        normalize: str = "softmax",
        dtp: bool = True,
        tsa: bool = True,
        start: str = "zero",
    ):
        check_range(1, embed_features=embed_features)
        check_range(1, 16, branches=branches)  # the last one sees 65,537 frames
        if pyramid not in ("dilated", "undilated", "pooling"):
            raise ValueError(f"GLTR: pyramid must be 'dilated', 'undilated' or 'pooling', got {pyramid!r}.")
        rates = [2**n for n in range(branches)]  # r_n = 2^(n-1), Sec. 3.2
        local = DTP(embed_features, rates, pyramid) if dtp else None
        super().__init__(in_features, embed_features if local is None else local.num_features)
        self.embed = nn.Linear(in_features, embed_features)
        self.dtp = local
        self.tsa: TSA | None = TSA(self.num_features, normalize=normalize, start=start) if tsa else None
        if tsa:
            self.maps = {"tsa": _TSA_MAP if normalize == "softmax" else replace(_TSA_MAP, values="signed", over=None)}
        self.maps = {**self.maps, **self._stages()}

    def aggregate(self, features: Tensor, mask: Tensor, frames: Tensor | None) -> Details:
        return self._refine(self.embed(frame_vectors(features)), mask)

    def _refine(self, x: Tensor, mask: Tensor) -> Details:
        """What stands behind the frame embeddings ``[B, T, d]``."""
        if self.dtp is not None:
            x = self.dtp(x, mask)  # Eq. 2
        if self.tsa is None:
            return Details(masked.mean(x, mask), mask, masked.uniform(mask, x), {}, {})  # Eq. 4
        embedding, m, M = self.tsa.mean(x, mask)  # Eqs. 3, 4
        given = m.clamp(min=0)  # Eq. 8
        total = given.sum(1, keepdim=True)
        weights = torch.where(total > 0, given / torch.where(total > 0, total, 1), masked.uniform(mask, given))
        return Details(embedding, mask, weights, {} if M is None else {"tsa": M}, {})

    def _stages(self) -> dict[str, MapKind]:
        """The kinds of :meth:`finer_maps`."""
        names = {"embedded": "F, embedded frames"}
        if self.dtp is not None:
            names["local"] = "F', behind DTP (Eq. 2)"
        if self.tsa is not None:
            names["gathered"] = "F'', behind TSA (Eq. 7)"
        kinds = {name: MapKind(("frames", "features"), "signed", title) for name, title in names.items()}
        return {**kinds, "mean": MapKind(("features",), "signed", "f, their mean (Eq. 4)")}

    # DTP looks ahead, and TSA at every pair of frames: a stream keeps the frame embeddings.
    streaming_reason = ""

    def _begin(self, batch: int, like: Tensor) -> Frames:
        return Frames.begin(batch, self.embed.out_features, like)

    def _update(self, state: Frames, features: Tensor, mask: Tensor) -> Frames:
        return state.add(self.embed(frame_vectors(features)), mask)

    def _read(self, state: Frames) -> Details:
        details = self._refine(self._like_parameters(state.vectors), state.mask)
        return details._replace(maps={})

    def finer_maps(self, features: Tensor, mask: Tensor, frames: Tensor | None, details: Details) -> dict[str, Tensor]:
        """Fig. 3: ``embedded`` F ``[B, T, d]``, ``local`` F' and ``gathered`` F'' ``[B, T, N*d]``, ``mean`` f
        ``[B, N*d]``, and ``tsa``. Without DTP there is no F', without TSA no F''.
        """
        x = self.embed(frame_vectors(features))
        maps = {"embedded": masked.zero(x, mask), "mean": details.embedding}
        if self.dtp is not None:
            x = maps["local"] = self.dtp(x, mask)
        if self.tsa is not None:
            maps["tsa"] = details.maps["tsa"] if "tsa" in details.maps else self.tsa.relations(x, mask)
            maps["gathered"] = self.tsa.gather(x, maps["tsa"], mask)
        return maps


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


@register_aggregator(
    "gltr_released",
    criterion=ReleasedGLTRCriterion,
    paper=PAPER,
    note="as in the code that its authors released",
    clip=ClipConfig(length=16, train_sampling="adjacent", test_sampling="all", distance="cosine"),
    last_stride=1,
)
class ReleasedGLTR(GLTR):
    """GLTR as the authors released it: D = 4d.

    The dilations are 1, 2, 3, the temporal convolutions have no bias, the frame embedding itself comes first in the
    concatenation, and the attention is :class:`ReleasedTSA`. The embedding is the mean in front of the training head,
    which lives in the criterion; the authors compare it L2-normalised.

    Args:
        in_features: C.
        embed_features: d.
    """

    def __init__(self, in_features: int, embed_features: int = 128):
        check_range(1, embed_features=embed_features)
        dtp = DTP(embed_features, (1, 2, 3), bias=False, keep_input=True)
        Aggregator.__init__(self, in_features, dtp.num_features)
        self.embed = nn.Linear(in_features, embed_features)
        self.dtp = dtp
        self.tsa = ReleasedTSA(dtp.num_features)
        self.maps = {"tsa": _TSA_MAP, **self._stages()}
        nn.init.kaiming_normal_(self.embed.weight, mode="fan_out")
        nn.init.zeros_(self.embed.bias)
        for weight in dtp.branches.parameters():
            nn.init.normal_(weight, std=1e-3)
