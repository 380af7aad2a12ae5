"""The plot of WER against speed: a point a method, a panel a test set, labels that do not cover one another.
Knows: result rows; the only importer of matplotlib. Must not know: how a row was made, tables, files of runs.
"""
from __future__ import annotations

import math
from typing import Any, Iterable, Mapping, Sequence

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike, atomic_path

Row = Mapping[str, Any]


def test_sets(rows: Iterable[Row]) -> list[str]:
    """Return the names of the test sets, in the order of their first rows."""
    return list(dict.fromkeys(row["test_set"] for row in rows))


def cost(row: Row, seconds: float | None = None) -> float:
    """Return search + LM seconds per second of audio (``audio_seconds`` of the row, or ``seconds``)."""
    audio = seconds or row.get("audio_seconds") or float("nan")
    return (row["search_seconds"] + row["lm_seconds"]) / audio


def plot(rows: Sequence[Row], path: PathLike) -> None:
    """Draw WER against search + LM time per second of audio (log axis), one panel a test set.

    Every point carries its method's name; names are moved until none covers another or a point. A line joins
    the methods that no other beats in both. Rows without a WER are left out.

    Args:
        rows: as in ``results.json``.
        path: a ``.png``.

    Raises:
        ValueError: no row has a WER.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["wer"] is not None]
    sets = test_sets(rows)
    check(bool(sets), "rows", "hold at least one row with a WER", rows)
    figure, axes = plt.subplots(1, len(sets), figsize=(8.2 * len(sets), 6.4), squeeze=False, dpi=110)
    for axis, test_set in zip(axes[0], sets):
        draw_panel(axis, [row for row in rows if row["test_set"] == test_set], test_set)
    figure.tight_layout()
    for axis in axes[0]:
        place_labels(figure, axis)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


def competes(row: Row) -> bool:
    """Return whether a row can be the best: it has a WER, and no reference has helped it, as an oracle's."""
    return row["wer"] is not None and "oracle" not in row["method"]


def _color(method: str) -> str:
    if "delayed" in method:
        return "#c2410c"
    if "rescoring" in method:
        return "#6d28d9"
    return "#0f766e" if "shallow" in method else "#475569"


def draw_panel(axis: Any, rows: Sequence[Row], title: str) -> None:
    """Draw the rows of one test set; :func:`place_labels` moves their names apart afterwards."""
    points = [(max(1000 * cost(row), 1e-3), row["wer"], row["method"]) for row in rows]  # ms
    fair = sorted(point for point, row in zip(points, rows) if competes(row))
    front = [point for point in fair if all(point[1] < p[1] for p in fair if p < point)]
    axis.plot([x for x, _, _ in front], [y for _, y, _ in front], "--", color="#cbd5e1", zorder=1)
    for x, y, method in points:
        color = _color(method)
        axis.plot(x, y, "o", color=color, markersize=7)
        style = {"xytext": (8, 4), "textcoords": "offset points", "color": color, "fontsize": 9}
        axis.annotate(method, (x, y), **style).set_in_layout(False)
    _scale(axis, [x for x, _, _ in points])
    axis.set_xlabel("search + LM time, ms per second of audio (log)")
    axis.set_ylabel("WER (%)")
    axis.set_title(f"{title}: lower and further left is better")
    axis.grid(True, which="major", color="#e2e8f0", linewidth=0.8)
    axis.set_axisbelow(True)


def _scale(axis: Any, values: Sequence[float]) -> None:
    """Make the x axis logarithmic, with as many plain numbers as have room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    decades = math.log10(max(values) / min(values))
    marks = (1, 2, 5) if decades < 2 else (1, 3) if decades < 3.5 else (1,)
    axis.xaxis.set_major_locator(LogLocator(subs=marks))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.22, y=0.12)


def place_labels(figure: Any, axis: Any) -> None:
    """Move the annotations of ``axis`` so that none covers another, a point or the frame, if room allows.

    Of a few dozen offsets each takes the one that covers least. adjustText was tried on the rows of
    RESULTS.md: its labels cover points and cross the frame.
    """
    renderer = figure.canvas.get_renderer()
    frame = axis.get_window_extent(renderer)
    notes = list(axis.texts)
    points = [axis.transData.transform(note.xy) for note in notes]
    taken = [_box(x - 6, y - 6, 12, 12) for x, y in points]
    scale = figure.dpi / 72
    for note, (x, y) in sorted(zip(notes, points), key=lambda pair: -pair[1][1]):
        extent = note.get_window_extent(renderer)
        offsets = _offsets(extent.width / scale, extent.height / scale)
        tries = [_box(x + dx * scale, y + dy * scale, extent.width, extent.height) for dx, dy in offsets]
        costs = [(_outside(box, frame) * 10 + sum(_overlap(box, other) for other in taken)) for box in tries]
        best = min(range(len(tries)), key=lambda i: (round(costs[i]), i))
        box = tries[best]
        note.set_position(((box[0] - x) / scale, (box[1] - y) / scale))
        if abs(box[1] - y) > 3 * extent.height or best > 7:
            anchor = (min(max(x, box[0]), box[2]), box[3] if y > box[3] else box[1])
            line = axis.transData.inverted().transform([(x, y), anchor])
            axis.plot(*line.T, color=note.get_color(), linewidth=0.6, scalex=False, scaley=False)
        taken.append(box)


def _offsets(width: float, height: float) -> list[tuple[float, float]]:
    """Return offsets in points of a label's lower left corner from its mark, the nearest first."""
    offsets = []
    for step in range(8):
        up, down = 5 + step * 0.9 * height, -5 - height - step * 0.9 * height
        offsets += [(8, up - height / 2), (-8 - width, up - height / 2), (8, down + height / 2)]
        offsets += [(-8 - width, down + height / 2), (-width / 2, up), (-width / 2, down)]
    return offsets


def _box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return (x, y, x + width, y + height)


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def _outside(box: Sequence[float], frame: Any) -> float:
    inside = _overlap(box, (frame.x0, frame.y0, frame.x1, frame.y1))
    return (box[2] - box[0]) * (box[3] - box[1]) - inside
