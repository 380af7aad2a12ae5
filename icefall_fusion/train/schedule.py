"""Learning rates as pure functions of the step or of the clock: a resumed run needs no scheduler state.
Knows: numbers. Must not know: torch, models, data.
"""
from __future__ import annotations

import math

SCHEDULES = ("cosine", "inverse-sqrt")
PROGRESS = ("steps", "time")


def learning_rate(step: int, schedule: str, peak: float, warmup: int, total: int, floor: float) -> float:
    """Return the learning rate of a step (the first step is 0).

    Args:
        step: steps taken so far, >= 0.
        schedule: "cosine" falls from ``peak`` to ``floor`` at ``total`` steps (Loshchilov and Hutter 2017,
            section 3); "inverse-sqrt" falls as 1/sqrt(step) (Vaswani et al. 2017, section 5.3).
        peak: the highest rate, reached after ``warmup`` steps of linear growth.
        warmup: steps of growth, >= 0.
        total: steps of the training, where the cosine ends.
        floor: the lowest rate after the warm-up.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "inverse-sqrt":
        return max(floor, peak * math.sqrt(max(warmup, 1) / (step + 1)))
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return _cosine(progress, peak, floor)


def learning_rate_by_time(
    step: int, schedule: str, peak: float, warmup: int, floor: float, seconds: float, warmed: float,
    allowed: float,
) -> float:
    """Return the learning rate of a step (the first is 0) of a training that ends by the clock.

    With steps of equal length it is `learning_rate` of the steps that fit into the time.

    Args:
        step: steps taken so far, >= 0.
        schedule: as there; "cosine" ends at ``allowed``, "inverse-sqrt" falls by 1/sqrt(seconds).
        peak: the highest rate, reached after ``warmup`` steps of linear growth.
        warmup: steps of growth, >= 0.
        floor: the lowest rate after the warm-up.
        seconds: of training so far.
        warmed: of training when the warm-up ended.
        allowed: of the whole training.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "inverse-sqrt":
        return max(floor, peak * math.sqrt(min(1.0, warmed / max(seconds, 1e-9))))
    progress = min(1.0, max(0.0, seconds - warmed) / max(1e-9, allowed - warmed))
    return _cosine(progress, peak, floor)


def _cosine(progress: float, peak: float, floor: float) -> float:
    """Return the rate when a share ``progress`` (0 to 1) of the fall is done."""
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
