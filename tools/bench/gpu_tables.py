"""Tables of a day's figures: columns by benchmark, and the aims that the figures meet or miss.
Knows: rows of the benchmarks and of tools/gpu. Must not know: files, pages, how anything was measured.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple, Optional, Sequence

Row = Mapping[str, Any]
LONGEST = 400  # characters of a cell


class Column(NamedTuple):
    """A column: its title, the row's key (or a function of the row), how a number is written, its factor."""

    title: str
    key: Any
    form: str = "{}"
    factor: float = 1.0

    def cell(self, row: Row) -> str:
        """Return the text of a row's cell."""
        value = self.key(row) if callable(self.key) else row.get(self.key)
        if value is None:
            return "-"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, str):
            return value[:LONGEST]
        return self.form.format(value if self.factor == 1.0 else value * self.factor)


MB = 1 / 2**20
COLUMNS: dict[str, list[Column]] = {
    "fusion": [
        Column("method", "method"), Column("batch", "batch"), Column("beam", "beam"),
        Column("groups", lambda row: row.get("groups") or None),
        Column("search s", "search_seconds", "{:.3f}"), Column("LM s", "lm_seconds", "{:.3f}"),
        Column("floor s", "floor_seconds", "{:.3f}"), Column("x floor", "times_floor", "{:.2f}"),
        Column("all x floor", "whole_times_floor", "{:.2f}"), Column("LLM RTF", "llm_rtf", "{:.5f}"),
        Column("RTF", "rtf", "{:.5f}"), Column("times llm-shallow", "times_faster", "{:.2f}"),
        Column("LM calls", "lm_forwards", "{:,}"), Column("tokens", "lm_tokens_forwarded", "{:,}"),
        Column("KV MB", "kv_bytes_peak", "{:,.0f}", MB), Column("of rows", "kv_of_rows", "{:.2f}"),
        Column("host %", "host_share", "{:.0f}", 100), Column("WER %", "wer", "{:.2f}"),
    ],
    "llm_tree": [
        Column("model", "model"), Column("way", "way"), Column("fused", "fused"),
        Column("ms an event", "ms_an_event", "{:.2f}"), Column("host ms", "host_ms_an_event", "{:.2f}"),
        Column("GPU ms", "gpu_ms_an_event", "{:.2f}"), Column("floor ms", "floor_ms_an_event", "{:.2f}"),
        Column("x floor", "times_floor", "{:.2f}"), Column("GPU x floor", "gpu_times_floor", "{:.2f}"),
        Column("tokens", "tokens_forwarded", "{:,}"), Column("KV MB", "kv_mb", "{:,.0f}"),
        Column("RTF", "rtf", "{:.5f}"), Column("largest difference", "largest_difference", "{:.1e}"),
    ],
    "frame_loop": [
        Column("engine", "engine"), Column("batch", "batch"), Column("beam", "beam"),
        Column("stops every", "every"), Column("loop us a frame", "loop_us", "{:.1f}"),
        Column("prepare us", "prepare_us", "{:.1f}"), Column("whole us", "whole_us", "{:.1f}"),
        Column("missing", "missing"),
    ],
    "search": [
        Column("decoder", "decoder"), Column("set", "set"), Column("beam", "beam"),
        Column("ms a second of audio", "ms_per_second", "{:.4f}"), Column("gap, nats", "gap_nats", "{:.3f}"),
        Column("TER %", "error_rate", "{:.2f}"), Column("missing", "missing"),
    ],
    "memory": [
        Column("model", "shape"), Column("s", "seconds", "{:.0f}"), Column("method", "method"),
        Column("batch", "batch"), Column("peak MB above the weights", "peak_bytes", "{:,.0f}", MB),
        Column("an utterance, MB", "bytes_an_utterance", "{:,.1f}", MB),
        Column("KV MB", "kv_bytes_peak", "{:,.0f}", MB),
        Column("distributions MB", "distribution_bytes_peak", "{:,.0f}", MB),
        Column("KV of rows, MB", "kv_bytes_of_rows", "{:,.0f}", MB), Column("share", "kv_of_rows", "{:.2f}"),
        Column("out of memory", "out_of_memory"),
    ],
    "gpu_tests": [
        Column("file", "file"), Column("good", "good"), Column("s", "seconds", "{:.0f}"),
        Column("tests", "tests"), Column("failures", "failures"), Column("errors", "errors"),
        Column("skipped", "skipped"),
    ],
}
#: Other names of the same rows, by the step's program.
COLUMNS["kernels"] = [
    Column("kernel", "name"), Column("times", "count", "{:,}"), Column("us", "us", "{:,.0f}"),
    Column("share %", "share", "{:.1f}", 100),
]

_NAMES = [Column("method", "method"), Column("chunk ms", "chunk_ms")]
COLUMNS["streams"] = [
    *_NAMES, Column("WER %", "wer", "{:.2f}"), Column("heard p90", "heard_p90_ms", "{:.0f}"),
    *(Column(f"first {point}", f"first_{point}_ms", "{:.0f}") for point in ("mean", "p50", "p90", "p99")),
    *(Column(f"commit {point}", f"commit_{point}_ms", "{:.0f}") for point in ("mean", "p50", "p90", "p99")),
    Column("final p50", "final_p50_ms", "{:.0f}"), Column("final p99", "final_p99_ms", "{:.0f}"),
    Column("taken back %", "instability", "{:.1f}", 100),
    Column("unstable texts %", "unstable_texts", "{:.1f}", 100),
    Column("RTF", "rtf", "{:.4f}"), Column("peak MB", "peak_bytes", "{:,.0f}", 1e-6),
    Column("KV MB", "kv_bytes", "{:.1f}", 1e-6), Column("LM calls", "lm_forwards", "{:,.0f}"),
    Column("tokens", "lm_tokens_forwarded", "{:,.0f}"),
]
COLUMNS["capacity"] = [
    *_NAMES, Column("streams", "streams"), Column("heard p99", "heard_p99_ms", "{:.0f}"),
    Column("first p90", "first_p90_ms", "{:.0f}"), Column("first p99", "first_p99_ms", "{:.0f}"),
    Column("busy %", "busy", "{:.0f}", 100), Column("failed with", "failed"),
    Column("its heard p99", "failed_p99_ms", "{:.0f}"),
]
_ROWS = Column("rows", "kind")
COLUMNS["streaming"] = list(dict.fromkeys([_ROWS, *COLUMNS["streams"], *COLUMNS["capacity"]]))


class Aim(NamedTuple):
    """An aim: how it is said, the figure that tells (None: not measured), its bound, how it is written."""

    said: str
    figure: Callable[[Mapping[str, Any]], tuple[Optional[float], Row]]
    bound: float
    form: str = "{:.2f}"


def _least(program: str, key: str, **wanted: Any) -> Callable[[Mapping[str, Any]], tuple[Any, Row]]:
    """Return what finds the least figure of a program's rows that have some values, and its row."""

    def find(steps: Mapping[str, Any]) -> tuple[Optional[float], Row]:
        found = [
            (row[key], {**row, "step": name}) for name, entry in steps.items()
            if program_of(entry, name) == program
            for row in rows_of(entry)
            if row.get(key) is not None and all(_fits(row.get(k), value) for k, value in wanted.items())
        ]
        return min(found, key=lambda pair: pair[0], default=(None, {}))

    return find


def _fits(value: Any, wanted: Any) -> bool:
    return str(value).startswith(wanted[:-1]) if str(wanted).endswith("*") else value == wanted


_OURS = {"method": "llm-delayed-*", "shape": "mistral-7b"}
AIMS = (
    Aim("search: at most 60 us a frame, batch 128, beam 10 (whole call)",
        _least("frame_loop", "whole_us", engine="triton", batch=128, beam=10, every=0), 60.0, "{:.1f} us"),
    Aim("search: the frame loop alone, the same",
        _least("frame_loop", "loop_us", engine="triton", batch=128, beam=10, every=0), 60.0, "{:.1f} us"),
    Aim("an LLM event at 7B: at most 1.6 times its floor",
        _least("llm_tree", "times_floor", model="mistral-7b", way="lazy tree"), 1.6),
    Aim("LLM RTF at most 0.001", _least("fusion", "llm_rtf", **_OURS), 0.001, "{:.5f}"),
    Aim("at least 4 times as fast as llm-shallow (time against its)",
        _least("fusion", "times_slower_than_shallow", **_OURS), 0.25),
    Aim("as fast as 10-best rescoring (time against its)",
        _least("fusion", "times_slower_than_rescoring", **_OURS), 1.0),
    Aim("host below 20 % of the time", _least("fusion", "host_share", **_OURS), 0.2),
    Aim("keys and values at most 1/5 of a row for each hypothesis",
        _least("memory", "kv_of_rows", **_OURS), 0.2),
)


def aims(steps: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return for each aim how it is said, the best figure and whose it is, and whether it is met."""
    rows = []
    for aim in AIMS:
        figure, row = aim.figure(steps)
        if figure is None:
            rows.append({"said": aim.said, "figure": "", "met": "not measured"})
            continue
        named = ", ".join(f"{key} {row[key]}" for key in ("method", "batch") if key in row)
        told = f"{aim.form.format(figure)} ({row['step']}{': ' + named if named else ''})"
        rows.append({"said": aim.said, "figure": told, "met": "met" if figure <= aim.bound else "**missed**"})
    return rows


def program_of(entry: Mapping[str, Any], name: str) -> str:
    """Return the name of a step's program."""
    for word in str(entry.get("command", "")).split():
        if word.endswith(".py"):
            return Path(word).stem
    return name


def rows_of(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a step, none if it left none."""
    result = entry.get("result") or {}
    shape = (result.get("options") or {}).get("shape")  # of fusion.py; rows of memory.py have their own
    more = {"shape": shape} if shape else {}
    return [{**more, **row} for row in result.get("rows", []) if isinstance(row, dict)]


def table(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """Return a Markdown table; a column that no row has is left out."""
    cells = [[column.cell(row) for column in columns] for row in rows]
    kept = [at for at in range(len(columns)) if any(row[at] != "-" for row in cells)]
    lines = [[columns[at].title for at in kept], ["---"] * len(kept)]
    lines += [[row[at].replace("|", "/").replace("\n", " ") for at in kept] for row in cells]
    return ["| " + " | ".join(line) + " |" for line in lines]


def any_columns(rows: Sequence[Row]) -> list[Column]:
    """Return columns for rows of a program that is not known here: numbers and short texts, ten at most."""
    keys = list(dict.fromkeys(
        key for row in rows for key, value in row.items()
        if isinstance(value, (int, float)) or (isinstance(value, str) and len(value) < 60)
    ))
    wide = {key for row in rows for key, value in row.items() if isinstance(value, float)}
    return [Column(key, key, "{:.4g}" if key in wide else "{}") for key in keys[:10]]
