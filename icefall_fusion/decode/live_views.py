"""What is shown of a live stream: a live line in a terminal, a line a segment, JSON lines for programs.
Knows: partial and final results, terminals. Must not know: audio, how anything is decoded.
"""
from __future__ import annotations

import json
import math
import os
import shutil
import unicodedata
from dataclasses import asdict, replace
from typing import Optional, TextIO

from icefall_fusion.decode.word_formats import as_json
from icefall_fusion.decode.words import WordModel
from icefall_fusion.nbest import NBest
from icefall_fusion.streaming import Partial
from icefall_fusion.text.scripts import unspaced

_DIM, _PLAIN, _CLEAR = "\033[2m", "\033[0m", "\r\033[K"


class Texts:
    """A line a segment.

    Args:
        out: where to.
    """

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def partial(self, partial: Partial) -> None:
        """Show the text so far of the open segment."""

    def final(self, nbest: NBest) -> None:
        """Show the text of a segment that has ended."""
        if len(nbest) and nbest[0].text:
            print(unspaced(nbest[0].text), file=self.out, flush=True)

    def close(self) -> None:
        """Leave nothing that would not stay."""


class Terminal(Texts):
    """The open segment in the last line: what is committed as it is, what may change dim.

    Of a text that is longer than the line its end is shown.
    """

    def __init__(self, out: TextIO) -> None:
        super().__init__(out)
        self._before = ""

    def partial(self, partial: Partial) -> None:
        """See `Texts`."""
        width = shutil.get_terminal_size().columns - 1
        text = _printable(unspaced(f"{partial.committed} {partial.unstable}".strip()))
        hidden = _hidden(text, width)
        stable = max(hidden, len(_printable(partial.committed)))
        line = f"{_CLEAR}{text[hidden:stable]}{_DIM}{text[stable:]}{_PLAIN}"
        if line != self._before:
            self._before = line
            self.out.write(line)
            self.out.flush()

    def final(self, nbest: NBest) -> None:
        """See `Texts`."""
        self.close()
        super().final(nbest)

    def close(self) -> None:
        """See `Texts`."""
        self._before = ""
        self.out.write(_CLEAR)
        self.out.flush()


class Lines(Texts):
    """A JSON line whenever something has changed, and one for each segment that has ended.

    Args:
        out: where to.
        words: tells when words sound.
    """

    def __init__(self, out: TextIO, words: WordModel) -> None:
        super().__init__(out)
        self._words = words
        self._before, self._ended = ("", ""), 0

    def partial(self, partial: Partial) -> None:
        """See `Texts`."""
        texts = partial.committed, partial.unstable
        if texts != self._before:
            self._before = texts
            moved = replace(partial, words=self._words.timing.apply(partial.words))
            self._print({"final": False, **asdict(moved)})

    def final(self, nbest: NBest) -> None:
        """See `Texts`."""
        self._before = "", ""
        moved = self._words.apply(nbest, math.inf)
        self._print({"final": True, "segment": self._ended, **as_json(moved)})
        self._ended += 1

    def _print(self, value: dict) -> None:
        print(json.dumps(value, ensure_ascii=False), file=self.out, flush=True)


def make_view(out: TextIO, words: Optional[WordModel]) -> Texts:
    """Return what shows a stream.

    Args:
        out: where to; a live line is for terminals alone.
        words: of JSON lines; none: text.
    """
    if words is not None:
        return Lines(out, words)
    return Terminal(out) if out.isatty() and os.environ.get("TERM") != "dumb" else Texts(out)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _hidden(text: str, width: int) -> int:
    """Return how many characters at the beginning must go, so that the rest fits into ``width`` columns."""
    hidden = len(text)
    for place in range(len(text) - 1, -1, -1):
        letter = text[place]
        if unicodedata.combining(letter):  # in the column of the letter before it
            continue
        width -= 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if width < 0:
            return hidden
        hidden = place
    return 0
