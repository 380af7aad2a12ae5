"""One model call over tree nodes: lays tokens, positions, slots and masks out, returns log-probs.
Knows: the tree's integers, the cache's plan. Must not know: which model it is, when to call, search, fusion.
"""
from __future__ import annotations

from typing import Optional, Protocol, Sequence

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from icefall_fusion.lm.slots import SLOT_BUCKET, rank_within
from icefall_fusion.lm.token_tree import TokenTree
from icefall_fusion.lm.tree_cache import ForwardPlan, TreeCache

TOKEN_BUCKET = 8  # packed tokens are padded to a multiple: matrix kernels are made once for each size


class TreeModel(Protocol):
    """What the scorer needs of a model; `CausalLm` is one."""

    vocab_size: int
    eos_id: Optional[int]
    device: torch.device
    layers: int
    packed: bool
    window: Optional[int]
    max_tokens: Optional[int]

    def tree_logits(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor,
        window_mask: Optional[Tensor],
        cache: TreeCache,
        wanted: Tensor,
    ) -> Tensor:
        """Return logits [n, V] after the tokens of index ``wanted`` [n]; writes the cache at its plan."""


@torch.inference_mode()
def forward(model: TreeModel, tree: TokenTree, cache: TreeCache, nodes: ndarray, wanted: ndarray) -> Tensor:
    """Run the model over ``nodes`` and return the log-probs [n, V] float32 after the wanted ones.

    Args:
        model: the language model.
        tree: holds the nodes; they have slots, and so have their ancestors.
        cache: keys and values of the ancestors; those of ``nodes`` are added.
        nodes: [Q] distinct, parents before children.
        wanted: [Q] bool, which distributions to return.
    """
    slots, count = tree.slots, len(nodes)
    owner, depth = tree.utterance[nodes], tree.depth[nodes]
    utterances, row = np.unique(owner, return_inverse=True)
    width = int(np.bincount(row).max())
    valid = row * width + rank_within(row)
    padded = np.zeros(len(utterances) * width, np.int64)
    padded[valid] = np.arange(count)
    line, asked = np.arange(count), np.flatnonzero(wanted)
    found = len(asked)
    if model.packed:  # padding repeats the first token, or asks for it
        line, asked = (np.pad(places, (0, -len(places) % TOKEN_BUCKET)) for places in (line, asked))
    length = -(-int(slots.used[utterances].max()) // SLOT_BUCKET) * SLOT_BUCKET

    tokens, positions, cells, valid_, padded_, rows, wanted_ = to_device(
        model.device,
        tree.token[nodes][line],
        depth[line],
        owner * cache.slots + slots.of_node[nodes],
        valid[line],
        padded,
        utterances,
        asked,
    )
    everyone = len(utterances) == cache.utterances
    cache.plan = ForwardPlan(cells, None if everyone else rows, valid_, padded_, length, model.packed)

    seen = slots.visible(owner, nodes, length)
    near = None
    if model.window is not None and depth.max() >= model.window:
        near = seen & slots.in_window(owner, depth, length, model.window)
    shape = (len(utterances), 1, width, length)
    mask = on_device(model.device, _spread(seen, valid, shape))
    window_mask = None if near is None else on_device(model.device, _spread(near, valid, shape))
    logits = model.tree_logits(tokens, positions, mask, window_mask, cache, wanted_)
    return torch.log_softmax(logits[:found].float(), dim=-1)


def to_device(device: torch.device, *arrays: ndarray) -> Sequence[Tensor]:
    """Copy integer arrays to ``device`` in one transfer."""
    whole = on_device(device, torch.from_numpy(np.concatenate(arrays)))
    return whole.split([len(array) for array in arrays])


def on_device(device: torch.device, values: Tensor) -> Tensor:
    """Copy a tensor of the host to ``device``; a GPU gets it when it is due, and the host goes on."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _spread(seen: ndarray, valid: ndarray, shape: tuple[int, ...]) -> Tensor:
    """Return the mask [R, 1, W, S] bool with rows ``seen`` [Q, S] at the places ``valid`` [Q]."""
    mask = np.zeros((shape[0] * shape[2], shape[3]), bool)
    mask[valid] = seen
    return torch.from_numpy(mask).view(shape)
