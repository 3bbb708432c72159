"""LOGA against loops written from the paper's equations (float64, gradients included)."""

import math

import pytest
import torch
from helpers import gradients, randomize
from torch import nn

from temporal_agg import create_aggregator
from temporal_agg.aggregators.loga import GCQ, LAQ, LOGA
from temporal_agg.aggregators.registry import registry_entry

B, T, D, S, H, W = 3, 4, 6, 4, 9, 5  # 45 pixels: 11 parts of 4, one pixel left over
MASK = torch.tensor([[True, True, True, True], [False, True, False, True], [True, False, True, True]])
exact = {"rtol": 1e-9, "atol": 1e-9}


def clips(seed=0, frame=(H, W)):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(B, T, D, 3, 2, generator=g, dtype=torch.float64)
    return features, torch.randn(B, T, 3, *frame, generator=g, dtype=torch.float64)


def softmax_over(values, real):
    """Softmax of a list of scalars over the real frames."""
    exps = [v.exp() if r else v.new_zeros(()) for v, r in zip(values, real, strict=True)]
    return torch.stack(exps) / sum(exps)


def literal_parts(laq, clip, real):
    """Eq. 5 for one clip [T, channels, H, W]: w~ [M, T]."""
    n, s = laq.clip_length, laq.part_size
    kernel, bias = laq.convolution.weight, laq.convolution.bias  # [out frame, in frame, place in the part]
    stack = [(frame.mean(0) if r else 0 * frame[0]).flatten() for frame, r in zip(clip, real, strict=True)]
    rows = []
    for m in range(len(stack[0]) // s):
        part = [row[m * s : (m + 1) * s] for row in stack]
        rows.append(torch.stack([bias[o] + sum((kernel[o, i] * part[i]).sum() for i in range(n)) for o in range(n)]))
    return torch.stack(rows)


def literal_laq(laq, frames, mask):
    out = []
    for clip, real in zip(frames, mask, strict=True):
        pooled = literal_parts(laq, clip, real).mean(0)
        scores = [(w @ pooled + b).clamp(min=0) for w, b in zip(laq.mlp.weight, laq.mlp.bias, strict=True)]
        out.append(softmax_over(scores, real))  # Eq. 6
    return torch.stack(out)


def literal_norm(norm, rows, training):
    """BatchNorm of a list of vectors [D]."""
    x = torch.stack(rows)
    mean, var = (x.mean(0), x.var(0, unbiased=False)) if training else (norm.running_mean, norm.running_var)
    y = (x - mean) / (var + norm.eps).sqrt() * norm.weight
    return list(y if norm.bias is None else y + norm.bias)


def literal_gcq(gcq, prototypes, embeddings, mask):
    """Eqs. 7 and 8; ``prototypes`` [B, D], ``embeddings`` [B, T, D]."""
    real = [(b, t) for b in range(len(mask)) for t in range(mask.shape[1]) if mask[b, t]]
    q = literal_norm(gcq.query_norm, [gcq.query.weight @ p for p in prototypes], gcq.training)
    K = literal_norm(gcq.key_norm, [gcq.key.weight @ embeddings[i] for i in real], gcq.training)
    V = literal_norm(gcq.value_norm, [gcq.value.weight @ embeddings[i] for i in real], gcq.training)
    K, V = dict(zip(real, K, strict=True)), dict(zip(real, V, strict=True))
    weights, attended = [], []
    for b, row in enumerate(mask):
        logits = [K[b, t] @ q[b] / (gcq.scale or 1) if r else q[b].new_zeros(()) for t, r in enumerate(row)]
        w = softmax_over(logits, row)
        weights.append(w)
        attended.append(sum(w[t] * V[b, t] for t in range(len(row)) if row[t]))
    return torch.stack(weights), torch.stack(attended)


def literal_self_attention(gcq, x, mask):
    """Every real frame of x [B, T, D] attends to the real frames of its clip; results averaged over the queries."""
    real = [(b, t) for b in range(len(mask)) for t in range(mask.shape[1]) if mask[b, t]]
    q, K, V = (
        dict(zip(real, literal_norm(norm, [linear.weight @ x[i] for i in real], gcq.training), strict=True))
        for linear, norm in (
            (gcq.query, gcq.query_norm),
            (gcq.key, gcq.key_norm),
            (gcq.value, gcq.value_norm),
        )
    )
    weights, attended = [], []
    for b, row in enumerate(mask):
        ws, outs = [], []
        for t in range(len(row)):
            if row[t]:
                w = softmax_over([K[b, s] @ q[b, t] if row[s] else x.new_zeros(()) for s in range(len(row))], row)
                ws.append(w)
                outs.append(sum(w[s] * V[b, s] for s in range(len(row)) if row[s]))
        weights.append(sum(ws) / len(ws))
        attended.append(sum(outs) / len(outs))
    return torch.stack(weights), torch.stack(attended)


def literal_loga(loga, features, frames, mask):
    e = features.mean((3, 4))
    n = mask.sum(1)
    uniform = torch.stack([row.double() / row.sum() for row in mask])
    w_l = uniform if loga.assembly == "gcq" else literal_laq(loga.laq, frames, mask)  # Eq. 1
    p = torch.stack([sum(w_l[b, t] * e[b, t] for t in range(T) if mask[b, t]) for b in range(B)])  # Eq. 2
    if loga.assembly == "laq":
        return p, w_l
    if loga.assembly == "separately":
        m = torch.stack([e[b, mask[b]].sum(0) / n[b] for b in range(B)])
        w_g, attended = literal_gcq(loga.gcq, m, e, mask)
        x = torch.cat([p, torch.stack([m[b] + loga.fc(attended[b]) for b in range(B)])], 1)
    elif loga.assembly == "directly":
        w_g, attended = literal_self_attention(loga.gcq, w_l[..., None] * e, mask)
        x = torch.stack([p[b] + loga.fc(attended[b]) for b in range(B)])
    else:
        w_g, attended = literal_gcq(loga.gcq, p, e, mask)
        x = torch.stack([p[b] + loga.fc(attended[b]) for b in range(B)])  # Eq. 9
    return x, (w_l + w_g) / 2


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_laq_is_equations_5_and_6(masked):
    laq = randomize(LAQ(T, S).double())
    _, frames = clips()
    frames.requires_grad_()
    mask = MASK if masked else None
    parameters = [frames, *laq.parameters()]
    got, want = laq(frames, mask), literal_laq(laq, frames, MASK if masked else torch.ones(B, T, dtype=torch.bool))
    torch.testing.assert_close(got, want, **exact)
    torch.testing.assert_close(gradients(got, parameters), gradients(want, parameters), **exact)


def test_the_mean_before_the_convolution_is_the_mean_of_the_parts():
    laq = randomize(LAQ(T, S).double())
    _, frames = clips()
    frames.requires_grad_()
    parts = laq.part_scores(frames, MASK)
    assert parts.shape == (B, T, H * W // S)
    want = torch.stack([literal_parts(laq, clip, real) for clip, real in zip(frames, MASK, strict=True)]).mT
    torch.testing.assert_close(parts, want, **exact)
    scores = laq.mlp(parts.mean(2)).relu().masked_fill(~MASK, -math.inf)
    parameters = [frames, *laq.parameters()]
    got, want = laq(frames, MASK), scores.softmax(1)
    torch.testing.assert_close(got, want, **exact)
    torch.testing.assert_close(gradients(got, parameters), gradients(want, parameters), **exact)


def test_laq_sees_only_strided_means():
    """Shuffling the parts of a frame among themselves, each frame differently, changes no weight."""
    laq = randomize(LAQ(T, S).double())
    _, frames = clips()
    flat = frames.flatten(3)
    shuffled = flat.clone()
    g = torch.Generator().manual_seed(5)
    for b in range(B):
        for t in range(T):
            order = torch.randperm(11, generator=g)
            shuffled[b, t, :, :44] = flat[b, t, :, :44].unflatten(1, (11, S))[:, order].flatten(1)
    shuffled[..., 44] += 1  # the value left over
    shuffled = shuffled.view_as(frames)
    torch.testing.assert_close(laq(shuffled), laq(frames), **exact)
    assert not torch.allclose(laq.part_scores(shuffled), laq.part_scores(frames))


def test_no_unit_of_the_mlp_starts_dead():
    for seed in range(20):
        torch.manual_seed(seed)
        laq = LAQ()
        frames = torch.randn(8, 10, 3, 32, 16)
        strided = frames.mean(2).flatten(2)[..., :510].unflatten(2, (51, 10)).mean(2)
        assert (laq.mlp(laq.convolution(strided).squeeze(2)) > 0).any(0).all()


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("scale", [None, 2.5])
def test_gcq_is_equations_7_and_8(train, scale):
    gcq = randomize(GCQ(D, scale).double()).train(train)
    g = torch.Generator().manual_seed(1)
    p = torch.randn(B, D, generator=g, dtype=torch.float64, requires_grad=True)
    e = torch.randn(B, T, D, generator=g, dtype=torch.float64, requires_grad=True)
    parameters = [p, e, *gcq.parameters()]
    want = literal_gcq(gcq, p, e, MASK)
    want_gradients = gradients(torch.cat([*want], 1), parameters)
    got = gcq(p, e, MASK)
    torch.testing.assert_close(got, want, **exact)
    torch.testing.assert_close(gradients(torch.cat([*got], 1), parameters), want_gradients, **exact)


def test_the_statistics_of_gcq_are_those_of_real_frames():
    gcq = randomize(GCQ(D).double())
    e = torch.randn(B, T, D, dtype=torch.float64)
    before = gcq.key_norm.running_var.clone()
    gcq(torch.randn(B, D, dtype=torch.float64), e, MASK)
    real = e[MASK] @ gcq.key.weight.T
    torch.testing.assert_close(gcq.key_norm.running_var, 0.9 * before + 0.1 * real.var(0), **exact)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("assembly", ["associatively", "separately", "directly", "laq", "gcq"])
def test_loga_is_equations_1_to_9(assembly, train):
    loga = randomize(LOGA(D, T, S, assembly=assembly).double()).train(train)
    features, frames = clips()
    features.requires_grad_()
    parameters = [features, *loga.parameters()]
    want, want_weights = literal_loga(loga, features, frames, MASK)
    want_gradients = gradients(want, parameters)
    got = loga(features, MASK, frames=frames, return_details=True)
    assert got.embedding.shape == (B, loga.num_features)
    torch.testing.assert_close(got.embedding, want, **exact)
    torch.testing.assert_close(got.frame_weights, want_weights, **exact)
    torch.testing.assert_close(gradients(got.embedding, parameters), want_gradients, **exact)
    torch.testing.assert_close(sum(got.maps.values()) / len(got.maps), got.frame_weights, **exact)


@pytest.mark.parametrize("assembly", ["associatively", "separately", "directly", "laq", "gcq"])
def test_no_parameter_is_idle(assembly):
    """What algebra cancels (a bias before a BatchNorm, K's shift before the softmax) is not there."""
    loga = randomize(LOGA(D, T, S, assembly=assembly).double())
    features, frames = clips()
    loga(features, MASK, frames=frames).pow(3).sum().backward()
    idle = [k for k, p in loga.named_parameters() if p.grad.abs().max() < 1e-6]
    assert not idle


def test_what_the_softmax_of_k_would_cancel():
    """A shift of K moves nothing, so leaving it out loses nothing."""
    gcq = randomize(GCQ(D).double())
    p, e = torch.randn(B, D, dtype=torch.float64), torch.randn(B, T, D, dtype=torch.float64)
    want = gcq(p, e)
    gcq.key_norm.bias = nn.Parameter(torch.randn(D, dtype=torch.float64))
    torch.testing.assert_close(gcq(p, e), want, **exact)


def test_quality_from_feature_maps():
    loga = randomize(LOGA(D, T, S, quality="features").double()).eval()
    assert loga.needs_maps
    assert not loga.needs_frames
    features, _ = clips()
    details = loga(features, MASK, return_details=True)
    torch.testing.assert_close(details.maps["laq"], literal_laq(loga.laq, features, MASK), **exact)
    with pytest.raises(ValueError, match=r"H\*W >= part_size = 4.*got \[3, 4, 6, 3, 1\]"):
        loga(features[..., :1])


def test_gcq_alone_takes_any_length_and_no_images():
    loga = randomize(LOGA(D, assembly="gcq").double()).eval()
    features, _ = clips()
    mask = torch.tensor([[False, True, True, False]]).expand(B, T)
    torch.testing.assert_close(loga(features, mask), loga(features[:, 1:3]), **exact)


def test_frames_are_slots():
    """The same frames in other places of a padded clip are weighed by other parameters."""
    loga = randomize(LOGA(D, T, S).double()).eval()
    features, frames = clips()
    mask = torch.tensor([[True, True, True, False]]).expand(B, T)
    details = loga(features, mask, frames=frames, return_details=True)
    moved = loga(features.roll(1, 1), mask.roll(1, 1), frames=frames.roll(1, 1), return_details=True)
    assert not torch.allclose(moved.maps["laq"][:, 1:], details.maps["laq"][:, :3], atol=1e-3)


def test_printed_logits_saturate_and_the_scale_mends_it():
    """At D = 2048 the logits of an untrained GCQ have a standard deviation near sqrt(D) = 45."""
    torch.manual_seed(0)
    frames = torch.randn(16, 10, 2048)
    prototype = frames.mean(1)
    top = {}
    for scale in (None, 2048**0.5):
        weights, _ = GCQ(2048, scale)(prototype, frames)
        top[scale] = weights.max(1).values.mean()
    assert top[None] > 0.9
    assert top[2048**0.5] < 0.5


def test_real_size_and_parameter_count():
    D = 2048
    loga = create_aggregator("loga", D).eval()
    laq, gcq = (10 * 10 * 10 + 10) + (10 * 10 + 10), 3 * D * D + (2 * D + D + 2 * D)
    assert sum(p.numel() for p in loga.parameters()) == laq + gcq + D * D + D
    details = loga(torch.rand(1, 10, D, 16, 8), frames=torch.randn(1, 10, 3, 256, 128), return_details=True)
    assert details.embedding.shape == (1, D)
    assert loga.laq.part_scores(torch.randn(1, 10, 3, 256, 128)).shape == (1, 10, 3276)


def test_how_the_paper_cuts_tracklets():
    entry = registry_entry("loga")
    clip = entry.clip
    assert (clip.length, clip.stride, clip.train_sampling, clip.test_sampling) == (10, None, "adjacent", "dense")
    assert (clip.fill, clip.tail, clip.distance, entry.last_stride) == ("repeat", "fill", "cosine", 1)


def test_errors_say_what_to_do():
    features, frames = clips()
    with pytest.raises(ValueError, match="associatively, separately, directly, laq, gcq, got 'both'"):
        LOGA(D, assembly="both")
    with pytest.raises(ValueError, match="'frames' or 'features', got 'pixels'"):
        LOGA(D, quality="pixels")
    with pytest.raises(ValueError, match=r"\[B, 4, channels, H, W\] with H\*W >= part_size = 4, got \[3, 3, 3, 9, 5\]"):
        LAQ(T, S)(frames[:, 1:])
    with pytest.raises(ValueError, match=r"\[B, 4, channels, H, W\].*got \[3, 4, 45\]"):
        LAQ(T, S)(frames.mean(2).flatten(2))
    with pytest.raises(ValueError, match="at least two clips"):
        LOGA(D, T, S).double()(features[:1], frames=frames[:1])


@pytest.mark.parametrize("assembly", ["associatively", "gcq", "directly"])
def test_it_starts_as_the_prototype(assembly):
    """p = sum_i w_l,i e_i, whatever GCQ says; and the last layer gets a gradient at once."""
    torch.manual_seed(0)
    loga = create_aggregator("loga", 6, assembly=assembly)
    e, frames = torch.randn(3, 10, 6), torch.randn(3, 10, 3, 8, 4)
    details = loga(e, frames=frames, return_details=True)
    torch.testing.assert_close(details.embedding, torch.einsum("bt,btc->bc", details.maps["laq"], e))
    details.embedding.square().sum().backward()
    assert loga.fc.weight.grad.abs().sum() > 0


def test_scale_by_the_square_root():
    assert create_aggregator("loga", 16, scale="sqrt").gcq.scale == 4
    assert create_aggregator("loga", 16).gcq.scale is None
    for wrong in ("root", 0, -1.0):
        with pytest.raises(ValueError, match="None, 'sqrt' or a positive number"):
            create_aggregator("loga", 16, scale=wrong)


def test_what_the_scale_does_to_the_frame_vectors_gradient():
    """As printed the part of it that goes through the logits is far larger than the part through p."""
    shares = {}
    for scale in (None, "sqrt"):
        torch.manual_seed(0)
        loga = create_aggregator("loga", 512, assembly="gcq", scale=scale)
        nn.init.eye_(loga.fc.weight)
        e = torch.randn(8, 10, 512).abs().requires_grad_()
        weights, _ = loga.gcq(e.mean(1), e)
        logits_part = torch.autograd.grad((weights * torch.randn(8, 10)).sum(), e)[0].norm()
        shares[scale] = float(logits_part)
    assert shares[None] > 3 * shares["sqrt"]


def test_laq_with_a_nonlinearity_sees_more_than_brightness():
    """As printed, frames with the same strided means weigh the same whatever is in them; with the ReLU they do not."""
    torch.manual_seed(0)
    flat = torch.full((1, 2, 1, 4, 5), 0.5)
    busy = flat.clone()
    busy[:, :, :, 0::2], busy[:, :, :, 1::2] = 2.5, -1.5  # parts of 5 values: the means over the parts stay 0.5
    laq = LAQ(2, 5)
    torch.testing.assert_close(laq(busy), laq(flat))
    relu = LAQ(2, 5, "relu")
    relu.load_state_dict(laq.state_dict())
    assert (relu(busy) - relu(flat)).abs().max() > 1e-3
    scores = relu.part_scores(busy)
    assert (scores >= 0).all()
    torch.testing.assert_close(scores, laq.part_scores(busy).clamp(min=0))
    torch.testing.assert_close(relu(busy), relu.mlp(scores.mean(2)).relu().softmax(1))
    with pytest.raises(ValueError, match="None or 'relu', got 'tanh'"):
        LAQ(2, 5, "tanh")
