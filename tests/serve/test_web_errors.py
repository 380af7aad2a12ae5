"""The web page when a server is full, asks for a token, or goes.
Knows: the page's elements, tiny models, browsers. Must not know: how streams are decoded.
"""
from __future__ import annotations

from dataclasses import replace

from page_tools import address, done, error, messages, opened, segments, send_file, until
from serve_tools import LIVE, running


def test_a_full_server_says_so_and_serves_later(chromium, made, talk) -> None:
    with running(made, live=replace(LIVE, streams=1)) as server, \
            opened(chromium, address(server)) as first, opened(chromium, address(server)) as second:
        send_file(first, talk[0], fast=False)
        until(first, lambda: len(messages(first, "ready")) == 1)
        send_file(second, talk[0])
        until(second, lambda: error(second) != "")
        assert "full" in messages(second, "error")[0]["code"] and done(second)
        assert error(second) == messages(second, "error")[0]["message"]
        until(first, lambda: done(first))
        assert error(first) == "" and len(segments(first)) > 0
        send_file(second, talk[0])
        until(second, lambda: done(second) and error(second) == "")
        assert segments(second) == segments(first)


def test_a_token_is_asked_for(browser, made, talk) -> None:
    with running(made, token="open sesame") as server, opened(browser, address(server)) as page:
        assert not page.is_visible("#token")
        send_file(page, talk[0])

        def refused(times: int) -> bool:
            return page.is_visible("#token") and len(messages(page, "error")) == times

        for tries, wrong in enumerate(("open says you", "open says me"), 1):
            until(page, lambda tries=tries: refused(tries))
            assert "token" in error(page) and segments(page) == [] and done(page)
            page.press("#token", "Enter")
            assert page.is_visible("#token")  # nothing was given
            page.fill("#token", wrong)
            page.press("#token", "Enter")
        until(page, lambda: refused(3))
        page.fill("#token", "open sesame")
        page.press("#token", "Enter")  # and the file is sent again
        until(page, lambda: done(page) and len(segments(page)) > 0)
        assert error(page) == "" and not page.is_visible("#token") and "sesame" not in page.url


def test_a_lost_connection_keeps_the_text(chromium, made, talk) -> None:
    with running(made) as server, opened(chromium, address(server)) as page:
        send_file(page, talk[0], fast=False)
        until(page, lambda: len(segments(page)) > 0)
        before = segments(page)[0]
        server.cut_all()
        until(page, lambda: error(page) != "")
        assert error(page) == "The connection to the server was lost. The text so far is kept."
        assert done(page) and segments(page)[0].startswith(before.split()[0])


def test_a_server_that_is_gone(chromium, made, talk) -> None:
    with running(made) as server:
        opened_page = opened(chromium, address(server))
        page = opened_page.__enter__()
    send_file(page, talk[0])
    until(page, lambda: error(page) != "")
    assert error(page) == "The server cannot be reached." and done(page)
    opened_page.__exit__(None, None, None)
