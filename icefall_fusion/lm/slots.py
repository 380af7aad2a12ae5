"""Which slot of an utterance's KV buffer holds which node, and which slots each slot may look at.
Knows: numpy arrays of integers and bits. Must not know: torch, tokens, scores.
"""
from __future__ import annotations

import numpy as np
from numpy import ndarray

FIRST_SLOTS = 64
SLOT_BUCKET = 32  # forwards read a multiple of this: few shapes, aligned masks


class SlotTable:
    """Slots 0..S-1 for each utterance; a node keeps its slot until it is released.

    Attributes:
        of_node: slot of each node [N], -1 when it has none.
        used: slots of each utterance ever in use [B]: a forward needs to look at no more of the buffer.
        capacity: S, slots for each utterance that the tables have room for; doubles when needed.
        depth: depth of the node in each slot [B, S], for windowed attention.
    """

    def __init__(self, utterances: int) -> None:
        self.of_node = np.zeros(0, np.int64)
        self.used = np.zeros(utterances, np.int64)
        self.capacity = 0
        self._free: list[list[int]] = [[] for _ in range(utterances)]  # released slots
        self._cached_children = np.zeros(0, np.int64)  # of each node: how many children hold slots
        self._held = np.zeros(0, bool)  # scratch of `release`
        self._cached = np.zeros(0, np.int64)  # nodes that have slots
        self._set_capacity(FIRST_SLOTS, utterances)

    def ensure_nodes(self, count: int) -> None:
        """Make room for ``count`` nodes."""
        old = len(self.of_node)
        if count <= old:
            return
        self.of_node = np.concatenate([self.of_node, np.full(count - old, -1)])
        self._cached_children = np.concatenate([self._cached_children, np.zeros(count - old, np.int64)])
        self._held = np.concatenate([self._held, np.zeros(count - old, bool)])

    def assign(self, nodes: ndarray, parent: ndarray, utterance: ndarray, depth: ndarray) -> None:
        """Give each of ``nodes`` [n] (parents first) a slot that sees itself and its ancestors."""
        if not len(nodes):
            return
        owner = utterance[nodes]
        slots = self._take(owner)
        self.of_node[nodes] = slots
        self._cached = np.concatenate([self._cached, nodes])
        self.depth[owner, slots] = depth[nodes]
        above = parent[nodes]
        np.add.at(self._cached_children, above[above >= 0], 1)
        for level in np.unique(depth[nodes]):  # a parent's bits must be there before its child's
            at = depth[nodes] == level
            b, slot, up = owner[at], slots[at], above[at]
            self._bits[b, slot] = self._bits[b, self.of_node[up]] if level else 0
            self._bits[b, slot, slot >> 3] |= (128 >> (slot & 7)).astype(np.uint8)

    def release(self, held: ndarray, parent: ndarray, utterance: ndarray) -> None:
        """Free every slot whose node is neither in ``held`` nor above one of them.

        Dead leaves first, then what became a leaf: the work grows with what is freed, not with the text.
        """
        self._held[held] = True
        nodes = self._cached
        while True:
            dead = nodes[(self._cached_children[nodes] == 0) & ~self._held[nodes]]
            if not len(dead):
                break
            for b, slot in zip(utterance[dead].tolist(), self.of_node[dead].tolist()):
                self._free[b].append(slot)
            self.of_node[dead] = -1
            above = parent[dead]
            above = above[above >= 0]
            np.subtract.at(self._cached_children, above, 1)
            nodes = np.unique(above)
        self._held[held] = False
        self._cached = self._cached[self.of_node[self._cached] >= 0]

    def visible(self, utterances: ndarray, nodes: ndarray, length: int) -> ndarray:
        """Return which slots each node sees, its ancestors and itself [n, length] bool."""
        bits = self._bits[utterances, self.of_node[nodes], : (length + 7) // 8]
        return np.unpackbits(bits, axis=-1, count=length).view(bool)

    def in_window(self, utterances: ndarray, depths: ndarray, length: int, window: int) -> ndarray:
        """Return which slots hold a token less than ``window`` before each node [n, length] bool."""
        return depths[:, None] - self.depth[utterances, :length] < window

    def _take(self, owner: ndarray) -> ndarray:
        """Return a slot for each of ``owner`` [n], released ones of its utterance first."""
        rank, counts = rank_within(owner), np.bincount(owner, minlength=len(self.used))
        slots = np.empty(len(owner), np.int64)
        reused = np.zeros(len(self.used), np.int64)
        for b in np.flatnonzero(counts):
            free = self._free[b]
            if free:
                reused[b] = take = min(int(counts[b]), len(free))
                slots[(owner == b) & (rank < take)] = free[-take:][::-1]
                del free[-take:]
        fresh = rank >= reused[owner]
        slots[fresh] = (self.used[owner] + rank - reused[owner])[fresh]
        self.used += counts - reused
        most = int(self.used.max())
        if most > self.capacity:
            self._set_capacity(max(most, 2 * self.capacity), len(self.used))
        return slots

    def _set_capacity(self, capacity: int, utterances: int) -> None:
        capacity = -(-capacity // SLOT_BUCKET) * SLOT_BUCKET
        bits = np.zeros((utterances, capacity, capacity // 8), np.uint8)
        depth = np.zeros((utterances, capacity), np.int64)
        if self.capacity:
            bits[:, : self.capacity, : self.capacity // 8] = self._bits
            depth[:, : self.capacity] = self.depth
        self._bits, self.depth, self.capacity = bits, depth, capacity


def rank_within(row: ndarray) -> ndarray:
    """Return for each entry how many earlier entries have the same value [n]."""
    order = np.argsort(row, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(row))[:-1]])
    rank = np.empty_like(row)
    rank[order] = np.arange(len(row)) - starts[row[order]]
    return rank
