"""Figures of a step that are still on the device: they are copied while the next step is under way.
Knows: numbers and scalar tensors. Must not know: what they mean.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class LateValues:
    """Numbers by name, some of them scalar tensors; ``read`` waits for these tensors, and for nothing later.

    Args:
        values: numbers and scalar tensors.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.names = list(values)
        self.numbers = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        tensors = [values[name].detach().double().reshape(()) for name in values if name not in self.numbers]
        self.late, self.event = torch.stack(tensors) if tensors else torch.zeros(0), None
        if self.late.is_cuda:
            host = torch.empty(self.late.shape, dtype=self.late.dtype, pin_memory=True)
            self.late = host.copy_(self.late, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> dict[str, float]:
        """Return all values, in their order."""
        if self.event is not None:
            self.event.synchronize()
        tensors = iter(self.late.tolist())
        return {name: self.numbers[name] if name in self.numbers else next(tensors) for name in self.names}
