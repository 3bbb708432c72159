import copy

import pytest
import torch
from helpers import small
from torch.nn import functional as F

from temporal_agg import Criterion, Details, create_aggregator, create_criterion, list_criteria
from temporal_agg.losses import ConsistencyLoss, TripletLoss


def details_of(embedding):
    mask = torch.ones(len(embedding), 3, dtype=torch.bool)
    return Details(embedding, mask, mask / 3, {}, {})


def test_baseline_is_cross_entropy_plus_triplet():
    torch.manual_seed(0)
    embedding, labels = torch.randn(6, 8, requires_grad=True), torch.tensor([0, 0, 1, 1, 4, 4])
    criterion = create_criterion("baseline", 5, create_aggregator("mean", 8), label_smoothing=0.1, margin=0.5)
    terms = criterion(details_of(embedding), labels)
    logits = embedding @ criterion.classifier.weight.T + criterion.classifier.bias
    target = 0.9 * F.one_hot(labels, 5) + 0.1 / 5
    torch.testing.assert_close(terms["cross_entropy"], -(target * logits.log_softmax(1)).sum(1).mean())
    torch.testing.assert_close(terms["triplet"], TripletLoss(0.5)(embedding, labels))
    torch.testing.assert_close(terms["loss"], terms["cross_entropy"] + terms["triplet"])
    terms["loss"].backward()
    assert embedding.grad.isfinite().all()
    assert criterion.classifier.weight.grad.abs().sum() > 0


def test_terms_are_float32_under_autocast():
    criterion = create_criterion("baseline", 2, create_aggregator("mean", 8))
    embedding = torch.randn(4, 8).bfloat16()
    labels = torch.tensor([0, 0, 1, 1])
    want = criterion(details_of(embedding.float()), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = criterion(details_of(embedding), labels)
    assert {v.dtype for v in got.values()} == {torch.float32}
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("name", list_criteria())
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_criteria_follow_a_change_of_type(name, dtype):
    """Half-precision parameters are computed with in float32; buffers learn, gradients arrive."""
    torch.manual_seed(0)
    system = {"baseline": "mean", "star": "gsta"}.get(name, name)
    aggregator = create_aggregator(system, 16, **small(system))
    T = aggregator.clip_length or 4
    frames = torch.rand(4, T, 3, 16, 8) if aggregator.needs_frames else None
    details = aggregator(torch.rand(4, T, 16, 4, 2), frames=frames, return_details=True)
    details = details._replace(
        embedding=details.embedding.detach().requires_grad_(),
        supervised={k: v.detach() for k, v in details.supervised.items()},
    )
    labels = torch.tensor([0, 0, 1, 1])
    rounded = create_criterion(name, 3, aggregator, **({"mining": "hard"} if name == "loga" else {})).to(dtype)
    if name == "gltr_released":
        rounded.classifier[2].p = 0.0
    criterion = copy.deepcopy(rounded).to(torch.float64 if dtype is torch.float64 else torch.float32)
    want = criterion(details, labels)
    got = rounded(details, labels)
    wide = torch.promote_types(dtype, torch.float32)
    assert {value.dtype for value in got.values()} == {wide}
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    got["loss"].backward()
    criterion.after_step()
    rounded.after_step()
    assert all(p.dtype == dtype and p.grad is not None for p in rounded.parameters())
    for (key, buffer), moved in zip(rounded.named_buffers(), criterion.buffers(), strict=True):
        torch.testing.assert_close(buffer, moved.to(buffer.dtype), rtol=0.01, atol=0.01, msg=key)


def test_float64_details_and_a_float32_criterion():
    aggregator = create_aggregator("mean", 8).double()
    criterion = create_criterion("baseline", 2, aggregator)
    details = aggregator(torch.randn(4, 3, 8).double(), return_details=True)
    assert criterion(details, torch.tensor([0, 0, 1, 1]))["loss"].dtype == torch.float64


def test_errors_name_what_exists():
    aggregator = create_aggregator("mean", 8)
    assert "baseline" in list_criteria()
    with pytest.raises(ValueError, match="did you mean 'baseline'"):
        create_criterion("base_line", 5, aggregator)
    with pytest.raises(TypeError, match="no option marginal; it has: margin"):
        create_criterion("baseline", 5, aggregator, marginal=1)
    with pytest.raises(ValueError, match="num_classes"):
        create_criterion("baseline", 0, aggregator)
    for option in ("margin", "label_smoothing"):
        with pytest.raises(ValueError, match=f"criterion 'baseline': {option} must be a finite number, got nan"):
            create_criterion("baseline", 5, aggregator, **{option: float("nan")})
    with pytest.raises(ValueError, match="label_smoothing must be a share"):
        create_criterion("baseline", 5, aggregator, label_smoothing=2)
    with pytest.raises(ValueError, match="'hard' or 'random'"):
        create_criterion("baseline", 5, aggregator, mining="soft")
    with pytest.raises(ValueError, match=r"\[4, 8\] and \[3\]"):
        TripletLoss()(torch.randn(4, 8), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("name", list_criteria())
def test_details_of_another_model_are_named(name):
    system = {"baseline": "mean", "star": "gsta"}.get(name, name)
    aggregator = create_aggregator(system, 16, **small(system))
    criterion, labels, D = create_criterion(name, 3, aggregator), torch.arange(4) // 2, aggregator.num_features
    if not name.startswith("grl"):  # which do not read the embedding
        with pytest.raises(ValueError, match=rf"Criterion: expected embeddings of {D} numbers, got {D + 1}: make the "):
            criterion(details_of(torch.randn(4, D + 1)), labels)
    if name in ("baseline", "gltr", "gltr_released", "loga"):
        assert criterion(details_of(torch.randn(4, D)), labels)["loss"].isfinite()
        return
    reads = {"fgra": "templates", "grl": "frames", "grl_released": "pooled"}.get(name, "features")
    with pytest.raises(ValueError, match=rf"expected supervised\['{reads}'\] among the details, got none: they come"):
        criterion(details_of(torch.randn(4, D)), labels)


def test_a_criterion_of_ones_own_takes_any_width_where_it_does_not_say_the_model():
    class Own(Criterion):
        def terms(self, details, labels):
            return {"length": details.embedding.norm(dim=1).mean()}

    assert Own(3)(details_of(torch.ones(4, 9)), torch.arange(4) // 2)["loss"] == 3
    with pytest.raises(ValueError, match="Own: expected embeddings of 8 numbers, got 9"):
        Own(3, create_aggregator("mean", 8))(details_of(torch.ones(4, 9)), torch.arange(4) // 2)
    with pytest.raises(TypeError, match="expected a TrackletModel or an Aggregator, got Linear"):
        Own(3, torch.nn.Linear(2, 2))


def test_a_criterion_may_ask_for_what_there_may_not_be():
    class Own(Criterion):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.num_classes = 3

        def terms(self, details, labels):
            try:
                return {"extra": details.supervised["extra"].sum()}
            except KeyError:
                return {"length": details.embedding.norm(dim=1).mean()}

    assert Own()(details_of(torch.ones(4, 9)), torch.arange(4) // 2)["loss"] == 3


def fgra(num_classes, options=None, **aggregator_options):
    """A small FGRA, its criterion with centres away from zero, and the details and labels of six clips."""
    torch.manual_seed(0)
    aggregator = create_aggregator("fgra", 8, num_regions=3, reduced_features=5, **aggregator_options)
    criterion = create_criterion("fgra", num_classes, aggregator, **(options or {}))
    for p in criterion.parameters():
        p.data += 0.3 * torch.randn(p.shape)
    details = aggregator(torch.rand(6, 4, 8, 6, 2), torch.arange(4) < torch.arange(6)[:, None] + 1, return_details=True)
    return criterion, details, torch.tensor([0, 0, 1, 1, 4, 4])


@pytest.mark.parametrize("centres", ["learned", "clip"])
def test_fgra_sums_embedding_templates_and_consistency(centres):
    criterion, details, labels = fgra(5, {"centres": centres})
    terms = criterion(details, labels)
    cross_entropy = triplet = 0
    for i, classifier in enumerate(criterion.template_classifiers):
        template = criterion.template_reduction(details.supervised["templates"][:, i])
        assert template.shape == (6, 5)
        cross_entropy += F.cross_entropy(classifier(template), labels) / 3
        triplet += TripletLoss(0.5)(template, labels) / 3
    consistency = ConsistencyLoss(5 if centres == "learned" else None, 3, 8)
    if centres == "learned":
        consistency.centres.data = criterion.consistency.centres.data
    want = {
        "cross_entropy": F.cross_entropy(criterion.classifier(details.embedding), labels),
        "triplet": TripletLoss(0.5)(details.embedding, labels),
        "template_cross_entropy": cross_entropy,
        "template_triplet": triplet,
        "consistency": consistency(details.supervised["regions"], labels, details.mask),
    }
    total = sum(want.values()) - want["consistency"] + 5e-4 * want["consistency"]  # Eq. 13
    torch.testing.assert_close(terms, {**want, "loss": total})
    terms["loss"].backward()
    assert all(p.grad.isfinite().all() for p in criterion.parameters())


def test_fgra_follows_the_models_branches():
    names = {"cross_entropy", "triplet", "loss"}
    for aggregator_options, options, more in (
        ({"local_branch": None}, {}, set()),
        ({"local_branch": "stripes", "temporal": "average"}, {}, set()),
        ({"spatial": "concatenation"}, {"consistency_weight": 0}, {"template_cross_entropy", "template_triplet"}),
    ):
        criterion, details, labels = fgra(5, options, **aggregator_options)
        terms = criterion(details, labels)
        assert set(terms) == names | more
        terms["loss"].backward()
        assert all(p.grad is not None for p in criterion.parameters())
    with pytest.raises(TypeError, match="got Mean"):
        create_criterion("fgra", 5, create_aggregator("mean", 8))
    with pytest.raises(TypeError, match="got Mean: pyramid_weight=0"):
        create_criterion("gsta", 5, create_aggregator("mean", 8))
    with pytest.raises(ValueError, match="'learned' or 'clip'"):
        fgra(5, {"centres": "mean"})


def test_parameter_groups():
    """One plain group; FGRA's centres have a learning rate of their own and no weight decay."""
    baseline = create_criterion("baseline", 5, create_aggregator("mean", 8))
    assert baseline.parameter_groups() == [{"params": list(baseline.parameters())}]
    for centres in ("learned", "clip"):
        criterion, _, _ = fgra(5, {"centres": centres})
        optimizer = torch.optim.Adam(criterion.parameter_groups(), lr=3e-4, weight_decay=5e-4)
        options = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        assert len(optimizer.param_groups) == (2 if centres == "learned" else 1)
        assert set(options) == {id(p) for p in criterion.parameters()}
        for name, p in criterion.named_parameters():
            assert options[id(p)] == ((0.03, 0.0) if name == "consistency.centres" else (3e-4, 5e-4))


# System, options of the aggregator, options of the criterion: what the papers leave out of their systems.
ABLATIONS = [
    ("loga", {"assembly": "laq"}, {}),
    ("loga", {"assembly": "gcq"}, {}),
    ("gltr", {"tsa": False}, {}),
    ("gltr", {"dtp": False}, {}),
    ("gltr", {"dtp": False, "tsa": False}, {}),
    ("gsta", {"hidden_features": 4}, {"pyramid_weight": 0.0}),
    ("fgra", {"temporal": "average"}, {}),
    ("fgra", {"spatial": "concatenation"}, {}),
    ("fgra", {}, {"consistency_weight": 0.0}),
    ("grl", {"enhancement": False, "memory": False}, {}),
    ("grl", {"enhancement": False}, {}),
    ("grl", {"memory": False}, {}),
    ("grl", {}, {"losses": ["frame", "verification"]}),
]


@pytest.mark.parametrize(("name", "aggregator_options", "options"), ABLATIONS, ids=str)
def test_every_ablation_trains_all_that_it_has(name, aggregator_options, options):
    """Two steps, since tables and zero-initialised layers let nothing through in the first."""
    torch.manual_seed(0)
    aggregator = create_aggregator(name, 16, **aggregator_options)
    criterion = create_criterion(name, 3, aggregator, **options)
    parameters = [*aggregator.parameters(), *criterion.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    T = aggregator.clip_length or 4
    features, labels = torch.rand(6, T, 16, 4, 2), torch.tensor([0, 0, 1, 1, 2, 2])
    frames = torch.rand(6, T, 3, 16, 8) if aggregator.needs_frames else None
    for _ in range(2):
        optimizer.zero_grad()
        criterion(aggregator(features, frames=frames, return_details=True), labels)["loss"].backward()
        optimizer.step()
        criterion.after_step()
    unused = [key for m in (aggregator, criterion) for key, p in m.named_parameters() if p.grad is None]
    assert unused == (["trl.join_low.weight", "memory_norm.weight", "memory_norm.bias"] if "losses" in options else [])
    assert all(p.isfinite().all() for p in parameters)


@pytest.mark.parametrize("name", ["baseline", "loga"])
def test_the_neck_stands_before_both_terms(name):
    torch.manual_seed(0)
    x, labels = 100 * torch.randn(6, 8), torch.tensor([0, 0, 1, 1, 2, 2])
    aggregator = create_aggregator("mean" if name == "baseline" else "loga", 8)
    criterion = create_criterion(name, 3, aggregator, neck=True, distance="cosine", mining="hard")
    terms = criterion(details_of(x), labels)
    normed = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(terms["triplet"], TripletLoss(distance="cosine")(normed, labels))
    torch.testing.assert_close(terms["cross_entropy"], F.cross_entropy(criterion.classifier(normed), labels))
    torch.testing.assert_close(criterion(details_of(x / 50), labels), terms, rtol=1e-2, atol=1e-3)  # no scale is left
    assert not any("neck" in key for key in create_criterion(name, 3, aggregator).state_dict())


def test_what_is_no_details_or_no_labels_gets_help():
    aggregator = create_aggregator("mean", 8)
    criterion = create_criterion("baseline", 5, aggregator)
    x, labels = torch.randn(4, 2, 8), torch.tensor([0, 0, 1, 1])
    details = aggregator(x, return_details=True)
    with pytest.raises(TypeError, match=r"BaselineCriterion: expected the model's Details, got Tensor.*return_details"):
        criterion(aggregator(x), labels)
    for wrong, message in (
        (labels.float(), "whole numbers .*got torch.float32"),
        ([0, 0, 1, 1], "whole numbers .*got list"),
    ):
        with pytest.raises(TypeError, match=message):
            criterion(details, wrong)
    for wrong, message in (
        (labels[:3], "one label for each of the 4 clips"),
        (labels[:, None], "one label for each of the 4 clips"),
        (labels + 4, "from 0 to num_classes - 1 = 4, got 4 to 5"),
        (labels - 1, "got -1 to 0.*leave junk out"),
        (labels - 100, "got -100 to -99"),
    ):
        with pytest.raises(ValueError, match=message):
            criterion(details, wrong)
