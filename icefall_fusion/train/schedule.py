"""Learning rates as pure functions of the step, so that a resumed run needs no scheduler state.
Knows: numbers. Must not know: torch, models, data.
"""
from __future__ import annotations

import math

SCHEDULES = ("cosine", "inverse-sqrt")


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
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
