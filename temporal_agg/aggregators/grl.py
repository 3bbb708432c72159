"""GRL: Global-guided Reciprocal Learning (Liu et al., CVPR 2021, arXiv:2103.04337).

A correlation map splits each frame's map into a part that agrees with the whole clip and a part that does not. Running
through the clip in both directions, the first is enhanced channel by channel, the second is accumulated in a memory.

The memory never depends on the enhancement. :class:`TRL` therefore runs the memories alone step by step, both
directions at once as channel groups, and in training everything else over all steps at once.

The code that the authors released differs from the paper; both readings are here (``grl``, ``grl_released``). The
released one holds its parameters as the authors' does, up to names and to the concatenation of the two directions.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import masked
from ..losses import OIMLoss, TripletLoss, VerificationLoss
from .base import Aggregator, Criterion, Details, MapKind, aggregator_of, frame_vectors, weighted_sum
from .registry import ClipConfig, Paper, register_aggregator

__all__ = ["EMU", "GCE", "GRL", "TRL", "GRLCriterion", "ReleasedGRL", "ReleasedGRLCriterion"]

PAPER = Paper(
    name="GRL",
    title="Watching You: Global-guided Reciprocal Learning for Video-based Person Re-identification",
    authors=("Xuehu Liu", "Pingping Zhang", "Chenyang Yu", "Huchuan Lu", "Xiaoyun Yang"),
    venue="IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)",
    year=2021,
    url="https://arxiv.org/abs/2103.04337",
    results={
        "mars": (91.0, 84.8),
        "ilids-vid": (90.4, None),
        "prid-2011": (96.2, None),
    },
)

_DIRECTIONS = ("forward", "backward")
_CLIP = ClipConfig(length=8, train_sampling="chunks", test_sampling="chunks", fill="last", distance="dot")


class _Layers(nn.Sequential):
    """Layers in sequence; the norms among them see the mask."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self:
            x = layer(x, mask) if isinstance(layer, masked.BatchNorm) else layer(x)
        return x


class GCE(nn.Module):
    """Global-guided Correlation Estimation (Sec. 3.2): how much each place of a frame agrees with the whole clip.

    The paper does not give the hidden width; C/8 is ours. Its projection of the global vector has no bias, which the
    BatchNorm behind it would cancel.

    The convolution over the concatenation of map and expanded global vector is the sum of one over the map (``join``)
    and one over the vector (``join_clip``), so that neither the expansion nor the concatenation exists.

    Args:
        in_features: C.
        released: build the released code's form: the global vector goes through Linear(C, C/2), BatchNorm and ReLU and
            stands after the map in the concatenation; three 1x1 convolutions, a BatchNorm behind each.
    """

    def __init__(self, in_features: int, released: bool = False):
        super().__init__()
        C, hidden = in_features, max(1, in_features // 8)
        self.released = released
        if released:
            half = max(1, C // 2)
            self.embed = _Layers(nn.Linear(C, half), masked.BatchNorm(half), nn.ReLU(inplace=True))
            self.join, self.join_clip = nn.Conv2d(C, half, 1, bias=False), nn.Linear(half, half, bias=False)
            self.correlate = _Layers(
                masked.BatchNorm(half),
                nn.Conv2d(half, hidden, 1, bias=False),
                masked.BatchNorm(hidden),
                nn.ReLU(inplace=True),
                nn.Conv2d(hidden, 1, 1, bias=False),
                masked.BatchNorm(1),
            )
        else:
            self.embed = _Layers(nn.Linear(C, C, bias=False))
            self.join, self.join_clip = nn.Conv2d(C, hidden, 1, bias=False), nn.Linear(C, hidden, bias=False)
            self.correlate = _Layers(masked.BatchNorm(hidden), nn.ReLU(inplace=True), nn.Conv2d(hidden, 1, 1))
        bound = (C + self.join_clip.in_features) ** -0.5  # torch's, for the one convolution that the two stand for
        nn.init.uniform_(self.join.weight, -bound, bound)
        nn.init.uniform_(self.join_clip.weight, -bound, bound)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes the correlation maps.

        Args:
            x: ``[B, T, C, H, W]``; padding may hold any finite values.
            mask: bool ``[B, T]``, True = a real frame; None = all are real.

        Returns:
            R ``[B, T, 1, H, W]``, from 0 to 1; the values of padded frames mean nothing.
        """
        B, T = x.shape[:2]
        if mask is None:
            mask = masked.all_real(x)
        clip = self.embed(masked.mean(frame_vectors(x), mask))  # Eq. 1 and its projection
        joined = self.join(x.flatten(0, 1)).unflatten(0, (B, T)) + self.join_clip(clip)[:, None, :, None, None]
        return self.correlate(joined.flatten(0, 1), mask.flatten()).sigmoid().unflatten(0, (B, T))  # Eq. 2


class EMU(nn.Module):
    """Enhancement and Memory Unit (Sec. 3.3, Fig. 3), for G directions at once, each with its own weights.

    The directions' memories stand side by side as channel groups: channels g*C to (g+1)*C belong to direction g.
    Grouped convolutions and BatchNorm keep channels apart, so this equals G separate units.

    f1 and f2 keep the paper's letters: f1 reads the frame, f2 the memory. The paper does not describe W_c; here it is
    Linear(C, C/16), ReLU, Linear(C/16, C), without biases, as in the released code. Res is the bottleneck of ResNet
    with identity skip, C -> C/4 -> C/4 -> C.

    Args:
        in_features: C.
        directions: G.
        kernel_size: of the middle convolution of Res; the released code has 1.
        enhancement: False: no enhancement block, a = 0.
        memory: False: no memory block, a memory stays what it was.
    """

    def __init__(
        self,
        in_features: int,
        directions: int = 1,
        kernel_size: int = 3,
        enhancement: bool = True,
        memory: bool = True,
    ):
        super().__init__()
        C, G = in_features, directions
        hidden, squeezed = max(1, C // 4), max(1, C // 16)
        self.directions = G
        self.f1 = self.f2 = self.mlp = self.res = None
        if enhancement:
            self.f1 = nn.ModuleList(nn.Conv2d(C, C, 1) for _ in range(G))
            self.f2 = nn.ModuleList(nn.Conv2d(C, C, 1) for _ in range(G))
            self.mlp = nn.ModuleList(
                nn.Sequential(nn.Linear(C, squeezed, bias=False), nn.ReLU(), nn.Linear(squeezed, C, bias=False))
                for _ in range(G)
            )
        if memory:
            self.res = _Layers(
                nn.Conv2d(G * C, G * hidden, 1, groups=G, bias=False),
                masked.BatchNorm(G * hidden),
                nn.ReLU(inplace=True),
                nn.Conv2d(G * hidden, G * hidden, kernel_size, padding=kernel_size // 2, groups=G, bias=False),
                masked.BatchNorm(G * hidden),
                nn.ReLU(inplace=True),
                nn.Conv2d(G * hidden, G * C, 1, groups=G, bias=False),
                masked.BatchNorm(G * C),
            )

    def forward(self, high: Tensor, low: Tensor, memory: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One time step at which every direction meets the same frame (with G = 1: any time step).

        Args:
            high: the frame's high-correlation features, ``[B, C, H, W]``.
            low: its low-correlation features, ``[B, C, H, W]``.
            memory: the memories of the step before, ``[B, G*C, H, W]``.
            mask: bool ``[B]``, the clips that have a frame at this step (BatchNorm counts these); None = all.

        Returns:
            The enhanced features, which mean nothing for clips without a frame, and the memories after this step,
            which stay what they were for such clips; both ``[B, G*C, H, W]``.
        """
        G = self.directions
        attention = self.attention([high] * G, memory.chunk(G, 1))
        enhanced = (1 + attention)[..., None, None] * high.repeat(1, G, 1, 1)  # Eq. 7
        return enhanced, self.remember(memory, low.repeat(1, G, 1, 1), mask)

    def attention(self, high: Sequence[Tensor], memories: Sequence[Tensor]) -> Tensor:
        """The channel attention a ``[N, G*C]`` of N frames for each direction.

        Args:
            high: the frames that each direction meets, G tensors ``[N, C, H, W]``.
            memories: each direction's memories before them, G tensors ``[N, C, H, W]``.
        """
        if self.f1 is None or self.f2 is None or self.mlp is None:
            return high[0].new_zeros(high[0].shape[0], self.directions * high[0].shape[1])
        logits = []
        for f1, f2, mlp, frames, memory in zip(self.f1, self.f2, self.mlp, high, memories, strict=True):
            difference = (f2(memory).relu_() - f1(frames).relu_()).square()  # Eq. 5
            logits.append(mlp(difference.mean((2, 3))))
        return torch.cat(logits, 1).sigmoid()  # Eq. 6

    def remember(self, memory: Tensor, low: Tensor, mask: Tensor | None = None) -> Tensor:
        """The memories ``[B, G*C, H, W]`` after the features ``low`` ``[B, G*C, H, W]`` that the directions meet."""
        if self.res is None:
            return memory
        total = memory + low
        after = (self.res(total, mask) + total).relu_()  # Eq. 8
        return after if mask is None else torch.where(mask[:, None, None, None], after, memory)


class TRL(nn.Module):
    """Temporal Reciprocal Learning (Sec. 3.3): an EMU runs through each clip in both directions.

    The backward direction runs over each clip's real frames reversed, and its outputs are put back in order. At step k
    BatchNorm counts the clips that have a k-th real frame. The linear layers of Eqs. 9 and 10 have no bias, which the
    BatchNorm behind them in :class:`GRL` would cancel.

    Args:
        in_features: C.
        released: build the released code's form: Res of 1x1 convolutions, and the sum of the directions in place of
            Eqs. 9 and 10.
        directions: ``forward``, ``backward`` or both.
        enhancement: False: no enhancement block (the paper's Table 3).
        memory: False: no memory block (Table 3); all steps then see M_0 (the paper does not say; ours).

    Raises:
        ValueError: unknown, repeated or no directions.
    """

    def __init__(
        self,
        in_features: int,
        released: bool = False,
        directions: Sequence[str] = _DIRECTIONS,
        enhancement: bool = True,
        memory: bool = True,
    ):
        super().__init__()
        if sorted(directions) not in (["forward"], ["backward"], ["backward", "forward"]):
            raise ValueError(f"directions must be 'forward', 'backward' or both in a list, got {directions!r}.")
        C, G = in_features, len(directions)
        self.directions = tuple(directions)
        self.emu = EMU(C, G, kernel_size=1 if released else 3, enhancement=enhancement, memory=memory)
        self.join_high: nn.Linear | None = None
        self.join_low: nn.Linear | None = None
        if not released:
            self.join_high = nn.Linear(G * C, C, bias=False)
            self.join_low = nn.Linear(G * C, C, bias=False)

    def forward(self, high: Tensor, low: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs through the clips.

        Args:
            high: the high-correlation features, ``[B, T, C, H, W]``; padding may hold any finite values.
            low: the low-correlation features, the same.
            mask: bool ``[B, T]``, True = a real frame; None = all are real.

        Returns:
            F^h ``[B, T, C]``, the enhanced frame vectors (padded ones mean nothing), and F^l ``[B, C]``, the last
            memory.
        """
        B, T, C, H, W = high.shape
        G = len(self.directions)
        if mask is None:
            mask = masked.all_real(high)
        visits = self.visits(mask)
        rows = (visits + T * torch.arange(B, device=high.device)[:, None, None]).transpose(0, 1)
        has_frame = torch.arange(T, device=high.device)[:, None] < mask.sum(1)
        all_high, all_low = high.flatten(0, 1), low.flatten(0, 1)
        memory = masked.mean(low, mask).repeat(1, G, 1, 1)  # M_0
        by_step = []
        # With gradients every memory is kept anyway. Without, nothing is: one step at a time saves memory, and time.
        block = T if torch.is_grad_enabled() else 1
        for rows_k, has_frame_k in zip(rows.split(block), has_frame.split(block), strict=True):
            before = []
            met = all_low.index_select(0, rows_k.flatten()).view(-1, B, G * C, H, W)
            for low_k, present in zip(met.unbind(), has_frame_k.unbind(), strict=True):
                before.append(memory.chunk(G, 1))
                memory = self.emu.remember(memory, low_k, present)
            seen = [all_high.index_select(0, rows_k[..., g].flatten()) for g in range(G)]
            by_step.append(self.emu.attention(seen, [torch.cat(memories) for memories in zip(*before, strict=True)]))

        # From (step, clip, direction) to (clip, frame, direction).
        attention = torch.cat(by_step).view(T, B, G, C).transpose(0, 1)
        attention = attention.gather(1, visits.argsort(1)[..., None].expand(B, T, G, C))
        enhanced = ((1 + attention) * frame_vectors(high)[:, :, None]).flatten(2)  # Eq. 7, GAP
        last = memory.mean((2, 3))
        if self.join_high is None or self.join_low is None:
            return enhanced.view(B, T, G, C).sum(2), last.view(B, G, C).sum(1)
        return self.join_high(enhanced), self.join_low(last)  # Eqs. 9, 10

    def visits(self, mask: Tensor) -> Tensor:
        """``[B, T, G]``: the frame that each direction visits at each step; padding comes last."""
        order = masked.order(mask)
        step = torch.arange(mask.shape[1], device=mask.device)
        last = mask.sum(1, keepdim=True) - 1
        reverse = order.gather(1, torch.where(step <= last, last - step, step))
        return torch.stack([order if d == "forward" else reverse for d in self.directions], 2)

    def extra_repr(self) -> str:
        return f"directions={self.directions}"


class GRLCriterion(Criterion):
    """GRL (CVPR 2021, Eqs. 11-14): OIM on frames, OIM on the memory feature, 20 x verification on the pooled feature.

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
        super().__init__(num_classes)
        C = _features_of(model)
        if not losses or not set(losses) <= {"frame", "video", "global", "verification"}:
            raise ValueError(f"losses must name some of frame, video, global and verification, got {losses!r}.")
        self.wants_pairs = "verification" in losses
        self.losses = nn.ModuleDict(
            {name: VerificationLoss(C) if name == "verification" else OIMLoss(num_classes, C) for name in losses}
        )

    def terms(self, details: Details, labels: Tensor) -> dict[str, Tensor]:
        x = details.supervised
        inputs = {
            "frame": _frames_of(details, labels),  # Eq. 12
            "video": (x["memory"], labels),  # Eq. 13
            "global": (x["global"], labels),
            "verification": (x["pooled"], labels),  # Eq. 11
        }
        return {name: loss(*inputs[name]) for name, loss in self.losses.items()}


@register_aggregator("grl", criterion=GRLCriterion, clip=_CLIP, last_stride=1, paper=PAPER)
class GRL(Aggregator):
    """Global-guided Reciprocal Learning as in the paper: GCE, TRL, and attentive pooling over the enhanced frames.

    F^h goes through BatchNorm and L2 normalisation per frame and then the attentive pooling: queries and keys are
    Linear(C, 512, bias=False) + BatchNorm, L2-normalised, the values are the inputs; softmax(Q K^T) over the frames,
    the results summed over the queries, L2-normalised. F^l goes through BatchNorm and L2 normalisation. The paper
    leaves all of this open; it is taken from the released code.

    A frame's weight is the mean of its column in the pooling's softmax. ``maps``: ``correlation`` ``[B, T, H, W]``
    (R of Eq. 2) and ``attention`` ``[B, T, T]`` (the pooling's softmax, query by key). ``supervised``, all
    L2-normalised: ``frames`` ``[B, T, C]``, ``pooled``, ``memory`` and ``global`` ``[B, C]``.

    Args:
        in_features: C.
        parts: what the embedding is made of, in this order, C channels each (the paper's Table 2): ``pooled`` (F^h),
            ``memory`` (F^l), ``global`` (F^g, L2-normalised), ``mean`` (the mean of the normalised frames, not
            normalised again). None: pooled, memory; released: memory, pooled, mean.
        directions: of TRL: ``forward``, ``backward`` or both (Table 5).
        enhancement: False: without the enhancement blocks (Table 3).
        memory: False: without the memory blocks (Table 3). Without both, only GCE is left (Table 2, "+ GCE").

    Raises:
        ValueError: unknown parts or directions.
    """

    needs_maps = True
    is_recurrent = True
    released = False
    default_parts: tuple[str, ...] = ("pooled", "memory")
    maps: Mapping[str, MapKind] = MappingProxyType(
        {
            "correlation": MapKind(("frames", "height", "width"), "unit", "correlation map R (Eq. 2)"),
            "attention": MapKind(("frames", "sources"), "share", "attentive pooling", over="sources"),
        }
    )

    def __init__(
        self,
        in_features: int,
        parts: Sequence[str] | None = None,
        directions: Sequence[str] = _DIRECTIONS,
        enhancement: bool = True,
        memory: bool = True,
    ):
        C = in_features
        parts = self.default_parts if parts is None else tuple(parts)
        if not parts or not set(parts) <= {"pooled", "memory", "global", "mean"}:
            raise ValueError(f"parts must name some of pooled, memory, global and mean, got {parts!r}.")
        super().__init__(C, len(parts) * C)
        self.parts = parts
        self.gce = GCE(C, self.released)
        self.trl = TRL(C, self.released, directions, enhancement, memory)
        if memory:
            both = len(directions) == 2
            title = "memory M_t (Eq. 8), mean over the channels" + ("" if both else f", {directions[0]}")
            axes = ("directions",) * both + ("frames", "height", "width")
            self.maps = {**self.maps, "memory": MapKind(axes, "amount", title)}
        self.frame_norm = masked.BatchNorm(C)
        self.memory_norm = masked.BatchNorm(C)
        self.query = nn.Linear(C, 512, bias=self.released)
        self.query_norm = masked.BatchNorm(512)
        self.key = nn.Linear(C, 512, bias=self.released)
        self.key_norm = masked.BatchNorm(512)

    streaming_reason = (
        "GCE compares every frame with the mean of all, and the backward direction starts at the last; embed clips"
    )

    def aggregate(self, features: Tensor, mask: Tensor, frames: Tensor | None) -> Details:
        R = self.gce(features, mask)
        high, low = self.trl(features * R, features * (1 - R), mask)  # Eqs. 3, 4
        high = masked.zero(F.normalize(self.frame_norm(masked.at_least_float32(high), mask), dim=2), mask)
        inputs = high.to(features.dtype)
        queries = F.normalize(self.query_norm(self.query(inputs), mask), dim=2)
        keys = F.normalize(self.key_norm(self.key(inputs), mask), dim=2)
        attention = masked.zero(masked.softmax(queries @ keys.transpose(1, 2), mask[:, None]), mask)
        weights = masked.mean(attention, mask)  # the sum over queries, up to a factor that normalisation cancels
        parts = {
            "pooled": F.normalize(masked.at_least_float32(weighted_sum(high, weights)), dim=1),
            "memory": F.normalize(self.memory_norm(masked.at_least_float32(low)), dim=1),
            "global": F.normalize(masked.at_least_float32(masked.mean(frame_vectors(features), mask)), dim=1),
            "mean": masked.mean(high, mask),
        }
        embedding = torch.cat([parts[name] for name in self.parts], 1)
        supervised = {"frames": high, **{name: parts[name] for name in ("pooled", "memory", "global")}}
        return Details(
            embedding, mask, weights, {"correlation": masked.zero(R, mask)[:, :, 0], "attention": attention}, supervised
        )

    def finer_maps(self, features: Tensor, mask: Tensor, frames: Tensor | None, details: Details) -> dict[str, Tensor]:
        """``memory`` ``[B, 2, T, H, W]``: what each direction, forward first, has accumulated when it has met a frame.

        The mean over the channels is ours: the paper's Fig. 4 shows "channel activation maps". Of one direction it is
        ``[B, T, H, W]``; without memory blocks there is none.
        """
        if self.trl.emu.res is None:
            return {}
        low = features * (1 - details.maps["correlation"][:, :, None])
        visits = self.trl.visits(mask)  # [B, T, G]
        B, _, G = visits.shape
        memory, steps = masked.mean(low, mask).repeat(1, G, 1, 1), []
        for step, visit in enumerate(visits.unbind(1)):
            met = low[torch.arange(B, device=low.device)[:, None], visit].flatten(1, 2)
            memory = self.trl.emu.remember(memory, met, step < mask.sum(1))
            steps.append(memory.unflatten(1, (G, -1)).mean(2))
        met, order = torch.stack(steps, 1), visits.argsort(1)  # steps in the order of the visits -> of the frames
        maps = [masked.zero(masked.take(met[:, :, g], order[..., g]), mask) for g in range(G)]
        if self.trl.directions == ("backward", "forward"):
            maps.reverse()
        return {"memory": torch.stack(maps, 1) if G == 2 else maps[0]}


class ReleasedGRLCriterion(Criterion):
    """GRL's criterion as its authors released it: OIM thrice, 20 x verification, soft-margin batch-hard triplet.

    Frames and the pooled feature share one OIM table, which takes up the pooled features of a step before its frames;
    the memory feature has its own. Of each, all probes (the even clips of a batch) come first, then all galleries. The
    losses' values are those of the tables as they stood before the step; the frames' gradient is taken with the table
    as the pooled features have just changed it, which is what the authors' backward pass comes to. With both, four
    optimizer steps agreed with theirs to 5e-13; without, they differed by more than the steps themselves (measured).
    Verification and triplet are on the pooled feature.

    Args:
        num_classes: identities in the training set.
        model: with a :class:`GRL` aggregator; read for its width.

    Raises:
        TypeError: a model with another aggregator.
    """

    weights = MappingProxyType({"verification": 20.0})
    wants_pairs = True

    def __init__(self, num_classes: int, model: nn.Module):
        super().__init__(num_classes)
        C = _features_of(model)
        self.high = OIMLoss(num_classes, C)
        self.low = OIMLoss(num_classes, C)
        self.verification = VerificationLoss(C)
        self.triplet = TripletLoss(margin=None)

    def terms(self, details: Details, labels: Tensor) -> dict[str, Tensor]:
        pooled = details.supervised["pooled"]
        gallery = torch.arange(len(labels), device=labels.device) % 2
        of_frames = (gallery + 2)[:, None].expand(details.mask.shape).flatten()
        return {
            "pooled": self.high(pooled, labels, turn=gallery),
            "frame": self.high(*_frames_of(details, labels), turn=of_frames, ahead=True),
            "video": self.low(details.supervised["memory"], labels, turn=gallery),
            "verification": self.verification(pooled, labels),
            "triplet": self.triplet(pooled, labels),
        }


@register_aggregator(
    "grl_released",
    criterion=ReleasedGRLCriterion,
    clip=_CLIP,
    last_stride=1,
    paper=PAPER,
    note="as in the code that its authors released",
)
class ReleasedGRL(GRL):
    """GRL as in the code that its authors released; options and outputs as in :class:`GRL`.

    It differs from the paper in GCE (see there), in Res (1x1 convolutions only), in the sum of the two directions
    instead of Eqs. 9 and 10, in biases of queries and keys, and in the embedding: memory, pooled, and the mean of the
    normalised frames, 3C. f1 and f2 are named as in the paper; the authors' state dict has them the other way round.
    The authors normalise queries and keys separately for probes and galleries in training; here BatchNorm runs once
    over the batch. Queries and keys start as theirs: Kaiming's uniform values over the outputs, biases 0.
    """

    released = True
    default_parts = ("memory", "pooled", "mean")

    def __init__(
        self,
        in_features: int,
        parts: Sequence[str] | None = None,
        directions: Sequence[str] = _DIRECTIONS,
        enhancement: bool = True,
        memory: bool = True,
    ):
        super().__init__(in_features, parts, directions, enhancement, memory)
        for layer in (self.query, self.key):
            nn.init.kaiming_uniform_(layer.weight, mode="fan_out")
            nn.init.zeros_(layer.bias)


def _features_of(model: nn.Module) -> int:
    """C of a model with a :class:`GRL` aggregator; a TypeError for others."""
    aggregator = aggregator_of(model)
    if not isinstance(aggregator, GRL):
        raise TypeError(f"the criteria 'grl' read what the aggregator GRL gives, got {type(aggregator).__name__}.")
    return aggregator.in_features


def _frames_of(details: Details, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The frame features of all clips, ``[B*T, C]``, with their labels and mask ``[B*T]``."""
    mask = details.mask
    return details.supervised["frames"].flatten(0, 1), labels[:, None].expand(mask.shape).flatten(), mask.flatten()
