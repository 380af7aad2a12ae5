"""What a device can do at best, measured in the same run as what is compared with it.
Knows: tensors on a device. Must not know: what is compared.
"""
from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import figures


def rates(device: str, dtype: str) -> tuple[float, float]:
    """Return bytes a second of a copy (read and written), and matrix operations a second (2 a product).

    Args:
        device: e.g. cpu or cuda.
        dtype: of the matrices, e.g. bfloat16. Their entries are random: a GPU is faster with zeros.
    """
    kind = getattr(torch, dtype)
    size = 2**30 if figures.on_gpu(device) else 2**25
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192 if figures.on_gpu(device) else 1024
    left, right = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
    copy = figures.least_seconds(lambda: target.copy_(source), 7, device)
    multiply = figures.least_seconds(lambda: left @ right, 7, device)
    return 2 * size / copy, 2 * side**3 / multiply
