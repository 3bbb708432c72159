import copy

import pytest
import torch
from helpers import moved
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from temporal_agg import ClipConfig, create_aggregator
from temporal_agg.aggregators.fgra import FGRA, GAM, SpatialAttention, TemporalAlignment, TemporalAttention
from temporal_agg.aggregators.registry import registry_entry

B, T, N, C, H, W = 3, 4, 3, 4, 5, 2
MASK = torch.tensor([[False, True, True, False], [True, True, True, True], [False, False, False, True]])
TABLE_2 = {
    1: {"global_branch": False, "local_branch": "stripes", "temporal": "average", "spatial": "concatenation"},
    2: {"local_branch": None},
    3: {"local_branch": "stripes", "temporal": "average", "spatial": "concatenation"},
    4: {"temporal": "average", "spatial": "concatenation"},
    5: {"temporal": "attention", "spatial": "concatenation"},
    6: {"spatial": "concatenation"},  # 7 is 6 with another criterion
    8: {},
    9: {"temporal": "average"},  # no row of the table: 8 without the alignment scores
}


def same(got, want, **kwargs):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, **kwargs)


def random_maps(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.5).requires_grad_()


def literal_gam(maps, templates, mask, norm):
    """Eqs. 1, 2 and 5 by loops over the real frames; ``norm`` is an nn.BatchNorm2d."""
    at = [(b, t, i) for b, t in mask.nonzero().tolist() for i in range(templates.shape[1])]
    C = maps.shape[2]
    similarity = [F.conv2d(maps[b, t], templates[b, i].view(C, 1, 1, 1), groups=C) for b, t, i in at]  # Eq. 1
    similarity = norm(torch.stack(similarity)).sigmoid()
    regions = maps.new_zeros(*mask.shape, templates.shape[1], C)
    scores = torch.zeros_like(regions)
    for (b, t, i), M in zip(at, similarity, strict=True):
        for c in range(C):
            product = [maps[b, t, c, y, x] * M[c, y, x] for y in range(maps.shape[3]) for x in range(maps.shape[4])]
            regions[b, t, i, c] = sum(product) / len(product)  # Eq. 2
        scores[b, t, i] = M.mean((1, 2))  # Eq. 5
    return regions, scores


def as_batch_norm(norm, kind):
    """torch's own BatchNorm with the values of ``norm``."""
    other = kind(norm.num_features).double().train(norm.training)
    other.load_state_dict(norm.state_dict())
    return other


def real(x, mask):
    return torch.where(mask.view(mask.shape + (1,) * (x.dim() - 2)), x, 0)


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_gam_is_the_literal_form(train, masked):
    mask = MASK if masked else None
    all_real = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    gam = moved(GAM(C).double(), 0.3).train(train)
    norm = as_batch_norm(gam.norm, nn.BatchNorm2d)
    for step in range(2):  # the second with the running statistics of the first
        maps, templates = random_maps(B, T, C, 3, W, seed=step), random_maps(B, N, C, seed=10 + step)
        got = [real(x, all_real) for x in gam(maps, templates, mask)]
        want = literal_gam(maps, templates, all_real, norm)
        factors = [torch.linspace(-1, 2, want[0].numel(), dtype=torch.float64).view_as(x) for x in want]
        inputs = [[maps, templates, module.weight, module.bias] for module in (gam.norm, norm)]
        same(got, list(want))
        gradients = [
            torch.autograd.grad(sum((f * x.square()).sum() for f, x in zip(factors, out, strict=True)), to)
            for out, to in zip((got, want), inputs, strict=True)
        ]
        same(*gradients)
        same(gam.norm.state_dict(), norm.state_dict())


def test_gam_moments_keep_their_digits():
    """Activations with mean / std = 30, where float32's E[x^2] - E[x]^2 would be wrong in the fourth digit."""
    gam = GAM(C).double().train()
    maps, templates = 30 + random_maps(B, T, C, H, W).detach(), random_maps(B, N, C).detach()
    double = copy.deepcopy(gam)
    single = copy.deepcopy(gam).float()
    for module, dtype in ((double, torch.float64), (single, torch.float32)):
        module.norm.momentum = 1.0
        module(maps.to(dtype), templates.to(dtype))
    torch.testing.assert_close(single.norm.running_var.double(), double.norm.running_var, rtol=2e-6, atol=0)


class Allocations(TorchDispatchMode):
    """The sizes of all tensors that operations make, views and in-place results left out."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if all(r.alias_info is None for r in func._schema.returns):
            self.sizes += [x.numel() for x in torch.utils._pytree.tree_flatten(out)[0] if isinstance(x, torch.Tensor)]
        return out


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_gam_memory_does_not_grow_with_the_regions(train):
    """No tensor larger than the maps is made; as many of that size are made, and kept, for 8 regions as for 1."""
    made, kept = [], []
    for regions in (1, 8):
        gam, maps = GAM(C).double().train(train), random_maps(B, T, C, 16, 8)
        saved = {}

        def keep(x, saved=saved):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with Allocations() as allocations, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            sum(x.sum() for x in gam(maps, random_maps(B, regions, C))).backward()
        assert max(allocations.sizes) == maps.numel()
        made.append(allocations.sizes.count(maps.numel()))
        kept.append(sum(saved.values()) - 8 * maps.numel())
    assert made[0] == made[1]
    assert kept[1] - kept[0] < 7 * 16 * 8 * B * T * C  # 7 regions, at most 16 float64 vectors a frame
    assert kept[1] < 8 * 16 * 8 * B * T * C


def test_gam_half_precision():
    gam = moved(GAM(C), 0.3).train()
    maps, templates = random_maps(B, T, C, H, W).detach().float(), random_maps(B, N, C).detach().float()
    maps, templates = maps.bfloat16(), templates.bfloat16()
    want_regions, want_scores = copy.deepcopy(gam)(maps.float(), templates.float(), MASK)
    maps.requires_grad_()
    regions, scores = gam(maps, templates, MASK)
    assert regions.dtype == torch.bfloat16
    torch.testing.assert_close(scores, want_scores)
    torch.testing.assert_close(regions, want_regions.bfloat16())
    regions.sum().backward()
    assert maps.grad.dtype == torch.bfloat16
    assert maps.grad.isfinite().all()


def literal_stripes(frame):
    """Stripe i of N covers the rows floor(i H / N) to ceil((i + 1) H / N)."""
    rows = frame.shape[1]
    return torch.stack([frame[:, i * rows // N : -(-(i + 1) * rows // N)].mean((1, 2)) for i in range(N)])


def softmax(scores):
    exponentials = [s.exp() for s in scores]
    return [e / sum(exponentials) for e in exponentials]


def literal_fgra(model, features, mask):
    """The embedding, frame weights, templates and regions, clip by clip and frame by frame."""
    real_frames = [[t for t in range(mask.shape[1]) if mask[b, t]] for b in range(len(mask))]
    templates = torch.stack([literal_stripes(features[b, ts[0]]) for b, ts in enumerate(real_frames)])
    scores = None
    if model.gam is not None:
        regions, scores = literal_gam(features, templates, mask, as_batch_norm(model.gam.norm, nn.BatchNorm2d))
    else:
        regions = torch.stack([torch.stack([literal_stripes(frame) for frame in clip]) for clip in features])

    global_vectors, local_vectors, frame_weights = [], [], torch.zeros(mask.shape, dtype=torch.float64)
    for b, ts in enumerate(real_frames):
        if model.global_attention is not None:
            frames = [features[b, t].mean((1, 2)) for t in ts]
            weights = softmax([frame @ model.global_attention.score.weight[0] for frame in frames])
            global_vectors.append(model.global_reduction(sum(w * x for w, x in zip(weights, frames, strict=True))))
            for t, w in zip(ts, weights, strict=True):
                frame_weights[b, t] = w
        if model.local_branch is not None:
            video = []
            for i in range(N):
                if isinstance(model.temporal, TemporalAlignment):
                    weights = softmax([scores[b, t, i] for t in ts])  # Eq. 4
                elif model.temporal is not None:
                    weights = softmax([regions[b, t, i] @ model.temporal.score.weight[0] for t in ts])
                else:
                    weights = [torch.tensor(1 / len(ts), dtype=torch.float64)] * len(ts)
                video.append(sum(w * regions[b, t, i] for w, t in zip(weights, ts, strict=True)))  # Eq. 6
                if model.global_attention is None:
                    for t, w in zip(ts, weights, strict=True):
                        frame_weights[b, t] += w.mean() / N
            local_vectors.append(torch.stack(video))
    parts = [torch.stack(global_vectors)] if global_vectors else []
    if local_vectors and model.spatial is not None:
        weight = model.spatial.conv.weight[0]  # [C, 3]
        empty = torch.zeros(C, dtype=torch.float64)
        convolved = []
        for video in local_vectors:
            padded = [empty, *video, empty]
            convolved.append(torch.stack([sum(padded[i + k] @ weight[:, k] for k in range(3)) for i in range(N)]))
        attention = as_batch_norm(model.spatial.norm, nn.BatchNorm1d)(torch.stack(convolved)[:, None])[:, 0].relu()
        for b, video in enumerate(local_vectors):
            weights = softmax(list(attention[b]))  # Eq. 7
            local_vectors[b] = model.local_reduction(sum(w * x for w, x in zip(weights, video, strict=True)))  # Eq. 8
        parts.append(torch.stack(local_vectors))
    elif local_vectors:
        parts.append(torch.stack([torch.cat([model.local_reduction(x) for x in video]) for video in local_vectors]))
    return torch.cat(parts, 1), frame_weights, templates, regions  # Eq. 9


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("row", TABLE_2)
def test_fgra_is_the_literal_form(row, train):
    model = FGRA(C, num_regions=N, reduced_features=5, **TABLE_2[row])
    model = moved(model.double(), 0.3).train(train)
    vectors = {1: N, 2: 1, 3: 1 + N, 4: 1 + N, 5: 1 + N, 6: 1 + N, 8: 2, 9: 2}[row]
    assert model.num_features == 5 * vectors
    features = random_maps(B, T, C, H, W)
    want, frame_weights, templates, regions = literal_fgra(model, features, MASK)
    details = model(features, MASK, return_details=True)
    same(details.embedding, want)
    same(details.frame_weights, frame_weights)
    if model.gam is not None:
        same(details.supervised, {"templates": templates, "regions": regions})
    else:
        assert details.supervised == {}
    if row != 2:
        same(details.maps["region_scores"].sum(1), torch.ones(B, N, dtype=torch.float64))
    if model.spatial is not None:
        same(details.maps["region_weights"].sum(1), torch.ones(B, dtype=torch.float64))
    factor = torch.linspace(-1, 2, want.numel(), dtype=torch.float64).view_as(want)
    # The literal norms are copies: their gradients are for test_gam_is_the_literal_form.
    to = [features, *(p for name, p in model.named_parameters() if "norm" not in name)]
    same(*(torch.autograd.grad((factor * x.square()).sum(), to) for x in (details.embedding, want)))


def test_the_template_is_the_first_real_frame():
    model = FGRA(C, num_regions=N).double().eval()
    features = random_maps(B, T, C, H, W)
    for b, first in enumerate((1, 0, 3)):
        templates = model(features, MASK, return_details=True).supervised["templates"]
        gradient = torch.autograd.grad(templates[b].sum(), features)[0]
        assert gradient.flatten(2).any(2).nonzero().tolist() == [[b, first]]


def test_parts_on_their_own():
    regions, scores = random_maps(B, T, N, C), random_maps(B, T, N, C, seed=1)
    pooled, weights = TemporalAlignment()(regions, scores, MASK)
    assert pooled.shape == (B, N, C)
    assert (weights[~MASK] == 0).all()
    same(weights[2, 3], torch.ones(N, C, dtype=torch.float64))  # the clip with one real frame
    attention = TemporalAttention(C).double()
    pooled, weights = attention(regions, MASK)
    for i in range(N):
        same((pooled[:, i], weights[:, :, i]), attention(regions[:, :, i], MASK))
    spatial = SpatialAttention(C).double().eval()
    same(spatial(regions[:, 0, :1]), (regions[:, 0, 0], torch.ones(B, 1, dtype=torch.float64)))


def test_real_size():
    model = create_aggregator("fgra", 2048).train()
    assert model.num_features == 2048
    # scorer + two reductions + two norms + convolution
    assert sum(p.numel() for p in model.parameters()) == 2048 + 2 * (2048 + 1) * 1024 + 2 * 2048 + 2 + 3 * 2048
    details = model(torch.rand(2, 2, 2048, 8, 4), return_details=True)
    assert details.embedding.shape == (2, 2048)
    assert details.supervised["regions"].shape == (2, 2, 4, 2048)
    details.embedding.sum().backward()


def test_clips_are_the_papers():
    entry = registry_entry("fgra")
    clip = ClipConfig(
        length=6,
        stride=3,
        train_sampling="random",
        test_sampling="dense",
        fill="mask",
        tail="shift",
        distance="cosine",
    )
    assert (entry.clip, entry.last_stride) == (clip, 2)


def test_errors_say_what_came():
    for options, message in (
        ({"local_branch": "parts"}, "local_branch must be one of"),
        ({"temporal": "score"}, "temporal must be one of"),
        ({"spatial": "mean"}, "spatial must be one of"),
        ({"num_regions": 0}, "num_regions"),
        ({"global_branch": False, "local_branch": None}, "needs a branch"),
        ({"local_branch": "stripes"}, "no alignment score"),
    ):
        with pytest.raises(ValueError, match=message):
            FGRA(C, **options)
    gam = GAM(C)
    with pytest.raises(ValueError, match=r"got \[2, 3, 4, 4, 2\] and \[3, 4, 4\]"):
        gam(torch.rand(2, 3, C, 4, 2), torch.rand(3, 4, C))
    with pytest.raises(ValueError, match="more than one value per channel"):
        gam(torch.rand(1, 1, C, 1, 1), torch.rand(1, 1, C))
    assert gam.eval()(torch.rand(1, 1, C, 1, 1), torch.rand(1, 1, C))[0].shape == (1, 1, 1, C)


@pytest.mark.parametrize(
    "options",
    [
        {"global_branch": False},
        {"local_branch": None},
        {"local_branch": "stripes", "temporal": "average", "spatial": "concatenation"},
        {"local_branch": "stripes", "temporal": "attention"},
        {"temporal": "average"},
        {"temporal": "attention", "spatial": "concatenation"},
    ],
    ids=str,
)
def test_every_row_streams(options):
    torch.manual_seed(0)
    fgra = create_aggregator("fgra", 8, num_regions=3, reduced_features=5, **options).double().eval()
    features, state = torch.rand(2, 6, 8, 6, 2).double(), fgra.begin(2)
    for piece in features.split((1, 3, 2), 1):
        state = fgra.update(state, piece)
    torch.testing.assert_close(fgra.read(state).embedding, fgra(features), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"call .eval\(\)"):
        fgra.train().begin(2)
