"""The documentation: it builds without a warning, has every public name once, and its code runs."""

import doctest
import importlib
import importlib.util
import subprocess
import sys
import zlib
from collections import Counter

import documents
import pytest
import torch

import temporal_agg
from temporal_agg import aggregators, cli, data, export, losses, masked, models, plot, retrieval
from temporal_agg.aggregators import registry

DOCS = documents.ROOT / "docs"
KINDS = ("py:class", "py:exception", "py:function", "py:module")
SLOW = tuple(f"recipes/benchmarks/{name}.py" for name in ("mot", "robust", "speed", "study", "ward", "ward_weights"))
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if any(documents.blocks(page))]
PARSED = ("benchmarks",)  # what these pages run wants data sets that nobody may pass on
MET_FIRST = [  # each with an example that runs
    temporal_agg.Aggregator,
    temporal_agg.ClipConfig,
    temporal_agg.Details,
    temporal_agg.FrameEncoder,
    temporal_agg.Tracklet,
    temporal_agg.TrackletModel,
    temporal_agg.TrackletStream,
    temporal_agg.create_aggregator,
    temporal_agg.create_criterion,
    temporal_agg.create_model,
    temporal_agg.embed_tracklets,
    temporal_agg.export_onnx,
    temporal_agg.list_aggregators,
    temporal_agg.list_models,
    temporal_agg.load_weights,
    temporal_agg.register_aggregator,
    data.ClipDataset,
    data.IdentityBatchSampler,
    data.open_dataset,
    plot.frame_weights,
    plot.maps,
    retrieval.evaluate_tracklets,
    retrieval.link,
    retrieval.rerank,
    retrieval.search,
]

# Torch's own compiler and exporter import modules that warn about each other.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::PendingDeprecationWarning"
)


@pytest.fixture(scope="module")
def documented(tmp_path_factory):
    """Builds the site; how often each object is documented, by its id, and the names that they have there."""
    out = tmp_path_factory.mktemp("docs")
    # In a process of its own: autodoc changes the signatures of what it imports.
    command = [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "--keep-going", "-d", str(out / "doctrees")]
    done = subprocess.run([*command, str(DOCS), str(out / "html")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = (out / "html" / "objects.inv").read_bytes().split(b"\n", 4)[4]
    rows = [line.split(" ") for line in zlib.decompress(content).decode().splitlines()]
    names = [name for name, kind, priority, *_ in rows if kind in KINDS and priority != "-1"]  # an alias
    counts = Counter(id(named(name)) for name in names)
    return counts, names


def named(name):
    """What has this name; also in modules that nothing has imported yet."""
    found = temporal_agg
    for end, part in enumerate(name.split("."), 1):
        if end > 1:
            if not hasattr(found, part):
                importlib.import_module(".".join(name.split(".")[:end]))
            found = getattr(found, part)
    return found


@pytest.mark.slow
def test_every_public_name_is_documented_once(documented):
    counts, names = documented
    assert [name for name in temporal_agg.__all__ if f"temporal_agg.{name}" not in names] == []
    for part in (temporal_agg, aggregators, data, export, losses, masked, models, plot, retrieval):
        wrong = {f"{part.__name__}.{name}": counts[id(getattr(part, name))] for name in part.__all__}
        assert {name: count for name, count in wrong.items() if count != 1} == {}


def test_no_page_has_the_name_of_one_that_sphinx_makes():
    """It would be written over, without a warning."""
    assert {page.stem for page in DOCS.glob("*.md")}.isdisjoint(("genindex", "py-modindex", "search"))


@pytest.mark.slow
def test_every_registered_class_is_documented(documented):
    """Where the options of create_aggregator and create_criterion are explained."""
    builds = {f"{name} (aggregator)": entry.build for name, entry in registry._REGISTRY.items()}
    registered = {**builds, **registry._CRITERIA}
    assert [name for name, build in registered.items() if id(build) not in documented[0]] == []


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """Where pages and examples write what they want; the names that they register go afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(registry, "_CRITERIA", dict(registry._CRITERIA))
    torch.manual_seed(0)


@pytest.mark.slow
@pytest.mark.parametrize("thing", MET_FIRST, ids=lambda thing: thing.__name__)
def test_examples_in_docstrings_run(thing, empty_folder):
    test = doctest.DocTestParser().get_doctest(thing.__doc__, {}, thing.__name__, None, 0)
    assert test.examples
    wrong = []
    doctest.DocTestRunner().run(test, out=wrong.append)
    assert not wrong, "".join(wrong)


@pytest.fixture
def page_runner(empty_folder):
    """Runs a page's blocks in order, in one namespace and an empty folder."""
    torch._dynamo.reset()  # other tests' graphs count, too

    def run(page):
        names = {"__name__": page.stem}
        for language, code in documents.blocks(page):
            if language == "python":
                exec(compile(code, str(page), "exec"), names)
            elif language == "bash":
                for words in documents.commands(code):
                    run_command(words, page.stem in PARSED)

    return run


def run_command(words, only_parse=False):
    documents.check(words)
    if only_parse:
        return
    script = documents.script_of(words)
    if words[0] == "temporal-agg":
        assert cli.main(words[1:]) == 0
    elif script is not None and words[0] == "python" and script[0] not in SLOW:
        documents.load(script[0]).main(script[1])
    else:
        print(f"parsed, not run (it installs, tests, measures or wants several processes): {' '.join(words)}")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_run(page, page_runner):
    page_runner(page)


def test_the_new_aggregator_keeps_the_contract(page_runner):
    page_runner(DOCS / "adding_an_aggregator.md")
    path = documents.ROOT / "tests" / "aggregators" / "test_contract.py"
    spec = importlib.util.spec_from_file_location("contract", path)
    contract = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(contract)
    contract.test_masked_clip_equals_the_clip_of_its_real_frames(contract.build("moments"))
    contract.test_masks_in_training_with_gradients("moments", contract.build("moments"), (1, 5, 3))
    contract.test_every_parameter_has_a_finite_gradient(contract.build("moments"), masked=True)
    contract.test_exports_with_a_mask(contract.build("moments"))


@pytest.mark.parametrize(
    "wrong",
    [
        "python recipes/train.py --epoch-count 3",
        "python recipes/train.py --config recipes/configs/nothing.yaml",
        "torchrun --nproc_per_node 2 recipes/evaluate.py runs/mine --no-such",
        "python examples/absent.py",
        "temporal-agg embed people",
        "pip install -e '.[nothing]'",
        "python -m pytest tests/absent.py",
        "rm -r runs",
    ],
)
def test_wrong_commands_are_found(wrong):
    (words,) = documents.commands(wrong)
    with pytest.raises((SystemExit, ValueError)):
        documents.check(words)
