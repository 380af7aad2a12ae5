"""Hypotheses and N-best lists, the result of every search and rescoring; sort, reweight, JSON lines.
Knows: tokens, words, times and one raw score per source. Must not know: torch, k2, models, WER.

Every score is a natural logarithm, summed over the utterance and unweighted; ``total`` alone is weighted:
``total = sum_s weights[s] * scores[s]``. The score of the source ``words`` is the number of words, so
that its weight is the word bonus. Each source is kept apart: weights can be retuned without decoding again.
"""
from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Iterable, Iterator, Mapping, Optional, Sequence

from icefall_fusion.common.files import PathLike, atomic_path

TOTAL = "total"
WORDS = "words"


@dataclass(frozen=True)
class WordTime:
    """A word, its ``start`` and ``end`` in seconds, and the probability that it is right, where known.

    A search gives the frames in which the model marks a word; `text.word_times` tells when it sounds.
    """

    word: str
    start: float
    end: float
    confidence: Optional[float] = None


@dataclass
class Hypothesis:
    """One transcript of an utterance.

    Args:
        tokens: acoustic piece ids, no blank.
        text: words joined by one space.
        scores: raw natural-log score per source (``ctc``, ``nlm``, ``llm``, ``attention``), ``words`` = the
            number of words, and ``total``, the weighted sum (always present).
        times: one entry per word, or empty when the search keeps no times.
    """

    tokens: list[int]
    text: str
    scores: dict[str, float]
    times: list[WordTime] = field(default_factory=list)

    def __post_init__(self) -> None:
        if TOTAL not in self.scores:
            raise ValueError(f"Hypothesis.scores must hold {TOTAL!r}, but holds {sorted(self.scores)}")

    @property
    def total(self) -> float:
        """The weighted sum of the scores."""
        return self.scores[TOTAL]

    def words(self) -> list[str]:
        """The words of the text: what stands between single spaces, other white space included."""
        return [word for word in self.text.split(" ") if word]


@dataclass
class NBest:
    """The hypotheses of one utterance, best first.

    Args:
        utterance: the utterance's id.
        hypotheses: sorted by ``total``, descending; a list, or a sequence that makes them when they are read.
        weights: the weights that made ``total``, per source.
    """

    utterance: str
    hypotheses: Sequence[Hypothesis]
    weights: dict[str, float] = field(default_factory=lambda: {"ctc": 1.0})

    def __getitem__(self, rank: int) -> Hypothesis:
        return self.hypotheses[rank]

    def __len__(self) -> int:
        return len(self.hypotheses)

    def __iter__(self) -> Iterator[Hypothesis]:
        return iter(self.hypotheses)

    def sources(self) -> list[str]:
        """The sources that every hypothesis has a score of (``total`` left out), in order of mention."""
        if not self.hypotheses:
            return []
        names = [name for name in self.hypotheses[0].scores if name != TOTAL]
        return [name for name in names if all(name in h.scores for h in self.hypotheses)]

    def with_scores(self, source: str, values: Sequence[float]) -> NBest:
        """Return a copy in which ``source`` has these raw scores; totals stay as they are.

        Args:
            source: e.g. ``llm``.
            values: one natural-log score per hypothesis, in the order of this list.

        Raises:
            ValueError: the number of values is not the number of hypotheses, or ``source`` is ``total``.
        """
        if source == TOTAL:
            raise ValueError(f"source must be a raw source, but is {source!r}")
        if len(values) != len(self.hypotheses):
            raise ValueError(
                f"values must have one score per hypothesis of {self.utterance} ({len(self.hypotheses)}), "
                f"but has {len(values)}"
            )
        hypotheses = [
            Hypothesis(h.tokens, h.text, {**h.scores, source: float(value)}, h.times)
            for h, value in zip(self.hypotheses, values)
        ]
        return NBest(self.utterance, hypotheses, dict(self.weights))

    def reweight(self, weights: Mapping[str, float]) -> NBest:
        """Return a copy whose totals are made by ``weights`` and which is sorted by them (stable for ties).

        Args:
            weights: weight per source; the weight of ``words`` is the bonus per word in nats. A source left
                out counts nothing; a weight of exactly 0 counts nothing even where the score is infinite.

        Raises:
            ValueError: a source with a weight other than 0 is missing in a hypothesis, or is ``total``.
        """
        hypotheses = [
            Hypothesis(h.tokens, h.text, {**h.scores, TOTAL: self._total(h, weights)}, h.times)
            for h in self.hypotheses
        ]
        hypotheses.sort(key=_best_first)
        return NBest(self.utterance, hypotheses, {name: float(value) for name, value in weights.items()})

    def _total(self, hypothesis: Hypothesis, weights: Mapping[str, float]) -> float:
        total = 0.0
        for source, weight in weights.items():
            if source == TOTAL or (weight != 0 and source not in hypothesis.scores):
                scored = [name for name in hypothesis.scores if name != TOTAL]
                raise ValueError(
                    f"weights must name scored sources, but {source!r} has no score in a hypothesis of "
                    f"utterance {self.utterance} (it has {scored})"
                )
            if weight != 0:
                total += float(weight) * hypothesis.scores[source]
        return total

    def as_plain(self) -> dict[str, Any]:
        """Return the list as plain values for JSON."""
        hypotheses = [_hypothesis_to_dict(h) for h in self.hypotheses]
        return {"utterance": self.utterance, "weights": self.weights, "hypotheses": hypotheses}

    @classmethod
    def from_plain(cls, value: Any) -> NBest:
        """Read the values of `as_plain`; floats are exact.

        Raises:
            ValueError: a field is missing.
        """
        try:
            hypotheses = [_hypothesis_from_dict(h) for h in value["hypotheses"]]
            return cls(value["utterance"], hypotheses, dict(value["weights"]))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"must be an N-best list, but is {str(value)[:80]!r} ({error!r})") from error


def _best_first(hypothesis: Hypothesis) -> float:
    total = hypothesis.total
    return math.inf if math.isnan(total) else -total


def _hypothesis_to_dict(hypothesis: Hypothesis) -> dict[str, Any]:
    return {
        "text": hypothesis.text,
        "tokens": list(hypothesis.tokens),
        "scores": hypothesis.scores,
        "times": [_time_to_list(time) for time in hypothesis.times],
    }


def _time_to_list(time: WordTime) -> list[Any]:
    known = [] if time.confidence is None else [time.confidence]
    return [time.word, time.start, time.end, *known]


def _hypothesis_from_dict(value: Mapping[str, Any]) -> Hypothesis:
    times = [WordTime(*time) for time in value.get("times", [])]
    return Hypothesis(list(value["tokens"]), value["text"], dict(value["scores"]), times)


# --- files ----------------------------------------------------------------------------------------------


def to_json(value: Mapping[str, Any]) -> str:
    """Return plain values as one line of JSON (-inf is written as ``-Infinity``, which Python reads back)."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def write_nbests(path: PathLike, nbests: Iterable[NBest]) -> None:
    """Write N-best lists as JSON lines, one a line, whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for nbest in nbests:
            file.write(to_json(nbest.as_plain()) + "\n")


def read_nbests(path: PathLike) -> list[NBest]:
    """Read a file of JSON lines: of one list each, or of batches as a decode writes them (``lists``).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not an N-best list; the message names file and line.
    """
    nbests: list[NBest] = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line) if line.strip() else {"lists": []}
                if not (isinstance(value, dict) and "options" in value):  # the first line of a decode's file
                    is_batch = isinstance(value, dict) and "lists" in value
                    nbests += map(NBest.from_plain, value["lists"] if is_batch else [value])
            except ValueError as error:
                raise ValueError(f"{path} line {number}: {error}") from error
    return nbests
