"""The time of a training, over all its runs and as all its processes have it.
Knows: seconds. Must not know: models, data, files.
"""
from __future__ import annotations

import time
from typing import Any, Callable, Optional

from icefall_fusion.train.options import TrainerOptions


class Clock:
    """Tells when a training must stop or save, and how far it is by the clock.

    Args:
        options: see TrainerOptions.
        rank: number of this process; the clock of process 0 rules the schedule of all.
        now: seconds from any origin; for tests.

    Attributes:
        agreed: seconds of the training, in all runs, as process 0 told them with the step that was read last.
        warmed: ``agreed`` when the warm-up ended; None before that, and where steps rule the schedule.
    """

    def __init__(
        self, options: TrainerOptions, rank: int = 0, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.options, self.rank, self.now = options, rank, now
        self.before = self.agreed = 0.0  # before: seconds of earlier runs
        self.warmed: Optional[float] = None
        self.start()

    def start(self) -> None:
        """Begin this run."""
        self.started = self.saved_at = self.now()

    def seconds(self) -> float:
        """Return the seconds of all runs until now, by the clock of this process."""
        return self.before + self.now() - self.started

    def saved(self) -> None:
        """Note that a checkpoint has been written."""
        self.saved_at = self.now()

    def asks(self) -> dict[str, float]:
        """Return what this process asks for; summed over processes, so that all stop and save together."""
        now = self.now()
        limit = 0.0 if self.options.by_time else self.options.max_minutes * 60
        late = 0 < limit <= now - self.started
        save = 0 < self.options.save_every_minutes * 60 <= now - self.saved_at
        seconds = 0.0 if self.rank else self.seconds()
        return {"late": float(late), "save": float(save), "seconds": seconds}

    def agree(self, seconds: float, step: int) -> None:
        """Take over the seconds that process 0 told, with the number of steps that have been done."""
        self.agreed = seconds
        if self.options.by_time and self.warmed is None and step >= self.options.warmup_steps:
            self.warmed = seconds

    @property
    def run_out(self) -> bool:
        """Whether a training that is as long as the clock says is at its end."""
        return self.options.by_time and self.agreed >= self.options.max_minutes * 60

    def rate(self, step: int, total: int) -> float:
        """Return the learning rate of a step (the first is 0) of a training of ``total`` steps."""
        if self.options.by_time:
            return self.options.rate_by_time(step, self.agreed, self.warmed or 0.0)
        return self.options.rate(step, total)

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds so far."""
        return {"seconds": self.seconds(), "warmed": self.warmed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self.before = self.agreed = state["seconds"]
        self.warmed = state.get("warmed")
