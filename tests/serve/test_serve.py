"""The server over real sockets: both protocols give the streams' results; page, health, metrics; its end.
Knows: tiny models, clients of both protocols. Must not know: how a stream is decoded.
"""
from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest
from serve_tools import (
    AUDIO,
    END,
    START,
    decoded,
    noise,
    of_type,
    packets,
    running,
    said,
    talk,
    wait_for,
)
from websockets.exceptions import InvalidStatus

from icefall_fusion.data.audio import resample
from icefall_fusion.decode.words import WordModel
from icefall_fusion.serve.access import Access
from icefall_fusion.text.word_times import WordTiming


@pytest.fixture(scope="module")
def server(made):
    with running(made) as server:
        yield server


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


def test_sherpas_client_works_as_it_is(made, server) -> None:
    """What sherpa-onnx's client does: it sends the samples, then "Done", and reads until "Done!"."""
    found, code, _ = asyncio.run(talk(server.url, [*packets(AUDIO), "Done"]))
    assert found[-1] == "Done!" and code == 1000
    results, wanted = found[:-1], decoded(made)
    finals = [r for r in results if r["is_final"]]
    assert [r["text"] for r in finals] == [n[0].text for n in wanted]
    assert [r["segment"] for r in finals] == list(range(len(wanted)))
    assert [r["is_eof"] for r in finals] == [False] * (len(wanted) - 1) + [True]
    assert [r["start_time"] for r in finals][:3] == [0, 1, 2] and len(results) > len(finals)
    for result in results:
        assert "".join(result["tokens"]).strip() == result["text"]
        assert len(result["tokens"]) == len(result["timestamps"])
        assert all(0 <= t <= 1.01 for t in result["timestamps"])
    assert set(results[0]) == {"text", "tokens", "timestamps", "segment", "start_time", "is_final", "is_eof"}


@pytest.mark.parametrize(("rate", "kind"), [
    (16_000, "s16le"), (8_000, "f32le"), (8_000, "s16le"), (44_100, "f32le"), (48_000, "s16le")])
def test_other_rates_and_formats(made, server, rate, kind) -> None:
    audio = AUDIO if kind == "f32le" else np.round(AUDIO * 32767).clip(-32768, 32767).astype("<i2")
    heard = resample(audio if kind == "f32le" else audio.astype(np.float32) / 32768, rate)
    start = {"type": "start", "sample_rate": rate, "format": kind}
    pieces = [audio[n : n + 1777].astype("<f4" if kind == "f32le" else "<i2").tobytes()
              for n in range(0, len(audio), 1777)]
    found, code, _ = asyncio.run(talk(f"{server.url}/v1/stream", said(start, *pieces, END)))
    assert code == 1000 and (found[0]["sample_rate"], found[0]["format"]) == (rate, kind)
    assert [s["text"] for s in of_type(found, "segment")] == [
        n[0].text if len(n) else "" for n in decoded(made, heard)]
    assert bool(of_type(found, "warning")) == (rate < 16_000)
    assert of_type(found, "partial")[-1]["audio"] <= len(audio) / rate + 1e-3


def test_the_start_message_may_be_left_out(made, server) -> None:
    found, code, _ = asyncio.run(talk(f"{server.url}/v1/stream", said(*packets(AUDIO, 5000), END)))
    assert found[0]["type"] == "ready" and code == 1000
    assert [s["text"] for s in of_type(found, "segment")] == [n[0].text for n in decoded(made)]


def test_a_stream_without_audio_ends_well(server) -> None:
    for messages in (said(START, END), said(END), said(START, b"", END)):
        found, code, _ = asyncio.run(talk(f"{server.url}/v1/stream", messages))
        assert [m["type"] for m in found] == ["ready", "segment", "final"] and code == 1000
        assert found[1]["text"] == ""
    assert asyncio.run(talk(server.url, ["Done"]))[0][-1] == "Done!"


def test_clients_do_not_disturb_one_another(made, server) -> None:
    audio = [noise(seed, 24_000 + 1000 * seed) for seed in range(4)]
    wanted = [[n[0].text for n in decoded(made, samples)] for samples in audio]

    async def all_of_them():
        return await asyncio.gather(*(
            talk(f"{server.url}/v1/stream", said(*packets(samples, 800 * (1 + n)), END), pace=0.01)
            for n, samples in enumerate(audio)))

    for (found, code, _), texts in zip(asyncio.run(all_of_them()), wanted):
        assert [s["text"] for s in of_type(found, "segment")] == texts and code == 1000
    wait_for(lambda: server.engine.streams == 0)
    assert server.decoder.streams == []


def test_words_have_the_times_at_which_they_sound(made) -> None:
    model = WordModel(WordTiming(lead=0.1))
    with running(made, words=model) as server:
        found, _, _ = asyncio.run(talk(f"{server.url}/v1/stream", said(START, *packets(AUDIO), END)))
    expected = [model.apply(nbest, math.inf)[0].times for nbest in decoded(made)]
    told = [[(word["text"], word["start"], word["end"]) for word in message["words"]]
            for message in of_type(found, "segment")]
    assert told == [[(w.word, round(w.start, 3), round(w.end, 3)) for w in times] for times in expected]
    assert any(expected) and expected != [nbest[0].times for nbest in decoded(made)]


def test_health_and_metrics(server) -> None:
    assert server.get("/healthz") == (200, "ok\n")
    status, text = server.get("/metrics")
    values = dict(line.split() for line in text.splitlines() if not line.startswith("#"))
    assert status == 200 and values["icefall_fusion_streams"] == "0"
    assert values["icefall_fusion_streams_limit"] == "4"
    assert float(values["icefall_fusion_streams_finished_total"]) >= 1
    assert float(values["icefall_fusion_lm_forwards_total"]) > 0
    assert values['icefall_fusion_round_seconds_bucket{le="+Inf"}'] == values[
        "icefall_fusion_round_seconds_count"]
    assert {line.split()[3] for line in text.splitlines() if line.startswith("# TYPE")} == {
        "counter", "gauge", "histogram"}


# --- who may come -------------------------------------------------------------------------------------


def refused(url, status, **options) -> str:
    with pytest.raises(InvalidStatus) as caught:
        asyncio.run(talk(url, [], **options))
    assert caught.value.response.status_code == status
    return caught.value.response.body.decode()


def test_other_websites_may_not_open_a_local_socket(server) -> None:
    port = server.address.split(":")[1]
    for path in ("/v1/stream", "/"):
        url = server.url + path
        assert "evil.example" in refused(url, 403, origin="https://evil.example")
        assert "null" in refused(url, 403, origin="null")
        assert "localhost" in refused(f"ws://rebound.example:{port}{path}", 403, host="127.0.0.1")
        refused(url, 403, origin="http://[half")
        for origin in (f"http://localhost:{port}", f"http://127.0.0.1:{port}", "http://[::1]:8000"):
            assert asyncio.run(talk(url, ["Done"] if path == "/" else said(END), origin=origin))[1] == 1000


def test_there_are_no_other_sockets(server) -> None:
    assert "no such path" in refused(f"{server.url}/v2/stream", 404)
    assert server.get("/v1/stream")[0] == 404 and "<html" in server.get("/")[1]


def test_a_token_opens_the_server(made) -> None:
    token = "correct horse"
    with running(made, token=token) as server:
        json_url = f"{server.url}/v1/stream"
        for wrong in ({}, {"token": "wrong horse!"}, {"token": ""}):
            found, code, _ = asyncio.run(talk(json_url, said({**START, **wrong})))
            assert (found[0]["type"], found[0]["code"], code) == ("error", "token", 4401)
        assert asyncio.run(talk(json_url, said(END)))[1] == 4401
        refused(server.url, 401)
        refused(f"{server.url}/?token=wrong", 401)
        bearer = {"additional_headers": {"Authorization": f"Bearer {token}"}}
        other = {"origin": "https://elsewhere.example"}
        assert asyncio.run(talk(json_url, said({**START, "token": token}, END), **other))[1] == 1000
        assert asyncio.run(talk(json_url, said(END), **bearer))[1] == 1000
        assert asyncio.run(talk(server.url, ["Done"], **bearer, **other))[1] == 1000
        assert asyncio.run(talk(f"{server.url}/?token=correct%20horse", ["Done"]))[1] == 1000
        assert server.get("/healthz")[0] == 200 and server.get("/metrics")[0] == 401
        assert server.get("/metrics", Authorization=f"Bearer {token}")[0] == 200


def test_another_address_needs_a_token(tmp_path) -> None:
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        with pytest.raises(ValueError, match="token must be given"):
            Access(host)
        assert Access(host, "long enough").needs_token
    assert not any(Access(host).needs_token for host in ("127.0.0.1", "localhost", "::1"))
    with pytest.raises(ValueError, match="at least 8"):
        Access("127.0.0.1", "short")
    (tmp_path / "token").write_text("of a file\nmore\n")
    assert Access("::", f"@{tmp_path / 'token'}").knows("of a file")
    with pytest.raises(FileNotFoundError):
        Access("::", f"@{tmp_path / 'none'}")
