"""The decoding thread: a round takes what has arrived of all streams, decodes it at once, and replies.
Knows: streams, their decoder, talks, locks. Must not know: sockets, how messages are written.
"""
from __future__ import annotations

import logging
import math
import threading
import time
from typing import Mapping, NamedTuple, Optional, Sequence

from icefall_fusion.acoustic.models.subsampling import FACTOR
from icefall_fusion.data.features import HOP
from icefall_fusion.decode.words import WordModel
from icefall_fusion.nbest import WORDS, NBest
from icefall_fusion.serve.changes import WordNote, word_notes
from icefall_fusion.serve.limits import Limits
from icefall_fusion.serve.metrics import Counters
from icefall_fusion.serve.talk import Clock, Message, Talk
from icefall_fusion.streaming import Stream, StreamingDecoder

#: Close codes of WebSocket (RFC 6455, section 7.4.1, and its registry).
DONE, GOING_AWAY, INVALID, POLICY, TOO_BIG, BROKEN, TRY_LATER = 1000, 1001, 1007, 1008, 1009, 1011, 1013


class Full(Exception):
    """There is no room for another stream; the message says why."""


class Ended(NamedTuple):
    """A segment that has ended: its list, notes for the words of the best one, whether it is the last."""

    nbest: NBest
    notes: list[WordNote]
    last: bool


class _Work(NamedTuple):
    """What has come from one client since the last round."""

    talk: Talk
    messages: list[bytes]
    last: bool  # nothing follows them


class Engine(threading.Thread):
    """Serves streams by one decoder, in one thread of its own.

    A round takes at most a chunk of audio from each stream, so that nobody who sends faster makes others
    wait. The methods are called by the event loop; they compute nothing.

    Args:
        decoder: used by nobody else.
        limits: of a client.
        words: tells when words sound; none: the frames in which the model marks them are told.

    Attributes:
        counters: of all streams so far.
    """

    def __init__(self, decoder: StreamingDecoder, limits: Limits, words: Optional[WordModel] = None) -> None:
        super().__init__(name="decoding", daemon=True)
        self._words = words
        self.decoder, self.limits, self.counters = decoder, limits, Counters()
        self._step = decoder.options.chunk.size * FACTOR * HOP
        self._lock = threading.Condition()
        self._talks: set[Talk] = set()
        self._touched: dict[Talk, None] = {}  # in their order
        self._stopping = self._closed = False

    # --- the event loop ----------------------------------------------------------------------------------

    @property
    def streams(self) -> int:
        """Streams that are open."""
        return len(self._talks)

    @property
    def full(self) -> Optional[str]:
        """Why no stream can begin; None: one can."""
        most = self.decoder.options.streams
        if self._closed:
            return "the server is about to stop"
        busy = f"all {most} streams of the server are in use: try again later"
        return None if self.streams < most else busy

    def open(self, talk: Talk) -> None:
        """Begin to serve a client.

        Raises:
            Full: there are as many streams as there may be, or the server is about to stop.
        """
        with self._lock:
            if self.full is not None:
                self.counters.refused += 1
                raise Full(self.full)
            self._talks.add(talk)
            self.counters.opened += 1

    def feed(self, talk: Talk, data: bytes) -> None:
        """Take in a message of audio; ``talk.room`` is cleared where no more should be read."""
        with self._lock:
            talk.inbox.append(data)
            talk.waiting += len(data)
            talk.bytes += len(data)
            if talk.kind.seconds(talk.waiting) > self.limits.ahead:
                talk.room.clear()
            self._touch(talk)

    def end(self, talk: Talk) -> None:
        """Note that a client has said all."""
        with self._lock:
            talk.ended = True
            self._touch(talk)

    def leave(self, talk: Talk) -> None:
        """Note that a client has gone; its memory is freed in the next round."""
        with self._lock:
            talk.left = True
            self._touch(talk)

    def close(self) -> list[Talk]:
        """Let no more streams begin, and return those that are open."""
        with self._lock:
            self._closed = True
            return list(self._talks)

    @property
    def closed(self) -> bool:
        """Whether no more streams begin."""
        return self._closed

    def stop(self) -> None:
        """End the thread after its round."""
        with self._lock:
            self._stopping = True
            self._lock.notify()

    def _touch(self, talk: Talk) -> None:
        if talk in self._talks:
            self._touched[talk] = None
            self._lock.notify()

    # --- the thread --------------------------------------------------------------------------------------

    def run(self) -> None:
        """Decode until `stop`."""
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._stopping or self._touched)
                if self._stopping:
                    break
                works = [self._take(talk) for talk in self._touched]
                self._touched = {work.talk: None for work in works if work.talk.inbox}
            begun = time.perf_counter()
            self._round(works)
            self.counters.count_round(time.perf_counter() - begun)

    def _take(self, talk: Talk) -> _Work:
        """Take a chunk of audio out of an inbox; the lock is held."""
        messages, room = [], self._step - talk.held
        while talk.inbox and room > 0:
            data = talk.inbox.popleft()
            messages.append(data)
            talk.waiting -= len(data)
            room -= round(talk.kind.seconds(len(data)) * 16_000)
        if talk.kind.seconds(talk.waiting) <= self.limits.ahead / 2:
            talk.tell(talk.room.set)
        return _Work(talk, messages, talk.ended and not talk.inbox)

    def _round(self, works: Sequence[_Work]) -> None:
        try:
            for work in works:
                if work.talk.left:
                    self._forget(work.talk)
            ending = [work.talk for work in works if not work.talk.left and self._accept(work)]
            self.decoder.decode()
            ending = [talk for talk in ending if talk.stream.error is None]
            self._finish([talk.stream for talk in ending])
            for talk in self._open_talks():
                if talk.stream is not None:
                    self._tell(talk, talk in ending)
        except Exception as error:  # nobody knows what the streams' states are
            logging.exception("a round of decoding failed; its streams end")
            for talk in self._open_talks():
                self._fail(talk, _told(error), BROKEN)

    def _open_talks(self) -> list[Talk]:
        with self._lock:  # the event loop adds some meanwhile
            return list(self._talks)

    def _finish(self, streams: Sequence[Stream]) -> None:
        try:
            self.decoder.finish(streams)
        except Exception as error:
            if all(stream.error is not error for stream in streams):
                raise

    def _accept(self, work: _Work) -> bool:
        """Give a stream its audio; return whether that was all of it."""
        talk = work.talk
        try:
            if talk.stream is None:
                talk.stream = self.decoder.open(talk.name)
            samples = talk.read(work.messages, self._step, work.last)
            self.counters.audio_seconds += len(samples) / 16_000
            talk.stream.accept(samples)
        except ValueError as error:
            self._fail(talk, str(error), INVALID)
            return False
        except Exception as error:
            logging.exception("a stream cannot be opened")
            self._fail(talk, _told(error), BROKEN)
            return False
        if talk.held:
            with self._lock:
                self._touch(talk)
            return False
        return work.last

    def _tell(self, talk: Talk, ends: bool) -> None:
        """Tell a client what is new."""
        stream = talk.stream
        for warning in stream.take_warnings():
            self.counters.warnings += 1
            talk.post(Message(talk.forms.warning(warning)))
        clock = Clock(talk.received, stream.decoded, talk.start)
        self._tell_segments(talk, stream.take_segments(), clock)
        if stream.error is not None:
            self._fail(talk, _told(stream.error), BROKEN)
        elif ends:
            self._tell_segments(talk, [stream.result()], clock, True)
            talk.post(Message(talk.forms.final(), code=DONE, reason="all is decoded"))
            self.counters.finished += 1
            self._forget(talk)
        elif stream.decoded != talk.shown:
            self._tell_partial(talk)

    def _tell_partial(self, talk: Talk) -> None:
        stream = talk.stream
        talk.shown, talk.start = stream.decoded, stream.start
        partial = stream.partial()
        clock = Clock(talk.received, stream.decoded, stream.start)
        words = partial.words if self._words is None else self._words.timing.apply(partial.words)
        talk.post(Message(talk.forms.partial(talk.segments, words, partial.stable, clock), True))

    def _tell_segments(self, talk: Talk, nbests: Sequence[NBest], clock: Clock, end: bool = False) -> None:
        for number, nbest in enumerate(nbests, 1):
            if self._words is not None:
                nbest = self._words.apply(nbest, math.inf)
            notes = word_notes(nbest, self.without_llm(nbest.weights)) if len(nbest) else []
            ended = Ended(nbest, notes, end and number == len(nbests))
            talk.post(Message(talk.forms.segment(talk.segments, ended, clock)))
            talk.segments += 1

    def without_llm(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Return the weights of a list as they are without neural language models; n-grams stay."""
        joined = [one for one in self.decoder.neural if weights.get(one.source)]  # else it has failed
        bonus = sum(fusion.word_bonus for fusion in joined)
        none = {fusion.source: 0.0 for fusion in joined}
        return {**weights, **none, WORDS: weights.get(WORDS, 0.0) - bonus}

    def _fail(self, talk: Talk, message: str, code: int) -> None:
        """End a stream by an error."""
        self.counters.failed += 1
        talk.post(Message(talk.forms.error(message, ""), code=code, reason=message))
        self._forget(talk)

    def _forget(self, talk: Talk) -> None:
        """Free what a stream holds."""
        if talk.stream is not None and talk.stream in self.decoder.streams:
            talk.stream.close()
        with self._lock:
            self._talks.discard(talk)
            self._touched.pop(talk, None)
            talk.inbox.clear()
            talk.waiting = 0
        talk.stream = None
        talk.tell(talk.room.set)


def _told(error: Exception) -> str:
    return f"decoding failed: {type(error).__name__}: {error}"
