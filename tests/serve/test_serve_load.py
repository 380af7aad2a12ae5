"""The load test of the server: its figures by hand, a run, what it refuses.
Knows: tools/bench/serve_load.py, tiny models. Must not know: how fast a server is.
"""
from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import soundfile
from serve_tools import AUDIO, LIVE, running


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "tools" / "bench"))
    return importlib.import_module("serve_load")


def word(text, end):
    return {"text": text, "start": end - 0.1, "end": end}


def test_the_latency_of_words_by_hand(load) -> None:
    heard = load.Heard(begun=100.0)
    heard.shown = [(100.5, 0, ["a"]), (101.0, 0, ["the", "cat"]), (101.5, 0, ["the", "cap"]),
                   (102.5, 1, ["sea"])]
    heard.segments = {0: [word("the", 0.3), word("cat", 0.8), word("sat", 1.2)], 1: [word("sea", 2.0)]}
    heard.ended = {0: 102.0, 1: 103.0}
    assert heard.latencies() == pytest.approx([0.7, 0.2, 0.8, 0.5])


def test_clients_that_are_served_and_refused(load, made, tmp_path, capsys) -> None:
    soundfile.write(tmp_path / "talk.wav", AUDIO, 16_000)
    with running(made, live=LIVE) as server:  # holds 4
        load.main([str(tmp_path / "talk.wav"), "--url", f"{server.url}/v1/stream", "--clients", "2", "6",
                   "--seconds", "2", "--output", str(tmp_path / "rows.json")])
    two, six = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (two["served"], two["refused"], two["failed"]) == (2, 0, 0)
    assert (six["served"], six["refused"], six["failed"]) == (4, 2, 0)
    assert two["words"] > 4 and 0 < two["latency_seconds"]["p50"] <= two["latency_seconds"]["p99"]
    assert two["real_time_factor"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(("more", "message"), [
    (["--url", "ws://192.168.0.7:6006/v1/stream"], "be of this machine"),
    (["--url", "ws://example.org/v1/stream"], "be of this machine"),
    (["--clients", "501"], "be 1 to 500"), (["--seconds", "601"], "at most 600")])
def test_it_speaks_to_this_machine_alone_and_has_bounds(load, more, message) -> None:
    with pytest.raises(ValueError, match=message):
        load.main(["talk.wav", *more])
