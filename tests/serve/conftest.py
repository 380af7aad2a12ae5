"""Tiny models for tests of the server, and browsers for those of its page.
Knows: tiny models, browsers. Must not know: the server.
"""
from __future__ import annotations

import sys
from pathlib import Path

import browsers
import pytest
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "streaming"))
from stream_tools import make_models, noise


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """An acoustic model, a language model, an n-gram."""
    return make_models(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """A WAV file and its samples."""
    path = tmp_path_factory.mktemp("talk") / "talk.wav"
    soundfile.write(path, noise(1, 41_003), 16_000, subtype="PCM_16")
    return path, soundfile.read(path, dtype="float32")[0]


@pytest.fixture(scope="module")
def driver():
    with browsers.driver() as driver:
        yield driver


@pytest.fixture(scope="module")
def chromium(driver):
    """Chromium that allows no microphone."""
    with browsers.chromium(driver, allowed=False) as browser:
        yield browser


@pytest.fixture(scope="module")
def firefox(driver, tmp_path_factory):
    with browsers.firefox(driver, tmp_path_factory.mktemp("firefox")) as browser:
        yield browser


@pytest.fixture(params=["chromium", "firefox"])
def browser(request):
    return request.getfixturevalue(request.param)
