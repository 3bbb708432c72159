import sys

import numpy as np
import pytest
import torch

from temporal_agg.data import Tracklet
from temporal_agg.retrieval import evaluate, evaluate_tracklets


def literal(distances, query_pids, query_cams, gallery_pids, gallery_cams, own, ranks, ap, ambiguous=None):
    """One query after the other, walking down its list; equal distances put wrong tracklets first."""
    aps, inps, firsts = [], [], []
    for q, pid in enumerate(query_pids):
        ranking = []
        for g in range(len(gallery_pids)):
            same_camera = query_cams[q] == gallery_cams[g] and query_cams[q] != -1
            if gallery_pids[g] == -1 or g == own[q] or (gallery_pids[g] == pid and same_camera):
                continue
            if ambiguous is not None and ambiguous[g] == pid:
                continue
            ranking.append((distances[q][g], gallery_pids[g] == pid))
        ranking.sort()  # False (wrong) before True (match) at one distance
        matches = sum(match for _, match in ranking)
        if matches == 0:
            aps.append(float("nan"))
            continue
        total, seen, old_recall, old_precision, first = 0.0, 0, 0.0, 1.0, None
        for rank, (_, match) in enumerate(ranking, 1):
            seen += match
            recall, precision = seen / matches, seen / rank
            if ap == "step":
                total += precision * (recall - old_recall)
            else:
                total += (recall - old_recall) * (old_precision + precision) / 2
            old_recall, old_precision = recall, precision
            if match and first is None:
                first = rank
            if match and seen == matches:
                inps.append(matches / rank)
        aps.append(total)
        firsts.append(first)
    curve = [sum(f <= k for f in firsts) / len(firsts) if firsts else float("nan") for k in range(1, max(ranks) + 1)]
    return {
        "map": np.nanmean(aps) if firsts else float("nan"),
        "cmc": curve,
        "minp": np.mean(inps) if inps else float("nan"),
        "ap_per_query": aps,
        "queries_without_match": len(query_pids) - len(firsts),
    }


def random_case(rng, sizes=(1, 6), gallery=(1, 15)):
    Q, G = rng.integers(*sizes), rng.integers(*gallery)
    people, cameras = rng.integers(1, 5), rng.integers(1, 4)
    gallery_pids = rng.integers(rng.integers(-1, 2), people + 1, G)
    gallery_cams = rng.integers(-1 if rng.random() < 0.4 else 0, cameras, G)
    query_pids = rng.integers(0, people + 2, Q)
    query_cams = rng.integers(-1 if rng.random() < 0.4 else 0, cameras, Q)
    levels = rng.choice([2, 5, 1000])
    distances = rng.integers(0, levels, (Q, G)).astype(rng.choice([np.float32, np.float64, np.float16])) - 1
    if rng.random() < 0.1:
        distances[rng.integers(Q), rng.integers(G)] = rng.choice([-np.inf, np.inf])
    own = np.full(Q, -1)
    for q in range(Q):
        columns = np.flatnonzero(gallery_pids == query_pids[q])
        if len(columns) and rng.random() < 0.5:
            own[q] = rng.choice(columns)
    return distances, query_pids, query_cams, gallery_pids, gallery_cams, own


def check(got, want):
    np.testing.assert_allclose(got.ap_per_query, want["ap_per_query"], rtol=1e-12)
    np.testing.assert_allclose(got.cmc, want["cmc"], rtol=1e-12)
    np.testing.assert_allclose([got.map, got.minp], [want["map"], want["minp"]], rtol=1e-12)
    assert got.queries_without_match == want["queries_without_match"]


@pytest.mark.parametrize("ap", ["step", "trapezoidal"])
def test_equals_the_literal_loop(ap):
    rng = np.random.default_rng(0)
    without = 0
    for _ in range(500):
        *case, own = random_case(rng)
        ranks = (1, int(rng.integers(1, 25)))
        got = evaluate(*case, query_index=own, ranks=ranks, ap=ap)
        check(got, literal(*case, own, ranks, ap))
        without += got.queries_without_match > 0
    assert 50 < without < 450, "the cases should cover queries with and without a match"


@pytest.mark.parametrize("ap", ["step", "trapezoidal"])
def test_equals_the_literal_loop_with_many_matches(ap):
    rng = np.random.default_rng(1)
    for _ in range(20):
        *case, own = random_case(rng, sizes=(2, 4), gallery=(100, 400))
        check(evaluate(*case, query_index=own, ap=ap), literal(*case, own, (20,), ap))


def test_equals_torchmetrics():
    """Without ties, junk and cameras, which it does not know."""
    from torchmetrics.functional.retrieval import retrieval_average_precision

    rng = np.random.default_rng(2)
    for _ in range(50):
        G = int(rng.integers(5, 60))
        gallery_pids = rng.integers(0, 4, G)
        distances = rng.permutation(3 * G).reshape(3, G).astype(np.float32)
        got = evaluate(distances, [1, 2, 3], [-1] * 3, gallery_pids, [-1] * G)
        for q in range(3):
            target = torch.from_numpy(gallery_pids == q + 1)
            if target.any():
                want = retrieval_average_precision(torch.from_numpy(3 * G - distances[q]), target)
                assert got.ap_per_query[q] == pytest.approx(want.item(), rel=1e-6)
            else:
                assert np.isnan(got.ap_per_query[q])


def test_torch_equals_numpy():
    rng = np.random.default_rng(3)
    *case, own = random_case(rng, sizes=(20, 21), gallery=(60, 61))
    want = evaluate(*case, query_index=own)
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for device in devices:
        tensors = [torch.as_tensor(x.astype(np.float32) if x.dtype.kind == "f" else x, device=device) for x in case]
        tensors[0].requires_grad_()
        check(evaluate(*tensors, query_index=torch.as_tensor(own, device=device)), want.__dict__)
    rounded = tensors[0].detach().bfloat16()
    check(evaluate(rounded, *tensors[1:]), evaluate(rounded.float(), *tensors[1:]).__dict__)
    check(evaluate(np.asfortranarray(case[0]), *case[1:], query_index=own), want.__dict__)


def test_rows_keep_their_place_across_blocks():
    wide = 2**21 - 7  # two rows to a block
    distances = np.zeros((5, wide), dtype=np.float32)
    distances[:, 1:] = 1
    distances[3, 7] = -1
    pids = np.full(wide, 9)
    pids[0] = 5
    got = evaluate(distances, [5] * 5, [1] * 5, pids, np.full(wide, 2), ranks=(2,))
    assert got.ap_per_query.tolist() == [1, 1, 1, 0.5, 1]
    assert got.cmc.tolist() == [0.8, 1]


@pytest.mark.parametrize("ap", ["step", "trapezoidal"])
def test_who_may_be_the_person_is_neither_match_nor_wrong(ap):
    rng = np.random.default_rng(5)
    for _ in range(500):
        *case, own = random_case(rng)
        G = len(case[3])
        ambiguous = np.where(rng.random(G) < 0.4, rng.integers(0, 5, G), -1)
        got = evaluate(*case, query_index=own, ambiguous_pids=ambiguous, ap=ap)
        check(got, literal(*case, own, (20,), ap, ambiguous))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_matter(threads, monkeypatch):
    rng = np.random.default_rng(6)
    *case, own = random_case(rng, sizes=(97, 98), gallery=(60, 61))
    want = literal(*case, own, (20,), "step")
    module = sys.modules["temporal_agg.retrieval.evaluate"]
    monkeypatch.setattr(module, "_cores", lambda: threads)
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: threads)
    for cells in (1, 500, 2**20):
        monkeypatch.setattr(module, "_CELLS", cells)
        check(evaluate(*case, query_index=own), want)
    case[0][[20, 90], 7] = np.nan
    with pytest.raises(ValueError, match=r"distances\[20, 7\] is NaN"):
        evaluate(*case)


def test_tracklets_know_who_they_are(tmp_path):
    """Cameras are unknown; the gallery lists the queries' files once more, and one tracklet may be a second person."""

    def tracklet(name, pid, **more):
        return Tracklet([tmp_path / f"{name}_{i}.png" for i in range(2)], pid, -1, name, **more)

    query = [tracklet("a", 1), tracklet("b", 2)]
    gallery = [tracklet("a", 1), tracklet("b", 2), tracklet("c", 1), tracklet("d", 2)]
    distances = np.array([[0.0, 0.1, 0.2, 0.3], [0.2, 0.0, 0.3, 0.1]])
    got = evaluate_tracklets(distances, query, gallery, ranks=(1, 2))
    assert got.ap_per_query.tolist() == [0.5, 1]  # the copies of the queries are no matches of theirs
    assert got.rank(1) == 0.5
    gallery[1] = Doubtful(gallery[1], 1)
    assert evaluate_tracklets(distances, query, gallery).ap_per_query.tolist() == [1, 1]
    with pytest.raises(TypeError, match=r"gallery\[0\] must be a tracklet with pid and camera, got int"):
        evaluate_tracklets(distances, query, [1, 2, 3, 4])


class Doubtful:
    """A stand-in for a tracklet of which nobody is sure whether it shows a second person."""

    def __init__(self, tracklet, ambiguous_pid):
        self.frames, self.pid, self.camera, self.ambiguous_pid = tracklet.frames, tracklet.pid, -1, ambiguous_pid


def test_metrics_print_short():
    got = evaluate(np.array([[0.1, 0.2, 0.3]]).repeat(1000, 0), [1] * 1000, [0] * 1000, [2, 1, 1], [1, 1, 1], ranks=[5])
    assert repr(got) == (
        "RetrievalMetrics(mAP 58.3%, rank-1 0.0%, rank-5 100.0%, mINP 66.7%; 1000 queries, 0 without a match)"
    )
    assert "mAP nan%" in repr(evaluate(np.ones((1, 1)), [1], [0], [2], [0]))


def test_by_hand():
    """Ranks 1 and 3: the tracklet of camera 1 and the junk take none, the distractor takes its own."""
    distances = np.array([[0.1, 0.2, 0.3, 0.4, 0.05, 0.01, 0.5]])
    gallery_pids = [7, 0, 7, 8, 7, -1, 8]
    gallery_cams = [2, 2, 3, 1, 1, 1, 2]
    got = evaluate(distances, [7], [1], gallery_pids, gallery_cams)
    assert got.map == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert got.minp == pytest.approx(2 / 3)
    assert got.rank(1) == 1
    got = evaluate(distances, [7], [1], gallery_pids, gallery_cams, ap="trapezoidal")
    assert got.map == pytest.approx(((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2) / 2)


@pytest.mark.parametrize(("wrong", "want"), [(0.3, 0.5), (np.nextafter(0.3, 1), 1.0)])
def test_a_tie_is_no_hit(wrong, want):
    assert evaluate(np.array([[0.3, wrong]]), [1], [1], [1, 2], [2, 2]).map == want


def test_equal_distances_everywhere_are_the_worst_ranking():
    got = evaluate(np.zeros((1, 10)), [1], [1], [1] * 2 + [2] * 8, [2] * 10, ranks=(8, 10))
    assert got.map == pytest.approx((1 / 9 + 2 / 10) / 2)
    assert got.rank(8) == 0
    assert got.rank(9) == 1


def test_unknown_cameras_ignore_only_the_query_itself():
    distances = np.array([[0.0, 0.2, 0.1]])
    flattered = evaluate(distances, [1], [-1], [1, 1, 2], [-1, -1, -1])
    assert flattered.map == pytest.approx((1 + 2 / 3) / 2)
    assert evaluate(distances, [1], [-1], [1, 1, 2], [-1, -1, -1], query_index=[0]).map == 0.5
    assert evaluate(distances, [1], [3], [1, 1, 2], [-1, 3, 3]).map == 1, "camera 3 is ignored, camera -1 is not"


def test_float64_is_not_rounded():
    assert evaluate(np.array([[1.0, 1 + 1e-12]]), [1], [1], [1, 2], [2, 2]).map == 1


def test_no_query_has_a_match():
    got = evaluate(np.zeros((2, 1)), [1, 2], [1, 1], [3], [2])
    assert got.queries_without_match == 2
    assert all(np.isnan(x).all() for x in (got.map, got.minp, got.cmc, got.ap_per_query))


def test_a_gallery_of_one():
    got = evaluate(np.zeros((1, 1)), [1], [1], [1], [2])
    assert (got.map, got.minp, got.queries_without_match) == (1, 1, 0)
    assert got.cmc.tolist() == [1] * 20


def test_nan_is_refused_with_its_place():
    distances = np.zeros((3, 4), dtype=np.float32)
    distances[1, 2] = distances[2, 0] = np.nan
    ids = ([1, 1, 1], [1, 1, 1], [1, 1, -1, 1], [2, 2, 2, 2])
    for given in (distances, torch.from_numpy(distances)):
        with pytest.raises(ValueError, match=r"distances\[1, 2\] is NaN"):
            evaluate(given, *ids)


def test_errors_say_what_came():
    d = np.zeros((2, 3))
    ids = ([1, 2], [1, 1], [1, 2, 3], [2, 2, 2])
    cases = [
        (ValueError, r"\[Q, G\] .* got \[3\]", d[0], ids, {}),
        (ValueError, r"got \[0, 3\]", d[:0], ([], [], *ids[2:]), {}),
        (TypeError, "floating point, got int64", d.astype(int), ids, {}),
        (TypeError, "got list", d.tolist(), ids, {}),
        (ValueError, r"query_pids must have the shape \[2\].* got \[3\]", d, ([1, 2, 3], *ids[1:]), {}),
        (ValueError, r"gallery_cams must have the shape \[3\].* got \[1\]", d, (*ids[:3], [1]), {}),
        (TypeError, "query_cams must be integers, got float64", d, (ids[0], [1.0, 2.0], *ids[2:]), {}),
        (ValueError, r"query_pids\[1\] is -1", d, ([1, -1], *ids[1:]), {}),
        (ValueError, "gallery_pids .* got -2", d, (*ids[:2], [1, -2, 3], ids[3]), {}),
        (ValueError, "query_index must be columns .* from 0 to 3", d, ids, {"query_index": [0, 3]}),
        (ValueError, r"query_index\[1\] is 0, .* pid 1 .* has 2", d, ids, {"query_index": [-1, 0]}),
        (ValueError, "got 'area'", d, ids, {"ap": "area"}),
        (ValueError, "positive", d, ids, {"ranks": (0, 1)}),
        (ValueError, "positive", d, ids, {"ranks": ()}),
    ]
    for error, message, distances, arguments, options in cases:
        with pytest.raises(error, match=message):
            evaluate(distances, *arguments, **options)
    with pytest.raises(ValueError, match="ranks 1 to 20, got 21"):
        evaluate(d, *ids).rank(21)
