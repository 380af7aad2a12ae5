"""What a cache of keys and values for each hypothesis would hold, counted beside a decode by token trees.
Knows: token trees, configurations of causal LMs. Must not know: search, fusion, what is measured.

A hypothesis of such a cache has all its tokens, bos and prompt included, and shares none with others. As
tensors are rectangles, each hypothesis has a row as long as the longest of all: that is what such a cache
takes (the copies that re-ordering makes are not counted). A tree has each distinct token once; its buffers
are rectangles, too.
"""
from __future__ import annotations

import contextlib
import sys
import weakref
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from icefall_fusion.lm import CausalLm
from icefall_fusion.lm.tree_forward import integers
from icefall_fusion.lm.tree_scorer import TreeScorer


class Held:
    """Tokens that hypotheses hold: the most at once, of all trees that there are then.

    Attributes:
        tokens: the most.
        cells: the most in rows that are all as long as the longest.
    """

    def __init__(self) -> None:
        self.tokens = self.cells = 0
        self._trees: weakref.WeakKeyDictionary[TreeScorer, np.ndarray] = weakref.WeakKeyDictionary()

    def note(self, scorer: TreeScorer, nodes: Any) -> None:
        """Take the hypotheses of some utterances into account.

        Args:
            scorer: of their batch.
            nodes: of all hypotheses of the utterances that are scored now.
        """
        flat = integers(nodes, "nodes")
        owner, depth = scorer.tree.utterance[flat], scorer.tree.depth[flat] + 1
        # of each utterance: tokens of its hypotheses, their number, tokens of the longest
        held = self._trees.setdefault(scorer, np.zeros((3, len(scorer.tree.roots)), np.int64))
        held[:, np.unique(owner)] = 0
        np.add.at(held[0], owner, depth)
        np.add.at(held[1], owner, 1)
        np.maximum.at(held[2], owner, depth)
        every = list(self._trees.values())
        self.tokens = max(self.tokens, sum(int(one[0].sum()) for one in every))
        self.cells = max(self.cells, sum(int(one[1].sum() * one[2].max()) for one in every))

    def bytes(self, lm: CausalLm, kv_bytes: int) -> dict[str, float]:
        """Return the bytes of both, and ``kv_bytes`` of a tree as a share of them."""
        size = bytes_a_token(lm)
        paths, rows = self.tokens * size, self.cells * size
        return {"kv_bytes_a_token": size, "kv_bytes_of_paths": paths, "kv_bytes_of_rows": rows,
                "kv_of_paths": kv_bytes / max(1, paths), "kv_of_rows": kv_bytes / max(1, rows)}


@contextlib.contextmanager
def counting() -> Iterator[Held]:
    """Count within the block what hypotheses hold when a tree is asked for their scores."""
    found = Held()
    before = {name: getattr(TreeScorer, name) for name in ("launch", "next_log_probs")}

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: TreeScorer, nodes: Any, *more: Any, **named: Any) -> Any:
            result = method(self, nodes, *more, **named)  # before: new nodes come into the tree's arrays
            found.note(self, nodes)
            return result

        return call

    for name, method in before.items():
        setattr(TreeScorer, name, counted(method))
    try:
        yield found
    finally:
        for name, method in before.items():
            setattr(TreeScorer, name, method)


def bytes_a_token(lm: CausalLm) -> int:
    """Return the bytes of keys and values of a token, all layers together."""
    config = lm.model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kind = lm.model.dtype if lm.model.dtype.is_floating_point else torch.float32
    return 2 * lm.layers * heads * size * torch.finfo(kind).bits // 8
