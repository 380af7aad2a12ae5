"""Transcription of streams by the command line: files, pipes, terminals, wrong input.
Knows: tiny models, the command line. Must not know: how a stream is decoded.
"""
from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from icefall_fusion.__main__ import main
from icefall_fusion.acoustic.models import load
from icefall_fusion.acoustic.prior import write_prior
from icefall_fusion.decode.live_audio import pcm_packets


@pytest.fixture
def talk(tmp_path):
    """Three seconds of noise in a WAV file, and its samples as raw PCM."""
    samples = (np.random.default_rng(4).normal(0, 0.1, 48_000) * 32767).astype("<i2")
    soundfile.write(tmp_path / "talk.wav", samples, 16000, subtype="PCM_16")
    return str(tmp_path / "talk.wav"), samples.tobytes()


def command(made, *more):
    return ["transcribe", "--stream", "true", "--emissions.model", made["model"], "--llm.path", made["llm"],
            "--live.chunk.size", "4", "--live.endpoint.longest", "1.0", *more]


def lines_of(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_file_and_a_pipe_of_its_samples_are_the_same_stream(made, talk, capsys, monkeypatch) -> None:
    path, pcm = talk
    assert main(command(made, "--format", "json", path)) == 0
    lines = lines_of(capsys)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(pcm)))
    assert main(command(made, "--format", "json", "-")) == 0
    piped = [{**line, "file": path} if line["final"] else line for line in lines_of(capsys)]
    finals = [line for line in lines if line["final"]]
    assert piped == lines and [line["segment"] for line in finals] == list(range(len(finals)))
    assert len(finals) >= 3 and {"ctc", "llm", "total"} <= finals[0]["scores"].keys()
    for line in lines:
        if not line["final"]:
            words = [word["word"] for word in line["words"]]
            assert words == f"{line['committed']} {line['unstable']}".split()
            assert line["committed"].split() == words[: line["stable"]]
    assert main(command(made, path)) == 0  # no terminal: a line a segment
    assert capsys.readouterr().out.splitlines() == [line["text"] for line in finals if line["text"]]


def test_lines_tell_when_words_sound(made, talk, capsys, tmp_path) -> None:
    told = []
    for lead in (0.0, 0.03):
        (tmp_path / "words.yaml").write_text(f"timing: {{lead: {lead}, tail: 0, least: 0, letter: 0}}\n")
        more = ["--format", "json", "--words", str(tmp_path / "words.yaml"), talk[0]]
        assert main(command(made, *more)) == 0
        told.append(lines_of(capsys))
    moved = 0
    for marks, sounds in zip(*told):
        starts = [[word["start"] for word in line["words"]] for line in (marks, sounds)]
        assert len(starts[0]) == len(starts[1]) and all(b <= a for a, b in zip(*starts))
        moved += sum(a - b == pytest.approx(0.03) for a, b in zip(*starts))
    assert moved > 20 and {line["final"] for line in told[0]} == {True, False}


def test_a_terminal_shows_a_live_line(made, talk, capsys, monkeypatch) -> None:
    class Screen(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Screen())
    monkeypatch.setenv("COLUMNS", "40")
    assert main(command(made, talk[0])) == 0
    shown = sys.stdout.getvalue()
    texts = [part.replace("\033[2m", "").replace("\033[0m", "") for part in shown.split("\r\033[K")]
    assert "\033[2m" in shown and max(len(text) for text in texts if "\n" not in text) <= 39
    assert sum(text.endswith("\n") for text in texts) >= 2


def test_packets_of_a_pipe_may_end_anywhere() -> None:
    class Slow(io.BytesIO):
        def read1(self, size=-1):
            return super().read1(3)

    data = np.arange(-50, 51, dtype="<i2").tobytes()
    whole = np.concatenate(list(pcm_packets(Slow(data + b"\x01"))))
    assert np.array_equal(whole * 32768, np.arange(-50, 51))


@pytest.mark.parametrize(("more", "message"), [
    (["--method", "llm-nbest-rescoring"], "one pass of the prefix search"),
    (["--method", "ctc-prefix+llm-nbest-rescoring"], "one pass of the prefix search"),
    (["--format", "ctm"], "text or json"),
    (["second.wav"], "one in a stream"),
    (["--live.window", "0"], "window"),
])
def test_what_cannot_be_streamed_is_refused(made, talk, capsys, more, message) -> None:
    assert main(command(made, talk[0], *more)) == 2
    assert message in capsys.readouterr().err


def test_a_missing_file_is_refused(made, capsys) -> None:
    assert main(command(made, "nowhere.wav")) == 2
    assert "nowhere.wav" in capsys.readouterr().err


def test_a_prior_is_refused_by_its_name(made, talk, tmp_path, capsys) -> None:
    tokens = load(made["model"]).tokens
    write_prior(tmp_path / "prior.json", torch.full((tokens.size,), -5.0), tokens, 1)
    assert main(command(made, "--emissions.prior", str(tmp_path / "prior.json"), talk[0])) == 2
    assert "emissions.prior must be empty (or its scale 0) in a stream" in capsys.readouterr().err
