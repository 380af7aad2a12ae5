"""One model call over tree nodes: lays tokens, positions, slots and masks out, returns log-probs.
Knows: the tree's integers, transformers' attention. Must not know: which model it is, when to call, search.

Linear layers see packed tokens [1, Q], without padding; attention sees [R, W], an utterance a row. Legend:
Q new tokens of the forward, R utterances that have some, W the most of one utterance, S slots.
"""
from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Callable, Iterator, Optional, Protocol, Sequence, Union

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from icefall_fusion.common.checks import check
from icefall_fusion.lm.token_tree import TokenTree
from icefall_fusion.lm.tree_memory import SLOT_BUCKET, TreeCache, rank_within

if TYPE_CHECKING:
    from icefall_fusion.lm.fused import FusedModel
    from icefall_fusion.lm.tree_scorer import TreeCounters

PACKED_ATTENTION = "icefall_tree"  # its name in transformers
TOKEN_BUCKET = 8  # packed tokens are padded to a multiple: matrix kernels are made once for each size
GPU_TOKEN_BUCKET = 64  # the same on a GPU (see `token_bucket`)
_running = threading.local()  # the interface passes no argument of ours through every model


class ForwardPlan:
    """Where the tokens of one forward go: shared by all layers.

    Args:
        cells: [Q] utterance * slots_per_utterance + slot, where each token's keys and values are written.
        utterances: [R] rows of the buffers that are read; None when all are, in order.
        valid: index of each token in the R * W padded cells; [Q], or [Q + a few] when packed.
        padded: [R * W] index of the token of each padded cell (0 for padding).
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


class TreeModel(Protocol):
    """What the scorer needs of a model; `CausalLm` is one."""

    vocab_size: int
    eos_id: Optional[int]
    device: torch.device
    layers: int
    packed: bool
    fused: Optional[FusedModel]
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
    if model.fused is not None:
        from icefall_fusion.lm.fused_event import event_logits

        logits = event_logits(model.fused, tree, cache, nodes, wanted, model.window)
        return torch.log_softmax(logits.float(), dim=-1)
    slots, count = tree.slots, len(nodes)
    owner, depth = tree.utterance[nodes], tree.depth[nodes]
    utterances, row = np.unique(owner, return_inverse=True)
    width = int(np.bincount(row).max())
    valid = row * width + rank_within(row)
    padded = np.zeros(len(utterances) * width, np.int64)
    padded[valid] = np.arange(count)
    line, asked = np.arange(count), np.flatnonzero(wanted)
    asked_count = len(asked)
    if model.packed:  # padding repeats the first token, or asks for it
        bucket = token_bucket(model.device)
        line, asked = (np.pad(index, (0, -len(index) % bucket)) for index in (line, asked))
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
    return torch.log_softmax(logits[:asked_count].float(), dim=-1)


class ModelCalls:
    """Forwards of any number of tokens, ``most`` in a call, half as many once memory has run out; counted."""

    def __init__(self, model: TreeModel, most: int, counters: TreeCounters) -> None:
        self.model, self.most, self.counters = model, most, counters

    def run(self, tree: TokenTree, cache: TreeCache, todo: ndarray,
            nodes: ndarray) -> Iterator[tuple[ndarray, Tensor]]:
        """Forward ``todo`` [Q] sorted (see `forward`), and yield (some of ``nodes``, their log-probs [n, V])
        after each call. ``nodes`` [n] are sorted and among ``todo``.
        """
        wanted = np.zeros(len(todo), np.bool_)
        wanted[np.searchsorted(todo, nodes)] = True
        start = 0
        while start < len(todo):
            end = start + self.most
            try:
                log_probs = forward(self.model, tree, cache, todo[start:end], wanted[start:end])
            except torch.OutOfMemoryError:
                count = min(self.most, len(todo) - start)
                if count == 1:
                    raise
                self.most = count // 2
                self.counters.oom_backoffs += 1
                continue
            self.counters.lm_forwards += 1
            if len(log_probs):  # of a long prompt a whole chunk only fills the cache
                yield todo[start:end][wanted[start:end]], log_probs
            start = end


def token_bucket(device: torch.device) -> int:
    """Return the multiple to which packed tokens are padded.

    On a CPU each token of padding costs its time. A GPU's matrix products go by tiles of 64 rows or more, so
    that there are few shapes to choose kernels for. On recorded events (32 utterances, beam 10; 213 tokens on
    average) padding to 64 adds 16 % of rows, to 128 31 %, to 8 2 %.
    """
    return GPU_TOKEN_BUCKET if device.type == "cuda" else TOKEN_BUCKET


def to_device(device: torch.device, *arrays: ndarray) -> Sequence[Tensor]:
    """Copy integer arrays to ``device`` in one transfer."""
    whole = on_device(device, torch.from_numpy(np.concatenate(arrays)))
    return whole.split([len(array) for array in arrays])


def on_device(device: torch.device, values: Tensor) -> Tensor:
    """Copy a tensor of the host to ``device``; the host does not wait for a GPU."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _spread(seen: ndarray, valid: ndarray, shape: tuple[int, ...]) -> Tensor:
    """Return the mask [R, 1, W, S] bool with rows ``seen`` [Q, S] in the cells ``valid`` [Q]."""
    mask = np.zeros((shape[0] * shape[2], shape[3]), bool)
    mask[valid] = seen
    return torch.from_numpy(mask).view(shape)


def integers(values: Union[Tensor, ndarray, Sequence[int]], name: str) -> ndarray:
    """Return ``values`` flat, as int64 [n] on the host.

    Raises:
        ValueError: they are not integers; the message has ``name``.
    """
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    check(array.size == 0 or array.dtype.kind in "iu", name, "hold integers", values)
    return array.astype(np.int64, copy=False).reshape(-1)


def fetch(values: Tensor) -> Callable[[], ndarray]:
    """Start to copy values to the host; return a function that waits for them, the event's only wait."""
    if not values.is_cuda:
        return values.numpy
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(values.device))

    def wait() -> ndarray:
        copied.synchronize()
        return host.numpy()

    return wait


def pick(log_probs: Tensor, rows: ndarray, tokens: ndarray) -> Tensor:
    """Return ``log_probs[rows, tokens]`` [n]."""
    rows_, tokens_ = to_device(log_probs.device, rows, tokens)
    return log_probs[rows_, tokens_]


# --- packed attention --------------------------------------------------------------------------------------


@contextlib.contextmanager
def run_packed(plan: ForwardPlan) -> Iterator[None]:
    """Let `packed_attention` use ``plan`` inside the block (this thread only)."""
    _running.plan = plan
    try:
        yield
    finally:
        _running.plan = None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Optional[Tensor],
    dropout: float = 0.0,
    scaling: Optional[float] = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attend from packed queries to each utterance's own slots; plain `sdpa` outside of a tree forward.

    Padding costs time here alone, not in the linear layers, which take most of it. Query heads that share a
    key head lie side by side in the query dimension, so that no key is copied.

    Args:
        query: [1, G * H, Q, D], G query heads for each of H key heads.
        key, value: [R, H, S, D] from `TreeLayer.update`.
        attention_mask: [R, 1, W, S] bool.
    Returns:
        [1, Q, G * H, D], None
    """
    plan = getattr(_running, "plan", None)
    if plan is None:
        sdpa = AttentionInterface._global_mapping["sdpa"]
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    for name in ("position_bias", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} gives {name} to attention, which a token tree lacks")
    _, _, valid, padded = plan.on(query.device)
    rows, key_heads = key.shape[:2]
    heads, width = query.shape[1], attention_mask.shape[2]
    groups = heads // key_heads
    spread = query[0].transpose(0, 1).index_select(0, padded)  # [R * W, G * H, D]
    spread = spread.view(rows, width, key_heads, groups, -1).permute(0, 2, 3, 1, 4)  # [R, H, G, W, D]
    if groups > 1:
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    output = F.scaled_dot_product_attention(
        spread.flatten(2, 3), key, value, attn_mask=attention_mask, scale=scaling
    )  # [R, H, G * W, D]
    output = output.view(rows, key_heads, groups, width, -1).permute(0, 3, 1, 2, 4)  # [R, W, H, G, D]
    return output.reshape(rows * width, heads, -1).index_select(0, valid).unsqueeze(0), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, AttentionMaskInterface._global_mapping["sdpa"])
