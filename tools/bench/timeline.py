"""What a device and its host did in a block of code: spans of time, by torch's profiler.
Knows: torch's profiler and its trace. Must not know: what is watched.

On a GPU the device's spans are kernels and copies. On a CPU they are the outermost operators of torch, so
that the same code can be tried there: what is between them is Python. It has never run on a GPU.
"""
from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import figures

_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_RUNTIME = ("cuda_runtime", "cuda_driver")
_PLACES = 25  # of a gap, at which it is looked what the host did
_LONG_GAP = 50.0  # microseconds; in a shorter one the host is looked at once
LARGEST = 10


class Span(NamedTuple):
    """From ``start`` to ``end``, microseconds."""

    name: str
    start: float
    end: float
    kind: str
    thread: Any = 0


class Timeline:
    """Spans of a block.

    Attributes:
        device: kernels and copies (on a CPU outermost operators), by start.
        host: operators, calls of the driver and marks, by start.
        on_gpu: whether the device is a GPU.
    """

    def __init__(self, spans: Sequence[Span], on_gpu: bool) -> None:
        spans, self.on_gpu = sorted(spans, key=lambda span: (span.start, -span.end)), on_gpu
        self.host = [span for span in spans if span.kind not in _DEVICE]
        self.device = [span for span in spans if span.kind in _DEVICE] if on_gpu else _outermost(self.host)
        self._marks = [span for span in self.host if span.kind == "user_annotation"]
        self._edges = {
            id(some): np.array([(span.start, span.end) for span in some]).reshape(-1, 2)
            for some in (self.host, self._marks)
        }

    def marks(self, name: str) -> list[Span]:
        """Return the marks (of `mark`) whose name begins so, by start."""
        return [span for span in self._marks if span.name.startswith(name)]

    def busy(self, start: float = -np.inf, end: float = np.inf) -> list[tuple[float, float]]:
        """Return when the device works, within some time: intervals that do not overlap."""
        merged: list[list[float]] = []
        for span in self.device:
            first, last = max(span.start, start), min(span.end, end)
            if first >= last:
                continue
            if merged and first <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], last)
            else:
                merged.append([first, last])
        return [(first, last) for first, last in merged]

    def busy_seconds(self) -> float:
        """Return the time in which the device works."""
        return sum(last - first for first, last in self.busy()) / 1e6

    def report(self, start: float, end: float) -> dict[str, Any]:
        """Return what happened within some time: the largest kernels, gaps of the device, waits of the host.

        Args:
            start, end: microseconds.
        """
        busy = self.busy(start, end)
        edges = [start, *(edge for pair in busy for edge in pair), end]
        gaps = [(a, b) for a, b in zip(edges[::2], edges[1::2]) if b > a]
        gaps.sort(key=lambda gap: gap[0] - gap[1])
        whole, working = end - start, sum(b - a for a, b in busy)
        by_mark: dict[str, float] = {}
        for a, b in gaps:
            count = _PLACES if b - a > _LONG_GAP else 1
            for place in _places(a, b, count):
                name = _without_number(self._innermost(place, self._marks))
                by_mark[name] = by_mark.get(name, 0.0) + (b - a) / count
        return {
            "wall_us": whole,
            "device_us": working,
            "idle_us": whole - working,
            "idle_share": (whole - working) / whole if whole else 0.0,
            "kernels": self._kernels(start, end),
            "idle_us_by_mark": dict(sorted(by_mark.items(), key=lambda item: -item[1])[:LARGEST]),
            "largest_gaps": [
                {"at_us": a - start, "us": b - a, "host": self._host_in(a, b)} for a, b in gaps[:LARGEST]
            ],
            "marks": self._by_mark(start, end),
            "calls": self._calls(start, end),
        }

    def _kernels(self, start: float, end: float, count: int = 15) -> list[dict[str, Any]]:
        """Return the largest kernels (on a CPU: operators, by the time that is theirs alone)."""
        spans = self.device if self.on_gpu else self.host
        times = [s.end - s.start for s in spans] if self.on_gpu else _own_times(spans)
        found: dict[str, list[float]] = {}
        for span, time in zip(spans, times):
            if start <= span.start < end and (self.on_gpu or span.kind == "cpu_op"):
                entry = found.setdefault(span.name, [0, 0.0])
                entry[0], entry[1] = entry[0] + 1, entry[1] + time
        whole = sum(time for _, time in found.values()) or 1.0
        order = sorted(found.items(), key=lambda item: -item[1][1])[:count]
        return [{"name": name[:120], "count": int(number), "us": time, "share": time / whole}
                for name, (number, time) in order]

    def _by_mark(self, start: float, end: float) -> dict[str, dict[str, float]]:
        """Return number and microseconds of the marks that begin in some time; some lie in others."""
        found: dict[str, dict[str, float]] = {}
        for span in self._marks:
            if start <= span.start < end:
                entry = found.setdefault(_without_number(span.name), {"count": 0, "us": 0.0})
                entry["count"] += 1
                entry["us"] += span.end - span.start
        return found

    def _calls(self, start: float, end: float) -> dict[str, dict[str, float]]:
        """Return number and microseconds of launches, of calls that wait, and of copies to the host."""
        kinds = {"launches": "Launch", "waits": "Synchronize"}
        found = {name: {"count": 0, "us": 0.0} for name in (*kinds, "copies_to_host", "copies_to_device")}
        for span in self.host:
            if span.kind in _RUNTIME and start <= span.start < end:
                for name, part in kinds.items():
                    if part in span.name:
                        found[name]["count"] += 1
                        found[name]["us"] += span.end - span.start
        for span in self.device:
            if span.kind == "gpu_memcpy" and start <= span.start < end:
                name = "copies_to_host" if "DtoH" in span.name else "copies_to_device"
                if "DtoH" in span.name or "HtoD" in span.name:
                    found[name]["count"] += 1
                    found[name]["us"] += span.end - span.start
        return found

    def _host_in(self, start: float, end: float) -> list[dict[str, Any]]:
        """Return what the host did in a gap: the innermost mark and operator, with their share."""
        seen: dict[str, int] = {}
        for place in _places(start, end, _PLACES):
            mark, inner = self._innermost(place, self._marks), self._innermost(place, self.host)
            name = mark if mark == inner else f"{mark}: {inner}"
            seen[name] = seen.get(name, 0) + 1
        order = sorted(seen.items(), key=lambda item: -item[1])[:3]
        return [{"name": name[:120], "share": count / _PLACES} for name, count in order]

    def _innermost(self, place: float, spans: list[Span]) -> str:
        """Return the one of ``spans`` that began last of those that hold a point in time."""
        edges = self._edges[id(spans)]
        last = int(np.searchsorted(edges[:, 0], place, side="right"))
        inside = np.flatnonzero(edges[:last, 1] > place)
        return spans[inside[-1]].name if len(inside) else "Python"


@contextlib.contextmanager
def watching(device: str, host: bool = True, trace: str = "") -> Iterator[list[Timeline]]:
    """Watch a block; the list has its `Timeline` afterwards.

    Args:
        device: where the work is done.
        host: watch operators and marks, too, not only the device (it takes more time).
        trace: file for the whole trace, to be looked at in a browser; empty: it is not kept.

    Raises:
        RuntimeError: not every driver lets itself be watched.
    """
    from torch.profiler import ProfilerActivity, profile

    on_gpu = figures.on_gpu(device)
    activities = [ProfilerActivity.CUDA] if on_gpu else []
    activities += [ProfilerActivity.CPU] if host or not on_gpu else []
    found: list[Timeline] = []
    with profile(activities=activities) as profiler:
        yield found
        figures.wait(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        found.append(Timeline(_read(path), on_gpu))
        if trace:
            shutil.move(path, trace)


def _read(path: Path) -> list[Span]:
    events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    kinds = (*_DEVICE, *_RUNTIME, "cpu_op", "user_annotation")
    return [
        Span(event["name"], event["ts"], event["ts"] + event["dur"], event["cat"], event.get("tid"))
        for event in events
        if event.get("ph") == "X" and event.get("cat") in kinds
    ]


def _without_number(name: str) -> str:
    return name.rstrip("0123456789 ") or name


def _places(start: float, end: float, count: int) -> np.ndarray:
    """Return the middles of ``count`` equal parts."""
    return start + (end - start) * (np.arange(count) + 0.5) / count


def _outermost(spans: Sequence[Span]) -> list[Span]:
    """Return the operators that are in no other operator of their thread."""
    found, until = [], {}
    for span in spans:
        if span.kind == "cpu_op" and span.start >= until.get(span.thread, -np.inf):
            until[span.thread] = span.end
            found.append(span)
    return found


def _own_times(spans: Sequence[Span]) -> list[float]:
    """Return for each span the time in which none of its own spans runs; they are sorted by start."""
    own, open_ = [span.end - span.start for span in spans], {}
    for at, span in enumerate(spans):
        stack = open_.setdefault(span.thread, [])
        while stack and spans[stack[-1]].end <= span.start:
            stack.pop()
        if stack:
            own[stack[-1]] -= span.end - span.start
        stack.append(at)
    return own


def mark(name: str) -> Any:
    """Return a context that marks a block for `Timeline.marks`."""
    return torch.profiler.record_function(name)
