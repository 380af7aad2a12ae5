"""One client's stream between the event loop and the decoding thread: audio in, messages out.
Knows: bytes of audio, texts of messages. Must not know: sockets, decoders, what messages mean.
"""
from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import numpy as np

from icefall_fusion.serve.samples import SampleFormat, SampleReader

if TYPE_CHECKING:
    from icefall_fusion.nbest import WordTime
    from icefall_fusion.serve.engine import Ended
    from icefall_fusion.streaming import Stream


class Message(NamedTuple):
    """A text for the client; of several partial ones in a row only the last is worth sending.

    ``code``: the socket is closed with it after the text, for a ``reason``; None: it stays open.
    """

    text: Optional[str]
    partial: bool = False
    code: Optional[int] = None
    reason: str = ""


class Forms:
    """How a protocol writes what happens to a stream; None: it has no message for it."""

    def partial(self, segment: int, words: list[WordTime], stable: int, clock: Clock) -> Optional[str]:
        """The open segment: its words so far, the first ``stable`` of them committed."""
        raise NotImplementedError

    def segment(self, number: int, ended: Ended, clock: Clock) -> Optional[str]:
        """A segment that has ended."""
        raise NotImplementedError

    def final(self) -> Optional[str]:
        """All segments have been sent."""
        raise NotImplementedError

    def warning(self, message: str) -> Optional[str]:
        """Something that the client should know, and after which its stream goes on."""
        return None

    def error(self, message: str, code: str) -> Optional[str]:
        """Why the stream ends; ``code``: a word for programs, may be empty."""
        return None


class Clock(NamedTuple):
    """Seconds of a stream: received, decoded, and where its open segment began."""

    received: float
    decoded: float
    start: float


class Talk:
    """One client's stream.

    Args:
        name: in logs.
        kind: of its audio.
        forms: of its protocol.
        loop: of its socket.

    The decoding thread owns ``stream`` and what `read` changes. The engine's lock guards the inbox. What is
    to be sent belongs to the event loop.
    """

    def __init__(self, name: str, kind: SampleFormat, forms: Forms, loop: asyncio.AbstractEventLoop) -> None:
        self.name, self.kind, self.forms = name, kind, forms
        self.inbox: deque[bytes] = deque()
        self.waiting = 0  # bytes in the inbox
        self.ended = self.left = False  # the client has said all; it has gone
        self.bytes = 0  # received in all
        self.stream: Optional[Stream] = None
        self.segments = 0
        self.shown = 0.0  # seconds that were decoded when the last partial text was written
        self.start = 0.0  # where the segment that was open then began
        self._reader, self._rest, self._flushed = SampleReader(kind), np.zeros(0, np.float32), False
        self._loop, self._out, self._more = loop, deque[Message](), asyncio.Event()
        self.room = asyncio.Event()
        self.room.set()

    # --- the decoding thread -----------------------------------------------------------------------------

    def read(self, messages: list[bytes], most: int, ended: bool) -> np.ndarray:
        """Return at most so many of the samples at 16 kHz that are there, messages new to it included.

        Args:
            messages: taken out of the inbox; most: samples; ended: nothing follows them.

        Raises:
            ValueError: a message holds no samples.
        """
        parts = [self._rest, *(self._reader.read(data) for data in messages)]
        if ended and not self._flushed:
            parts.append(self._reader.end())
            self._flushed = True
        samples = np.concatenate(parts)
        self._rest = samples[most:]
        return samples[:most]

    @property
    def held(self) -> int:
        """Samples that `read` has made and not returned."""
        return len(self._rest)

    def post(self, *messages: Message) -> None:
        """Let the event loop send messages."""
        self.tell(self._put, messages)

    def tell(self, function: Any, *arguments: Any) -> None:
        """Let the event loop call a function, if it still runs."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(function, *arguments)

    # --- the event loop ----------------------------------------------------------------------------------

    async def next_message(self) -> Message:
        """Wait for the next message that is to be sent."""
        while not self._out:
            self._more.clear()
            await self._more.wait()
        return self._out.popleft()

    def _put(self, messages: tuple[Message, ...]) -> None:
        for message in messages:
            if message.partial and self._out and self._out[-1].partial:
                self._out.pop()  # a client that reads slowly gets the newest text
            self._out.append(message)
        self._more.set()

    @property
    def received(self) -> float:
        """Seconds of audio received."""
        return self.kind.seconds(self.bytes)
