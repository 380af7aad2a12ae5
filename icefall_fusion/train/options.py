"""Options of the training loop, and those that every training job has.
Knows: numbers. Must not know: torch, data, what a model computes.
"""
from __future__ import annotations

import dataclasses
from typing import Optional

from icefall_fusion.common.checks import check, check_at_least, check_choice
from icefall_fusion.train.schedule import PROGRESS, SCHEDULES, learning_rate, learning_rate_by_time

OPTIMIZERS = ("adamw", "muon")
PRECISIONS = ("bf16", "float32", "fast")
EXPORT_DTYPES = ("float16", "float32")


@dataclasses.dataclass(frozen=True)
class TrainerOptions:
    """Optimizer, learning rate, length, checkpoints and logs of a training.

    Args:
        optimizer: "adamw", or "muon": Muon for the matrices of repeated layers, AdamW for all else.
        lr: peak learning rate; Muon's updates are scaled to the size of AdamW's, so one rate serves both.
        min_lr: learning rate at the end of the cosine (floor of the inverse square root).
        warmup_steps: steps of linear growth to ``lr``.
        warmup_epochs: epochs of linear growth, in place of ``warmup_steps`` (with ``max_epochs`` only).
        schedule: "cosine" (ends at the last step) or "inverse-sqrt".
        progress: "steps", or "time": after ``warmup_steps`` the schedule follows the clock; it and the
            training end when all runs together have taken ``max_minutes``.
        max_steps: optimizer steps in all; set this or ``max_epochs`` (or ``progress`` time).
        max_epochs: passes over the training data. Their steps are counted when a training starts; a run that
            goes on keeps that number, also with another number of processes.
        max_minutes: wall-clock limit of this run in minutes: it stops with a checkpoint; 0 = none. With
            ``progress`` time: the length of the training, earlier runs counted in.
        beta1: AdamW's first moment decay.
        beta2: AdamW's second moment decay.
        weight_decay: decoupled decay, for parameters with two or more dimensions.
        grad_clip: largest gradient norm; 0 = no clipping.
        ema_decay: of an exponential moving average of the weights, which validation then uses, and exports
            can; 0 = none.
        accumulate: batches in one optimizer step.
        precision: "bf16" (autocast, float32 weights), "float32", or "fast": bf16 where the device is
            faster with it than with float32.
        save_every_steps: steps between checkpoints; 0 = never by steps.
        save_every_minutes: minutes between checkpoints; 0 = never by time.
        keep_checkpoints: newest checkpoints to keep.
        valid_every_steps: steps between validations (there is one at the end too); 0 = at the end only.
        log_every_steps: steps between training lines in tensorboard.
        tensorboard: write event files.
        seed: of the random generators (the rank is added).
        nan_limit: steps in a row with a non-finite loss or gradient that end the training with an error.
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup_steps: int = 100
    warmup_epochs: Optional[float] = None
    schedule: str = "cosine"
    progress: str = "steps"
    max_steps: Optional[int] = None
    max_epochs: Optional[float] = None
    max_minutes: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema_decay: float = 0.0
    accumulate: int = 1
    precision: str = "fast"
    save_every_steps: int = 0
    save_every_minutes: float = 10.0
    keep_checkpoints: int = 3
    valid_every_steps: int = 500
    log_every_steps: int = 20
    tensorboard: bool = True
    seed: int = 1
    nan_limit: int = 10

    def __post_init__(self) -> None:
        check_choice(self.optimizer, OPTIMIZERS, "TrainerOptions.optimizer")
        check_choice(self.schedule, SCHEDULES, "TrainerOptions.schedule")
        check_choice(self.progress, PROGRESS, "TrainerOptions.progress")
        check_choice(self.precision, PRECISIONS, "TrainerOptions.precision")
        check(self.lr > 0, "TrainerOptions.lr", "be above 0", self.lr)
        check(0 <= self.min_lr <= self.lr, "TrainerOptions.min_lr", "be between 0 and lr", self.min_lr)
        if self.max_steps is not None:
            check_at_least(1, self, "max_steps")
            rule = "not be set beside max_steps (one of them set to none leaves the other)"
            check(self.max_epochs is None, "TrainerOptions.max_epochs", rule, self.max_epochs)
        if self.max_epochs is not None:
            check(self.max_epochs > 0, "TrainerOptions.max_epochs", "be above 0", self.max_epochs)
        if self.warmup_epochs is not None:
            rule = f"be from 0 to max_epochs, which is {self.max_epochs}"
            good = 0 <= self.warmup_epochs <= (self.max_epochs or -1)
            check(good, "TrainerOptions.warmup_epochs", rule, self.warmup_epochs)
        check_at_least(1, self, "accumulate", "keep_checkpoints", "log_every_steps", "nan_limit")
        check_at_least(0, self, "warmup_steps", "max_minutes", "weight_decay", "grad_clip")
        check_at_least(0, self, "save_every_steps", "save_every_minutes", "valid_every_steps")
        if self.by_time:
            self._check_clock()
        for name in ("beta1", "beta2", "ema_decay"):
            check(0 <= getattr(self, name) < 1, f"TrainerOptions.{name}", "be in [0, 1)", getattr(self, name))

    @property
    def by_time(self) -> bool:
        """Whether schedule and length follow the clock."""
        return self.progress == "time"

    def _check_clock(self) -> None:
        rule = "be above 0 with TrainerOptions.progress time"
        check(self.max_minutes > 0, "TrainerOptions.max_minutes", rule, self.max_minutes)
        for name in ("max_epochs", "warmup_epochs"):
            rule = "not be set with TrainerOptions.progress time (max_minutes and warmup_steps are)"
            check(getattr(self, name) is None, f"TrainerOptions.{name}", rule, getattr(self, name))
        good = self.schedule != "inverse-sqrt" or self.warmup_steps > 0
        rule = "be above 0 for inverse-sqrt with TrainerOptions.progress time"
        check(good, "TrainerOptions.warmup_steps", rule, self.warmup_steps)

    def check_length(self) -> None:
        """Raise ValueError unless ``max_steps``, ``max_epochs`` or a length by the clock is set."""
        limited = self.max_steps is not None or self.max_epochs is not None or self.by_time
        check(limited, "TrainerOptions.max_steps or TrainerOptions.max_epochs", "be set", None)

    def rate(self, step: int, total: int) -> float:
        """Return the learning rate of a step (the first is 0) of a training of ``total`` steps."""
        warmup = self.warmup_steps
        if self.warmup_epochs is not None and self.max_epochs is not None:
            warmup = round(total * self.warmup_epochs / self.max_epochs)
        return learning_rate(step, self.schedule, self.lr, warmup, total, self.min_lr)

    def rate_by_time(self, step: int, seconds: float, warmed: float) -> float:
        """Return the learning rate of a step after ``seconds`` of training; see `learning_rate_by_time`."""
        return learning_rate_by_time(
            step, self.schedule, self.lr, self.warmup_steps, self.min_lr, seconds, warmed,
            self.max_minutes * 60,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of every training job; see `job.run_training`.

    Args:
        exp: folder of checkpoints, logs and ``export/``, the exported model.
        init: model folder whose weights a new training starts from; empty: random weights.
        trainer: optimization, limits and checkpoints.
        device: "auto", "cpu" or "cuda".
        compile: use torch.compile (needs a C++ compiler on a CPU).
        threads: CPU threads; 0 = torch's choice.
        export_dtype: "float16" or "float32" of the exported weights.
    """

    exp: str
    init: str = ""
    trainer: TrainerOptions = dataclasses.field(default_factory=TrainerOptions)
    device: str = "auto"
    compile: bool = False
    threads: int = 0
    export_dtype: str = "float16"

    def __post_init__(self) -> None:
        self.trainer.check_length()
        check_at_least(0, self, "threads")
        check_choice(self.export_dtype, EXPORT_DTYPES, f"{type(self).__name__}.export_dtype")
