"""Knows: a command and all processes that come of it, also those that leave its group or lose their parent.
Must not know: the purpose of the command.

Every process inherits a word in its environment by which `/proc` finds it (Linux): workers of data loaders,
of process pools and of torchrun have groups or sessions of their own, which `killpg` would leave alive.
"""
from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from pathlib import Path
from typing import Mapping, Sequence

_WORD = "ICEFALL_FUSION_CHAOS"
_PAUSE, _LOOK = 0.005, 0.03  # seconds between two looks: while killing, while waiting


class ProcessTree:
    """A command that runs, and its descendants.

    Args:
        command: program and arguments.
        environment: variables beside those of this process.
        log: file to which its output is appended.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._mark = f"{_WORD}={secrets.token_hex(8)}".encode()
        word, _, value = self._mark.decode().partition("=")
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                list(command), env={**os.environ, **environment, word: value}, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )

    def wait(self) -> int:
        """Return the exit code, when the command has ended."""
        return self._process.wait()

    def processes(self) -> list[int]:
        """Return the ids of all living processes of the tree."""
        numbers = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal():
                try:
                    marked = self._mark in (folder / "environ").read_bytes().split(b"\0")
                except (PermissionError, FileNotFoundError, ProcessLookupError):  # another user's, or gone
                    continue
                if marked:
                    numbers.append(int(folder.name))
        return numbers

    def cpu_seconds(self) -> float:
        """Return the processor time of the tree so far, of living processes and of those they waited for."""
        ticks = 0
        for number in self.processes():
            try:
                line = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            ticks += sum(map(int, line.rpartition(")")[2].split()[11:15]))  # utime stime cutime cstime
        return ticks / os.sysconf("SC_CLK_TCK")

    def wait_for_cpu(self, seconds: float) -> bool:
        """Return True when so much processor time is used, False when the command ends before.

        Other than the clock, it goes on evenly on a machine that is busy with other things.
        """
        while self._process.poll() is None:
            if self.cpu_seconds() >= seconds:
                return True
            time.sleep(_LOOK)
        return False

    def kill(self) -> int:
        """Send SIGKILL to all processes, stopped first so that none sees another one die; return how many.

        Returns:
            the number of processes that were alive.
        """
        stopped: set[int] = set()
        while new := set(self.processes()) - stopped:
            stopped |= {number for number in new if _signal(number, signal.SIGSTOP)}
        while alive := self.processes():
            for number in alive:
                _signal(number, signal.SIGKILL)
            time.sleep(_PAUSE)
        self._process.wait()
        return len(stopped)


def _signal(number: int, which: signal.Signals) -> bool:
    try:
        os.kill(number, which)
    except ProcessLookupError:
        return False
    return True
