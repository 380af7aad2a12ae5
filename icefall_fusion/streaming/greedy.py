"""One segment of a stream by greedy search: the best piece of each frame, no hypotheses, no fusion.
Knows: log-probs, the vocabulary, words. Must not know: audio, encoders, beams, language models.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Iterator

import torch

from icefall_fusion.nbest import TOTAL, WORDS, Hypothesis, NBest, WordTime
from icefall_fusion.search.export import word_times
from icefall_fusion.search.search_input import check_input
from icefall_fusion.streaming.segment import Words

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.text.tokens import AcousticTokens


class GreedySegment:
    """One segment; stands for `Segment`. Its list is that of `ctc_greedy_search` over all its frames.

    A word is committed when the next one begins. The text is all that grows.

    Args:
        tokens: the acoustic vocabulary.
        frame_shift: seconds.
        name: of the stream.
        start: frames of the stream before it.

    Attributes:
        frames: of the segment so far.
    """

    def __init__(self, tokens: AcousticTokens, frame_shift: float, name: str, start: int) -> None:
        self._tokens, self._shift, self._name, self._start = tokens, frame_shift, name, start
        self.frames, self._total, self._before, self._best = 0, 0.0, tokens.blank_id, 0.0
        self._pieces: list[int] = []
        self._words: list[WordTime] = []  # committed
        self._open: list[tuple[int, int]] = []  # pieces of the last word, and the frames of their peaks

    def decode(self, log_probs: Tensor) -> Iterator[None]:
        """Take the best piece of the next frames [n, V].

        Raises:
            ValueError: they are not log-probs (see `ctc_greedy_search`).
        """
        count = torch.tensor([len(log_probs)])
        inputs = check_input(log_probs.unsqueeze(0), count, None, self._tokens, [self._name])
        path = inputs.log_probs[0].argmax(-1).tolist() if len(log_probs) else []
        self._total += float(inputs.best[0].double().sum())
        for frame, (piece, best) in enumerate(zip(path, inputs.best[0].tolist()), self._start + self.frames):
            self._add(piece, best, frame)
        self.frames += len(log_probs)
        yield from ()

    def finish(self) -> Iterator[None]:
        """Do nothing: all is known."""
        yield from ()

    def close(self) -> None:
        """Do nothing: nothing is held."""

    def words(self) -> Words:
        """Return the text at the moment."""
        return Words([*self._words, *self._last_words()], len(self._words))

    def nbest(self) -> NBest:
        """Return the text as a list of one; its score ``ctc`` is that of the best path."""
        times = self.words().words
        scores = {"ctc": self._total, TOTAL: self._total, WORDS: float(len(times))}
        text = " ".join(time.word for time in times)
        return NBest(self._name, [Hypothesis(self._pieces, text, scores, times)], {"ctc": 1.0, WORDS: 0.0})

    def _add(self, piece: int, best: float, frame: int) -> None:
        if piece != self._tokens.blank_id and piece != self._before:
            if self._tokens.starts_word[piece]:
                self._words += self._last_words()
                self._open = []
            self._pieces.append(piece)
            self._open.append((piece, frame))
            self._best = best
        elif piece != self._tokens.blank_id and best > self._best:  # its run is more probable here
            self._open[-1], self._best = (piece, frame), best
        self._before = piece

    def _last_words(self) -> list[WordTime]:
        pieces = [piece for piece, _ in self._open]
        spans = self._tokens.word_spans(pieces)
        peaks = [frame for _, frame in self._open]
        return word_times(self._tokens.words(pieces, spans), spans, peaks, self._shift)
