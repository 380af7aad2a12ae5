"""Decoding in chunks as pyctcdecode has it: the caller keeps the hypotheses and hands them in again.
Knows: the search of a stream, hypotheses in pyctcdecode's form. Must not know: labels' styles, files.

The hypotheses of a call know the search that they come from. Those of the last call go on with it. Those of
an earlier call are searched again from the log-probs that were heard up to there, so that a caller may try
several ways to go on. The result is that of one search over all frames, however they are cut.
"""
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional, Sequence

import numpy as np
import torch

from icefall_fusion.common.checks import check, is_count, is_number
from icefall_fusion.compat.beams import LMBeam, best_pieces_of, live_beams, output_beams, without_histories
from icefall_fusion.compat.language_model import HotwordScorer
from icefall_fusion.compat.logits import check_logits, drop_improbable, log_probs_of
from icefall_fusion.search import PrefixSearchOptions
from icefall_fusion.search.streaming import StreamingSearch

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.compat.language_model import LmState
    from icefall_fusion.search import Fusion
    from icefall_fusion.text.tokens import AcousticTokens


DEFAULT_BEAM_WIDTH, DEFAULT_PRUNE_LOGP, DEFAULT_MIN_TOKEN_LOGP, DEFAULT_PRUNE_BEAMS = 100, -10.0, -5.0, False


class Plan(NamedTuple):
    """How an utterance is decoded: the same in all its chunks.

    name: the arguments in a form that can be compared; make: fusions for a new search.
    """

    name: tuple[Any, ...]
    tokens: AcousticTokens
    options: PrefixSearchOptions
    make: Callable[[], Sequence[Fusion]]
    prune: float


class Beams(list):
    """Hypotheses after some chunks of an utterance (`LMBeam`), and where they come from."""

    def __init__(self, beams: Sequence[LMBeam], chunks: Optional[Chunks] = None, calls: int = 0,
                 ended: bool = False) -> None:
        super().__init__(beams)
        self.chunks, self.calls, self.ended = chunks, calls, ended


class Chunks:
    """The search of one utterance, chunk by chunk."""

    def __init__(self, plan: Plan, first: int) -> None:
        self.plan, self._first = plan, first
        self._search = StreamingSearch(plan.tokens, plan.options, plan.make(), "chunks")
        self._heard: list[tuple[Tensor, bool]] = []  # log-probs of each call, and whether a space follows
        self._best: list[np.ndarray] = []  # most probable pieces of its frames
        self._spaces: list[int] = []  # frames that we put in
        self.calls = 0

    @property
    def frames(self) -> int:
        """The frames of the caller so far, from where he began to count."""
        return self._first + self._search.frames - len(self._spaces)

    def after(self, calls: int) -> Chunks:
        """Return the search as it was after its first calls: this one, or another that hears them again."""
        if calls == self.calls:
            return self
        again = Chunks(self.plan, self._first)
        for log_probs, space in self._heard[:calls]:
            again.hear(log_probs, space)
        return again

    def hear(self, log_probs: Tensor, space: bool) -> None:
        """Search the next frames [n, V], and with ``space`` let all open words end there."""
        self._heard.append((log_probs, space))
        self.calls += 1
        best = [best_pieces_of(log_probs)]
        if space:
            delimiter = self.plan.tokens.pieces.index(self.plan.tokens.delimiter)
            sure = torch.full((1, self.plan.tokens.size), -torch.inf)
            sure[0, delimiter] = 0.0
            self._spaces.append(self._search.frames + len(log_probs))
            log_probs, best = torch.cat([log_probs, sure]), [*best, np.array([delimiter])]
        self._best += best
        if len(log_probs):
            self._search.feed(log_probs)
            for _ in self._search.advance():
                pass

    def beams(self) -> list[LMBeam]:
        """Return the hypotheses as they are now."""
        return [self._moved(beam) for beam in live_beams(self._search, self.plan.prune, self._best_pieces())]

    def end(self) -> list[LMBeam]:
        """Score the last words and return the hypotheses; nothing can be heard after that."""
        for _ in self._search.finish():
            pass
        self.calls = -1
        found = output_beams(self._search.nbest(), self.plan.prune, self._best_pieces(), self.plan.tokens)
        frames = [[span for _, span in beam.text_frames] for beam in found]
        return [self._moved(LMBeam(beam.text, "", "", None, spans, (-1, -1), beam.logit_score, beam.lm_score))
                for beam, spans in zip(found, frames)]

    def _best_pieces(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *self._best])

    def _moved(self, beam: LMBeam) -> LMBeam:
        """Return a hypothesis with the caller's numbers of frames."""
        if not (self._spaces or self._first):
            return beam

        def moved(span: tuple[int, int]) -> tuple[int, int]:
            start, stop = (frame - int(np.searchsorted(self._spaces, frame)) + self._first for frame in span)
            return start, stop

        partial = moved(beam.partial_frames) if beam.partial_word else beam.partial_frames
        return beam._replace(text_frames=[moved(span) for span in beam.text_frames], partial_frames=partial)


def decode_chunk(log_probs: Tensor, before: Any, first: int, plan: Plan, space: bool, end: bool) -> Beams:
    """Search one more chunk.

    Args:
        log_probs: [n, V].
        before: `Beams` of the call before.
        first: frames of the caller before the chunk.
        plan: of the utterance.
        space: whether the words that are open after the chunk end there.
        end: whether the utterance ends there.

    Raises:
        ValueError: ``before`` is something else or of an utterance that has ended, or the plan or the number
            of frames is not that of the calls before.
    """
    check(isinstance(before, Beams), "beams", "be those of the call before", type(before).__name__)
    check(not before.ended, "beams", "be of an utterance that goes on (is_end was True)", "ended")
    tokens = plan.tokens
    check(not space or tokens.delimiter is not None, "force_next_word",
          "be False for labels without a space", True)
    chunks = Chunks(plan, first) if before.chunks is None else before.chunks.after(before.calls)
    check(plan.name == chunks.plan.name, "arguments of partial_decode_beams",
          "be the same for all chunks of an utterance", plan.name)
    check(first == chunks.frames, "processed_frames", f"be {chunks.frames} here", first)
    chunks.hear(log_probs, space)
    calls = chunks.calls
    return Beams(chunks.end() if end else chunks.beams(), chunks, calls, end)


def search_options(beam: int, prune: float, frames: bool) -> PrefixSearchOptions:
    """Return the options of a search; with ``frames`` its word times are frames."""
    check(is_count(beam), "beam_width", "be an integer, at least 1", beam)
    good = prune == -math.inf or is_number(prune) and prune < 0
    check(good, "beam_prune_logp", "be below 0", prune)
    return PrefixSearchOptions(beam=int(beam), score_beam=-prune, frame_shift=1.0, word_times=frames)


class ChunkedDecoding:
    """The calls of a decoder for chunks; `BeamSearchDecoderCTC` has the labels and the models."""

    _tokens: AcousticTokens
    _order: int

    def _fusions(self, hot: HotwordScorer, state: Optional[LmState] = None) -> list[Fusion]:
        """Return what joins a new search: language models after ``state``, hot words."""
        raise NotImplementedError

    def get_starting_state(self) -> tuple[Beams, dict[Any, Any], dict[Any, Any]]:
        """Return the hypotheses before the first chunk, and two dictionaries that pyctcdecode needs."""
        return Beams([LMBeam("", "", "", None, [], (-1, -1), 0.0, 0.0)]), {}, {}

    def partial_decode_beams(self, logits: Any, cached_lm_scores: Any, cached_p_lm_scores: Any,
                             beams: Beams, processed_frames: int, beam_width: int = DEFAULT_BEAM_WIDTH,
                             beam_prune_logp: float = DEFAULT_PRUNE_LOGP,
                             token_min_logp: float = DEFAULT_MIN_TOKEN_LOGP,
                             prune_history: bool = DEFAULT_PRUNE_BEAMS,
                             hotword_scorer: Optional[HotwordScorer] = None, force_next_word: bool = False,
                             is_end: bool = False) -> Beams:
        """Decode one more chunk of an utterance; all chunks together give what `decode_beams` gives.

        Args:
            logits: [n, V] of the chunk, n may be 0.
            cached_lm_scores, cached_p_lm_scores: have no effect: the search keeps its scores itself.
            beams: of `get_starting_state` or of an earlier call; of an older one the audio is searched again.
            processed_frames: frames before the chunk; frames of words are counted from there.
            beam_width, beam_prune_logp, hotword_scorer: the same in all chunks of an utterance.
            token_min_logp, prune_history: see `decode_beams`.
            force_next_word: the words that are open after the chunk end there.
            is_end: the utterance ends there; last words and the end of the sentence are scored.

        Raises:
            ValueError: see `decode_beams`; beams of something else; arguments or frames that do not go on.
        """
        hot = HotwordScorer.build_scorer() if hotword_scorer is None else hotword_scorer
        good = isinstance(hot, HotwordScorer)
        check(good, "hotword_scorer", "be None or a HotwordScorer", type(hot).__name__)
        rows = drop_improbable(log_probs_of(check_logits(logits, self._tokens.size)), token_min_logp)
        good = is_count(processed_frames, 0)
        check(good, "processed_frames", "be an integer, at least 0", processed_frames)
        options = search_options(beam_width, beam_prune_logp, True)
        plan = Plan((options, hot), self._tokens, options, lambda: self._fusions(hot), -beam_prune_logp)
        found = decode_chunk(rows, beams, int(processed_frames), plan, bool(force_next_word), bool(is_end))
        if prune_history:
            found[:] = without_histories(found, self._order)
        return found
