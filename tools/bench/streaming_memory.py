"""The memory of a stream that goes on for hours, decoded as fast as the machine can.
Knows: a bench with models and speech, the resident set. Must not know: latency, what is shown.
"""
from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any, Iterator

import figures
import numpy as np
from tqdm import tqdm

from icefall_fusion.common.memory import memory_in_use
from icefall_fusion.data.audio import SAMPLE_RATE
from icefall_fusion.streaming import EndpointOptions

if TYPE_CHECKING:
    from streaming import Bench

PACKET, PAUSE = 1.0, 0.5  # seconds: of audio at once; between two utterances
POINTS = 24  # rows of a stream


def packets(bench: Bench, seconds: float) -> Iterator[np.ndarray]:
    """Yield so many seconds of speech, the talks in turn, with pauses."""
    step, left, rest = round(PACKET * SAMPLE_RATE), round(seconds / PACKET), np.zeros(0, np.float32)
    pause, number = np.zeros(round(PAUSE * SAMPLE_RATE), np.float32), 0
    while left:
        while len(rest) < step:
            rest = np.concatenate([rest, bench.talks[number % len(bench.talks)].samples, pause])
            number += 1
        yield rest[:step]
        rest, left = rest[step:], left - 1


def memory_rows(bench: Bench, name: str, minutes: float, chunk: int, cut: bool) -> Iterator[dict[str, Any]]:
    """Yield the memory of one stream while it goes on.

    Args:
        bench: models and speech.
        name: of the method.
        minutes: of audio.
        chunk: ms.
        cut: end segments by the usual rules; else the stream is one segment.
    """
    decoder = bench.decoder(bench.methods[name], chunk, endpoint=EndpointOptions() if cut else None)
    stream, begun, words = decoder.open(), time.perf_counter(), 0
    each = max(1, round(minutes * 60 / PACKET / POINTS))
    for number, samples in enumerate(tqdm(packets(bench, minutes * 60), f"{name}", minutes * 60, False), 1):
        stream.accept(samples)
        partial = stream.partial()
        words += sum(len(nbest[0].words()) for nbest in stream.take_segments())
        if number % each == 0:
            yield {"method": name, "segments": partial.segment + 1, "minutes": round(number * PACKET / 60, 2),
                   "rss_mb": round(memory_in_use() / 1e6, 1), "words": words + len(partial.words),
                   "kv_mb": round(decoder.stats()["kv_bytes"] / 1e6, 2),
                   "rtf": round((time.perf_counter() - begun) / (number * PACKET), 4)}
    stream.close()


def growth(rows: list[dict[str, Any]]) -> float:
    """Return by how many MB an hour the memory grows after the first quarter (a line fitted)."""
    later = rows[len(rows) // 4 :]
    return float(np.polyfit([row["minutes"] / 60 for row in later], [row["rss_mb"] for row in later], 1)[0])


def long_stream(args: argparse.Namespace, bench: Bench) -> list[dict[str, Any]]:
    """Measure a long stream by each method, as one segment and in segments; write rows, and print them."""
    rows: list[dict[str, Any]] = []
    for name in args.methods:
        for cut in (False, True):
            own = []
            for row in memory_rows(bench, name, args.minutes, args.long_chunk, cut):
                own.append({"cut": cut, **row})
                figures.save(args, rows + own)
                print("  ".join(f"{key} {value}" for key, value in own[-1].items()), flush=True)
            rows += own
            if len(own) > 4:
                print(f"{name}, {'segments' if cut else 'one segment'}: {growth(own):+.1f} MB an hour")
    figures.write(args, rows)
    return rows
