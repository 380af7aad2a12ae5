"""Closed words: which words of a prefix are complete, found once for each distinct boundary.
Knows: the prefix arena and the acoustic pieces. Must not know: LMs, their tokenizers, scores.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional, Sequence

import torch

if TYPE_CHECKING:
    from icefall_fusion.search.beam import PrefixArena


class History:
    """Words of one prefix: those of ``before`` and then ``words`` (one word, or none where it is empty).

    Attributes:
        before: the shorter history, None at the root.
        words: what this one adds.
        count: number of words in all.
        utterance: whose words they are.
        place: the arena node whose words these are (the boundary of prefixes).
        node: a place for the one who asks: the LM's tree node, -1 as long as it is unknown.
    """

    __slots__ = ("before", "words", "count", "utterance", "place", "node")

    def __init__(
        self, before: Optional[History], words: Sequence[str], utterance: int, place: int
    ) -> None:
        self.before = before
        self.words = tuple(words)
        self.utterance, self.place = utterance, place
        self.count = (before.count if before is not None else 0) + len(self.words)
        self.node = -1

    def all_words(self) -> list[str]:
        """Return every word, first to last."""
        parts = []
        history: Optional[History] = self
        while history is not None:
            parts.append(history.words)
            history = history.before
        return [word for words in reversed(parts) for word in words]


class ClosedWords:
    """The histories of a batch, one for each arena node that is the boundary of a prefix.

    Words that are closed are those followed by a piece that starts a word. A boundary adds one word to its
    own boundary's words, so each costs the tracing of one word, once.

    Args:
        arena: the prefixes of the search.
        tokens: the acoustic vocabulary (anything with ``words(ids) -> list[str]``).
    """

    def __init__(self, arena: PrefixArena, tokens: Any) -> None:
        self._arena = arena
        self._tokens = tokens
        roots = [arena.root(number) for number in range(arena.batch)]
        self._known = {root: History(None, (), number, root) for number, root in enumerate(roots)}

    def root(self, utterance: int) -> History:
        """Return the history without words of one utterance."""
        return self._known[self._arena.root(utterance)]

    def closed(self, boundaries: Sequence[int]) -> list[History]:
        """Return the history of each boundary node."""
        self._learn(boundaries)
        return [self._known[node] for node in boundaries]

    def complete(self, nodes: Sequence[int]) -> list[History]:
        """Return the history of all words of each prefix, the open last one included (end of utterance)."""
        boundaries = self._boundaries(nodes)
        closed = self.closed(boundaries)
        return [
            before if node == boundary else self._after(before, node, boundary)
            for node, boundary, before in zip(nodes, boundaries, closed)
        ]

    def keep(self, boundaries: Sequence[int]) -> None:
        """Forget all histories but those of ``boundaries`` and what they go back to.

        A boundary that a later prefix can have is a prefix of the beam or one of their boundaries, so that
        nothing forgotten here is asked for again.
        """
        self._learn(boundaries)
        wanted = {id(self.root(utterance)) for utterance in range(self._arena.batch)}
        for node in boundaries:
            history: Optional[History] = self._known[node]
            while history is not None and id(history) not in wanted:
                wanted.add(id(history))
                history = history.before
        self._known = {node: history for node, history in self._known.items() if id(history) in wanted}

    def __len__(self) -> int:
        return len(self._known)

    def _learn(self, nodes: Sequence[int]) -> None:
        before_of: dict[int, int] = {}
        missing = [node for node in dict.fromkeys(nodes) if node not in self._known]
        while missing:
            boundaries = self._boundaries(missing)
            before_of.update(zip(missing, boundaries))
            missing = [n for n in dict.fromkeys(boundaries) if n not in self._known and n not in before_of]
        # Nodes are numbered by birth: a boundary is younger than what it goes back to.
        for node in sorted(before_of):
            self._known[node] = self._after(self._known[before_of[node]], node, before_of[node])

    def _boundaries(self, nodes: Sequence[int]) -> list[int]:
        device = self._arena.first_ids.device
        return self._arena.boundary(torch.tensor(list(nodes), dtype=torch.int64, device=device)).tolist()

    def _after(self, before: History, node: int, boundary: int) -> History:
        words = self._tokens.words(self._arena.pieces_between(node, boundary))
        return History(before, words, before.utterance, node)
