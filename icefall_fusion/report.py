"""The table of methods, one row a method and test set: text, markdown, JSON, a plot of WER against speed.
Knows: result rows, seconds, bytes. Must not know: models, searches, how a row was made.

Times: ``rtf`` is (features + encoder + search + LM) seconds per second of audio; ``search_seconds`` leaves
out ``lm_seconds``, so that their sum is what a method costs beyond the encoder, rescoring included.
"""
from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, Mapping, Sequence

from icefall_fusion.checks import check
from icefall_fusion.files import PathLike, atomic_path, write_json, write_text

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


def cost(row: Row, seconds: float | None = None) -> float:
    """Return search + LM seconds per second of audio (``audio_seconds`` of the row, or ``seconds``)."""
    audio = seconds or row.get("audio_seconds") or float("nan")
    return (row["search_seconds"] + row["lm_seconds"]) / audio


_COLUMNS = (
    ("WER %", lambda row: f"{row['wer']:.2f}"),
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

    Args:
        rows: as in ``results.json``.
        markdown: with bars; else plain columns.
    """
    rows = check_rows(rows)
    blocks = []
    for test_set in _test_sets(rows):
        block = [row for row in rows if row["test_set"] == test_set]
        best = min(row["wer"] for row in block)
        head = ["method", *(name for name, _ in _COLUMNS)]
        lines = [[row["method"], *(show(row) for _, show in _COLUMNS)] for row in block]
        for row, line in zip(block, lines):
            line[1] = (f"**{line[1]}**" if markdown else f"{line[1]} *") if row["wer"] == best else line[1]
        title = f"{test_set}: {block[0]['words']:,} words"
        oracles = [row["oracle_wer"] for row in block if row.get("oracle_wer") is not None]
        if oracles:
            title += f", lowest oracle WER of the N-best {min(oracles):.2f} %"
        blocks.append(f"{title}\n\n{_align(head, lines, markdown)}")
    return "\n\n".join(blocks)


def _test_sets(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["test_set"] for row in rows))


def _align(head: list[str], lines: list[list[str]], markdown: bool) -> str:
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    bar, gap = ("| ", " | ") if markdown else ("", "  ")

    def show(cells: list[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:])]
        return bar + gap.join(padded) + (" |" if markdown else "")

    rule = ["-" * widths[0], *("-" * (w - 1) + (":" if markdown else "-") for w in widths[1:])]
    return "\n".join([show(head), show(rule), *map(show, lines)])


# --- the plot -----------------------------------------------------------------------------------------


def plot(rows: Sequence[Row], path: PathLike) -> None:
    """Draw WER against search + LM time per second of audio (log axis), one panel a test set.

    Every point carries its method's name; names are moved until none covers another or a point.

    Args:
        rows: as in ``results.json``.
        path: a ``.png``.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = check_rows(rows)
    sets = _test_sets(rows)
    check(bool(sets), "rows", "hold at least one row", rows)
    figure, axes = plt.subplots(1, len(sets), figsize=(8.2 * len(sets), 6.4), squeeze=False, dpi=110)
    for axis, test_set in zip(axes[0], sets):
        _panel(axis, [row for row in rows if row["test_set"] == test_set], test_set)
    figure.tight_layout()
    for axis in axes[0]:
        place_labels(figure, axis)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


def _color(method: str) -> str:
    if "delayed" in method:
        return "#c2410c"
    if "rescoring" in method:
        return "#6d28d9"
    return "#0f766e" if "shallow" in method else "#475569"


def _panel(axis: Any, rows: Sequence[Row], title: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for row in rows:
        color = _color(row["method"])
        x, y = max(cost(row), 1e-6), row["wer"]
        axis.plot(x, y, "o", color=color, markersize=7)
        style = {"xytext": (8, 4), "textcoords": "offset points", "color": color, "fontsize": 9}
        axis.annotate(row["method"], (x, y), **style)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.22, y=0.12)
    axis.set_xlabel("search + LM seconds per second of audio (log)")
    axis.set_ylabel("WER (%)")
    axis.set_title(title)
    axis.grid(True, which="both", color="#e2e8f0", linewidth=0.6)
    axis.set_axisbelow(True)


def place_labels(figure: Any, axis: Any) -> None:
    """Move the annotations of ``axis`` so that none covers another, a point or the frame, if room allows."""
    renderer = figure.canvas.get_renderer()
    frame = axis.get_window_extent(renderer)
    notes = list(axis.texts)
    points = [axis.transData.transform(note.xy) for note in notes]
    taken = [_box(x - 6, y - 6, 12, 12) for x, y in points]
    scale = figure.dpi / 72
    for note, (x, y) in sorted(zip(notes, points), key=lambda pair: -pair[1][1]):
        extent = note.get_window_extent(renderer)
        tries = [_box(x + dx * scale, y + dy * scale, extent.width, extent.height)
                 for dx, dy in _offsets(extent.width / scale, extent.height / scale)]  # fmt: skip
        costs = [(_outside(box, frame) * 10 + sum(_overlap(box, other) for other in taken)) for box in tries]
        best = min(range(len(tries)), key=lambda i: (round(costs[i]), i))
        box = tries[best]
        note.set_position(((box[0] - x) / scale, (box[1] - y) / scale))
        if abs(box[1] - y) > 3 * extent.height or best > 7:
            anchor = (min(max(x, box[0]), box[2]), box[3] if y > box[3] else box[1])
            axis.plot(*zip(axis.transData.inverted().transform((x, y)),
                           axis.transData.inverted().transform(anchor)),
                      color=note.get_color(), linewidth=0.6, scalex=False, scaley=False)  # fmt: skip
        taken.append(box)


def _offsets(width: float, height: float) -> list[tuple[float, float]]:
    """Candidate places of a label's lower left corner, from the nearest on, in points from its mark."""
    places = []
    for step in range(8):
        up, down = 5 + step * 0.9 * height, -5 - height - step * 0.9 * height
        places += [(8, up - height / 2), (-8 - width, up - height / 2), (8, down + height / 2)]
        places += [(-8 - width, down + height / 2), (-width / 2, up), (-width / 2, down)]
    return places


def _box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return (x, y, x + width, y + height)


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def _outside(box: Sequence[float], frame: Any) -> float:
    inside = _overlap(box, (frame.x0, frame.y0, frame.x1, frame.y1))
    return (box[2] - box[0]) * (box[3] - box[1]) - inside


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
    """Write ``results.json``, ``table.md`` and ``wer-vs-speed.png``."""
    folder = Path(folder)
    write_json(folder / "results.json", list(rows))
    write_text(folder / "table.md", table(rows, markdown=True) + "\n")
    plot(rows, folder / "wer-vs-speed.png")
    logging.info("wrote results.json, table.md and wer-vs-speed.png to %s", folder)
