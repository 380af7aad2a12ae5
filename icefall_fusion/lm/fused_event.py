"""One event for the fused kernels: tokens in the order of utterances, masks as bits, all in one transfer.
Knows: the tree's integers, the cache, the fused model. Must not know: when to call, search.

Legend: B utterances, P tokens with padding, A wanted distributions with padding, L layers. Kernels find all
that changes from event to event in one buffer, so that they can be replayed as a graph (graphs.py).
"""
from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Optional

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from icefall_fusion.lm.tree_forward import on_device, token_bucket
from icefall_fusion.lm.tree_memory import SLOT_BUCKET

if TYPE_CHECKING:
    from icefall_fusion.lm.fused import FusedModel
    from icefall_fusion.lm.token_tree import TokenTree
    from icefall_fusion.lm.tree_memory import TreeCache

_LEAST_WIDTH, _LEAST_WORDS = 16, 4  # smaller ones cost as much: fewer sizes, fewer graphs


class EventSizes(NamedTuple):
    """What the launches of an event depend on; few values each.

    Args:
        tokens: P.
        wanted: A.
        width: at least the most new tokens of one utterance; a power of two.
        words: of a mask, 32 slots each; a power of two.
        near: whether there are masks of a sliding window.
        utterances: at least B; a power of two.
        layers: L.
    """

    tokens: int
    wanted: int
    width: int
    words: int
    near: bool
    utterances: int
    layers: int

    @property
    def parts(self) -> list[int]:
        """Lengths of the buffer's parts, in int64: tokens, positions, cells, wanted, places, rows, masks."""
        masks = self.tokens * self.words // 2
        sizes = 3 * [self.tokens] + [self.wanted, 2 * self.layers, 4 * self.utterances]
        return sizes + [masks, masks if self.near else 0]


class EventInputs(NamedTuple):
    """An event on the device, as views of its buffer.

    Args:
        tokens, positions: [P] ids and depths, padding at the end.
        cells: [P] cache cell of each token, utterance * slots_per_utterance + slot; -1 of padding.
        wanted: [A] index of the tokens whose distributions are wanted.
        places: [2 L] addresses of each layer's keys and values.
        rows: [B or more, 4] of each utterance: first token, the one after the last, slots, first cache cell.
        seen: [P, words] int32, the bits of `SlotTable`.
        near: the same for layers with a sliding window; None: as ``seen``.
        width: at least the most tokens of one utterance.
    """

    tokens: Tensor
    positions: Tensor
    cells: Tensor
    wanted: Tensor
    places: Tensor
    rows: Tensor
    seen: Tensor
    near: Optional[Tensor]
    width: int

    @classmethod
    def of(cls, buffer: Tensor, sizes: EventSizes) -> EventInputs:
        """Return the views of a buffer [sum of parts] int64."""
        tokens, positions, cells, wanted, places, rows, seen, near = buffer.split(sizes.parts)
        seen, near = (mask.view(torch.int32).view(-1, sizes.words) for mask in (seen, near))
        return cls(tokens, positions, cells, wanted, places, rows.view(-1, 4), seen,
                   near if sizes.near else None, sizes.width)


def lay_out(
    tree: TokenTree, cache: TreeCache, nodes: ndarray, wanted: ndarray, window: Optional[int], bucket: int
) -> tuple[EventSizes, ndarray]:
    """Return the sizes of an event and its buffer on the host, int64.

    Args:
        tree: holds the nodes; they have slots, and so have their ancestors.
        cache: its buffers are there.
        nodes: [Q] distinct.
        wanted: [Q] bool, which distributions are wanted.
        window: of sliding attention in tokens, or None.
        bucket: tokens are padded to a multiple of it.
    """
    slots, batch = tree.slots, cache.utterances
    order = np.argsort(tree.utterance[nodes], kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    asked, nodes = place[np.flatnonzero(wanted)], nodes[order]
    owner, depth = tree.utterance[nodes], tree.depth[nodes]
    ends = np.searchsorted(owner, np.arange(batch), side="right")
    begins = np.concatenate([[0], ends[:-1]])
    used = slots.used * (ends > begins)
    near = window is not None and int(depth.max()) >= window
    sizes = EventSizes(
        -(-len(nodes) // bucket) * bucket, -(-len(asked) // bucket) * bucket,
        max(_LEAST_WIDTH, _power(int((ends - begins).max()))),
        max(_LEAST_WORDS, _power(-(-int(used.max()) // SLOT_BUCKET))), near, _power(batch), len(cache.layers),
    )
    buffer = np.zeros(sum(sizes.parts), np.int64)
    views = np.split(buffer, np.cumsum(sizes.parts)[:-1])
    cells = owner * cache.slots + slots.of_node[nodes]
    for view, values in zip(views, (tree.token[nodes], depth, cells, asked)):
        view[: len(values)] = values
    views[2][len(nodes) :] = -1
    views[4][:] = [x.data_ptr() for layer in cache.layers for x in (layer.keys, layer.values)]
    views[5].reshape(-1, 4)[:batch] = np.stack([begins, ends, used, cache.slots * np.arange(batch)], 1)
    bits = slots.bits(owner, nodes, SLOT_BUCKET * sizes.words)
    _bytes(views[6], sizes)[: len(nodes), : bits.shape[1]] = bits
    if near:
        inside = slots.in_window(owner, depth, 8 * bits.shape[1], window)
        _bytes(views[7], sizes)[: len(nodes), : bits.shape[1]] = bits & np.packbits(inside, axis=-1)
    return sizes, buffer


def event_logits(
    fused: FusedModel, tree: TokenTree, cache: TreeCache, nodes: ndarray, wanted: ndarray,
    window: Optional[int],
) -> Tensor:
    """Return the logits [n, V] after the wanted ones of ``nodes`` [Q]; writes their keys and values."""
    device = fused.device
    fused.allocate(cache)
    sizes, buffer = lay_out(tree, cache, nodes, wanted, window, token_bucket(device))
    logits = None
    if fused.graphs is not None:
        host = torch.from_numpy(buffer)
        logits = fused.graphs.logits(sizes, host.pin_memory() if device.type == "cuda" else host)
    if logits is None:
        logits = fused.logits(EventInputs.of(on_device(device, torch.from_numpy(buffer)), sizes))
    return logits[: int(wanted.sum())]


def _bytes(view: ndarray, sizes: EventSizes) -> ndarray:
    return view.view(np.uint8).reshape(sizes.tokens, 4 * sizes.words)


def _power(size: int) -> int:
    """Return the power of two that is at least ``size``."""
    return 1 << max(0, size - 1).bit_length()
