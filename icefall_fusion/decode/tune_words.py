"""Job ``tune-words``: when words sound and how sure they are, found on speech with known words and times.
Knows: recognizers, manifests with alignments, evidence. Must not know: how speech was made, formats.
"""
from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Optional, Sequence, Union

import numpy as np
import yaml

from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.common.checks import check, check_at_least
from icefall_fusion.common.command_line import SKIPPED_SOME
from icefall_fusion.common.files import PathLike, fingerprint, write_text
from icefall_fusion.data.manifests import spread
from icefall_fusion.decode.method_names import parse_methods
from icefall_fusion.decode.methods import Decoded, Method
from icefall_fusion.decode.pretrained import with_pretrained
from icefall_fusion.decode.recognizer import Recognizer, RecognizerOptions
from icefall_fusion.decode.utterances import read_cuts
from icefall_fusion.decode.word_evidence import NAMES
from icefall_fusion.decode.words import WordModel, evidence_of
from icefall_fusion.nbest import WordTime
from icefall_fusion.scoring.calibration import Logistic, area_under_curve, calibration_error, held_out
from icefall_fusion.scoring.wer import EPS, align_words
from icefall_fusion.text.language import ENGLISH, Language
from icefall_fusion.text.word_times import WordTiming

#: Values that are tried of tail, least and letter, in seconds.
TAILS, LEASTS = np.arange(0.0, 0.31, 0.02), np.arange(-0.1, 0.31, 0.02)
LETTERS = np.arange(0.0, 0.13, 0.01)
HEAD = "# Found on dev by: python -m icefall_fusion tune-words. Times in seconds.\n"


@dataclass(frozen=True, kw_only=True)
class TuneWordsOptions(RecognizerOptions):
    """Find the constants of word times of an acoustic model, and of the confidence in words of a method.

    Without ``emissions`` the models shipped with the repository are used.

    Args:
        cuts: a manifest of dev, with references. Times need supervisions with the alignment ``word``, e.g. of
            ``synthesize --word_times true``; without it, those constants stay.
        out: the YAML file of constants, for ``transcribe --words``; one of this acoustic model that is there
            keeps the confidence of other methods. Empty: they are printed.
        methods: comma-separated or a list; the confidence of each is found, and the constants of times with
            the marks of the first.
        limit: utterances, spread over the manifest; 0: all.
        language, normalizer: of the references and the words that are compared with them.
    """

    cuts: str
    out: str = ""
    methods: Union[str, list[str]] = "llm-delayed-shortest"
    limit: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_methods(self.methods)
        check_at_least(0, self, "limit")


class Sighting(NamedTuple):
    """A word that was recognized right: its mark, the next word's mark, the times at which it sounds.

    None stands where the truth is not known, or where there is no next word.
    """

    mark: WordTime
    following: Optional[float]
    start: Optional[float]
    end: Optional[float]


class EvidenceRecognizer(Recognizer):
    """A recognizer that keeps the evidence of words.

    Attributes:
        evidence: of the best hypothesis's words [words, names], by id of the segment.
    """

    def __init__(self, options: RecognizerOptions, methods: str) -> None:
        super().__init__(options, methods)
        self.evidence: dict[str, np.ndarray] = {}

    def search(self, method: Method, emissions: Emissions, *context: Any) -> Decoded:
        decoded = super().search(method, emissions, *context)
        found = evidence_of(self, method, decoded.nbests, emissions, *context[1:2])
        self.evidence.update(zip((nbest.utterance for nbest in decoded.nbests), found))
        return decoded

    def of_utterance(self, utterance: str) -> np.ndarray:
        """Return the evidence of all segments of an utterance."""
        parts, number = [self.evidence[utterance]], 1
        while f"{utterance}#{number}" in self.evidence:
            parts.append(self.evidence[f"{utterance}#{number}"])
            number += 1
        return np.concatenate(parts)


class Observed(NamedTuple):
    """What was seen on some utterances: words with known times; evidence of all words; which are right."""

    sightings: list[Sighting]
    evidence: np.ndarray
    right: np.ndarray


def observe(recognizer: EvidenceRecognizer, cuts: str, limit: int = 0) -> Observed:
    """Decode a manifest and compare its words with the truth.

    Raises:
        ValueError: nothing was recognized.
    """
    truth = read_alignments(cuts)
    if not truth:
        logging.warning("%s tells no times of words (synthesize --word_times true writes them)", cuts)
    utterances = spread(read_cuts(cuts, recognizer.source.wants), limit)
    references = {utterance.id: utterance.text or "" for utterance in utterances}
    sightings: list[Sighting] = []
    evidence, right = [], []
    for nbest in recognizer.transcribe(utterances):
        sightings += sight(nbest[0].times, truth.get(nbest.utterance, []))
        evidence.append(recognizer.of_utterance(nbest.utterance))
        right += right_words(references[nbest.utterance], nbest[0].words(), recognizer.language)
    check(len(right) > 0, "cuts", "have speech in which words are recognized", cuts)
    return Observed(sightings, np.concatenate(evidence), np.array(right))


def run(options: TuneWordsOptions) -> int:
    """Run the job ``tune-words``; the exit code is 3 when audio could not be read."""
    options, code = with_pretrained(options), 0
    model = fingerprint(options.emissions.model)
    words = WordModel.read(options.out) if options.out and Path(options.out).is_file() else WordModel()
    if words.model != model:  # nothing of another acoustic model is kept
        words = WordModel(model=model)
    for number, method in enumerate(parse_methods(options.methods)):
        recognizer = EvidenceRecognizer(options, method)
        seen = observe(recognizer, options.cuts, options.limit)
        if number == 0 and seen.sightings:
            words = replace(words, timing=fit_timing(seen.sightings))
            for name, those in (("marks", WordTiming(0.0, 0.0, 0.0, 0.0)), ("moved", words.timing)):
                print(f"{name}: {describe_errors(seen.sightings, those)}")
        names = NAMES[: seen.evidence.shape[1]]
        own = Logistic.fit(names, seen.evidence, seen.right).calibrated(seen.evidence, seen.right)
        words = replace(words, confidence={**words.confidence, method: own})
        sure = held_out(names, seen.evidence, seen.right)
        print(f"{method}, found on four fifths for the fifth: {describe_confidence(sure, seen.right)}")
        code = SKIPPED_SOME if recognizer.unreadable else code
        if options.out:
            write_text(options.out, HEAD + yaml.safe_dump(words.plain(), sort_keys=False))
    if not options.out:
        print(yaml.safe_dump(words.plain(), sort_keys=False), end="")
    return code


def describe_confidence(sure: np.ndarray, right: np.ndarray) -> str:
    """Return in a line of text how well probabilities tell right words."""
    error, area = 100 * calibration_error(sure, right), area_under_curve(sure, right)
    return f"{100 * right.mean():.1f} % of {len(right)} words right, ECE {error:.1f} %, AUC {area:.3f}"


def right_words(reference: str, words: Sequence[str], language: Language = ENGLISH) -> list[bool]:
    """Return which words are right, by the alignment of their normalized units with the fewest errors.

    A word of several units, as a piece of two Chinese characters, is right if all of them are.
    """
    units = [language.units(word) or ["_"] for word in words]
    pairs = align_words(language.units(reference), [unit for word in units for unit in word])
    right = iter([word == other for word, other in pairs if other != EPS])
    return [all(list(itertools.islice(right, len(word)))) for word in units]


def read_alignments(path: PathLike) -> dict[str, list[WordTime]]:
    """Return the words of each cut with the alignment ``word``, with their times.

    Words that are spoken as one are one, with spaces.
    """
    from lhotse import CutSet

    truth = {}
    for cut in CutSet.from_file(path):
        items = [item for s in cut.supervisions for item in (s.alignment or {}).get("word", [])]
        if items:
            truth[cut.id] = [WordTime(item.symbol, item.start, item.end) for item in items]
    return truth


def sight(marks: Sequence[WordTime], truth: Sequence[WordTime]) -> Iterator[Sighting]:
    """Yield the words that were recognized right.

    Args:
        marks: of a hypothesis.
        truth: when words sound; of an entry of several words the inner times are not known.
    """
    spoken: list[tuple[str, Optional[float], Optional[float]]] = []
    for group in truth:
        words = group.word.split()
        for number, word in enumerate(words):
            start = group.start if number == 0 else None
            spoken.append((word.lower(), start, group.end if number + 1 == len(words) else None))
    at = heard = 0
    for word, other in align_words([word for word, _, _ in spoken], [mark.word.lower() for mark in marks]):
        if word == other:
            following = marks[heard + 1].start if heard + 1 < len(marks) else None
            yield Sighting(marks[heard], following, *spoken[at][1:])
        at += at < len(spoken) and spoken[at][0] == word
        heard += heard < len(marks) and marks[heard].word.lower() == other


def fit_timing(sightings: Sequence[Sighting]) -> WordTiming:
    """Return the constants with the least mean absolute error of starts, and then of ends.

    Raises:
        ValueError: there are too few words to tell.
    """
    check(len(sightings) >= 20, "cuts", "have 20 words at least that are recognized right", len(sightings))
    leads = [s.mark.start - s.start for s in sightings if s.start is not None]
    check(len(leads) > 0, "cuts", "tell the start of a word that is recognized right", 0)
    lead = float(np.median(leads))
    known = [s for s in sightings if s.end is not None]
    check(len(known) > 0, "cuts", "tell the end of a word that is recognized right", 0)
    first, last = (np.array([getattr(s.mark, name) for s in known]) for name in ("start", "end"))
    limit = np.array([np.inf if s.following is None else s.following - lead for s in known])
    letters, true = np.array([len(s.mark.word) for s in known]), np.array([s.end for s in known])

    def error(constants: tuple[float, float, float]) -> float:
        tail, least, letter = constants
        ends = np.minimum(limit, np.maximum(last + tail, first + least + letter * letters))
        return float(np.abs(ends - true).mean())

    best = min(itertools.product(TAILS, LEASTS, LETTERS), key=error)
    return WordTiming(round(lead, 3), *(round(float(value), 3) for value in best))


def timing_errors(sightings: Sequence[Sighting], timing: WordTiming) -> Mapping[str, np.ndarray]:
    """Return the errors of ``start`` and ``end`` in seconds, positive where a word is told too late."""
    errors: dict[str, list[float]] = {"start": [], "end": []}
    for s in sightings:
        after = [] if s.following is None else [WordTime("", s.following, s.following)]
        word = timing.apply([s.mark, *after])[0]
        for name, found, true in (("start", word.start, s.start), ("end", word.end, s.end)):
            if true is not None:
                errors[name].append(found - true)
    return {name: np.array(values) for name, values in errors.items()}


def describe_errors(sightings: Sequence[Sighting], timing: WordTiming) -> str:
    """Return mean absolute errors and medians in a line of text."""
    parts = []
    for name, errors in timing_errors(sightings, timing).items():
        size, median = np.abs(errors).mean() * 1000, np.median(errors) * 1000
        parts.append(f"{name}s off by {size:.0f} ms (median {median:+.0f} ms, {len(errors)} words)")
    return ", ".join(parts)
