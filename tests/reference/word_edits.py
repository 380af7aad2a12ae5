"""Levenshtein distance of two word lists, as every textbook has it: the slow twin of kaldialign's.
Knows: lists. Must not know: the package.
"""
from __future__ import annotations

from typing import Sequence


def word_edits(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Return the number of substitutions, insertions and deletions."""
    previous = list(range(len(hypothesis) + 1))
    for row, word in enumerate(reference, 1):
        current = [row]
        for column, other in enumerate(hypothesis, 1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (word != other)))
        previous = current
    return previous[-1]
