"""Knows: how a chapter is read aloud, recorded and described, in LibriHeavy's JSON.
Must not know: which chapters there are, where files lie.
"""
from __future__ import annotations

import zlib
from typing import Any, Sequence

import numpy as np

from icefall_fusion.data.espeak import SAMPLE_RATE, speak
from icefall_fusion.data.noise import Conditions, distort
from icefall_fusion.data.synthesizer import punctuated
from icefall_fusion.text.normalizer import normalize
from librilike.books import Passage
from librilike.chapters import Chapter, Sizes

PREFIX = "download"  # LibriHeavy's manifests say so: the folder that is written plays its role
PRE_TEXT_BYTES = 1000
_MILLISECOND = SAMPLE_RATE // 1000  # samples
_MARGIN = 0.1  # seconds of a cut before and after its speech
_MIN_SECONDS = 2.0  # of a cut
_BETWEEN_SENTENCES, _BETWEEN_UTTERANCES = (0.25, 0.6), (0.5, 1.2)  # seconds


class _Track:
    """Samples of a recording that grows; whatever is added begins at a whole millisecond."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self.length = 0  # samples

    def add(self, samples: np.ndarray) -> None:
        rest = -len(samples) % _MILLISECOND
        self._parts.append(np.pad(samples, (0, rest)) if rest else samples)
        self.length += len(self._parts[-1])

    def pause(self, seconds: float) -> None:
        self.add(np.zeros(round(seconds * SAMPLE_RATE), np.float32))

    @property
    def milliseconds(self) -> int:
        return self.length // _MILLISECOND

    def samples(self) -> np.ndarray:
        return np.concatenate(self._parts)


def record(
    chapter: Chapter, text: bytes, conditions: Sequence[Conditions], sizes: Sizes, seed: int
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Return a recording, float32 [samples] at 16 kHz, and its cuts; chance depends on seed and id alone.

    Args:
        chapter: passages and the reader.
        text: the clean text that the chapter's bytes point into.
        conditions: one of them is drawn.
        sizes: utterances outside of 2 s and ``max_seconds`` get no cut.
        seed: any non-negative int.
    """
    rng = np.random.default_rng([seed, zlib.crc32(chapter.recording.encode("utf-8"))])
    track = _Track()
    track.pause(rng.uniform(0.5, 1.5))
    margin = round(_MARGIN * 1000)
    spans: list[tuple[Passage, int, int]] = []  # start and duration in milliseconds
    spoken = 0
    for passage in chapter.passages:
        if spoken and spoken / 1000 + sizes.mean_seconds / 2 >= chapter.seconds:
            break
        begin = track.milliseconds - margin
        _read_aloud(passage, chapter, track, rng)
        duration = track.milliseconds + margin - begin
        track.pause(rng.uniform(*_BETWEEN_UTTERANCES))
        if _MIN_SECONDS * 1000 <= duration <= sizes.max_seconds * 1000:
            spans.append((passage, begin, duration))
            spoken += duration
    samples, _ = distort(track.samples(), conditions[rng.integers(len(conditions))], rng)
    cuts = [_cut(chapter, text, index, *span, len(samples)) for index, span in enumerate(spans)]
    return samples, cuts


def _read_aloud(passage: Passage, chapter: Chapter, track: _Track, rng: np.random.Generator) -> None:
    for index, sentence in enumerate(passage.sentences):
        if index:
            track.pause(rng.uniform(*_BETWEEN_SENTENCES))
        words = punctuated(sentence.text, sentence.cased)
        track.add(speak(words, chapter.voice, seed=int(rng.integers(2**31))))


def _cut(
    chapter: Chapter, text: bytes, index: int, passage: Passage, begin: int, duration: int, num_samples: int
) -> dict[str, Any]:
    printed = text[passage.begin : passage.end].decode("utf-8")
    before = pre_text(text, passage.begin)
    id = f"{chapter.recording}_{index}"
    supervision = {
        "id": id,
        "recording_id": chapter.recording,
        "start": 0,
        "duration": duration / 1000,
        "channel": 0,
        "language": "English",
        "speaker": chapter.speaker,
        "custom": {
            "texts": [printed, normalize(printed).upper()],
            "pre_texts": [before, normalize(before).upper()],
            "begin_byte": passage.begin,
            "end_byte": passage.end,
        },
    }
    source = {"type": "file", "channels": [0], "source": f"{PREFIX}/{audio_path(chapter)}"}
    recording = {
        "id": chapter.recording,
        "sources": [source],
        "sampling_rate": SAMPLE_RATE,
        "num_samples": num_samples,
        "duration": num_samples / SAMPLE_RATE,
        "channel_ids": [0],
    }
    return {
        "id": id,
        "start": begin / 1000,
        "duration": duration / 1000,
        "channel": 0,
        "supervisions": [supervision],
        "recording": recording,
        "custom": {"text_path": f"{PREFIX}/{chapter.text_path}"},
        "type": "MonoCut",
    }


def audio_path(chapter: Chapter) -> str:
    """Return where a recording lies, below the folder that is written."""
    return f"librilight/{chapter.recording}.flac"


def pre_text(text: bytes, begin: int) -> str:
    """Return up to 1,000 bytes before ``begin``, whole words only."""
    start = max(0, begin - PRE_TEXT_BYTES)
    before = text[start:begin].decode("utf-8", errors="ignore")
    if start and text[start - 1 : start] != b" ":
        before = before.partition(" ")[2]
    return before.strip()
