"""Which words one method won and lost against another: three-way alignment, counts by kind, significance.
Knows: references, texts of two methods. Must not know: models, searches, pages.
"""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Mapping, NamedTuple, Sequence

import numpy as np

from icefall_fusion.common.checks import check
from icefall_fusion.scoring.wer import EPS, align_words, check_same_utterances, words_of
from icefall_fusion.scoring.word_kinds import WordKinds
from icefall_fusion.text.language import ENGLISH, Language, check_texts


class Slot(NamedTuple):
    """A place of an utterance: the word of the reference and those of A and B there; EPS for none."""

    reference: str
    a: str
    b: str

    @property
    def outcome(self) -> str:
        """``right`` (both), ``won`` (B alone is right), ``lost`` (A alone is), ``wrong`` (neither)."""
        return (("wrong", "won"), ("lost", "right"))[self.a == self.reference][self.b == self.reference]

    @property
    def wrong_word(self) -> str:
        """What was recognized instead of the reference: by A where B won, else by B."""
        return self.a if self.outcome == "won" else self.b


def three_way(reference: Sequence[str], a: Sequence[str], b: Sequence[str]) -> list[Slot]:
    """Return two texts aligned with a reference, and their insertions at one place with each other.

    The errors of each text are those of its own best alignment.
    """
    one, two = _columns(reference, a), _columns(reference, b)
    slots = []
    for number in range(len(reference) + 1):
        slots += [Slot(EPS, *pair) for pair in align_words(one[number][0], two[number][0])]
        if number < len(reference):
            slots.append(Slot(reference[number], one[number][1], two[number][1]))
    return slots


def _columns(reference: Sequence[str], words: Sequence[str]) -> list[tuple[list[str], str]]:
    """Return for each word of the reference the words inserted before it and its counterpart."""
    columns: list[tuple[list[str], str]] = []
    inserted: list[str] = []
    for word, other in align_words(reference, words):
        if word == EPS:
            inserted.append(other)
        else:
            columns.append((inserted, other))
            inserted = []
    return [*columns, (inserted, EPS)]


@dataclass(frozen=True)
class Significance:
    """A paired bootstrap over utterances (Bisani and Ney 2004).

    Args:
        difference: WER of B less that of A, in percent points; low, high: its 95 % interval.
        improvement: the share of samples in which B has fewer errors than A (ties count half).
        samples: drawn.
    """

    difference: float
    low: float
    high: float
    improvement: float
    samples: int


def bootstrap(words: Sequence[int], a: Sequence[int], b: Sequence[int], samples: int = 10_000,
              seed: int = 0) -> Significance:
    """Draw utterances with replacement and compare the WER of two methods on each draw.

    Args:
        words: of the reference of each utterance; a, b: errors of the methods there.
        samples: number of draws.
        seed: of the draws.

    Raises:
        ValueError: there are no words.
    """
    counts = np.array([words, a, b], dtype=np.float64)
    check(counts.shape[1] > 0 and counts[0].sum() > 0, "references", "have words", 0)
    rng, size = np.random.default_rng(seed), counts.shape[1]
    differences = []
    for start in range(0, samples, 500):
        drawn = rng.multinomial(size, np.full(size, 1 / size), min(500, samples - start))
        total, ones, twos = counts @ drawn.T
        differences.append(100 * (twos - ones) / np.maximum(total, 1))
    every = np.concatenate(differences)
    low, high = np.quantile(every, [0.025, 0.975])
    improvement = float((every < 0).mean() + 0.5 * (every == 0).mean())
    whole = 100 * (counts[2].sum() - counts[1].sum()) / counts[0].sum()
    return Significance(float(whole), float(low), float(high), improvement, samples)


class Comparison:
    """Two methods on one test set.

    Args:
        references: text by utterance id; a, b: of the methods.
        kinds: tells the kind of an error.
        measure: one of `wer.MEASURES`.
        samples: of the bootstrap.
        language: of the texts.

    Attributes:
        slots: of each utterance.
        significance: of the difference.

    Raises:
        ValueError: they are not of the same utterances, or there is no word.
    """

    def __init__(self, references: Mapping[str, str], a: Mapping[str, str], b: Mapping[str, str],
                 kinds: WordKinds, measure: str = "normalized", samples: int = 10_000,
                 language: Language = ENGLISH) -> None:
        check_same_utterances(references, a)
        check_same_utterances(references, b)
        if measure == "normalized":
            check_texts(references, language)
        self.kinds, self.measure, self.language = kinds, measure, language
        self.slots = {
            name: three_way(*(words_of(texts[name], measure, language) for texts in (references, a, b)))
            for name in references
        }
        each = np.array([_errors(slots) for slots in self.slots.values()], dtype=int).reshape(-1, 3)
        self.words, self.errors_a, self.errors_b = each.sum(0).tolist()
        self.significance = bootstrap(*each.T.tolist(), samples)

    def wer(self) -> tuple[float, float]:
        """Return the word error rates of A and B in percent."""
        return 100 * self.errors_a / self.words, 100 * self.errors_b / self.words

    def outcomes(self) -> Counter[str]:
        """Return how many places have each outcome."""
        return Counter(slot.outcome for slots in self.slots.values() for slot in slots)

    def by_kind(self) -> dict[str, dict[str, int]]:
        """Return for each kind the words that B won and lost, and those that both have wrong."""
        table = {kind: {"won": 0, "lost": 0, "wrong": 0} for kind in self.kinds.kinds}
        for slots in self.slots.values():
            for slot in slots:
                if slot.outcome != "right":
                    table[self.kind(slot)][slot.outcome] += 1
        return table

    def kind(self, slot: Slot) -> str:
        """Return the kind of the error at a place."""
        return self.kinds.of_error(slot.reference, slot.wrong_word)

    def examples(self, kind: str, outcome: str, most: int) -> list[tuple[str, int]]:
        """Return utterance and place of some errors, spread over the utterances, each reading once."""
        found: dict[Slot, tuple[str, int]] = {}
        for name, slots in self.slots.items():
            for place, slot in enumerate(slots):
                if slot.outcome == outcome and self.kind(slot) == kind:
                    found.setdefault(slot, (name, place))
        every = list(found.values())
        return [every[index * len(every) // most] for index in range(most)] if len(every) > most else every


def _errors(slots: Sequence[Slot]) -> tuple[int, int, int]:
    """Return words of the reference, and errors of A and B."""
    return (sum(slot.reference != EPS for slot in slots), sum(slot.a != slot.reference for slot in slots),
            sum(slot.b != slot.reference for slot in slots))
