import gc
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from temporal_agg.retrieval import SearchResult, distances, search
from temporal_agg.retrieval.distances import Comparison

METRICS = ("cosine", "euclidean", "dot")


def literal(table, k, hidden=()):
    """Whole rows, sorted by distance and then by place."""
    rows = []
    for q, row in enumerate(table.tolist()):
        ranked = sorted((d, g) for g, d in enumerate(row) if (q, g) not in hidden)[:k]
        ranked += [(np.inf, -1)] * (min(k, len(row)) - len(ranked))
        rows.append(ranked)
    found = np.array(rows, dtype=np.float64).reshape(len(table), -1, 2)
    return found[..., 0], found[..., 1].astype(int)


@pytest.mark.parametrize("metric", METRICS)
def test_equals_sorted_rows(metric):
    rng = np.random.default_rng(0)
    cases = (1, 1, 3, 1, None), (7, 300, 5, 4, 32), (30, 5000, 8, 10, None), (5, 90, 4, 200, 1), (9, 70, 2, 33, 64)
    for Q, G, D, k, block in cases:
        queries, gallery = rng.normal(size=(Q, D)), rng.normal(size=(G, D))
        found, indices = search(queries, gallery, k, metric, block=block)
        want, places = literal(distances(queries, gallery, metric), k)
        assert (found.dtype, indices.dtype) == (np.float32, np.int64)
        np.testing.assert_allclose(found, want, atol=1e-6)
        assert np.array_equal(indices, places)


@pytest.mark.parametrize("metric", METRICS)
def test_equal_distances_are_in_order_of_the_gallery(metric):
    rng = np.random.default_rng(1)
    for _ in range(30):
        G, k, D = rng.integers(1, 400), rng.integers(1, 60), 3
        queries, gallery = rng.integers(-1, 2, (6, D)), rng.integers(-1, 2, (G, D))  # many are equal
        scale = rng.choice([1e-25, 1.0, 1e15])
        if metric != "dot":
            queries, gallery = queries * scale, gallery * scale
        hidden = sorted({(int(rng.integers(6)), int(rng.integers(G))) for _ in range(rng.integers(1, 80))})
        exclude = tuple(np.array(hidden).T)
        got = search(queries, gallery, k, metric, block=32, exclude=exclude)
        want, places = literal(distances(queries, gallery, metric), k, set(hidden))
        # Integers are exact in float32, but for the cosine's lengths: there equal vectors are equal in any block.
        np.testing.assert_allclose(got.distances, want, rtol=1e-6, atol=1e-6)
        if metric != "cosine" and scale == 1:
            assert np.array_equal(got.indices, places)


def test_nobody_is_its_own_match():
    x = np.random.default_rng(2).normal(size=(3000, 6))
    found = search(x, x, 5, "euclidean", exclude=np.arange(3000))
    table = distances(x, x, "euclidean")
    np.fill_diagonal(table, np.inf)
    assert np.array_equal(found.indices, table.argsort(1, kind="stable")[:, :5])
    some = np.where(np.arange(3000) % 2, -1, np.arange(3000))
    own = search(x, x, 1, "euclidean", exclude=some).indices[:, 0] == np.arange(3000)
    assert np.array_equal(own, some == -1)


def test_fewer_left_than_wanted():
    x = torch.eye(3)
    found = search(x, x, 5, exclude=[0, 1, 2])
    assert found.indices.tolist() == [[1, 2, -1], [0, 2, -1], [0, 1, -1]]
    assert found.distances.tolist() == [[1, 1, np.inf]] * 3
    assert search(x, x[:0], 5).indices.shape == (3, 0)
    assert search(x[:0], x, 2).distances.shape == (0, 2)


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
def test_kinds_of_input(device):
    rng = np.random.default_rng(3)
    queries, gallery = rng.normal(size=(20, 16)), rng.normal(size=(500, 16))
    want = search(queries, gallery, 9)
    tensors = [torch.from_numpy(x).to(device) for x in (queries, gallery)]
    got = search(tensors[0].requires_grad_(), tensors[1], 9)
    assert isinstance(got, SearchResult)
    assert got.distances.device == got.indices.device == tensors[0].device
    assert not got.distances.requires_grad
    assert np.array_equal(got.indices.cpu(), want.indices)
    for x in (tensors[0].T.contiguous().T, tensors[0].float().repeat_interleave(2, 0)[::2]):
        assert np.array_equal(search(x, tensors[1], 9).indices.cpu(), want.indices)
    half = [x.detach().half() for x in tensors]
    assert np.array_equal(search(*half, 9).indices.cpu(), search(*(x.float() for x in half), 9).indices.cpu())
    found, indices = pickle.loads(pickle.dumps(want))
    assert np.array_equal(found, want.distances)
    assert np.array_equal(indices, want.indices)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_and_device_do_not_matter(dtype):
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    want = search(x[:9], x, 4, "euclidean", exclude=range(9))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        torch.set_default_device("meta")
        got = search(x[:9], x, 4, "euclidean", exclude=range(9))
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert torch.equal(got.distances, want.distances)
    assert torch.equal(got.indices, want.indices)


@pytest.mark.skipif(sys.platform != "linux", reason="resets the high-water mark of the memory in /proc")
def test_memory_does_not_grow_with_the_table():
    """2,000 queries in 60,000: their distances would take 480 MB, a normalised gallery 15 MB."""

    def high_water():
        return next(int(x.split()[1]) / 1e3 for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)

    queries, gallery = torch.randn(2000, 64), torch.randn(60_000, 64)
    search(queries[:10], gallery, 5)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    search(queries, gallery, 10)
    assert high_water() - before < 100


@pytest.mark.parametrize("count", [1, 700, 1000, 1024])
def test_the_gallery_is_read_once_for_a_thousand_queries(count, monkeypatch):
    read, part = [], Comparison.part

    def counted(self, side, rows):
        if side == 1:
            read.extend(range(self.sizes[1])[rows])
        return part(self, side, rows)

    monkeypatch.setattr(Comparison, "part", counted)
    search(torch.randn(count, 4), torch.randn(5000, 4), 3)
    assert read == list(range(5000))


def test_errors_say_what_came():
    x = np.ones((3, 4))
    cases = [
        (ValueError, "k must be at least 1, got 0", {"k": 0}),
        (TypeError, "k must be a whole number, got 1.5", {"k": 1.5}),
        (ValueError, "got 'cosinus'", {"metric": "cosinus"}),
        (ValueError, "block must be at least 1", {"block": 0}),
        (ValueError, r"exclude must have the shape \[3\] to fit the 3 queries, got \[2\]", {"exclude": [0, 1]}),
        (ValueError, r"rows of the gallery, 0 to 2 .* from 0 to 3", {"exclude": [0, 1, 3]}),
        (ValueError, r"rows of the queries, 0 to 2 .* from -1 to 0", {"exclude": ([-1, 0], [0, 1])}),
        (TypeError, "exclude must be integers, got float64", {"exclude": [0.0, 1.0, 2.0]}),
        (ValueError, r"exclude\[1\] must have the shape \[2\]", {"exclude": ([0, 1], [0])}),
    ]
    for error, message, options in cases:
        with pytest.raises(error, match=message):
            search(x, x, **{"k": 1, **options})
    bad = x.copy()
    bad[2] = np.nan
    with pytest.raises(ValueError, match=r"gallery\[2\] holds NaN"):
        search(x, bad, 1)
