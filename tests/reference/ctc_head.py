"""CTC by hand: every alignment of an utterance walked, the texts they spell, and what begins with a prefix.
Knows: rows of log-probs. Must not know: tensors of a search, the package's search.
"""
from __future__ import annotations

import itertools
import math
from typing import Sequence

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
    """Log-probabilities that the labels of an utterance begin with a prefix, and that they are just these."""

    def __init__(self, rows: Sequence[Sequence[float]], blank: int, least: float) -> None:
        self.texts, self.least = all_texts(rows, blank), least

    def begins(self, prefix: Prefix) -> float:
        size = len(prefix)
        return log_or(sum(p for text, p in self.texts.items() if text[:size] == prefix), self.least)

    def piece_score(self, prefix: Prefix, piece: int) -> float:
        return self.begins((*prefix, piece)) - self.begins(prefix)

    def end_score(self, prefix: Prefix, words: Sequence[str]) -> float:
        return self.whole(prefix)

    def whole(self, prefix: Prefix) -> float:
        return log_or(self.texts.get(prefix, 0.0), self.least)
