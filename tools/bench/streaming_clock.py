"""Live audio in real time, by a clock that is real or computed: when which words are shown.
Knows: streams, packets, seconds. Must not know: what is measured of it, methods, files.

The virtual clock does not wait. Packets arrive when a microphone would send them; the time that a machine
computes on them is measured and added, as CPU time of this process, so that other processes on the machine do
not count (on a GPU as wall time: the CPU only waits there). While it computes, packets pile up and are taken
together, as in life. The packets of all streams come at the same ticks: the server looks every 40 ms. The
wall clock waits for every packet.
"""
from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field
from typing import Callable, Iterator, Optional, Sequence

import figures
import numpy as np

from icefall_fusion.data.audio import SAMPLE_RATE
from icefall_fusion.nbest import NBest, WordTime
from icefall_fusion.streaming import Stream, StreamingDecoder

PACKET = 0.04  # seconds of audio that arrive at once


class Clock:
    """Seconds since it was made.

    Args:
        wall: wait for arrivals; else add measured computing to arrivals.
        device: that computes.

    Attributes:
        busy: seconds of computing.
    """

    def __init__(self, wall: bool, device: str = "cpu") -> None:
        self.wall, self.device, self.busy, self._now = wall, device, 0.0, 0.0
        self._read = time.perf_counter if wall or figures.on_gpu(device) else time.process_time
        self._begun = time.perf_counter()

    @property
    def now(self) -> float:
        """The time."""
        return time.perf_counter() - self._begun if self.wall else self._now

    def wait_until(self, moment: float) -> None:
        """Let the time be ``moment`` at least."""
        if self.wall:
            time.sleep(max(0.0, moment - self.now))
        self._now = max(self._now, moment)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Count what is computed inside."""
        begun = self._read()
        yield
        figures.wait(self.device)
        spent = self._read() - begun
        self.busy += spent
        self._now += spent


@dataclass(frozen=True)
class Talk:
    """An utterance: its samples, what is said, and when each word sounds (groups of words as in `sight`)."""

    name: str
    samples: np.ndarray
    text: str
    truth: Sequence[WordTime]

    @property
    def seconds(self) -> float:
        """Its duration."""
        return len(self.samples) / SAMPLE_RATE


@dataclass(frozen=True)
class Sight:
    """What is shown from a moment on, in seconds since the talk began; ``stable`` words are committed."""

    at: float
    words: tuple[WordTime, ...]
    stable: int

    @property
    def text(self) -> list[str]:
        """The words without times."""
        return [word.word for word in self.words]


@dataclass
class Played:
    """A talk as somebody saw it.

    Args:
        talk: what was said.
        sights: whenever something changed; the last one is final.
        heard: moments of all texts, and the seconds of audio that each has heard.
    """

    talk: Talk
    sights: list[Sight] = field(default_factory=list)
    heard: list[tuple[float, float]] = field(default_factory=list)

    def see(self, sight: Sight, heard: float) -> None:
        """Note what is shown, if it is new."""
        self.heard.append((sight.at, heard))
        last = self.sights[-1] if self.sights else None
        if last is None or (last.words, last.stable) != (sight.words, sight.stable):
            self.sights.append(sight)

    def end(self, at: float, words: Sequence[WordTime]) -> None:
        """Note the result."""
        self.heard.append((at, self.talk.seconds))
        self.sights.append(Sight(at, tuple(words), len(words)))


class Speaker:
    """A lane of talks, one after the other; the next begins at the tick when the result of the last is there.

    Args:
        talks: what is said.
        begin: the tick at which the first begins.
    """

    def __init__(self, talks: Sequence[Talk], begin: int = 0) -> None:
        self.talks, self.begin = list(talks), begin * PACKET
        self.stream: Optional[Stream] = None
        self.played: list[Played] = []
        self.frame_shift = 0.0
        self._sent, self._decoded = 0, 0.0
        self._done: list[WordTime] = []  # words of segments that have ended

    @property
    def talk(self) -> Talk:
        """What is being said."""
        return self.talks[len(self.played) - (self.stream is not None)]

    @property
    def over(self) -> bool:
        """Whether all was said and decoded."""
        return self.stream is None and len(self.played) == len(self.talks)

    def arrives(self) -> float:
        """Return when the next packet is there."""
        return self.begin + min((self._sent + 1) * PACKET, self.talk.seconds)

    def send(self, decoder: StreamingDecoder, now: float) -> bool:
        """Hand over all packets that have arrived; return whether these are the last ones."""
        if self.stream is None:
            self.played.append(Played(self.talk))
            self.stream, self._decoded, self._done = decoder.open(), 0.0, []
            self.frame_shift = decoder.frame_shift
        count = int((now - self.begin + 1e-9) / PACKET)
        last = now - self.begin + 1e-9 >= self.talk.seconds
        step = round(PACKET * SAMPLE_RATE)
        stop = None if last else count * step
        self.stream.accept(self.talk.samples[self._sent * step : stop])
        self._sent = count
        return last

    def look(self) -> Optional[tuple[list[WordTime], int, float]]:
        """Return the words so far, how many are committed, seconds decoded; None where nothing was since."""
        if self.stream.decoded == self._decoded:
            return None
        self._decoded = self.stream.decoded
        partial = self.stream.partial()
        self._take_segments()
        heard = self._decoded
        return [*self._done, *partial.words], len(self._done) + partial.stable, heard

    def close(self, nbest: NBest) -> list[WordTime]:
        """Return the words of the whole talk, whose last segment has this list."""
        self._take_segments()
        self.stream, self._sent = None, 0
        return [*self._done, *(nbest[0].times if len(nbest) else [])]

    def _take_segments(self) -> None:
        for nbest in self.stream.take_segments():
            self._done += nbest[0].times if len(nbest) else []


def play(decoder: StreamingDecoder, speakers: Sequence[Speaker], clock: Clock,
         rescore: Optional[Callable[[NBest], NBest]] = None, most_late: float = float("inf"),
         tick: Callable[[Played], None] = lambda played: None) -> bool:
    """Decode what all speakers say, in real time; return whether the machine kept pace.

    Args:
        decoder: of all streams.
        speakers: their talks are played afterwards.
        clock: that goes on.
        rescore: a second pass over the list of each talk.
        most_late: seconds by which the machine may fall behind before all is given up.
        tick: told of each talk that ends.
    """
    while True:
        active = [speaker for speaker in speakers if not speaker.over]
        if not active:
            return True
        clock.wait_until(min(speaker.arrives() for speaker in active))
        late = clock.now - min(speaker.arrives() for speaker in active)
        if late > most_late:
            return False
        _round(decoder, [speaker for speaker in active if speaker.arrives() <= clock.now + 1e-9], clock,
               rescore, tick)


def _round(decoder: StreamingDecoder, speakers: Sequence[Speaker], clock: Clock,
           rescore: Optional[Callable[[NBest], NBest]], tick: Callable[[Played], None]) -> None:
    """Take what has arrived of some speakers, decode it, and note what is shown then."""
    with clock.computing():
        ending = [speaker for speaker in speakers if speaker.send(decoder, clock.now)]
        decoder.decode()
        seen = [(speaker, speaker.look()) for speaker in speakers if speaker not in ending]
        found = decoder.finish([speaker.stream for speaker in ending]) if ending else []
        found = found if rescore is None else [rescore(nbest) for nbest in found]
    for speaker, sight in seen:
        if sight is not None:
            words, stable, heard = sight
            speaker.played[-1].see(Sight(clock.now - speaker.begin, tuple(words), stable), heard)
    for speaker, nbest in zip(ending, found):
        speaker.played[-1].end(clock.now - speaker.begin, speaker.close(nbest))
        tick(speaker.played[-1])
        speaker.begin = math.ceil(clock.now / PACKET) * PACKET
