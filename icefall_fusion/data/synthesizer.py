"""The speech of one utterance: voice, room, noise and channel by lot.
Knows: eSpeak's voices, conditions, seeds. Must not know: files, manifests, shards, features.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field
from typing import Any, Optional, Sequence

import numpy as np

from icefall_fusion.data.espeak import SAMPLE_RATE, SpeechEvent, speak
from icefall_fusion.data.noise import Conditions, distort
from icefall_fusion.data.spoken_words import SpokenWord, spoken_words
from icefall_fusion.data.voices import Speakers
from icefall_fusion.text.scripts import has_unspaced

BABBLE_VOICES = 48  # utterances that talk in the background


@dataclass
class Synthesizer:
    """Speaks utterances of one population; chance depends on seed and id alone.

    Args:
        speakers: who may speak.
        conditions: one is taken by lot for every utterance.
        seed: any non-negative int.
        babble_texts: of the talkers in the background; without any there is no babble.
        prosody: see SynthesizeOptions.
    """

    speakers: Speakers
    conditions: Sequence[Conditions]
    seed: int = 0
    babble_texts: Sequence[str] = ()
    prosody: bool = True
    _voices: Optional[list[np.ndarray]] = field(default=None, repr=False)

    def say(
        self, id: str, text: str, cased: Optional[str] = None, words: Optional[list[SpokenWord]] = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Return an utterance and how it was made.

        Args:
            id: the utterance's name, the only source of chance beside the seed.
            text: normalized text: exactly these words are spoken.
            cased: the same with case and punctuation, for the melody.
            words: receives when each word is spoken; the samples are the same.

        Returns:
            (float32 [samples] at 16 kHz, {"voice", "speed", "pitch", "snr", "noise", "rt60", "band"}).
        """
        rng = np.random.default_rng([self.seed, zlib.crc32(id.encode("utf-8"))])
        voice = self.speakers.draw(rng)
        spoken = punctuated(text, cased) if self.prosody and cased else text
        events: Optional[list[SpeechEvent]] = None if words is None else []
        samples = speak(spoken, voice, int(rng.integers(2**31)), events)
        if words is not None and events is not None:
            words += spoken_words(spoken, events, len(samples) / SAMPLE_RATE)
        conditions = self.conditions[rng.integers(len(self.conditions))]
        samples, record = distort(samples, conditions, rng, self._background())
        return samples, {"voice": voice.name, "speed": voice.speed, "pitch": voice.pitch, **record}

    def _background(self) -> list[np.ndarray]:
        if self._voices is None:
            rng = np.random.default_rng([self.seed, 1])
            texts = [self.babble_texts[i] for i in rng.permutation(len(self.babble_texts))[:BABBLE_VOICES]]
            spoken = (speak(text, self.speakers.draw(rng), seed=0) for text in texts)
            self._voices = [samples for samples in spoken if len(samples) > 0]
        return self._voices


def punctuated(text: str, cased: str) -> str:
    """Return ``text`` with the punctuation of ``cased`` if their words have the same letters, else ``text``.

    Nothing but , ; : ! ? after a word and the last full stop is taken over: the words spoken stay those of
    ``text``. In scripts without spaces all of it is.
    """
    if has_unspaced(text):
        return cased if "".join(filter(str.isalnum, cased)) == "".join(filter(str.isalnum, text)) else text
    words = text.split()
    tokens = [token for token in re.split(r"[\s\-–—]+", cased) if re.search(r"\w", token)]
    if len(words) != len(tokens):
        return text
    spoken = []
    for word, token in zip(words, tokens):
        if re.sub(r"\W", "", word).lower() != re.sub(r"[\W_]", "", token).lower():
            return text
        mark = re.search(r"[,;:!?]", re.sub(r"^\W+", "", token))
        spoken.append(word + (mark.group() if mark else ""))
    return " ".join(spoken) + ("." if spoken[-1][-1] not in ",;:!?" else "")
