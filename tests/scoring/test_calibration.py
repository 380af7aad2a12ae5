"""Probabilities that an answer is right: found again, and their measures against plain counting.
Knows: scoring.calibration. Must not know: words.
"""
from __future__ import annotations

import math

import numpy as np
import pytest

from icefall_fusion.scoring.calibration import Logistic, area_under_curve, calibration_error, held_out


def test_weights_are_found_again_and_are_calibrated() -> None:
    rng = np.random.default_rng(0)
    true = Logistic({"intercept": 0.5, "a": 1.5, "b": -0.02})
    values = np.column_stack([rng.normal(0, 1, 20_000), rng.normal(100, 50, 20_000)])
    right = rng.random(20_000) < true(values)
    found = Logistic.fit(["a", "b"], values, right)
    assert found.names == ["a", "b"]
    assert found.weights["a"] == pytest.approx(1.5, rel=0.05)
    assert found.weights["b"] == pytest.approx(-0.02, rel=0.05)
    assert calibration_error(found(values), right) < 0.01
    assert calibration_error(found(values) ** 3, right) > 0.05


def test_weights_stay_finite_where_nothing_is_uncertain_or_nothing_varies() -> None:
    values = np.array([[0.0, 7.0], [1.0, 7.0], [2.0, 7.0], [3.0, 7.0]])
    found = Logistic.fit(["a", "same"], values, np.array([False, False, True, True]))
    assert 0 < found.weights["a"] < 20 and found.weights["same"] == 0
    with pytest.raises(ValueError, match="words must be right here and wrong there, but is 4"):
        Logistic.fit(["a", "same"], values, np.ones(4, bool))


def test_measures_equal_plain_counting() -> None:
    rng = np.random.default_rng(1)
    scores, right = rng.integers(0, 6, 60) / 5, rng.random(60) < 0.6
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[right] for b in scores[~right]]
    assert area_under_curve(scores, right) == pytest.approx(np.mean(pairs))
    assert calibration_error(np.array([0.25, 0.25, 0.95, 1.0]), np.array([1, 0, 1, 1])) == pytest.approx(
        0.5 * abs(0.25 - 0.5) + 0.5 * abs(0.975 - 1))
    with pytest.raises(ValueError, match="right here and wrong there"):
        area_under_curve(scores, np.zeros(60, bool))


@pytest.mark.parametrize(("weights", "message"), [
    ({"a": 1.0}, "have an intercept"), ({"intercept": math.nan}, "weights.intercept must be a finite number"),
    ({"intercept": 0.0, "a": "x"}, "weights.a must be a finite number")])
def test_bad_weights_are_named(weights, message) -> None:
    with pytest.raises(ValueError, match=message):
        Logistic(weights)


def bent(count: int, seed: int):
    """Return values and answers whose probabilities no logistic regression has."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 2, (count, 1))
    share = np.where(values[:, 0] > 0, 0.97, 0.3 + 0.05 * values[:, 0]).clip(0.02, 0.98)
    return values, rng.random(count) < share


def test_a_curve_tells_what_probabilities_are_worth() -> None:
    plain = Logistic.fit(["a"], *bent(4000, 1))
    curved = plain.calibrated(*bent(4000, 1))
    values, right = bent(4000, 2)
    assert calibration_error(plain(values), right) > 0.05 > 0.03 > calibration_error(curved(values), right)
    order = np.argsort(plain(values))
    assert (np.diff(curved(values)[order]) >= 0).all() and curved.weights == plain.weights
    areas = [area_under_curve(one(values), right) for one in (curved, plain)]
    assert areas[0] == pytest.approx(areas[1], abs=0.02)
    assert curved.calibrated(*bent(4000, 1)).curve == curved.curve


def test_what_is_held_out_is_found_on_the_others() -> None:
    values, right = bent(1000, 3)
    sure = held_out(["a"], values, right)
    for fold in range(5):
        own = np.arange(1000) * 5 // 1000 == fold
        other = Logistic.fit(["a"], values[~own], right[~own]).calibrated(values[~own], right[~own])
        assert sure[own] == pytest.approx(other(values[own]))


@pytest.mark.parametrize(
    "curve", [[(0.5, 0.2), (0.4, 0.3)], [(0.1, 0.5), (0.2, 0.4)], [(0.1, 1.5)], [(0.1,)]]
)
def test_a_bad_curve_is_refused(curve) -> None:
    with pytest.raises(ValueError, match="Logistic.curve must be points"):
        Logistic({"intercept": 0.0, "a": 1.0}, curve)
