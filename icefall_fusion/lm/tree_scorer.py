"""Scores of token paths through one tree per utterance; a token is forwarded when a child needs scoring.
Knows: integers of the tree, KV slots, one batched forward. Must not know: tokenizers, search, fusion.
"""
from __future__ import annotations

from typing import Optional, Sequence, Union

from torch import Tensor

Nodes = Union[Tensor, Sequence[int]]


class TreeScorer:
    """Natural-log probabilities of token paths, one tree for each utterance, one model call an event.

    Made by `CausalLm.open_tree`. A node is a global integer: a token after a distinct prefix. Nodes are never
    renumbered and stay valid for the life of the scorer: `keep` frees memory only, a freed node that is asked
    for again is computed again (and counted).
    """

    def root(self, utterance: int) -> int:
        """Return the node of ``bos + prompt`` of one utterance; its score is 0."""

    def roots(self) -> Tensor:
        """Return all roots [B] int64 (CPU)."""

    def insert(self, node: int, token_ids: Sequence[int]) -> int:
        """Walk or create the path ``token_ids`` below ``node`` and return its last node; computes nothing."""

    def insert_many(self, nodes: Sequence[int], paths: Sequence[Sequence[int]]) -> list[int]:
        """Do `insert` for each pair."""

    def child(self, nodes: Tensor, tokens: Tensor) -> Tensor:
        """Return the children [n] int64 (device of ``nodes``) of ``nodes`` [n] by ``tokens`` [n], made as needed.

        Each child made here counts as one scored token (shallow fusion has read its log-prob already).
        """

    def score(self, nodes: Nodes, previous: Optional[Nodes] = None) -> Tensor:
        """Return log P(path from root | prompt) [n] float32; one lazy forward for all that is missing.

        Args:
            nodes: one node for each hypothesis of the event, duplicates included (the counterfactual counters
                `path_kv_tokens` and `full_text_tokens` count each; the work is done once).
            previous: the node [n] that each of these hypotheses had at its last event; makes `path_kv_tokens`
                exact. Without it the new tokens of a hypothesis are those that nobody has scored before.
        """

    def next_log_probs(self, nodes: Nodes) -> Tensor:
        """Return log P(token | path of node) [n, vocab] float32 on the model's device; at most one forward."""

    def eos_scores(self, nodes: Nodes) -> Tensor:
        """Return log P(eos | path of node) [n] float32; at most one forward."""

    def keep(self, live: Nodes | Sequence[Sequence[int]]) -> None:
        """Free all that no node of ``live`` can reach upwards: slots are reused, distributions dropped."""

    def stats(self) -> dict[str, float]:
        """Return lm_forwards, lm_tokens_forwarded, lm_tokens_scored, kv_bytes_peak, lm_seconds,
        eager_tokens, path_kv_tokens, full_text_tokens, lm_tokens_recomputed, oom_backoffs."""
