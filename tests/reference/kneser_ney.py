"""Interpolated, modified Kneser-Ney by dictionaries and recursion: the slow twin.
Knows: lists of ids. Must not know: arrays, keys, ARPA files, the package.
"""
from __future__ import annotations

from collections import Counter, defaultdict
from typing import Sequence

Gram = tuple[int, ...]


class SlowKneserNey:
    """P(id | context) of sentences; ids of START and END are given.

    ``cutoffs[n - 1]`` is the least count of an n-gram that is kept for its own sake.
    """

    def __init__(self, sentences: Sequence[Sequence[int]], start: int, end: int, order: int,
                 cutoffs: Sequence[int]) -> None:
        self.order, self.start, self.size = order, start, start
        raw = [Counter() for _ in range(order + 1)]
        for sentence in sentences:
            ids = (start, *sentence, end)
            for n in range(1, order + 1):
                raw[n].update(ids[i : i + n] for i in range(len(ids) - n + 1))
        self.counts: list[Counter] = [Counter() for _ in range(order + 1)]
        self.counts[order] = raw[order]
        for n in range(1, order):
            before = defaultdict(set)
            for gram in raw[n + 1]:
                before[gram[1:]].add(gram[0])
            for gram, count in raw[n].items():
                self.counts[n][gram] = count if gram[0] == start else len(before[gram])
        self.counts[1].pop((start,), None)
        if order == 1:
            self.counts[1] = Counter({g: c for g, c in raw[1].items() if g != (start,)})
        self.discounts = [[0.0] * 4] + [discounts(c.values()) for c in self.counts[1:]]
        self.kept: list[set[Gram]] = [set() for _ in range(order + 2)]
        for n in range(order, 0, -1):
            needed = {gram[:-1] for gram in self.kept[n + 1]}
            self.kept[n] = {g for g, c in self.counts[n].items() if c >= cutoffs[n - 1] or g in needed}

    def prob(self, context: Gram, piece: int) -> float:
        """Return P(piece | context); of the context the last order - 1 ids count."""
        context = context[max(0, len(context) - self.order + 1) :]
        return self._prob(context, piece, len(context) + 1)

    def _prob(self, context: Gram, piece: int, n: int) -> float:
        if n == 0:
            return 1.0 / (self.size + 1)
        shorter = self._prob(context[1:], piece, n - 1)
        follow = {gram: count for gram, count in self.counts[n].items() if gram[:-1] == context}
        kept = {gram: count for gram, count in follow.items() if gram in self.kept[n]}
        if not kept:
            return shorter
        total, table = sum(follow.values()), self.discounts[n]
        own = {gram: (count - table[min(count, 3)]) / total for gram, count in kept.items()}
        return own.get((*context, piece), 0.0) + (1 - sum(own.values())) * shorter


def discounts(counts) -> list[float]:
    """Return the discounts of counts 0, 1, 2, 3 and more (Chen and Goodman 1998, equation 26)."""
    n = Counter(counts)
    if not (n[1] and n[2] and n[3]):
        return [0.0, 0.5, 1.0, 1.5]
    y = n[1] / (n[1] + 2 * n[2])
    found = [1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]]
    good = all(0 < d < most for d, most in zip(found, (1, 2, 3)))
    return [0.0, *found] if good else [0.0, 0.5, 1.0, 1.5]
