"""One training loop for every model: limits, validation, checkpoints, resume, logs.
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
from torch import nn

from icefall_fusion.common.processes import gather_over_processes, merge_over_processes
from icefall_fusion.train.checkpoints import (
    DoesNotFit,
    checkpoint_path,
    load_checkpoint,
    newest_checkpoint,
    random_states,
    save_checkpoint,
    seed_everything,
    set_random_states,
)
from icefall_fusion.train.clock import Clock
from icefall_fusion.train.ema import Ema
from icefall_fusion.train.options import TrainerOptions
from icefall_fusion.train.step import LossFunction, Report, TrainingStep, add_sums, means
from icefall_fusion.train.training_log import StopSignals, TrainingLog

FINISHED = "finished"  # the reason to stop of a training that has done its last step


class BatchSource(Protocol):
    """Batches that a resumed run can continue.

    ``__iter__`` goes on from the current position to the end of the epoch; the next ``__iter__`` begins
    the next epoch. ``state_dict()``, called while batch n is in use, must lead on to batch n + 1.
    ``batches_in(epochs)`` is the number of batches of one process in ``epochs``, counted or estimated.
    """

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def batches_in(self, epochs: float) -> int: ...


class Trainer:
    """Train to the last step, ``max_minutes`` or a signal, from the newest checkpoint on.

    On a GPU the host reads the figures of a step while the next is under way: a stop comes a step later.

    Args:
        options: see TrainerOptions.
        model: on ``device``; its ``forward`` must be what ``compute_loss`` calls (data parallel needs it).
        compute_loss: see LossFunction; runs under autocast where ``precision`` means bf16.
        train_batches: a BatchSource; with several processes each has its own share of the batches.
        valid_batches: can be iterated again and again.
        folder: gets checkpoints, ``log.jsonl`` and tensorboard events.
        device: of the model.
        on_save: called (first process only) with the step after each checkpoint, e.g. to export the model. A
            ValueError of it ends the training after its last step, and is told before.
        describe: turns validation means ({"loss", "weight", metrics...}) into further values to log.
        now: seconds from any origin, by which the training counts its time.

    Attributes:
        step: optimizer steps so far.
        total_steps: the last one; 0 where the clock alone ends the training.
        ema: the moving average of the weights, or None.
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
        on_save: Callable[[int], Any] = lambda step: None,
        describe: Optional[Callable[[dict[str, float]], dict[str, float]]] = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        options.check_length()
        self.options, self.model = options, model
        self.train_batches, self.valid_batches = train_batches, valid_batches
        self.folder, self.on_save, self.describe = Path(folder), on_save, describe
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.train_step = TrainingStep(options, model, compute_loss, torch.device(device))
        self.ema = Ema(model, options.ema_decay) if options.ema_decay else None  # averages of the weights
        self.unread: list[tuple[int, Report]] = []  # steps with figures that may still be on the device
        self.step = self.items_seen = 0
        self.total_steps = options.max_steps or 0  # those of epochs are counted below
        self.last_valid: dict[str, float] = {}
        self.step_seconds, self.agreed_stop = 0.0, ""
        self.clock = Clock(options, self.rank, now)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log, self.signals = TrainingLog(self.folder, self.rank == 0, options.tensorboard), StopSignals()
        seed_everything(options.seed + self.rank)
        self.resume()
        if options.max_epochs is not None and not self.total_steps:
            batches = train_batches.batches_in(options.max_epochs)
            self.total_steps = max(1, math.ceil(batches / options.accumulate))
            self.log.print(f"{options.max_epochs:g} epochs are {self.total_steps} steps")

    # The loop.

    def run(self) -> dict[str, Any]:
        """Train; return {"step", "reason", "valid", "skipped", "minutes", "data_wait"}.

        ``reason`` is FINISHED, "max_minutes" or "signal" (a training by the clock is finished when its time
        is over); ``data_wait``: the share of its time that this process waited for batches in this run.

        Raises:
            RuntimeError: ``nan_limit`` steps in a row had a non-finite loss or gradient norm.
            ValueError: the source has no batches.
        """
        self.clock.start()
        begun_at = saved_step = self.step if newest_checkpoint(self.folder) else -1
        batches, reason = self._endless(), ""
        with self.log.opened(self.total_steps, self.step), self.signals:
            while not (reason := FINISHED if self.is_over else self.agreed_stop):
                if self._one_step(batches):
                    self.save()
                    saved_step = self.step
            self._read_steps()
            if self.last_valid.get("step") != self.step:
                self.validate()
            if saved_step != self.step:
                self.save()
            elif begun_at == self.step and self.rank == 0:
                self._export()  # a kill may have come between the last checkpoint and this
        return {"step": self.step, "reason": reason, "valid": self.last_valid,
                "skipped": self.train_step.skipped, "minutes": self.clock.seconds() / 60,
                "data_wait": self.data_wait}

    @property
    def is_over(self) -> bool:
        """Whether the training has done its last step, or its time is over."""
        return 0 < self.total_steps <= self.step or self.clock.run_out

    @property
    def data_wait(self) -> float:
        """Share of the steps' time, 0 to 1, in which they waited for a batch."""
        return self.train_step.wait_seconds / max(self.step_seconds, 1e-9)

    def _one_step(self, batches: Iterator[Any]) -> bool:
        """Train one step, report it, validate when it is time; return whether it is time to save."""
        begun, lr = time.monotonic(), self.clock.rate(self.step, self.total_steps)
        self.unread.append((self.step, self.train_step(batches, lr, self._requests)))
        self.step += 1
        if self.ema is not None:
            self.ema.update()
        save = self._read_steps(newest=not self.train_step.deferred)
        self.step_seconds += time.monotonic() - begun
        if self.options.valid_every_steps and self.step % self.options.valid_every_steps == 0:
            self.validate()
        every = self.options.save_every_steps
        return save or (every > 0 and self.step % every == 0)

    def _requests(self) -> dict[str, float]:
        return {**self.clock.asks(), "signal": float(self.signals.received)}

    def _read_steps(self, newest: bool = True) -> bool:
        """Read what finished steps tell, the newest too if asked for; return whether one asks to save."""
        save = False
        while len(self.unread) > (0 if newest else 1):
            step, report = self.unread.pop(0)
            values, answers = self.train_step.read(report)
            self.clock.agree(answers["seconds"], step + 1)
            self.agreed_stop = "max_minutes" if answers["late"] else "signal" if answers["signal"] else ""
            if self.train_step.skipped_in_row:
                self._report_skipped(step)
            self.items_seen += int(values["weight"])
            self._report_step(step + 1, values)
            save = save or answers["save"] > 0
        return save

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss and metrics over the validation batches, by the averages of weights if there are any."""
        self._read_steps()
        self.model.eval()
        totals: dict[str, Any] = {"loss": 0.0, "weight": 0.0}
        with self._averaged():
            for batch in self.valid_batches:
                add_sums(totals, self.train_step.loss_of(self.model, batch)[1])
        values = means(merge_over_processes(totals))
        values.update(self.describe(values) if self.describe else {})
        self.last_valid = {"step": self.step, **values}
        line = {f"valid_{name}": value for name, value in values.items()}
        self._log_line({**line, "data_wait": round(self.data_wait, 4)})
        self.log.scalars("valid", values, self.step)
        return values

    # Checkpoints.

    def save(self) -> None:
        """Write ``checkpoint-STEP.pt`` (first process) and call ``on_save`` (with averages, if any)."""
        self._read_steps()
        states = gather_over_processes({"rng": random_states(), "batches": self.train_batches.state_dict()})
        if self.rank == 0:
            state = {
                "model": self.model.state_dict(), "optimizer": self.train_step.optimizer.state_dict(),
                "step": self.step, "items_seen": self.items_seen, "skipped": self.train_step.skipped,
                **self.clock.state_dict(), "processes": states, "last_valid": self.last_valid,
                "options": dataclasses.asdict(self.options), "total_steps": self.total_steps,
            }
            if self.ema is not None:
                state["ema"] = self.ema.state_dict()
            save_checkpoint(state, checkpoint_path(self.folder, self.step), self.options.keep_checkpoints)
            self._export()
            set_random_states(states[0]["rng"])  # an export may draw numbers, which a resumed run will not
        self.clock.saved()

    def _export(self) -> None:
        try:
            with self._averaged():
                self.on_save(self.step)
        except DoesNotFit as error:  # on their way they need not fit
            if self.is_over:
                raise
            self.log.print(f"warning: step {self.step} is not exported: {error}")

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.ema is None else self.ema.applied()

    def resume(self) -> None:
        """Go on from the newest checkpoint of the folder, if there is one."""
        path = newest_checkpoint(self.folder)
        if path is None:
            return
        state = load_checkpoint(path)
        self.model.load_state_dict(state["model"])
        self.train_step.optimizer.load_state_dict(state["optimizer"])
        self.step, self.items_seen = state["step"], state["items_seen"]
        self.train_step.skipped = state["skipped"]
        self.clock.load_state_dict(state)
        self.last_valid = state["last_valid"]
        if self.ema is not None:
            self.ema.load_state_dict(state.get("ema") or Ema(self.model, 0.0).state_dict())
            if "ema" not in state:
                self.log.print(f"{path} holds no averages: they begin with its weights")
        epochs = self.options.max_epochs
        if epochs is not None and epochs == state["options"].get("max_epochs"):
            self.total_steps = state["total_steps"]
        processes = state["processes"]
        same_world = len(processes) == self.world
        mine = processes[self.rank] if same_world else processes[0]
        self.train_batches.load_state_dict(mine["batches"])
        if same_world:
            set_random_states(mine["rng"])
        else:
            self.log.print(f"{len(processes)} processes wrote {path}, {self.world} go on: they do not use "
                           f"exactly the rest of this epoch; the schedule's steps stay")
        self.log.print(f"resumed from {path} at step {self.step}")

    # Helpers.

    def _endless(self) -> Iterator[Any]:
        empty_epochs = 0  # a run resumed exactly at the end of an epoch sees one, never two in a row
        while empty_epochs < 2:
            empty_epochs += 1
            for batch in self.train_batches:
                empty_epochs = 0
                yield batch
        raise ValueError("train_batches must yield at least one batch an epoch, but yields none")

    def _report_step(self, step: int, values: dict[str, float]) -> None:
        if step % self.options.log_every_steps:
            self.log.advance()
            return
        rate, skipped = self.items_seen / max(self.clock.seconds(), 1e-9), self.train_step.skipped
        loss, norm = values["loss"], values["grad_norm"]
        self.log.advance(f"loss {loss:.3f} norm {norm:.2f} {rate:.0f} items/s skipped {skipped}")
        more = {"skipped": float(skipped), "items_per_second": rate, "data_wait": self.data_wait}
        self.log.scalars("train", {**values, **more}, step)

    def _report_skipped(self, step: int) -> None:
        """Log a step that was skipped; raise RuntimeError after ``nan_limit`` of them in a row."""
        in_row = self.train_step.skipped_in_row
        self._log_line({"step": step, "skipped": self.train_step.skipped, "skipped_in_row": in_row})
        if in_row >= self.options.nan_limit:
            raise RuntimeError(
                f"training stopped at step {step}: the loss or the gradient norm was not finite in "
                f"{in_row} steps in a row (nan_limit={self.options.nan_limit}); "
                f"newest checkpoint: {newest_checkpoint(self.folder)}"
            )

    def _log_line(self, values: dict[str, Any]) -> None:
        minutes = round(self.clock.seconds() / 60, 3)
        self.log.line({"step": self.step, "items": self.items_seen, "minutes": minutes, **values})
