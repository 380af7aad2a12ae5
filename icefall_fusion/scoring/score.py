"""The job ``score``: the word error rate of a file of hypotheses.
Knows: files of texts, word errors. Must not know: models, searches, how texts were made.
"""
from __future__ import annotations

import gzip
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from icefall_fusion.common.checks import check, check_choice
from icefall_fusion.common.files import PathLike, opener
from icefall_fusion.nbest import NBest
from icefall_fusion.scoring.wer import MEASURES, oracle_errors, word_errors
from icefall_fusion.scoring.wer_files import write_wer_files
from icefall_fusion.text.language import language_of


@dataclass(frozen=True)
class ScoreOptions:
    """Print the word error rate of a file of hypotheses against a file of references.

    Either file has lines of ``id text``, or JSON lines (.jsonl, .jsonl.gz) of N-best lists, of
    ``{"id", "text"}``, or of lhotse cuts or supervisions.

    Args:
        ref: the references.
        hyp: the hypotheses. Of an N-best list the first counts, and the oracle WER is printed too.
        out: folder for recogs-, errs- and wer-summary- files; empty: none are written.
        test_set: name of the test set, in the names of the files.
        key: method and settings, in the names of the files.
        measure: normalized (spoken words), printed (words with case and punctuation), or libriheavy (as
            icefall's recipe of LibriHeavy: upper case, no punctuation, MR and digits stay).
        language: ISO 639 code of the texts, e.g. en, es, zh. Where words have no spaces between them the
            character error rate (CER) is counted. Empty: as the decode job says that wrote ``hyp``, else en.
        normalizer: module:function from a text to its spoken words; empty: that of the language.
    """

    ref: str
    hyp: str
    out: str = ""
    test_set: str = "test"
    key: str = "score"
    measure: str = "normalized"
    language: str = ""
    normalizer: str = ""

    def __post_init__(self) -> None:
        for name in ("test_set", "key"):
            value = getattr(self, name)
            check(value and "/" not in value, f"ScoreOptions.{name}", "be usable in a file name", value)
        check_choice(self.measure, MEASURES, "ScoreOptions.measure")
        language_of(self.language, self.normalizer)


def run(options: ScoreOptions) -> int:
    """Run the job ``score``."""
    references = read_texts(options.ref)
    nbests = read_texts(options.hyp, nbests=True)
    hypotheses = {u: value[0].text if isinstance(value, NBest) else value for u, value in nbests.items()}
    measure, kept = options.measure, kept_language(options.hyp)
    language = language_of(options.language, options.normalizer, kept)
    if options.out:
        errors = write_wer_files(
            options.out, options.test_set, options.key, references, hypotheses, measure, language
        )
        logging.info("wrote recogs-, errs- and wer-summary- files to %s", options.out)
    else:
        errors = word_errors(references, hypotheses, measure, language)
    print(errors.line(language.rate))
    if any(isinstance(value, NBest) for value in nbests.values()):
        best = oracle_errors(references, nbests.values(), measure, language)
        print(f"oracle {best.line(language.rate)}")
    return 0


def read_texts(path: PathLike, nbests: bool = False) -> dict:
    """Read texts by utterance id from a file of any form in :class:`ScoreOptions`.

    Args:
        path: the file.
        nbests: keep N-best lists; else take the text of the first hypothesis.

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


def kept_language(*paths: PathLike) -> dict[str, str]:
    """Return the language that run files name in their first lines (see `Language.plain`); empty for English.

    Args:
        paths: run files, or other files of texts, which name none.

    Raises:
        ValueError: they name several.
    """
    found: list[dict[str, str]] = []
    for path in paths:
        first = next(iter(_lines(path)), "") if ".jsonl" in Path(path).name else ""
        if first.startswith('{"options"'):
            found.append(json.loads(first)["options"].get("language", {}))
    several = [value for value in found if value != found[0]]
    check(not several, "run files", "be of one language", found)
    return found[0] if found else {}


def _lines(path: PathLike) -> Iterator[str]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file of texts at {path}")
    with opener(path)(path, "rt", encoding="utf-8") as file:
        try:
            yield from file
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
            raise ValueError(f"{path} must be whole UTF-8 text, but is not: {error}") from error


def _parse_line(line: str) -> tuple[str, str]:
    utterance, _, text = line.strip().partition("\t" if "\t" in line else " ")
    return utterance, text


def _parse_json(line: str) -> list[tuple[str, str | NBest]]:
    value = json.loads(line)
    if "options" in value:  # the first line of a run file
        return []
    if "hypotheses" in value or "lists" in value:
        nbests = map(NBest.from_plain, value.get("lists", [value]))
        return [(nbest.utterance, nbest) for nbest in nbests]
    if "supervisions" in value:
        return [(value["id"], " ".join(s["text"] for s in value["supervisions"]))]
    return [(value["id"], value["text"])]
