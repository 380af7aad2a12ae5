"""When each word of synthetic speech is spoken, from the events of eSpeak NG: a ground truth of word times.
Knows: text and events. Must not know: eSpeak's library, audio, models.
"""
from __future__ import annotations

import bisect
import re
from typing import NamedTuple, Sequence

from icefall_fusion.data.espeak import SpeechEvent


class SpokenWord(NamedTuple):
    """A word and when it is spoken, in seconds.

    eSpeak NG speaks some words as one, such as "of the". They are one entry then, with a space inside.
    """

    word: str
    start: float
    end: float


def spoken_words(text: str, events: Sequence[SpeechEvent], seconds: float) -> list[SpokenWord]:
    """Return the words of a text that was spoken; joined by spaces, they are the text's words.

    A word begins at its event, the closure of a first stop included. It ends where the next one begins, or a
    pause before that.

    Args:
        text: as it was spoken; words stand between spaces. Punctuation is left out.
        events: of eSpeak NG, for this text.
        seconds: duration of the speech, at which the last word ends at the latest.
    """
    places = list(re.finditer(r"\S+", text))
    first = [place.start() for place in places]
    starts: dict[int, float] = {}  # by number of the word
    for event in events:
        if event.kind == "word" and places:
            starts.setdefault(max(bisect.bisect_right(first, event.first) - 1, 0), event.seconds)
    numbers = sorted(starts)
    pauses = [event.seconds for event in events if event.kind == "phoneme" and event.name.startswith("_")]
    words = []
    for index, number in enumerate(numbers):
        last = index + 1 == len(numbers)
        following = seconds if last else starts[numbers[index + 1]]
        at = bisect.bisect_right(pauses, starts[number])
        end = min(pauses[at], following) if at < len(pauses) else following
        begin, stop = number if index else 0, len(places) if last else numbers[index + 1]
        group = " ".join(place.group().rstrip(",;:.!?") for place in places[begin:stop])
        words.append(SpokenWord(group, starts[number], end))
    return words
