"""Utterances in stretches: what is decoded at once, and the lists of all stretches joined again.
Knows: utterances, N-best lists. Must not know: models, searches, files of a run.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping, Sequence

from torch import Tensor

from icefall_fusion.nbest import NBest
from icefall_fusion.rescoring import add_counters
from icefall_fusion.utterances import Utterance, join_parts


@dataclass
class Stretch:
    """One of ``count`` stretches of an utterance (mostly all of it): its first second and what it holds."""

    utterance: Utterance
    number: int
    count: int
    start: float
    values: Tensor

    @property
    def id(self) -> str:
        return self.utterance.id if self.number == 0 else f"{self.utterance.id}#{self.number}"


class Found:
    """The N-best lists of the parts that one method has decoded of a batch, and what they cost."""

    def __init__(self) -> None:
        self.parts: list[tuple[Stretch, NBest]] = []
        self.line: dict[str, float] = {}

    def add(self, parts: Sequence[Stretch], nbests: Sequence[NBest], line: Mapping[str, float]) -> None:
        self.parts += zip(parts, nbests)
        add_counters(self.line, line)

    def join(self) -> list[NBest]:
        """Return one list an utterance."""
        lists: dict[str, list[tuple[Stretch, NBest]]] = {}
        for part, nbest in self.parts:
            lists.setdefault(part.utterance.id, []).append((part, nbest))
        return [
            found[0][1] if len(found) == 1 else join_parts(
                utterance, [nbest for _, nbest in found], [part.start for part, _ in found]
            )
            for utterance, found in lists.items()
        ]  # fmt: skip
