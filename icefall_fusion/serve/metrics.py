"""Counters of a server, in the text format of Prometheus (version 0.0.4).
Knows: numbers and their names. Must not know: sockets, streams.
"""
from __future__ import annotations

from dataclasses import dataclass, field

_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)  # seconds of a round
TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class Counters:
    """What has happened so far; the decoding thread and the event loop each write their own.

    Args:
        opened, finished, failed, refused: streams that began, ended well, by an error, found no room.
        cut_off: clients that did not read.
        warnings: streams' segments that went on without a language model.
        audio_seconds: given to streams.
        rounds: number of rounds by their seconds (see `count_round`).
    """

    opened: int = 0
    finished: int = 0
    failed: int = 0
    refused: int = 0
    cut_off: int = 0
    warnings: int = 0
    audio_seconds: float = 0.0
    round_seconds: float = 0.0
    rounds: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS) + 1))

    def count_round(self, seconds: float) -> None:
        """Count a round that took so many seconds."""
        self.round_seconds += seconds
        self.rounds[sum(seconds > bound for bound in _BOUNDS)] += 1


def as_text(counters: Counters, streams: int, most: int, lm_forwards: float) -> str:
    """Return counters as Prometheus reads them.

    Args:
        counters: of a server.
        streams: open now; most: that there may be.
        lm_forwards: calls of language models.
    """
    values = [
        ("streams", "gauge", "Streams that are open.", streams),
        ("streams_limit", "gauge", "Streams that may be open.", most),
        ("streams_opened_total", "counter", "Streams that have begun.", counters.opened),
        ("streams_finished_total", "counter", "Streams that were decoded to their end.", counters.finished),
        ("streams_failed_total", "counter", "Streams that an error has ended.", counters.failed),
        ("streams_refused_total", "counter", "Streams for which there was no room.", counters.refused),
        ("clients_cut_off_total", "counter", "Clients that did not read their messages.", counters.cut_off),
        ("lm_failures_total", "counter", "Segments decoded without a language model.", counters.warnings),
        ("lm_forwards_total", "counter", "Calls of language models.", lm_forwards),
        ("audio_seconds_total", "counter", "Seconds of audio given to streams.", counters.audio_seconds),
    ]
    lines = []
    for name, kind, text, value in values:
        lines += _head(name, kind, text)
        lines.append(f"icefall_fusion_{name} {value:.15g}")
    lines += _head("round_seconds", "histogram", "Seconds of a round of decoding.")
    below = 0
    for bound, count in zip((*map(str, _BOUNDS), "+Inf"), counters.rounds):
        below += count
        lines.append(f'icefall_fusion_round_seconds_bucket{{le="{bound}"}} {below}')
    lines.append(f"icefall_fusion_round_seconds_sum {counters.round_seconds:.15g}")
    lines.append(f"icefall_fusion_round_seconds_count {below}")
    return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP icefall_fusion_{name} {text}", f"# TYPE icefall_fusion_{name} {kind}"]
