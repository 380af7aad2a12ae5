"""Knows: which reader records which chapter of which book: the plan of a set of recordings.
Must not know: samples, manifests, the command line.
"""
from __future__ import annotations

import itertools
import re
import zlib
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Optional, Sequence

import numpy as np

from icefall_fusion.common.checks import check
from icefall_fusion.data.espeak import Voice
from icefall_fusion.data.voices import Speakers
from librilike.books import Book, Passage

CHARACTERS_PER_SECOND = 0.107  # of a voice, for each word a minute of its speed
_SPARE = 1.25  # factor on the text of a recording, which ends when it is long enough
_SPREAD = 0.43  # of the lengths of utterances, over their mean: as in LibriHeavy
_SHORTEST, _LEAST = 3.0, 20.0  # seconds: of utterances; of the rest of a book
_MAX_CHARACTERS = (100, 230)  # of a sentence: bounds


@dataclass(frozen=True)
class Sizes:
    """How long recordings and utterances are.

    Args:
        min_minutes: shortest recording, unless a book or the hours end before.
        max_minutes: longest recording.
        mean_seconds: of utterances; short paragraphs make them a little shorter.
        max_seconds: longer utterances are spoken, but no cuts.
        recordings_per_speaker: after them another speaker goes on with the book.
    """

    min_minutes: float = 5.0
    max_minutes: float = 15.0
    mean_seconds: float = 15.0
    max_seconds: float = 30.0
    recordings_per_speaker: int = 6

    def __post_init__(self) -> None:
        check(self.min_minutes > 0, "Sizes.min_minutes", "be greater than 0", self.min_minutes)
        rule = f"be at least 2.5 times min_minutes ({self.min_minutes})"
        check(self.max_minutes >= 2.5 * self.min_minutes, "Sizes.max_minutes", rule, self.max_minutes)
        check(self.mean_seconds > 0, "Sizes.mean_seconds", "be greater than 0", self.mean_seconds)
        rule = f"be at least 10 and greater than mean_seconds ({self.mean_seconds})"
        check(self.max_seconds >= max(10.0, self.mean_seconds), "Sizes.max_seconds", rule, self.max_seconds)
        count = self.recordings_per_speaker
        check(count >= 1, "Sizes.recordings_per_speaker", "be at least 1", count)


@dataclass(frozen=True)
class Chapter:
    """A recording to make.

    Args:
        recording: its id, ``small/1000/sea_fairies_librilike/01_sea_fairies``.
        speaker: the reader's number.
        text_path: the book's clean text, below the folder that is written.
        voice: the reader's.
        seconds: of speech; fewer where the book ends.
        passages: are read; the last ones may be spare.
    """

    recording: str
    speaker: str
    text_path: str
    voice: Voice
    seconds: float
    passages: tuple[Passage, ...]


@dataclass
class _Reading:
    """A book that is being read, in which subset, and by whom."""

    path: Path
    subset: str
    book: Optional[Book] = None
    recordings: int = 0
    speaker: str = ""


def title_of(path: Path) -> str:
    """Return a book's title, by its file's name: it names the folder of its text."""
    return re.sub(r"[\s_-]+", " ", path.stem).strip().title()


class Planner:
    """Deals the books of one set out to readers, chapter by chapter.

    With more seconds the chapters are the same, but for the last two, and then come more.

    Args:
        name: of the set.
        subsets: of Libri-Light: the folders of the recordings, which the books take in turn.
        books: text files; they are read in an order that depends on the seed.
        speakers: who may read.
        first_speaker: number of the first reader.
        sizes: of recordings and utterances.
        seed: any non-negative int.
        keep_text: called with the text's path and content when a book is opened.
    """

    def __init__(
        self, name: str, subsets: Sequence[str], books: Sequence[Path], speakers: Speakers,
        first_speaker: int, sizes: Sizes, seed: int, keep_text: Callable[[str, bytes], None],
    ) -> None:
        self.name, self.sizes, self.seed = name, sizes, seed
        self._speakers, self._keep_text = speakers, keep_text
        self._numbers = map(str, itertools.count(first_speaker))
        self._rng = self._chance(name)
        order = zip(self._rng.permutation(len(books)), itertools.cycle(subsets))
        self._queue = deque(_Reading(books[index], subset) for index, subset in order)

    def chapters(self, seconds: float) -> Iterator[Chapter]:
        """Yield chapters with ``seconds`` of speech in all.

        Raises:
            ValueError: the books have less text.
        """
        remaining = seconds
        while remaining > 1.0 or remaining == seconds:  # at least one
            chapter = self._next(self._length(remaining))
            rule = f"not exceed the text of its books, about {(seconds - remaining) / 3600:.3f} h"
            check(chapter is not None, f"hours of {self.name}", rule, round(seconds / 3600, 4))
            remaining -= chapter.seconds
            yield chapter

    def _chance(self, *names: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(" ".join(names).encode("utf-8"))])

    def _length(self, remaining: float) -> float:
        least, most = 60 * self.sizes.min_minutes, 54 * self.sizes.max_minutes  # pauses make up the rest
        length = self._rng.uniform(least, most)
        if remaining <= most:
            return remaining
        return length if remaining - length >= least else remaining / 2

    def _next(self, seconds: float) -> Optional[Chapter]:
        while self._queue:  # one chapter of each book in turn
            reading = self._queue.popleft()
            chapter = self._read(reading, seconds)
            if chapter is not None:
                self._queue.append(reading)
                return chapter
        return None

    def _read(self, reading: _Reading, seconds: float) -> Optional[Chapter]:
        title = title_of(reading.path)
        text_path = f"librilight_text/output_text_{reading.subset}_cleaned/{title}/text.txt"
        if reading.book is None:
            low, high = _MAX_CHARACTERS
            reading.book = Book(reading.path, int(min(high, max(low, 9 * self.sizes.max_seconds))))
            self._keep_text(text_path, reading.book.data)
        if reading.recordings % self.sizes.recordings_per_speaker == 0:
            reading.speaker = next(self._numbers)
        slug = re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")
        folder = f"{reading.subset}/{reading.speaker}/{slug}_librilike"
        recording = f"{folder}/{reading.recordings + 1:02d}_{slug}"
        voice = self._speakers.draw(self._chance(self.name, reading.speaker))
        rate = CHARACTERS_PER_SECOND * voice.speed
        passages = self._passages(reading.book, recording, seconds * rate * _SPARE, rate)
        available = sum(passage.characters for passage in passages) / rate
        if available < min(seconds, _LEAST):
            return None
        reading.recordings += 1
        return Chapter(
            recording, reading.speaker, text_path, voice, round(min(seconds, available), 3), passages
        )

    def _passages(self, book: Book, recording: str, characters: float, rate: float) -> tuple[Passage, ...]:
        rng = self._chance(recording)
        mean, longest = self.sizes.mean_seconds, 0.9 * self.sizes.max_seconds
        passages: list[Passage] = []
        while characters > 0:
            length = np.clip(rng.normal(mean, _SPREAD * mean), _SHORTEST, longest)
            passage = book.passage(length * rate, longest * rate)
            if passage is None:
                break
            passages.append(passage)
            characters -= passage.characters
        return tuple(passages)
