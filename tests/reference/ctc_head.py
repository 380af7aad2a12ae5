"""CTC by hand: every alignment of an utterance walked, the texts they spell, and what begins with a prefix.
Knows: rows of log-probs. Must not know: tensors of a search, the package's search.
"""
from __future__ import annotations

import itertools
import math
from typing import Optional, Sequence

Prefix = tuple[int, ...]
NEVER = -math.inf


def collapsed(alignment: Sequence[int], blank: int) -> Prefix:
    """Return what an alignment spells: repeats once, blanks not at all."""
    return tuple(piece for piece, _ in itertools.groupby(alignment) if piece != blank)


def all_texts(rows: Sequence[Sequence[float]], blank: int) -> dict[Prefix, float]:
    """Return the probability of every text, over all ``V ** T`` alignments."""
    found: dict[Prefix, float] = {}
    for alignment in itertools.product(range(len(rows[0])) if rows else (), repeat=len(rows)):
        log_prob = sum(row[piece] for row, piece in zip(rows, alignment))
        text = collapsed(alignment, blank)
        found[text] = found.get(text, 0.0) + math.exp(log_prob)
    return found


def log_or(value: float, least: float) -> float:
    return max(math.log(value), least) if value > 0 else least


class SlowCtcHead:
    """Log-probabilities that the labels of an utterance begin with a prefix, or are just these."""

    def __init__(self, rows: Sequence[Sequence[float]], blank: int, least: float, slack: int = 0) -> None:
        self.texts, self.least, self.slack, self.ways = all_texts(rows, blank), least, slack, []
        for alignment in itertools.product(range(len(rows[0])), repeat=len(rows)):
            spelled = [collapsed(alignment[:frames], blank) for frames in range(len(rows) + 1)]
            self.ways.append((spelled, math.exp(sum(row[piece] for row, piece in zip(rows, alignment)))))

    def begins(self, prefix: Prefix, frames: int = 0) -> float:
        """Return that of beginning so, and of nothing after the prefix in the first ``frames``."""
        size = len(prefix)
        found = (p for spelled, p in self.ways
                 if spelled[-1][:size] == prefix and len(spelled[frames]) <= size)
        return log_or(sum(found), self.least)

    def after_frame(self, frame: int, prefix: Prefix) -> Optional[float]:
        over = frame + 1 - self.slack
        return self.begins(prefix, over) if over > 0 else None

    def whole(self, prefix: Prefix) -> float:
        return log_or(self.texts.get(prefix, 0.0), self.least)
