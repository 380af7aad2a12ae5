"""The words of the best hypothesis: when they sound, and the probability that they are right.
Knows: recognizers, marks of words, log-probs. Must not know: how a search or a fusion works, formats.
"""
from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional, Sequence

import numpy as np
import yaml

from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike
from icefall_fusion.decode.language_models import Prompt
from icefall_fusion.decode.methods import Decoded, Method
from icefall_fusion.decode.recognizer import Recognizer, RecognizerOptions
from icefall_fusion.decode.utterances import Utterance
from icefall_fusion.decode.word_evidence import NAMES, word_evidence
from icefall_fusion.nbest import NBest
from icefall_fusion.scoring.calibration import Logistic
from icefall_fusion.text.word_times import SHORTEST, WordTiming


@dataclass(frozen=True)
class WordModel:
    """What tells when words sound, and how sure they are: constants of an acoustic model and of methods.

    Args:
        timing: constants of times.
        confidence: by method; words of other methods have none.
        model: fingerprint of the acoustic model; empty: not known.
    """

    timing: WordTiming = WordTiming()
    confidence: Mapping[str, Logistic] = field(default_factory=dict)
    model: str = ""

    @classmethod
    def read(cls, path: PathLike) -> WordModel:
        """Read the YAML file of the job ``tune-words``.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no such file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no YAML file of words at {path}")
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            given = {name: dict(weights) for name, weights in content.get("confidence", {}).items()}
            curves = {name: tuple(map(tuple, own.pop("curve", ()))) for name, own in given.items()}
            confidence = {name: Logistic(weights, curves[name]) for name, weights in given.items()}
            for name, own in confidence.items():
                check(set(own.names) <= set(NAMES), f"confidence.{name}", f"weigh some of {NAMES}", own.names)
            return cls(WordTiming(**content["timing"]), confidence, str(content.get("model", "")))
        except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} must be a YAML file of tune-words: {error!r}") from error

    def plain(self) -> dict[str, Any]:
        """Return the content of the YAML file."""
        confidence: dict[str, Any] = {name: dict(own.weights) for name, own in self.confidence.items()}
        for name, own in self.confidence.items():
            if own.curve:
                confidence[name]["curve"] = [list(point) for point in own.curve]
        return {"model": self.model, "timing": asdict(self.timing), "confidence": confidence}

    def apply(self, nbest: NBest, seconds: float, evidence: Optional[np.ndarray] = None,
              method: str = "") -> NBest:
        """Return the list with times and confidences of the best hypothesis's words; others keep their marks.

        Args:
            nbest: with the marks of a search.
            seconds: duration of the log-probs.
            evidence: of the words, see `word_evidence`; None: no confidences.
            method: whose confidence.
        """
        if not len(nbest):
            return nbest
        times = self.timing.apply(nbest[0].times, seconds)
        if evidence is not None and len(times):
            own = self.confidence[method]
            sure = own(evidence[:, [NAMES.index(name) for name in own.names]]).tolist()
            times = [replace(time, confidence=round(value, 4)) for time, value in zip(times, sure)]
        return NBest(nbest.utterance, [replace(nbest[0], times=times), *nbest.hypotheses[1:]], nbest.weights)


def evidence_of(recognizer: Recognizer, method: Method, nbests: Sequence[NBest], emissions: Emissions,
                prompts: Optional[Mapping[str, Prompt]] = None) -> list[np.ndarray]:
    """Return the evidence of the best hypothesis's words of each utterance; with the method's LLM, if any.

    Args:
        recognizer: has the language models.
        method: made the lists.
        nbests: of ``emissions``, in their order.
        prompts: earlier text of each source.
    """
    models, sources = recognizer.models, method.spec.sources
    source = next((name for name in ("llm", "matched_llm", "nlm") if name in sources), None)
    lm = models.get(source) if source is not None else None
    style = models.options[source].text if source is not None else "as-is"
    prompt = (prompts or {}).get(source) if source is not None else None
    found = []
    for row, nbest in enumerate(nbests):
        text = prompt if prompt is None or isinstance(prompt, str) else prompt[nbest.utterance]
        log_probs = emissions.log_probs[row, : int(emissions.lens[row])]
        found.append(word_evidence(nbest, log_probs, emissions.tokens, lm, style, text or ""))
    return found


class WordRecognizer(Recognizer):
    """A recognizer whose best hypotheses tell when words sound (not their marks) and how sure they are.

    Args:
        options, methods: see `Recognizer`.
        words: constants of the acoustic model and of methods.
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
        evidence: Sequence[Optional[np.ndarray]] = [None] * len(decoded.nbests)
        if method.name in self.words.confidence:
            evidence = evidence_of(self, method, decoded.nbests, emissions, *context[1:2])
        ends = (emissions.lens.double() * emissions.frame_shift).tolist()
        each = zip(decoded.nbests, ends, evidence)
        return Decoded([self.words.apply(*one, method.name) for one in each], decoded.cost)
