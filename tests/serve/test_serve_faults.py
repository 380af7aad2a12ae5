"""Clients that vanish, send garbage, too much or nothing, or do not read; models that fail; others live on.
Knows: tiny models, clients over real sockets. Must not know: how a stream is decoded.
"""
from __future__ import annotations

import asyncio
import gc
import json
import signal
import socket
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import tiny
from serve_tools import (
    AUDIO,
    END,
    LIVE,
    START,
    decoded,
    noise,
    of_type,
    packets,
    read_all,
    running,
    said,
    talk,
    wait_for,
)
from stream_tools import failing, layer_of
from websockets.asyncio.client import connect

from icefall_fusion.serve import job
from icefall_fusion.serve.limits import Limits

QUICK = replace(Limits(), stop=0.0)


@pytest.fixture(scope="module")
def server(made):
    with running(made, limits=replace(QUICK, message_bytes=100_000)) as server:
        yield server


def texts_of(found) -> list[str]:
    return [s["text"] for s in of_type(found, "segment")]


def check_serves(made, server) -> None:
    """A client is served as ever, and nothing is held for those before it."""
    wait_for(lambda: server.engine.streams == 0)
    found, code, _ = asyncio.run(talk(f"{server.url}/v1/stream", said(*packets(AUDIO), END)))
    assert code == 1000 and texts_of(found) == [n[0].text for n in decoded(made)]
    wait_for(lambda: server.engine.streams == 0)
    assert server.decoder.streams == [] and all(len(l._free) == 4 for l in server.decoder._lanes.values())


def test_a_client_that_vanishes_leaves_nothing(made, server) -> None:
    async def vanish(url, messages, close):
        client = await connect(url)
        for message in messages:
            await client.send(message)
        if close:
            await client.close()
        else:
            client.transport.abort()  # no closing handshake

    for close in (False, True):
        for url, messages in ((f"{server.url}/v1/stream", said(START, *packets(AUDIO)[:5])),
                              (server.url, packets(AUDIO)[:5]), (f"{server.url}/v1/stream", said(START))):
            asyncio.run(vanish(url, messages, close))
            wait_for(lambda: server.engine.streams == 0)
            assert server.decoder.streams == []

    async def watched():
        async with connect(f"{server.url}/v1/stream") as client:
            await client.send(packets(AUDIO, 20_000)[0])
            await asyncio.to_thread(wait_for, lambda: len(server.decoder.streams) == 1)
            held = weakref.ref(server.decoder.streams[0]._segment)
            client.transport.abort()
            return held

    gc.disable()  # memory must not wait for a collection
    try:
        held = asyncio.run(watched())
        wait_for(lambda: held() is None)
    finally:
        gc.enable()
    check_serves(made, server)


SAMPLES = AUDIO[:8000].astype("<f4")
NAN, INF = SAMPLES.copy(), SAMPLES.copy()
NAN[5], INF[7] = np.nan, -np.inf


@pytest.mark.parametrize(("messages", "code", "reason"), [
    (["Done"], 1007, "JSON object with a type"),
    (["{" * 5000], 1007, "JSON object with a type"),
    (["[1]"], 1007, "JSON object with a type"),
    (said({"type": "stop"}), 1007, "type must be one of ['start', 'end']"),
    (said({**START, "rate": 8000}), 1007, "a field of the start message"),
    (said({**START, "sample_rate": 4000}), 1007, "8000 to 192000"),
    (said({**START, "sample_rate": "16000"}), 1007, "8000 to 192000"),
    (said({**START, "sample_rate": True}), 1007, "8000 to 192000"),
    (said({**START, "format": "mp3"}), 1007, "format must be one of"),
    (said({**START, "format": ["f32le"]}), 1007, "format must be one of"),
    (said({**START, "nbest": 1000}), 1007, "nbest must be an integer of 1 to 64"),
    (said({**START, "token": 5}), 1007, "token must be text"),
    (said(START, START), 1007, "must be 'end'"),
    (said(START, SAMPLES.tobytes(), "garbage"), 1007, "JSON object with a type"),
    (said(START, SAMPLES.tobytes()[:-3]), 1007, "whole samples of 4 bytes"),
    (said({**START, "format": "s16le"}, b"abc"), 1007, "whole samples of 2 bytes"),
    (said(START, NAN.tobytes()), 1007, "finite"),
    (said(SAMPLES.tobytes(), INF.tobytes()), 1007, "finite"),
    (said(np.full(800, 1e30, "<f4").tobytes()), 1007, "lie in about [-1, 1]"),
    (said(START, SAMPLES.tobytes(), END, SAMPLES.tobytes(), *[b""] * 50), 1007, "after the message that all"),
    (said(bytes(200_000)), 1009, ""),
])
def test_garbage_ends_its_stream_with_a_reason(server, messages, code, reason) -> None:
    found, closed, why = asyncio.run(talk(f"{server.url}/v1/stream", messages))
    if messages[-1] == b"" and closed == 1000:
        return  # all was decoded before the garbage came
    assert closed == code and (reason in why or len(why.encode()) >= 110)
    if code == 1007:
        assert found[-1]["type"] == "error" and reason in found[-1]["message"]


@pytest.mark.parametrize(("messages", "reason"), [
    (["garbage"], "must be 'Done'"), ([SAMPLES.tobytes(), "done"], "must be 'Done'"),
    ([SAMPLES.tobytes()[:-1]], "whole samples"), ([NAN.tobytes()], "finite")])
def test_garbage_of_sherpas_clients(server, messages, reason) -> None:
    _, closed, why = asyncio.run(talk(server.url, messages))
    assert closed == 1007 and reason in why


def test_after_all_garbage_the_server_serves(made, server) -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        noise = rng.bytes(4 * int(rng.integers(1, 2000)))
        _, closed, _ = asyncio.run(talk(f"{server.url}/v1/stream", said(noise, END)))
        assert closed in (1000, 1007)  # some bytes are samples
    check_serves(made, server)


def test_who_sends_nothing_is_told_to_go(made) -> None:
    with running(made, limits=replace(QUICK, silence=1.5)) as server:
        for messages in ([], said(START), said(START, b"", b""), said(START, packets(AUDIO)[0])):
            found, code, why = asyncio.run(talk(f"{server.url}/v1/stream", messages))
            assert code == 1008 and "no audio has come for 1.5 s" in why
            assert found[-1]["code"] == "silence"
        assert asyncio.run(talk(server.url, []))[1] == 1008
        slow = asyncio.run(talk(f"{server.url}/v1/stream", said(*packets(AUDIO, 5000), END), pace=0.2))
        assert slow[1] == 1000  # less between two packets is no silence
        check_serves(made, server)


def test_audio_faster_than_it_is_decoded_is_held_back(made) -> None:
    """A client sends half a minute at once; the server holds a bounded part; another is served beside."""
    limits, most = replace(QUICK, ahead=2.0), 0.0
    fast = [samples for _ in range(12) for samples in packets(AUDIO, 12_800)]

    async def both(server):
        nonlocal most
        sending = asyncio.create_task(talk(f"{server.url}/v1/stream", said(*fast, END)))
        other = asyncio.create_task(
            talk(f"{server.url}/v1/stream", said(*packets(AUDIO, 1600), END), pace=0.02))
        while not sending.done():
            for one in list(server.engine._talks):
                most = max(most, one.kind.seconds(one.waiting))
            await asyncio.sleep(0.001)
        return await sending, await other

    with running(made, limits=limits) as server:
        (found, code, _), (other, other_code, _) = asyncio.run(both(server))
        check_serves(made, server)
    assert code == other_code == 1000 and texts_of(other) == [n[0].text for n in decoded(made)]
    longest = limits.ahead + 12_800 / 16_000
    assert limits.ahead / 2 < most <= longest + 1e-6, most
    assert of_type(found, "partial")[-1]["audio"] == pytest.approx(12 * len(AUDIO) / 16_000, abs=0.01)
    assert max(p["age"] for p in of_type(found, "partial")) < longest + 2


def test_a_full_server_refuses_and_serves_on(made) -> None:
    live = replace(LIVE, streams=20)
    with running(made, live=live) as server:
        url = f"{server.url}/v1/stream"

        async def everybody():
            first = asyncio.Event()

            async def speaker():
                async with connect(url, open_timeout=60) as client:
                    reading = asyncio.create_task(read_all(client))
                    parts = packets(AUDIO, 6400)
                    await client.send(parts[0])
                    await first.wait()
                    for part in parts[1:]:
                        await client.send(part)
                        await asyncio.sleep(0.01)
                    await client.send(json.dumps(END))
                    return await reading

            speakers = [asyncio.create_task(speaker()) for _ in range(20)]
            await asyncio.to_thread(wait_for, lambda: server.engine.streams == 20)
            late = [talk(url if n % 2 else server.url, said(packets(AUDIO)[0]), open_timeout=60)
                    for n in range(180)]
            first.set()
            refused = await asyncio.gather(*late)
            return await asyncio.gather(*speakers), refused

        served, refused = asyncio.run(everybody())
        wanted = [n[0].text for n in decoded(made)]
        for found, code, _ in served:
            assert code == 1000 and texts_of(found) == wanted
        turned_away = [(found, why) for found, code, why in refused if code == 1013]
        assert len(turned_away) > 100  # others came when a speaker had ended
        assert all("20 streams of the server are in use" in why for _, why in turned_away)
        errors = [found[-1] for found, _ in turned_away if found]
        assert errors and all(error["code"] == "full" for error in errors)


def test_a_client_that_does_not_read_is_cut_off(made, monkeypatch) -> None:
    monkeypatch.setattr(job, "_SENT", 4096)
    with running(made, limits=replace(QUICK, unread=0.5)) as server:

        async def deaf():
            small = socket.socket()
            small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            small.connect(("127.0.0.1", int(server.address.split(":")[1])))
            options = {"sock": small, "max_queue": 1, "ping_interval": None}
            async with connect(f"{server.url}/v1/stream", **options) as client:
                client.transport.pause_reading()
                for part in packets(AUDIO, 12_800) * 40:
                    await client.send(part)
                    await asyncio.sleep(0)
                await asyncio.sleep(5)

        async def deaf_until_cut():
            task = asyncio.create_task(deaf())
            await asyncio.to_thread(wait_for, lambda: server.engine.counters.cut_off == 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(deaf_until_cut())
        check_serves(made, server)


# --- models that fail ---------------------------------------------------------------------------------


def test_a_dead_llm_is_told_and_the_stream_goes_on(made, server) -> None:
    with failing(layer_of(made[1]), range(10_000)):
        found, code, _ = asyncio.run(talk(f"{server.url}/v1/stream", said(START, *packets(AUDIO), END)))
        sherpa = asyncio.run(talk(server.url, [*packets(AUDIO), "Done"]))
    warnings = of_type(found, "warning")
    assert code == 1000 and len(warnings) == len(texts_of(found))  # each segment has tried
    assert all("'llm' failed (RuntimeError" in w["message"] for w in warnings)
    wanted = [n[0].text for n in decoded(made, name="none")]
    assert texts_of(found) == wanted
    assert not any("changed" in word for s in of_type(found, "segment") for word in s["words"])
    assert [r["text"] for r in sherpa[0][:-1] if r["is_final"]] == wanted and sherpa[1] == 1000
    assert "icefall_fusion_lm_failures_total 0" not in server.get("/metrics")[1]
    check_serves(made, server)


def test_an_encoder_that_fails_ends_its_streams_and_not_the_server(made, server) -> None:
    with failing(made[0].ctc.linear, range(10_000)):
        found, code, why = asyncio.run(talk(f"{server.url}/v1/stream", said(*packets(AUDIO), END)))
        assert code == 1011 and "decoding failed: RuntimeError" in why and found[-1]["type"] == "error"
        assert asyncio.run(talk(server.url, packets(AUDIO)))[1] == 1011
    check_serves(made, server)


# --- the end ------------------------------------------------------------------------------------------


async def read_until(client, kind: str) -> list[dict]:
    """Return the messages of a server to the first of a kind."""
    found = [{"type": ""}]
    while found[-1]["type"] != kind:
        found.append(json.loads(await client.recv()))
    return found[1:]


def test_a_server_that_is_asked_to_stop_ends_its_streams(tmp_path) -> None:
    model, llm = tiny.acoustic_model(tmp_path / "model"), tiny.language_model(tmp_path / "llm", 12, False)
    options = ["--emissions.model", str(model), "--llm.path", str(llm), "--live.chunk.size", "4",
               "--limits.stop", "3.0", "--port", "0"]
    command = [sys.executable, "-m", "icefall_fusion", "serve", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stderr.readline, "")
        address = next(line.split("http://")[1].strip() for line in lines if "listening on http://" in line)

        async def speak():
            async with connect(f"ws://{address}/v1/stream") as client:
                await client.send(json.dumps(START))
                await client.send(noise(1, 20_000).tobytes())
                first = await read_until(client, "partial")
                process.send_signal(signal.SIGTERM)
                first += await read_until(client, "warning")
                late = await talk(f"ws://{address}/v1/stream", said(START))
                rest, code, why = await read_all(client)
                return (first + rest, code, why), late

        (found, code, _), late = asyncio.run(speak())
        kinds = [message["type"] for message in found if message["type"] != "partial"]
        assert kinds == ["ready", "warning", "segment", "final"]
        assert "the server stops" in of_type(found, "warning")[0]["message"] and code == 1000
        assert late[1] == 1013 and "about to stop" in late[2]
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stderr.close()


@pytest.mark.parametrize(("more", "message"), [
    (["--host", "0.0.0.0"], "token must be given"),
    (["--method", "ctc-prefix+llm-nbest-rescoring"], "one pass of the prefix search"),
    (["--live.endpoint", "none"], "longest segment"),
    (["--limits.unread", "0"], "Limits.unread"),
    (["--port", "70000"], "0 to 65535"),
])
def test_what_cannot_be_served_is_refused(tmp_path, capsys, more, message) -> None:
    from icefall_fusion.__main__ import main

    model, llm = tiny.acoustic_model(tmp_path / "model"), tiny.language_model(tmp_path / "llm", 12, False)
    models = ["--emissions.model", str(model), "--llm.path", str(llm)]
    assert main(["serve", "--port", "0", *models, *more]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} of 127.0.0.1 cannot be used"):
            job.listen("127.0.0.1", port)
