"""A command in a process group of its own, with a limit; what it says goes to one log.
Knows: processes, files. Must not know: what is run, results.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple, Optional, Sequence

MOST_LOGGED = 400_000  # bytes of one command, and as many of its end
_GRACE = 4.0  # seconds between asking a group to end and killing it
_LOOK = 0.2  # seconds between two looks


class Outcome(NamedTuple):
    """How a command ended: its exit code (None: it could not be ended), whether it was cut off, seconds."""

    code: Optional[int]
    cut: bool
    seconds: float


def run_command(
    command: Sequence[str],
    limit: float,
    said: Path,
    environment: Mapping[str, str],
    meanwhile: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run a command to its end or its limit; all processes of its group are gone then.

    Args:
        command: program and arguments.
        limit: seconds.
        said: a new file for its standard output and errors.
        environment: of the process.
        meanwhile: called a few times a second.
    """
    begun = time.monotonic()
    with open(said, "wb") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=0,
            )
        except OSError as error:
            output.write(f"{error}\n".encode())
            return Outcome(127, False, 0.0)
        try:
            while process.poll() is None and time.monotonic() - begun < limit:
                time.sleep(_LOOK)
                meanwhile()
            cut = process.poll() is None
        finally:  # also when this process is told to end
            end_group(process)
    return Outcome(process.poll(), cut, time.monotonic() - begun)


def at_once(tasks: Sequence[Callable[..., Any]]) -> None:
    """Call functions beside each other; where one fails, or this thread is told to end, all end.

    Args:
        tasks: each has a parameter ``meanwhile``, for `run_command`, by which it is told to end.
    """
    over = threading.Event()

    def look() -> None:
        if over.is_set():
            raise InterruptedError("another task failed, or all were told to end")

    with ThreadPoolExecutor(max(1, len(tasks))) as pool:
        try:
            for done in [pool.submit(task, meanwhile=look) for task in tasks]:
                done.result()
        except BaseException:
            over.set()
            raise


def end_group(process: subprocess.Popen) -> None:
    """End a process and its group: by asking, then by force; one that hangs in a driver stays."""
    for name in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, name)
        except ProcessLookupError:
            break
        until = time.monotonic() + _GRACE
        while _lives(process) and time.monotonic() < until:
            time.sleep(0.05)
        if not _lives(process):
            break


def _lives(process: subprocess.Popen) -> bool:
    """Return whether any process of the group is there; its first one is waited for."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


class Log:
    """One file with what all commands said, each cut in the middle when it says too much.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab")
        self._source: Optional[Path] = None
        self._copied = 0

    def say(self, line: str) -> None:
        """Add a line, here and on standard output."""
        print(line, flush=True)
        self._write(f"{line}\n".encode())

    def follow(self, source: Path) -> None:
        """Copy from now on what a command's file has; see `copy`."""
        self._source, self._copied = source, 0

    def copy(self) -> None:
        """Copy what is new."""
        if self._source is None or not self._source.exists() or self._copied >= MOST_LOGGED:
            return
        with open(self._source, "rb") as file:
            file.seek(self._copied)
            new = file.read(MOST_LOGGED - self._copied)
        self._copied += len(new)
        self._write(new)

    def close_source(self) -> list[str]:
        """Copy the rest, or its end if it is long; return the last lines."""
        self.copy()
        source, self._source = self._source, None
        if source is None or not source.exists():
            return []
        size = source.stat().st_size
        with open(source, "rb") as file:
            file.seek(max(0, size - MOST_LOGGED))
            end = file.read()
        if size > self._copied:
            self._write(f"\n[... {size:,} bytes in all; their end:]\n".encode())
            self._write(end[-min(MOST_LOGGED, size - self._copied) :])
        return [line for line in end.decode(errors="replace").splitlines() if line.strip()]

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._file.flush()


def stop_on_signals() -> None:
    """Turn a request to end into SystemExit, so that a running command's group is ended and results stay."""

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, stop)
