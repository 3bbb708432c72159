import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist

from temporal_agg.retrieval import BCubed, bcubed, distances, link


def literal(table, threshold, apart):
    """Every round all pairs of groups, each by the mean over its pairs of members."""
    groups = [[i] for i in range(len(table))]
    while True:
        best = None
        for a in range(len(groups)):
            for b in range(a):
                if any(apart[i][j] for i in groups[a] for j in groups[b]):
                    continue
                mean = np.mean([table[i][j] for i in groups[a] for j in groups[b]])
                if mean <= threshold and (best is None or mean < best[0]):
                    best = mean, a, b
        if best is None:
            break
        groups[best[2]] += groups.pop(best[1])
    labels = np.empty(len(table), int)
    for n, group in enumerate(sorted(groups, key=min)):
        labels[group] = n
    return labels


def renumbered(labels):
    order = {}
    return [order.setdefault(label, len(order)) for label in labels]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_equals_scipy_where_nobody_must_stay_apart(metric):
    rng = np.random.default_rng(0)
    for n in (2, 3, 10, 60, 300):
        x = rng.normal(size=(1 + n // 4, 6))[rng.integers(0, 1 + n // 4, n)] + 0.5 * rng.normal(size=(n, 6))
        tree = linkage(pdist(x, metric), "average")
        for threshold in (*np.quantile(tree[:, 2], [0.1, 0.5, 0.9]) + 1e-4, 0, np.inf):
            want = renumbered(fcluster(tree, threshold, "distance"))
            got = link(x, threshold, metric=metric)
            assert got.dtype == np.int64
            assert got.tolist() == want


def test_equals_the_literal_loop():
    rng = np.random.default_rng(1)
    kept = 0
    for _ in range(60):
        n = int(rng.integers(1, 25))
        x = torch.from_numpy(rng.normal(size=(1 + n // 4, 6))[rng.integers(0, 1 + n // 4, n)] + rng.normal(size=(n, 6)))
        cameras, start = rng.integers(-1, 3, n), rng.integers(0, 50, n)
        end = start + rng.integers(0, 20, n)
        apart = [
            [i != j and cameras[i] == cameras[j] != -1 and start[i] <= end[j] and start[j] <= end[i] for j in range(n)]
            for i in range(n)
        ]
        threshold = rng.random() * 1.2
        got = link(x, threshold, cameras=cameras, start=start, end=torch.from_numpy(end))
        assert got.tolist() == literal(distances(x, x).tolist(), threshold, apart).tolist()
        assert not any(apart[i][j] and got[i] == got[j] for i in range(n) for j in range(n))
        kept += got.tolist() != link(x, threshold).tolist()
    assert kept > 10, "the constraints should matter"


def test_two_at_once_are_never_one():
    """Three equal embeddings: the second and the third are seen at once; the first joins one of them only."""
    x = np.ones((3, 4))
    assert link(x, 1).tolist() == [0, 0, 0]
    assert link(x, 1, start=[0, 10, 20], end=[5, 20, 30]).tolist() == [0, 0, 1]  # the last frame counts
    assert link(x, 1, start=[0, 10, 21], end=[5, 20, 30]).tolist() == [0, 0, 0]
    assert link(x, 1, start=[0, 10, 20], end=[5, 20, 30], cameras=[1, 1, 2]).tolist() == [0, 0, 0]
    assert link(x, 1, start=[0, 10, 20], end=[5, 20, 30], cameras=[-1, -1, -1]).tolist() == [0, 0, 0]
    assert link(x, np.inf, start=[0.0, 0.0, 0.0], end=[1.5, 1.0, 1.0]).tolist() == [0, 1, 2]


def test_small_sets():
    assert link(np.ones((0, 4)), 1).tolist() == []
    assert link(np.ones((1, 4)), 1).tolist() == [0]
    assert link(np.eye(3), 0.99).tolist() == [0, 1, 2]
    assert link(np.eye(3), 1).tolist() == [0, 0, 0], "at most the threshold"


def test_link_errors_say_what_came():
    x = np.ones((3, 4))
    cases = [
        (ValueError, "threshold must be a number, got nan", {"threshold": np.nan}),
        (ValueError, "threshold must be a number, got 'low'", {"threshold": "low"}),
        (ValueError, "got 'cosinus'", {"metric": "cosinus"}),
        (ValueError, "start and end go together", {"start": [1, 2, 3]}),
        (ValueError, "cameras alone keep nobody apart", {"cameras": [1, 2, 3]}),
        (ValueError, r"tracklet 1 ends \(1\) before it starts \(2\)", {"start": [1, 2, 3], "end": [1, 1, 3]}),
        (ValueError, r"end must have the shape \[3\]", {"start": [1, 2, 3], "end": [1, 2]}),
        (ValueError, r"start\[1\] is not finite", {"start": [1, np.nan, 3], "end": [1, 2, 3]}),
        (TypeError, "start must be numbers", {"start": ["a", "b", "c"], "end": [1, 2, 3]}),
        (TypeError, "cameras must be integers", {"start": [1] * 3, "end": [1] * 3, "cameras": [0.5] * 3}),
    ]
    for error, message, options in cases:
        with pytest.raises(error, match=message):
            link(x, **{"threshold": 0.5, **options})
    with pytest.raises(ValueError, match=r"queries\[2\] holds NaN|embeddings\[2\] holds NaN"):
        link(np.array([[1.0], [2.0], [np.nan]]), 0.5)


def test_bcubed_equals_the_literal_loop():
    rng = np.random.default_rng(2)
    for _ in range(100):
        n = int(rng.integers(1, 40))
        labels, truth = rng.integers(0, 6, n), rng.integers(-1, 6, n)
        kept = [i for i in range(n) if truth[i] != -1]
        if not kept:
            continue
        precision = recall = 0.0
        for i in kept:
            group = [j for j in kept if labels[j] == labels[i]]
            person = [j for j in kept if truth[j] == truth[i]]
            both = sum(labels[j] == labels[i] and truth[j] == truth[i] for j in kept)
            precision += both / len(group) / len(kept)
            recall += both / len(person) / len(kept)
        want = precision, recall, 2 * precision * recall / (precision + recall)
        np.testing.assert_allclose(bcubed(labels, torch.from_numpy(truth)), want)


def test_bcubed_by_hand():
    assert bcubed([5, 5, 5, 5], [0, 0, 1, 1]) == BCubed(0.5, 1, pytest.approx(2 / 3))
    assert bcubed([0, 1, 2, 3], [0, 0, 1, 1]) == BCubed(1, 0.5, pytest.approx(2 / 3))
    with pytest.raises(ValueError, match=r"labels must have the shape \[2\] to fit truth \[2\], got \[1\]"):
        bcubed([1], [1, 2])
    with pytest.raises(ValueError, match="nothing can be compared"):
        bcubed([1], [-1])
