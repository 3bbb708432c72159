import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from temporal_agg.retrieval import faiss_index, load_index, save_index, search, search_index

try:
    import faiss
except ImportError:
    faiss = None

METRICS = ("cosine", "euclidean", "dot")
needs_faiss = pytest.mark.skipif(faiss is None, reason="needs faiss-cpu: pip install 'temporal-agg[faiss]'")


@pytest.fixture
def people():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(200, 32))
    gallery = centres[rng.integers(0, 200, 4000)] + 0.4 * rng.normal(size=(4000, 32))
    return centres[:60] + 0.4 * rng.normal(size=(60, 32)), gallery


@needs_faiss
@pytest.mark.parametrize("metric", METRICS)
def test_the_flat_index_ranks_as_search_does(people, metric, odd_folder):
    queries, gallery = people
    want = search(queries, gallery, 20, metric)
    index = faiss_index(gallery, metric)
    save_index(index, odd_folder / "people.faiss")
    assert [p.name for p in odd_folder.iterdir()] == ["people.faiss"]
    for found in (index, load_index(odd_folder / "people.faiss")):
        got = search_index(found, queries, 20)
        np.testing.assert_allclose(got.distances, want.distances, rtol=1e-4, atol=1e-5)
        assert np.array_equal(got.indices, want.indices)
    assert (index.ntotal, index.d) == (4000, 32)
    tensors = search_index(index, torch.from_numpy(queries).half().requires_grad_(), 20)
    assert isinstance(tensors.indices, torch.Tensor)


@needs_faiss
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_approximate_indexes_find_nearly_all(people, metric, kind, tmp_path):
    queries, gallery = people
    want = search(queries, gallery, 10, metric)
    save_index(faiss_index(torch.from_numpy(gallery), metric, kind), tmp_path / "i")
    got = search_index(load_index(tmp_path / "i"), queries, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(got.indices, want.indices, strict=True)])
    assert recall > 0.9
    same = got.indices == want.indices
    np.testing.assert_allclose(got.distances[same], want.distances[same], rtol=1e-4, atol=1e-5)
    assert (np.diff(got.distances) >= 0).all()


@needs_faiss
def test_equal_distances_and_short_galleries():
    x = np.ones((40, 4), np.float32)
    assert search_index(faiss_index(x), x[:2], 3).indices.tolist() == [[0, 1, 2]] * 2
    assert search_index(faiss_index(x[:2]), x[:1], 9).indices.tolist() == [[0, 1]]
    assert search_index(faiss_index(x), x[:0], 3).indices.shape == (0, 3)
    for kind in ("hnsw", "ivf"):
        assert search_index(faiss_index(x[:1], kind=kind), x[:1], 9).indices.tolist() == [[0]]
    assert search_index(faiss_index(x * 1e30), x[:1], 1).distances.tolist() == [[0]]
    zero = search_index(faiss_index(x * 0), x[:1], 1)
    assert zero.distances.tolist() == [[1]]


@needs_faiss
def test_errors_say_what_came(tmp_path):
    x = np.ones((3, 4), np.float32)
    index = faiss_index(x)
    (tmp_path / "wrong").write_bytes(b"no index at all")
    (tmp_path / "binary").write_bytes(b"")
    faiss.write_index(faiss.IndexFlat(4, faiss.METRIC_L1), str(tmp_path / "l1"))
    transformed = faiss.IndexPreTransform(faiss.RandomRotationMatrix(4, 4), faiss.IndexFlatIP(4))
    faiss.write_index(transformed, str(tmp_path / "rotated"))
    cases = [
        (ValueError, "'flat', 'hnsw' or 'ivf', got 'lsh'", lambda: faiss_index(x, kind="lsh")),
        (ValueError, "got 'cosinus'", lambda: faiss_index(x, "cosinus")),
        (ValueError, "no row to index", lambda: faiss_index(x[:0])),
        (ValueError, "FAISS squares embeddings in float32", lambda: faiss_index(x * 1e20, "euclidean")),
        (ValueError, r"gallery: 3 rows \(0, 1, 2\) hold NaN", lambda: faiss_index(x * np.nan)),
        (ValueError, r"queries: 3 rows \(0, 1, 2\) hold NaN", lambda: search_index(index, x * np.nan, 1)),
        (ValueError, "embeddings of 4 numbers, the queries have 3", lambda: search_index(index, x[:, :3], 1)),
        (ValueError, "k must be at least 1", lambda: search_index(index, x, 0)),
        (FileNotFoundError, "absent", lambda: load_index(tmp_path / "absent")),
        (ValueError, "wrong is no FAISS index", lambda: load_index(tmp_path / "wrong")),
        (ValueError, "binary is no FAISS index", lambda: load_index(tmp_path / "binary")),
        (
            ValueError,
            "l1 is no FAISS index of embeddings.*neither by inner product",
            lambda: load_index(tmp_path / "l1"),
        ),
        (ValueError, "rotated is no FAISS index of embeddings.*another way", lambda: load_index(tmp_path / "rotated")),
        (OSError, "folder", lambda: save_index(index, tmp_path / "folder" / "i")),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


@needs_faiss
def test_the_example_states_recall(capsys):
    path = Path(__file__).parents[2] / "examples" / "faiss_search.py"
    spec = importlib.util.spec_from_file_location("examples_faiss_search", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    recall = example.compare(example.people(3000, 16), example.people(40, 16, seed=1))
    assert recall["flat"] == 1
    assert min(recall.values()) > 0.8
    assert capsys.readouterr().out.count("recall@10") == 3


def test_without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'temporal-agg\[faiss\]'"):
        faiss_index(np.ones((3, 4)))
