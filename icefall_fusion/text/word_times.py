"""When a word sounds, from the frames in which a CTC model marks it.
Knows: words and seconds. Must not know: audio, models, searches.

A CTC model marks a piece in one frame, some time after its sound begins. So a word starts a constant time
before its first mark. Its end is not marked at all: it lasts as long as a word of its letters does, until the
next one starts. The four constants belong to an acoustic model.
"""
from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Optional, Sequence

from icefall_fusion.common.checks import check, is_number
from icefall_fusion.nbest import WordTime

SHORTEST = 0.01  # seconds of a word


@dataclass(frozen=True)
class WordTiming:
    """From marks to sounds; the defaults are those of the shipped model (frames of 40 ms, synthetic speech).

    Args:
        lead: seconds from the start of a word to its first mark.
        tail: seconds that a word sounds after its last mark, at least.
        least, letter: a word lasts at least ``least + letter * letters`` seconds after its first mark.
    """

    lead: float = 0.04
    tail: float = 0.02
    least: float = 0.08
    letter: float = 0.06

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            check(is_number(value) and abs(value) < 10, f"WordTiming.{field.name}", "be some seconds", value)

    def apply(self, marks: Sequence[WordTime], seconds: Optional[float] = None) -> list[WordTime]:
        """Return when words sound: in the order of time, none longer than to the start of the next one.

        Args:
            marks: as a search gives them: from the frame of the first piece to past that of the last.
            seconds: duration of the audio, at which the last word ends at the latest; None: not known.
        """
        starts: list[float] = []
        for mark in marks:
            least = starts[-1] + SHORTEST if starts else 0.0
            starts.append(max(mark.start - self.lead, least))
        words = []
        for number, mark in enumerate(marks):
            stop = starts[number + 1] if number + 1 < len(marks) else seconds
            end = max(mark.end + self.tail, mark.start + self.least + self.letter * len(mark.word))
            end = end if stop is None else min(end, stop)
            start = starts[number]
            words.append(replace(mark, start=round(start, 6), end=round(max(end, start + SHORTEST), 6)))
        return words
