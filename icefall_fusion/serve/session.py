"""One socket from its opening to its close: who may speak, what is read, what is written, when it ends.
Knows: Starlette's WebSocket, talks, the engine's methods, limits. Must not know: fields of messages, models.
"""
from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import NamedTuple, Optional, Union

from starlette.responses import PlainTextResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from icefall_fusion.serve.access import Access
from icefall_fusion.serve.engine import INVALID, POLICY, TRY_LATER, Engine, Full
from icefall_fusion.serve.samples import SampleFormat
from icefall_fusion.serve.talk import Forms, Talk

NO_TOKEN = 4401  # close code, like HTTP's 401
_LONGEST_REASON = 120  # bytes of a close reason; the protocol has room for 123
Read = Union[str, bytes]


class Opening(NamedTuple):
    """How a client begins.

    kind: of its audio; forms: of the messages to it; token: that it sent; answers: to it.
    used: whether its first message was about this alone.
    """

    kind: SampleFormat
    forms: Forms
    token: str = ""
    answers: tuple[str, ...] = ()
    used: bool = False


class Protocol:
    """What a protocol says of the messages of a client.

    Attributes:
        sends_token: whether its first message may hold a token.
        forms: of messages before it has begun.
    """

    sends_token = False
    forms: Forms

    def open(self, first: Read) -> Opening:
        """Read the first message; ValueError where it is wrong."""
        raise NotImplementedError

    def read_end(self, text: str) -> None:
        """Read a text message, which says that all was sent; ValueError where it does not."""
        raise NotImplementedError


class _Refused(Exception):
    """A client is not served any longer: the message for it, the close code, a word for programs."""

    def __init__(self, message: str, close: int, word: str = "") -> None:
        super().__init__(message)
        self.close, self.word = close, word


class _Gone(Exception):
    """A client has gone, or must go without a word."""


class Session:
    """Serves one socket.

    Args:
        socket: not accepted yet.
        engine: runs.
        access: who may use it.
        protocol: of this socket alone.
    """

    def __init__(self, socket: WebSocket, engine: Engine, access: Access, protocol: Protocol) -> None:
        self._socket, self._engine, self._access, self._protocol = socket, engine, access, protocol
        self._limits, self._forms = engine.limits, protocol.forms
        self._talk: Optional[Talk] = None
        self._known = False  # has given the token, or needs none
        self._said_all = False

    async def run(self) -> None:
        """Serve it until its end."""
        if not await self._let_in():
            return
        try:
            await self._serve()
        except _Refused as refused:
            await self._refuse(refused)
        except (_Gone, WebSocketDisconnect):
            pass
        finally:
            if self._talk is not None:
                self._engine.leave(self._talk)

    async def _let_in(self) -> bool:
        """Accept the socket of somebody who may use the server, or may send a token."""
        headers, query, access = self._socket.headers, self._socket.query_params, self._access
        if access.needs_token:
            self._known = access.knows(access.token_of(headers, query))
            if not self._known and not self._protocol.sends_token:
                await self._deny("a token is needed: Authorization: Bearer TOKEN, or ?token=TOKEN", 401)
                return False
        else:
            refusal, self._known = access.refusal(headers), True
            if refusal is not None:
                await self._deny(refusal, 403)
                return False
        await self._socket.accept()
        return True

    async def _deny(self, message: str, status: int) -> None:
        logging.warning("a client was refused: %s", message)
        await self._socket.send_denial_response(PlainTextResponse(message + "\n", status))

    async def _serve(self) -> None:
        engine = self._engine
        if engine.full is not None:
            engine.counters.refused += 1
            raise _Refused(engine.full, TRY_LATER, "full")
        first = await self._read(self._limits.silence)
        try:
            opening = self._protocol.open(first)
        except ValueError as error:
            raise _Refused(str(error), INVALID) from error
        self._forms = opening.forms
        if not self._known and not self._access.knows(opening.token):
            raise _Refused("the token is wrong or missing", NO_TOKEN, "token")
        talk = Talk(_name(self._socket), opening.kind, opening.forms, asyncio.get_running_loop())
        try:
            engine.open(talk)
        except Full as full:
            raise _Refused(str(full), TRY_LATER, "full") from full
        self._talk = talk
        for answer in opening.answers:
            await self._send(answer)
        tasks = [asyncio.create_task(self._listen(None if opening.used else first)),
                 asyncio.create_task(self._tell())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- reading -----------------------------------------------------------------------------------------

    async def _listen(self, message: Optional[Read]) -> None:
        """Read until the client goes; audio is given to the engine as fast as there is room."""
        talk, heard = self._talk, time.monotonic()
        while True:
            if message is not None:
                try:
                    audio = self._take(talk, message)
                except ValueError as error:
                    raise _Refused(str(error), INVALID) from error
                await talk.room.wait()
                heard = time.monotonic() if audio else heard
            left = None if talk.ended else heard + self._limits.silence - time.monotonic()
            message = await self._read(left)

    def _take(self, talk: Talk, message: Read) -> bool:
        """Take in a message; return whether it was audio."""
        if isinstance(message, str):
            self._protocol.read_end(message)
            self._said_all = True
            self._engine.end(talk)
            return False
        if self._said_all:
            raise ValueError("audio must not come after the message that all was sent")
        talk.kind.check_whole(message)
        if message and not talk.ended:  # what comes after the server has ended a stream is dropped
            self._engine.feed(talk, message)
        return bool(message)

    async def _read(self, patience: Optional[float]) -> Read:
        """Return the next message of the client."""
        try:
            event = await asyncio.wait_for(self._socket.receive(), patience)
        except asyncio.TimeoutError:
            rule = f"no audio has come for {self._limits.silence:g} s"
            raise _Refused(rule, POLICY, "silence") from None
        if event["type"] == "websocket.disconnect":
            raise _Gone
        text = event.get("text")
        return event["bytes"] if text is None else text

    # --- writing -----------------------------------------------------------------------------------------

    async def _tell(self) -> None:
        """Send messages until one closes the socket."""
        while True:
            message = await self._talk.next_message()
            if message.text is not None:
                await self._send(message.text)
            if message.code is not None:
                return await self._close(message.code, message.reason)

    async def _send(self, text: str) -> None:
        """Send a text, or cut the client off if it does not read."""
        try:
            await asyncio.wait_for(self._socket.send_text(text), self._limits.unread)
        except asyncio.TimeoutError:
            logging.warning("a client has not read for %g s: it is cut off", self._limits.unread)
            self._engine.counters.cut_off += 1
            self._socket.scope["state"]["transport"].abort()
            raise _Gone from None

    async def _close(self, code: int, reason: str) -> None:
        short = reason.encode("utf-8", "replace")[:_LONGEST_REASON].decode("utf-8", "ignore")
        with contextlib.suppress(asyncio.TimeoutError, RuntimeError):  # it has gone already
            await asyncio.wait_for(self._socket.close(code, short), self._limits.unread)

    async def _refuse(self, refused: _Refused) -> None:
        logging.info("a client is refused: %s", refused)
        text = self._forms.error(str(refused), refused.word)
        with contextlib.suppress(_Gone, WebSocketDisconnect, RuntimeError):  # it is closed already
            if text is not None:
                await self._send(text)
            await self._close(refused.close, str(refused))


def _name(socket: WebSocket) -> str:
    client = socket.client
    return f"{client.host}:{client.port}" if client else "unknown"

