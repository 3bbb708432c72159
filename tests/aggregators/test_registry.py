import inspect
import math
import re

import numpy as np
import pytest
import torch

from temporal_agg import create_aggregator, create_criterion, list_aggregators, list_criteria, register_aggregator
from temporal_agg.aggregators import Aggregator, Details, registry, registry_entry


def test_patterns_select_names():
    assert {"mean", "max", "attention", "lstm"} <= set(list_aggregators())
    assert {"max", "mean"} <= set(list_aggregators("m*")) == {name for name in list_aggregators() if name[0] == "m"}
    assert list_aggregators("nothing*") == []


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'attention'"):
        create_aggregator("atention", 8)


def test_unknown_options_are_refused_with_the_known_ones():
    with pytest.raises(TypeError, match=r"no option hidden; it has: hidden_features"):
        create_aggregator("lstm", 8, hidden=3)


def test_in_features_must_be_positive():
    with pytest.raises(ValueError, match="in_features"):
        create_aggregator("mean", 0)
    with pytest.raises(TypeError, match=r"aggregator 'mean': in_features must be a whole number, got '8' \(str\)"):
        create_aggregator("mean", "8")


SMALL = {"clip_length": 4, "part_size": 4, "reduced_features": 8, "hidden_features": 8, "embed_features": 8}
MODEL_OF = {"baseline": "mean", "star": "gsta"}


def small(name, **options):
    known = registry.aggregator_options(name)
    return create_aggregator(name, 16, **{key: SMALL[key] for key in SMALL if key in known} | options)


def criterion(name, **options):
    return create_criterion(name, 3, small(MODEL_OF.get(name, name)), **options)


BUILDS = [(small, name, registry_entry(name).build) for name in list_aggregators()]
BUILDS += [(criterion, name, registry._CRITERIA[name]) for name in list_criteria()]
OPTIONS = [
    (build, name, option)
    for build, name, cls in BUILDS
    for option in inspect.signature(cls).parameters
    if option not in ("in_features", "num_classes", "model")
]


@pytest.mark.parametrize(("build", "name", "option"), OPTIONS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_whatever_an_option_is_told_it_is_built_or_named(build, name, option):
    """Also numbers that would fill the memory, or be counted up to without end."""
    never = (math.nan, math.inf, "x", "0.3", ["x"], {}, object())
    for value in (0, -1, 2.5, 10**6, 10**12, 1e30, None, True, [], *never):
        message = ""
        try:
            build(name, **{option: value})
        except (TypeError, ValueError) as error:
            message = str(error)
        assert re.search(rf"\b{option}\b", message) or (not message and value not in never), (value, message)


@pytest.mark.parametrize(
    ("build", "name", "options", "message"),
    [
        (criterion, "star", {"margin": "0.3"}, r"criterion 'star': margin must be a number, got '0.3' \(str\)"),
        (criterion, "baseline", {"margin": "0.3"}, "margin must be a number or None, got '0.3'"),
        (criterion, "baseline", {"neck": "no"}, "criterion 'baseline': neck must be True or False, got 'no'"),
        (criterion, "grl", {"losses": [1]}, r"losses must be a list of strings, got \[1\] \(list\)"),
        (criterion, "loga", {"generator": 0}, "generator must be a Generator or None, got 0"),
        (small, "gltr", {"dtp": "x"}, "aggregator 'gltr': dtp must be True or False, got 'x'"),
        (small, "lstm", {"hidden_features": 8.0}, "hidden_features must be a whole number, got 8.0"),
        (small, "loga", {"scale": []}, "scale must be a number or a string or None"),
    ],
)
def test_a_wrong_type_is_named(build, name, options, message):
    with pytest.raises(TypeError, match=message):
        build(name, **options)


def test_ranges_of_options():
    for build, name, options, message in (
        (criterion, "fgra", {"consistency_weight": -1}, "consistency_weight must be at least 0, got -1"),
        (criterion, "gsta", {"pyramid_weight": -0.1}, "pyramid_weight must be at least 0, got -0.1"),
        (small, "gltr", {"branches": 17}, "branches must be from 1 to 16, got 17"),
        (small, "fgra", {"num_regions": 1001}, "num_regions must be from 1 to 1000"),
        (small, "loga", {"part_size": 0}, "part_size must be at least 1"),
        (small, "lstm", {"hidden_features": 2**16 + 1}, "hidden_features must be at most 65,536, got 65537"),
    ):
        with pytest.raises(ValueError, match=message):
            build(name, **options)


def test_numbers_of_numpy_are_numbers():
    assert small("lstm", hidden_features=np.int64(8)).num_features == 8
    assert criterion("baseline", margin=np.float32(0.25)).triplet.margin == 0.25


def test_a_registered_class_is_found_and_remembers_its_options(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @register_aggregator("first")
    class First(Aggregator):
        def __init__(self, in_features, gain=1.0):
            super().__init__(in_features, in_features)
            self.gain = gain

        def aggregate(self, features, mask, frames):
            return Details(self.gain * features[:, 0], mask, mask.float(), {}, {})

    aggregator = create_aggregator("first", 3, gain=2.0)
    assert aggregator.config == {"name": "first", "in_features": 3, "gain": 2.0}
    assert torch.equal(aggregator(torch.ones(1, 2, 3)), torch.full((1, 3), 2.0))
    with pytest.raises(ValueError, match="registered already"):
        register_aggregator("first")(First)
