"""How many of some listed phrases a text finds again, and the word errors of all else.
Knows: references, hypotheses, phrases. Must not know: what prefers phrases, models, searches.
"""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Iterable, Iterator, Mapping, Sequence

from icefall_fusion.common.checks import check
from icefall_fusion.scoring.wer import EPS, align_words
from icefall_fusion.text.language import ENGLISH, Language


@dataclass(frozen=True)
class PhraseScores:
    """Counts over texts.

    Args:
        spoken: listed phrases in the references; found: of these those in the texts too.
        false: listed phrases in the texts beyond those of the references.
        words_else: words of the references outside listed phrases; errors_else: errors there, and insertions.
    """

    spoken: int
    found: int
    false: int
    words_else: int
    errors_else: int

    @property
    def recall(self) -> float:
        """Found phrases, in percent."""
        return 100.0 * self.found / max(1, self.spoken)

    @property
    def wer_else(self) -> float:
        """Word error rate without the listed phrases and what stands for them, in percent."""
        return 100.0 * self.errors_else / max(1, self.words_else)


def score_phrases(references: Mapping[str, str], texts: Mapping[str, str],
                  phrases: Iterable[str], language: Language = ENGLISH) -> PhraseScores:
    """Compare texts with references by utterance, with the words of the measure ``normalized``.

    Args:
        references, texts: by utterance. phrases: where several fit at a place the longest counts.
        language: of all of them.

    Raises:
        ValueError: a reference has no text.
    """
    listed = {phrase for phrase in (tuple(language.units(text)) for text in phrases) if phrase}
    lengths = sorted({len(phrase) for phrase in listed})
    spoken = found = false = words_else = errors_else = 0
    for name, text in references.items():
        check(name in texts, "texts", "hold every utterance", name)
        wanted, got = language.units(text), language.units(texts[name])
        there, here = list(_places(wanted, listed, lengths)), list(_places(got, listed, lengths))
        one, other = (Counter(tuple(side[slice(*at)]) for at in places)
                      for side, places in ((wanted, there), (got, here)))
        spoken, found = spoken + len(there), found + sum((one & other).values())
        false += sum((other - one).values())
        inside = {at for span in there for at in range(*span)}
        words_else += len(wanted) - len(inside)
        at = 0
        for reference, word in align_words(wanted, got):
            errors_else += reference != word and (reference == EPS or at not in inside)
            at += reference != EPS
    return PhraseScores(spoken, found, false, words_else, errors_else)


def _places(words: Sequence[str], listed: set[tuple[str, ...]],
            lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield start and end of each listed phrase."""
    at = 0
    while at < len(words):
        fits = [n for n in lengths if at + n <= len(words) and tuple(words[at : at + n]) in listed]
        length = max(fits, default=0)
        if length:
            yield at, at + length
        at += max(1, length)
