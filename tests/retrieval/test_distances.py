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


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused_with_its_rows(metric, value):
    x, y = np.ones((2, 3)), np.ones((9, 3))
    y[[1, 3, 4, 5, 6, 8], 1] = value
    with pytest.raises(ValueError, match=r"gallery: 6 rows \(1, 3, 4, 5, 6, \.\.\.\) hold NaN or infinity"):
        distances(x, y, metric)
    with pytest.raises(ValueError, match=r"queries\[8\] holds NaN"):
        distances(torch.from_numpy(y[[0, 2, 7] * 2 + [0, 2, 8]]).half(), torch.ones(2, 3).half(), metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-25, 1e-18, 1e18, 1e20, 1e37])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_magnitude(embeddings, metric, scale, dtype):
    queries, gallery = ((x * scale / 8).astype(dtype) for x in embeddings)
    want = literal(*embeddings, metric) * {"cosine": 1, "euclidean": scale / 8, "dot": (scale / 8) ** 2}[metric]
    if metric == "dot" and not 1e-37 < (scale / 8) ** 2 < 1e36:
        with pytest.raises(ValueError, match=r"beyond what float32 holds .* divide the embeddings"):
            distances(queries, gallery, metric)
    else:
        got = distances(queries, gallery, metric)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_magnitudes_beyond_float32_are_compared_in_float64s_range(embeddings):
    for scale in (1e-300, 1e300):
        queries, gallery = (x * scale for x in embeddings)
        np.testing.assert_allclose(distances(queries, gallery), literal(*embeddings, "cosine"), rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match="beyond what float32 holds"):
            distances(queries, gallery, "euclidean")


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_magnitudes_may_differ_from_row_to_row(embeddings, metric):
    rng = np.random.default_rng(2)
    queries, gallery = (x * 10.0 ** rng.integers(-30, 30, (len(x), 1)) for x in embeddings)
    gallery[3] = 0
    want = np.array([[literal(x[None], y[None], "euclidean")[0, 0] for y in gallery] for x in queries])
    if metric == "cosine":
        unit = [np.divide(x, n, out=np.zeros_like(x), where=n > 0) for x in (queries, gallery)
                for n in [np.linalg.norm(x, axis=1, keepdims=True)]]  # fmt: skip
        want = 1 - unit[0] @ unit[1].T
    np.testing.assert_allclose(
        distances(queries, gallery, metric), want, rtol=1e-5, atol=0 if metric != "cosine" else 1e-6
    )


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int8, bool, ">f4", np.longdouble])
def test_any_real_type(dtype):
    x = np.random.default_rng(3).integers(0, 2, (5, 8)).astype(dtype)
    x[:, 0] = 1
    for metric in METRICS:
        np.testing.assert_allclose(distances(x, x, metric), literal(x, x, metric), atol=2e-3)


def test_huge_integers():
    x = np.array([[2**62, 0], [0, 2**62], [2**62, 2**61]])
    np.testing.assert_allclose(distances(x, x, "euclidean"), literal(x, x, "euclidean"), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_and_device_do_not_matter(embeddings, dtype):
    queries, gallery = (torch.from_numpy(x).float() for x in embeddings)
    want = [distances(queries, gallery, metric) for metric in METRICS]
    wild = distances(queries * 1e30, gallery * 1e-30)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        torch.set_default_device("meta")
        for metric, expected in zip(METRICS, want, strict=True):
            assert torch.equal(distances(queries, gallery, metric), expected)
        assert torch.equal(distances(queries * 1e30, gallery * 1e-30), wild)
        assert distances(queries.numpy(), gallery.numpy()).dtype == np.float32
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


def test_no_query_or_no_gallery():
    assert distances(np.ones((0, 4)), np.ones((3, 4))).shape == (0, 3)
    assert distances(np.ones((3, 4)), np.ones((0, 4))).shape == (3, 0)


def test_errors_say_what_came():
    x = np.ones((3, 4))
    with pytest.raises(ValueError, match=r"\[Q, D\] and gallery \[G, D\], got \[3, 4\] and \[3, 5\]"):
        distances(x, np.ones((3, 5)))
    with pytest.raises(ValueError, match=r"got \[4\] and \[3, 4\]"):
        distances(x[0], x)
    for metric in ("manhattan", "cosinus", "Cosine", "", None):
        with pytest.raises(ValueError, match=f"'cosine', 'euclidean' or 'dot', got {metric!r}"):
            distances(x, x, metric)
    with pytest.raises(ValueError, match=r"got \[\] and \[3, 4\]"):
        distances(np.array(1.0), x)
    with pytest.raises(ValueError, match=r"A single embedding goes in as x\[None\]"):
        distances(x[0], x)
    with pytest.raises(ValueError, match="at least one number"):
        distances(x[:, :0], x[:, :0])
    for wrong in (x.astype(complex), x.astype(str), x.astype(object)):
        with pytest.raises(TypeError, match="queries must hold real numbers, got"):
            distances(wrong, x)
    with pytest.raises(TypeError, match=r"pass gallery.to_dense\(\)"):
        distances(torch.ones(3, 4), torch.ones(3, 4).to_sparse())
    with pytest.raises(TypeError, match="got list and list"):
        distances([[1.0]], [[1.0]])
    with pytest.raises(TypeError, match="got ndarray and Tensor"):
        distances(x, torch.ones(3, 4))
    with pytest.raises(ValueError, match="one device, got cpu and, for gallery, meta"):
        distances(torch.ones(3, 4), torch.ones(3, 4, device="meta"))
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        distances(x, x, chunk_size=0)
    with pytest.raises(TypeError, match=r"chunk_size must be a whole number, got 2\.5"):
        distances(x, x, chunk_size=2.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("metric", METRICS)
def test_stays_on_the_gpu(embeddings, metric):
    got = distances(*(torch.from_numpy(x).cuda() for x in embeddings), metric)
    assert got.is_cuda
    np.testing.assert_allclose(got.cpu().numpy(), literal(*embeddings, metric), rtol=1e-5, atol=1e-5)
