"""The web application: sockets of two protocols, the page, health, metrics.
Knows: Starlette, protocols, the engine's numbers. Must not know: models, how streams are decoded.
"""
from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from icefall_fusion.serve.access import Access
from icefall_fusion.serve.engine import Engine
from icefall_fusion.serve.json_protocol import JsonProtocol
from icefall_fusion.serve.metrics import TYPE, as_text
from icefall_fusion.serve.session import Session
from icefall_fusion.serve.sherpa_protocol import SherpaProtocol

PAGE = Path(__file__).resolve().parent / "web"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_AS_BYTES = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]


def make_app(engine: Engine, access: Access, method: str) -> Starlette:
    """Return the application.

    Args:
        engine: runs already.
        access: who may use it.
        method: its name, for clients.
    """
    streams = engine.decoder.options.streams

    async def json_socket(socket: WebSocket) -> None:
        await Session(socket, engine, access, JsonProtocol(method, streams)).run()

    async def sherpa_socket(socket: WebSocket) -> None:
        await Session(socket, engine, access, SherpaProtocol()).run()

    async def no_socket(socket: WebSocket) -> None:
        await socket.send_denial_response(PlainTextResponse("there is no such path\n", 404))

    async def health(request: Request) -> Response:
        good = engine.is_alive() and not engine.closed
        return PlainTextResponse("ok\n" if good else "stopping\n", 200 if good else 503)

    async def metrics(request: Request) -> Response:
        if access.needs_token and not access.knows(access.token_of(request.headers, request.query_params)):
            return PlainTextResponse("a token is needed\n", 401, {"WWW-Authenticate": "Bearer"})
        forwards = engine.decoder.stats()["lm_forwards"]
        return Response(as_text(engine.counters, engine.streams, streams, forwards), media_type=TYPE)

    routes = [
        WebSocketRoute("/v1/stream", json_socket),
        WebSocketRoute("/", sherpa_socket),
        Route("/healthz", health),
        Route("/metrics", metrics),
        WebSocketRoute("/{path:path}", no_socket),
        Mount("/", StaticFiles(directory=PAGE, html=True)),
    ]
    return Starlette(routes=routes, middleware=[Middleware(_SafeHeaders)])


class _SafeHeaders:
    """Adds headers that keep the page to itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: dict) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *_AS_BYTES]}
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)
