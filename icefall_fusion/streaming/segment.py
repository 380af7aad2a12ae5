"""One segment of a stream: its search, what is committed, what is forgotten.
Knows: the search of a stream, fusions, words. Must not know: audio, encoders, other streams.

The rule of commitment: a word is committed when all live hypotheses share it and have begun the next word, so
that no later frame can change it. With ``commit_after`` a word that ended longer ago is committed as the best
hypothesis has it, and hypotheses that contradict it are dropped ("best after delay").
"""
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Iterator, NamedTuple, Optional, Sequence

import numpy as np

from icefall_fusion.fusion.shallow_stream import ShallowStream
from icefall_fusion.fusion.streaming import DelayedStream
from icefall_fusion.nbest import TOTAL, WORDS, Hypothesis, NBest, WordTime
from icefall_fusion.search.export import word_times
from icefall_fusion.search.streaming import Live, StreamingSearch
from icefall_fusion.search.streaming_tensors import TensorStreamingSearch

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.search import Fusion, PrefixSearchOptions
    from icefall_fusion.text.tokens import AcousticTokens

TAIL = 16  # committed pieces that are not forgotten: n-grams look back on them


class Words(NamedTuple):
    """The best hypothesis of a segment at the moment; ``committed`` of the words will not change."""

    words: list[WordTime]
    committed: int


class Segment:
    """One segment.

    Args:
        tokens: the acoustic vocabulary.
        search: options of the search.
        fusions: of this segment alone.
        name: of the stream.
        start: frames of the stream before it.
        window: frames that the search holds before it forgets.
        commit_after: frames, or None.
    """

    def __init__(self, tokens: AcousticTokens, search: PrefixSearchOptions, fusions: Sequence[Fusion],
                 name: str, start: int, window: int, commit_after: Optional[int]) -> None:
        self._tokens, self._shift, self._start = tokens, search.frame_shift, start
        self._window, self._after = window, commit_after
        neural = any(isinstance(fusion, ShallowStream) for fusion in fusions)
        self._search = (TensorStreamingSearch if neural else StreamingSearch)(tokens, search, fusions, name)
        self._delayed = [fusion for fusion in fusions if isinstance(fusion, DelayedStream)]
        self._holding = [fusion for fusion in fusions if isinstance(fusion, (DelayedStream, ShallowStream))]
        self._words: list[WordTime] = []  # committed
        self._pieces: list[int] = []  # forgotten, and their number of words
        self._forgotten = 0
        self._agreed = 0  # committed pieces of the window

    @property
    def frames(self) -> int:
        """Frames of the segment so far."""
        return self._search.dropped + self._search.frames

    def decode(self, log_probs: Tensor) -> Iterator[None]:
        """Search the next frames [n, V], in steps, and commit what can be committed."""
        self._search.feed(log_probs)
        yield from self._search.advance()
        self._commit()

    def finish(self) -> Iterator[None]:
        """Score the last words, in steps; `nbest` is known then."""
        yield from self._search.finish()

    def close(self) -> None:
        """Free what a segment without result holds."""
        for fusion in self._holding:
            fusion.close()

    def words(self) -> Words:
        """Return the best hypothesis at the moment."""
        live = self._search.live(1)
        if not len(live.slots):
            return Words(list(self._words), len(self._words))
        window = self._times(live)
        return Words([*self._words, *window[len(self._words) - self._forgotten :]], len(self._words))

    def nbest(self) -> NBest:
        """Return the N-best list of the segment, after `finish`; times are those of the stream."""
        nbest = self._search.nbest()
        base = {fusion.source: fusion.base for fusion in self._delayed}
        before = self._words[: self._forgotten]
        shift = (self._start + self._search.dropped) * self._shift
        bonus = nbest.weights.get(WORDS, 0.0)
        gain = sum(nbest.weights[source] * value for source, value in base.items()) + bonus * len(before)

        def whole(one: Hypothesis) -> Hypothesis:
            scores = {source: value + base.get(source, 0.0) for source, value in one.scores.items()}
            scores[WORDS] += len(before)
            scores[TOTAL] += gain
            times = [replace(time, start=round(time.start + shift, 6), end=round(time.end + shift, 6))
                     for time in one.times]
            text = " ".join([*(time.word for time in before), *([one.text] if one.text else [])])
            return Hypothesis([*self._pieces, *one.tokens], text, scores, [*before, *times])

        if not (before or shift):
            return nbest
        return NBest(nbest.utterance, [whole(one) for one in nbest], nbest.weights)

    # --- committing --------------------------------------------------------------------------------------

    def _commit(self) -> None:
        live = self._search.live()
        if not len(live.slots):
            return
        count = self._shared(live)
        if self._after is not None:
            count = self._force(live, count)
            live = self._search.live()
        if count <= self._agreed:
            return
        times = self._times(live, count)
        self._words += times[len(self._words) - self._forgotten :]
        self._agreed = count
        if self._search.forgets and self._search.frames > self._window:
            self._forget(live)

    def _shared(self, live: Live) -> int:
        """Return how many pieces are closed words of all hypotheses."""
        same = (live.pieces == live.pieces[0]).all(0)
        shared = len(same) if same.all() else int(same.argmin())
        for count in range(min(shared, live.pieces.shape[1] - 1), self._agreed, -1):
            following = live.pieces[:, count]
            if all(piece >= 0 and self._tokens.starts_word[piece] for piece in following.tolist()):
                return count
        return self._agreed

    def _force(self, live: Live, count: int) -> int:
        """Commit words of the best hypothesis that ended long ago, and drop who contradicts."""
        peaks, best = self._search.peaks(live), live.pieces[0]
        latest = self.frames - self._after
        for wanted in range(int(live.lengths[0]) - 1, count, -1):
            if peaks[wanted - 1] < latest and self._tokens.starts_word[best[wanted]]:
                closed = np.array([piece >= 0 and self._tokens.starts_word[piece]
                                   for piece in live.pieces[:, wanted].tolist()])
                agrees = (live.pieces[:, :wanted] == best[:wanted]).all(1) & closed
                if not agrees.all():
                    self._search.keep(np.sort(live.slots[agrees]))
                return wanted
        return count

    def _forget(self, live: Live) -> None:
        """Cut the search behind the committed words, but for a few."""
        starts = self._tokens.starts_word
        cut = next((n for n in range(self._agreed - TAIL, 0, -1) if starts[live.pieces[0, n]]), 0)
        if not cut:
            return
        pieces = live.pieces[0, :cut].tolist()
        words = self._tokens.words(pieces)
        for fusion in self._delayed:
            fusion.prepare_cut(self._search.beam, int(live.path[0, cut - 1]))
        self._search.forget(live, cut)
        for fusion in self._delayed:
            fusion.cut(self._search.beam, words)
        self._pieces += pieces
        self._forgotten += len(words)
        self._agreed -= cut

    def _times(self, live: Live, count: Optional[int] = None) -> list[WordTime]:
        """Return the words of the best hypothesis that begin in the window, of its first ``count`` pieces."""
        pieces = live.pieces[0, : live.lengths[0]].tolist()[:count]
        spans = self._tokens.word_spans(pieces)
        words = self._tokens.words(pieces, spans)
        peaks = (self._search.peaks(live) + self._start).tolist()
        return word_times(words, spans, peaks, self._shift)
