"""Knows: how a book becomes one clean line, and which bytes of it are read as one utterance.
Must not know: audio, readers, manifests.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Optional

from icefall_fusion.data.books import PrepareTextOptions, book_utterances
from icefall_fusion.data.paragraphs import paragraphs
from icefall_fusion.data.selection import is_speakable
from icefall_fusion.text.normalizer import normalize

#: Between the words of a sentence, and between two sentences that are read in one breath.
_GAP = r"[\s—–-]+"
_ONLY_GAP = re.compile(r"[\s—–-]*")


@dataclass(frozen=True)
class Sentence:
    """A sentence or clause: ``[begin:end]`` are bytes of the book's clean text.

    Args:
        begin: its first byte.
        end: the byte after its last.
        cased: with case and punctuation, dashes left out: it shapes the melody.
        text: normalized; exactly these words are spoken.
    """

    begin: int
    end: int
    cased: str
    text: str


@dataclass(frozen=True)
class Passage:
    """Sentences that follow one another and are one utterance."""

    sentences: tuple[Sentence, ...]

    @property
    def begin(self) -> int:
        """Its first byte."""
        return self.sentences[0].begin

    @property
    def end(self) -> int:
        """The byte after its last."""
        return self.sentences[-1].end

    @property
    def characters(self) -> int:
        """How many characters are spoken."""
        return sum(len(sentence.text) + 1 for sentence in self.sentences)


class Book:
    """A book that is read from its first page on.

    Args:
        path: UTF-8 text, as for the job ``prepare-text``.
        max_characters: longer sentences are split between clauses.

    Attributes:
        data: the clean text in UTF-8: every run of white space, also between paragraphs, is one space.

    Raises:
        ValueError: the file is not UTF-8.
    """

    def __init__(self, path: Path, max_characters: int) -> None:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"book {str(path)!r} must be UTF-8 text, but is not: {error}") from None
        self._paragraphs = [clean for line in paragraphs(text) if (clean := " ".join(line.split()))]
        self._options = PrepareTextOptions(str(path.parent), max_characters=max_characters)
        self.data = " ".join(self._paragraphs).encode("utf-8")
        self._sentences = self._find_sentences()
        self._waiting: Optional[Sentence] = None

    def passage(self, characters: float, most: float) -> Optional[Passage]:
        """Return the next utterance, or None where the book has ended.

        Args:
            characters: length to come near to, by whole sentences.
            most: largest length, but for a single sentence.
        """
        while True:
            passage = self._run(characters, most)
            if passage is None:
                return None
            printed = self.data[passage.begin : passage.end].decode("utf-8")
            if normalize(printed) == " ".join([sentence.text for sentence in passage.sentences]):
                return passage  # the words as printed are those that are spoken

    def _run(self, characters: float, most: float) -> Optional[Passage]:
        run: list[Sentence] = []
        size = 0
        while (sentence := self._next()) is not None:
            length = len(sentence.text) + 1
            fits = size + length / 2 <= characters and size + length <= most
            if run and not (fits and self._joins(run[-1], sentence)):
                self._waiting = sentence
                break
            run.append(sentence)
            size += length
        return Passage(tuple(run)) if run else None

    def _next(self) -> Optional[Sentence]:
        sentence, self._waiting = self._waiting, None
        return sentence or next(self._sentences, None)

    def _joins(self, first: Sentence, second: Sentence) -> bool:
        return _ONLY_GAP.fullmatch(self.data[first.end : second.begin].decode("utf-8")) is not None

    def _find_sentences(self) -> Iterator[Sentence]:
        """Yield the sentences that can be read aloud in only one way; the others are left out."""
        start = 0  # bytes before the paragraph
        for paragraph in self._paragraphs:
            position = 0
            for utterance in book_utterances(paragraph, "", self._options)[0]:
                cased, text = utterance["cased"], utterance["text"]
                span = _find(cased, paragraph, position)
                if span is None:
                    continue
                if is_speakable(cased):
                    begin = start + len(paragraph[: span[0]].encode("utf-8"))
                    end = begin + len(paragraph[slice(*span)].encode("utf-8"))
                    yield Sentence(begin, end, cased, text)
                position = span[1]
            start += len(paragraph.encode("utf-8")) + 1


def _find(cased: str, paragraph: str, start: int) -> Optional[tuple[int, int]]:
    """Return the span of a sentence, from ``start`` on; ``cased`` has a space for each of its dashes."""
    begin = paragraph.find(cased, start)
    if begin >= 0:
        return begin, begin + len(cased)
    match = re.compile(_GAP.join(map(re.escape, cased.split()))).search(paragraph, start)
    return match.span() if match else None
