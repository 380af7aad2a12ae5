"""Weights from stored N-best scores: the scores as arrays, and a search for the fewest word errors.
Knows: N-best lists, references. Must not know: methods, models, how lists came about.

From stored scores an evaluation is one matrix product and a gather; a search makes thousands of them.
"""
from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Iterable, Mapping, Sequence

import numpy as np

from icefall_fusion.common.checks import check
from icefall_fusion.nbest import NBest
from icefall_fusion.scoring.wer import compare_words
from icefall_fusion.text.language import ENGLISH, Language, check_texts

_LOWEST = -1e9  # the score of a hypothesis that is not there
_HIGHEST_COST = 7.0  # nats a word, a perplexity of 1,100: texts of few long words would have hundreds


@dataclass
class ScoreTable:
    """The scores of all hypotheses as arrays. U utterances, N hypotheses at most, S sources.

    Args:
        sources: their names, without the acoustic model's own; the last is ``words``.
        base: [U,N] CTC scores, very low where there is no hypothesis.
        scores: [U,N,S].
        errors: [U,N] word errors.
        words: words of the references.
    """

    sources: list[str]
    base: np.ndarray
    scores: np.ndarray
    errors: np.ndarray
    words: int

    @classmethod
    def make(
        cls, nbests: Iterable[NBest], references: Mapping[str, str], sources: Sequence[str],
        language: Language = ENGLISH, acoustic: str = "ctc",
    ) -> ScoreTable:
        """Build the table; hypotheses of the same utterance and text count once.

        References without a list (audio that was skipped, a limit in decoding) are left out, with a warning.

        Raises:
            ValueError: there are no lists, a list has no reference, no hypothesis has all the sources, or the
                references have no words of the language.
        """
        names = [*sources, "words"]
        lists: dict[str, dict[str, list[float]]] = {}
        for nbest in nbests:
            if nbest.utterance not in references:
                raise ValueError(f"references must hold every utterance, but lack {nbest.utterance!r}")
            texts = lists.setdefault(nbest.utterance, {})
            for h in nbest:
                if all(name in h.scores for name in (acoustic, *names)):
                    texts.setdefault(h.text, [h.scores[name] for name in (acoustic, *names)])
        check(len(lists) > 0, "N-best lists", "hold an utterance at least", 0)
        if len(lists) < len(references):
            absent = sorted(set(references) - set(lists))
            logging.warning("%d references have no N-best list, e.g. %s", len(absent), absent[:3])
        empty = sorted(utterance for utterance, texts in lists.items() if not texts)
        if empty:
            raise ValueError(
                f"N-best lists must have hypotheses with scores of {names} for every utterance, but "
                f"{len(empty)} have none, e.g. {empty[:3]}"
            )
        check_texts({utterance: references[utterance] for utterance in lists}, language)
        most = max(map(len, lists.values()))
        table = np.zeros((len(lists), most, 1 + len(names)))
        table[:, :, 0] = _LOWEST
        errors = np.zeros((len(lists), most), dtype=np.int64)
        words = 0
        for row, (utterance, texts) in enumerate(lists.items()):
            reference = language.units(references[utterance])
            counts = [compare_words(reference, language.units(text)) for text in texts]
            table[row, : len(texts)] = np.clip(list(texts.values()), _LOWEST, -_LOWEST)
            errors[row, : len(texts)] = [count.errors for count in counts]
            words += counts[0].words
        check(words > 0, "references", f"have words of the language {language.name!r}", list(references)[:3])
        return cls(names, table[:, :, 0], table[:, :, 1:], errors, words)

    def count(self, weights: np.ndarray) -> np.ndarray:
        """Return the word errors of the best hypotheses under each of ``weights`` [M,S]: int64 [M]."""
        totals = self.base[None] + np.einsum("uns,ms->mun", self.scores, weights)
        best = totals.argmax(axis=2)  # [M,U]
        return np.take_along_axis(self.errors, best.T, axis=1).sum(axis=0)

    def costs(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Return the nats that each source takes a word (7 at most), in the best hypotheses under weights."""
        totals = self.base + self.scores @ np.array([weights[source] for source in self.sources])
        best = np.take_along_axis(self.scores, totals.argmax(axis=1)[:, None, None], axis=1)
        *scores, words = best.sum(axis=(0, 1)).tolist()
        costs = np.clip(-np.array(scores) / max(words, 1.0), -_HIGHEST_COST, _HIGHEST_COST)
        return dict(zip(self.sources, costs.tolist()))


def coordinate_search(
    table: ScoreTable, highest: float, bonus: float, rounds: int, acoustic: str = "ctc"
) -> tuple[dict[str, float], int]:
    """Return the weights with the fewest errors, and their number.

    Each coordinate in turn takes the middle of the widest range of its grid with the fewest errors, from
    several starts. The count is a staircase: its edge would not carry over to other data.

    Args:
        table: the scores.
        highest: largest weight of a source.
        bonus: largest word bonus, either sign.
        rounds: passes over the coordinates at most.
        acoustic: the acoustic model's own source, which has weight 1.
    """
    size = len(table.sources)
    grids = [np.linspace(0, highest, 41)] * (size - 1) + [np.linspace(-bonus, bonus, 61)]
    best, fewest = np.zeros(size), int(table.count(np.zeros((1, size)))[0])
    for start in (0.0, 0.25, 0.5, 1.0):
        weights = np.array([min(start, highest)] * (size - 1) + [0.0])
        for fineness in range(rounds):
            before = weights.copy()
            for axis, grid in enumerate(grids):
                weights[axis] = _best_on_axis(table, weights, axis, _refined(grid, weights[axis], fineness))
            if np.array_equal(before, weights) and fineness > 1:
                break
        errors = int(table.count(weights[None])[0])
        if errors < fewest:
            best, fewest = weights, errors
    return {acoustic: 1.0, **dict(zip(table.sources, best.tolist()))}, fewest


def _refined(grid: np.ndarray, around: float, fineness: int) -> np.ndarray:
    """Return the grid; from the third round on a finer one around a value, inside the same bounds."""
    if fineness < 2:
        return grid
    reach = (grid[-1] - grid[0]) / 8
    near = np.append(np.linspace(around - reach, around + reach, 31), around)
    return np.unique(np.clip(near, grid[0], grid[-1]))


def _best_on_axis(table: ScoreTable, weights: np.ndarray, axis: int, grid: np.ndarray) -> float:
    tried = np.repeat(weights[None], len(grid), axis=0)
    tried[:, axis] = grid
    errors = table.count(tried)
    lowest = np.flatnonzero(errors == errors.min())
    runs = np.split(lowest, np.flatnonzero(np.diff(lowest) > 1) + 1)
    widest = max(runs, key=len)
    return float(grid[widest[(len(widest) - 1) // 2]])
