"""The exponential moving average of a model's weights.
Knows: parameters of a module. Must not know: optimizers, data, files.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from icefall_fusion.common.checks import check


class Ema:
    """Averages ``mean += (1 - decay) * (weight - mean)`` of trained parameters (Polyak and Juditsky 1992).

    The decay of update n (from 0) is ``min(decay, (1 + n) / (10 + n))``, so a young average forgets the first
    weights soon. An update is one call for all weights and never waits for the device.

    Args:
        model: its trained parameters are averaged; all else is taken from it as it is.
        decay: from 0 to below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        check(0 <= decay < 1, "decay", "be in [0, 1)", decay)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(named), list(named.values())
        self.decay, self.updates = decay, 0
        self.means = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights of now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.means, [p.detach() for p in self.parameters], 1 - decay)
        self.updates += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averages inside a ``with`` block, and its own weights back afterwards."""
        kept = [p.detach().clone() for p in self.parameters]
        weights = [p.detach() for p in self.parameters]
        torch._foreach_copy_(weights, self.means)
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)

    def state_dict(self) -> dict[str, Any]:
        """Return {"updates": their number, "weights": {name of the parameter: average}}."""
        return {"updates": self.updates, "weights": dict(zip(self.names, self.means))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` returned.

        Raises:
            ValueError: it belongs to other parameters.
        """
        odd = sorted(set(self.names) ^ set(state["weights"]))[:3]
        check(not odd, "the averages of the checkpoint", "be of the parameters that are trained", odd)
        for name, mean in zip(self.names, self.means):
            mean.copy_(state["weights"][name])
        self.updates = state["updates"]
