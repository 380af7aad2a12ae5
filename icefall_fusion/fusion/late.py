"""Scores of delayed fusion that arrive late: which events are on their way, when they land, where they reach.
Knows: frames, utterances, words and their tree nodes. Must not know: which LM it is, the frame step.

An event is launched, and the search goes on. Its scores join ``late`` frames later, or at the utterance's
next event if that is earlier. Then a hypothesis has the score of its longest beginning that is scored. Of an
utterance that ends before, all words are scored in ``finish`` as ever.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, Optional, Sequence

import torch
from torch import Tensor

if TYPE_CHECKING:
    from icefall_fusion.fusion.words import History
    from icefall_fusion.lm import TreeScorer


@dataclass
class _Flight:
    """An event: utterances [B] bool, the frame in which its scores are due, and a function that waits."""

    utterances: Tensor
    due: int
    wait: Callable[[], Tensor]


class LateScores:
    """The events of one batch whose scores have not joined.

    Args:
        late: frames from an event to its scores.
        lens: [B] frames of each utterance. Like all tensors here it is on the host.
    """

    def __init__(self, late: int, lens: Tensor) -> None:
        self._late, self._lens, self._flights = late, lens, list[_Flight]()

    def add(self, utterances: Tensor, frame: int, wait: Callable[[], Tensor]) -> None:
        """Note an event of utterances [B] bool after a frame; ``wait`` waits for its scores."""
        self._flights.append(_Flight(utterances.clone(), frame + self._late, wait))

    def due(self, frame: int, fires: Optional[Tensor]) -> Tensor:
        """Return the utterances [B] bool whose scores are due after a frame, or that fuse again."""
        landing = torch.zeros_like(self._lens, dtype=torch.bool)
        for flight in self._flights:
            now = flight.utterances & (self._lens > frame)  # those that have ended are scored in `finish`
            if flight.due <= frame:
                landing |= now
            elif fires is not None:
                landing |= now & fires
        return landing

    def flying(self) -> Tensor:
        """Return the utterances [B] bool whose scores have not joined."""
        flights = [flight.utterances for flight in self._flights]
        return torch.stack(flights).any(0) if flights else torch.zeros_like(self._lens, dtype=torch.bool)

    def wait(self, landing: Optional[Tensor] = None) -> None:
        """Wait for the events of utterances [B] bool, which land; None: for all, and none lands."""
        for flight in self._flights:
            if landing is None or bool((flight.utterances & landing).any()):
                flight.wait()
            if landing is not None:
                flight.utterances &= ~landing
        self._flights = [flight for flight in self._flights if bool(flight.utterances.any())]


def beginnings(histories: Sequence[History], tree: TreeScorer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return of histories that are scored: tree node, number of words, score, arena node; [n] each."""
    nodes, counts, prefixes = (
        torch.tensor([getattr(history, name) for history in histories], dtype=torch.int64)
        for name in ("node", "shown", "prefix")
    )
    return nodes, counts, torch.from_numpy(tree.known(nodes)[1]).float(), prefixes
