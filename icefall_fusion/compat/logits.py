"""Arrays of logits, as callers of other decoders have them, to a padded batch of log-probs.
Knows: arrays, frames, thresholds. Must not know: whose calls they are, vocabularies, searches.
"""
from __future__ import annotations

import math
from typing import Any, Sequence

import numpy as np
import torch
from torch import Tensor

from icefall_fusion.common.checks import check, is_number

#: Probabilities below this count as this: other decoders clip there.
LEAST_PROBABILITY = 1e-15


def check_logits(logits: Any, pieces: int, name: str = "logits") -> np.ndarray:
    """Return logits as an array [T, V].

    Raises:
        ValueError: they are no numbers, have not two dimensions, or not V = ``pieces`` columns.
    """
    values = logits.detach().cpu().float().numpy() if isinstance(logits, Tensor) else np.asarray(logits)
    check(values.dtype.kind in "fiu", name, "hold numbers [frames, pieces]", values.dtype)
    check(values.ndim == 2, name, "have 2 dimensions [frames, pieces]", values.shape)
    check(values.shape[1] == pieces, name, f"have one column for each of the {pieces} labels", values.shape)
    return values


def log_probs_of(logits: np.ndarray, name: str = "logits") -> Tensor:
    """Return log-probs [T, V] float32 of logits or log-probs; rows that sum to 1 are taken as probabilities.

    Raises:
        ValueError: a value is NaN or +inf, or nothing is possible in a frame.
    """
    if not logits.size:
        return torch.zeros(logits.shape)
    values = torch.from_numpy(np.ascontiguousarray(logits, np.float32))
    best = values.amax(1)
    bad = ~(torch.isfinite(best))
    if bool(bad.any()):
        frame = int(bad.nonzero()[0, 0])
        check(False, f"{name}, the best of frame {frame},", "be a finite number", float(best[frame]))
    if math.isclose(float(values.sum(1).mean()), 1.0, rel_tol=1e-5):
        return values.clamp(LEAST_PROBABILITY, 1.0).log()
    return values.log_softmax(1).clamp_(min=math.log(LEAST_PROBABILITY))


def drop_improbable(log_probs: Tensor, least: float) -> Tensor:
    """Return log-probs [T, V] in which pieces below ``least`` nats are impossible, the best of a frame never.

    Raises:
        ValueError: ``least`` is above 0 or not a number.
    """
    good = is_number(least) and least <= 0 or least == -math.inf
    check(good, "token_min_logp", "be a log-prob, at most 0", least)
    if not log_probs.numel():
        return log_probs
    best = log_probs.amax(1, keepdim=True)
    return log_probs.masked_fill((log_probs < least) & (log_probs < best), -math.inf)


def pad(rows: Sequence[Tensor], pieces: int) -> tuple[Tensor, Tensor]:
    """Return utterances [T, V] as one batch [B, T, V], and their frames [B]."""
    lens = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    batch = torch.zeros(len(rows), int(lens.max()) if len(rows) else 0, pieces)
    for target, row in zip(batch, rows):
        target[: len(row)] = row
    return batch, lens
