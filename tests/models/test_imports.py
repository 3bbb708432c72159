"""What is imported when: aggregators work without timm and torchvision, models without the Hub's client until one is
loaded; a search among files needs none of them."""

import subprocess
import sys

import pytest
import torch

from temporal_agg.retrieval import store

BLOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is not installed")
sys.meta_path.insert(0, Refuse())
"""


def run(blocked, code):
    return subprocess.run([sys.executable, "-c", BLOCK.format(blocked=blocked) + code], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("blocked", [("timm", "torchvision"), ("huggingface_hub",)], ids=lambda names: names[0])
def test_aggregators_criteria_and_models_of_ones_own_need_neither_timm_nor_the_hub(blocked):
    done = run(
        blocked,
        """
import torch, temporal_agg, temporal_agg.models.tracklet, temporal_agg.models.config
class Pixels(torch.nn.Module):
    num_features, data_config = 8, {"input_size": (3, 8, 4)}
    def forward(self, frames, flow=None):
        return frames.repeat(1, 3, 1, 1)[:, :8]
for name in temporal_agg.list_aggregators("[!l]*"):
    model = temporal_agg.TrackletModel(Pixels(), temporal_agg.create_aggregator(name, 8)).eval()
    details = model(torch.rand(2, 4, 3, 8, 4), return_details=True)
    criterion = temporal_agg.create_criterion("baseline", 2, model)
    assert criterion(details, torch.tensor([0, 1]))["loss"].isfinite()
""",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_without_timm_a_model_says_what_to_install():
    done = run(("timm",), "import temporal_agg; temporal_agg.create_model('mean_resnet18')")
    assert "ImportError: models need timm (pip install 'timm>=1.0.8')" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("module", ["temporal_agg", "temporal_agg.cli"])
def test_importing_the_package_loads_none(module):
    code = f"import sys, {module}; assert not {{'timm', 'torchvision', 'huggingface_hub'}} & {{*sys.modules}}, 'loaded'"
    done = run((), code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_search_among_files_starts_without_them(tmp_path):
    found = store.Embeddings(torch.eye(3), ["a", "b", "c"], None, None, "cosine", "m", False, "f")
    store.write_embeddings(tmp_path / "a.npz", found)
    file = str(tmp_path / "a.npz")
    code = f"from temporal_agg import cli; sys.exit(cli.main(['search', {file!r}, {file!r}]))"
    done = run(("timm", "torchvision", "huggingface_hub"), code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:3] == ["a", "1", "1.0000"]
