"""GLTR against loops written from the paper's equations, and its released form against torch's own layers."""

import pytest
import torch
from helpers import gradients, randomize
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from temporal_agg import create_aggregator
from temporal_agg.aggregators.gltr import DTP, GLTR, TSA, ReleasedTSA
from temporal_agg.aggregators.registry import registry_entry

B, T, C, d = 3, 7, 5, 4
COUNTS = (7, 1, 4)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0, 1]], dtype=torch.bool)
exact = {"rtol": 1e-9, "atol": 1e-9}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def literal_dtp(dtp, clip):
    """Eqs. 5 and 6 for the real frames of one clip, a list of vectors; read as centred, zero beyond the ends."""
    n = len(clip)

    def at(frames, t):
        return frames[t] if 0 <= t < len(frames) else torch.zeros_like(frames[0])

    out = [[x] if dtp.keep_input else [] for x in clip]
    for r, branch in zip(dtp.rates, dtp.branches, strict=True):
        if dtp.kind == "pooling":
            source = [sum(clip[s : s + r]) / len(clip[s : s + r]) for s in range(0, n, r)]
            step, reach = 1, 1
        else:
            source = clip
            step, reach = (r, 1) if dtp.kind == "dilated" else (1, r)
        values = []
        for t in range(len(source)):
            y = 0 if branch.bias is None else branch.bias
            for i in range(-reach, reach + 1):
                y = y + branch.weight[:, :, i + reach] @ at(source, t + step * i)
            values.append(y)
        for t in range(n):
            out[t].append(values[t // r] if dtp.kind == "pooling" else values[t])
    return [torch.cat(parts) for parts in out]


def literal_norm(norm, clips, training):
    x = torch.stack([v for clip in clips for v in clip])
    mean, var = (x.mean(0), x.var(0, unbiased=False)) if training else (norm.running_mean, norm.running_var)
    return [[(v - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias for v in clip] for clip in clips]


def literal_tsa(tsa, clips):
    """Eq. 7 for lists of vectors; also each clip's M[s][t]."""

    def norm_relu(weight, norm):
        normed = literal_norm(norm, [[weight @ v for v in x] for x in clips], tsa.training)
        return [[v.clamp(min=0) for v in x] for x in normed]

    b, c = norm_relu(tsa.b.weight, tsa.b_norm), norm_relu(tsa.c.weight, tsa.c_norm)
    out, masks = [], []
    for x, b_i, c_i in zip(clips, b, c, strict=True):
        n = range(len(x))
        M = [[c_i[s] @ b_i[t] for t in n] for s in n]
        if tsa.normalize == "softmax":
            totals = [sum(M[s][t].exp() for s in n) for t in n]
            M = [[M[s][t].exp() / totals[t] for t in n] for s in n]
        value = [tsa.value(v) for v in x]
        out.append([tsa.restore(sum(value[s] * M[s][t] for s in n)) + x[t] for t in n])
        masks.append(M)
    return out, masks


def split(x, mask=MASK):
    return [list(clip[real].unbind(0)) for clip, real in zip(x, mask, strict=True)]


def scatter(clips, mask=MASK):
    out = torch.zeros(*mask.shape, len(clips[0][0]), dtype=torch.float64)
    return out.masked_scatter(mask[..., None], torch.stack([v for clip in clips for v in clip]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rates": (1, 2, 3), "bias": False, "keep_input": True},
        {"kind": "undilated"},
        {"kind": "pooling"},
        {"rates": (3,)},
    ],
    ids=str,
)
def test_dtp_is_equations_5_and_6(options):
    dtp = randomize(DTP(d, **options).double())
    x = random(B, T, d)
    want = scatter([literal_dtp(dtp, clip) for clip in split(x)])
    got = dtp(x, MASK)
    assert got.shape == (B, T, dtp.num_features)
    torch.testing.assert_close(got, want, **exact)
    parameters = [x, *dtp.parameters()]
    torch.testing.assert_close(gradients(got, parameters), gradients(want, parameters), **exact)
    torch.testing.assert_close(dtp(x), scatter([literal_dtp(dtp, list(clip)) for clip in x], MASK | True), **exact)


@pytest.mark.parametrize(("kind", "kernels"), [("dilated", [3, 3, 3]), ("undilated", [3, 5, 9])])
def test_both_pyramids_have_the_same_field(kind, kernels):
    """The paper's example: the third undilated branch is 9 frames wide."""
    dtp = DTP(d, kind=kind)
    assert [branch.kernel_size[0] for branch in dtp.branches] == kernels
    x = torch.randn(1, 21, d, requires_grad=True)
    for n, r in enumerate(dtp.rates):
        seen = torch.autograd.grad(dtp(x)[0, 10, n * d : (n + 1) * d].sum(), x)[0].abs().sum((0, 2)).nonzero().flatten()
        assert (seen.min(), seen.max()) == (10 - r, 10 + r)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("normalize", ["softmax", "none"])
def test_tsa_is_equation_7_and_its_mean_is_taken_first(normalize, train):
    tsa = randomize(TSA(6, normalize=normalize).double()).train(train)
    x = random(B, T, 6)
    parameters = [x, *tsa.parameters()]
    clips, masks = literal_tsa(tsa, split(x))
    want = scatter(clips)
    torch.testing.assert_close(tsa(x, MASK), want, **exact)
    torch.testing.assert_close(gradients(tsa(x, MASK), parameters), gradients(want, parameters), **exact)

    M = tsa.relations(x, MASK)
    for b, literal in enumerate(masks):
        inside = M[b][MASK[b]][:, MASK[b]]
        torch.testing.assert_close(inside, torch.stack([torch.stack(row) for row in literal]), **exact)
        torch.testing.assert_close(M[b].sum(), inside.sum(), **exact)  # 0 at padding
    want = torch.stack([sum(clip) / len(clip) for clip in clips])  # Eq. 4
    got = tsa.mean(x, MASK)[0]
    torch.testing.assert_close(got, want, **exact)
    torch.testing.assert_close(gradients(got, parameters), gradients(want, parameters), **exact)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtp", [False, True], ids=["", "DTP"])
@pytest.mark.parametrize("tsa", [False, True], ids=["", "TSA"])
def test_gltr_is_the_mean_of_tsa_of_dtp(train, dtp, tsa):
    """And the rows of the paper's Table 2, where one or both are left out."""
    gltr = randomize(GLTR(C, d, 2, dtp=dtp, tsa=tsa).double()).train(train)
    assert gltr.num_features == (2 * d if dtp else d)
    maps = random(B, T, C, 2, 3)
    clips = [[gltr.embed(v.mean((1, 2))) for v in clip] for clip in split(maps)]
    if dtp:
        clips = [literal_dtp(gltr.dtp, clip) for clip in clips]  # Eq. 2
    masks = [[[1.0] * len(clip) for _ in clip] for clip in clips]
    if tsa:
        clips, masks = literal_tsa(gltr.tsa, clips)  # Eq. 3
    want = torch.stack([sum(clip) / len(clip) for clip in clips])  # Eq. 4
    parameters = [maps, *gltr.parameters()]
    want_gradients = gradients(want, parameters)
    got = gltr(maps, MASK, return_details=True)
    torch.testing.assert_close(got.embedding, want, **exact)
    torch.testing.assert_close(gradients(got.embedding, parameters), want_gradients, **exact)
    for b, M in enumerate(masks):
        m = torch.stack([torch.as_tensor(sum(row), dtype=torch.float64) for row in M])  # Eq. 8
        torch.testing.assert_close(got.frame_weights[b, MASK[b]], m / m.sum(), **exact)
    assert {key: x.shape for key, x in got.maps.items()} == ({"tsa": (B, T, T)} if tsa else {})


def test_frame_weights_are_uniform_when_nothing_is_given():
    gltr = GLTR(C, d, normalize="none").eval()
    with torch.no_grad():
        gltr.tsa.b_norm.weight.zero_()
        gltr.tsa.b_norm.bias.fill_(-1)  # the ReLU behind it lets nothing through
    details = gltr(torch.randn(B, T, C), MASK, return_details=True)
    assert details.maps["tsa"].abs().sum() == 0
    torch.testing.assert_close(details.frame_weights, MASK / MASK.sum(1, keepdim=True))


@pytest.mark.parametrize("name", ["gltr", "gltr_released"])
def test_attention_starts_as_the_identity(name):
    torch.manual_seed(0)
    gltr = create_aggregator(name, C, embed_features=d)
    x = torch.randn(B, T, d)
    refined = gltr.dtp(x, MASK)
    torch.testing.assert_close(gltr.tsa(refined, MASK), refined)
    gltr(torch.randn(B, T, C)).square().sum().backward()
    moving = {k for k, p in gltr.tsa.named_parameters() if p.grad.abs().sum() > 0}
    assert moving == (
        {"restore.weight", "restore.bias"} if name == "gltr" else {"restore_norm.weight", "restore_norm.bias"}
    )


@pytest.mark.parametrize("options", [{}, {"dtp": False}, {"tsa": False}], ids=str)
def test_no_parameter_of_the_paper_reading_is_idle(options):
    gltr = randomize(GLTR(C, 3 * d, 2, **options).double())
    gltr(random(B, T, C), MASK).pow(3).sum().backward()
    idle = [k for k, p in gltr.named_parameters() if p.grad.abs().max() < 1e-6]
    assert not idle


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_released_form_in_torch_layers(train):
    """The same weights in nn.Conv1d and nn.BatchNorm1d, on clips without padding."""
    gltr = randomize(create_aggregator("gltr_released", C, embed_features=d).double()).train(train)
    x = random(B, T, C)

    def conv(linear):
        return lambda v: F.conv1d(v, linear.weight[..., None], linear.bias)

    tsa = gltr.tsa
    norm = nn.BatchNorm1d(4 * d).double().train(train)
    norm.load_state_dict(tsa.restore_norm.state_dict())
    f = gltr.embed(x).transpose(1, 2)
    branches = [F.conv1d(f, gltr.dtp.branches[r - 1].weight, padding=r, dilation=r) for r in (1, 2, 3)]
    f = torch.cat([f, *branches], 1)
    attention = torch.bmm(conv(tsa.theta)(f).transpose(1, 2), conv(tsa.phi)(f)).softmax(-1)  # [B, target, source]
    y = torch.bmm(attention, conv(tsa.g)(f).transpose(1, 2)).transpose(1, 2)
    want = (norm(conv(tsa.restore)(y)) + f).mean(2)
    parameters = [x, *(p for k, p in gltr.named_parameters() if "restore_norm" not in k)]
    want_gradients = gradients(want, parameters)
    got = gltr(x, return_details=True)
    torch.testing.assert_close(got.embedding, want, **exact)
    torch.testing.assert_close(gradients(got.embedding, parameters), want_gradients, **exact)
    torch.testing.assert_close(got.maps["tsa"], attention.mT, **exact)
    torch.testing.assert_close(got.frame_weights, attention.mean(1), **exact)
    torch.testing.assert_close(tsa.restore_norm.running_var, norm.running_var, **exact)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_released_attention_is_batched_over_real_frames_only(train):
    tsa = randomize(ReleasedTSA(6).double()).train(train)
    x = random(B, T, 6)
    rows, shortcuts = [], []
    for clip in split(x):
        clip = torch.stack(clip)
        weights = (tsa.theta(clip) @ tsa.phi(clip).T).softmax(1)
        rows.append(list(tsa.restore(weights @ tsa.g(clip)).unbind(0)))
        shortcuts.append(list(clip.unbind(0)))
    normed = literal_norm(tsa.restore_norm, rows, train)
    want = scatter([[u + v for u, v in zip(a, b, strict=True)] for a, b in zip(normed, shortcuts, strict=True)])
    torch.testing.assert_close(tsa(x, MASK), want, **exact)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "options",
    [
        {"pyramid": "undilated"},
        {"pyramid": "pooling"},
        {"normalize": "none"},
        {"branches": 1},
        {"dtp": False},
        {"tsa": False},
        {"dtp": False, "tsa": False},
    ],
    ids=str,
)
def test_options_keep_the_mask_rule(options, train):
    """Frames in front, and the same frames with holes between them."""
    gltr = randomize(GLTR(C, d, **options).double()).train(train)
    x = random(B, T, C).detach()
    front = torch.arange(T) < torch.tensor(COUNTS)[:, None]
    spread = torch.zeros_like(x).masked_scatter(MASK[..., None], x[front])
    torch.testing.assert_close(gltr(spread, MASK), gltr(x, front), **exact)


def test_real_size_and_parameter_counts():
    x = torch.rand(1, 40, 2048, 8, 4)
    gltr, released = (create_aggregator(name, 2048).eval() for name in ("gltr", "gltr_released"))
    embed = 2048 * 128 + 128
    N = 3 * 128
    tsa = 2 * (N * N // 2 + N) + (N * N // 2 + N // 2) + (N * N // 2 + N)
    assert sum(p.numel() for p in gltr.parameters()) == embed + 3 * (128 * 128 * 3 + 128) + tsa
    non_local = 3 * (512 * 256 + 256) + (256 * 512 + 512) + 2 * 512
    assert sum(p.numel() for p in released.parameters()) == embed + 3 * 128 * 128 * 3 + non_local
    assert gltr(x).shape == (1, 384)
    assert released(x).shape == (1, 512)


def test_released_initial_values():
    torch.manual_seed(0)
    released = create_aggregator("gltr_released", 512)
    for branch in released.dtp.branches:
        assert 0.9e-3 < branch.weight.std() < 1.1e-3
    fan_out = 128
    assert abs(released.embed.weight.std() / (2 / fan_out) ** 0.5 - 1) < 0.02
    assert released.embed.bias.abs().sum() == 0


def test_the_printed_mask_diverges_at_the_papers_learning_rate():
    """Why the softmax is the default."""
    losses = {}
    for normalize in ("none", "softmax"):
        torch.manual_seed(0)
        gltr = GLTR(512, normalize=normalize)
        classifier = nn.Linear(gltr.num_features, 30)
        sgd = torch.optim.SGD([*gltr.parameters(), *classifier.parameters()], lr=0.01, momentum=0.9, weight_decay=5e-4)
        for _ in range(8):
            loss = F.cross_entropy(classifier(gltr(torch.rand(10, 16, 512) * 2)), torch.randint(30, (10,)))
            sgd.zero_grad()
            loss.backward()
            sgd.step()
        losses[normalize] = loss.item()
    assert not losses["none"] < 1e3
    assert losses["softmax"] < 10


def test_how_the_papers_cut_tracklets():
    for name, distance, last_stride in (("gltr", "euclidean", 2), ("gltr_released", "cosine", 1)):
        entry = registry_entry(name)
        clip = entry.clip
        assert (clip.length, clip.train_sampling, clip.test_sampling) == (16, "adjacent", "all")
        assert (clip.fill, clip.distance, entry.last_stride) == ("repeat", distance, last_stride)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="'dilated', 'undilated' or 'pooling', got 'wide'"):
        GLTR(C, pyramid="wide")
    with pytest.raises(ValueError, match="'softmax' or 'none', got 'sum'"):
        GLTR(C, normalize="sum")
    with pytest.raises(ValueError, match="branches must be from 1 to 16, got 0"):
        GLTR(C, branches=0)
    with pytest.raises(ValueError, match=r"got \(0, 1\)"):
        DTP(d, (0, 1))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("normalize", ["softmax", "none", "released"])
def test_long_tracklets_in_blocks(monkeypatch, normalize, train):
    """M by blocks of targets equals M at once, gradients too; the figure asks for M whole."""
    build = {"released": lambda: create_aggregator("gltr_released", C, embed_features=d)}
    gltr = randomize(build.get(normalize, lambda: GLTR(C, d, normalize=normalize))().double()).train(train)
    x = random(B, T, C)
    parameters = [x, *(p for k, p in gltr.named_parameters() if "restore_norm" not in k)]

    def run():
        details = gltr(x, MASK, return_details=True)
        return details, gradients(details.embedding, parameters)

    whole, whole_gradients = run()
    monkeypatch.setattr("temporal_agg.aggregators.gltr.WHOLE", 3)
    monkeypatch.setattr("temporal_agg.aggregators.gltr.BLOCK", 2 * B * T)
    blocks, blocks_gradients = run()
    torch.testing.assert_close(blocks[:3], whole[:3], **exact)
    torch.testing.assert_close(blocks_gradients, whole_gradients, **exact)
    assert "tsa" in whole.maps
    if not (train and normalize == "released"):
        assert "tsa" not in blocks.maps
        torch.testing.assert_close(gltr.inspect(x, MASK).maps["tsa"], whole.maps["tsa"], **exact)


@pytest.mark.parametrize("name", ["gltr", "gltr_released"])
def test_memory_of_a_long_tracklet(name):
    """4,000 frames; M alone would have 64 MB, and its steps several times that."""
    gltr, most = create_aggregator(name, 8, embed_features=8).eval(), 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                most = max(most, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    with torch.inference_mode(), Largest():
        gltr(torch.rand(1, 4000, 8))
    assert most <= 2**22


def test_a_small_start_lets_all_of_tsa_learn_at_once():
    torch.manual_seed(0)
    gltr = create_aggregator("gltr", C, embed_features=64, start="small")
    assert 0.009 < gltr.tsa.restore.weight.std() < 0.011
    gltr(torch.randn(B, T, C)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in gltr.tsa.parameters())
    with pytest.raises(ValueError, match="'zero' or 'small', got 'large'"):
        create_aggregator("gltr", C, start="large")
