"""One optimizer step: accumulation, bf16, data parallel, clipping; steps that are not finite are skipped.
Knows: a module, a loss function, batches. Must not know: how long a training lasts, checkpoints, logs.
"""
from __future__ import annotations

import contextlib
import math
import time
from typing import Any, Callable, Iterator, Mapping, Union

import torch
import torch.distributed as dist
from torch import Tensor, nn

from icefall_fusion.common.processes import sum_over_processes, to_device
from icefall_fusion.train.optimizers import make_optimizer
from icefall_fusion.train.options import TrainerOptions

Metrics = dict[str, Any]
#: (model, batch) -> (summed loss, number of items it was summed over, further sums over the same batch).
LossFunction = Callable[[nn.Module, Any], tuple[Tensor, Union[int, float, Tensor], Metrics]]


class TrainingStep:
    """The model, its optimizer and its loss; a call is one optimizer step.

    Args:
        options: see TrainerOptions.
        model: on ``device``; its ``forward`` must be what ``compute_loss`` calls (data parallel needs it).
        compute_loss: see LossFunction; runs under autocast when ``precision`` is bf16.
        device: of the model.

    Attributes:
        skipped: steps without an update, as the loss or the gradient norm was not finite.
        skipped_in_row: those since the last update.
        wait_seconds: spent waiting for batches.
    """

    def __init__(
        self, options: TrainerOptions, model: nn.Module, compute_loss: LossFunction, device: torch.device
    ) -> None:
        self.options, self.model, self.compute_loss, self.device = options, model, compute_loss, device
        self.optimizer = make_optimizer(model, options)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.skipped = self.skipped_in_row = 0
        self.wait_seconds = 0.0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.wrapped: nn.Module = model
        if self.world > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.wrapped = nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def __call__(
        self, batches: Iterator[Any], lr: float, ask: Callable[[], Mapping[str, float]]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Do one step over ``accumulate`` batches; gradients are of the mean over all items.

        Args:
            batches: of this process.
            lr: learning rate.
            ask: called after the last backward; its numbers are summed over the processes with the loss.

        Returns:
            means an item ({"loss", metrics...}), with "weight" (the number of items), "lr" and "grad_norm";
            the summed numbers of ``ask``.
        """
        self.model.train()
        totals: dict[str, Any] = {}
        for left in reversed(range(self.options.accumulate)):
            begun = time.monotonic()
            batch = next(batches)
            self.wait_seconds += time.monotonic() - begun
            # Gradients travel between processes once a step, with the last batch.
            quiet = self.wrapped.no_sync() if left and self.world > 1 else contextlib.nullcontext()
            with quiet:
                loss, sums = self.loss_of(self.wrapped, batch)
                loss.backward()
            add_sums(totals, sums)
        requests = ask()
        values = sum_over_processes({**totals, **requests}, self.device)
        answers = {name: values.pop(name) for name in requests}
        norm = self._update(values["weight"], math.isfinite(values["loss"]), lr)
        return {**means(values), "lr": lr, "grad_norm": norm}, answers

    def loss_of(self, model: nn.Module, batch: Any) -> tuple[Tensor, Metrics]:
        """Return the summed loss of a batch and all its sums: "loss", "weight" (items) and metrics."""
        autocast = self.options.precision == "bf16"
        batch = to_device(batch, self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=autocast):
            loss, weight, metrics = self.compute_loss(model, batch)
        return loss, {"loss": loss.detach(), "weight": weight, **metrics}

    def _update(self, weight: float, loss_is_finite: bool, lr: float) -> float:
        """Scale summed gradients to the mean, clip, step or skip; return the norm of the mean gradient."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        scale = self.world / max(weight, 1.0)  # data parallel has divided the sum by the world size
        norm = float(nn.utils.get_total_norm(grads)) * scale
        if not (loss_is_finite and math.isfinite(norm)):
            self.skipped += 1
            self.skipped_in_row += 1
        else:
            self.skipped_in_row = 0
            clip = self.options.grad_clip
            torch._foreach_mul_(grads, scale * min(1.0, clip / (norm + 1e-6)) if clip else scale)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def add_sums(totals: dict[str, Any], sums: Metrics) -> None:
    """Add the sums of a batch to those of earlier ones."""
    for name, value in sums.items():
        totals[name] = totals.get(name, 0.0) + value


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Return every sum divided by "weight", which itself stays."""
    weight = sums["weight"]
    return {name: value / max(weight, 1.0) for name, value in sums.items()} | {"weight": weight}
