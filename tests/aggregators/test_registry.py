import pytest
import torch

from temporal_agg import create_aggregator, list_aggregators, register_aggregator
from temporal_agg.aggregators import Aggregator, Details, registry


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
