import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from temporal_agg.retrieval import distances

METRICS = ("cosine", "euclidean", "dot")


def literal(x, y, metric):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return -x @ y.T if metric == "dot" else cdist(x, y, metric)


@pytest.fixture
def embeddings():
    rng = np.random.default_rng(0)
    return rng.normal(size=(23, 40)), rng.normal(size=(31, 40)) + 0.3


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_equals_scipy(embeddings, metric, dtype):
    queries, gallery = (x.astype(dtype) for x in embeddings)
    got = distances(queries, gallery, metric)
    assert isinstance(got, np.ndarray)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, literal(queries, gallery, metric), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_torch_in_torch_out(embeddings, metric):
    queries, gallery = (torch.from_numpy(x) for x in embeddings)
    want = distances(*embeddings, metric)
    got = distances(queries.requires_grad_(), gallery, metric)
    assert isinstance(got, torch.Tensor)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert np.array_equal(got.numpy(), want)
    half = distances(queries.bfloat16(), gallery.bfloat16(), metric)
    rounded = (x.detach().bfloat16().double() for x in (queries, gallery))
    np.testing.assert_allclose(half.numpy(), literal(*rounded, metric), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distances(queries, gallery, metric), got)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("chunk_size", [1, 7, 23, 1000])
def test_chunks_do_not_matter(embeddings, metric, chunk_size):
    np.testing.assert_allclose(
        distances(*embeddings, metric, chunk_size=chunk_size), distances(*embeddings, metric), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_identical_vectors_are_at_zero_and_never_nan(metric, scale):
    x = np.random.default_rng(1).normal(size=(200, 512)).astype(np.float32) * np.float32(scale)
    got = distances(x, x, metric)
    length = np.linalg.norm(x, axis=1).max() if metric == "euclidean" else 1
    assert not np.isnan(got).any()
    assert got.min() >= 0
    assert np.diag(got).max() < 2e-3 * length
    assert got.argmin(1).tolist() == list(range(200))


def test_zero_vectors():
    x = np.array([[0.0, 0.0], [3.0, 4.0]])
    assert distances(x, x, "cosine").tolist() == [[1, 1], [1, 0]]
    assert distances(x, x, "euclidean").tolist() == [[0, 5], [5, 0]]


def test_cosine_spans_zero_to_two():
    x = np.array([[2.0, 0.0], [0.0, 0.1], [-7.0, 0.0]])
    np.testing.assert_allclose(distances(x[:1], x, "cosine"), [[0, 1, 2]], atol=1e-7)


def test_any_memory_layout(embeddings):
    queries, gallery = (x.astype(np.float32) for x in embeddings)
    want = distances(queries, gallery)
    gallery.flags.writeable = False
    np.testing.assert_allclose(distances(queries[::-1], np.asfortranarray(gallery))[::-1], want, rtol=1e-5, atol=1e-6)
    assert np.array_equal(distances(queries, gallery), want)


def test_nan_stays_visible():
    x = np.ones((2, 3))
    x[1, 1] = np.nan
    for metric in METRICS:
        assert np.isnan(distances(x, x, metric)).tolist() == [[False, True], [True, True]]


def test_no_query_or_no_gallery():
    assert distances(np.ones((0, 4)), np.ones((3, 4))).shape == (0, 3)
    assert distances(np.ones((3, 4)), np.ones((0, 4))).shape == (3, 0)


def test_errors_say_what_came():
    x = np.ones((3, 4))
    with pytest.raises(ValueError, match=r"\[Q, D\] and gallery \[G, D\], got \[3, 4\] and \[3, 5\]"):
        distances(x, np.ones((3, 5)))
    with pytest.raises(ValueError, match=r"got \[4\] and \[3, 4\]"):
        distances(x[0], x)
    with pytest.raises(ValueError, match="got 'manhattan'"):
        distances(x, x, "manhattan")
    with pytest.raises(TypeError, match="got ndarray and Tensor"):
        distances(x, torch.ones(3, 4))
    with pytest.raises(ValueError, match="gallery is on meta"):
        distances(torch.ones(3, 4), torch.ones(3, 4, device="meta"))
    with pytest.raises(ValueError, match="chunk_size"):
        distances(x, x, chunk_size=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("metric", METRICS)
def test_stays_on_the_gpu(embeddings, metric):
    got = distances(*(torch.from_numpy(x).cuda() for x in embeddings), metric)
    assert got.is_cuda
    np.testing.assert_allclose(got.cpu().numpy(), literal(*embeddings, metric), rtol=1e-5, atol=1e-5)
