"""Word error rates through kaldialign, and icefall's files of them: recogs-*, errs-*, wer-summary-*.
Knows: references, hypotheses, N-best lists, one normalizer for both. Must not know: models, searches, torch.

Two measures, never mixed: ``normalized`` counts spoken words (lower case, no punctuation, numbers spelled
out), ``printed`` the words as they stand, with case and punctuation: for models of cased text.
"""
from __future__ import annotations

import gzip
import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Iterator, Mapping, TextIO

import kaldialign

from icefall_fusion.common.checks import check, check_choice
from icefall_fusion.common.files import PathLike, atomic_path, opener
from icefall_fusion.nbest import Hypothesis, NBest
from icefall_fusion.text.normalizer import normalize

EPS = "*"
MEASURES = ("normalized", "printed")


@dataclass(frozen=True)
class WordErrors:
    """Counts of word errors.

    Args:
        words: words of the references.
        insertions: words of hypotheses with no counterpart.
        deletions: words of references with no counterpart.
        substitutions: words taken for others.
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
        return WordErrors(
            self.words + other.words,
            self.insertions + other.insertions,
            self.deletions + other.deletions,
            self.substitutions + other.substitutions,
        )

    def __str__(self) -> str:
        return (
            f"%WER = {self.wer:.2f} [{self.errors} / {self.words}, {self.insertions} ins, "
            f"{self.deletions} del, {self.substitutions} sub]"
        )


def words_of(text: str, measure: str = "normalized") -> list[str]:
    """Return the words that a measure counts, of references and hypotheses alike.

    Raises:
        ValueError: the measure is unknown.
    """
    check_choice(measure, MEASURES, "measure")
    return (normalize(text) if measure == "normalized" else text).split()


def count_errors(reference: str, hypothesis: str, measure: str = "normalized") -> WordErrors:
    """Count the word errors of one utterance, of one of MEASURES."""
    words = words_of(reference, measure)
    counts = kaldialign.edit_distance(words, words_of(hypothesis, measure))
    return WordErrors(len(words), counts["ins"], counts["del"], counts["sub"])


def word_errors(
    references: Mapping[str, str], hypotheses: Mapping[str, str], measure: str = "normalized"
) -> WordErrors:
    """Count the word errors of a test set.

    Args:
        references: text by utterance id.
        hypotheses: text by utterance id; every reference needs one (an empty text is one).
        measure: one of MEASURES.

    Raises:
        ValueError: an utterance has no hypothesis or no reference.
    """
    _check_same_utterances(references, hypotheses)
    counts = (count_errors(text, hypotheses[utterance], measure) for utterance, text in references.items())
    return sum(counts, WordErrors())


def oracle_errors(
    references: Mapping[str, str], nbests: Iterable[NBest], measure: str = "normalized"
) -> WordErrors:
    """Count the errors that remain when the best hypothesis of each N-best list is known.

    Raises:
        ValueError: an utterance has no reference or no list.
    """
    best: dict[str, WordErrors] = {}
    for nbest in nbests:  # which may be read one by one
        text = references.get(nbest.utterance, "")
        counts = [count_errors(text, found, measure) for found in [h.text for h in nbest] or [""]]
        best[nbest.utterance] = min(counts, key=lambda errors: errors.errors)
    _check_same_utterances(references, best)
    total = WordErrors()
    for errors in best.values():
        total += errors
    return total


def oracle(nbest: NBest, reference: str) -> Hypothesis:
    """Return the hypothesis with the fewest word errors against ``reference`` (the first of equals).

    Raises:
        ValueError: the list is empty.
    """
    check(len(nbest) > 0, f"the list of {nbest.utterance}", "hold a hypothesis", 0)
    return min(nbest, key=lambda hypothesis: count_errors(reference, hypothesis.text).errors)


def _check_same_utterances(references: Mapping[str, object], hypotheses: Mapping[str, object]) -> None:
    for missing, of, where in (
        (sorted(set(references) - set(hypotheses)), "hypotheses", "references"),
        (sorted(set(hypotheses) - set(references)), "references", "hypotheses"),
    ):
        if missing:
            raise ValueError(
                f"{of} must hold every utterance of {where}, but lacks {len(missing)}, e.g. {missing[:3]}"
            )


# --- icefall's files ----------------------------------------------------------------------------------


def write_wer_files(
    folder: PathLike, test_set: str, key: str, references: Mapping[str, str], hypotheses: Mapping[str, str],
    measure: str = "normalized",
) -> WordErrors:  # fmt: skip
    """Write ``recogs-``, ``errs-`` and ``wer-summary-<test set>-<key>.txt`` and return the counts.

    The names of files of the measure ``printed`` end in ``-printed.txt``.

    Args:
        folder: where to; made when missing.
        test_set: e.g. ``test-clean``.
        key: method and settings, part of the file names, so that no run overwrites another's.
        references: text by utterance id.
        hypotheses: text by utterance id, for the same utterances.
        measure: one of MEASURES.
    """
    _check_same_utterances(references, hypotheses)
    pairs = {
        utterance: (words_of(references[utterance], measure), words_of(hypotheses[utterance], measure))
        for utterance in sorted(references)
    }
    alignments = {u: kaldialign.align(ref, hyp, EPS) for u, (ref, hyp) in pairs.items()}
    total = word_errors(references, hypotheses, measure)
    folder = Path(folder)
    key = key if measure == "normalized" else f"{key}-{measure}"
    name = f"{test_set}-{key}.txt"
    with atomic_path(folder / f"recogs-{name}") as path, open(path, "w", encoding="utf-8") as file:
        for utterance, (ref, hyp) in pairs.items():
            file.write(f"{utterance}:\tref={ref}\n{utterance}:\thyp={hyp}\n")
    with atomic_path(folder / f"errs-{name}") as path, open(path, "w", encoding="utf-8") as file:
        _write_errs(file, total, alignments)
    with atomic_path(folder / f"wer-summary-{name}") as path, open(path, "w", encoding="utf-8") as file:
        file.write(f"settings\tWER\n{key}\t{total.wer:.2f}\n")
    return total


def _write_errs(file: TextIO, total: WordErrors, alignments: Mapping[str, list[tuple[str, str]]]) -> None:
    correct = total.words - total.deletions - total.substitutions
    print(f"%WER = {total.wer:.2f}", file=file)
    print(
        f"Errors: {total.insertions} insertions, {total.deletions} deletions, {total.substitutions} "
        f"substitutions, over {total.words} reference words ({correct} correct)",
        file=file,
    )
    print("Search below for sections starting with PER-UTT DETAILS:, SUBSTITUTIONS:,", file=file)
    print("DELETIONS:, INSERTIONS:, PER-WORD STATS:\n", file=file)
    print("PER-UTT DETAILS: corr or (ref->hyp)  ", file=file)
    for utterance, pairs in alignments.items():
        print(f"{utterance}:\t{' '.join(map(_show, pairs))}", file=file)
    counts = Counter(pair for pairs in alignments.values() for pair in pairs)
    wrong = sorted((-n, pair) for pair, n in counts.items() if pair[0] != pair[1])
    print("\nSUBSTITUTIONS: count ref -> hyp", file=file)
    for count, (ref, hyp) in wrong:
        if EPS not in (ref, hyp):
            print(f"{-count}   {ref} -> {hyp}", file=file)
    print("\nDELETIONS: count ref", file=file)
    for count, (ref, hyp) in wrong:
        if hyp == EPS:
            print(f"{-count}   {ref}", file=file)
    print("\nINSERTIONS: count hyp", file=file)
    for count, (ref, hyp) in wrong:
        if ref == EPS:
            print(f"{-count}   {hyp}", file=file)
    _write_word_stats(file, counts)


def _show(pair: tuple[str, str]) -> str:
    return pair[0] if pair[0] == pair[1] else f"({pair[0]}->{pair[1]})"


def _write_word_stats(file: TextIO, counts: Mapping[tuple[str, str], int]) -> None:
    print("\nPER-WORD STATS: word  corr tot_errs count_in_ref count_in_hyp", file=file)
    stats: dict[str, list[int]] = {}  # word -> correct, errors, in references, in hypotheses
    for (ref, hyp), count in counts.items():
        for word, column in ((ref, 2), (hyp, 3)):
            if word != EPS:
                row = stats.setdefault(word, [0, 0, 0, 0])
                row[column] += count
                row[1] += 0 if ref == hyp else count
        if ref == hyp:
            stats[ref][0] += count
    for word, row in sorted(stats.items(), key=lambda item: (-item[1][1], item[0])):
        print(f"{word}   {' '.join(map(str, row))}", file=file)


# --- the job "score" ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreOptions:
    """Print the word error rate of a file of hypotheses against a file of references.

    Either file may be: lines of ``id text``; JSON lines (.jsonl, .jsonl.gz) of N-best lists, of
    ``{"id", "text"}`` or of lhotse cuts or supervisions.

    Args:
        ref: the references.
        hyp: the hypotheses; of an N-best list the first counts, and the oracle is printed too.
        out: folder for recogs-, errs- and wer-summary- files; none are written without it.
        test_set: part of the files' names.
        key: part of the files' names: method and settings.
        measure: normalized (spoken words), or printed (words with their case and punctuation).
    """

    ref: str
    hyp: str
    out: str = ""
    test_set: str = "test"
    key: str = "score"
    measure: str = "normalized"

    def __post_init__(self) -> None:
        for name in ("test_set", "key"):
            value = getattr(self, name)
            check(value and "/" not in value, f"ScoreOptions.{name}", "be a part of a file name", value)
        check_choice(self.measure, MEASURES, "ScoreOptions.measure")


def run(options: ScoreOptions) -> int:
    """Run the job ``score``."""
    references = read_texts(options.ref)
    nbests = read_texts(options.hyp, nbests=True)
    hypotheses = {u: value[0].text if isinstance(value, NBest) else value for u, value in nbests.items()}
    measure = options.measure
    print(word_errors(references, hypotheses, measure))
    if any(isinstance(value, NBest) for value in nbests.values()):
        print(f"oracle {oracle_errors(references, nbests.values(), measure)}")
    if options.out:
        write_wer_files(options.out, options.test_set, options.key, references, hypotheses, measure)
        logging.info("wrote recogs-, errs- and wer-summary- files to %s", options.out)
    return 0


def read_texts(path: PathLike, nbests: bool = False) -> dict:
    """Read texts by utterance id from any of the forms that :class:`ScoreOptions` lists.

    Args:
        path: the file.
        nbests: keep N-best lists as they are (else their first text is taken).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line cannot be read, or an id comes twice.
    """
    texts: dict = {}
    is_json = ".jsonl" in Path(path).name or Path(path).suffix == ".json"
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            entries = _parse_json(line) if is_json else [_parse_line(line)]
        except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
            message = f"{path} line {number} must hold an id and a text, but is {line[:60]!r}"
            raise ValueError(message) from error
        for utterance, text in entries:
            if utterance in texts:
                raise ValueError(f"{path} line {number}: ids must be unique, but {utterance!r} comes twice")
            texts[utterance] = text if nbests or not isinstance(text, NBest) else text[0].text
    return texts


def _lines(path: PathLike) -> Iterator[str]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file of texts at {path}")
    with opener(path)(path, "rt", encoding="utf-8") as file:
        try:
            yield from file
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
            raise ValueError(f"{path} must be UTF-8 text, whole, but is not: {error}") from error


def _parse_line(line: str) -> tuple[str, str]:
    utterance, _, text = line.strip().partition("\t" if "\t" in line else " ")
    return utterance, text


def _parse_json(line: str) -> list[tuple[str, str | NBest]]:
    value = json.loads(line)
    if "options" in value:  # the first line of a decode's file
        return []
    if "hypotheses" in value or "lists" in value:
        nbests = map(NBest.from_plain, value.get("lists", [value]))
        return [(nbest.utterance, nbest) for nbest in nbests]
    if "supervisions" in value:
        return [(value["id"], " ".join(s["text"] for s in value["supervisions"]))]
    return [(value["id"], value["text"])]
