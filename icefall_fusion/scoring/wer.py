"""Word errors of utterances, test sets and N-best lists, through kaldialign.
Knows: references, hypotheses, N-best lists, one language for both. Must not know: models, searches, torch.

A word here is a unit of the language: a character where words have no spaces between them (see `Language`).

Measures, never mixed:

- ``normalized``: spoken words by the normalizer of the language: lower case, no punctuation, numbers and
  titles spelled out.
- ``printed``: the words as they stand, with case and punctuation. For models of cased text.
- ``libriheavy``: the words of icefall's LibriHeavy recipe. Upper case, no punctuation; ``MR`` and digits
  stay. Its figures compare with those of that recipe when the references are the text as printed.
"""
from __future__ import annotations

import operator
import re
from dataclasses import astuple, dataclass
from typing import Iterable, Mapping, Sequence

import kaldialign

from icefall_fusion.common.checks import check, check_choice
from icefall_fusion.nbest import Hypothesis, NBest
from icefall_fusion.text.language import ENGLISH, Language, check_texts

EPS = "*"  # stands where a word has no counterpart
MEASURES = ("normalized", "printed", "libriheavy")
_NO_WORD = re.compile(r"[^A-Za-z0-9']+")


@dataclass(frozen=True)
class WordErrors:
    """Counts of word errors.

    Args:
        words: words of the references.
        insertions: words of hypotheses with no counterpart.
        deletions: words of references with no counterpart.
        substitutions: words of references that became other words.
    """

    words: int = 0
    insertions: int = 0
    deletions: int = 0
    substitutions: int = 0

    @property
    def errors(self) -> int:
        """All errors."""
        return self.insertions + self.deletions + self.substitutions

    @property
    def wer(self) -> float:
        """Word error rate in percent; 0 without words and errors, infinite with errors only."""
        if self.words == 0:
            return 0.0 if self.errors == 0 else float("inf")
        return 100.0 * self.errors / self.words

    def __add__(self, other: WordErrors) -> WordErrors:
        return WordErrors(*map(operator.add, astuple(self), astuple(other)))

    def __str__(self) -> str:
        return self.line()

    def line(self, rate: str = "WER") -> str:
        """Return rate and counts as icefall writes them; ``rate`` is the name of the rate."""
        return (
            f"%{rate} = {self.wer:.2f} [{self.errors} / {self.words}, {self.insertions} ins, "
            f"{self.deletions} del, {self.substitutions} sub]"
        )


def words_of(text: str, measure: str = "normalized", language: Language = ENGLISH) -> list[str]:
    """Return the words of a reference or a hypothesis that a measure counts.

    Raises:
        ValueError: the measure is unknown.
    """
    check_choice(measure, MEASURES, "measure")
    if measure == "normalized":
        return language.units(text)
    if measure == "libriheavy":
        text = _NO_WORD.sub(" ", text.replace("‘", "'").replace("’", "'")).upper()
    return language.split(text)


def compare_words(reference: Sequence[str], hypothesis: Sequence[str]) -> WordErrors:
    """Count the errors of a list of words by Levenshtein distance."""
    counts = kaldialign.edit_distance(reference, hypothesis)
    return WordErrors(len(reference), counts["ins"], counts["del"], counts["sub"])


def align_words(reference: Sequence[str], hypothesis: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs (reference word, hypothesis word) with the fewest errors; EPS where one lacks."""
    return kaldialign.align(reference, hypothesis, EPS)


def correct_words(reference: Sequence[str], hypothesis: Sequence[str]) -> list[bool]:
    """Return which words of the reference are right, by the alignment with the fewest errors."""
    return [word == other for word, other in align_words(reference, hypothesis) if word != EPS]


def count_errors(
    reference: str, hypothesis: str, measure: str = "normalized", language: Language = ENGLISH
) -> WordErrors:
    """Count the word errors of one utterance by one of MEASURES."""
    return compare_words(words_of(reference, measure, language), words_of(hypothesis, measure, language))


def word_errors(
    references: Mapping[str, str], hypotheses: Mapping[str, str], measure: str = "normalized",
    language: Language = ENGLISH,
) -> WordErrors:
    """Count the word errors of a test set.

    Args:
        references: text by utterance id.
        hypotheses: text by utterance id, which may be empty; every reference needs one.
        measure: one of MEASURES.
        language: of the texts.

    Raises:
        ValueError: an utterance has no hypothesis or no reference, or most references have no word of the
            language.
    """
    check_same_utterances(references, hypotheses)
    if measure == "normalized":  # the others do not ask the language's normalizer
        check_texts(references, language)
    counts = (count_errors(text, hypotheses[utterance], measure, language)
              for utterance, text in references.items())
    return sum(counts, WordErrors())


def oracle_errors(
    references: Mapping[str, str], nbests: Iterable[NBest], measure: str = "normalized",
    language: Language = ENGLISH,
) -> WordErrors:
    """Count the errors that remain when the best hypothesis of each N-best list is known.

    Raises:
        ValueError: an utterance has no reference or no list.
    """
    best: dict[str, WordErrors] = {}
    for nbest in nbests:  # may come from a generator
        reference = words_of(references.get(nbest.utterance, ""), measure, language)
        texts = [hypothesis.text for hypothesis in nbest] or [""]
        counts = [compare_words(reference, words_of(text, measure, language)) for text in texts]
        best[nbest.utterance] = min(counts, key=lambda errors: errors.errors)
    check_same_utterances(references, best)
    return sum(best.values(), WordErrors())


def oracle(nbest: NBest, reference: str, language: Language = ENGLISH) -> Hypothesis:
    """Return the hypothesis with the fewest word errors against ``reference`` (the first of equals).

    Raises:
        ValueError: the list is empty.
    """
    check(len(nbest) > 0, f"the list of {nbest.utterance}", "hold a hypothesis", 0)
    words = words_of(reference, language=language)
    return min(nbest, key=lambda h: compare_words(words, words_of(h.text, language=language)).errors)


def check_same_utterances(references: Mapping[str, object], hypotheses: Mapping[str, object]) -> None:
    """Raise ValueError, with examples, unless both are of the same utterances."""
    for missing, of, where in (
        (sorted(set(references) - set(hypotheses)), "hypotheses", "references"),
        (sorted(set(hypotheses) - set(references)), "references", "hypotheses"),
    ):
        if missing:
            raise ValueError(
                f"{of} must hold every utterance of {where}, but lacks {len(missing)}, e.g. {missing[:3]}"
            )
