"""What a language model has changed: words of the best hypothesis beside those of others.
Knows: N-best lists, weights of sources, the edit distance. Must not know: streams, protocols.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping, Optional, Sequence

from icefall_fusion.nbest import NBest
from icefall_fusion.scoring.wer import EPS, align_words
from icefall_fusion.text.scripts import join_words

COMPARED = 16  # hypotheses whose words are alternatives


@dataclass(frozen=True)
class WordNote:
    """A word of the best hypothesis.

    Args:
        without_llm: the words at its place in the hypothesis that is best without the language model, ""
            where it has none there; None: the same word.
        alternatives: words at its place in the other hypotheses, the most probable hypothesis first.
    """

    without_llm: Optional[str]
    alternatives: list[str]


def word_notes(nbest: NBest, without: Mapping[str, float]) -> list[WordNote]:
    """Return a note for each word of the best hypothesis.

    Words are compared by an alignment of least edit distance. Words that the best hypothesis lacks are told
    with the word that follows them, at the end with the last one.

    Args:
        nbest: at least one hypothesis.
        without: weights of the sources as they are without the language model.
    """
    best = nbest[0].words()
    plain = _at_places(best, nbest.reweight(without)[0].words())
    others = [_at_places(best, hypothesis.words()) for hypothesis in nbest.hypotheses[1:COMPARED]]
    notes = []
    for place, word in enumerate(best):
        found = dict.fromkeys(other[place] for other in others)
        alternatives = [text for text in found if text and text != word]
        notes.append(WordNote(None if plain[place] == word else plain[place], alternatives))
    return notes


def _at_places(words: Sequence[str], other: Sequence[str]) -> list[str]:
    """Return what ``other`` has in the place of each of the words."""
    found: list[list[str]] = []
    before: list[str] = []
    for mine, theirs in align_words(words, other):
        before += [] if theirs == EPS else [theirs]
        if mine != EPS:
            found.append(before)
            before = []
    if found:
        found[-1] += before
    return [join_words(texts) for texts in found]
