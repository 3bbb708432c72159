"""The promise: somebody puts one file into aggregators/, changes nothing else, and everything knows the new name.

The file is the one that docs/adding_an_aggregator.md shows. It is put into a copy of the project, and what goes through
the registry there is run again: the contract, the structure, README and docs, the Hub, the benchmark and the cards.
"""

import os
import shutil
import subprocess
import sys

import documents
import pytest
from documents import ROOT

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "adding_an_aggregator.md"
SUITES = {  # what reads the registry
    "contract": ["tests/aggregators/test_contract.py", "-k", "moments"],
    "lists": ["tests/aggregators/test_registry.py", "tests/test_structure.py", "tests/models/test_factory.py"],
    "documents": [
        "tests/test_readme.py",
        "tests/test_docs.py",
        "-k",
        "not pages_run and not python_blocks and not keeps_the_contract",
    ],
    "hub": ["tests/models/test_hub.py", "tests/hub"],
    "benchmarks": ["tests/recipes/benchmarks", "-k", "literal or aggregators or names"],
    "figures and the rest": ["tests/test_plot.py", "tests/test_export.py", "-k", "moments"],
}

# Saves, loads, exports, draws, trains and gets a card.
PROGRAM = """
import json, sys, tempfile
from pathlib import Path
sys.path[:0] = ["recipes", "hub"]
import torch
import temporal_agg
from temporal_agg import data, plot

out = Path(tempfile.mkdtemp())
model = temporal_agg.create_model("moments_resnet10t", img_size=(64, 32)).eval()
clips = torch.randn(2, 8, 3, 64, 32)
model.save_pretrained(out / "model")
loaded = temporal_agg.create_model(f"local-dir:{out / 'model'}")
torch.testing.assert_close(loaded(clips), model(clips))
temporal_agg.export_onnx(model, out / "moments.onnx")
tracklet = data.open_dataset("synthetic", num_identities=4).query[0]
plot.maps(model, tracklet).savefig(out / "maps.png")
plot.frame_weights(model, tracklet).savefig(out / "weights.png")

import publish
import train
options = ["num_identities=4", "num_cameras=2", "length=[2,3]", "size=[64,32]"]
train.main(
    f"--data synthetic --data-options {' '.join(options)} --model moments_resnet10t --size 64x32 --epochs 1 "
    f"--identities 2 --clip-length 2 --workers 0 --device cpu --name run --out {out}".split()
)
criterion = json.loads((out / "run" / "metrics.json").read_text(encoding="utf-8"))["criterion"]
assert criterion == "moments", f"the recipe trained moments with the criterion {criterion}"
publish.main([str(out / "run"), "--dry-run", "--out", str(out / "release")])
card = (out / "release" / "README.md").read_text(encoding="utf-8")
assert "Two Moments Are Enough" in card and "A. Nobody" in card, card
print("all of it")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with one more file."""
    copy = tmp_path_factory.mktemp("drop_in") / "project"
    left_out = shutil.ignore_patterns(
        ".git", ".venv*", "__pycache__", "runs", "build", "dist", "*.egg-info", ".*_cache"
    )
    shutil.copytree(ROOT, copy, ignore=left_out)
    language, code = next(documents.blocks(PAGE))
    assert language == "python"
    (copy / "temporal_agg" / "aggregators" / "moments.py").write_text(code.lstrip("\n"), encoding="utf-8")
    return copy


def run(project, *command):
    env = {**os.environ, "PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *command], cwd=project, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.parametrize("suite", SUITES)
def test_the_suite_is_green_with_one_more_file(project, suite):
    run(project, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *SUITES[suite])


def test_it_saves_loads_exports_draws_trains_and_gets_a_card(project):
    assert run(project, "-W", "ignore", "-c", PROGRAM).endswith("all of it\n")


def test_linters_take_it(project):
    path = "temporal_agg/aggregators/moments.py"
    run(project, "-m", "ruff", "check", path)
    run(project, "-m", "mypy", path)
