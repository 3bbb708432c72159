"""The criteria of GRL against their parts and a literal table update."""

import pytest
import torch
from torch.nn import functional as F

from temporal_agg import Details, create_aggregator, create_criterion
from temporal_agg.losses import OIMLoss, TripletLoss, VerificationLoss

B, T, C, CLASSES = 6, 3, 8, 4
LABELS = torch.tensor([1, 1, 3, 3, 1, 1])
MASK = torch.tensor([[1, 1, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 0, 1], [1, 1, 1]], dtype=torch.bool)
PROBES_FIRST = torch.tensor([0, 2, 4, 1, 3, 5])
exact = {"rtol": 1e-9, "atol": 1e-9}


def details_of(seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"frames": (B, T, C), "pooled": (B, C), "memory": (B, C), "global": (B, C)}
    supervised = {
        name: F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1).requires_grad_()
        for name, shape in shapes.items()
    }
    return Details(supervised["pooled"], MASK, MASK / MASK.sum(1, keepdim=True), {}, supervised)


def build(name, **options):
    torch.manual_seed(0)
    return create_criterion(name, CLASSES, create_aggregator(name, C), **options).double()


def take_up(table, x, labels):
    for row, label in zip(x.detach(), labels.tolist(), strict=True):
        table[label] = F.normalize(0.5 * table[label] + 0.5 * row, dim=0)
    return table


def warm_up(criterion):
    """One step, so that the tables are filled."""
    criterion(details_of(seed=7), LABELS)
    criterion.after_step()
    return {key: b.clone() for key, b in criterion.named_buffers() if key.endswith("table")}


def oim(table, x, labels):
    return F.cross_entropy(30 * x @ table.T, labels)


def frames_of(details):
    labels = LABELS[:, None].expand(B, T)[MASK]
    return details.supervised["frames"][MASK], labels


def test_grl():
    criterion = build("grl")
    tables = warm_up(criterion)
    details = details_of()
    verification = VerificationLoss(C).double()
    verification.load_state_dict(criterion.losses["verification"].state_dict())
    terms = criterion(details, LABELS)
    assert set(terms) == {"frame", "video", "verification", "loss"}
    x = details.supervised
    torch.testing.assert_close(terms["frame"], oim(tables["losses.frame.table"], *frames_of(details)), **exact)
    torch.testing.assert_close(terms["video"], oim(tables["losses.video.table"], x["memory"], LABELS), **exact)
    torch.testing.assert_close(terms["verification"], verification(x["pooled"], LABELS), **exact)
    torch.testing.assert_close(terms["loss"], terms["frame"] + terms["video"] + 20 * terms["verification"])
    terms["loss"].backward()
    assert all(x[name].grad.abs().sum() > 0 for name in ("frames", "pooled", "memory"))
    criterion.after_step()
    after = dict(criterion.named_buffers())
    want = take_up(tables["losses.frame.table"], *frames_of(details))
    torch.testing.assert_close(after["losses.frame.table"], want, **exact)
    want = take_up(tables["losses.video.table"], x["memory"], LABELS)
    torch.testing.assert_close(after["losses.video.table"], want, **exact)


def test_grl_with_some_losses():
    """The paper's Table 6 and the baseline of Table 2; without verification, batches need no pairs."""
    details = details_of()
    for losses in (["video"], ["frame", "global"]):
        criterion = build("grl", losses=losses)
        tables = warm_up(criterion)
        terms = criterion(details, LABELS.roll(1))
        assert set(terms) == {*losses, "loss"}
        if "global" in losses:
            want = oim(tables["losses.global.table"], details.supervised["global"], LABELS.roll(1))
            torch.testing.assert_close(terms["global"], want, **exact)
    for wrong in ([], ["frames"]):
        with pytest.raises(ValueError, match="frame, video, global and verification"):
            build("grl", losses=wrong)
    with pytest.raises(TypeError, match="losses must be a list of strings, got 'frame'"):
        build("grl", losses="frame")


def test_grl_released():
    """Frames and pooled features share a table: both read it as it stood, and the pooled ones enter it first."""
    criterion = build("grl_released")
    assert sum(isinstance(module, OIMLoss) for module in criterion.modules()) == 2
    tables = warm_up(criterion)
    details = details_of()
    terms = criterion(details, LABELS)
    x = details.supervised
    torch.testing.assert_close(terms["pooled"], oim(tables["high.table"], x["pooled"], LABELS), **exact)
    torch.testing.assert_close(terms["frame"], oim(tables["high.table"], *frames_of(details)), **exact)
    torch.testing.assert_close(terms["video"], oim(tables["low.table"], x["memory"], LABELS), **exact)
    torch.testing.assert_close(terms["triplet"], TripletLoss(None)(x["pooled"], LABELS), **exact)
    weights = {"pooled": 1, "frame": 1, "video": 1, "verification": 20, "triplet": 1}
    torch.testing.assert_close(terms["loss"], sum(w * terms[name] for name, w in weights.items()))
    criterion.after_step()
    clips = PROBES_FIRST
    high = take_up(tables["high.table"], x["pooled"][clips], LABELS[clips])
    frame_labels = LABELS[clips][:, None].expand(B, T)[MASK[clips]]
    high = take_up(high, x["frames"][clips][MASK[clips]], frame_labels)
    torch.testing.assert_close(criterion.high.table, high, **exact)
    low = take_up(tables["low.table"], x["memory"][clips], LABELS[clips])
    torch.testing.assert_close(criterion.low.table, low, **exact)


def test_grl_released_takes_the_frames_gradient_with_the_moved_table():
    criterion, details = build("grl_released"), details_of()
    tables = warm_up(criterion)
    x = details.supervised
    got = torch.autograd.grad(criterion(details, LABELS)["frame"], x["frames"])[0]
    table = tables["high.table"]
    moved = take_up(table.clone(), x["pooled"][PROBES_FIRST], LABELS[PROBES_FIRST])
    frames, labels = frames_of(details)
    share = ((30 * frames.detach() @ table.T).softmax(1) - F.one_hot(labels, CLASSES)) / len(labels)
    torch.testing.assert_close(got[MASK], 30 * share @ moved, **exact)
    assert got[~MASK].eq(0).all()


def test_queries_and_keys_of_the_released_form_start_as_the_authors():
    torch.manual_seed(0)
    aggregator = create_aggregator("grl_released", 64)
    for layer in (aggregator.query, aggregator.key):
        bound = (6 / 512) ** 0.5  # Kaiming's uniform values over the 512 outputs
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() == 0


@pytest.mark.parametrize("name", ["grl", "grl_released"])
def test_tables_are_exact_under_gradient_accumulation(name):
    whole, parts, details = build(name), build(name), details_of()
    whole(details, LABELS)
    for i in (0, 2, 4):
        piece = slice(i, i + 2)
        supervised = {key: x[piece] for key, x in details.supervised.items()}
        # A pair alone is too few for BatchNorm in training: leave the verification's in evaluation mode.
        for module in parts.modules():
            if isinstance(module, VerificationLoss):
                module.eval()
        parts(Details(supervised["pooled"], MASK[piece], None, {}, supervised), LABELS[piece])
    for criterion in (whole, parts):
        criterion.after_step()
    tables = {key: b for key, b in whole.named_buffers() if key.endswith("table")}
    torch.testing.assert_close({key: dict(parts.named_buffers())[key] for key in tables}, tables, **exact)


@pytest.mark.parametrize("name", ["grl", "grl_released"])
def test_a_step_with_the_aggregator(name):
    """The criterion finds what it needs in the aggregator's details, and every parameter of both gets a gradient."""
    torch.manual_seed(0)
    aggregator = create_aggregator(name, C)
    criterion = create_criterion(name, CLASSES, aggregator)
    features = torch.rand(B, T, C, 4, 2)
    for _ in range(2):  # the tables are zero in the first step
        criterion(aggregator(features, MASK, return_details=True), LABELS)["loss"].backward()
        criterion.after_step()
    missing = [k for m in (aggregator, criterion) for k, p in m.named_parameters() if p.grad is None]
    assert not missing
    assert all(p.grad.isfinite().all() for p in aggregator.parameters())


def test_another_aggregator_is_an_error():
    for name in ("grl", "grl_released"):
        with pytest.raises(TypeError, match="aggregator GRL gives, got Mean"):
            create_criterion(name, CLASSES, create_aggregator("mean", C))
