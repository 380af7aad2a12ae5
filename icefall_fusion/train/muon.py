"""Muon whose Newton-Schulz iterations run for all matrices of a shape at once.
Knows: matrices and their gradients. Must not know: models, schedules.
"""
from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Optional

import torch
from torch import Tensor

from icefall_fusion.common.precision import fast_dtype


class BatchedMuon(torch.optim.Muon):
    """``torch.optim.Muon`` in a few calls a step, equal to it within rounding; states can be exchanged.

    torch's own works on one matrix after the other, some 30 calls each. Here all matrices of one shape, the
    tall ones turned, go through every product together. Updates have the size of AdamW's (Liu et al. 2025,
    arXiv 2502.16982, section 2.2).

    Args:
        params: matrices.
        lr: learning rate.
        weight_decay: decoupled decay.

    Attributes:
        found_inf: scalar tensor, as `torch.amp.GradScaler` sets it: above 0, the step changes nothing (and
            the host need not know). None: every step counts.
    """

    found_inf: Optional[Tensor] = None

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Do one step; a closure is not supported."""
        assert closure is None, "BatchedMuon.step takes no closure"
        for group in self.param_groups:
            shapes: dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    tall = p.shape[0] > p.shape[1]
                    shapes.setdefault((min(p.shape), max(p.shape)), ([], []))[tall].append(p)
            weights, updates = [], []
            for wide, tall in shapes.values():
                weights += [*wide, *tall]
                updates += self._updates(wide, tall, group)
            if weights:
                keep: Any = 1 - group["lr"] * group["weight_decay"]
                if self.found_inf is not None:
                    keep = torch.where(self.found_inf > 0, 1.0, keep)
                torch._foreach_mul_(weights, keep)
                torch._foreach_add_(weights, updates)

    def _updates(self, wide: list[Tensor], tall: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Move the momentum of the matrices of one shape; return what is to be added to them."""
        params = [*wide, *tall]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        grads = _stack([p.grad for p in params], len(wide))
        momentum = _stack(buffers, len(wide))
        if self.found_inf is not None:  # with its own momentum as gradient, the momentum stays
            grads = torch.where(self.found_inf > 0, momentum, grads)
        momentum.lerp_(grads, 1 - group["momentum"])
        torch._foreach_copy_(buffers, _unstack(momentum, len(wide)))
        update = grads.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        update = orthogonalized(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        step: Any = -group["lr"] * 0.2 * math.sqrt(max(params[0].shape))
        if self.found_inf is not None:
            step = torch.where(self.found_inf > 0, 0.0, step)
        return _unstack(update.to(params[0].dtype) * step, len(wide))


def orthogonalized(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Return about U V^T of every matrix U S V^T by Newton-Schulz (Jordan et al. 2024).

    Args:
        matrices: [N,rows,columns] with rows <= columns.
        coefficients: of the quintic iteration.
        steps: iterations.
        eps: least norm that is divided by.
    """
    a, b, c = coefficients
    x = matrices.to(fast_dtype(matrices.device.type))  # bfloat16 is exact enough (the same paper)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _stack(matrices: list[Tensor], wide: int) -> Tensor:
    """Return [N,rows,columns] of wide matrices and tall ones, which are turned."""
    parts = [torch.stack(matrices[:wide])] if wide else []
    if wide < len(matrices):
        parts.append(torch.stack(matrices[wide:]).mT)
    return torch.cat(parts)


def _unstack(stacked: Tensor, wide: int) -> list[Tensor]:
    """Return the matrices that ``_stack`` joined, each contiguous, which makes foreach calls one kernel."""
    return [*stacked[:wide].unbind(), *stacked[wide:].mT.contiguous().unbind()]
