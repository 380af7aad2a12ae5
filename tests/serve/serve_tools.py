"""Helpers of the tests of the server: a server in this process on a free port, clients over real sockets.
Knows: tiny models, the server, the client library ``websockets``. Must not know: what is tested.
"""
from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "streaming"))
from stream_tools import CHUNK, SEARCH, fusions_of, noise

from icefall_fusion.serve.access import Access
from icefall_fusion.serve.engine import Engine
from icefall_fusion.serve.job import Server, listen
from icefall_fusion.serve.limits import Limits
from icefall_fusion.streaming import EndpointOptions, StreamingDecoder, StreamOptions

LIVE = StreamOptions(chunk=CHUNK, streams=4, commit_after=2.0, endpoint=EndpointOptions(longest=1.0))
AUDIO = noise(1, 41_003)
START = {"type": "start", "sample_rate": 16000, "format": "f32le", "nbest": 3}
END = {"type": "end"}


class Running:
    """A server that runs in a thread of this process."""

    def __init__(self, decoder: StreamingDecoder, limits: Limits, token: str, words=None) -> None:
        self.decoder = decoder
        self.engine = Engine(decoder, limits, words)
        self.engine.start()
        self._socket = listen("127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.server = Server(self.engine, Access("127.0.0.1", token), "llm-delayed-shortest")
        self.thread = threading.Thread(target=self.server.run, args=([self._socket],), daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started)

    @property
    def url(self) -> str:
        return f"ws://{self.address}"

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        request = urllib.request.Request(f"http://{self.address}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def cut_all(self) -> None:
        """Cut all connections, as a network does that fails."""
        loop = self.server.servers[0].get_loop()
        for connection in list(self.server.server_state.connections):
            loop.call_soon_threadsafe(connection.transport.abort)

    def stop(self) -> None:
        self.server.handle_exit(15, None)
        self.thread.join(60)
        self.engine.stop()
        self.engine.join(60)


@contextlib.contextmanager
def running(made, name="shortest", live=LIVE, limits=None, token="", search=SEARCH, words=None):
    """Serve by tiny models."""
    decoder = StreamingDecoder(made[0], fusions_of(made, name), search, live)
    server = Running(decoder, replace(Limits(), stop=0.0) if limits is None else limits, token, words)
    try:
        yield server
    finally:
        server.stop()
    assert not server.thread.is_alive() and not server.engine.is_alive()


def decoded(made, audio=AUDIO, name="shortest"):
    """Return the lists of the segments of a stream that is decoded without a server."""
    stream = StreamingDecoder(made[0], fusions_of(made, name), SEARCH, LIVE).open()
    stream.accept(audio)
    last = stream.finish()
    return [*stream.take_segments(), last]


def wait_for(condition, seconds: float = 60.0) -> None:
    """Wait until a condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it has not come about"
        time.sleep(0.01)


def packets(audio: np.ndarray, size: int = 3200) -> list[bytes]:
    return [audio[start : start + size].astype("<f4").tobytes() for start in range(0, len(audio), size)]


async def read_all(socket) -> tuple[list, int, str]:
    """Return all messages of a server, and the code and reason of its close."""
    found = []
    with contextlib.suppress(ConnectionClosed):
        while True:
            message = await socket.recv()
            with contextlib.suppress(ValueError):
                message = json.loads(message)
            found.append(message)
    return found, socket.close_code, socket.close_reason


async def talk(url: str, messages, pace: float = 0.0, **options) -> tuple[list, int, str]:
    """Send messages and return what comes (see `read_all`)."""
    async with connect(url, **options) as socket:
        reading = asyncio.create_task(read_all(socket))
        with contextlib.suppress(ConnectionClosed):  # it has refused us
            for message in messages:
                await socket.send(message)
                await asyncio.sleep(pace)
        return await reading


def said(*messages) -> list:
    """Return messages as our protocol has them: bytes as they are, others as JSON."""
    return [message if isinstance(message, (bytes, str)) else json.dumps(message) for message in messages]


def of_type(found, kind: str) -> list[dict]:
    return [message for message in found if message["type"] == kind]
