"""A list of words as an automaton over acoustic pieces: a hypothesis pays for a word that is not in the list.
Knows: words as sequences of letters, pieces, automata of phrases. Must not know: searches, fusions, files.

A prefix tree of the words (Ortmanns, Ney, Eiden 1996 look ahead along one, too): a hypothesis pays in the
frame in which its open word leaves the tree, or when it ends a word that is only the beginning of one. A node
is what a word says so far, whatever pieces say it, so all ways to spell a word by pieces lead to it.
"""
from __future__ import annotations

import math
from typing import Iterable, Optional, Sequence

import numpy as np

from icefall_fusion.common.checks import check
from icefall_fusion.ngram.phrases import MOST, STEP, PhraseAutomaton

#: Stands for log 0: no hypothesis survives it, and a weight of 0 leaves it without effect.
FORBIDDEN = -1e30


class WordAutomaton(PhraseAutomaton):
    """The words of a list; a phrase automaton with other edges (see `PhraseAutomaton` for the attributes).

    Nodes: 0 is none, 1 the beginning of a word, the last one all words that left the tree.

    Args:
        words: each as numbers of its letters, at least one letter each.
        letters: of each piece; None: it says nothing that a word may hold.
        starts: of each piece, whether it begins a word.
        oov_score: natural log that a word outside the list costs, at most 0; -inf: there is no such word.

    Attributes:
        child: [M] int32, node at the end of each edge; piece: [M], of each edge; first: [N + 1], first edge.

    Raises:
        ValueError: there are no words, or ``oov_score`` is above 0 or below -1000 and finite.
    """

    def __init__(self, words: Iterable[Sequence[int]], letters: Sequence[Optional[Sequence[int]]],
                 starts: Sequence[bool], oov_score: float) -> None:
        good = oov_score == -math.inf or -MOST <= oov_score <= 0
        check(good, "oov_score", f"be -inf, or from {-MOST:g} to 0", oov_score)
        cost = FORBIDDEN if oov_score == -math.inf else np.round(oov_score / STEP) * STEP
        self.size, self._starts = len(letters), np.asarray(starts, bool)
        self._grow(list(words), 1 + max((max(one) for one in letters if one), default=0))
        self._count = len(self._ends) + 1  # with the node of all other words
        self._join(letters)
        other = self._count - 1
        self.shorter = np.zeros(self._count, np.int32)
        self.pending = np.zeros(self._count, np.float32)
        self.complete = np.where(np.append(self._ends, False), 0.0, cost).astype(np.float32)
        self.complete[:2] = 0.0  # a word without letters is none
        self.pending[other] = cost
        self.most = np.zeros(self._count, np.float32)
        self.start, self.hops, self.reach = 1, 1, 0.0 if oov_score == -math.inf else -2 * cost

    def __len__(self) -> int:
        return self._count

    def _grow(self, words: list[Sequence[int]], base: int) -> None:
        """Make the tree of letters: rising keys ``node * base + letter``, and which nodes end a word."""
        check(len(words) > 0, "words", "be one at least", 0)
        lengths = np.array([len(word) for word in words])
        check(bool((lengths > 0).all()), "words", "have at least one letter each", "one without")
        base = max(base, 1 + max(max(word) for word in words))
        rows = np.full((len(words), int(lengths.max())), -1, np.int64)
        for row, word in zip(rows, words):
            row[: len(word)] = word
        node, count, keys = np.ones(len(words), np.int64), 2, []
        ends = [np.zeros(2, bool)]
        for depth in range(rows.shape[1]):
            here = np.flatnonzero(lengths > depth)
            found, where = np.unique(node[here] * base + rows[here, depth], return_inverse=True)
            node[here] = count + where
            ended = np.zeros(len(found), bool)
            ended[where[lengths[here] == depth + 1]] = True
            count += len(found)
            keys.append(found)
            ends.append(ended)
        self._base, self._letter_keys, self._ends = base, np.concatenate(keys), np.concatenate(ends)

    def _walk(self, nodes: np.ndarray, letters: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return which ``nodes`` have the letters below them, and the nodes at their end."""
        at, found = np.arange(len(nodes)), nodes
        for letter in letters:
            keys = found * self._base + letter
            place = np.searchsorted(self._letter_keys, keys).clip(max=len(self._letter_keys) - 1)
            hit = self._letter_keys[place] == keys
            at, found = at[hit], place[hit] + 2
        return at, found

    def _join(self, letters: Sequence[Optional[Sequence[int]]]) -> None:
        """Make the edges by pieces, and where pieces lead that begin a word or leave the tree."""
        other = self._count - 1
        order = np.argsort(self._letter_keys % self._base, kind="stable")  # edges of each letter together
        parents, last = self._letter_keys[order] // self._base, self._letter_keys[order] % self._base
        self.from_root = np.full(self.size, other, np.int32)
        edges = []
        for piece, says in enumerate(letters):
            if self._starts[piece] and says is not None:
                _, node = self._walk(np.ones(1, np.int64), says)
                self.from_root[piece] = node[0] if len(node) else other
            elif says:
                ends = np.searchsorted(last, [says[0], says[0] + 1])
                above = parents[ends[0] : ends[1]]
                at, nodes = self._walk(above, says)
                edges.append((above[at], np.full(len(at), piece), nodes))
        edges.append((np.zeros(self.size, int), np.arange(self.size), self.from_root))  # of node 0
        above, piece, child = (np.concatenate(part) for part in zip(*edges))
        keys = above.astype(np.int64) * self.size + piece
        order = np.argsort(keys)
        self.keys = keys[order]
        self.piece, self.child = piece[order].astype(np.int32), child[order].astype(np.int32)
        self.first = np.searchsorted(self.keys, np.arange(self._count + 1) * self.size).astype(np.int32)
