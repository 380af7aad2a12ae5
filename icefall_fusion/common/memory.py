"""Memory of this process and its GPU: in use, the peak, freed memory that the C library keeps.
Knows: /proc, glibc, CUDA's counters. Must not know: models, searches.
"""
from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


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
    """Return the memory in use now: the GPU's where one is used, else resident."""
    cuda = _cuda()
    if cuda is not None and cuda.memory_allocated() > 0:
        return int(cuda.memory_allocated())
    return resident_bytes()


def resident_bytes() -> int:
    """Return the resident set of this process now."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_rss_bytes()


def give_back_memory() -> None:
    """Give freed memory that the C library keeps back to the system (glibc; elsewhere nothing happens).

    A decode allocates blocks of ever new sizes, and freed blocks are kept in fragments: without this a run of
    hours took three times the memory it needed.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


class FreedMemory:
    """Gives freed memory back when the process has grown, and not more often: it takes some 35 ms, and what
    it gives back is mapped anew.

    Args:
        growth: bytes by which the resident set grows before that.
    """

    def __init__(self, growth: int) -> None:
        self._growth, self._least = growth, 0

    def watch(self) -> None:
        """Give freed memory back if it is time; call it after each piece of work."""
        if resident_bytes() > self._least + self._growth:
            give_back_memory()
            self._least = resident_bytes()


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


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory instead of giving it back to the kernel; return whether it took effect.

    Activations of a training step are tens of megabytes each: by default every one is a fresh mapping whose
    pages the kernel must zero again, which took a sixth of a step on a CPU.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28))
    return all(mallopt(name, value) == 1 for name, value in settings)
