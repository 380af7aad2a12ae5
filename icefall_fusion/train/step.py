"""One optimizer step: accumulation, bf16, data parallel, clipping; steps that are not finite are skipped.
Knows: a module, a loss function, batches. Must not know: how long a training lasts, checkpoints, logs.
"""
from __future__ import annotations

import contextlib
import time
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Union

import torch
import torch.distributed as dist
from torch import Tensor, nn

from icefall_fusion.common.precision import in_bf16
from icefall_fusion.common.processes import sum_over_processes, to_device
from icefall_fusion.train.late_values import LateValues
from icefall_fusion.train.optimizers import make_optimizer
from icefall_fusion.train.options import TrainerOptions

Metrics = dict[str, Any]
#: (model, batch) -> (summed loss, number of items it was summed over, further sums over the same batch).
LossFunction = Callable[[nn.Module, Any], tuple[Tensor, Union[int, float, Tensor], Metrics]]


class Report(NamedTuple):
    """What a step tells, some of it still on the device; see `TrainingStep.read`."""

    values: LateValues
    requests: tuple[str, ...]  # names of the numbers of ``ask``
    lr: float


class TrainingStep:
    """The model, its optimizer and its loss; a call is one optimizer step.

    Args:
        options: see TrainerOptions.
        model: on ``device``; its ``forward`` must be what ``compute_loss`` calls (data parallel needs it).
        compute_loss: see LossFunction; runs under autocast where ``precision`` means bf16.
        device: of the model.

    Attributes:
        deferred: the host does not wait for a step: the device skips it by itself if it is not finite, and
            its figures are read later. So it is on CUDA.
        skipped: steps without an update, as the loss or the gradient norm was not finite.
        skipped_in_row: those since the last update.
        wait_seconds: spent waiting for batches.
    """

    def __init__(
        self, options: TrainerOptions, model: nn.Module, compute_loss: LossFunction, device: torch.device
    ) -> None:
        self.options, self.model, self.compute_loss, self.device = options, model, compute_loss, device
        self.deferred = device.type == "cuda"
        self.optimizer = make_optimizer(model, options)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.skipped = self.skipped_in_row = 0
        self.wait_seconds = 0.0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.wrapped: nn.Module = model
        if self.world > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.wrapped = nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def __call__(self, batches: Iterator[Any], lr: float, ask: Callable[[], Mapping[str, float]]) -> Report:
        """Do one step over ``accumulate`` batches; gradients are of the mean over all items.

        Args:
            batches: of this process.
            lr: learning rate.
            ask: called after the last backward; its numbers are summed over the processes with the loss.

        Returns:
            what `read` takes, at once or after the next step.
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
        norm, finite = self._update(values["weight"], values["loss"], lr)
        return Report(LateValues({**values, "grad_norm": norm, "finite": finite}), tuple(requests), lr)

    def read(self, report: Report) -> tuple[dict[str, float], dict[str, float]]:
        """Return the figures of a step, once and in the order of the steps.

        Returns:
            means an item ({"loss", metrics...}), with "weight" (the number of items), "lr" and "grad_norm";
            the summed numbers of ``ask``.
        """
        values = report.values.read()
        answers = {name: values.pop(name) for name in report.requests}
        norm, finite = values.pop("grad_norm"), values.pop("finite")
        self.skipped += not finite
        self.skipped_in_row = 0 if finite else self.skipped_in_row + 1
        return {**means(values), "lr": report.lr, "grad_norm": norm}, answers

    def loss_of(self, model: nn.Module, batch: Any) -> tuple[Tensor, Metrics]:
        """Return the summed loss of a batch and all its sums: "loss", "weight" (items) and metrics."""
        autocast = in_bf16(self.options.precision, self.device)
        batch = to_device(batch, self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=autocast):
            loss, weight, metrics = self.compute_loss(model, batch)
        return loss, {"loss": loss.detach(), "weight": weight, **metrics}

    def _update(self, weight: Any, loss: Any, lr: float) -> tuple[Tensor, Tensor]:
        """Scale summed gradients to the mean, clip, step or skip.

        Returns:
            the norm of the mean gradient; whether it and the loss are finite, and so the step was done.
        """
        grads = [p.grad for p in self.parameters if p.grad is not None]
        weight = torch.as_tensor(weight, dtype=torch.float64)
        # Data parallel has divided the sum by the world size.
        scale = self.world / weight.clamp(min=1.0)
        norm = nn.utils.get_total_norm(grads).double() * scale
        finite = torch.isfinite(norm) & torch.isfinite(torch.as_tensor(loss, device=norm.device))
        if self.deferred or bool(finite):
            clip = self.options.grad_clip
            factor = scale * (clip / (norm + 1e-6)).clamp(max=1.0) if clip else scale
            if grads:  # of the gradients' type: else foreach would take them one by one
                torch._foreach_mul_(grads, factor.to(grads[0].device, grads[0].dtype, non_blocking=True))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step((~finite).to(torch.float32) if self.deferred else None)
        self.optimizer.zero_grad(set_to_none=True)
        return norm, finite


def add_sums(totals: dict[str, Any], sums: Metrics) -> None:
    """Add the sums of a batch to those of earlier ones."""
    for name, value in sums.items():
        totals[name] = totals.get(name, 0.0) + value


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Return every sum divided by "weight", which itself stays."""
    weight = sums["weight"]
    return {name: value / max(weight, 1.0) for name, value in sums.items()} | {"weight": weight}
