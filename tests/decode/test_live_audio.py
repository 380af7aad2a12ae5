"""Live audio by the command line: pipes that are wrong, microphones, the live line of a terminal, Ctrl-C.
Knows: tiny models, the command line, terminals, ALSA's false devices. Must not know: how a stream is decoded.
"""
from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from icefall_fusion.__main__ import main
from icefall_fusion.decode.live_audio import microphone_packets, pcm_packets
from icefall_fusion.decode.live_views import Terminal
from icefall_fusion.streaming import Partial

#: An ALSA device that plays a file: its only device, so the system's own microphone.
DEVICE = """pcm.null { type null }
pcm.talk { type file slave.pcm "null" file "/dev/null" infile "%s" format "raw" }
pcm.!default { type plug slave { pcm "talk" rate 16000 channels 1 format S16_LE } }
"""


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """Three seconds of noise in a WAV file, and as raw PCM."""
    folder = tmp_path_factory.mktemp("talk")
    samples = (np.random.default_rng(4).normal(0, 0.1, 48_000) * 32767).astype("<i2")
    soundfile.write(folder / "talk.wav", samples, 16000, subtype="PCM_16")
    (folder / "talk.raw").write_bytes(samples.tobytes())
    return folder


def command(made, *more):
    return ["transcribe", "--stream", "true", "--emissions.model", made["model"], "--llm.path", made["llm"],
            "--live.chunk.size", "4", "--live.endpoint.longest", "1.0", *more]


def program(made, *more):
    return [sys.executable, "-m", "icefall_fusion", *command(made, *more)]


# --- pipes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "message"), [
    (b"", "standard input must have samples of 16 bits, but is '0 bytes'"),
    (b"\x01", "standard input must have samples of 16 bits, but is '1 bytes'"),
    (b"RIFF\x24\x00\x00\x00WAVEfmt ", "standard input must be raw PCM (16 bits, 16 kHz, one channel;"),
])
def test_a_pipe_without_raw_audio_is_refused(made, capsys, monkeypatch, data, message) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert main(command(made, "-")) == 2
    told = capsys.readouterr()
    assert message in told.err and told.out == ""


@pytest.mark.parametrize("size", [2, 3, 4, 5, 3199, 3200, 3201, 6401])
@pytest.mark.parametrize("step", [1, 3, 3200])
def test_every_whole_sample_of_a_pipe_is_read(size, step, caplog) -> None:
    class Slow(io.BytesIO):
        def read1(self, most=-1):
            return super().read1(min(step, most))

    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    got = np.concatenate(list(pcm_packets(Slow(data))))
    assert (got * 32768).astype("<i2").tobytes() == data[: size // 2 * 2]
    assert ("half a sample" in caplog.text) == bool(size % 2)


def test_a_pipe_of_a_few_samples_gives_a_result(made, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\x01\x00\x02")))
    assert main(command(made, "--format", "json", "-")) == 0
    [line] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert line["final"] and line["segment"] == 0 and line["text"] == ""


def test_an_empty_file_is_refused(made, capsys, tmp_path) -> None:
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    assert main(command(made, str(tmp_path / "none.wav"))) == 2
    assert "none.wav" in capsys.readouterr().err


# --- microphones ------------------------------------------------------------------------------------------


def has_portaudio() -> bool:
    try:
        import sounddevice  # noqa: F401
    except (ImportError, OSError):
        return False
    return sys.platform == "linux"


needs_portaudio = pytest.mark.skipif(not has_portaudio(), reason="no sounddevice, or no PortAudio by ALSA")


@pytest.fixture(scope="module")
def false_device(talk):
    """An environment whose only sound device plays the talk again and again, with gaps: it has no clock."""
    (talk / "asound.conf").write_text(DEVICE % (talk / "talk.raw"))
    return {**os.environ, "ALSA_CONFIG_PATH": str(talk / "asound.conf")}


@needs_portaudio
def test_a_microphone_is_transcribed_until_it_is_stopped(made, false_device) -> None:
    process = subprocess.Popen(program(made, "--format", "json", "mic"), env=false_device, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    lines = []
    while len([line for line in lines if line["final"]]) < 2:
        lines.append(json.loads(process.stdout.readline()))
    process.send_signal(signal.SIGINT)
    rest, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    lines += [json.loads(line) for line in rest.splitlines()]
    finals = [line for line in lines if line["final"]]
    assert lines[-1]["final"] and [line["segment"] for line in finals] == list(range(len(finals)))
    assert any(line["text"] for line in finals) and "what was heard is decoded" in told


@needs_portaudio
@pytest.mark.parametrize("name", ["mic", "mic:default"])
def test_a_microphone_gives_the_samples_of_its_device(talk, false_device, name) -> None:
    script = """
import itertools, sys
import numpy as np
from icefall_fusion.decode.live_audio import live_packets
packets = live_packets(sys.argv[1])
np.save(sys.argv[2], np.stack(list(itertools.islice(packets, 40))))
packets.close()
"""
    command = [sys.executable, "-c", script, name, str(talk / "heard.npy")]
    subprocess.run(command, env=false_device, check=True)
    heard = np.load(talk / "heard.npy")
    assert heard.shape == (40, 1600) and heard.dtype == np.float32
    data = (talk / "talk.raw").read_bytes()
    runs = [(run * 32768).astype("<i2").tobytes() for run in heard.reshape(-1, 50) if run.any()]
    assert len(runs) > 100 and np.mean([run in data for run in runs]) > 0.8  # others have a gap in them


@needs_portaudio
@pytest.mark.parametrize("name", ["mic", "mic:no such studio", "mic:99"])
def test_a_microphone_that_is_not_there(made, name) -> None:
    cards = Path("/proc/asound/cards")
    if name == "mic" and cards.exists() and "no soundcards" not in cards.read_text():
        pytest.skip("this machine has a sound card")
    process = subprocess.run(program(made, name), capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == ""
    last = [line for line in process.stderr.splitlines() if "microphone" in line][-1]
    assert re.search(r"microphone \S.* cannot be opened: .*\(microphones here: .+\)", last)


def test_without_the_library_the_error_says_what_to_install(made, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert main(command(made, "mic")) == 2
    assert "pip install sounddevice" in capsys.readouterr().err


def test_without_portaudio_the_error_says_what_to_install(tmp_path, monkeypatch) -> None:
    (tmp_path / "sounddevice.py").write_text('raise OSError("PortAudio library not found")\n')
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="libportaudio2.*PortAudio library not found"):
        next(microphone_packets())


# --- terminals --------------------------------------------------------------------------------------------


class Screen:
    """A terminal: lines of characters, each dim or not; what it cannot do fails."""

    def __init__(self, width: int) -> None:
        self.width, self.lines, self.column, self.dim = width, [[]], 0, False
        self.any_dim = self.wrapped = False

    def write(self, text: str) -> None:
        for code, letter in re.findall(r"(\x1b\[\d*[mK])|([\s\S])", text):
            if code == "\x1b[K":
                del self.lines[-1][self.column :]
            elif code:
                self.dim = {"\x1b[2m": True, "\x1b[0m": False}[code]
            elif letter == "\r":
                self.column = 0
            elif letter == "\n":
                self.lines.append([])
            else:
                assert letter.isprintable()
                if self.column == self.width:
                    self.wrapped = True
                    self.lines.append([])
                    self.column = 0
                self.lines[-1][self.column :] = [letter]
                self.column += 1
                self.any_dim |= self.dim

    def shown(self) -> list[str]:
        return ["".join(line) for line in self.lines]


def test_a_terminal_shows_a_live_line_and_keeps_the_segments(made, talk, capsys) -> None:
    main_end, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 15, 0, 0))
    plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(program(made, str(talk / "talk.wav")), stdout=end, stderr=subprocess.DEVNULL,
                               env={**plain, "TERM": "xterm"})
    os.close(end)
    output = b""
    while True:
        try:
            read = os.read(main_end, 4096)
        except OSError:  # Linux: the other end is closed
            read = b""
        if not read:
            break
        output += read
    os.close(main_end)
    assert process.wait() == 0
    assert main(command(made, str(talk / "talk.wav"))) == 0
    wanted = capsys.readouterr().out.splitlines()
    screen = Screen(10**6)  # final lines wrap; live ones must not
    screen.write(output.decode())
    assert screen.any_dim and screen.shown() == [*wanted, ""] and len(wanted) >= 3
    live = [part for part in output.decode().split("\r\x1b[K") if "\n" not in part]
    assert max(len(re.sub(r"\x1b\[\dm", "", part)) for part in live) == 14


@pytest.mark.parametrize(("committed", "unstable", "shown", "dim"), [
    ("one two", "three", "one two three", " three"),
    ("one two", "", "one two", ""),
    ("", "three", "three", "three"),
    ("a" * 30, "b", "a" * 17 + " b", " b"),
    ("a" * 5, "b" * 30, "b" * 19, "b" * 19),
    ("", "\u6f22" * 12, "\u6f22" * 9, "\u6f22" * 9),  # two columns each
    ("e\u0301" * 25, "", "e\u0301" * 19, ""),  # a letter and its accent in one column
    ("bad\x1b[2Jtext", "a\nb", "bad?[2Jtext a?b", " a?b"),
])
def test_a_line_fits_into_the_terminal(monkeypatch, committed, unstable, shown, dim) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    out = io.StringIO()
    Terminal(out).partial(Partial(0, committed, unstable, [], 0, 0.0))
    line = out.getvalue()
    begin = shown[: len(shown) - len(dim)]
    assert line == f"\r\x1b[K{begin}\x1b[2m{dim}\x1b[0m"


def test_ctrl_c_while_a_packet_is_decoded_waits_for_it(made, talk, capsys, monkeypatch) -> None:
    from icefall_fusion.decode import transcribe_stream

    real, calls = transcribe_stream.StreamingDecoder.decode, []

    def decode(self):
        calls.append(1)
        if len(calls) == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self)

    monkeypatch.setattr(transcribe_stream.StreamingDecoder, "decode", decode)
    before = signal.getsignal(signal.SIGINT)
    assert main(command(made, "--format", "json", str(talk / "talk.wav"))) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["segment"] for line in lines if line["final"]] == [0, 1]  # 1.2 s were heard
    assert signal.getsignal(signal.SIGINT) is before
