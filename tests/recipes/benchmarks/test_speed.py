"""That the benchmark compares like with like, and that its numbers are what they say."""

import copy
import csv
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from temporal_agg import create_aggregator, list_aggregators

B, C = 3, 16
PAPERS = {"loga", "gsta", "gltr", "gltr_released", "fgra", "grl", "grl_released"}
MINIATURE = [
    *("--batch", "2", "--frames", "3", "--channels", "512", "--height", "4", "--width", "2", "--size", "64x32"),
    *("--threads", str(torch.get_num_threads()), "--repeats", "2"),
]
CASES = [(name, {"hidden_features": 32} if name == "gsta" else {}) for name in list_aggregators()]
CASES += [("fgra", {"num_regions": 3}), ("gltr", {"normalize": "none"}), ("loga", {"scale": 2.0, "part_size": 7})]
CASES += [("grl", {"directions": ["backward"], "parts": ["global", "mean", "memory", "pooled"]})]


@pytest.fixture
def benchmark(recipe):
    """The parts of speed.py under one name."""
    parts = [vars(recipe(name)) for name in ("measuring", "of_models", "of_retrieval", "results_of_speed", "speed")]
    return SimpleNamespace(**{key: value for part in parts for key, value in part.items()})


def build(name, options):
    torch.manual_seed(0)
    aggregator = create_aggregator(name, C, **options).double()
    with torch.no_grad():  # zero weights and unit norms would hide faults
        for p in aggregator.parameters():
            p += torch.randn_like(p) * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.3)
        for key, b in aggregator.named_buffers():
            if b.is_floating_point():
                b += torch.rand_like(b) + key.endswith("var")
    T = aggregator.clip_length or 4
    features = torch.randn(B, T, C, 5, 3, dtype=torch.float64)
    frames = torch.randn(B, T, 3, 8, 6, dtype=torch.float64) if aggregator.needs_frames else None
    return aggregator, features.requires_grad_(), frames


def run(call, aggregator, features, frames):
    """Embedding, gradients, and running statistics after the call."""
    embedding = call(features, frames=frames)
    loss = (embedding * torch.linspace(-1, 1, embedding.shape[1], dtype=torch.float64)).sin().sum()
    named = {"features": features, **dict(aggregator.named_parameters())}
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    statistics = {k: b for k, b in aggregator.named_buffers() if b.is_floating_point()}
    return embedding, gradients, statistics


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_the_literal_form_is_the_aggregator(benchmark, name, options, train):
    aggregator, features, frames = build(name, options)
    literal = benchmark.literal
    if not literal.exists(aggregator):
        pytest.skip(f"{name} has no literal form in literal.py: the benchmark leaves that column empty")
    other = copy.deepcopy(aggregator).train(train)
    got = run(aggregator.train(train), aggregator, features, frames)
    want = run(lambda x, frames: literal.FORMS[name](other, x, frames), other, features, frames)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    assert sum(g.abs().max() > 1e-6 for g in want[1].values()) > 0.7 * len(want[1])


def test_every_paper_has_a_literal_form(benchmark):
    assert PAPERS <= set(benchmark.literal.FORMS) <= set(list_aggregators())


def test_the_joined_weight_of_gsta_is_measured_not_its_joining(benchmark):
    aggregator, features, _ = build("gsta", {"hidden_features": 32})
    call, (weight,) = benchmark.literal.prepared(aggregator)
    call(features, frames=None).sin().sum().backward()
    (gradient, aggregator.lstm.input.weight.grad) = weight.grad, None
    aggregator(features).sin().sum().backward()
    parts = [aggregator.lstm.input.weight.grad, aggregator.lstm.recurrent.weight.grad]
    torch.testing.assert_close(gradient, torch.cat(parts, 1), rtol=1e-8, atol=1e-8)


def test_compiled_forms_stand_beside_ours(benchmark, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call: compiled.append(call) or call)
    argv = ["--names", "max,fgra", "--backbone", "none", "--no-memory", "--compile"]
    rows = benchmark.main(["aggregators", *MINIATURE, *argv])["rows"]
    assert len(compiled) == 2
    lines = capsys.readouterr().out.splitlines()
    for mode in ("forward", "forward + backward"):
        title = next(i for i, line in enumerate(lines) if line.split()[-1:] == ["compiled"] and mode in line)
        for row, line in zip(rows, lines[title + 1 :], strict=False):
            ms = row[mode]["ms"]
            assert line.split()[-2:] == [f"{ms['compiled']:.2f}", f"{ms['ours'] / ms['compiled']:.2f}"]
            assert len(row[mode]["all_ms"]["compiled"]) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own, in its exporter
def test_exported_forms_stand_beside_ours(benchmark, capsys):
    argv = ["--names", "mean,attention", "--backbone", "none", "--no-memory", "--export"]
    rows = benchmark.main(["aggregators", *MINIATURE, *argv])["rows"]
    lines = capsys.readouterr().out.splitlines()
    assert not any("backward" in line for line in lines)
    title = next(i for i, line in enumerate(lines) if line.split()[-4:] == ["ms", "exported", "ms", "onnx"])
    for row, line in zip(rows, lines[title + 1 :], strict=True):
        ms = row["forward"]["ms"]
        cells = [f"{x:.2f}" for key in ("exported", "onnx") for x in (ms[key], ms["ours"] / ms[key])]
        assert line.split()[-4:] == cells
        assert len(row["forward"]["all_ms"]["onnx"]) == 2

    _, args = benchmark.parse(["aggregators", *MINIATURE, *argv])
    # With images, with optical flow.
    for *case, options in (("aggregator", "loga", {}), ("model", "star_resnet10t", {"hidden_features": 8})):
        ours = benchmark.build(*case, benchmark.changed(args, options=options))
        works = benchmark.exported(ours)
        ours.prepare(False)
        for work in works.values():
            np.testing.assert_allclose(work.run(), ours.run(), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_table_and_json(benchmark, tmp_path, capsys):
    file = tmp_path / "bench.json"
    argv = ["--names", "mean,loga", "--systems", "star_resnet10t", "--backbone", "resnet10t", "--out", str(file)]
    result = benchmark.main(["aggregators", *MINIATURE, *argv, "--no-memory"])
    assert json.loads(file.read_text()) == result
    assert result["environment"]["torch"] == torch.__version__
    assert result["backbone"]["maps"] == [512, 4, 2]  # of 64x32, without the stride of the last stage
    assert result["backbone"]["frames"] == 6
    rows = {row["name"]: row for row in result["rows"]}
    assert {name: row["frames"] for name, row in rows.items()} == {"mean": 3, "loga": 10, "star_resnet10t": 3}
    assert rows["mean"]["parameters"] == 0
    for mode in ("forward", "forward + backward"):
        of, backbone = rows["loga"][mode], result["backbone"][mode]
        assert {key: len(times) for key, times in of["all_ms"].items()} == {"ours": 2, "literal": 2, "mean": 2}
        assert of["ms"]["ours"] == pytest.approx(sum(of["all_ms"]["ours"]) / 2)
        assert of["speedup"] == pytest.approx(of["ms"]["literal"] / of["ms"]["ours"])
        assert of["times_mean"] == pytest.approx(of["ms"]["ours"] / of["ms"]["mean"])
        assert of["backbone_share"] == pytest.approx(of["ms"]["ours"] / 20 / (backbone["ms"] / 6))
        assert set(rows["star_resnet10t"][mode]["ms"]) == {"ours", "mean"}
    lines = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}, numpy " in lines[0]
    assert "; B = 2, median of 2" in lines[0]
    assert lines[1:3] == ["aggregators on maps 512 x 4 x 2", "systems on frames 64x32"]
    assert lines[3].startswith("backbone resnet10t, 6 frames 64x32 to maps 512 x 4 x 2: forward ")
    assert [line.split()[0] for line in lines if line.startswith(("mean ", "loga ", "star"))] == [*rows, *rows]
    assert len({len(line) for line in lines[5:10]}) == 1  # columns stand below each other


@pytest.mark.slow
def test_peak_memory_is_what_the_tensors_take(benchmark):
    """Mean pooling in training makes one map, the gradient; GAM a few for any number of regions; its literal form
    several for each region."""
    _, args = benchmark.parse(["aggregators", *MINIATURE, "--names", "mean", "--height", "64", "--width", "32"])
    maps = 2 * 3 * 512 * 64 * 32 * 4 / 1e6  # 25 MB
    cases = [("aggregator", "mean", args)]
    for regions in (1, 4):
        cases += [
            (w, "fgra", benchmark.changed(args, options={"num_regions": regions})) for w in ("aggregator", "literal")
        ]
    mean, one, literal_one, four, literal_four = (
        {mode: peak / maps for mode, peak in peaks.items()} for peaks in benchmark.peak_memory(cases)
    )
    assert mean["forward"] < 0.2
    assert 0.9 < mean["forward + backward"] < 1.2
    for mode, kept in (("forward", 2), ("forward + backward", 4)):
        assert abs(four[mode] - one[mode]) < 0.2
        assert literal_four[mode] - literal_one[mode] > 0.9 * 3 * kept
        assert four[mode] < literal_four[mode] / 2


RETRIEVAL = [
    *("retrieval", "--sizes", "20x90,31X150", "--dims", "24", "--identities", "12"),
    *("--threads", str(torch.get_num_threads()), "--repeats", "2"),
]


def retrieval_results(benchmark, step, size, *argv):
    """What each form of a step returns on the same embeddings."""
    _, args = benchmark.parse([*RETRIEVAL, *argv])
    args = benchmark.changed(args, queries=size[0], gallery=size[1])
    return {form: benchmark.build("retrieval", f"{step}:{form}", args).run() for form in benchmark.FORMS[step]}


@pytest.mark.parametrize("structure", ["clustered", "random"])
def test_retrieval_in_plain_numpy_is_ours(benchmark, structure):
    for size in ((1, 40), (40, 200)):
        got = retrieval_results(benchmark, "distances", size, "--structure", structure)
        np.testing.assert_allclose(got["ours"].numpy(), got["numpy"], atol=1e-5)
        got = retrieval_results(benchmark, "evaluate", size, "--structure", structure)
        mean, cmc = got["numpy"]
        assert got["ours"].map == pytest.approx(mean, rel=1e-6)
        assert got["ours"].cmc == pytest.approx(cmc)
        assert got["argsort"].shape == size
        got = retrieval_results(benchmark, "rerank", size, "--structure", structure)
        np.testing.assert_allclose(got["ours"].numpy(), got["numpy"], atol=1e-5)
        np.testing.assert_allclose(got["ours"].numpy(), got["published"], atol=1e-5)


@pytest.mark.parametrize("settings", [{"k1": 7, "k2": 1}, {"k1": 2, "k2": 9, "lambda_value": 0.8}])
def test_literal_reranking_has_the_same_settings(benchmark, settings):
    rng = np.random.default_rng(0)
    queries, gallery = (rng.normal(size=(n, 8)).astype(np.float32) for n in (7, 60))
    got = benchmark.retrieval.rerank(queries, gallery, **settings)
    np.testing.assert_allclose(got, benchmark.literal_retrieval.rerank(queries, gallery, **settings), atol=1e-5, rtol=0)


def test_the_command_finds_what_sorted_rows_have_first(benchmark, tmp_path):
    sides = [torch.randn(n, 16, generator=torch.Generator().manual_seed(n)) for n in (30, 500)]
    files = benchmark.build_files(("queries", "gallery"), sides, tmp_path)
    found = []
    for form, run in benchmark.FROM_FILES.items():
        run(files, 20, tmp_path / form)
        with open(tmp_path / form, newline="", encoding="utf-8") as file:
            found.append(list(csv.reader(file)))
    ours, want = found
    assert len(want) == 1 + 30 * 20
    assert [row[:3] for row in ours] == [row[:3] for row in want]
    assert [float(row[3]) for row in ours[1:]] == pytest.approx([float(row[3]) for row in want[1:]], abs=2e-6)


@pytest.mark.slow
def test_retrieval_table_and_json(benchmark, tmp_path, capsys):
    file = tmp_path / "bench.json"
    result = benchmark.main([*RETRIEVAL, "--no-memory", "--out", str(file)])
    assert json.loads(file.read_text()) == json.loads(json.dumps(result))
    assert [(r["name"], r["queries"], r["gallery"]) for r in result["rows"]] == [
        (step, *size) for size in ((20, 90), (31, 150)) for step in ("distances", "evaluate", "rerank")
    ]
    for row in result["rows"]:
        assert set(row["ms"]) == set(benchmark.FORMS[row["name"]])
        for form, times in row["all_ms"].items():
            assert len(times) == 2
            assert row["ms"][form] == pytest.approx(sum(times) / 2)
        assert row["speedup"]["numpy"] == pytest.approx(row["ms"]["numpy"] / row["ms"]["ours"])
    assert 0 < result["rows"][1]["map"] < 1
    lines = capsys.readouterr().out.splitlines()
    assert f"numpy {np.__version__}; median of 2" in lines[0]
    assert lines[1].startswith("clustered embeddings [N, 24], 12 identities, mAP ")
    table = lines[3:]
    steps = ["distances", "evaluate", "argsort", "rerank", "published"]
    assert [line.split()[0] for line in table[2:]] == 2 * steps
    assert len({len(line) for line in table}) == 1

    result = benchmark.main([*RETRIEVAL, "--no-memory", "--skip-dense"])
    assert set(result["rows"][2]["ms"]) == {"ours"}
    assert set(result["rows"][1]["ms"]) == {"ours", "numpy", "argsort"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory on a CPU is measured on Linux only")
def test_peak_memory_of_retrieval(benchmark):
    """Distances take their own size; dense re-ranking three N x N matrices of 4 bytes and one of 8."""
    _, args = benchmark.parse(RETRIEVAL)
    small, large = (benchmark.changed(args, queries=n, gallery=4 * n) for n in (200, 1000))
    cases = [("distances:ours", large), ("evaluate:argsort", large), ("rerank:numpy", small)]
    peaks = benchmark.peak_memory([("retrieval", *case) for case in cases], {"run": False})
    distances, argsort, dense = (peak["run"] for peak in peaks)
    assert distances == pytest.approx(16, abs=2)
    assert argsort == pytest.approx(32, abs=2)
    assert 14 < dense < 40


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: embed | stream | train | long | aggregators | retrieval | search | all | compare | page"),
        (["retrieval", "--sizes", "100x"], "--sizes must be QUERIESxGALLERY, by comma, such as 1980x11310, got '100x'"),
        (["retrieval", "--structure", "blobs"], "invalid choice: 'blobs'"),
        (["aggregators", "--names", ""], "pass --names or --systems"),
        (["aggregators", "--names", "gtsa"], "did you mean 'gsta'"),
        (["aggregators", "--names", "fgra", "--options", "regions=3"], "has no option regions"),
        (["aggregators", "--options", "num_regions"], "takes KEY=VALUE, got num_regions"),
        (["aggregators", "--size", "256"], "HEIGHTxWIDTH"),
        (["aggregators", "--export", "--dtype", "bfloat16"], "for the CPU and float32, got cpu and bfloat16"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x) or "nothing",
)
def test_wrong_arguments_are_refused(benchmark, capsys, argv, message):
    with pytest.raises(SystemExit):
        benchmark.parse(argv)
    assert message in capsys.readouterr().err
