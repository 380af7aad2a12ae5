"""One training loop for every model: steps, accumulation, bf16, data parallel, limits, resume, logs.
Knows: a module, a loss function, batch sources. Must not know: audio, text, what the model computes.
"""
from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Optional, Protocol, Union

import torch
import torch.distributed as dist
from torch import Tensor, nn

from icefall_fusion.common.processes import (
    init_distributed,
    merge_over_processes,
    sum_over_processes,
    to_device,
)
from icefall_fusion.train.checkpoints import (
    checkpoint_path,
    load_checkpoint,
    newest_checkpoint,
    random_states,
    save_checkpoint,
    seed_everything,
    set_random_states,
)
from icefall_fusion.train.journal import Journal, StopSignals
from icefall_fusion.train.optimizers import make_optimizer
from icefall_fusion.train.options import TrainerOptions

__all__ = ["BatchSource", "LossFunction", "STOPPED", "Trainer", "TrainerOptions", "init_distributed"]

STOPPED = 4  # exit code of a training that ended, with a checkpoint, before its last step
Metrics = dict[str, Any]
#: (model, batch) -> (summed loss, number of items it was summed over, further sums over the same batch).
LossFunction = Callable[[nn.Module, Any], tuple[Tensor, Union[int, float, Tensor], Metrics]]


class BatchSource(Protocol):
    """Batches that can be put back to where a killed run had been.

    ``__iter__`` goes on from the current position to the end of the epoch; the next ``__iter__`` begins
    the next epoch. ``state_dict()``, asked while batch n is in use, must lead on to batch n + 1.
    """

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Trainer:
    """Train until ``max_steps``, ``max_minutes`` or a signal, going on from the newest checkpoint.

    Args:
        options: see TrainerOptions.
        model: on ``device``; its ``forward`` must be what ``compute_loss`` calls (data parallel needs it).
        compute_loss: see LossFunction; runs under autocast when ``precision`` is bf16.
        train_batches: a BatchSource; with several processes each has its own share of the batches.
        valid_batches: can be iterated again and again.
        folder: gets checkpoints, ``log.jsonl`` and tensorboard events.
        device: of the model.
        on_save: called (first process only) with the step after each checkpoint, e.g. to export the model.
        describe: turns validation means ({"loss", "weight", metrics...}) into further values to log.
    """

    def __init__(
        self,
        options: TrainerOptions,
        model: nn.Module,
        compute_loss: LossFunction,
        train_batches: BatchSource,
        valid_batches: Iterable[Any],
        folder: Union[str, Path],
        device: Union[str, torch.device] = "cpu",
        on_save: Optional[Callable[[int], None]] = None,
        describe: Optional[Callable[[dict[str, float]], dict[str, float]]] = None,
    ) -> None:
        self.options, self.model, self.compute_loss = options, model, compute_loss
        self.train_batches, self.valid_batches = train_batches, valid_batches
        self.folder, self.device = Path(folder), torch.device(device)
        self.on_save, self.describe = on_save, describe
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.optimizer = make_optimizer(model, options)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.step = self.items_seen = self.skipped = self.skipped_in_row = 0
        self.seconds_before = self.step_seconds = self.wait_seconds = 0.0
        self.last_valid: dict[str, float] = {}
        self.agreed_stop = ""
        self.started = self.saved_at = time.monotonic()
        self.wrapped: nn.Module = model
        if self.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.wrapped = nn.parallel.DistributedDataParallel(model, device_ids=ids)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journal, self.signals = Journal(self.folder, self.rank == 0, options.tensorboard), StopSignals()
        seed_everything(options.seed + self.rank)
        self.resume()

    # The loop.

    def run(self) -> dict[str, Any]:
        """Train; return {"step", "reason", "valid", "skipped", "minutes", "data_wait"}.

        ``reason`` is "max_steps", "max_minutes" or "signal"; ``data_wait`` is the share of the steps' time in
        which they waited for a batch (of this run and process).

        Raises:
            RuntimeError: ``nan_limit`` steps in a row had a non-finite loss or gradient norm.
            ValueError: the source gives no batches.
        """
        self.started = self.saved_at = time.monotonic()
        saved_step = self.step if newest_checkpoint(self.folder) else -1
        batches, reason = self._endless(), ""
        with self.journal.opened(self.options.max_steps, self.step), self.signals:
            while not (reason := self._reason_to_stop()):
                begun = time.monotonic()
                values = self._train_step(batches)
                self.step_seconds += time.monotonic() - begun
                self._report_step(values)
                if self.options.valid_every_steps and self.step % self.options.valid_every_steps == 0:
                    self.validate()
                if self._time_to_save(values["save"]):
                    self.save()
                    saved_step = self.step
            if self.last_valid.get("step") != self.step:
                self.validate()
            if saved_step != self.step:
                self.save()
        minutes = self._seconds() / 60
        return {"step": self.step, "reason": reason, "valid": self.last_valid, "skipped": self.skipped,
                "minutes": minutes, "data_wait": self.data_wait}

    @property
    def data_wait(self) -> float:
        """Share of the steps' time, 0 to 1, in which they waited for a batch."""
        return self.wait_seconds / max(self.step_seconds, 1e-9)

    def _train_step(self, batches: Iterator[Any]) -> dict[str, float]:
        """One optimizer step over ``accumulate`` batches; gradients are of the mean over all items."""
        lr = self.options.rate(self.step)
        self.model.train()
        totals: dict[str, Any] = {"loss": 0.0, "weight": 0.0}
        for part in range(self.options.accumulate):
            begun = time.monotonic()
            batch = next(batches)
            self.wait_seconds += time.monotonic() - begun
            batch = to_device(batch, self.device)
            last = part == self.options.accumulate - 1
            # Gradients travel between processes once a step, with the last batch.
            quiet = contextlib.nullcontext() if last or self.world == 1 else self.wrapped.no_sync()
            with quiet:
                with self._autocast():
                    loss, weight, metrics = self.compute_loss(self.wrapped, batch)
                loss.backward()
            for name, value in {"loss": loss.detach(), "weight": weight, **metrics}.items():
                totals[name] = totals.get(name, 0.0) + value
        wishes = self._wishes()
        values = sum_over_processes({**totals, **wishes}, self.device)
        wishes = {name: values.pop(name) for name in wishes}
        self.agreed_stop = "max_minutes" if wishes["late"] else "signal" if wishes["signal"] else ""
        norm = self._apply_gradients(values["weight"], math.isfinite(values["loss"]), lr)
        self.step += 1
        self.items_seen += int(values["weight"])
        means = {name: value / max(values["weight"], 1.0) for name, value in values.items()}
        return {**means, "weight": values["weight"], "lr": lr, "grad_norm": norm, "save": wishes["save"]}

    def _apply_gradients(self, weight: float, loss_is_finite: bool, lr: float) -> float:
        """Scale summed gradients to the mean, clip, step or skip; return the norm of the mean gradient."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        scale = self.world / max(weight, 1.0)  # data parallel has divided the sum by the world size
        norm = float(nn.utils.get_total_norm(grads)) * scale
        if not (loss_is_finite and math.isfinite(norm)):
            self._skip_step()
        else:
            self.skipped_in_row = 0
            clip = self.options.grad_clip
            torch._foreach_mul_(grads, scale * min(1.0, clip / (norm + 1e-6)) if clip else scale)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _skip_step(self) -> None:
        self.skipped += 1
        self.skipped_in_row += 1
        self._log_line({"skipped": self.skipped, "skipped_in_row": self.skipped_in_row})
        if self.skipped_in_row >= self.options.nan_limit:
            raise RuntimeError(
                f"training stopped at step {self.step}: the loss or the gradient norm was not finite in "
                f"{self.skipped_in_row} steps in a row (nan_limit={self.options.nan_limit}); "
                f"newest checkpoint: {newest_checkpoint(self.folder)}"
            )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss and metrics over the validation batches; one line in ``log.jsonl``."""
        self.model.eval()
        totals: dict[str, Any] = {"loss": 0.0, "weight": 0.0}
        for batch in self.valid_batches:
            with self._autocast():
                loss, weight, metrics = self.compute_loss(self.model, to_device(batch, self.device))
            for name, value in {"loss": loss, "weight": weight, **metrics}.items():
                totals[name] = totals.get(name, 0.0) + value
        sums = merge_over_processes(totals)
        means = {name: value / max(sums["weight"], 1.0) for name, value in sums.items()}
        means["weight"] = sums["weight"]
        if self.describe:
            means.update(self.describe(means))
        self.last_valid = {"step": self.step, **means}
        line = {f"valid_{name}": value for name, value in means.items()}
        self._log_line({**line, "data_wait": round(self.data_wait, 4)})
        self.journal.scalars("valid", means, self.step)
        return means

    # Checkpoints.

    def save(self) -> None:
        """Write ``checkpoint-STEP.pt`` (first process) and call ``on_save``."""
        states = [{"rng": random_states(), "batches": self.train_batches.state_dict()}]
        if self.world > 1:
            mine, states = states[0], [None] * self.world
            dist.all_gather_object(states, mine)
        if self.rank == 0:
            state = {
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "step": self.step, "items_seen": self.items_seen, "skipped": self.skipped,
                "seconds": self._seconds(), "processes": states, "last_valid": self.last_valid,
                "options": dataclasses.asdict(self.options),
            }
            save_checkpoint(state, checkpoint_path(self.folder, self.step), self.options.keep_checkpoints)
            if self.on_save:
                self.on_save(self.step)
                set_random_states(states[0]["rng"])  # it may draw numbers, which a resumed run will not
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        """Go on from the newest checkpoint of the folder, if there is one."""
        path = newest_checkpoint(self.folder)
        if path is None:
            return
        state = load_checkpoint(path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.items_seen, self.skipped = state["step"], state["items_seen"], state["skipped"]
        self.seconds_before, self.last_valid = state["seconds"], state["last_valid"]
        processes = state["processes"]
        same_world = len(processes) == self.world
        mine = processes[self.rank] if same_world else processes[0]
        self.train_batches.load_state_dict(mine["batches"])
        if same_world:
            set_random_states(mine["rng"])
        else:
            self.journal.say(f"{len(processes)} processes wrote {path}, now {self.world} go on: the rest of "
                             f"this epoch does not hold just what was left of it")
        self.journal.say(f"resumed from {path} at step {self.step}")

    # Small parts.

    def _endless(self) -> Iterator[Any]:
        empty_epochs = 0  # a run resumed exactly at the end of an epoch sees one, never two in a row
        while empty_epochs < 2:
            empty_epochs += 1
            for batch in self.train_batches:
                empty_epochs = 0
                yield batch
        raise ValueError("train_batches must yield at least one batch an epoch, but yields none")

    def _autocast(self) -> Any:
        enabled = self.options.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _reason_to_stop(self) -> str:
        if self.step >= self.options.max_steps:
            return "max_steps"
        return self.agreed_stop

    def _wishes(self) -> dict[str, float]:
        """What this process wants next; summed over processes, so that all stop and save together."""
        now = time.monotonic()
        late = 0 < self.options.max_minutes * 60 <= now - self.started
        save = 0 < self.options.save_every_minutes * 60 <= now - self.saved_at
        return {"late": float(late), "signal": float(self.signals.heard), "save": float(save)}

    def _time_to_save(self, wish: float) -> bool:
        every = self.options.save_every_steps
        return wish > 0 or (every > 0 and self.step % every == 0)

    def _report_step(self, values: dict[str, float]) -> None:
        if self.step % self.options.log_every_steps:
            self.journal.advance()
            return
        rate = self.items_seen / max(self._seconds(), 1e-9)
        loss, norm = values["loss"], values["grad_norm"]
        self.journal.advance(f"loss {loss:.3f} norm {norm:.2f} {rate:.0f} items/s skipped {self.skipped}")
        more = {"skipped": float(self.skipped), "items_per_second": rate, "data_wait": self.data_wait}
        self.journal.scalars("train", {**values, **more}, self.step)

    def _log_line(self, values: dict[str, Any]) -> None:
        minutes = round(self._seconds() / 60, 3)
        self.journal.line({"step": self.step, "items": self.items_seen, "minutes": minutes, **values})
