"""Helpers of the page's tests: what the page sent and got, what it shows.
Knows: elements of the page, Playwright's pages. Must not know: the server.
"""
from __future__ import annotations

import contextlib
import time

import numpy as np

START = "#microphone"  # the button; it stops, too
#: Notes what goes through the page's sockets, and what its security policy blocks.
RECORDER = """
window.seen = { sent: [], texts: [], got: [], blocked: [] };
window.WebSocket = class extends WebSocket {
  constructor(...given) {
    super(...given);
    this.addEventListener("message", ({ data }) => seen.got.push(JSON.parse(data)));
  }
  send(data) {
    if (typeof data === "string") seen.texts.push(JSON.parse(data)); else seen.sent.push(...data);
    super.send(data);
  }
};
document.addEventListener("securitypolicyviolation", (event) => seen.blocked.push(event.violatedDirective));
"""
_SEGMENTS = """() => [...document.querySelectorAll(".segment p")].map((paragraph) => {
  const copy = paragraph.cloneNode(true);
  for (const other of copy.querySelectorAll(".clock, .tip")) other.remove();
  return copy.textContent.trim().replace(/\\s+/g, " ");
})"""


@contextlib.contextmanager
def opened(browser, url: str, **options):
    """Open the page; at the end nothing of it was blocked and no script has failed."""
    context = browser.new_context(**options)
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.add_init_script(RECORDER)
    page.goto(url)
    try:
        yield page
        assert page.evaluate("seen.blocked") == [] and faults == []
    finally:
        context.close()


def until(page, condition, seconds: float = 60.0) -> None:
    """Wait until a condition of the page holds."""
    end = time.monotonic() + seconds
    while not condition():
        shown = page.inner_text("body")
        assert time.monotonic() < end, f"it has not come about; the page shows: {shown}"
        page.wait_for_timeout(50)


def done(page) -> bool:
    """Whether what was begun is over."""
    over = page.inner_text("#status").startswith(("Done:", "Stopped."))
    assert not over or page.inner_text("#microphone") == "Start microphone"
    return over


def error(page) -> str:
    """Return the error that the page shows, or nothing."""
    return page.inner_text("#error") if page.is_visible("#error") else ""


def messages(page, kind: str) -> list[dict]:
    """Return the messages of a kind that the page has got."""
    return [message for message in page.evaluate("seen.got") if message["type"] == kind]


def sent(page) -> np.ndarray:
    """Return all samples that the page has sent."""
    return np.array(page.evaluate("seen.sent"), np.float32)


def segments(page) -> list[str]:
    """Return the words of each segment that the page shows."""
    return page.evaluate(_SEGMENTS)


def address(server) -> str:
    """Return the page's address."""
    return f"http://{server.address}/"


def send_file(page, path, fast: bool = True) -> None:
    """Let the page transcribe a file."""
    page.set_checked("#fast", fast)
    page.set_input_files("#file", path)
