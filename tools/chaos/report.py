"""Knows: the report of kill_resume.py. Must not know: stages, processes."""
from __future__ import annotations

from typing import Any


def describe(stage: str, number: int, trial: dict[str, Any]) -> str:
    """Return the kills of a trial and how its result compares."""
    kills = "; ".join(
        f"at {kill['share']:.0%} of it ({kill['processes']} processes; there were {kill['left']})"
        for kill in trial["kills"]
    )
    verdict = "\n  ".join(["DIFFERS:", *trial["differences"]]) if trial["differences"] else "the same"
    return f"{stage} {number}: killed {kills}; resumed for {trial['resumed']['seconds']:.1f} s: {verdict}"


def table(report: dict[str, Any]) -> str:
    """Return one row a stage."""
    rows = [("stage", "seconds", "CPU s", "kills", "first kills at", "the same")]
    for stage in report["stages"]:
        kills = [kill for trial in stage["trials"] for kill in trial["kills"]]
        first = [f"{trial['kills'][0]['share']:.0%}" for trial in stage["trials"]]
        same = sum(not trial["differences"] for trial in stage["trials"])
        times = f"{stage['seconds']:.1f}", f"{stage['cpu_seconds']:.1f}"
        verdict = f"{same} of {len(stage['trials'])}"
        rows.append((stage["stage"], *times, str(len(kills)), " ".join(first), verdict))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
