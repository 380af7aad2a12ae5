"""The table of methods, one row a method and test set: text, markdown, JSON.
Knows: result rows. Must not know: models, searches, how a row was made or is drawn.

``rtf`` is (features + encoder + search + LM) seconds per second of audio. ``search_seconds`` and
``lm_seconds`` do not overlap. Their sum is the cost of a method beyond the encoder, rescoring included.
"""
from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, Sequence

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike, write_json, write_text
from icefall_fusion.scoring.plot import competes, plot, test_sets
from icefall_fusion.scoring.wer import MEASURES

ROW_KEYS = (
    "method", "test_set", "wer", "words", "rtf", "search_seconds", "lm_seconds", "lm_forwards",
    "lm_tokens_forwarded", "lm_tokens_scored", "kv_bytes_peak", "peak_memory_bytes", "options",
)

Row = Mapping[str, Any]


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


def _wer_column(measure: str) -> tuple[str, Callable[[Row], str]]:
    key = f"wer_{measure}"
    return f"{measure} WER %", lambda row: f"{row[key]:.2f}" if key in row else "-"


def table(rows: Sequence[Row], markdown: bool = False) -> str:
    """Return the rows as a table. Each test set is a block, in which the lowest WER is marked.

    WER is that of normalized words; where characters are counted it is the CER. Every other measure that was
    counted has a column of its own.

    Args:
        rows: as in ``results.json``.
        markdown: whether to separate columns by bars.
    """
    rows = check_rows(rows)
    blocks = []
    for test_set in test_sets(rows):
        block = [row for row in rows if row["test_set"] == test_set]
        best = min((row["wer"] for row in block if competes(row)), default=None)
        counted = set().union(*block)
        more = [_wer_column(measure) for measure in MEASURES[1:] if f"wer_{measure}" in counted]
        columns = (_COLUMNS[0], *more, *_COLUMNS[1:])
        head = ["method", *(name for name, _ in columns)]
        lines = [[row["method"], *(show(row) for _, show in columns)] for row in block]
        for row, line in zip(block, lines):
            if competes(row) and row["wer"] == best:
                line[1] = f"**{line[1]}**" if markdown else f"{line[1]} *"
        unit = block[0].get("unit", "words")
        if unit == "characters":
            head[1] = head[1].replace("WER", "CER")
        title = f"{test_set}: {block[0]['words']:,} {unit}"
        oracles = [row["oracle_wer"] for row in block if row.get("oracle_wer") is not None]
        if oracles:
            title += f", lowest oracle {head[1][:3]} of the N-best {min(oracles):.2f} %"
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
        out: folder for results.json, table.md and wer-vs-speed.png; empty: nothing is written.
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
    """Read the rows of runs. A later row of the same method and test set replaces an earlier one.

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
