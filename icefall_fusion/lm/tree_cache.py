"""Device memory of the token tree: keys and values by slot, distributions by row; nothing ever moves.
Knows: torch, transformers' cache interface. Must not know: tokens, which model it is, search, fusion.
"""
from __future__ import annotations

import weakref
from typing import Optional

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class ForwardPlan:
    """Where the tokens of one forward go: shared by all layers.

    Legend: Q new tokens of the forward, R utterances that have some, W the most of one utterance, S slots.

    Args:
        cells: [Q] utterance * slots_per_utterance + slot, where each token's keys and values are written.
        utterances: [R] rows of the buffers that are read; None when all are, in order.
        valid: index of each token in the R * W padded places; [Q], or [Q + a few] when packed.
        padded: [R * W] index of each padded place in the Q tokens (0 for padding).
        slots: how many slots are read (at least those in use).
        packed: tokens come as one row [1, Q + a few] (the few are padding), else as [R, W].
    """

    def __init__(
        self,
        cells: Tensor,
        utterances: Optional[Tensor],
        valid: Tensor,
        padded: Tensor,
        slots: int,
        packed: bool,
    ) -> None:
        self.tensors = {cells.device: (cells, utterances, valid, padded)}
        self.slots, self.packed = slots, packed

    def on(self, device: torch.device) -> tuple[Tensor, Optional[Tensor], Tensor, Tensor]:
        """Return (cells, utterances, valid, padded) on ``device`` (layers may lie on several)."""
        if device not in self.tensors:
            first = next(iter(self.tensors.values()))
            self.tensors[device] = tuple(None if x is None else x.to(device) for x in first)
        return self.tensors[device]


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

    def grow(self, slots: int) -> None:
        """Make room for ``slots`` slots an utterance."""
        if self.is_initialized:
            self.keys, self.values = (_taller(buffer, slots) for buffer in (self.keys, self.values))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys and the first one; unused, as masks are given 4-D."""
        return self.cache.plan.slots, 0

    def get_seq_length(self) -> int:
        """Return 0: a tree has no one length, positions are always given."""
        return 0

    def get_max_length(self) -> int:
        """Return -1: no bound."""
        return -1


class TreeCache(Cache):
    """The layers' buffers; `plan` says where the running forward writes and reads."""

    def __init__(self, layers: int, utterances: int, slots: int) -> None:
        self.utterances, self.slots = utterances, slots
        self.plan: Optional[ForwardPlan] = None
        super().__init__(layers=[TreeLayer(self) for _ in range(layers)])

    def ensure(self, slots: int) -> None:
        """Grow every layer to ``slots`` slots an utterance."""
        if slots > self.slots:
            self.slots = slots
            for layer in self.layers:
                layer.grow(slots)

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

    def take(self, count: int) -> np.ndarray:
        """Return ``count`` rows [count] to write to."""
        if count > len(self._free):
            old = len(self.log_probs)
            needed = old + count - len(self._free)
            new = max(needed, min(max(2 * old, 64), self.max_rows))
            self.log_probs = _longer(self.log_probs, new)
            self._free = list(range(new - 1, old - 1, -1)) + self._free
        return np.array([self._free.pop() for _ in range(count)], np.int64)

    def free(self, rows: np.ndarray) -> None:
        """Take rows back."""
        self._free.extend(rows.tolist())


def _taller(buffer: Tensor, slots: int) -> Tensor:
    """Return ``buffer`` [B, S, H, D] with room for ``slots`` slots."""
    taller = buffer.new_zeros(buffer.shape[0], slots, *buffer.shape[2:])
    taller[:, : buffer.shape[1]] = buffer
    return taller


def _longer(rows: Tensor, count: int) -> Tensor:
    longer = rows.new_empty(count, rows.shape[1])
    longer[: len(rows)] = rows
    return longer
