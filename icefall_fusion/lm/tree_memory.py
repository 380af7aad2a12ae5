"""Memory of the token tree: which slot holds which node, keys and values by slot, distributions by row.
Knows: numpy, torch, transformers' cache interface. Must not know: tokens, which model it is, search, fusion.

Nothing that is written ever moves. Legend: B utterances, S slots of an utterance, H key heads, D head size,
V vocabulary.
"""
from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Optional

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

if TYPE_CHECKING:
    from icefall_fusion.lm.tree_forward import ForwardPlan

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

        Dead leaves first, then nodes that became leaves. The time depends on what is freed, not on the text.
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
        return np.unpackbits(self.bits(utterances, nodes, length), axis=-1, count=length).view(bool)

    def bits(self, utterances: ndarray, nodes: ndarray, length: int) -> ndarray:
        """Return `visible` as bits [n, at most length / 8] uint8, the first slot of eight highest."""
        return self._bits[utterances, self.of_node[nodes], : (length + 7) // 8]

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


class TreeLayer(CacheLayerMixin):
    """Keys and values of one layer: buffers [B, S, H, D], read as [R, H, slots, D]."""

    is_sliding = False

    def __init__(self, cache: TreeCache) -> None:
        super().__init__()
        self.cache: TreeCache = weakref.proxy(cache)  # a circle would keep all buffers until a collection

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros (garbage could hold nan, and 0 * nan is nan)."""
        self.keys, self.values = (
            states.new_zeros(self.cache.utterances, self.cache.slots, states.shape[1], states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write new states [1, H, Q, D] or [R, H, W, D] by the plan; return [R, H, slots, D] twice."""
        plan = self.cache.plan
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cells, utterances, valid, _ = plan.on(self.keys.device)
        pair = []
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            tokens = states.transpose(1, 2).flatten(0, 1)  # [Q or R * W, H, D]
            tokens = tokens[: len(cells)] if plan.packed else tokens[valid]
            buffer.flatten(0, 1).index_copy_(0, cells, tokens)
            seen = buffer[:, : plan.slots]
            pair.append((seen if utterances is None else seen.index_select(0, utterances)).transpose(1, 2))
        return pair[0], pair[1]

    def grow(self) -> None:
        """Make room for all slots and utterances of the cache."""
        if self.is_initialized:
            shape = self.cache.utterances, self.cache.slots
            self.keys, self.values = (_larger(buffer, *shape) for buffer in (self.keys, self.values))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys and the first one; unused, as masks are 4-D."""
        return self.cache.plan.slots, 0

    def get_seq_length(self) -> int:
        """Return 0: a tree has no one length, and the caller passes positions."""
        return 0

    def get_max_length(self) -> int:
        """Return -1: no bound."""
        return -1


class TreeCache(Cache):
    """The layers' buffers; `plan` says where the running forward writes and reads."""

    def __init__(self, layers: int, utterances: int, slots: int) -> None:
        self.utterances, self.slots, self._whole = utterances, slots, True
        self.plan: Optional[ForwardPlan] = None
        super().__init__(layers=[TreeLayer(self) for _ in range(layers)])

    def ensure(self, slots: int, utterances: int = 0) -> None:
        """Grow every layer to ``slots`` slots an utterance, and to ``utterances``, where there are fewer."""
        if slots > self.slots or utterances > self.utterances or not self._whole:
            self.slots, self.utterances = max(slots, self.slots), max(utterances, self.utterances)
            self._whole = False  # if memory runs out now, the next call grows all layers again
            for layer in self.layers:
                layer.grow()
            self._whole = True

    @property
    def kv_bytes(self) -> int:
        """Bytes of all buffers."""
        buffers = [x for layer in self.layers if layer.is_initialized for x in (layer.keys, layer.values)]
        return sum(x.numel() * x.element_size() for x in buffers)


class DistributionStore:
    """Next-token log-probabilities [rows, V] float32; rows are handed out, freed and reused.

    Args:
        vocab_size: V.
        device: where they lie.
        max_bytes: bound of the buffer; only `take` of more rows than fit goes beyond it.
    """

    def __init__(self, vocab_size: int, device: torch.device, max_bytes: int) -> None:
        self.log_probs = torch.empty(0, vocab_size, device=device)
        self.max_rows = max_bytes // (4 * vocab_size)
        self._free: list[int] = []

    @property
    def in_use(self) -> int:
        """Rows handed out."""
        return len(self.log_probs) - len(self._free)

    def take(self, count: int) -> ndarray:
        """Return ``count`` rows [count] to write to."""
        if count > len(self._free):
            old = len(self.log_probs)
            needed = old + count - len(self._free)
            new = max(needed, min(max(2 * old, 64), self.max_rows))
            self.log_probs = _longer(self.log_probs, new)
            self._free = list(range(new - 1, old - 1, -1)) + self._free
        return np.array([self._free.pop() for _ in range(count)], np.int64)

    def free(self, rows: ndarray) -> None:
        """Take rows back."""
        self._free.extend(rows.tolist())


def _larger(buffer: Tensor, utterances: int, slots: int) -> Tensor:
    """Return ``buffer`` [B, S, H, D] with room for more utterances and slots."""
    larger = buffer.new_zeros(utterances, slots, *buffer.shape[2:])
    larger[: buffer.shape[0], : buffer.shape[1]] = buffer
    return larger


def _longer(rows: Tensor, count: int) -> Tensor:
    longer = rows.new_empty(count, rows.shape[1])
    longer[: len(rows)] = rows
    return longer


def rank_within(row: ndarray) -> ndarray:
    """Return for each entry how many earlier entries have the same value [n]."""
    order = np.argsort(row, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(row))[:-1]])
    rank = np.empty_like(row)
    rank[order] = np.arange(len(row)) - starts[row[order]]
    return rank
