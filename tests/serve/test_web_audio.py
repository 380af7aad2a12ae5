"""The page's own resampler, in real browsers: that of the microphone's worklet.
Knows: serve/web/resample.js, scipy. Must not know: the server, the page.
"""
from __future__ import annotations

import functools
import http.server
import threading
from pathlib import Path

import browsers
import numpy as np
import pytest
from scipy.signal import resample_poly

WEB = Path(__file__).resolve().parents[2] / "icefall_fusion" / "serve" / "web"
#: Resamples blocks of the given lengths in turn.
SCRIPT = """async ([samples, from, to, lengths]) => {
  const { Resampler } = await import("/resample.js");
  const resampler = new Resampler(from, to), out = [];
  for (let at = 0, turn = 0; at < samples.length; turn++) {
    const length = lengths[turn % lengths.length];
    out.push(...resampler.push(Float32Array.from(samples.slice(at, at + length))));
    at += length;
  }
  out.push(...resampler.end());
  return out;
}"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(scope="module", params=["chromium", "firefox"])
def page(request, tmp_path_factory):
    """The page, from a server of files alone, in a browser."""
    browsers.program(request.param)
    handler = functools.partial(_Quiet, directory=str(WEB))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with browsers.driver() as playwright:
            folder = tmp_path_factory.mktemp("firefox")
            opened = (browsers.chromium(playwright) if request.param == "chromium"
                      else browsers.firefox(playwright, folder))
            with opened as browser:
                page = browser.new_page()
                page.goto(f"http://127.0.0.1:{server.server_port}/")
                yield page
        server.shutdown()


def resampled(page, samples, rate, lengths=(1024,)) -> np.ndarray:
    return np.array(page.evaluate(SCRIPT, [samples.tolist(), rate, 16_000, list(lengths)]))


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_a_tone_keeps_its_shape_however_it_is_cut(page, rate) -> None:
    seconds = np.arange(rate // 2) / rate
    samples = 0.5 * np.sin(2 * np.pi * 1234.5 * seconds) + 0.2 * np.cos(2 * np.pi * 3000 * seconds)
    whole = resampled(page, samples, rate)
    assert len(whole) == 8_000
    wanted = np.arange(8_000) / 16_000
    wanted = 0.5 * np.sin(2 * np.pi * 1234.5 * wanted) + 0.2 * np.cos(2 * np.pi * 3000 * wanted)
    assert np.abs(whole - wanted)[200:-200].max() < 2e-3
    assert np.array_equal(whole, resampled(page, samples, rate, (1, 700, 33)))


@pytest.mark.parametrize("rate", [44_100, 48_000])
def test_what_lies_above_half_the_rate_is_gone(page, rate) -> None:
    tone = np.sin(2 * np.pi * 9_500 * np.arange(rate // 2) / rate)
    assert np.abs(resampled(page, tone, rate)[200:-200]).max() < 1e-3  # -60 dB
    speech = np.random.default_rng(3).normal(0, 0.1, rate // 2)
    band = resample_poly(resample_poly(speech, 1, 8), 8, 1)  # far below the edge
    wanted = resample_poly(band, 16_000 // 100, rate // 100)
    assert np.abs(resampled(page, band, rate) - wanted)[200:-200].max() < 2e-3
