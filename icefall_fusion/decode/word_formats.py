"""Transcripts as files that other programs read: JSON, CTM, SRT, WebVTT, lhotse supervisions with alignments.
Knows: words with times and confidence. Must not know: how they were found, models, audio.
"""
from __future__ import annotations

from dataclasses import asdict
from pathlib import PurePath
from typing import Any, NamedTuple, Optional, Sequence

from icefall_fusion.nbest import NBest, WordTime
from icefall_fusion.text.scripts import unspaced

#: A cue of subtitles: characters of a line, lines, seconds; a pause of so many seconds ends one.
LINE, LINES, CUE_SECONDS, PAUSE = 42, 2, 6.0, 0.6


def names_of(files: Sequence[str]) -> dict[str, str]:
    """Return a name without white space for each file: that of the file, with its folders where two agree.

    Raises:
        ValueError: two files still have one name.
    """
    short = {file: _name(PurePath(file).stem) for file in files}
    doubled = {name for name in short.values() if list(short.values()).count(name) > 1}
    names = {file: _name(str(file)) if name in doubled else name for file, name in short.items()}
    seen: dict[str, str] = {}
    for file, name in names.items():
        other = seen.setdefault(name, file)
        if other != file:
            both = f"{other!r} and {file!r} are both {name!r}"
            raise ValueError(f"files must have names that differ, but {both}")
    return names


def _name(text: str) -> str:
    return "_".join(text.replace("/", " ").replace("\\", " ").split()) or "_"


def as_json(nbest: NBest, language: str = "") -> dict[str, Any]:
    """Return a list as plain values: text, words with start and end in seconds, scores, other hypotheses.

    Args:
        nbest: at least one hypothesis.
        language: its ISO 639 code; empty: it is not told.
    """
    best = nbest[0]
    return {
        "file": nbest.utterance,
        **({"language": language} if language else {}),
        "text": unspaced(best.text),
        "words": [asdict(time) for time in best.times],
        "scores": best.scores,
        "weights": nbest.weights,
        "nbest": [{"text": unspaced(h.text), "scores": h.scores} for h in nbest],
    }


def ctm(name: str, words: Sequence[WordTime], channel: str = "1") -> str:
    """Return words as lines of NIST's CTM: name, channel, start, duration, word, and a known confidence."""
    lines = []
    for word in words:
        known = [] if word.confidence is None else [f"{word.confidence:.3f}"]
        fields = [name, channel, f"{word.start:.3f}", f"{word.end - word.start:.3f}", word.word, *known]
        lines.append(" ".join(fields) + "\n")
    return "".join(lines)


class Cue(NamedTuple):
    """Some words that are shown together, in lines, from ``start`` to ``end`` in seconds."""

    start: float
    end: float
    lines: list[str]


def cues(words: Sequence[WordTime]) -> list[Cue]:
    """Return words as cues of at most `LINES` lines and `CUE_SECONDS`, which also end at pauses.

    A word that is longer than a line or a cue stands alone.
    """
    found: list[Cue] = []
    before = None
    for word in words:
        lines = None
        if found and before is not None and word.start - before < PAUSE:
            if word.end - found[-1].start <= CUE_SECONDS:
                lines = _with_word(found[-1].lines, word.word)
        if lines is None:
            found.append(Cue(word.start, word.end, [word.word]))
        else:
            found[-1] = Cue(found[-1].start, word.end, lines)
        before = word.end
    return found


def _with_word(lines: Sequence[str], word: str) -> Optional[list[str]]:
    """Return lines with one word more, None if it does not fit."""
    longer = unspaced(f"{lines[-1]} {word}")
    if len(longer) <= LINE:
        return [*lines[:-1], longer]
    return [*lines, word] if len(lines) < LINES else None


def srt(words: Sequence[WordTime]) -> str:
    """Return words as SubRip subtitles."""
    blocks = []
    for number, cue in enumerate(cues(words), 1):
        span = f"{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}"
        blocks.append("\n".join([str(number), span, *cue.lines]) + "\n")
    return "\n".join(blocks)


def vtt(words: Sequence[WordTime]) -> str:
    """Return words as WebVTT subtitles."""
    blocks = ["WEBVTT\n"]
    for cue in cues(words):
        text = [line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for line in cue.lines]
        blocks.append("\n".join([f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}", *text]) + "\n")
    return "\n".join(blocks)


def _clock(seconds: float, mark: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{milliseconds // 1000:02d}{mark}{milliseconds % 1000:03d}"


def supervision(name: str, nbest: NBest, seconds: float, language: str = "") -> Any:
    """Return the best hypothesis as a lhotse SupervisionSegment with the alignment ``word``.

    Args:
        name: of the recording, and of the segment.
        nbest: at least one hypothesis, with the times of its words.
        seconds: duration of the recording, where it is known; it lasts until its last word ends, or longer.
        language: its ISO 639 code; empty: it is not told.
    """
    from lhotse import SupervisionSegment
    from lhotse.supervision import AlignmentItem

    items = [
        AlignmentItem(time.word, time.start, round(time.end - time.start, 6), time.confidence)
        for time in nbest[0].times
    ]
    seconds = max([seconds, *(time.end for time in nbest[0].times[-1:])])
    return SupervisionSegment(
        name, name, 0.0, seconds, 0, text=unspaced(nbest[0].text), language=language or None,
        alignment={"word": items},
    )
