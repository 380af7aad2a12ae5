"""Books to utterances: splits by book, paragraphs to sentences to clauses that take 2-20 s to say.
Knows: plain-text books, their paragraphs, JSON lines.
Must not know: audio, tokenizers, models.
"""
from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

from tqdm import tqdm

from icefall_fusion.common.checks import check, check_at_least
from icefall_fusion.common.files import PathLike, atomic_path, opener
from icefall_fusion.common.workers import in_workers
from icefall_fusion.data.paragraphs import gutenberg_body, is_hard_wrapped, paragraphs
from icefall_fusion.data.reading import ENGLISH, Reading, reading_of
from icefall_fusion.text.language import language_of
from icefall_fusion.text.scripts import unspaced

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class PrepareTextOptions:
    """Options of ``prepare-text``.

    Args:
        text: folder of UTF-8 books, one ``.txt`` file each: one paragraph a line, or lines of up to about 80
            characters with blank lines between the paragraphs (recognized by itself; the lines of a paragraph
            are joined). What stands outside of Project Gutenberg's "*** START OF" and "*** END OF" is left
            out.
        data_dir: where ``text/{train,dev,test}.jsonl`` are written.
        test_books: how many books, the last of the alphabet, are for test.
        dev_books: how many books before those are for dev.
        min_characters: shorter sentences are joined with the next of their paragraph, or left out.
        max_characters: longer sentences are split between clauses (14.5 characters take about a second).
        workers: processes; the result does not depend on it.
        language: ISO 639 code of the books, e.g. en, es, zh.
        normalizer: module:function from a text to its spoken words; empty: that of the language.
    """

    text: str
    data_dir: str = "data"
    test_books: int = 12
    dev_books: int = 8
    min_characters: int = 25
    max_characters: int = 230
    workers: int = 2
    language: str = "en"
    normalizer: str = ""

    def __post_init__(self) -> None:
        language_of(self.language, self.normalizer)
        check_at_least(1, self, "test_books", "dev_books", "min_characters", "workers")
        rule = "be at least 4 times min_characters"
        long_enough = self.max_characters >= 4 * self.min_characters
        check(long_enough, "PrepareTextOptions.max_characters", rule, self.max_characters)


def run(options: PrepareTextOptions) -> int:
    """Write ``text/{train,dev,test}.jsonl`` in book order; return the exit status 0.

    Raises:
        FileNotFoundError: the folder of books does not exist.
        ValueError: it has too few books for the three splits.
    """
    splits = split_books(options.text, options.test_books, options.dev_books)
    jobs = [(split, path, options) for split in SPLITS for path in splits[split]]
    counts = {split: [0, 0] for split in SPLITS}  # utterances, words
    wrapped = 0
    lost: list[str] = []
    foreign: list[str] = []
    target = Path(options.data_dir) / "text"
    done = in_workers(_book_job, jobs, options.workers)  # in order: the files do not depend on the workers
    with tqdm(total=len(jobs), desc="books", unit="book") as progress:
        for split in SPLITS:
            with atomic_path(target / f"{split}.jsonl") as path, open(path, "wb") as file:
                for _ in splits[split]:
                    book = next(done)
                    lost += book.lost
                    foreign += book.foreign
                    file.write(book.lines)
                    counts[split][0] += book.utterances
                    counts[split][1] += book.words
                    wrapped += book.wrapped
                    progress.update()
    unit = language_of(options.language, options.normalizer).unit
    for split in SPLITS:
        utterances, words = counts[split]
        print(f"{split}: {len(splits[split])} books, {utterances} utterances, {words} {unit}")
        rule = f"have text of the language {options.language!r} in the books of {split}"
        check(utterances > 0, f"folder {options.text!r}", rule, [path.name for path in splits[split]][:3])
    if lost:
        print(f"{len(lost)} utterances have letters that {options.language} does not keep, e.g. {lost[0]!r}")
    if foreign:
        what = f"sentences are left out: they are not of the language {options.language!r}"
        print(f"{len(foreign)} {what}, e.g. {foreign[0]!r}")
    if wrapped:
        print(f"{wrapped} of {len(jobs)} books are hard-wrapped: the lines of a paragraph were joined")
    return 0


def split_books(folder: PathLike, test_books: int, dev_books: int) -> dict[str, list[Path]]:
    """Return the books of train, dev and test: by alphabet, whole books only."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder of books not found: {str(folder)!r}")
    books = sorted(folder.glob("[!.]*.txt"), key=lambda path: path.stem)
    rule = f"hold more than {test_books} + {dev_books} books (*.txt)"
    check(len(books) > test_books + dev_books, f"folder {str(folder)!r}", rule, len(books))
    first_test = len(books) - test_books
    first_dev = first_test - dev_books
    return {"train": books[:first_dev], "dev": books[first_dev:first_test], "test": books[first_test:]}


def read_jsonl(path: PathLike, required: Sequence[str] = ()) -> Iterator[dict]:
    """Yield the objects of a JSON lines file, gzipped or not, each of which must have the keys ``required``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not JSON, no object, or lacks a key (the message has its number).
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no list of utterances at {path}; run prepare-text first")
    with opener(path)(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} must be a JSON object, but is {row!r}")
            for key in required:
                if key not in row:  # a call of check would make its message for each of a million lines
                    rule = f"have the key {key!r}, but is {sorted(row)!r}"
                    raise ValueError(f"{path}, line {number} must {rule}")
            yield row


def write_jsonl(path: PathLike, items: Sequence[dict]) -> None:
    """Write objects as JSON lines, whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def book_utterances(text: str, book: str, options: PrepareTextOptions) -> tuple[list[dict], list[str]]:
    """Return the utterances of one book in order, and the sentences that are of another language.

    An utterance is ``id, book, index, cased, text`` (normalized). Sentences of which the normalizer keeps too
    little to stand alone, though they have no foreign letters, are left out without being told.
    """
    utterances: list[dict] = []
    foreign = []
    language = language_of(options.language, options.normalizer)
    reading, bounds = reading_of(language), (options.min_characters, options.max_characters)
    for paragraph in paragraphs(text):
        for cased in paragraph_utterances(paragraph, *bounds, reading):
            words = language.normalize(cased)
            short = len(words) < options.min_characters * 0.8
            if short or reading.is_foreign(words):
                if not short or language.lost(cased):
                    foreign.append(cased)
                continue
            index = len(utterances)
            name = f"{book}-{index:06d}"
            utterances.append({"id": name, "book": book, "index": index, "cased": cased, "text": words})
    return utterances, foreign


def paragraph_utterances(
    paragraph: str, min_characters: int, max_characters: int, reading: Reading = ENGLISH
) -> list[str]:
    """Return the sentences and clauses of a paragraph, each within the two bounds; none for a heading."""
    paragraph = " ".join(_DASHES.sub(" ", paragraph).split())
    if _is_heading(paragraph, reading):
        return []
    utterances = []
    waiting = ""  # a sentence too short to stand alone
    for sentence in sentences(paragraph, reading):
        sentence = unspaced(f"{waiting} {sentence}") if waiting else sentence
        waiting = ""
        if len(sentence) < min_characters:
            waiting = sentence
        else:
            utterances.extend(split_sentence(sentence, min_characters, max_characters, reading))
    if waiting and utterances and len(utterances[-1]) + 1 + len(waiting) <= max_characters:
        utterances[-1] = unspaced(f"{utterances[-1]} {waiting}")
    return utterances


def sentences(paragraph: str, reading: Reading = ENGLISH) -> list[str]:
    """Split a paragraph after sentence marks that a capital follows; titles and initials do not end one."""
    parts = []
    start = 0
    for match in reading.sentence_end.finditer(paragraph):
        before = paragraph[max(0, match.start() - 8) : match.start()]
        if match.group(1) == "." and reading.not_an_end is not None and reading.not_an_end.search(before):
            continue
        end = reading.past_quote(paragraph, match.end())
        parts.append(paragraph[start:end].strip())
        start = end
    parts.append(paragraph[start:].strip())
    return [sentence for sentence in parts if sentence]


def split_sentence(
    sentence: str, min_characters: int, max_characters: int, reading: Reading = ENGLISH
) -> list[str]:
    """Split a sentence between clauses, nearest its middle, until all parts fit; [] if it cannot be."""
    if len(sentence) <= max_characters:
        return [sentence]
    middle = len(sentence) / 2
    for ends in reading.clause_ends:
        cuts = [reading.past_quote(sentence, match.end()) for match in ends.finditer(sentence)]
        cuts = [cut for cut in cuts if min_characters <= cut <= len(sentence) - min_characters]
        if cuts:
            cut = min(cuts, key=lambda cut: abs(cut - middle))
            parts = (sentence[:cut].strip(), sentence[cut:].strip())
            bounds = min_characters, max_characters, reading
            return [piece for part in parts for piece in split_sentence(part, *bounds)]
    return []


_DASHES = re.compile("[—–]|--+")


def _is_heading(paragraph: str, reading: Reading) -> bool:
    letters = [letter for letter in paragraph if letter.isalpha()]
    if not letters or len(letters) < 0.6 * len(paragraph):  # empty lines, rows of stars, tables
        return True
    if sum(letter.isupper() for letter in letters) > 0.5 * len(letters):
        return True
    if len(paragraph) < 60 and (reading.chapter.match(paragraph) or paragraph[-1] not in reading.closing):
        return True
    return False


class _Book(NamedTuple):
    """A book as JSON lines.

    Args:
        lines: of all utterances.
        utterances: how many.
        words: of them.
        wrapped: whether its lines were joined to paragraphs.
        lost: utterances as printed that have letters of another script.
        foreign: sentences that are left out, see `book_utterances`.
    """

    lines: bytes
    utterances: int
    words: int
    wrapped: bool
    lost: list[str]
    foreign: list[str]


def _book_job(job: tuple[str, Path, PrepareTextOptions]) -> _Book:
    _, path, options = job
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"book {str(path)!r} must be UTF-8 text, but is not: {error}") from None
    utterances, foreign = book_utterances(text, path.stem, options)
    lines = "".join([json.dumps(utterance, ensure_ascii=False) + "\n" for utterance in utterances])
    language = language_of(options.language, options.normalizer)
    words = sum(len(language.split(utterance["text"])) for utterance in utterances)
    lost = [utterance["cased"] for utterance in utterances if language.lost(utterance["cased"])]
    wrapped = is_hard_wrapped(gutenberg_body(text).splitlines())
    return _Book(lines.encode("utf-8"), len(utterances), words, wrapped, lost, foreign)
