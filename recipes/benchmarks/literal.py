"""The papers' formulas as printed: one plain function for each aggregator, to test and to measure the library against.

Each takes the parameters and the BatchNorm buffers of one of our aggregators, and maps ``[B, T, C, H, W]`` (LOGA:
images ``[B, T, 3, H', W']`` too), and returns the embedding. They are what a reader of the paper writes first: one
frame, one step, one direction after the other where the paper has an index, every tensor that the paper names, torch's
own BatchNorm. They are not made slow on purpose: within a step everything is a whole-tensor operation, and frames are
unbound once, so that the backward pass stacks them once.

Clips have no padding here; masks are the library's affair. Not every option has a literal form (see ``exists``).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from temporal_agg import masked
from temporal_agg.aggregators import Aggregator

FORMS: dict[str, Callable[..., Tensor]] = {}
_OPTIONS: dict[str, tuple[str, ...]] = {}


def _form(name: str, *options: str) -> Callable:
    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        FORMS[name], _OPTIONS[name] = function, options
        return function

    return register


def exists(aggregator: Aggregator) -> bool:
    """Whether there is a literal form of what ``create_aggregator`` built, with these options."""
    name, options = aggregator.config["name"], set(aggregator.config) - {"name", "in_features"}
    return name in FORMS and options <= set(_OPTIONS[name])


def prepared(aggregator: Aggregator) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The literal form of an aggregator for which one exists, ready to be measured.

    Returns:
        A function of features and frames, and the leaf tensors that it holds beside the aggregator's parameters: the
        weight of the ConvLSTM is one parameter in the literal form and two in ours, and is joined here beforehand.
    """
    name = aggregator.config["name"]
    if name == "gsta":
        weight = _joined_weight(aggregator.lstm).detach().requires_grad_()
        return partial(gsta, aggregator, weight=weight), [weight]
    return partial(FORMS[name], aggregator), []


def _norm(norm: masked.BatchNorm, x: Tensor) -> Tensor:
    """torch's BatchNorm on ``[N, C, ...]``, the running statistics included."""
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps
    )


def _norm_frames(norm: masked.BatchNorm, x: Tensor) -> Tensor:
    """The same on ``[B, T, C]``."""
    return _norm(norm, x.flatten(0, 1)).view_as(x)


def _layers(layers: nn.Module, x: Tensor) -> Tensor:
    for layer in layers:
        x = _norm(layer, x) if isinstance(layer, masked.BatchNorm) else layer(x)
    return x


@_form("mean")
def mean(m: Aggregator, features: Tensor, frames: Tensor | None = None) -> Tensor:
    return features.mean((3, 4)).mean(1)


@_form("max")
def maximum(m: Aggregator, features: Tensor, frames: Tensor | None = None) -> Tensor:
    return features.mean((3, 4)).amax(1)


@_form("attention")
def attention(m: Aggregator, features: Tensor, frames: Tensor | None = None) -> Tensor:
    vectors = features.mean((3, 4))
    return (m.score(vectors).softmax(1) * vectors).sum(1)


@_form("lstm", "hidden_features")
def lstm(m: Aggregator, features: Tensor, frames: Tensor | None = None) -> Tensor:
    h = c = features.new_zeros(features.shape[0], m.num_features)
    outputs = []
    for x_t in features.mean((3, 4)).unbind(1):
        i, f, g, o = (m.input(x_t) + m.recurrent(h)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs).mean(0)


@_form("loga", "clip_length", "part_size", "quality", "scale")
def loga(m: Aggregator, features: Tensor, frames: Tensor | None = None) -> Tensor:
    images = features if m.quality == "features" else frames
    parts = m.laq.convolution(images.mean(2).flatten(2))  # Eq. 5: [B, T, M]
    w_l = m.laq.mlp(parts.mean(2)).relu().softmax(1)  # Eq. 6
    e = features.mean((3, 4))
    p = (w_l[..., None] * e).sum(1)  # Eq. 2
    q = _norm(m.gcq.query_norm, m.gcq.query(p))
    K = _norm_frames(m.gcq.key_norm, m.gcq.key(e))
    V = _norm_frames(m.gcq.value_norm, m.gcq.value(e))
    w_g = ((K @ q[..., None]) / (m.gcq.scale or 1)).softmax(1)  # Eq. 7: [B, T, 1]
    return p + m.fc((w_g * V).sum(1))  # Eqs. 8, 9


def _joined_weight(lstm: nn.Module) -> Tensor:
    return torch.cat([lstm.input.weight, lstm.recurrent.weight], 1)


@_form("gsta", "hidden_features")
def gsta(m: Aggregator, features: Tensor, frames: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """``weight``: of the convolution over [x_t, h_{t-1}]; None = put together here from the aggregator's two."""
    weight = _joined_weight(m.lstm) if weight is None else weight
    B, _, _, H, W = features.shape
    h = c = features.new_zeros(B, m.lstm.hidden_features, H, W)
    hidden = []
    for x_t in features.unbind(1):
        i, f, g, o = F.conv2d(torch.cat([x_t, h], 1), weight, m.lstm.input.bias, padding=1).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        hidden.append(h)
    h = torch.stack(hidden, 1).mean((3, 4))  # Eq. 6
    K = m.score(m.squeeze(h).relu()).softmax(1)  # Eq. 7
    return m.project((K * h).sum(1)) + features.mean((1, 3, 4))  # Eq. 8


def _pyramid(m: Aggregator, features: Tensor) -> Tensor:
    x = m.embed(features.mean((3, 4))).mT
    branches = [branch(x) for branch in m.dtp.branches]  # Eq. 5
    return torch.cat([x, *branches] if m.dtp.keep_input else branches, 1).mT  # Eqs. 2, 6


@_form("gltr", "branches", "embed_features", "normalize")
def gltr(m: Aggregator, features: Tensor, frames: Tensor | None = None) -> Tensor:
    x, tsa = _pyramid(m, features), m.tsa
    b = _norm_frames(tsa.b_norm, tsa.b(x)).relu()
    c = _norm_frames(tsa.c_norm, tsa.c(x)).relu()
    M = c @ b.mT  # M[s, t]
    if tsa.normalize == "softmax":
        M = M.softmax(1)
    return (tsa.restore(M.mT @ tsa.value(x)) + x).mean(1)  # Eqs. 7, 4


@_form("gltr_released", "embed_features")
def gltr_released(m: Aggregator, features: Tensor, frames: Tensor | None = None) -> Tensor:
    x, tsa = _pyramid(m, features), m.tsa
    relations = (tsa.theta(x) @ tsa.phi(x).mT).softmax(2)
    return (_norm_frames(tsa.restore_norm, tsa.restore(relations @ tsa.g(x))) + x).mean(1)


@_form("fgra", "num_regions", "reduced_features")
def fgra(m: Aggregator, features: Tensor, frames: Tensor | None = None) -> Tensor:
    vectors = features.mean((3, 4))
    pooled = (m.global_attention.score(vectors).softmax(1) * vectors).sum(1)
    templates = F.adaptive_avg_pool2d(features[:, 0], (m.num_regions, 1)).squeeze(3).mT  # [B, N_s, C]
    maps = features[:, :, None]
    M = templates[:, None, ..., None, None] * maps  # Eq. 1: [B, T, N_s, C, H, W]
    M = _norm(m.gam.norm, M.flatten(0, 2)).view_as(M).sigmoid()
    regions = (maps * M).mean((4, 5))  # Eq. 2
    scores = M.mean((4, 5))  # Eq. 5
    video = (scores.softmax(1) * regions).sum(1)  # Eqs. 4, 6
    weights = m.spatial.norm(m.spatial.conv(video.mT)).relu().mT.softmax(1)  # Eq. 7
    local = (weights * video).sum(1)  # Eq. 8
    return torch.cat([m.global_reduction(pooled), m.local_reduction(local)], 1)  # Eq. 9


def _correlation(gce: nn.Module, x: Tensor) -> Tensor:
    """Eqs. 1 and 2: R ``[B, T, 1, H, W]``."""
    clip = _layers(gce.embed, x.mean((1, 3, 4)))[:, None, :, None, None]  # Eq. 1
    clip = clip.expand(-1, x.shape[1], -1, *x.shape[3:])
    joined = torch.cat([x, clip] if gce.released else [clip, x], 2)
    weights = [gce.join.weight, gce.join_clip.weight[..., None, None]]
    weight = torch.cat(weights if gce.released else weights[::-1], 1)
    return _layers(gce.correlate, F.conv2d(joined.flatten(0, 1), weight)).sigmoid().unflatten(0, x.shape[:2])  # Eq. 2


def _residual_blocks(emu: nn.Module) -> list[list[Callable[[Tensor], Tensor]]]:
    """The layers of Res for each direction alone: ours hold all directions side by side."""
    G, blocks = emu.directions, []
    for layer in emu.res:
        if isinstance(layer, nn.Conv2d):
            weights = layer.weight.chunk(G)
            blocks.append([partial(F.conv2d, weight=weight, padding=layer.padding) for weight in weights])
        elif isinstance(layer, masked.BatchNorm):
            shares = zip(
                *(x.chunk(G) for x in (layer.running_mean, layer.running_var, layer.weight, layer.bias)), strict=True
            )
            blocks.append(
                [
                    partial(
                        F.batch_norm,
                        **dict(zip(("running_mean", "running_var", "weight", "bias"), share, strict=True)),
                        training=layer.training,
                        momentum=layer.momentum,
                        eps=layer.eps,
                    )
                    for share in shares
                ]
            )
        else:
            blocks.append([layer] * G)
    return [list(direction) for direction in zip(*blocks, strict=True)]


@_form("grl", "directions", "parts")
@_form("grl_released", "directions", "parts")
def grl(m: Aggregator, features: Tensor, frames: Tensor | None = None) -> Tensor:
    R, x = _correlation(m.gce, features).unbind(1), features.unbind(1)
    high = [x_t * R_t for x_t, R_t in zip(x, R, strict=True)]  # Eq. 3
    low = [x_t * (1 - R_t) for x_t, R_t in zip(x, R, strict=True)]  # Eq. 4
    steps = range(len(x))
    emu, enhanced, memories = m.trl.emu, [[] for _ in steps], []
    for g, res in enumerate(_residual_blocks(emu)):
        memory = sum(low) / len(low)  # M_0
        for t in steps if m.trl.directions[g] == "forward" else reversed(steps):
            D = (emu.f2[g](memory).relu() - emu.f1[g](high[t]).relu()).square()  # Eq. 5
            a = emu.mlp[g](D.mean((2, 3))).sigmoid()  # Eq. 6
            enhanced[t].append(((1 + a)[..., None, None] * high[t]).mean((2, 3)))  # Eq. 7, GAP
            total = y = memory + low[t]
            for layer in res:
                y = layer(y)
            memory = (y + total).relu()  # Eq. 8
        memories.append(memory.mean((2, 3)))
    if m.released:
        vectors = torch.stack([sum(directions) for directions in enhanced], 1)
        memory = sum(memories)
    else:
        vectors = torch.stack([m.trl.join_high(torch.cat(directions, 1)) for directions in enhanced], 1)  # Eq. 9
        memory = m.trl.join_low(torch.cat(memories, 1))  # Eq. 10

    vectors = F.normalize(_norm_frames(m.frame_norm, vectors), dim=2)
    Q = F.normalize(_norm_frames(m.query_norm, m.query(vectors)), dim=2)
    K = F.normalize(_norm_frames(m.key_norm, m.key(vectors)), dim=2)
    parts = {
        "pooled": F.normalize(((Q @ K.mT).softmax(2) @ vectors).sum(1), dim=1),
        "memory": F.normalize(_norm(m.memory_norm, memory), dim=1),
        "global": F.normalize(features.mean((1, 3, 4)), dim=1),
        "mean": vectors.mean(1),
    }
    return torch.cat([parts[name] for name in m.parts], 1)
