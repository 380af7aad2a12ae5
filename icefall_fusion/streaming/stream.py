"""A stream: audio that arrives in packets, and what was recognized of it so far.
Knows: features, the encoder's state, segments. Must not know: other streams, models, threads.
"""
from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, Iterator, Optional, Sequence, Union

import numpy as np

from icefall_fusion.common.checks import check
from icefall_fusion.data.audio import SAMPLE_RATE
from icefall_fusion.data.fbank_stream import StreamingFbank
from icefall_fusion.nbest import NBest, WordTime
from icefall_fusion.streaming.endpoint import Endpoint
from icefall_fusion.streaming.greedy import GreedySegment
from icefall_fusion.streaming.segment import Segment
from icefall_fusion.text.scripts import join_words

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.acoustic.models import StreamingState
    from icefall_fusion.streaming.decoder import StreamingDecoder

_WARNINGS = 20  # that are kept for who asks


@dataclass(frozen=True)
class Partial:
    """What is recognized of a stream's open segment.

    Args:
        segment: its number; those before it are final (see `Stream.take_segments`).
        committed: text that will not change; a later one begins with it.
        unstable: text after it, of the best hypothesis at the moment.
        words: all of these words with their times in seconds of the stream; the first ``stable`` of them are
            committed.
        stable: number of committed words.
        age: seconds of audio that has arrived and is not in the text yet.
    """

    segment: int
    committed: str
    unstable: str
    words: list[WordTime]
    stable: int
    age: float


class Stream:
    """One stream of a `StreamingDecoder`; made by its ``open``.

    Attributes:
        name: in N-best lists and messages.
        error: what broke the stream; None: it is whole.
    """

    def __init__(self, decoder: StreamingDecoder, name: str, state: StreamingState,
                 open_segment: Callable[[Stream, int, Sequence[str]], Union[Segment, GreedySegment]],
                 context: Sequence[str]) -> None:
        self.name, self.state = name, state
        self._decoder, self._open, self._options = decoder, open_segment, decoder.options
        self._audio = StreamingFbank()
        self.error: Optional[Exception] = None
        self._warnings: list[str] = []
        self._frames, self._number = 0, 0  # encoder frames decoded; number of the segment
        self._begin = 0  # frame at which it begins
        self._context = list(context)[-self._options.context_words :]
        self._segment: Union[None, Segment, GreedySegment] = open_segment(self, 0, self._context)
        self._endpoint = Endpoint(self._options.endpoint, decoder.frame_shift)
        self._done: list[NBest] = []
        self._result: Optional[NBest] = None

    # --- for everybody -----------------------------------------------------------------------------------

    @property
    def decoded(self) -> float:
        """Seconds of the stream that are decoded: the text can only change when there are more."""
        return round(self._frames * self._decoder.frame_shift, 6)

    @property
    def start(self) -> float:
        """The second at which the open segment begins."""
        return round(self._begin * self._decoder.frame_shift, 6)

    def accept(self, samples: np.ndarray) -> None:
        """Take in the next samples: one channel at 16 kHz, float [n] in about [-1, 1]; decode nothing yet.

        Raises:
            ValueError: not such samples, or the stream has ended.
            Exception: why the stream broke.
        """
        self.check_open()
        self._audio.accept(samples)

    def partial(self) -> Partial:
        """Decode what has arrived (of all streams) and return the text so far.

        Raises:
            ValueError: the stream has ended.
            Exception: why the stream broke.
        """
        self._decoder.decode()
        self.check_open()
        words, stable = self._segment.words()
        texts = [word.word for word in words]
        age = max(0.0, self._audio.samples / SAMPLE_RATE - self._frames * self._decoder.frame_shift)
        committed, unstable = join_words(texts[:stable]), join_words(texts[stable:])
        return Partial(self._number, committed, unstable, words, stable, age)

    def take_segments(self) -> list[NBest]:
        """Return the N-best lists of the segments that have ended since the last call, and forget them.

        They are kept until then.
        """
        done, self._done = self._done, []
        return done

    def take_warnings(self) -> list[str]:
        """Return what went wrong since the last call without an end of the stream, and forget it."""
        taken, self._warnings = self._warnings, []
        return taken

    def finish(self) -> NBest:
        """Decode all that has arrived, end the stream, and return the N-best list of its last segment."""
        return self._decoder.finish([self])[0]

    def close(self) -> None:
        """End the stream without a result; its memory is freed."""
        self._decoder.close(self)

    # --- for the decoder ---------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raise ValueError if the stream has ended, and what broke it if it is broken."""
        if self.error is not None:
            raise self.error
        check(self._segment is not None, f"stream {self.name!r}", "be open", "closed")

    def lost(self, source: str, error: Exception) -> None:
        """Note that a segment must go on without a language model."""
        text = (f"the language model {source!r} failed ({type(error).__name__}: {error}); "
                f"segment {self._number} is decoded without it from {self.decoded:g} s on")
        logging.warning("stream %s: %s", self.name, text)
        self._warnings = [*self._warnings[-_WARNINGS:], text]

    def fail(self, error: Exception) -> None:
        """Break the stream: who uses it next gets the error."""
        self.error = error
        self.free()

    def end(self) -> None:
        """Note that no samples follow."""
        self._audio.end()

    def next_chunk(self, size: int, ended: bool) -> Optional[Tensor]:
        """Return the features of the next chunk [size, 80], fewer where the stream has ended; None: wait."""
        ready = self._audio.ready
        return self._audio.take(min(size, ready)) if ready >= (1 if ended else size) else None

    def decode(self, log_probs: Tensor) -> Iterator[None]:
        """Decode the next frames [n, V], in steps; segments end and begin where the rules say so."""
        silent = (log_probs.argmax(1) == self._decoder.tokens.blank_id).tolist()
        while len(silent):
            count = self._endpoint.find(silent)
            here = len(silent) if count is None else count
            yield from self._segment.decode(log_probs[:here])
            self._frames += here
            log_probs, silent = log_probs[here:], silent[here:]
            if count is not None:
                yield from self._next_segment()

    def finish_segment(self) -> Iterator[None]:
        """Decode the end of the stream, in steps."""
        yield from self._segment.finish()
        self._result, self._segment = self._list(), None

    def result(self) -> NBest:
        """Return the list of the last segment; raises what broke the stream."""
        if self.error is not None:
            raise self.error
        return self._result

    def free(self) -> None:
        """Free what an open stream holds."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def _list(self) -> NBest:
        join = self._decoder.join
        return self._segment.nbest() if join is None else join([self._segment.nbest()])[0]

    def _next_segment(self) -> Iterator[None]:
        yield from self._segment.finish()
        nbest = self._list()
        self._done.append(nbest)
        words = nbest[0].words() if len(nbest) else []
        self._context = [*self._context, *words][-self._options.context_words :]
        self._number, self._begin = self._number + 1, self._frames
        self._segment = self._open(self, self._frames, self._context)
        self._endpoint = Endpoint(self._options.endpoint, self._decoder.frame_shift)
