"""Options of the training loop.
Knows: numbers. Must not know: torch, data, what a model computes.
"""
from __future__ import annotations

import dataclasses

from icefall_fusion.common.checks import check, check_choice
from icefall_fusion.train.schedule import SCHEDULES, learning_rate

OPTIMIZERS = ("adamw", "muon")


@dataclasses.dataclass(frozen=True)
class TrainerOptions:
    """How to optimize, how long, and what to write meanwhile.

    Args:
        optimizer: "adamw", or "muon": the matrices of repeated layers by Muon, everything else by AdamW.
        lr: peak learning rate; Muon's updates are scaled to the size of AdamW's, so one rate serves both.
        min_lr: learning rate at the end of the cosine (floor of the inverse square root).
        warmup_steps: steps of linear growth to ``lr``.
        schedule: "cosine" (ends at ``max_steps``) or "inverse-sqrt".
        max_steps: optimizer steps in all.
        max_minutes: wall-clock limit of this run in minutes: it stops with a checkpoint; 0 = none.
        beta1: AdamW's first moment decay.
        beta2: AdamW's second moment decay.
        weight_decay: decoupled decay, for parameters with two or more dimensions.
        grad_clip: largest gradient norm; 0 = no clipping.
        accumulate: batches in one optimizer step.
        precision: "bf16" (autocast, float32 weights) or "float32".
        save_every_steps: checkpoint each so many steps; 0 = never by steps.
        save_every_minutes: checkpoint each so many minutes; 0 = never by time.
        keep_checkpoints: newest checkpoints to keep.
        valid_every_steps: validate each so many steps (and at the end); 0 = at the end only.
        log_every_steps: steps between training lines in tensorboard.
        tensorboard: write event files.
        seed: of the random generators (the rank is added).
        nan_limit: stop with an error after so many steps in a row with a non-finite loss or gradient.
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup_steps: int = 100
    schedule: str = "cosine"
    max_steps: int = 1000
    max_minutes: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    accumulate: int = 1
    precision: str = "bf16"
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
        check_choice(self.precision, ("bf16", "float32"), "TrainerOptions.precision")
        check(self.lr > 0, "TrainerOptions.lr", "be above 0", self.lr)
        check(0 <= self.min_lr <= self.lr, "TrainerOptions.min_lr", "be between 0 and lr", self.min_lr)
        for name in ("max_steps", "accumulate", "keep_checkpoints", "log_every_steps", "nan_limit"):
            check(getattr(self, name) >= 1, f"TrainerOptions.{name}", "be at least 1", getattr(self, name))
        for name in ("warmup_steps", "max_minutes", "weight_decay", "grad_clip", "save_every_steps",
                     "save_every_minutes", "valid_every_steps"):
            check(getattr(self, name) >= 0, f"TrainerOptions.{name}", "be at least 0", getattr(self, name))
        for name in ("beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, f"TrainerOptions.{name}", "be in [0, 1)", getattr(self, name))

    def rate(self, step: int) -> float:
        """Return the learning rate of a step (the first is 0)."""
        return learning_rate(step, self.schedule, self.lr, self.warmup_steps, self.max_steps, self.min_lr)
