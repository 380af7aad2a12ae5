"""Probabilities that an answer is right: logistic and isotonic regression, calibration error, ROC area.
Knows: numbers. Must not know: words, what was measured.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping, Sequence

import numpy as np

from icefall_fusion.common.checks import check, is_number

INTERCEPT = "intercept"
_GROUPS = 20  # of a curve
_RIDGE = 1.0  # keeps weights finite where right and wrong can be told apart without error


@dataclass(frozen=True)
class Logistic:
    """A probability from measured values: ``1 / (1 + exp(-(intercept + sum of weight * value)))``.

    Args:
        weights: by name of the value; ``intercept`` is the constant.
        curve: what these probabilities are worth: points (probability, share that is right), rising in both;
            between them straight lines. Empty: what they say.

    Raises:
        ValueError: there is no intercept, a weight is not finite, or the curve does not rise.
    """

    weights: Mapping[str, float]
    curve: Sequence[Sequence[float]] = ()

    def __post_init__(self) -> None:
        inside = (len(p) == 2 and all(is_number(x) and 0 <= x <= 1 for x in p) for p in self.curve)
        good = all(inside) and all(a[0] < b[0] and a[1] <= b[1] for a, b in zip(self.curve, self.curve[1:]))
        check(good, "Logistic.curve", "be points from 0 to 1 that rise", self.curve)
        check(INTERCEPT in self.weights, "Logistic.weights", f"have an {INTERCEPT}", sorted(self.weights))
        for name, value in self.weights.items():
            check(is_number(value), f"Logistic.weights.{name}", "be a finite number", value)

    @property
    def names(self) -> list[str]:
        """The values that it needs, in order."""
        return [name for name in self.weights if name != INTERCEPT]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Return probabilities [n] of values [n, number of names]."""
        weights = np.array([self.weights[name] for name in self.names], dtype=np.float64)
        sure = 1 / (1 + np.exp(-np.clip(self.weights[INTERCEPT] + values @ weights, -50, 50)))
        return np.interp(sure, *zip(*self.curve)) if len(self.curve) else sure

    def calibrated(self, values: np.ndarray, right: np.ndarray) -> Logistic:
        """Return it with a curve: isotonic regression (Zadrozny and Elkan 2002), by SciPy.

        Args:
            values: [n, names] float; right: [n] bool.
        """
        from scipy.optimize import isotonic_regression

        sure, right = Logistic(self.weights)(values), np.asarray(right, dtype=bool)
        groups = np.array_split(np.argsort(sure, kind="stable"), min(_GROUPS, len(sure)))
        sizes = np.array([len(group) for group in groups])
        shares = np.array([(right[group].sum() + 0.5) / (len(group) + 1) for group in groups])
        rising = isotonic_regression(shares, weights=sizes).x
        points = {round(float(sure[group].mean()), 6): round(float(y), 6) for group, y in zip(groups, rising)}
        return Logistic(self.weights, tuple(points.items()))

    @classmethod
    def fit(cls, names: Sequence[str], values: np.ndarray, right: np.ndarray) -> Logistic:
        """Find the weights of the highest likelihood, by SciPy, with a small ridge.

        Args:
            names: of the values.
            values: [n, names] float; right: [n] bool.

        Raises:
            ValueError: all are right, or none is.
        """
        from scipy.optimize import minimize

        right = np.asarray(right, dtype=bool)
        check(0 < right.sum() < len(right), "words", "be right here and wrong there", int(right.sum()))
        mean, scale = values.mean(0), values.std(0)
        scale = np.where(scale > 1e-9, scale, 1.0)
        inputs = np.column_stack([(values - mean) / scale, np.ones(len(values))])
        sign = np.where(right, 1.0, -1.0)

        def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
            margin = sign * (inputs @ weights)
            slope = -sign / (1 + np.exp(np.clip(margin, -50, 50)))
            ridge = np.append(weights[:-1], 0.0) * _RIDGE
            value = np.logaddexp(0, -margin).sum() + 0.5 * float(ridge @ weights)
            return float(value), inputs.T @ slope + ridge

        found = minimize(loss, np.zeros(inputs.shape[1]), jac=True, method="BFGS").x
        plain = found[:-1] / scale
        constant = float(found[-1] - plain @ mean)
        weights = {INTERCEPT: constant, **{name: float(w) for name, w in zip(names, plain)}}
        return cls({name: round(value, 6) for name, value in weights.items()})


def held_out(names: Sequence[str], values: np.ndarray, right: np.ndarray, folds: int = 5) -> np.ndarray:
    """Return probabilities [n] of values [n, names], each found on the other folds (runs of neighbors).

    Raises:
        ValueError: see `Logistic.fit`.
    """
    fold, sure = np.arange(len(right)) * folds // len(right), np.zeros(len(right))
    for number in range(folds):
        other, own = fold != number, fold == number
        fitted = Logistic.fit(names, values[other], right[other])
        sure[own] = fitted.calibrated(values[other], right[other])(values[own])
    return sure


def calibration_error(probabilities: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """Return the expected calibration error (Naeini et al. 2015): |share right - mean probability| a bin."""
    at = np.minimum((probabilities * bins).astype(int), bins - 1)
    gaps = [
        abs(probabilities[at == number].mean() - right[at == number].mean()) * (at == number).mean()
        for number in np.unique(at)
    ]
    return float(sum(gaps))


def area_under_curve(scores: np.ndarray, right: np.ndarray) -> float:
    """Return the probability that a right one scores higher than a wrong one (ties count half).

    Raises:
        ValueError: all are right, or none is.
    """
    from scipy.stats import rankdata

    right = np.asarray(right, dtype=bool)
    good, bad = int(right.sum()), int((~right).sum())
    check(good > 0 and bad > 0, "words", "be right here and wrong there", good)
    return float((rankdata(scores)[right].sum() - good * (good + 1) / 2) / (good * bad))
