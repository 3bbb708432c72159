"""What every registered aggregator promises. A new aggregator is tested by being registered."""

import copy
import io

import pytest
import torch
from helpers import moved, small
from versions import needs_exporter, needs_torch

from temporal_agg import Details, create_aggregator, list_aggregators, plot
from temporal_agg.aggregators import join, take

C, H, W = 32, 4, 2
FRAME = (32, 16)  # height, width of the images, for aggregators that read them
NAMES = list_aggregators()
HALVES = [torch.bfloat16, pytest.param(torch.float16, marks=needs_torch("2.4", "float16 on a CPU"))]

# Torch's own compiler and exporter import modules that warn about each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def create(name):
    return create_aggregator(name, C, **small(name))


def build(name):
    torch.manual_seed(0)
    return moved(create(name)).eval()


def lengths(aggregator):
    return (aggregator.clip_length,) if aggregator.clip_length else (1, 2, 5, 8)


def inputs(aggregator, B=3, T=None, seed=0, dtype=torch.float32, size=(H, W)):
    """features and keyword arguments for clips of T frames."""
    T = T or aggregator.clip_length or 6
    g = torch.Generator().manual_seed(seed)
    features = torch.rand(B, T, C, *size, generator=g, dtype=torch.float64)
    extra = {}
    if aggregator.needs_frames:
        extra["frames"] = torch.randn(B, T, 3, *FRAME, generator=g, dtype=torch.float64).to(dtype)
    return features.to(dtype), extra


def holes(T, counts, seed=0):
    """A mask [len(counts), T] with counts[b] real frames at random places."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(counts), T, dtype=torch.bool)
    for row, n in zip(mask, counts, strict=True):
        row[torch.randperm(T, generator=g)[:n]] = True
    return mask


def place(real, mask):
    """Puts the real frames of each clip, in order, where the mask is True; NaN elsewhere."""
    out = torch.full((*mask.shape, *real.shape[2:]), float("nan"), dtype=real.dtype)
    for b in range(len(mask)):
        out[b, mask[b]] = real[b, : int(mask[b].sum())]
    return out


def skip_if_fixed(aggregator):
    if aggregator.clip_length:
        pytest.skip("its clip length is fixed and its frames are slots: positions matter by definition")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def aggregator(name):
    return build(name)


def loss_of(details):
    """A scalar that every output of an aggregator flows into, differently for each entry."""
    tensors = [details.embedding, *details.supervised.values()]
    return sum((t * torch.linspace(0.5, 1.5, t.shape[-1], dtype=t.dtype)).square().mean() for t in tensors)


@pytest.mark.parametrize("size", [(4, 2), (7, 7), (16, 8)])
def test_shapes_for_any_length(aggregator, size):
    for T in lengths(aggregator):
        features, extra = inputs(aggregator, B=2, T=T, size=size)
        details = aggregator(features, return_details=True, **extra)
        assert isinstance(details, Details)
        assert details.embedding.shape == (2, aggregator.num_features)
        assert details.mask.shape == details.frame_weights.shape == (2, T)
        assert details.mask.all()
        assert (details.frame_weights >= 0).all()
        torch.testing.assert_close(details.frame_weights.sum(1), torch.ones(2))
        assert torch.equal(aggregator(features, **extra), details.embedding)
        assert aggregator(features[:1], **{k: v[:1] for k, v in extra.items()}).shape == (1, aggregator.num_features)


def test_vectors_are_maps_of_one_pixel(aggregator):
    features, extra = inputs(aggregator, size=(1, 1))
    if aggregator.needs_maps:
        with pytest.raises(ValueError, match=r"\[B, T, C, H, W\]"):
            aggregator(features.flatten(2), **extra)
    else:
        torch.testing.assert_close(aggregator(features.flatten(2), **extra), aggregator(features, **extra))


def test_all_true_mask_is_no_mask(aggregator):
    features, extra = inputs(aggregator)
    mask = torch.ones(features.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(aggregator(features, mask, **extra), aggregator(features, **extra))


def test_masked_clip_equals_the_clip_of_its_real_frames(aggregator):
    skip_if_fixed(aggregator)
    aggregator.double()
    T, counts = 9, (1, 4, 9, 6)
    real, extra = inputs(aggregator, B=len(counts), T=T, dtype=torch.float64)
    for seed in range(3):
        mask = holes(T, counts, seed)
        got = aggregator(place(real, mask), mask, return_details=True, **{k: place(v, mask) for k, v in extra.items()})
        assert torch.equal(got.mask, mask)
        assert (got.frame_weights[~mask] == 0).all()
        for b, n in enumerate(counts):
            alone = aggregator(
                real[b : b + 1, :n], return_details=True, **{k: v[b : b + 1, :n] for k, v in extra.items()}
            )
            torch.testing.assert_close(got.embedding[b], alone.embedding[0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(got.frame_weights[b, mask[b]], alone.frame_weights[0], rtol=1e-9, atol=1e-9)


def run_training(name, features, mask, extra):
    aggregator = build(name).double().train()
    features = features.clone().requires_grad_()
    details = aggregator(features, mask, return_details=True, **extra)
    (details.embedding * torch.linspace(-1, 1, aggregator.num_features, dtype=torch.float64)).sin().sum().backward()
    gradients = {k: p.grad for k, p in aggregator.named_parameters()}
    buffers = dict(aggregator.named_buffers())
    return details.embedding.detach(), features.grad, gradients, buffers


@pytest.mark.parametrize("counts", [(4, 4, 4), (1, 5, 3)], ids=["equal lengths", "mixed lengths"])
def test_masks_in_training_with_gradients(name, aggregator, counts):
    """Two placements of the same frames agree; for equal lengths the clip without padding agrees too."""
    skip_if_fixed(aggregator)
    T = 7
    real, extra = inputs(aggregator, B=3, T=T, dtype=torch.float64)

    def placed(mask):
        return run_training(name, place(real, mask), mask, {k: place(v, mask) for k, v in extra.items()})

    mask_a, mask_b = holes(T, counts, 0), holes(T, counts, 1)
    runs = [(placed(mask_a), mask_a), (placed(mask_b), mask_b)]
    if len(set(counts)) == 1:
        n = counts[0]
        short = run_training(name, real[:, :n], None, {k: v[:, :n] for k, v in extra.items()})
        runs.append((short, torch.ones(3, n, dtype=torch.bool)))
    (embedding, grad, gradients, buffers), mask = runs[0]
    assert grad[~mask].eq(0).all(), "padding must get no gradient"
    for (other, other_grad, other_gradients, other_buffers), other_mask in runs[1:]:
        torch.testing.assert_close(other, embedding, rtol=1e-9, atol=1e-9)
        for b in range(3):
            torch.testing.assert_close(other_grad[b, other_mask[b]], grad[b, mask[b]], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(other_gradients, gradients, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(other_buffers, buffers, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_what_padding_holds_does_not_matter(aggregator, train):
    aggregator.train(train)
    features, extra = inputs(aggregator)
    mask = holes(features.shape[1], (2, 5, 1))
    other = copy.deepcopy(aggregator)
    garbage = {k: v.masked_fill(~mask[..., None, None, None], float("nan")) for k, v in extra.items()}
    want = aggregator(features, mask, **extra)
    assert want.isfinite().all()
    got = other(features.masked_fill(~mask[..., None, None, None], float("inf")), mask, **garbage)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_every_parameter_has_a_finite_gradient(aggregator, masked):
    aggregator.train()
    features, extra = inputs(aggregator, B=4)
    mask = holes(features.shape[1], (1, 3, features.shape[1], 2)) if masked else None
    features.requires_grad_()
    loss_of(aggregator(features, mask, return_details=True, **extra)).backward()
    missing = [k for k, p in aggregator.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    assert features.grad.isfinite().all()
    assert features.grad.abs().sum() > 0


def test_float64_stays_float64(aggregator):
    features, extra = inputs(aggregator, dtype=torch.float64)
    details = aggregator.double()(features, return_details=True, **extra)
    assert details.embedding.dtype == details.frame_weights.dtype == torch.float64


def test_bfloat16_autocast(aggregator):
    features, extra = inputs(aggregator, B=4)
    mask = holes(features.shape[1], (1, 3, features.shape[1], 2))
    want = aggregator(features, mask, **extra)
    features.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for got in (aggregator(features, mask, **extra), aggregator(features.bfloat16(), mask, **extra)):
            error = (got.float() - want).norm() / want.norm()
            assert error < 0.05, f"relative error {error:.3f}"
        aggregator.train()
        details = aggregator(features.bfloat16(), mask, return_details=True, **extra)
        assert details.frame_weights.dtype == torch.float32
    loss_of(Details(*details[:3], {}, {k: v.float() for k, v in details.supervised.items()})).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in aggregator.parameters())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_in_evaluation(aggregator, dtype):
    """``.half()`` and ``.bfloat16()``: every parameter and the input in half precision, no autocast."""
    features, extra = inputs(aggregator, B=4)
    mask = holes(features.shape[1], (1, 3, features.shape[1], 2))
    aggregator.to(dtype).float()  # the rounded weights
    want = aggregator(features, mask, return_details=True, **extra)
    got = aggregator.to(dtype)(
        features.to(dtype), mask, return_details=True, **{k: v.to(dtype) for k, v in extra.items()}
    )
    error = (got.embedding.float() - want.embedding).norm() / want.embedding.norm()
    assert error < (0.05 if dtype is torch.bfloat16 else 0.01), f"relative error {error:.3f}"
    assert got.frame_weights.dtype == torch.float32
    torch.testing.assert_close(got.frame_weights, want.frame_weights, rtol=0, atol=0.05)


def test_layers_are_called(aggregator):
    """So that hooks, adapters and quantisation see them."""
    layers = {key: m for key, m in aggregator.named_modules() if list(m.parameters(recurse=False))}
    fired = set()
    for key, layer in layers.items():
        layer.register_forward_hook(lambda *_, key=key: fired.add(key))
    features, extra = inputs(aggregator)
    aggregator(features, **extra)
    assert not set(layers) - fired


class LowRank(torch.nn.Module):
    """A layer and a low-rank addition to what it computes, as an adapter has it. It has no weight to be read."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.factor = layer, 1.0
        if isinstance(layer, torch.nn.Linear):
            self.down = torch.nn.Linear(layer.in_features, 2, bias=False)
            self.up = torch.nn.Linear(2, layer.out_features, bias=False)
        else:
            conv = type(layer)
            options = {k: getattr(layer, k) for k in ("kernel_size", "stride", "padding", "dilation")}
            self.down = conv(layer.in_channels, 2, bias=False, **options)
            self.up = conv(2, layer.out_channels, 1, bias=False)

    def forward(self, x):
        return self.layer(x) + self.factor * self.up(self.down(x))


def test_adapters_on_any_layer_change_the_embedding(aggregator):
    torch.manual_seed(0)
    features, extra = inputs(aggregator)
    want = aggregator(features, **extra)
    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)
    for key in [key for key, m in aggregator.named_modules() if isinstance(m, kinds)]:
        parent, _, last = key.rpartition(".")
        layer, moved = aggregator.get_submodule(key), 0.0
        adapted = LowRank(layer)
        setattr(aggregator.get_submodule(parent), last, adapted)
        for adapted.factor in (-30, 30):  # one of them may end in a ReLU
            moved = max(moved, (aggregator(features, **extra) - want).abs().max().item())
        setattr(aggregator.get_submodule(parent), last, layer)
        assert moved > 1e-6, f"{key} has no effect"


def test_channels_last(aggregator):
    features, extra = inputs(aggregator)
    flat = features.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        aggregator(flat.unflatten(0, features.shape[:2]), **extra), aggregator(features, **extra)
    )


def test_eval_is_deterministic_and_changes_nothing(aggregator):
    before = copy.deepcopy(aggregator.state_dict())
    features, extra = inputs(aggregator)
    mask = holes(features.shape[1], (2, 5, 1))
    assert torch.equal(aggregator(features, mask, **extra), aggregator(features, mask, **extra))
    assert all(torch.equal(v, before[k]) for k, v in aggregator.state_dict().items())


def test_state_dict_round_trip(name, aggregator):
    features, extra = inputs(aggregator)
    fresh = create(name).eval()
    fresh.load_state_dict(aggregator.state_dict(), strict=True)
    assert torch.equal(fresh(features, **extra), aggregator(features, **extra))


def test_nan_input_stays_visible(aggregator):
    features, extra = inputs(aggregator)
    features[1, 0, 0] = float("nan")
    embedding = aggregator(features, **extra)
    assert embedding[1].isnan().any()
    assert embedding[[0, 2]].isfinite().all()


@pytest.mark.slow
@needs_exporter
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(aggregator, backend):
    torch._dynamo.reset()
    compiled = torch.compile(aggregator, fullgraph=True, dynamic=True, backend=backend)
    for B, T in ((2, 3), (3, 2)) if aggregator.clip_length is None else ((2, None), (3, None)):
        features, extra = inputs(aggregator, B=B, T=T, size=(8, 6))  # sizes that differ from each other
        mask = holes(features.shape[1], (1, 3, 2)[:B])
        with torch.no_grad():
            got = compiled(features, mask, return_details=True, **extra)
            want = aggregator(features, mask, return_details=True, **extra)
        torch.testing.assert_close(got.embedding, want.embedding, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(got.frame_weights, want.frame_weights, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@needs_exporter
def test_compiles_in_training(aggregator):
    """Forward and backward in one graph each (captured and run without code generation, to keep the suite short)."""
    torch._dynamo.reset()
    aggregator.train()
    other = copy.deepcopy(aggregator)
    features, extra = inputs(aggregator)
    mask = holes(features.shape[1], (2, 5, 1))
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    features.requires_grad_()
    aggregator(features, mask, **extra).square().sum().backward()
    compiled(features, mask, **extra).square().sum().backward()
    for (key, p), q in zip(aggregator.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
    torch.testing.assert_close(dict(other.named_buffers()), dict(aggregator.named_buffers()))


@pytest.mark.slow
@needs_exporter
def test_exports_with_a_mask(aggregator):
    features, extra = inputs(aggregator, B=2)
    dynamic_length = not (aggregator.is_recurrent or aggregator.clip_length)
    batch = torch.export.Dim("batch", min=1, max=512)
    length = torch.export.Dim("length", min=1, max=512)
    dims = {0: batch, 1: length} if dynamic_length else {0: batch}
    kwargs = {"mask": holes(features.shape[1], (2, 5)), **extra}
    program = torch.export.export(
        aggregator, (features,), kwargs, dynamic_shapes={"features": dims, **{k: dims for k in kwargs}}
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    module = torch.export.load(buffer).module()
    other, extra = inputs(aggregator, B=5, T=9 if dynamic_length else None, seed=3)
    mask = holes(other.shape[1], (1, 2, 3, 4, 5), seed=2)
    torch.testing.assert_close(
        module(other, mask=mask, **extra), aggregator(other, mask, **extra), rtol=1e-4, atol=1e-5
    )


def test_errors_say_what_came(aggregator):
    features, extra = inputs(aggregator)
    B, T = features.shape[:2]
    mask = torch.ones(B, T, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"got \[3, 32, 4, 2\]"):
        aggregator(features[:, 0], **extra)
    with pytest.raises(ValueError, match="got 31"):
        aggregator(features[:, :, 1:], **extra)
    with pytest.raises(TypeError, match="floating-point"):
        aggregator(features.int(), **extra)
    with pytest.raises(TypeError, match="floating-point"):
        aggregator(features.numpy(), **extra)
    with pytest.raises(ValueError, match=rf"mask must have the shape \[B, T\] = \[{B}, {T}\]"):
        aggregator(features, mask[:, 1:], **extra)
    with pytest.raises(TypeError, match=r"mask.bool\(\)"):
        aggregator(features, mask.float(), **extra)
    mask[1] = False
    with pytest.raises(ValueError, match=r"clips \[1\]"):
        aggregator(features, mask, **extra)
    with pytest.raises(ValueError, match="at least one"):
        aggregator(features[:0], **{k: v[:0] for k, v in extra.items()})
    if aggregator.clip_length:
        with pytest.raises(ValueError, match=f"exactly {aggregator.clip_length} frames"):
            aggregator(features[:, 1:], **{k: v[:, 1:] for k, v in extra.items()})
    if aggregator.needs_frames:
        with pytest.raises(ValueError, match="pass frames"):
            aggregator(features)
        with pytest.raises(ValueError, match="frames must have the shape"):
            aggregator(features, frames=extra["frames"][:, :, :2])


def test_declared_maps_are_given_as_declared(aggregator):
    features, extra = inputs(aggregator)
    T = features.shape[1]
    mask = holes(T, (2, T, 1))
    with torch.no_grad():
        details = aggregator.inspect(features, mask, **extra)
    assert set(details.maps) == set(aggregator.maps)
    for name, kind in aggregator.maps.items():
        x = details.maps[name]
        assert x.dim() == 1 + len(kind.axes), name
        assert x.isfinite().all(), name
        assert kind.values == "signed" or (x >= 0).all(), name
        assert kind.values not in ("unit", "share") or (x <= 1 + 1e-5).all(), name
        real = torch.ones((), dtype=torch.bool)  # the entries of real frames and real sources
        for i, axis in enumerate(kind.axes, 1):
            if axis in ("frames", "sources"):
                assert x.shape[i] == T, name
                real = real & mask.view(-1, *(T if j == i else 1 for j in range(1, x.dim())))
        assert (x[~real.expand_as(x)] == 0).all(), name
        if kind.over is not None:
            i = 1 + kind.axes.index(kind.over)
            total, counted = x.sum(i), real.expand_as(x).any(i)
            torch.testing.assert_close(total[counted], torch.ones_like(total[counted]), msg=name)


@pytest.mark.slow
def test_figures_draw_every_map(aggregator):
    features, extra = inputs(aggregator, B=1)
    with torch.no_grad():
        details = aggregator.inspect(features, **extra)
    frames = torch.randint(256, (features.shape[1], 3, *FRAME), dtype=torch.uint8)
    figure = plot.maps(details, list(frames), kinds=aggregator.maps)
    said = " ".join(text.get_text() for axes in figure.axes for text in axes.texts).replace("\n", " ")
    assert all(kind.title in said for kind in aggregator.maps.values())


def streams(aggregator):
    if not aggregator.supports_streaming:
        assert len(aggregator.streaming_reason) > 20
        with pytest.raises(ValueError, match="does not support streaming"):
            aggregator.begin(2)
        pytest.skip(f"no streaming: {aggregator.streaming_reason}")


def test_streaming_equals_the_batch_after_every_frame(aggregator):
    streams(aggregator)
    features, _ = inputs(aggregator, B=2, T=9)
    state = aggregator.begin(2)
    for t in range(9):
        state = aggregator.update(state, features[:, t : t + 1])
        got, want = aggregator.read(state), aggregator(features[:, : t + 1], return_details=True)
        torch.testing.assert_close(got.embedding, want.embedding, rtol=1e-6, atol=1e-6)
        if got.frame_weights.shape[1]:
            torch.testing.assert_close(got.frame_weights, want.frame_weights, rtol=1e-6, atol=1e-6)


def test_streaming_in_any_pieces_with_masks(aggregator):
    """Pieces of random lengths, tracklets that miss frames or whole pieces, rows taken and joined in between."""
    streams(aggregator)
    aggregator.double()
    g = torch.Generator().manual_seed(0)
    T = 12
    features, _ = inputs(aggregator, B=3, T=T, dtype=torch.float64)
    for seed in range(4):
        mask = holes(T, (3, 8, T), seed)
        garbage = features.masked_fill(~mask[..., None, None, None], float("nan"))
        state, t = aggregator.begin(3), 0
        while t < T:
            n = int(torch.randint(1, 5, (), generator=g))
            before = [tensor.clone() for tensor in state]
            new = aggregator.update(state, garbage[:, t : t + n], mask[:, t : t + n])
            assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True)), "a state stays as it is"
            state = join([take(new, [2]), take(new, slice(0, 2))])
            state = take(state, torch.tensor([1, 2, 0]))
            t += n
        got = aggregator.read(state)
        for b in range(3):
            alone = aggregator(features[b : b + 1, mask[b]], return_details=True)
            torch.testing.assert_close(got.embedding[b], alone.embedding[0], rtol=1e-9, atol=1e-9)
            if got.frame_weights.shape[1]:
                torch.testing.assert_close(got.frame_weights[b, got.mask[b]], alone.frame_weights[0])
        sizes = [tensor.shape for tensor in state]
        more = aggregator.update(state, features, torch.ones(3, T, dtype=torch.bool))
        grown = [tensor.shape for tensor in more] != sizes
        assert grown == bool(got.frame_weights.shape[1]), "a state grows just where it remembers its frames"


def test_streaming_of_a_new_tracklet_beside_an_old_one(aggregator):
    streams(aggregator)
    features, _ = inputs(aggregator, B=2, T=5)
    old = aggregator.update(aggregator.begin(1), features[:1, :4])
    both = aggregator.update(join([old, aggregator.begin(1)]), features[:, 4:])
    torch.testing.assert_close(aggregator.read(both).embedding[0], aggregator(features[:1])[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        aggregator.read(both).embedding[1], aggregator(features[1:, 4:])[0], rtol=1e-6, atol=1e-6
    )


def test_streaming_errors(aggregator):
    streams(aggregator)
    features, _ = inputs(aggregator, B=2)
    with pytest.raises(ValueError, match=r"tracklets \[0, 1\] of the state have no frame"):
        aggregator.read(aggregator.begin(2))
    with pytest.raises(ValueError, match="the state's 3 tracklets"):
        aggregator.update(aggregator.begin(3), features)
    with pytest.raises(ValueError, match="got 31"):
        aggregator.update(aggregator.begin(2), features[:, :, 1:])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_streaming_in_half_precision(aggregator, dtype):
    streams(aggregator)
    features, _ = inputs(aggregator, B=2)
    aggregator.to(dtype)
    want = aggregator(features.to(dtype)).float()
    state = aggregator.begin(2)
    for piece in features.to(dtype).split(2, 1):
        state = aggregator.update(state, piece)
    assert ((aggregator.read(state).embedding.float() - want).norm() / want.norm()) < 0.05
