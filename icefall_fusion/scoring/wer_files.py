"""icefall's files of word errors: recogs-*, errs-*, wer-summary-*.
Knows: references, hypotheses, word errors. Must not know: models, searches, how texts were made.
"""
from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Mapping, TextIO

from icefall_fusion.common.files import PathLike, atomic_path
from icefall_fusion.scoring.wer import (
    EPS,
    WordErrors,
    align_words,
    check_same_utterances,
    compare_words,
    words_of,
)
from icefall_fusion.text.language import ENGLISH, Language, check_texts


def write_wer_files(
    folder: PathLike, test_set: str, key: str, references: Mapping[str, str], hypotheses: Mapping[str, str],
    measure: str = "normalized", language: Language = ENGLISH,
) -> WordErrors:
    """Write ``recogs-``, ``errs-`` and ``wer-summary-<test set>-<key>.txt`` and return the counts.

    The names of files of a measure other than ``normalized`` end in ``-MEASURE.txt``. In languages without
    spaces the rate is that of characters and is called CER in the files.

    Args:
        folder: of the files; made when missing.
        test_set: e.g. ``test-clean``.
        key: method and settings. They are in the file names, so that no run overwrites another's.
        references: text by utterance id.
        hypotheses: text by utterance id, for the same utterances.
        measure: one of MEASURES.
        language: of the texts.

    Raises:
        ValueError: the utterances are not the same, or most references have no word of the language.
    """
    check_same_utterances(references, hypotheses)
    if measure == "normalized":
        check_texts(references, language)
    pairs = {
        utterance: tuple(words_of(texts[utterance], measure, language) for texts in (references, hypotheses))
        for utterance in sorted(references)
    }
    alignments = {u: align_words(ref, hyp) for u, (ref, hyp) in pairs.items()}
    total = sum((compare_words(ref, hyp) for ref, hyp in pairs.values()), WordErrors())
    folder = Path(folder)
    key = key if measure == "normalized" else f"{key}-{measure}"
    name = f"{test_set}-{key}.txt"
    with atomic_path(folder / f"recogs-{name}") as path, open(path, "w", encoding="utf-8") as file:
        for utterance, (ref, hyp) in pairs.items():
            file.write(f"{utterance}:\tref={ref}\n{utterance}:\thyp={hyp}\n")
    with atomic_path(folder / f"errs-{name}") as path, open(path, "w", encoding="utf-8") as file:
        _write_errs(file, total, alignments, language.rate)
    with atomic_path(folder / f"wer-summary-{name}") as path, open(path, "w", encoding="utf-8") as file:
        file.write(f"settings\t{language.rate}\n{key}\t{total.wer:.2f}\n")
    return total


def _write_errs(
    file: TextIO, total: WordErrors, alignments: Mapping[str, list[tuple[str, str]]], rate: str
) -> None:
    correct = total.words - total.deletions - total.substitutions
    print(f"%{rate} = {total.wer:.2f}", file=file)
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
