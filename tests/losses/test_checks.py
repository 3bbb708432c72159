"""What losses and criteria are built and called with: whole numbers of any width, and errors that name the argument."""

import pytest
import torch

from temporal_agg import create_aggregator, create_criterion, losses
from temporal_agg.aggregators import Criterion

LABELS = torch.tensor([0, 0, 1, 1])
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
REGIONS = X[:, None, None].expand(4, 3, 2, 8)
MAPS = X[:, None, :, None, None].expand(4, 3, 8, 4, 2)


def consistency():
    loss = losses.ConsistencyLoss(4, 2, 8)  # as many classes as labels: bytes would do for a mask
    loss.centres.data.normal_(generator=torch.Generator().manual_seed(1))
    return loss


def oim():
    loss = losses.OIMLoss(4, 8)
    loss.table.normal_(generator=torch.Generator().manual_seed(1))
    return loss


CALLS = {
    "TripletLoss": (losses.TripletLoss, X),
    "PyramidRankingLoss": (losses.PyramidRankingLoss, MAPS),
    "VerificationLoss": (lambda: losses.VerificationLoss(8).eval(), X),
    "OIMLoss": (oim, X),
    "ConsistencyLoss": (consistency, REGIONS),
}


@pytest.mark.parametrize("name", CALLS)
def test_labels_of_any_width_give_the_same(name):
    build, x = CALLS[name]
    loss = build()
    want = loss(x, LABELS)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(loss(x, LABELS.to(dtype)), want), dtype


@pytest.mark.parametrize("name", ["baseline", "fgra", "grl"])
def test_criteria_take_labels_of_any_width(name):
    torch.manual_seed(0)
    aggregator = create_aggregator("mean" if name == "baseline" else name, 32)
    criterion = create_criterion(name, 4, aggregator)
    details = aggregator(torch.randn(4, 4, 32, 8, 4), return_details=True)
    want = criterion.eval()(details, LABELS)["loss"]
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(criterion(details, LABELS.to(dtype))["loss"], want), dtype


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_tensor_of_its_kind_is_named(name):
    build, x = CALLS[name]
    loss = build()
    for labels in ([0, 0, 1, 1], LABELS.float(), LABELS.bool(), "0011"):
        with pytest.raises(TypeError, match=f"{name}: labels must be a tensor of whole numbers"):
            loss(x, labels)
    for wrong in (x.numpy(), x.long(), None):
        with pytest.raises(TypeError, match=f"{name}: .* must be a floating point tensor, got"):
            loss(wrong, LABELS)


@pytest.mark.parametrize("label", [4, -1, -100])  # torch's cross-entropy leaves -100 out, and indexing counts -1 back
@pytest.mark.parametrize("name", ["OIMLoss", "ConsistencyLoss"])
def test_labels_that_are_no_classes_are_refused(name, label):
    build, x = CALLS[name]
    with pytest.raises(ValueError, match=rf"{name}: labels must be class indices from 0 to num_classes - 1 = 3, got"):
        build()(x, torch.tensor([0, 0, label, label]))


@pytest.mark.parametrize("name", ["OIMLoss", "ConsistencyLoss", "PyramidRankingLoss"])
def test_masks_are_bool(name):
    build, x = CALLS[name]
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        build()(x, LABELS, torch.ones(x.shape[:1] if name == "OIMLoss" else x.shape[:2]))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("TripletLoss", {"margin": "0.3"}, "margin must be a number or None, got '0.3'"),
        ("TripletLoss", {"margin": True}, "margin must be a number or None, got True"),
        ("TripletLoss", {"generator": 3}, "generator must be a Generator or None, got 3"),
        ("PyramidRankingLoss", {"stripes": 4}, "stripes must be a list of whole numbers, got 4"),
        ("PyramidRankingLoss", {"stripes": (1.5,)}, "stripes must be a list of whole numbers"),
        ("ConsistencyLoss", {"num_classes": 2.5}, "num_classes must be a whole number or None, got 2.5"),
        ("OIMLoss", {"num_classes": "5", "in_features": 8}, "num_classes must be a whole number, got '5'"),
        ("OIMLoss", {"num_classes": 5, "in_features": 8, "scale": None}, "scale must be a number, got None"),
        ("VerificationLoss", {"in_features": 8.0}, "in_features must be a whole number, got 8.0"),
    ],
)
def test_options_of_other_types_name_themselves(name, options, said):
    with pytest.raises(TypeError, match=f"^{name}: {said}"):
        getattr(losses, name)(**options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("PyramidRankingLoss", {"stripes": ()}),
        ("PyramidRankingLoss", {"stripes": (0,)}),
        ("OIMLoss", {"num_classes": 0, "in_features": 8}),
        ("VerificationLoss", {"in_features": 0}),
    ],
)
def test_sizes_of_nothing_are_refused(name, options):
    with pytest.raises(ValueError, match=r"at least 1|>= 1"):
        getattr(losses, name)(**options)


def test_criteria_built_directly_name_the_option():
    aggregator = create_aggregator("mean", 8)
    built = type(create_criterion("baseline", 5, aggregator))
    with pytest.raises(TypeError, match="BaselineCriterion: num_classes must be a whole number, got '5'"):
        built("5", aggregator)
    with pytest.raises(TypeError, match="BaselineCriterion: margin must be a number or None, got 'x'"):
        built(5, aggregator, margin="x")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'model'"):
        built(5)

    class Own(Criterion):
        def __init__(self, num_classes, model, share: float = 0.5, **others: float):
            super().__init__(num_classes)
            self.others = others

    with pytest.raises(TypeError, match="Own: share must be a number, got 'half'"):
        Own(5, aggregator, "half")
    assert Own(5, aggregator, more=1).others == {"more": 1}
