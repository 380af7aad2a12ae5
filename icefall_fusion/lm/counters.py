"""What a token tree did, and what other designs would have done for the same requests.
Knows: nodes and lengths. Must not know: torch, models, search, fusion.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import numpy as np
from numpy import ndarray

from icefall_fusion.lm.token_tree import TokenTree


@dataclass
class TreeCounters:
    """Counts since the tree was opened.

    Args:
        lm_forwards: model calls.
        lm_tokens_forwarded: tokens in them, recomputed ones included, padding excluded.
        lm_tokens_recomputed: those of them that had been forwarded before (slot or distribution was freed).
        lm_tokens_scored: distinct tokens (nodes) that got a log-prob.
        lm_seconds: time in `score`, `next_log_probs`, `eos_scores` and `keep`.
        eager_tokens: forwards of a tree that forwards every scored token at once.
        path_kv_tokens: forwards of per-hypothesis KV caches, each of which takes its own new tokens.
        full_text_tokens: forwards of the full text, bos and prompt too, of every hypothesis at every event.
        oom_backoffs: times that a model call was split because memory ran out.
    """

    lm_forwards: int = 0
    lm_tokens_forwarded: int = 0
    lm_tokens_recomputed: int = 0
    lm_tokens_scored: int = 0
    lm_seconds: float = 0.0
    eager_tokens: int = 0
    path_kv_tokens: int = 0
    full_text_tokens: int = 0
    oom_backoffs: int = 0

    def count_event(self, tree: TokenTree, nodes: ndarray, previous: Optional[ndarray]) -> None:
        """Count one request for scores of hypotheses ``nodes`` [n], which were at ``previous`` [n] before."""
        if previous is None:
            new = tree.unscored_lengths(nodes)
        else:
            new = np.maximum(tree.depth[nodes] - tree.depth[previous], 0)
        self.path_kv_tokens += int(new.sum())
        self.full_text_tokens += int((tree.depth[nodes] + 1).sum())

    def count_frame(self, tree: TokenTree, nodes: ndarray) -> None:
        """Count one request for the distributions after ``nodes`` [n], as shallow fusion makes a frame."""
        new = nodes[~tree.was_forwarded[nodes] & (nodes != tree.roots[tree.utterance[nodes]])]
        self.path_kv_tokens += len(new)
        self.full_text_tokens += int((tree.depth[new] + 1).sum())

    def count_forward(self, tree: TokenTree, nodes: ndarray) -> None:
        """Count the tokens of one request's forwards; bos and prompt are new to every design once."""
        self.lm_tokens_forwarded += len(nodes)
        self.lm_tokens_recomputed += int(tree.was_forwarded[nodes].sum())
        first = nodes[~tree.was_forwarded[nodes]]
        prompt = int((tree.depth[first] <= tree.depth[tree.roots[tree.utterance[first]]]).sum())
        self.eager_tokens += prompt
        self.path_kv_tokens += prompt
