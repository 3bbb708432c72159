import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from temporal_agg.retrieval import Calibration, calibrate, evaluate, open_set


def literal(distances, query_pids, query_cams, gallery_pids, gallery_cams, own, ambiguous, threshold):
    """One query after the other: (queries with a match, found; queries without, taken for somebody)."""
    mated = right = unmated = false = 0
    for q, pid in enumerate(query_pids):
        has_match, nearest, who = False, math.inf, None
        for g, other in enumerate(gallery_pids):
            same_camera = query_cams[q] == gallery_cams[g] and query_cams[q] != -1
            if other == -1 or g == own[q] or ambiguous[g] == pid or (other == pid and same_camera):
                continue
            has_match |= other == pid
            # a wrong one before a match at its distance
            if distances[q][g] < nearest or (distances[q][g] == nearest and other != pid):
                nearest, who = distances[q][g], other
        identified = nearest < threshold
        mated, unmated = mated + has_match, unmated + (not has_match)
        right += has_match and identified and who == pid
        false += not has_match and identified
    return mated, right, unmated, false


def random_case(rng):
    Q, G = rng.integers(5, 30), rng.integers(3, 30)
    gallery_pids, query_pids = rng.integers(-1, 6, G), rng.integers(0, 9, Q)
    cams = [rng.integers(-1, 3, n) for n in (Q, G)]
    distances = rng.integers(0, rng.choice([3, 10, 1000]), (Q, G)).astype(np.float32) / 10
    own = [rng.choice([-1, *np.flatnonzero(gallery_pids == pid)]) for pid in query_pids]
    ambiguous = np.where(rng.random(G) < 0.2, rng.integers(0, 9, G), -1)
    return (distances, query_pids, cams[0], gallery_pids, cams[1]), np.array(own), ambiguous


def test_equals_the_literal_loop():
    rng = np.random.default_rng(0)
    done = 0
    for _ in range(100):
        case, own, ambiguous = random_case(rng)
        mated, _, unmated, _ = literal(*case, own, ambiguous, math.inf)
        if not mated or not unmated:
            continue
        done += 1
        got = open_set(*case, query_index=own, ambiguous_pids=ambiguous, fpirs=(0, 0.1, 0.25, 1))
        assert (got.mated, got.unmated) == (mated, unmated)
        points = zip(got.curve_thresholds, got.curve_fpir, got.curve_tpir, strict=True)
        for threshold, fpir, tpir in points:
            _, right, _, false = literal(*case, own, ambiguous, threshold)
            assert (tpir, fpir) == (right / mated, false / unmated)
        for asked, tpir, threshold in zip(got.fpirs, got.tpirs, got.thresholds, strict=True):
            assert got.at(asked) == (tpir, threshold)
            _, right, _, false = literal(*case, own, ambiguous, threshold)
            assert tpir == right / mated
            assert false / unmated <= asked
            if threshold < math.inf:  # any larger threshold lets too many in
                assert literal(*case, own, ambiguous, np.nextafter(threshold, math.inf))[3] / unmated > asked
    assert done > 33


def test_everybody_may_be_identified_is_rank_one():
    rng = np.random.default_rng(1)
    for _ in range(50):
        case, own, ambiguous = random_case(rng)
        try:
            got = open_set(*case, query_index=own, ambiguous_pids=ambiguous, fpirs=[1])
        except ValueError:
            continue
        want = evaluate(*case, query_index=own, ambiguous_pids=ambiguous)
        assert got.tpirs[0] == pytest.approx(want.rank(1))
        assert got.unmated == want.queries_without_match


def test_by_hand():
    """Persons 1, 2 are known, 8 and 9 are strangers."""
    distances = torch.tensor([[0.1, 0.9], [0.8, 0.3], [0.6, 0.7], [0.5, 0.2]])
    got = open_set(distances, [1, 2, 8, 9], [0] * 4, [1, 2], [1, 1], fpirs=(0, 0.5, 1))
    np.testing.assert_allclose(got.thresholds, [0.2, 0.6, np.inf])
    assert got.tpirs.tolist() == [0.5, 1, 1]
    assert repr(got) == (
        "OpenSetMetrics(TPIR 50.0% at FPIR 0 (below 0.2), TPIR 100.0% at FPIR 0.5 (below 0.6), TPIR 100.0% at FPIR 1 "
        "(below inf); 2 queries with a match, 2 without)"
    )


def test_rates_need_both_kinds():
    case = np.ones((2, 2)), [1, 2], [0, 0], [1, 2], [1, 1]
    with pytest.raises(ValueError, match=r"no query is without a match .* Leave some people out"):
        open_set(*case)
    with pytest.raises(ValueError, match=r"no query is with a match .* alike"):
        open_set(*case[:3], [3, 4], [1, 1])
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1\.5"):
        open_set(*case[:3], [1, 4], [1, 1], fpirs=[1.5])
    with pytest.raises(ValueError, match=r"distances\[0, 0\] is NaN"):
        open_set(case[0] * np.nan, *case[1:])


def pairs(rng, n=4000):
    frames = rng.integers(1, 60, n)
    distances = rng.random(n) * 2
    odds = 3 - 5 * distances + 0.8 * np.log(frames)
    return distances, rng.random(n) < 1 / (1 + np.exp(-odds)), frames


@pytest.mark.parametrize("with_frames", [False, True])
def test_calibration_is_logistic_regression(with_frames):
    from sklearn.linear_model import LogisticRegression

    distances, same, frames = pairs(np.random.default_rng(0))
    x = np.stack([distances, np.log(frames)][: 1 + with_frames], 1)
    mean, deviation = x.mean(0), x.std(0)
    fit = LogisticRegression(C=100, tol=1e-10, max_iter=1000).fit((x - mean) / deviation, same)  # C: 1 / our penalty
    got = calibrate(distances, same, frames if with_frames else None)
    want = fit.predict_proba((x - mean) / deviation)[:, 1]
    np.testing.assert_allclose(got.probability(distances, frames if with_frames else None), want, atol=1e-6)
    assert got.probability(distances, frames if with_frames else None).mean() == pytest.approx(same.mean(), abs=1e-9)
    if with_frames:
        np.testing.assert_allclose([got.intercept, got.per_distance, got.per_log_frames], [3, -5, 0.8], atol=0.4)


def test_calibration_survives_json_and_takes_tables():
    distances, same, frames = pairs(np.random.default_rng(1), 600)
    shape = 30, 20
    frames = frames[:30, None]
    got = calibrate(torch.from_numpy(distances.reshape(shape)), torch.from_numpy(same.reshape(shape)), frames)
    again = Calibration(**json.loads(json.dumps(dataclasses.asdict(got))))
    assert again == got
    p = again.probability(distances.reshape(shape), torch.from_numpy(frames))
    assert (p.shape, p.dtype) == (shape, np.float64)
    assert again.probability(0.2, 5).shape == ()
    assert (np.diff(again.probability(np.linspace(0, 2, 50), 4)) < 0).all()
    assert not np.isnan(again.probability([-1e6, 1e6], 1)).any()


def test_pairs_that_are_parted_perfectly():
    got = calibrate([0.1, 0.2, 0.8, 0.9], [True, True, False, False])
    assert got.probability([0.0, 1.0]).round().tolist() == [1, 0]
    assert got.probability(0.5) == pytest.approx(0.5)
    with pytest.warns(UserWarning, match="knows nothing"):
        silent = calibrate(np.ones(4), [1, 1, 0, 1])
    assert silent.probability(1) == pytest.approx(0.75)


def test_calibration_errors_say_what_came():
    d, same = np.array([0.1, 0.5, 0.9]), np.array([True, False, False])
    fitted = calibrate(d, same)
    cases = [
        (ValueError, r"same must have the shape of distances, \[3\], got \[2\]", lambda: calibrate(d, same[:2])),
        (TypeError, "same must be True and False", lambda: calibrate(d, d)),
        (TypeError, "same must be True and False", lambda: calibrate(d, [0, 1, 2])),
        (ValueError, "all 3 pairs are of different persons", lambda: calibrate(d, [False] * 3)),
        (ValueError, "all 3 pairs are of the same person", lambda: calibrate(d, [True] * 3)),
        (ValueError, "1 are NaN or infinite", lambda: calibrate([0.1, np.nan, 1], same)),
        (ValueError, "frames must be at least 1, got 0", lambda: calibrate(d, same, [0, 1, 2])),
        (ValueError, r"frames must fit distances \[3\], got \[2\]", lambda: calibrate(d, same, [1, 2])),
        (ValueError, "calibrated without the number of frames", lambda: fitted.probability(d, 3)),
        (ValueError, "calibrated with the number", lambda: calibrate(d, same, [1, 2, 3]).probability(d)),
        (TypeError, "intercept of a calibration must be a number, got '1'", lambda: Calibration("1", 2.0)),
        (ValueError, "per_distance of a calibration must be finite", lambda: Calibration(1.0, math.nan)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    with pytest.warns(UserWarning, match="similarities"):
        calibrate(-d, same)
