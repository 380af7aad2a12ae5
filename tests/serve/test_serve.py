"""The server over real sockets: both protocols give the streams' results; page, health, metrics; its end.
Knows: tiny models, clients of both protocols. Must not know: how a stream is decoded.
"""
from __future__ import annotations

import asyncio

import pytest
from serve_tools import AUDIO, LIVE, SEARCH, fusions_of, of_type, packets, running, said, talk

from icefall_fusion.streaming import StreamingDecoder

START = {"type": "start", "sample_rate": 16000, "format": "f32le", "nbest": 3}
END = {"type": "end"}


@pytest.fixture(scope="module")
def server(made):
    with running(made) as server:
        yield server


def decoded(made, audio=AUDIO, name="shortest"):
    """Return the lists of the segments of a stream that is decoded without a server."""
    stream = StreamingDecoder(made[0], fusions_of(made, name), SEARCH, LIVE).open()
    stream.accept(audio)
    last = stream.finish()
    return [*stream.take_segments(), last]


def test_a_stream_gives_what_the_decoder_gives(made, server) -> None:
    found, code, _ = asyncio.run(talk(f"{server.url}/v1/stream", said(START, *packets(AUDIO), END)))
    wanted = decoded(made)
    assert found[0] == {"type": "ready", "sample_rate": 16000, "format": "f32le",
                        "methods": ["llm-delayed-shortest"], "streams": 4}
    assert found[-1] == {"type": "final"} and code == 1000
    segments = of_type(found, "segment")
    assert [s["text"] for s in segments] == [n[0].text for n in wanted] and len(segments) >= 3
    assert [s["segment"] for s in segments] == list(range(len(segments)))
    for segment, nbest in zip(segments, wanted):
        assert [w["text"] for w in segment["words"]] == nbest[0].words()
        assert [(w["start"], w["end"]) for w in segment["words"]] == [
            (round(t.start, 3), round(t.end, 3)) for t in nbest[0].times]
        assert [n["text"] for n in segment["nbest"]] == [h.text for h in nbest[:3]]
        assert [n["score"] for n in segment["nbest"]] == pytest.approx([h.total for h in nbest[:3]], abs=1e-3)
    partials = of_type(found, "partial")
    assert partials and all(p["age"] == pytest.approx(p["audio"] - p["decoded"], abs=2e-3) for p in partials)
    assert [p["decoded"] for p in partials] == sorted(p["decoded"] for p in partials)
