"""The number type in which a device computes best.
Knows: torch, the clock. Must not know: models, jobs.
"""
from __future__ import annotations

import functools
import logging
import math
import time

import torch

#: Name of the type that `fast_dtype` finds.
FAST = "fast"


@functools.lru_cache(maxsize=None)
def fast_dtype(kind: str) -> torch.dtype:
    """Return bfloat16 where a device multiplies matrices faster with it than with float32, else float32.

    GPUs have it since Ampere. A CPU without its instructions takes up to ten times as long as with float32,
    and no flag of PyTorch's tells them all apart: a trial by the clock does (milliseconds, once a process).

    Args:
        kind: type of the device: cpu, cuda.
    """
    if kind != "cpu":
        good = kind == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
        return torch.bfloat16 if good else torch.float32
    sides = {dtype: (torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype))
             for dtype in (torch.float32, torch.bfloat16)}
    seconds = dict.fromkeys(sides, math.inf)
    for _ in range(5):  # in turns: what else the machine does meanwhile strikes both
        for dtype, (rows, weights) in sides.items():
            begun = time.perf_counter()
            torch.nn.functional.linear(rows, weights)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - begun)
    found = min(seconds, key=lambda dtype: seconds[dtype])
    times = seconds[torch.bfloat16] / seconds[torch.float32]
    logging.info("this CPU takes %.1f times as long with bfloat16 as with float32: %s is used", times, found)
    return found


def in_bf16(precision: str, device: torch.device) -> bool:
    """Return whether a precision ("bf16", "float32" or `FAST`) is bfloat16 on a device."""
    return precision == "bf16" or (precision == FAST and fast_dtype(device.type) == torch.bfloat16)
