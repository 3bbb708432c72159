"""GRL, both readings, against a loop from the paper's equations: one clip, one direction, one step at a time."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from temporal_agg import create_aggregator
from temporal_agg.aggregators.grl import EMU, GCE, TRL
from temporal_agg.aggregators.registry import registry_entry

B, T, C, H, W = 3, 5, 16, 3, 2
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 0, 0], [1, 0, 0, 1, 1]], dtype=torch.bool)
NAMES = ("grl", "grl_released")
exact = {"rtol": 1e-9, "atol": 1e-9}


def randomize(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
            p.copy_(noise * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.3) + 1.0 * ("norm" in key))
        for key, b in module.named_buffers():
            if b.is_floating_point():
                b.copy_(torch.rand(b.shape, generator=g, dtype=torch.float64) + 0.5 * key.endswith("var"))
    return module


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def scalar(*tensors):
    return sum((t * torch.linspace(-1, 1, t.shape[-1], dtype=t.dtype)).sin().sum() for t in tensors)


class Literal:
    """The equations over lists of frames, with the parameters of ``aggregator`` and a copy of its buffers."""

    def __init__(self, aggregator):
        self.p = dict(aggregator.named_parameters())
        self.b = {key: b.clone() for key, b in aggregator.named_buffers()}
        self.training = aggregator.training
        self.released, self.parts = aggregator.released, aggregator.parts
        self.directions = aggregator.trl.directions
        parts = [self.p["gce.join.weight"], self.p["gce.join_clip.weight"][..., None, None]]
        self.p["join.weight"] = torch.cat(parts if self.released else parts[::-1], 1)  # the printed convolution

    def norm(self, key, xs, own=slice(None)):
        """BatchNorm over the entries of a list; ``own`` are the channels of one direction."""
        mean, var = (self.b[f"{key}.running_{s}"][own] for s in ("mean", "var"))
        weight, bias = self.p[f"{key}.weight"][own], self.p[f"{key}.bias"][own]
        return list(F.batch_norm(torch.stack(xs), mean, var, weight, bias, self.training, 0.1, 1e-5))

    def conv(self, key, xs, own=slice(None)):
        weight, bias = self.p[f"{key}.weight"][own], self.p.get(f"{key}.bias")
        bias = bias if bias is None else bias[own]
        return [F.conv2d(x[None], weight, bias, padding=weight.shape[-1] // 2)[0] for x in xs]

    def linear(self, key, x):
        bias = self.p.get(f"{key}.bias")
        return self.p[f"{key}.weight"] @ x + (0 if bias is None else bias)

    def correlation(self, clips):
        """Eqs. 1, 2: R for each frame of each clip."""
        glob = [sum(x.sum((1, 2)) for x in clip) / (len(clip) * H * W) for clip in clips]  # Eq. 1
        glob = [self.linear("gce.embed.0", g) for g in glob]
        if self.released:
            glob = [g.relu() for g in self.norm("gce.embed.1", glob)]
        joined = []
        for g, clip in zip(glob, clips, strict=True):
            g = g[:, None, None].expand(-1, H, W)
            joined += [torch.cat([x, g] if self.released else [g, x]) for x in clip]
        y = self.norm("gce.correlate.0", self.conv("join", joined))
        if self.released:
            y = [x.relu() for x in self.norm("gce.correlate.2", self.conv("gce.correlate.1", y))]
            y = self.norm("gce.correlate.5", self.conv("gce.correlate.4", y))
        else:
            y = self.conv("gce.correlate.2", [x.relu() for x in y])
        y = iter([x.sigmoid() for x in y])
        return [[next(y) for _ in clip] for clip in clips]

    def run(self, g, high, low):
        """Eqs. 5-8 in one direction; returns GAP of the enhanced frames and of the last memory."""
        memory = [sum(clip) / len(clip) for clip in low]
        enhanced = [[] for _ in high]
        for k in range(max(map(len, high))):
            clips = [b for b in range(len(high)) if k < len(high[b])]
            for b in clips:
                a = torch.zeros(C, dtype=torch.float64)
                if f"trl.emu.f1.{g}.weight" in self.p:
                    (f1,) = self.conv(f"trl.emu.f1.{g}", [high[b][k]])
                    (f2,) = self.conv(f"trl.emu.f2.{g}", [memory[b]])
                    d = ((f2.relu() - f1.relu()) ** 2).mean((1, 2))  # Eq. 5
                    a = self.linear(f"trl.emu.mlp.{g}.2", self.linear(f"trl.emu.mlp.{g}.0", d).relu()).sigmoid()
                enhanced[b].append(((1 + a)[:, None, None] * high[b][k]).mean((1, 2)))  # Eq. 7
            if "trl.emu.res.0.weight" in self.p:
                total = [memory[b] + low[b][k] for b in clips]
                hidden, own = slice(g * C // 4, (g + 1) * C // 4), slice(g * C, (g + 1) * C)
                y = self.norm("trl.emu.res.1", self.conv("trl.emu.res.0", total, hidden), hidden)
                y = self.conv("trl.emu.res.3", [x.relu() for x in y], hidden)
                y = self.conv("trl.emu.res.6", [x.relu() for x in self.norm("trl.emu.res.4", y, hidden)], own)
                for b, x, skip in zip(clips, self.norm("trl.emu.res.7", y, own), total, strict=True):
                    memory[b] = (x + skip).relu()  # Eq. 8
        return enhanced, [m.mean((1, 2)) for m in memory]

    def __call__(self, features, mask):
        clips = [list(x[m]) for x, m in zip(features, mask, strict=True)]
        R = self.correlation(clips)
        high = [[x * r for x, r in zip(*pair, strict=True)] for pair in zip(clips, R, strict=True)]  # Eq. 3
        low = [[x * (1 - r) for x, r in zip(*pair, strict=True)] for pair in zip(clips, R, strict=True)]  # Eq. 4
        frames, last = [[[] for _ in clip] for clip in clips], [[] for _ in clips]
        for g, direction in enumerate(self.directions):
            way = slice(None, None, 1 if direction == "forward" else -1)
            enhanced, memory = self.run(g, [x[way] for x in high], [x[way] for x in low])
            for b in range(len(clips)):
                last[b].append(memory[b])
                for t, x in enumerate(enhanced[b][way]):
                    frames[b][t].append(x)
        if self.released:
            frames, last = [[sum(x) for x in clip] for clip in frames], [sum(x) for x in last]
        else:
            frames = [[self.linear("trl.join_high", torch.cat(x)) for x in clip] for clip in frames]  # Eq. 9
            last = [self.linear("trl.join_low", torch.cat(x)) for x in last]  # Eq. 10

        def norm_frames(key, frames):
            y = iter([x / x.norm() for x in self.norm(key, [x for clip in frames for x in clip])])
            return [[next(y) for _ in clip] for clip in frames]

        frames = norm_frames("frame_norm", frames)
        memory = [x / x.norm() for x in self.norm("memory_norm", last)]
        queries = norm_frames("query_norm", [[self.linear("query", x) for x in clip] for clip in frames])
        keys = norm_frames("key_norm", [[self.linear("key", x) for x in clip] for clip in frames])
        out = {"embedding": [], "frame_weights": torch.zeros(mask.shape, dtype=torch.float64)}
        for b, clip in enumerate(frames):
            columns, pooled = 0, 0
            for q in queries[b]:
                weights = torch.stack([q @ k for k in keys[b]]).softmax(0)
                columns = columns + weights
                pooled = pooled + sum(w * x for w, x in zip(weights, clip, strict=True))
            out["frame_weights"][b, mask[b]] = columns / len(clip)
            glob = sum(x.mean((1, 2)) for x in clips[b])
            parts = {"pooled": pooled / pooled.norm(), "memory": memory[b], "mean": sum(clip) / len(clip)}
            parts["global"] = glob / glob.norm()
            out["embedding"].append(torch.cat([parts[name] for name in self.parts]))
        out["embedding"] = torch.stack(out["embedding"])
        out["memory"] = torch.stack(memory)
        out["frames"] = torch.cat([torch.stack(clip) for clip in frames])
        out["correlation"] = torch.cat([torch.stack(clip) for clip in R])
        return out


ABLATIONS = {
    "default": {},
    "forward": {"directions": ["forward"]},
    "backward": {"directions": ["backward"]},
    "other order": {"directions": ["backward", "forward"]},
    "no enhancement": {"enhancement": False},
    "no memory": {"memory": False},
    "GCE alone": {"enhancement": False, "memory": False, "parts": ["memory", "pooled", "global", "mean"]},
}
CASES = [("default", masked, training) for masked in (False, True) for training in (False, True)]
CASES += [(case, True, True) for case in ABLATIONS if case != "default"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("case", "masked", "training"), CASES)
def test_equals_the_literal_loop(name, case, masked, training):
    aggregator = randomize(create_aggregator(name, C, **ABLATIONS[case]).double()).train(training)
    features = random(B, T, C, H, W)
    mask = MASK if masked else torch.ones_like(MASK)
    literal = Literal(aggregator)
    want = literal(features, mask)
    got = aggregator(features, mask, return_details=True)
    frames = got.supervised["frames"][mask]
    torch.testing.assert_close(got.embedding, want["embedding"], **exact)
    torch.testing.assert_close(got.frame_weights, want["frame_weights"], **exact)
    torch.testing.assert_close(frames, want["frames"], **exact)
    torch.testing.assert_close(got.supervised["memory"], want["memory"], **exact)
    torch.testing.assert_close(got.maps["correlation"][mask][:, None], want["correlation"], **exact)
    assert all(x[~mask].eq(0).all() for x in (got.maps["correlation"], got.supervised["frames"]))

    inputs = [features, *aggregator.parameters()]
    grads = torch.autograd.grad(scalar(got.embedding, frames, got.supervised["memory"]), inputs)
    literal_grads = torch.autograd.grad(scalar(want["embedding"], want["frames"], want["memory"]), inputs)
    torch.testing.assert_close(grads, literal_grads, **exact)
    assert sum(g.abs().max() > 1e-6 for g in grads) >= 0.8 * len(grads)  # the comparison is not one of zeros

    steps = T * training
    for key, b in aggregator.named_buffers():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(b, literal.b[key], **exact)
        elif ".res." in key:
            assert b == steps


@pytest.mark.parametrize("training", [False, True])
def test_unit_by_unit_equals_trl(training):
    """The public EMU, stepped through a clip in one direction, is TRL in that direction."""
    high, low = random(B, T, C, H, W, seed=1), random(B, T, C, H, W, seed=2)
    for direction in ("forward", "backward"):
        trl = randomize(TRL(C, released=True, directions=[direction]).double()).train(training)
        emu = EMU(C, kernel_size=1).double().train(training)
        emu.load_state_dict(trl.emu.state_dict())
        order = range(T) if direction == "forward" else reversed(range(T))
        memory, frames = low.mean(1), {}
        for t in order:
            enhanced, memory = emu(high[:, t], low[:, t], memory)
            assert enhanced.shape == memory.shape == (B, C, H, W)
            frames[t] = enhanced.mean((2, 3))
        got_frames, got_memory = trl(high, low)
        torch.testing.assert_close(got_frames, torch.stack([frames[t] for t in range(T)], 1), **exact)
        torch.testing.assert_close(got_memory, memory.mean((2, 3)), **exact)
        torch.testing.assert_close(dict(trl.emu.named_buffers()), dict(emu.named_buffers()), **exact)


def test_directions_in_one_unit_do_not_meet():
    """Two directions as channel groups of one EMU equal two units, for a common frame and separate memories."""
    both = randomize(EMU(C, directions=2).double())
    high, low, memory = random(B, C, H, W), random(B, C, H, W, seed=1), random(B, 2 * C, H, W, seed=2)
    mask = torch.tensor([True, False, True])
    enhanced, after = both(high, low, memory, mask)
    for g in range(2):
        one = EMU(C).double()
        state = {}
        for key, value in one.state_dict().items():
            if key.startswith("res"):
                state[key] = both.state_dict()[key].chunk(2)[g] if value.dim() else value
            else:
                state[key] = both.state_dict()[key.replace(".0.", f".{g}.", 1)]
        one.load_state_dict(state)
        got = one(high, low, memory.chunk(2, 1)[g], mask)
        torch.testing.assert_close(got[0], enhanced.chunk(2, 1)[g], **exact)
        torch.testing.assert_close(got[1][mask], after.chunk(2, 1)[g][mask], **exact)


def test_what_padding_holds_does_not_matter_to_the_parts():
    x, junk = random(B, T, C, H, W), 1e3 * random(B, T, C, H, W, seed=5)
    real = MASK[..., None, None, None]
    for part in (GCE(C), GCE(C, released=True)):
        part.double()
        torch.testing.assert_close(part(x, MASK)[MASK], part(torch.where(real, x, junk), MASK)[MASK], **exact)
    trl = TRL(C).double()
    frames, memory = trl(x, x, MASK)
    other_frames, other_memory = trl(torch.where(real, x, junk), torch.where(real, x, -junk), MASK)
    torch.testing.assert_close(other_frames[MASK], frames[MASK], **exact)
    torch.testing.assert_close(other_memory, memory, **exact)


@pytest.mark.parametrize("name", NAMES)
def test_long_padding_in_training_stays_finite(name):
    """BatchNorm with no clip left amplifies by 1 / sqrt(eps); that must not build up from step to step."""
    torch.manual_seed(0)
    aggregator = create_aggregator(name, C)
    features, mask = torch.rand(B, 40, C, H, W, requires_grad=True), torch.zeros(B, 40, dtype=torch.bool)
    mask[:, 7:9] = True
    details = aggregator(features, mask, return_details=True)
    scalar(details.embedding, details.supervised["frames"]).backward()
    assert all(p.grad.isfinite().all() for p in aggregator.parameters())
    assert features.grad[mask].abs().sum() > 0


def test_parameter_counts_of_the_released_code():
    with torch.device("meta"):
        trl, gce = TRL(2048, released=True), GCE(2048, released=True)
    assert sum(p.numel() for p in trl.parameters()) == 22_564_864
    assert sum(p.numel() for p in gce.parameters()) == 5_510_914


def test_released_weights_fit_by_name_and_concatenation():
    """The layers of the released code, in its order: each of our entries is one of theirs, or two concatenated."""

    def block():
        sizes = ((C, C // 4), (C // 4, C // 4), (C // 4, C))
        return nn.ModuleDict(
            {
                **{f"conv{i}": nn.Conv2d(*size, 1, bias=False) for i, size in enumerate(sizes, 1)},
                **{f"bn{i}": nn.BatchNorm2d(size[1]) for i, size in enumerate(sizes, 1)},
            }
        )

    def mlp():
        return nn.Sequential(nn.Linear(C, C // 16, bias=False), nn.ReLU(), nn.Linear(C // 16, C, bias=False))

    def direction():
        return nn.ModuleDict({"res": block(), "f1": nn.Conv2d(C, C, 1), "f2": nn.Conv2d(C, C, 1), "mlp": mlp()})

    directions = [direction(), direction()]
    glo_fc = nn.Sequential(nn.Linear(C, C // 2), nn.BatchNorm1d(C // 2), nn.ReLU())
    corr_atte = nn.Sequential(
        nn.Conv2d(C + C // 2, C // 2, 1, bias=False),
        nn.BatchNorm2d(C // 2),
        nn.Conv2d(C // 2, C // 8, 1, bias=False),
        nn.BatchNorm2d(C // 8),
        nn.ReLU(),
        nn.Conv2d(C // 8, 1, 1, bias=False),
        nn.BatchNorm2d(1),
    )
    rest = {"frame_norm": nn.BatchNorm1d(C), "memory_norm": nn.BatchNorm1d(C)}
    rest |= {"query": nn.Linear(C, 512), "query_norm": nn.BatchNorm1d(512)}
    rest |= {"key": nn.Linear(C, 512), "key_norm": nn.BatchNorm1d(512)}

    state = {f"{name}.{key}": value for name, module in rest.items() for key, value in module.state_dict().items()}
    state |= {f"gce.embed.{key}": value for key, value in glo_fc.state_dict().items()}
    for key, value in corr_atte.state_dict().items():
        layer, entry = key.split(".")
        if layer == "0":
            state["gce.join.weight"], state["gce.join_clip.weight"] = value[:, :C], value[:, C:, 0, 0]
        else:
            state[f"gce.correlate.{int(layer) - 1}.{entry}"] = value
    for g, modules in enumerate(directions):
        for theirs, ours in (("f1", "f2"), ("f2", "f1"), ("mlp", "mlp")):  # their f1 reads the memory
            state |= {f"trl.emu.{ours}.{g}.{key}": v for key, v in modules[theirs].state_dict().items()}
    for key, value in directions[0]["res"].state_dict().items():
        kind, entry = key.split(".")
        layer = 3 * (int(kind[-1]) - 1) + kind.startswith("bn")
        pair = torch.cat([d["res"].state_dict()[key] for d in directions]) if value.dim() else value
        state[f"trl.emu.res.{layer}.{entry}"] = pair
    create_aggregator("grl_released", C).load_state_dict(state, strict=True)


def test_defaults_follow_the_recipe():
    for name, width in (("grl", 2), ("grl_released", 3)):
        assert create_aggregator(name, C).num_features == width * C
        entry = registry_entry(name)
        assert entry.last_stride == 1
        assert (entry.clip.length, entry.clip.fill, entry.clip.distance) == (8, "last", "dot")
        assert entry.clip.train_sampling == entry.clip.test_sampling == "chunks"


def test_errors_say_what_came():
    for wrong in ([], ["pooled", "median"]):
        with pytest.raises(ValueError, match="pooled, memory, global and mean"):
            create_aggregator("grl", C, parts=wrong)
    for wrong in ([], ["forward", "forward"], ["up"]):
        with pytest.raises(ValueError, match="'forward', 'backward' or both"):
            create_aggregator("grl_released", C, directions=wrong)
    for option in ({"parts": "pooled"}, {"directions": "forward"}):
        with pytest.raises(TypeError, match=f"{next(iter(option))} must be a list of strings"):
            create_aggregator("grl", C, **option)
    with pytest.raises(ValueError, match="more than one value per channel"):
        create_aggregator("grl", C)(torch.rand(1, T, C, H, W))
