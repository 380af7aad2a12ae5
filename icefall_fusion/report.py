"""The table of methods, one row a method and test set: text, markdown, JSON; peak memory.
Knows: result rows, seconds, bytes. Must not know: models, searches, how a row was made or is drawn.

Times: ``rtf`` is (features + encoder + search + LM) seconds per second of audio; ``search_seconds`` leaves
out ``lm_seconds``, so that their sum is what a method costs beyond the encoder, rescoring included.
"""
from __future__ import annotations

import ctypes
import json
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, Mapping, Sequence

from icefall_fusion.checks import check
from icefall_fusion.files import PathLike, write_json, write_text
from icefall_fusion.plot import competes, plot, test_sets

ROW_KEYS = (
    "method", "test_set", "wer", "words", "rtf", "search_seconds", "lm_seconds", "lm_forwards",
    "lm_tokens_forwarded", "lm_tokens_scored", "kv_bytes_peak", "peak_memory_bytes", "options",
)  # fmt: skip

Row = Mapping[str, Any]


# --- memory -------------------------------------------------------------------------------------------


def reset_peak_memory() -> None:
    """Start a new measurement for :func:`peak_memory_bytes` (of the GPU too, where there is one)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the highest resident set seen so far
    except OSError:
        logging.debug("this system cannot forget its peak memory: it counts from the start of the process")
    cuda = _cuda()
    if cuda is not None:
        cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int:
    """Return the highest memory in use since the reset: the GPU's where one is used, else resident."""
    cuda = _cuda()
    if cuda is not None and cuda.max_memory_allocated() > 0:
        return int(cuda.max_memory_allocated())
    return peak_rss_bytes()


def memory_in_use() -> int:
    """Return what is in use now: of the GPU where one is used, else resident."""
    cuda = _cuda()
    if cuda is not None and cuda.memory_allocated() > 0:
        return int(cuda.memory_allocated())
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_rss_bytes()


def give_back_memory() -> None:
    """Let the C library give the system what it holds but does not use (glibc; elsewhere nothing happens).

    A decode asks for blocks of ever other sizes, and what it frees is kept in pieces: a run of hours came to
    three times what it needed.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def peak_rss_bytes() -> int:
    """Return the highest resident set of this process since the reset, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found.group(1)) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if os.uname().sysname == "Darwin" else int(peak) * 1024


def _cuda() -> Any:
    import torch

    return torch.cuda if torch.cuda.is_available() and torch.cuda.is_initialized() else None


# --- the table ----------------------------------------------------------------------------------------


def check_rows(rows: Iterable[Row]) -> list[Row]:
    """Return the rows as a list.

    Raises:
        ValueError: a row lacks a key.
    """
    rows = list(rows)
    for row in rows:
        missing = [key for key in ROW_KEYS if key not in row]
        check(not missing, f"row {row.get('method')!r}", f"have the keys {missing}", sorted(row))
    return rows


_PRINTED = ("printed WER %", lambda row: f"{row['wer_printed']:.2f}" if "wer_printed" in row else "-")
_COLUMNS = (
    ("WER %", lambda row: "-" if row["wer"] is None else f"{row['wer']:.2f}"),
    ("RTF", lambda row: f"{row['rtf']:.4f}"),
    ("search s", lambda row: f"{row['search_seconds']:.2f}"),
    ("LM s", lambda row: f"{row['lm_seconds']:.2f}"),
    ("LM calls", lambda row: f"{row['lm_forwards']:,}"),
    ("forwarded", lambda row: f"{row['lm_tokens_forwarded']:,}"),
    ("scored", lambda row: f"{row['lm_tokens_scored']:,}"),
    ("KV MB", lambda row: f"{row['kv_bytes_peak'] / 1e6:.1f}"),
    ("peak MB", lambda row: f"{row['peak_memory_bytes'] / 1e6:.0f}"),
)


def table(rows: Sequence[Row], markdown: bool = False) -> str:
    """Return the rows as a table, one block a test set, the lowest WER of a block marked.

    WER is that of normalized words; that of printed words has a column of its own where it was counted.

    Args:
        rows: as in ``results.json``.
        markdown: with bars; else plain columns.
    """
    rows = check_rows(rows)
    blocks = []
    for test_set in test_sets(rows):
        block = [row for row in rows if row["test_set"] == test_set]
        best = min((row["wer"] for row in block if competes(row)), default=None)
        printed = (_PRINTED,) if any("wer_printed" in row for row in block) else ()
        columns = (_COLUMNS[0], *printed, *_COLUMNS[1:])
        head = ["method", *(name for name, _ in columns)]
        lines = [[row["method"], *(show(row) for _, show in columns)] for row in block]
        for row, line in zip(block, lines):
            if competes(row) and row["wer"] == best:
                line[1] = f"**{line[1]}**" if markdown else f"{line[1]} *"
        title = f"{test_set}: {block[0]['words']:,} words"
        oracles = [row["oracle_wer"] for row in block if row.get("oracle_wer") is not None]
        if oracles:
            title += f", lowest oracle WER of the N-best {min(oracles):.2f} %"
        blocks.append(f"{title}\n\n{_align(head, lines, markdown)}")
    return "\n\n".join(blocks)


def _align(head: list[str], lines: list[list[str]], markdown: bool) -> str:
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    bar, gap = ("| ", " | ") if markdown else ("", "  ")

    def show(cells: list[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:])]
        return bar + gap.join(padded) + (" |" if markdown else "")

    rule = ["-" * widths[0], *("-" * (w - 1) + (":" if markdown else "-") for w in widths[1:])]
    return "\n".join([show(head), show(rule), *map(show, lines)])


# --- the job "report" ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReportOptions:
    """Collect the ``results.json`` of decode runs into one table and one plot.

    Args:
        runs: folders of decode runs (searched at any depth) or ``results.json`` files.
        out: folder for results.json, table.md and wer-vs-speed.png; nothing is written without it.
        markdown: print the table as markdown.
    """

    runs: list[str] = field(default_factory=list)
    out: str = ""
    markdown: bool = False

    def __post_init__(self) -> None:
        check(len(self.runs) > 0, "ReportOptions.runs", "name at least one folder", self.runs)


def run(options: ReportOptions) -> int:
    """Run the job ``report``."""
    rows = read_rows(options.runs)
    print(table(rows, options.markdown))
    if options.out:
        write_report(rows, options.out)
    return 0


def read_rows(runs: Iterable[PathLike]) -> list[Row]:
    """Read the rows of runs, a later run's row of the same method and test set replacing an earlier one's.

    Raises:
        FileNotFoundError: a folder has no ``results.json``.
    """
    rows: dict[tuple[str, str], Row] = {}
    for name in map(Path, runs):
        paths = [name] if name.is_file() else sorted(name.rglob("results.json"))
        if not paths:
            raise FileNotFoundError(f"ReportOptions.runs must hold results.json files, but {name} has none")
        for path in paths:
            for row in check_rows(json.loads(path.read_text(encoding="utf-8"))):
                rows[row["test_set"], row["method"]] = row
    return sorted(rows.values(), key=lambda row: row["test_set"])


def write_report(rows: Sequence[Row], folder: PathLike) -> None:
    """Write ``results.json``, ``table.md`` and, where a row has a WER, ``wer-vs-speed.png``."""
    folder = Path(folder)
    write_json(folder / "results.json", list(rows))
    write_text(folder / "table.md", table(rows, markdown=True) + "\n")
    if any(row["wer"] is not None for row in rows):
        plot(rows, folder / "wer-vs-speed.png")
    else:
        logging.warning("there is nothing to plot: no utterance has a reference")
    logging.info("wrote the table of %d rows to %s", len(rows), folder)
