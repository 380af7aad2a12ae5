"""Lines over an axis, a panel each: what benchmarks draw.
Knows: matplotlib. Must not know: what is measured.
"""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional, Sequence

from icefall_fusion.common.files import atomic_path

COLORS = ("#c2410c", "#0f766e", "#6d28d9", "#475569", "#be185d", "#1d4ed8")
MARKS = ("o", "s", "^", "D")  # where colours begin again


class Line(NamedTuple):
    """A line: its name, x and y of its points, the name of each point, if they have any, and a y to compare
    with, drawn dashed.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    labels: Sequence[str] = ()
    level: Optional[float] = None


class Panel(NamedTuple):
    """A panel: title, names of its axes, lines, and whether x is logarithmic."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    logarithmic: bool = False


def draw(path: Path, panels: Sequence[Panel]) -> None:
    """Draw panels side by side into a ``.png``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.8), squeeze=False, dpi=110)
    for axis, panel in zip(axes[0], panels):
        for number, line in enumerate(panel.lines):
            again, place = divmod(number, len(COLORS))
            color, mark = COLORS[place], MARKS[again % len(MARKS)]
            axis.plot(line.x, line.y, mark, linestyle="-", color=color, markersize=5, label=line.name)
            for x, y, label in zip(line.x, line.y, line.labels):
                style = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": 8, "color": color}
                axis.annotate(label, (x, y), **style)
            if line.level is not None:
                axis.axhline(line.level, linestyle="--", linewidth=0.8, color=color)
        if panel.logarithmic:
            axis.set_xscale("log")
        axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        axis.grid(True, which="both", color="#e2e8f0", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.margins(x=0.08, y=0.1)
        axis.legend(fontsize=8)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)
