"""Job ``serve``: live transcription by WebSocket, and the page that uses it.
Knows: recognizers, uvicorn, signals. Must not know: how streams are decoded, what messages say.
"""
from __future__ import annotations

import asyncio
import logging
import socket
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import uvicorn
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from icefall_fusion.common.checks import check, is_count
from icefall_fusion.common.command_line import DONE
from icefall_fusion.data.audio import SAMPLE_RATE
from icefall_fusion.decode.method_names import parse_methods
from icefall_fusion.decode.options import RecognizerOptions, check_no_language, check_nothing_is_normalized
from icefall_fusion.decode.pretrained import with_pretrained
from icefall_fusion.decode.recognizer import Recognizer
from icefall_fusion.decode.transcribe import word_model
from icefall_fusion.decode.transcribe_stream import open_decoder
from icefall_fusion.serve.access import Access
from icefall_fusion.serve.app import make_app
from icefall_fusion.serve.engine import Engine
from icefall_fusion.serve.limits import Limits
from icefall_fusion.serve.talk import Message
from icefall_fusion.streaming import EndpointOptions, StreamingDecoder, StreamOptions

_SENT = 1 << 16  # bytes of messages that the system and we each hold for a client that does not read
_LAST = 30.0  # seconds in which ended streams are decoded
_CONNECTIONS = 1000  # of all kinds


def _live() -> StreamOptions:
    return StreamOptions(streams=20, commit_after=5.0, endpoint=EndpointOptions())


@dataclass(frozen=True, kw_only=True)
class ServeOptions(RecognizerOptions):
    """Transcribe live audio of many clients by WebSocket, with a page for a browser.

    Without ``emissions`` the models shipped with the repository are used. The protocols are in
    icefall_fusion/serve/README.md. SIGTERM ends the streams that run, and then the server.

    Args:
        host: address to listen on; others than this machine's own need a ``token``.
        port: 0: any that is free.
        token: that clients must give, or @FILE with it in the first line; at least 8 characters.
        method: how to decode: one pass of the prefix search, e.g. llm-delayed-shortest, or ctc-greedy.
        words: YAML file of tune-words, which tells when words sound; empty: that of the shipped models, where
            these are used.
        live: of each stream; ``live.streams`` are served at once, others are refused.
        limits: of each client.
    """

    host: str = "127.0.0.1"
    port: int = 6006
    token: str = ""
    method: str = "llm-delayed-shortest"
    words: str = ""
    live: StreamOptions = field(default_factory=_live)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nothing_is_normalized(self)
        check_no_language(self, "in a server")
        check(is_count(self.port, 0) and self.port < 2**16, "ServeOptions.port", "be 0 to 65535", self.port)
        check(len(parse_methods(self.method)) == 1, "ServeOptions.method", "be one method", self.method)
        endpoint = self.live.endpoint
        good = endpoint is not None and endpoint.longest > 0
        rule = "have a longest segment in a server, so that memory has bounds"
        check(good, "live.endpoint", rule, endpoint)


def run(options: ServeOptions) -> int:
    """Run the job ``serve`` until a signal ends it."""
    access = Access(options.host, options.token)
    options = with_pretrained(options)
    listener = listen(options.host, options.port)
    recognizer = Recognizer(options, options.method)
    method = recognizer.methods[0]
    decoder = open_decoder(recognizer, options.live)
    _warm_up(decoder)
    engine = Engine(decoder, options.limits, word_model(options))
    engine.start()
    server = Server(engine, access, method.name)
    server.run([listener])
    engine.stop()
    engine.join()
    return DONE


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address; ValueError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise ValueError(f"port {port} of {host} cannot be used: {error.strerror or error}") from error


def _warm_up(decoder: StreamingDecoder) -> None:
    """Decode a second of noise, so that the first client does not wait for what is made at the first use."""
    stream = decoder.open("warm-up")
    generator = torch.Generator().manual_seed(1)
    stream.accept((0.1 * torch.randn(2 * SAMPLE_RATE, generator=generator)).numpy())
    stream.finish()


class Server(uvicorn.Server):
    """uvicorn with our application; a signal lets streams end before it stops.

    Args:
        engine: runs already.
        access: who may use it.
        method: its name, for clients.
    """

    def __init__(self, engine: Engine, access: Access, method: str) -> None:
        self._engine, self._asked = engine, 0
        self._drain: Optional[asyncio.Task] = None
        super().__init__(uvicorn.Config(
            make_app(engine, access, method), ws=_Protocol, http="h11", loop="asyncio", lifespan="off",
            ws_max_size=engine.limits.message_bytes, ws_per_message_deflate=False, log_level="warning",
            log_config=None, access_log=False, server_header=False, proxy_headers=False,
            limit_concurrency=_CONNECTIONS, timeout_graceful_shutdown=5,
        ))

    async def startup(self, sockets: Optional[list[socket.socket]] = None) -> None:
        """Start, and say where."""
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        logging.info("listening on http://%s:%d", shown, port)
        self._drain = asyncio.create_task(self._end_streams())

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop when the streams have ended; at a second signal at once."""
        self._asked += 1
        self.should_exit |= self._asked > 1

    async def _end_streams(self) -> None:
        """Wait for a signal; then let no stream begin, and end those that run."""
        engine, limits = self._engine, self._engine.limits
        while not self._asked:
            await asyncio.sleep(0.1)
        talks = engine.close()
        logging.info("stopping: %d streams end in at most %g s", len(talks), limits.stop)
        for talk in talks:
            text = talk.forms.warning(f"the server stops: this stream is ended in {limits.stop:g} s")
            talk.post(Message(text))
        await self._wait_for_streams(limits.stop)
        for talk in engine.close():
            engine.end(talk)
        await self._wait_for_streams(_LAST)
        self.should_exit = True

    async def _wait_for_streams(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while self._engine.streams and loop.time() < until:
            await asyncio.sleep(0.05)


class _Protocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket with bounds on what is held for a client that does not read.

    The application finds the transport in the state of its scope: a client that does not read cannot be
    closed in any other way.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=_SENT)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SENT)
        self.app_state = {**self.app_state, "transport": transport}
