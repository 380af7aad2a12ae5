"""Hypotheses in pyctcdecode's form: texts that come once, frames of words, scores.
Knows: N-best lists, streams' live hypotheses, pieces. Must not know: logits, language models, whose calls.
"""
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Iterable, NamedTuple, Optional, Sequence

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.compat.language_model import LmState
    from icefall_fusion.nbest import NBest
    from icefall_fusion.search.streaming import StreamingSearch
    from icefall_fusion.text.tokens import AcousticTokens

NULL_FRAMES = (-1, -1)
WordFrames = tuple[str, tuple[int, int]]


class OutputBeam(NamedTuple):
    """A hypothesis: text, LM state after it, frames (start, end) of each word, natural-log scores.

    ``lm_score`` is the total by which beams are ranked, ``logit_score`` the acoustic part of it.
    """

    text: str
    last_lm_state: Optional[LmState]
    text_frames: list[WordFrames]
    logit_score: float
    lm_score: float


class OutputBeamMPSafe(NamedTuple):
    """A hypothesis without LM state, as batches have them."""

    text: str
    text_frames: list[WordFrames]
    logit_score: float
    lm_score: float


class LMBeam(NamedTuple):
    """A hypothesis between two chunks: closed words and their frames, the open word and its, scores.

    ``lm_score`` is the total so far. ``next_word`` is always empty, ``last_char`` the last label but blanks.
    """

    text: str
    next_word: str
    partial_word: str
    last_char: Optional[str]
    text_frames: list[tuple[int, int]]
    partial_frames: tuple[int, int]
    logit_score: float
    lm_score: float


def output_beams(nbest: NBest, prune: float, best_pieces: Optional[np.ndarray],
                 tokens: AcousticTokens) -> list[OutputBeam]:
    """Return hypotheses with each text once: extra spaces and other spellings by pieces are the same text.

    Args:
        nbest: with times in frames where ``best_pieces`` are given.
        prune: nats below the best, where hypotheses are dropped.
        best_pieces: [T] the most probable piece of each frame; None: no frames are wanted.
        tokens: the vocabulary.
    """
    merged: dict[str, OutputBeam] = {}
    for found in nbest:
        ctc, total = found.scores["ctc"], found.scores["total"]
        if found.text not in merged:
            frames = [] if best_pieces is None else _text_frames(found, best_pieces, tokens)
            merged[found.text] = OutputBeam(found.text, None, frames, -math.inf, total - ctc)
        beam = merged[found.text]
        merged[found.text] = beam._replace(logit_score=_log_add(beam.logit_score, ctc))
    return _ranked(merged.values(), prune)


def live_beams(search: StreamingSearch, prune: float, best_pieces: np.ndarray) -> list[LMBeam]:
    """Return the live hypotheses of a stream, each text once; frames count from the first of the stream.

    Args:
        search: that has searched all its frames.
        prune, best_pieces: see `output_beams`.
    """
    live, tokens = search.live(), search.tokens
    peaks, masses = search.all_peaks(live), search.masses(live)
    totals = masses + search.beam.fused[0].double().numpy()[live.slots]
    shared = _shared_words(live.pieces, tokens)
    before = live.pieces[0, :shared].tolist()
    known = _words(before, peaks[0].tolist(), tokens, best_pieces)
    merged: dict[tuple[str, str], LMBeam] = {}
    for row, length in enumerate(live.lengths.tolist()):
        ids, at = live.pieces[row, shared:length].tolist(), peaks[row, shared:length].tolist()
        words = [*known, *_words(ids, at, tokens, best_pieces)]
        last = ids[-1] if ids else before[-1] if before else None
        closed = tokens.delimiter is not None and last is not None and tokens.starts_word[last]
        partial, span = words.pop() if words and not closed else ("", NULL_FRAMES)
        text, mass = " ".join(word for word, _ in words), float(masses[row])
        name = text, partial
        if name not in merged:
            char = None if last is None else tokens.pieces[last]
            frames = [frames for _, frames in words]
            fused = float(totals[row]) - mass
            merged[name] = LMBeam(text, "", partial, char, frames, span, -math.inf, fused)
        merged[name] = merged[name]._replace(logit_score=_log_add(merged[name].logit_score, mass))
    return _ranked(merged.values(), prune)


def without_histories(beams: Iterable[Any], order: int) -> list[Any]:
    """Return of hypotheses that agree in the words that an n-gram looks back on the best one.

    Args:
        beams: best first. order: of the n-gram; of none: 0.
    """
    kept: dict[tuple[Any, ...], Any] = {}
    for beam in beams:
        words = [*beam.text.split(), *getattr(beam, "partial_word", "").split()]
        kept.setdefault(tuple(words[-max(1, order - 1) - 1 :]), beam)
    return list(kept.values())


def frames_as_spoken(spans: Sequence[tuple[int, int]], ends: Sequence[tuple[int, int]],
                     best_pieces: np.ndarray) -> list[tuple[int, int]]:
    """Return the frames of words from those where their outer labels peak, with the repeats around these.

    Args:
        spans: of each word the frame where its first label peaks, and one past that where its last does.
        ends: first and last piece of each word.
        best_pieces: [T] the most probable piece of each frame.
    """
    found, frames = [], len(best_pieces)
    for (start, stop), (first, last) in zip(spans, ends):
        while start > 0 and best_pieces[start - 1] == first == best_pieces[start]:
            start -= 1
        while 0 < stop < frames and best_pieces[stop] == last == best_pieces[stop - 1]:
            stop += 1
        found.append((start, stop))
    return found


def best_pieces_of(log_probs: Tensor) -> np.ndarray:
    """Return the most probable piece of each frame of log-probs [T, V]."""
    return log_probs.argmax(1).numpy() if log_probs.numel() else np.zeros(0, np.int64)


def _text_frames(found: Any, best_pieces: np.ndarray, tokens: AcousticTokens) -> list[WordFrames]:
    ids = found.tokens
    ends = [(ids[start], ids[stop - 1]) for start, stop in tokens.word_spans(ids)]
    spans = [(int(time.start), int(time.end)) for time in found.times]
    frames = frames_as_spoken(spans, ends, best_pieces)
    return [(time.word, span) for time, span in zip(found.times, frames)]


def _words(ids: list[int], peaks: list[int], tokens: AcousticTokens,
           best_pieces: np.ndarray) -> list[WordFrames]:
    """Return the words of pieces with their frames."""
    spans = tokens.word_spans(ids)
    ends = [(ids[start], ids[stop - 1]) for start, stop in spans]
    marks = [(peaks[start], peaks[stop - 1] + 1) for start, stop in spans]
    frames = frames_as_spoken(marks, ends, best_pieces)
    return list(zip(tokens.words(ids, spans), frames))


def _shared_words(pieces: np.ndarray, tokens: AcousticTokens) -> int:
    """Return how many pieces are closed words that all hypotheses share, so that they are read once."""
    same = (pieces == pieces[:1]).all(0) & (pieces[:1] >= 0).all(0)
    shared = len(same) if same.all() else int(same.argmin())
    begins = [at for at in range(shared) if tokens.starts_word[pieces[0, at]]]
    return begins[-1] if begins else 0


def _ranked(found: Iterable[Any], prune: float) -> list[Any]:
    """Return hypotheses best first; their ``lm_score`` is that of the language models alone before."""
    beams = [beam._replace(lm_score=beam.logit_score + beam.lm_score) for beam in found]
    beams.sort(key=lambda beam: -beam.lm_score)
    return [beam for beam in beams if beam.lm_score >= beams[0].lm_score - prune]


def _log_add(one: float, other: float) -> float:
    most, least = max(one, other), min(one, other)
    return most + math.log1p(math.exp(least - most)) if least > -math.inf else most
