"""Real browsers for tests of the web page: Debian's Chromium and Firefox, driven by Playwright.
Knows: where browsers are, their switches for false microphones. Must not know: the page.
"""
from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Optional

import pytest

PROGRAMS = {"chromium": ("chromium", "chromium-browser", "google-chrome"),
            "firefox": ("firefox-esr", "firefox")}


def program(kind: str) -> str:
    """Return the path of a browser, or skip the test: tools/setup_browser.sh installs it."""
    names = [os.environ.get(kind.upper(), ""), *PROGRAMS[kind]]
    found = next((path for path in map(shutil.which, filter(None, names)) if path), None)
    if found is None:
        pytest.skip(f"no {kind} here: bash tools/setup_browser.sh installs it")
    return found


@contextlib.contextmanager
def driver():
    """Run Playwright; one at a time."""
    reason = "playwright is not installed (requirements.txt)"
    sync_api = pytest.importorskip("playwright.sync_api", reason=reason)
    with sync_api.sync_playwright() as playwright:
        yield playwright


@contextlib.contextmanager
def chromium(playwright, microphone: Optional[Path] = None, allowed: bool = True):
    """Run Chromium without a window.

    Args:
        playwright: see `driver`.
        microphone: WAV file that its microphone plays once, from the moment it is opened; None: a beep.
        allowed: whether pages may use the microphone.
    """
    switches = ["--no-sandbox", "--use-fake-device-for-media-stream"]
    switches += ["--use-fake-ui-for-media-stream"] if allowed else []
    switches += [f"--use-file-for-fake-audio-capture={microphone}%noloop"] if microphone else []
    browser = playwright.chromium.launch(executable_path=program("chromium"), args=switches)
    yield browser
    browser.close()


@contextlib.contextmanager
def firefox(playwright, folder: Path):
    """Run Firefox without a window, with a microphone that beeps.

    Args:
        playwright: see `driver`.
        folder: for the socket of a sound server; where there is none, audio contexts do not start.
    """
    preferences = {"media.navigator.streams.fake": True, "media.navigator.permission.disabled": True}
    with sound_server(folder) as environment:
        browser = playwright.firefox.launch(
            channel="moz-firefox", executable_path=program("firefox"), firefox_user_prefs=preferences,
            env={**os.environ, **environment})
        yield browser
        browser.close()


def has_sound_server() -> bool:
    """Whether PulseAudio is here; without it Firefox's audio does not start on a machine without devices."""
    return shutil.which("pulseaudio") is not None


@contextlib.contextmanager
def sound_server(folder: Path):
    """Run PulseAudio with a loudspeaker that is not heard; yield the environment of its clients."""
    if not has_sound_server():
        yield {}
        return
    socket = folder / "pulse.sock"
    modules = ["module-null-sink", f"module-native-protocol-unix socket={socket} auth-anonymous=1"]
    command = ["pulseaudio", "-n", "--daemonize=no", "--use-pid-file=no", "--exit-idle-time=-1"]
    for module in modules:
        command += ["-L", module]
    environment = {"XDG_RUNTIME_DIR": str(folder), "PULSE_SERVER": f"unix:{socket}"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, env={**os.environ, **environment}, **quiet)
    try:
        until = time.monotonic() + 30
        while not socket.exists():
            assert server.poll() is None and time.monotonic() < until, "PulseAudio does not start"
            time.sleep(0.05)
        yield environment
    finally:
        server.terminate()
        server.wait(30)
