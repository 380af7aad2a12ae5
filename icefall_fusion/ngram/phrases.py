"""Phrases with a boost each as an automaton over acoustic pieces (hot words).
Knows: pieces as integers, arrays. Must not know: text, searches, fusions.

Aho, Corasick 1975: a trie whose nodes point to their longest proper suffix that is a node too. So all phrases
are matched at once, in one step a piece. Boosts are paid on trial, as icefall's ``ContextGraph`` does:
a node *holds* the share of a phrase's boost that its pieces have earned; a hypothesis that leaves the node
gives it back. The boost of a phrase stays once the phrase is complete: its last piece is read and a word
begins or the utterance ends. So "new" is no match in "news".
"""
from __future__ import annotations

import functools
from typing import Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from icefall_fusion.common.checks import check, is_number

#: Boosts are multiples of this many nats. So sums are exact, and what is given back leaves nothing behind.
STEP = 2.0**-16
#: The largest boost in size, nats.
MOST = 1000.0


class PhraseAutomaton:
    """The phrases of one list.

    Args:
        size: V, the number of pieces.
        phrases: ids of the pieces and boost in nats of each phrase, no phrase twice. A boost below 0
            discourages a phrase; it is taken only when the phrase is complete.
        head: a piece that goes before every phrase and earns nothing (the delimiter between words), or None.

    Attributes:
        piece, shorter: [N] int32, last piece of each node, and its longest proper suffix; node 0 is the root.
        first: [N + 1] int32, the first child of each node; children follow one another, sorted by piece.
        from_root: [V] int32, child of the root by each piece, 0 where there is none.
        pending: [N] float32, what a hypothesis has on trial there, at least 0.
        complete: [N] float32, the boosts of all phrases that end there.
        most: [N] float32, the most that any piece scores there.
        keys: [N - 1] int64, ``parent * V + piece`` of all nodes but the root, rising.
        child: [N - 1] of the nodes of ``keys``, or None: they are 1, 2, ... (a word automaton has others).
        start: the node of an empty hypothesis. hops: most suffixes of a node, one after the other.
        reach: the largest score in size, nats.

    Raises:
        ValueError: a phrase is empty or comes twice, a piece is none, or a boost is no number up to 1000.
    """

    child: Optional[np.ndarray] = None

    def __init__(
        self, size: int, phrases: Sequence[tuple[Sequence[int], float]], head: Optional[int] = None
    ) -> None:
        self.size = size
        skipped = 0 if head is None else 1
        longest = max((len(ids) for ids, _ in phrases), default=0) + skipped
        rows = np.full((len(phrases), longest), -1, np.int64)
        for row, (ids, boost) in enumerate(phrases):
            check(len(ids) > 0, f"phrases[{row}]", "have at least one piece", list(ids))
            check_boost(boost, f"boost of phrases[{row}]")
            rows[row, : len(ids) + skipped] = [head, *ids] if skipped else ids
        largest = int(rows.max(initial=-1))
        check(largest < size, "phrases", f"have pieces below {size}", largest)
        boosts = np.array([boost for _, boost in phrases], np.float64)
        self._make_trie(rows, np.round(boosts / STEP) * STEP, skipped)
        self._link()
        self.start = 0 if head is None else int(self.from_root[head])

    def __len__(self) -> int:
        """Return N."""
        return len(self.piece)

    def _make_trie(self, rows: np.ndarray, boosts: np.ndarray, skipped: int) -> None:
        """Number the nodes level by level; give each its own share of boosts."""
        lengths = (rows >= 0).sum(1)
        node = np.zeros(len(rows), np.int64)
        levels, held, full = [(np.zeros(1, np.int64), np.full(1, -1))], [np.zeros(1)], [np.zeros(1)]
        count = 1
        for depth in range(rows.shape[1]):
            here = np.flatnonzero(lengths > depth)
            keys, where = np.unique(node[here] * self.size + rows[here, depth], return_inverse=True)
            node[here] = count + where
            count += len(keys)
            levels.append((keys // self.size, keys % self.size))
            share, ends = np.zeros(len(keys)), lengths[here] == depth + 1
            earned = (depth + 1 - skipped) / (lengths[here] - skipped)
            np.maximum.at(share, where, np.round(boosts[here] * earned / STEP) * STEP)
            held.append(share)
            done = np.zeros(len(keys))
            np.add.at(done, where[ends], boosts[here][ends])
            most = int(np.bincount(where[ends], minlength=1).max())
            check(most < 2, "phrases", "have each phrase once", f"one that comes {most} times")
            full.append(done)
        self._levels = np.cumsum([0, *(len(pieces) for _, pieces in levels)])
        self._parent, piece = (np.concatenate(part) for part in zip(*levels))
        self.piece = piece.astype(np.int32)
        children = np.searchsorted(self._parent[1:], np.arange(count + 1)) + 1
        self.first = children.astype(np.int32)
        self.from_root = np.zeros(self.size, np.int32)
        self.from_root[piece[children[0] : children[1]]] = np.arange(children[0], children[1])
        self.pending, self.complete = np.concatenate(held), np.concatenate(full)

    def _link(self) -> None:
        """Find the longest suffix of each node, and let scores look through them."""
        self.shorter, hops = np.zeros(len(self), np.int64), np.zeros(len(self), np.int64)
        self.keys = self._parent[1:] * self.size + self.piece[1:]
        levels = list(zip(self._levels[1:], self._levels[2:]))  # without the root
        for start, stop in levels:
            nodes = slice(start, stop)
            if start > 1:  # a single piece has none
                at = self.shorter[self._parent[nodes]]
                self.shorter[nodes] = self._step(at, self.piece[nodes].astype(np.int64), int(hops.max()))
            hops[nodes] = hops[self.shorter[nodes]] + 1
            self.pending[nodes] = np.maximum(self.pending[nodes], self.pending[self.shorter[nodes]])
            self.complete[nodes] += self.complete[self.shorter[nodes]]
        gain = np.zeros(len(self))  # the most that a hypothesis has on trial one piece later
        np.maximum.at(gain, self._parent[1:], self.pending[1:])
        for start, stop in levels:
            gain[start:stop] = np.maximum(gain[start:stop], gain[self.shorter[start:stop]])
        self.most = (gain - self.pending + np.maximum(self.complete, 0.0)).astype(np.float32)
        self.reach = float(self.pending.max() + np.abs(self.complete).max())
        self.hops, self.shorter = int(hops.max()), self.shorter.astype(np.int32)
        self.pending, self.complete = self.pending.astype(np.float32), self.complete.astype(np.float32)

    def _step(self, nodes: np.ndarray, pieces: np.ndarray, hops: int) -> np.ndarray:
        """Return the node after each node and piece, among those whose suffixes are known."""
        found, going = np.zeros_like(nodes), np.ones(len(nodes), np.bool_)
        for _ in range(hops + 1):
            keys = nodes * self.size + pieces
            at = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
            hit = going & (self.keys[at] == keys)
            found[hit] = at[hit] + 1
            going &= ~hit
            nodes = self.shorter[nodes]
        return found


def check_boost(boost: float, name: str) -> None:
    """Raise ValueError unless a boost is a number of nats, at most 1000 in size."""
    good = is_number(boost) and abs(boost) <= MOST
    check(good, name, f"be a number of nats from {-MOST:g} to {MOST:g}", boost)


class PhraseTensors:
    """The automata of a batch as one, on a device: the nodes of each begin at its base.

    Args:
        automata: at least one, all over as many pieces.
        device: of all tensors.

    Attributes:
        bases: of each automaton. pending, complete: [N] float32, see PhraseAutomaton.
    """

    def __init__(self, automata: Sequence[PhraseAutomaton], device: torch.device) -> None:
        self._device, self._size = device, automata[0].size
        ends = np.cumsum([0, *(len(automaton) for automaton in automata)])
        self.bases = {automaton: int(base) for automaton, base in zip(automata, ends)}
        self.pending = self._together([automaton.pending for automaton in automata])
        self.complete = self._together([automaton.complete for automaton in automata])

    def _together(self, parts: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts)).to(self._device)

    @functools.cached_property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Suffix and root [N] of each node; keys, rising, and nodes of all children [M]."""
        bases = self.bases.items()
        shorter = self._together([one.shorter.astype(np.int64) + base for one, base in bases])
        root = self._together([np.full(len(one), base) for one, base in bases])
        keys = self._together([np.full(1, -1), *(one.keys + base * self._size for one, base in bases)])
        nodes = [np.arange(1, len(one)) if one.child is None else one.child for one, _ in bases]
        child = self._together([np.zeros(1, np.int64), *(n + b for n, (_, b) in zip(nodes, bases))])
        return shorter, root, keys, child

    def next(self, nodes: Tensor, pieces: Tensor) -> Tensor:
        """Return the node after each node and piece, int64 tensors of shapes that broadcast."""
        shorter, root, keys, child = self._tables
        nodes, pieces = torch.broadcast_tensors(nodes, pieces)
        found, going = root[nodes], torch.ones_like(nodes, dtype=torch.bool)
        for _ in range(max(automaton.hops for automaton in self.bases) + 1):
            wanted = nodes * self._size + pieces
            at = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
            hit = going & (keys[at] == wanted)
            found = torch.where(hit, child[at], found)
            going, nodes = going & ~hit, shorter[nodes]
        return found

    def score(self, nodes: Tensor, pieces: Tensor, begins: Tensor) -> Tensor:
        """Return the change of boosts by each piece; ``begins`` tells which pieces begin a word."""
        change = self.pending[self.next(nodes, pieces)] - self.pending[nodes]
        return change + torch.where(begins, self.complete[nodes], torch.zeros_like(change))
