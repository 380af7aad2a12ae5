"""What a training writes while it runs (progress bar, tensorboard, JSON lines), and the signals that stop it.
Knows: names, numbers, files. Must not know: models, data, optimizers.
"""
from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from icefall_fusion.common.files import PathLike, name_full_disk


class TrainingLog:
    """Progress bar, tensorboard events and ``log.jsonl`` of one process.

    Args:
        folder: gets ``log.jsonl`` and ``tensorboard/``.
        enabled: False (all processes but the first) writes nothing.
        tensorboard: write event files.
    """

    def __init__(self, folder: Path, enabled: bool = True, tensorboard: bool = True) -> None:
        self.folder, self.enabled, self.tensorboard = folder, enabled, tensorboard
        self.bar: Any = None
        self.board: Any = None

    @contextlib.contextmanager
    def opened(self, total: int, done: int) -> Iterator[None]:
        """Show a bar of ``total`` steps, ``done`` of them done; keep the event file open meanwhile."""
        if not self.enabled:
            yield
            return
        from tqdm import tqdm

        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder / "tensorboard"))
        interval = 0.5 if sys.stderr.isatty() else 30.0  # a log file needs no animation
        try:
            with tqdm(total=total, initial=done, mininterval=interval, unit="step") as self.bar:
                yield
        finally:
            if self.board is not None:
                self.board.close()
            self.bar = self.board = None

    def advance(self, text: str = "") -> None:
        """Count one step; show ``text`` behind the bar unless it is empty."""
        if self.bar is not None:
            if text:
                self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(1)

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Write values to tensorboard under ``group/name``."""
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{group}/{name}", value, step)

    def line(self, values: Mapping[str, Any]) -> None:
        """Append one line to ``log.jsonl``."""
        if self.enabled:
            path = self.folder / "log.jsonl"
            with name_full_disk(path), open(path, "a", encoding="utf-8") as log:
                log.write(json.dumps(dict(values)) + "\n")

    def print(self, text: str) -> None:
        """Print one line to stderr."""
        if self.enabled:
            print(text, file=sys.stderr, flush=True)


def read_validations(log: PathLike) -> list[dict[str, Any]]:
    """Return the lines of a ``log.jsonl`` that have a validation; none if there is no file."""
    if not Path(log).is_file():
        return []
    lines = [json.loads(line) for line in Path(log).read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "valid_loss" in line]


class StopSignals:
    """Turns SIGTERM and SIGINT into ``received = True`` inside its ``with`` block (main thread only)."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *details: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True
