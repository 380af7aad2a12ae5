"""How the C library's allocator treats the large blocks of training on a CPU.
Knows: glibc. Must not know: torch, models.
"""
from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed instead of handing it back to the kernel; return whether it took effect.

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
