"""Synthetic CTC emissions: peaky, mostly blank, with confusable alternatives; a smeared variant for stress.
Knows: how trained CTC posteriors look. Must not know: decoders.
"""
from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class SyntheticSet(NamedTuple):
    """log_probs [B, T, V + 1] float32 (blank is 0), lens [B], and the spoken pieces of each utterance."""

    log_probs: Tensor
    lens: Tensor
    references: list[list[int]]


@functools.lru_cache(maxsize=8)  # a loop in Python; nobody writes to them
def synthetic_emissions(
    utterances: int = 32,
    frames: int = 400,
    pieces: int = 500,
    smeared: float = 0.01,
    hard: float = 0.12,
    pieces_per_second: float = 4.6,
    frame_shift: float = 0.04,
    seed: int = 0,
) -> SyntheticSet:
    """Make emissions of ``utterances`` with pieces at random, well separated frames.

    Args:
        smeared: share of the pieces whose probability spreads over three neighboring frames.
        hard: share of the pieces whose probability is split with up to four confusable pieces, in proportions
            that may put a wrong piece first.
        pieces_per_second: spoken pieces a second.
        seed: of everything random.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return float(torch.rand((), generator=generator)) * (high - low) + low

    floor = torch.randn(utterances, frames, pieces + 1, generator=generator) * 1.5 - 14.0
    probs = floor.exp()
    confusable = torch.randint(1, pieces + 1, (pieces + 1, 4), generator=generator)
    references = []
    count = round(frames * frame_shift * pieces_per_second)
    for b in range(utterances):
        blank = torch.ones(frames)
        at = (torch.randperm(frames // 2 - 2, generator=generator)[:count].sort().values * 2 + 2).tolist()
        spoken = torch.randint(1, pieces + 1, (count,), generator=generator).tolist()
        for frame, piece in zip(at, spoken):
            rivals = {piece: 1.0}
            if uniform(0, 1) < hard:
                for rival in confusable[piece].tolist()[: 1 + int(uniform(0, 4))]:
                    rivals[rival] = uniform(0.1, 1.4)
            else:
                rivals[confusable[piece, 0].item()] = 10 ** uniform(-4, -1.5)
            spread = {frame: uniform(0.75, 0.995)}
            if uniform(0, 1) < smeared:
                spread = {frame + step: uniform(0.2, 0.6) for step in (-1, 0, 1)}
            elif uniform(0, 1) < 0.35:
                spread[frame + 1] = uniform(0.02, 0.4)
            whole = sum(rivals.values())
            for place, mass in spread.items():
                share = min(mass, float(blank[place]) * 0.98)
                blank[place] -= share
                for rival, part in rivals.items():
                    probs[b, place, rival] += share * part / whole
        probs[b, :, 0] = blank
        references.append(spoken)
    log_probs = (probs / probs.sum(-1, keepdim=True)).log()
    return SyntheticSet(log_probs, torch.full((utterances,), frames), references)
