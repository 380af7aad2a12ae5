"""Load on a server of live audio on this machine: word latency, real-time factor, refused clients.
Knows: our WebSocket protocol, WAV files. Must not know: models, how a stream is decoded.

    python -m icefall_fusion serve &
    python tools/bench/serve_load.py speech.wav --clients 1 5 20

Each client sends the file at the pace of speech, again and again for --seconds. The latency of a word is the
time from the moment at which its end was sent (by the server's own word times) to its first showing in the
final form. The real-time factor is the server's decoding time by seconds of audio (from its /metrics). It
never speaks to other machines.
"""
from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Sequence
from urllib.parse import urlsplit

import numpy as np
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import write_json
from icefall_fusion.data.audio import SAMPLE_RATE, load_audio
from icefall_fusion.serve.access import is_local

PACKET = SAMPLE_RATE // 10  # samples
MOST_CLIENTS, MOST_SECONDS = 500, 600.0
REFUSED = 1013  # close code


@dataclass
class Heard:
    """What one client has heard.

    Args:
        begun: when the first sample was sent, as if all were sent in time.
        shown: moment of each partial text, its segment, its words.
        segments: number and words of each segment, ended; behind: seconds from the last sample to the end.
        code: of the close.
    """

    begun: float = 0.0
    shown: list[tuple[float, int, list[str]]] = field(default_factory=list)
    segments: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)
    behind: float = 0.0
    code: Optional[int] = None

    def latencies(self) -> list[float]:
        """Return the seconds from the end of each word to its first showing."""
        found = []
        for number, words in self.segments.items():
            texts = [(at, shown) for at, segment, shown in self.shown if segment == number]
            for place, word in enumerate(words):
                first = next((at for at, shown in texts if shown[place : place + 1] == [word["text"]]),
                             self.ended[number])
                found.append(first - self.begun - word["end"])
        return found


async def speak(url: str, token: str, samples: np.ndarray, seconds: float, wait: float) -> Heard:
    """Be one client."""
    await asyncio.sleep(wait)
    heard = Heard()
    try:
        async with connect(url, open_timeout=60, max_queue=None) as socket:
            start = {"type": "start", "nbest": 1, **({"token": token} if token else {})}
            await socket.send(json.dumps(start))
            listening = asyncio.create_task(listen(socket, heard))
            heard.begun = time.monotonic()
            for number in range(int(seconds * SAMPLE_RATE / PACKET)):
                place = number * PACKET % max(1, len(samples) - PACKET)
                await asyncio.sleep(heard.begun + (number + 1) * PACKET / SAMPLE_RATE - time.monotonic())
                await socket.send(samples[place : place + PACKET].tobytes())
            said = time.monotonic()
            await socket.send('{"type": "end"}')
            await listening
            heard.behind = time.monotonic() - said
    except ConnectionClosed:
        pass
    heard.code = socket.close_code
    return heard


async def listen(socket: Any, heard: Heard) -> None:
    """Note what a server says until it closes."""
    try:
        while True:
            message = json.loads(await socket.recv())
            now = time.monotonic()
            if message["type"] == "partial":
                words = [word["text"] for word in (*message["committed"], *message["unstable"])]
                heard.shown.append((now, message["segment"], words))
            elif message["type"] == "segment":
                heard.segments[message["segment"]] = message["words"]
                heard.ended[message["segment"]] = now
    except ConnectionClosed:
        return


def metrics(url: str, token: str) -> dict[str, float]:
    """Return the server's counters."""
    parts = urlsplit(url)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"http://{parts.netloc}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return {line.split()[0].removeprefix("icefall_fusion_"): float(line.split()[1])
            for line in lines if not line.startswith("#")}


def measure(url: str, token: str, samples: np.ndarray, clients: int, seconds: float) -> dict[str, Any]:
    """Let so many clients speak at once; return a row of figures."""
    rng, before = random.Random(clients), metrics(url, token)

    async def everybody() -> list[Heard]:
        speakers = [speak(url, token, samples, seconds, rng.random()) for _ in range(clients)]
        return await asyncio.gather(*speakers)

    heard = asyncio.run(everybody())
    after = metrics(url, token)
    spent, audio = (after[name] - before[name] for name in ("round_seconds_sum", "audio_seconds_total"))
    served = [one for one in heard if one.code == 1000]
    latencies = [value for one in served for value in one.latencies()]
    return {
        "clients": clients,
        "served": len(served),
        "refused": sum(one.code == REFUSED for one in heard),
        "failed": sum(one.code not in (1000, REFUSED) for one in heard),
        "words": len(latencies),
        "latency_seconds": {f"p{q}": quantile(latencies, q) for q in (50, 90, 99)},
        "behind_seconds": {f"p{q}": quantile([one.behind for one in served], q) for q in (50, 99)},
        "real_time_factor": round(spent / audio, 4) if audio else None,
    }


def quantile(values: Sequence[float], percent: int) -> Optional[float]:
    """Return a percentile, None of nothing."""
    return round(float(np.percentile(values, percent)), 3) if len(values) else None


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Measure and print a line for each number of clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("wav", help="speech; any format that soundfile reads")
    parser.add_argument("--url", default="ws://127.0.0.1:6006/v1/stream", help="of a server on this machine")
    parser.add_argument("--token", default="")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--seconds", type=float, default=20.0, help="for which each client speaks")
    parser.add_argument("--output", default="", help="JSON file of the rows")
    args = parser.parse_args(arguments)
    host = urlsplit(args.url).hostname or ""
    check(is_local(host), "--url", "be of this machine, e.g. ws://127.0.0.1:6006/v1/stream", args.url)
    good, rule = 0 < args.seconds <= MOST_SECONDS, f"be above 0, at most {MOST_SECONDS:g}"
    check(good, "--seconds", rule, args.seconds)
    for clients in args.clients:
        check(1 <= clients <= MOST_CLIENTS, "--clients", f"be 1 to {MOST_CLIENTS}", clients)
    samples = load_audio(args.wav)
    check(len(samples) > PACKET, "wav", "be longer than 0.1 s", f"{len(samples) / SAMPLE_RATE} s")
    rows = []
    print("clients served refused failed  words    p50    p90    p99 (s a word)    RTF")
    for clients in args.clients:
        row = measure(args.url, args.token, samples, clients, args.seconds)
        rows.append(row)
        shown = " ".join(f"{value:6.3f}" if value is not None else "     -"
                         for value in row["latency_seconds"].values())
        print(f"{clients:7d} {row['served']:6d} {row['refused']:7d} {row['failed']:6d} {row['words']:6d} "
              f"{shown} {row['real_time_factor'] or 0.0:17.4f}", flush=True)
    if args.output:
        write_json(args.output, {"rows": rows})


if __name__ == "__main__":
    main()
