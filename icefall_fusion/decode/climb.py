"""A climb to weights with few errors, where an error rate costs a decode.
Knows: weights by source, what a source takes a word. Must not know: methods, lists, decoding.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Container, Iterable, Mapping

#: The first step of the bonus, in nats.
BONUS_STEP = 1.0
_UNUSED = 0.1  # where a weight of 0 moves from

Weights = Mapping[str, float]


@dataclass(frozen=True)
class Climb:
    """A coordinate search by ever smaller steps.

    The larger the weight of a language model, the shorter the texts, unless the bonus pays for it. So the
    bonus moves with a weight, by what its source takes a word: a step changes what is preferred, not how much
    is said.

    Args:
        rate: error rate of weights by source, of which ``words`` is the bonus.
        costs: nats that a source takes a word; 0 for those that are not there.
        fixed: sources whose weights stay as they are.
        factor: between neighboring weights of the first pass, above 1.
        rounds: passes over the sources, each with half the step of the one before.
        bonus: largest word bonus, either sign; without a bound untrained models say words without end.
    """

    rate: Callable[[Weights], float]
    costs: Mapping[str, float]
    fixed: Container[str]
    factor: float
    rounds: int
    bonus: float

    def with_more(self, tuned: Weights, more: Weights) -> dict[str, float]:
        """Return tuned weights with those of further sources, which the bonus pays for."""
        added = {source: weight for source, weight in more.items() if source not in tuned}
        paid = sum(weight * self.costs.get(source, 0.0) for source, weight in added.items())
        return {**added, **tuned, "words": self._bounded(tuned["words"] + paid)}

    def from_best(self, starts: Iterable[Weights]) -> tuple[dict[str, float], float]:
        """Climb from the best of several weights; return where it ends, and the rate there."""
        best = dict(min(starts, key=self.rate))
        for fineness in range(self.rounds):
            for source in [name for name in best if name not in self.fixed]:
                for share in (0.5**fineness, -(0.5**fineness)):
                    tried = self._step(best, source, share)
                    while self.rate(tried) < self.rate(best):  # of equals, stay
                        best, tried = tried, self._step(tried, source, share)
        return best, self.rate(best)

    def _step(self, weights: Weights, source: str, share: float) -> dict[str, float]:
        """Return weights with one of them moved: by a factor, the bonus by some nats."""
        value = weights[source]
        if source == "words":
            return {**weights, source: self._bounded(value + share * BONUS_STEP)}
        moved = (value or _UNUSED) * self.factor**share
        paid = (moved - value) * self.costs.get(source, 0.0)
        return {**weights, source: moved, "words": self._bounded(weights["words"] + paid)}

    def _bounded(self, bonus: float) -> float:
        return max(-self.bonus, min(self.bonus, bonus))
