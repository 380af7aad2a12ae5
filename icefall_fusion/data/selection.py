"""Which utterances are spoken: hours for train, dev and the two tests, spread evenly over the books.
Knows: utterance files, lengths in characters. Must not know: audio, voices, models.
"""
from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

from icefall_fusion.common.checks import check, check_at_least
from icefall_fusion.data.books import read_jsonl, write_jsonl
from icefall_fusion.data.reading import ENGLISH, reading_of
from icefall_fusion.text.language import Language


@dataclass(frozen=True)
class SelectOptions:
    """Options of ``select-utterances``.

    Args:
        data_dir: has ``text/{train,dev,test}.jsonl``; ``text/selected_*.jsonl`` is written for train, dev,
            test-clean and test-other.
        train_hours: speech for training, estimated from characters.
        at_most: take fewer hours for training where the books hold fewer.
        dev_hours: speech for development.
        test_hours: speech for test-clean, and as much again for test-other.
        characters_per_second: how fast the voices read.
        min_words: utterances with fewer words are not spoken (characters, where words have no spaces).
        seed: of the choice.
        language: ISO 639 code of the text, e.g. en, es, zh.
    """

    data_dir: str = "data"
    train_hours: float = 30.0
    at_most: bool = False
    dev_hours: float = 1.2
    test_hours: float = 1.7
    characters_per_second: float = 14.5
    min_words: int = 4
    seed: int = 17
    language: str = "en"

    def __post_init__(self) -> None:
        for name in ("train_hours", "dev_hours", "test_hours", "characters_per_second"):
            check(getattr(self, name) > 0, f"SelectOptions.{name}", "be greater than 0", getattr(self, name))
        check_at_least(1, self, "min_words")
        Language(self.language)


def run(options: SelectOptions) -> int:
    """Write the four files of selected utterances; return the exit status 0.

    Raises:
        FileNotFoundError: the utterance files are not there.
        ValueError: a split has less text than the hours asked for.
    """
    folder, language = Path(options.data_dir) / "text", Language(options.language)
    used: set[str] = set()  # no sentence is in two sets, nor twice in one
    plans = (
        ("test", (("test-clean", options.test_hours), ("test-other", options.test_hours))),
        ("dev", (("dev", options.dev_hours),)),
        ("train", (("train", options.train_hours),)),
    )
    for split, sets in plans:
        exact = not (options.at_most and split == "train")
        books = _speakable_by_book(folder / f"{split}.jsonl", options.min_words, language)
        chosen = select_utterances(books, [hours for _, hours in sets], used, options, exact)
        for (name, hours), utterances in zip(sets, chosen):
            write_jsonl(folder / f"selected_{name}.jsonl", utterances)
            words = sum(len(language.split(utterance["text"])) for utterance in utterances)
            print(f"{name}: {len(utterances)} utterances, {words} {language.unit}, about {hours:.2f} h")
    return 0


def select_utterances(
    books: dict[str, list[dict]], hours: Sequence[float], used: set[str], options: SelectOptions,
    exact: bool = True,
) -> list[list[dict]]:
    """Deal utterances to the sets, one of each book in turn, until every set has its hours.

    Args:
        books: the utterances of each book.
        hours: of each set.
        used: texts that may not be taken; those that are taken are added.
        options: seed and reading speed.
        exact: whether less than the hours is an error.

    Returns:
        for each set its utterances, in book order.

    Raises:
        ValueError: the books do not hold enough text.
    """
    budgets = [amount * 3600 * options.characters_per_second for amount in hours]  # characters
    chosen: list[list[dict]] = [[] for _ in hours]
    sizes = [0.0] * len(budgets)
    for utterance in _one_of_each_book(books, options.seed):
        hungry = min(range(len(budgets)), key=lambda index: sizes[index] / budgets[index])
        if sizes[hungry] >= budgets[hungry]:
            break
        if utterance["text"] in used:
            continue
        used.add(utterance["text"])
        chosen[hungry].append(utterance)
        sizes[hungry] += len(utterance["text"])
    available = sum(sizes) / 3600 / options.characters_per_second
    enough = all(size >= budget for size, budget in zip(sizes, budgets))
    rule = f"not exceed the speakable text of the books, about {available:.3f} h"
    check(enough or not exact, "hours", rule, list(hours))
    for utterances in chosen:
        utterances.sort(key=lambda utterance: (utterance["book"], utterance["index"]))
    return chosen


def is_speakable(cased: str) -> bool:
    """Return whether a reader says English text just as its normalizer spells it."""
    return ENGLISH.is_speakable(cased)


def _speakable_by_book(path: Path, min_words: int, language: Language) -> dict[str, list[dict]]:
    books: dict[str, list[dict]] = {}
    reading = reading_of(language)
    for utterance in read_jsonl(path, ("book", "index", "cased", "text")):
        enough = len(language.split(utterance["text"])) >= min_words
        if enough and reading.is_speakable(utterance["cased"]):
            books.setdefault(utterance["book"], []).append(utterance)
    return books


def _one_of_each_book(books: dict[str, list[dict]], seed: int):
    """Yield a random utterance of each book in turn, none twice, until all books are empty."""
    queues: list[tuple[str, list[dict]]] = []
    for book in sorted(books):
        queue = list(books[book])
        random.Random(f"{seed} {book}").shuffle(queue)
        queues.append((book, queue))
    order = random.Random(seed)
    while queues:
        order.shuffle(queues)
        for _, queue in queues:
            yield queue.pop()
        queues = [(book, queue) for book, queue in queues if queue]
