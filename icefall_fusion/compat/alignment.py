"""The most probable alignment of hypotheses with their frames: in which frame each piece begins.
Knows: log-probs, pieces, blank. Must not know: searches, words, whose calls they are.
"""
from __future__ import annotations

from typing import Sequence

import numpy as np
from torch import Tensor

_AT_ONCE = 32  # hypotheses


def first_frames(log_probs: Tensor, lens: Sequence[int], owners: Sequence[int],
                 pieces: Sequence[Sequence[int]], blank: int) -> list[list[int]]:
    """Return the first frame of each piece on the best path of CTC that says the pieces (Viterbi).

    Args:
        log_probs: [B, T, V]; lens: [B] frames.
        owners: the utterance of each hypothesis; pieces: of each, without blanks.
        blank: its id.

    Returns:
        of each hypothesis rising frames, one a piece; frames of impossible ones are of no meaning.
    """
    found: list[list[int]] = []
    for start in range(0, len(owners), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        found += _align(log_probs.numpy(), lens, owners[some], pieces[some], blank)
    return found


def _align(log_probs: np.ndarray, lens: Sequence[int], owners: Sequence[int],
           pieces: Sequence[Sequence[int]], blank: int) -> list[list[int]]:
    count, longest = len(owners), max((len(one) for one in pieces), default=0)
    states = np.full((count, 2 * longest + 1), blank)  # blank, piece, blank, piece, ..., blank
    for row, one in zip(states, pieces):
        row[1 : 2 * len(one) : 2] = one
    skips = np.zeros(states.shape, bool)  # from piece to piece without a blank between
    skips[:, 3::2] = states[:, 3::2] != states[:, 1:-2:2]
    frames = np.array([lens[owner] for owner in owners])
    rows = np.arange(count)
    score = np.full((count, states.shape[1] + 2), -np.inf)  # two columns of nothing before the first
    score[:, 2] = 0.0  # before the first frame
    steps = np.zeros((int(frames.max(initial=0)), *states.shape), np.int8)
    for frame in range(len(steps)):
        leap = np.where(skips, score[:, :-2], -np.inf)
        ways = np.stack([score[:, 2:], score[:, 1:-1], leap])
        best = ways.argmax(0)
        new = np.take_along_axis(ways, best[None], 0)[0]
        new = new + log_probs[np.asarray(owners)[:, None], frame, states]
        going = (frame < frames)[:, None]
        steps[frame] = np.where(going, best, 0)
        score[:, 2:] = np.where(going, new, score[:, 2:])
    last = np.array([2 * len(one) for one in pieces])
    before = np.where(last > 0, score[rows, 2 + last - 1], -np.inf)
    state = np.where(before > score[rows, 2 + last], last - 1, last)
    begins = np.zeros(states.shape, np.int64)
    for frame in range(len(steps) - 1, -1, -1):
        going = frame < frames
        begins[rows[going], state[going]] = frame
        state = state - np.where(going, steps[frame, rows, state], 0)
    return [row[1 : 2 * len(one) : 2].tolist() for row, one in zip(begins, pieces)]
