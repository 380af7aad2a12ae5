"""Attention of packed tokens: linear layers see [1, Q] without padding, attention sees [R, W] by utterance.
Knows: torch, transformers' attention interface. Must not know: tokens, which model it is, search, fusion.
"""
from __future__ import annotations

import contextlib
import threading
from typing import Iterator, Optional

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from icefall_fusion.lm.tree_cache import ForwardPlan

NAME = "icefall_tree"
_running = threading.local()  # the interface passes no argument of ours through every model


@contextlib.contextmanager
def running(plan: ForwardPlan) -> Iterator[None]:
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

    Padding costs only here and not in the linear layers, which hold most of the work. Query heads that share
    a key head are laid beside one another in the query dimension, so that no key is copied for them.

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


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, AttentionMaskInterface._global_mapping["sdpa"])
