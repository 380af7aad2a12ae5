"""Freed memory is given back when the process has grown, and only then.
Knows: the resident set. Must not know: models, what allocates.
"""
from __future__ import annotations

import sys

import numpy as np
import pytest

from icefall_fusion.common import memory
from icefall_fusion.common.memory import FreedMemory, resident_bytes

MB = 1_000_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the resident set is read from /proc")
def test_freed_memory_is_given_back_after_growth(monkeypatch) -> None:
    calls, left, plain = [], [], memory.give_back_memory

    def give_back() -> None:
        calls.append(resident_bytes())
        plain()
        left.append(resident_bytes())

    monkeypatch.setattr(memory, "give_back_memory", give_back)
    watch = FreedMemory(32 * MB)
    watch.watch()
    watch.watch()
    assert len(calls) == 1  # the first call finds out how much the process needs
    held = np.ones(8 * MB, np.float64)
    watch.watch()
    watch.watch()
    assert len(calls) == 2 and calls[1] - left[0] > 32 * MB and held.sum() == 8 * MB
    del held
    watch.watch()
    assert len(calls) == 2
