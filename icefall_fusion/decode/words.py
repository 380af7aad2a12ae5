"""The words of the best hypothesis with the times at which they sound.
Knows: recognizers, marks of words, log-probs. Must not know: how a search or a fusion works, formats.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterator, Sequence

import yaml

from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.common.files import PathLike
from icefall_fusion.decode.methods import Decoded, Method
from icefall_fusion.decode.recognizer import Recognizer, RecognizerOptions
from icefall_fusion.decode.utterances import Utterance
from icefall_fusion.nbest import NBest
from icefall_fusion.text.word_times import SHORTEST, WordTiming


@dataclass(frozen=True)
class WordModel:
    """What tells when words sound: constants of an acoustic model."""

    timing: WordTiming = WordTiming()

    @classmethod
    def read(cls, path: PathLike) -> WordModel:
        """Read the YAML file of the job ``tune-words``.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no such file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no YAML file of word times at {path}")
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            return cls(WordTiming(**content["timing"]))
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} must be a YAML file of tune-words: {error!r}") from error

    def apply(self, nbests: Sequence[NBest], emissions: Emissions) -> list[NBest]:
        """Return the lists with the times of the best hypothesis's words; the others keep their marks.

        Args:
            nbests: one list an utterance of ``emissions``, in that order, with the marks of a search.
            emissions: of these utterances.
        """
        ends = (emissions.lens.double() * emissions.frame_shift).tolist()
        return [self._apply(nbest, seconds) for nbest, seconds in zip(nbests, ends)]

    def _apply(self, nbest: NBest, seconds: float) -> NBest:
        if not len(nbest):
            return nbest
        best = replace(nbest[0], times=self.timing.apply(nbest[0].times, seconds))
        return NBest(nbest.utterance, [best, *nbest.hypotheses[1:]], nbest.weights)


class WordRecognizer(Recognizer):
    """A recognizer whose best hypotheses have the times at which words sound, not those of their marks.

    Args:
        options, methods: see `Recognizer`.
        words: constants of the acoustic model.
    """

    def __init__(self, options: RecognizerOptions, methods: Any, words: WordModel = WordModel()) -> None:
        super().__init__(options, methods)
        self.words = words

    def transcribe(self, utterances: Sequence[Utterance]) -> Iterator[NBest]:
        """Yield the N-best lists as `Recognizer.transcribe` does; no word ends after its audio."""
        seconds = {utterance.id: utterance.seconds for utterance in utterances}
        for nbest in super().transcribe(utterances):
            end, times = seconds[nbest.utterance], nbest[0].times
            if 0 < end < max((time.end for time in times), default=0.0):  # a frame reaches beyond it
                cut = [replace(t, start=min(t.start, end - SHORTEST), end=min(t.end, end)) for t in times]
                best = replace(nbest[0], times=cut)
                nbest = NBest(nbest.utterance, [best, *nbest.hypotheses[1:]], nbest.weights)
            yield nbest

    def search(self, method: Method, emissions: Emissions, *context: Any) -> Decoded:
        decoded = super().search(method, emissions, *context)
        return Decoded(self.words.apply(decoded.nbests, emissions), decoded.cost)
