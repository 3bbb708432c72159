import gc
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from temporal_agg.retrieval import distances, rerank, rerank_distances

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def literal(squared, Q, k1, k2, lambda_value):
    """The paper with the authors' conventions, one item after the other, on all squared distances ``[N, N]``."""
    N = len(squared)
    d = np.array([row / (row.max() or 1) for row in squared.astype(np.float64)])
    ranking = [sorted(range(N), key=lambda j, row=row: (row[j], j)) for row in squared.tolist()]

    def reciprocal(i, k):
        return [j for j in ranking[i][: k + 1] if i in ranking[j][: k + 1]]

    V = np.zeros((N, N))
    for i in range(N):
        R = set(reciprocal(i, k1))
        expanded = set(R)
        for c in R:
            half = set(reciprocal(c, int(np.around(k1 / 2))))
            if len(half & R) > 2 / 3 * len(half):
                expanded |= half
        for j in expanded:
            V[i, j] = np.exp(-d[i, j])
        if expanded:
            V[i] /= V[i].sum()
    if k2 != 1:
        V = np.array([np.mean([V[j] for j in ranking[i][:k2]], axis=0) for i in range(N)])
    out = np.zeros((Q, N - Q))
    for q in range(Q):
        for g in range(Q, N):
            m = np.minimum(V[q], V[g]).sum()
            out[q, g - Q] = (1 - lambda_value) * (1 - m / (2 - m)) + lambda_value * d[q, g]
    return out


def squared_distances(x):
    x = x.astype(np.float64)
    return ((x[:, None] - x[None]) ** 2).sum(-1)


def random_features(rng, N):
    """Whole numbers, so that float32 has every squared distance exactly; loose, in clusters, or with many copies."""
    D = int(rng.integers(1, 9))
    x = rng.integers(-60, 61, (N, D))
    kind = rng.choice(["loose", "clusters", "copies"])
    if kind == "clusters":
        x = x[rng.integers(0, max(1, N // 6), N)] + rng.integers(-9, 10, (N, D))
    if kind == "copies":
        x = x[rng.integers(0, max(1, N // rng.integers(1, 12)), N)]
    return x.astype(np.float32)


def random_settings(rng):
    k1 = int(rng.choice([1, 2, 3, 5, 6, 10, 20, 50, 100]))
    return {"k1": k1, "k2": int(rng.choice([1, 2, 3, 6, 30, 90])), "lambda_value": float(rng.choice([0, 0.3, 0.75, 1]))}


def test_equals_the_literal_loop():
    rng = np.random.default_rng(0)
    for case in range(60):
        Q, G = int(rng.integers(1, 12)), int(rng.integers(1, 30))
        x, settings = random_features(rng, Q + G), random_settings(rng)
        want = literal(squared_distances(x), Q, **settings)
        got = rerank(x[:Q], x[Q:], **settings, chunk_size=int(rng.choice([5, 16, 1024])))
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=0, err_msg=f"case {case}: {Q}, {G}, {settings}")


def test_equals_the_literal_loop_on_given_distances():
    """Any symmetric matrix will do, also where the triangle inequality fails or an item is not its own nearest."""
    rng = np.random.default_rng(1)
    for case in range(40):
        Q, G = int(rng.integers(1, 12)), int(rng.integers(1, 30))
        d = rng.integers(0, rng.choice([3, 30, 4000]), (Q + G, Q + G))
        d = np.triu(d) + np.triu(d, 1).T
        if rng.random() < 0.7:
            np.fill_diagonal(d, 0)
        d, settings = d.astype(np.float32), random_settings(rng)
        want = literal(d.astype(np.float64) ** 2, Q, **settings)
        chunk_size = int(rng.choice([5, 16, 1024]))
        got = rerank_distances(d[:Q, Q:], d[:Q, :Q], d[Q:, Q:], **settings, chunk_size=chunk_size)
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=0, err_msg=f"case {case}: {Q}, {G}, {settings}")


@pytest.fixture(scope="module")
def clusters():
    """60 queries and 340 gallery items of 25 identities in 32 dimensions, in whole numbers."""
    rng = np.random.default_rng(2)
    x = rng.integers(-40, 41, (25, 32))[rng.integers(0, 25, 400)] + rng.integers(-50, 51, (400, 32))
    return x[:60].astype(np.float32), x[60:].astype(np.float32)


def test_default_settings_on_clusters(clusters):
    want = literal(squared_distances(np.concatenate(clusters)), 60, 20, 6, 0.3)
    assert want.std() > 0.05
    np.testing.assert_allclose(rerank(*clusters), want, atol=1e-5, rtol=0)


def test_features_and_their_distances_agree(clusters):
    queries, gallery = clusters
    pairs = ((queries, gallery), (queries, queries), (gallery, gallery))
    matrices = [np.sqrt(((a[:, None].astype(np.float64) - b[None]) ** 2).sum(-1)) for a, b in pairs]
    want = rerank(queries, gallery, k1=7, k2=3)
    np.testing.assert_allclose(rerank_distances(*matrices, k1=7, k2=3), want, atol=1e-5, rtol=0)
    matrices = [distances(a, b, "euclidean") for a, b in pairs]
    np.testing.assert_allclose(rerank_distances(*matrices, k1=7, k2=3), want, atol=1e-5, rtol=0)


def test_chunks_do_not_matter(clusters, monkeypatch):
    module = sys.modules["temporal_agg.retrieval.rerank"]
    queries, gallery = (x[:n] for x, n in zip(clusters, (20, 100), strict=True))
    want = rerank(queries, gallery, k1=9)
    for chunk_size, cells, pairs in ((4, 2**20, 512), (37, 500, 1), (60, 5000, 7), (400, 1, 3)):
        monkeypatch.setattr(module, "_CELLS", cells)
        monkeypatch.setattr(module, "_PAIRS", pairs)
        np.testing.assert_allclose(rerank(queries, gallery, k1=9, chunk_size=chunk_size), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_torch_in_torch_out(clusters, device):
    want = rerank(*clusters)
    queries, gallery = (torch.from_numpy(x).to(device) for x in clusters)
    got = rerank(queries.requires_grad_(), gallery)
    assert got.device == queries.device
    assert got.dtype == torch.float32
    assert not got.requires_grad
    np.testing.assert_allclose(got.cpu().numpy(), want, atol=1e-5, rtol=0)
    with torch.autocast(device, dtype=torch.bfloat16):
        torch.testing.assert_close(rerank(queries.double(), gallery.double()), got, atol=1e-5, rtol=0)
    matrices = [torch.cdist(a, b) for a, b in ((queries, gallery), (queries, queries), (gallery, gallery))]
    got = rerank_distances(*matrices)
    assert got.device == queries.device
    assert not got.requires_grad
    np.testing.assert_allclose(got.cpu().numpy(), want, atol=1e-5, rtol=0)


def test_the_input_is_left_alone(clusters):
    queries, gallery = clusters
    matrices = [distances(a, b, "euclidean") for a, b in ((queries, gallery), (queries, queries), (gallery, gallery))]
    given = [*clusters, *matrices]
    before = [x.copy() for x in given]
    rerank(*clusters)
    rerank_distances(*matrices)
    assert all(np.array_equal(x, y) for x, y in zip(given, before, strict=True))
    for x in given:
        x.flags.writeable = False
    np.testing.assert_array_equal(rerank(queries, np.asfortranarray(gallery)), rerank(queries.copy(), gallery.copy()))


def test_it_helps(clusters):
    """Items of one cluster come nearer than others that were as near before."""
    rng = np.random.default_rng(3)
    pids = rng.integers(0, 40, 600)
    x = rng.normal(size=(40, 64))[pids] + 1.6 * rng.normal(size=(600, 64))
    same = pids[:100, None] == pids[100:]

    def precision(d):  # of the ten nearest
        return np.take_along_axis(same, d.argsort(1)[:, :10], 1).mean()

    assert precision(rerank(x[:100], x[100:])) > precision(distances(x[:100], x[100:], "euclidean")) + 0.05


def test_candidates_have_the_distances_of_the_full_re_ranking(clusters):
    queries, gallery = clusters
    for n, k1, k2, lambda_value in ((1, 20, 6, 0.3), (7, 9, 3, 0.0), (40, 20, 1, 0.3), (10_000, 20, 6, 0.3)):
        full = rerank(queries, gallery, k1, k2, lambda_value)
        found, indices = rerank(queries, gallery, k1, k2, lambda_value, candidates=n)
        n = min(n, len(gallery))
        assert found.shape == indices.shape == (len(queries), n)
        assert (found.dtype, indices.dtype) == (np.float32, np.int64)
        nearest = distances(queries, gallery, "euclidean").argsort(1, kind="stable")[:, :n]
        assert np.array_equal(np.sort(indices), np.sort(nearest))
        np.testing.assert_allclose(found, np.take_along_axis(full, indices, 1), atol=1e-6, rtol=0)
        assert (np.diff(found) >= 0).all()
        assert (np.diff(indices)[np.diff(found) == 0] > 0).all(), "ties by index"
    assert isinstance(rerank(*map(torch.tensor, clusters), candidates=2).indices, torch.Tensor)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e19, 1e30])
def test_scale_does_not_matter(clusters, scale):
    queries, gallery = (x[:100].astype(np.float64) for x in clusters)
    want = rerank(queries, gallery, 9)
    np.testing.assert_allclose(rerank(queries * scale, gallery * scale, 9), want, atol=1e-5, rtol=0)
    pairs = (queries, gallery), (queries, queries), (gallery, gallery)
    matrices = [distances(a, b, "euclidean").astype(np.float64) * scale for a, b in pairs]
    np.testing.assert_allclose(rerank_distances(*matrices, 9), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_and_device_do_not_matter(clusters, dtype):
    queries, gallery = (torch.tensor(x[:50]) for x in clusters)
    want = rerank(queries, gallery, 5), rerank(queries, gallery, 5, candidates=3)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        torch.set_default_device("meta")
        got = rerank(queries, gallery, 5), rerank(queries, gallery, 5, candidates=3)
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert torch.equal(got[0], want[0])
    assert all(map(torch.equal, got[1], want[1]))


def test_lambda_one_is_the_distance(clusters):
    squared = distances(*clusters, "euclidean") ** 2
    largest = squared_distances(np.concatenate(clusters))[:60].max(1, keepdims=True)
    np.testing.assert_allclose(rerank(*clusters, lambda_value=1), squared / largest, atol=1e-5)


def test_all_embeddings_equal():
    x = np.ones((30, 4))
    assert (rerank(x[:10], x[10:]) == 0).all()
    got = rerank(x[:10], x[10:], k1=3, k2=1)  # after the first four items, nobody has neighbours
    assert (got == np.float32(0.7)).all()


def test_no_query_or_no_gallery():
    x = np.ones((3, 4))
    assert rerank(x[:0], x).shape == (0, 3)
    assert rerank(x, x[:0]).shape == (3, 0)
    assert rerank_distances(np.ones((0, 3)), np.ones((0, 0)), np.ones((3, 3))).shape == (0, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="resets the high-water mark of the memory in /proc")
def test_memory_is_far_below_a_square_matrix():
    """6,000 items: one matrix of them takes 144 MB, the result 24 MB."""

    def high_water():
        return next(int(x.split()[1]) / 1e3 for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)

    rng = np.random.default_rng(4)
    x = (rng.normal(size=(300, 32))[rng.integers(0, 300, 6000)] + 0.7 * rng.normal(size=(6000, 32))).astype(np.float32)
    rerank(x[:100], x[100:2000])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    rerank(x[:1000], x[1000:], chunk_size=512)
    assert high_water() - before < 80


def test_errors_say_what_came():
    x = np.ones((3, 4))
    bad = x.copy()
    bad[1, 2] = np.nan
    d = {"query_gallery": np.ones((3, 2)), "query_query": np.ones((3, 3)), "gallery_gallery": np.ones((2, 2))}
    cases = [
        (ValueError, r"\[Q, D\] and gallery \[G, D\], got \[3, 4\] and \[3, 5\]", (x, np.ones((3, 5))), {}),
        (ValueError, r"queries must have two dimensions, got \[4\]", (x[0], x), {}),
        (TypeError, "got ndarray and Tensor", (x, torch.ones(3, 4)), {}),
        (TypeError, "got list and list", (x.tolist(), x.tolist()), {}),
        (
            ValueError,
            "on one device, got cpu and, for gallery, meta",
            (torch.ones(3, 4), torch.ones(3, 4, device="meta")),
            {},
        ),
        (ValueError, r"queries\[1\] holds NaN", (bad, x), {}),
        (ValueError, r"gallery\[1\] holds NaN", (x, bad), {}),
        (ValueError, r"queries\[0\] has no number above 1, .*too far apart", (x, np.array([[1], [1], [1e30]]) * x), {}),
        (TypeError, "k1 must be a whole number, got 2.5", (x, x), {"k1": 2.5}),
        (ValueError, "candidates must be at least 1, got 0", (x, x), {"candidates": 0}),
        (ValueError, "k1 must be at least 1, got 0", (x, x), {"k1": 0}),
        (ValueError, "k2 must be at least 1, got -1", (x, x), {"k2": -1}),
        (ValueError, "chunk_size must be at least 1, got 0", (x, x), {"chunk_size": 0}),
        (ValueError, "lambda_value must be from 0 to 1, got 1.5", (x, x), {"lambda_value": 1.5}),
        (ValueError, "lambda_value must be from 0 to 1, got nan", (x, x), {"lambda_value": float("nan")}),
    ]
    for error, message, arguments, options in cases:
        with pytest.raises(error, match=message):
            rerank(*arguments, **options)
    for key, value, message in (
        ("query_gallery", np.ones((2, 3)), r"query_query \[2, 2\] and gallery_gallery \[3, 3\] .* got \[3, 3\] and"),
        ("query_query", np.ones((3, 2)), r"query_query \[3, 3\] .* got \[3, 2\]"),
        ("gallery_gallery", -np.ones((2, 2)), "gallery_gallery must hold distances .* from -1 to -1"),
        ("query_gallery", np.full((3, 2), np.nan), "query_gallery must hold distances .* nan"),
        ("query_query", np.full((3, 3), np.inf), "query_query must hold distances .* inf"),
    ):
        with pytest.raises(ValueError, match=message):
            rerank_distances(**{**d, key: value})
    with pytest.raises(ValueError, match="k1 must be"):
        rerank_distances(**d, k1=0)
    with pytest.raises(TypeError, match=r"query_gallery and query_query and gallery_gallery .* got ndarray and list"):
        rerank_distances(**{**d, "query_query": [[1.0]]})
