"""Scores of token paths through one tree per utterance; a token is forwarded when a child needs scoring.
Knows: integers of the tree, KV slots, one batched forward. Must not know: tokenizers, search, fusion.
"""
from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Callable, Iterator, Sequence, Union

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from icefall_fusion.common.checks import check, is_count
from icefall_fusion.lm.token_tree import NONE, make_tree
from icefall_fusion.lm.tree_forward import ModelCalls, TreeModel, fetch, integers, on_device, pick
from icefall_fusion.lm.tree_memory import DistributionStore, TreeCache

Nodes = Union[Tensor, ndarray, Sequence[int]]


@dataclass(frozen=True)
class TreeOptions:
    """Bounds on memory.

    Args:
        max_forward_tokens: tokens in one model call; more are split over several calls.
        max_distribution_bytes: next-token distributions kept for later children; what does not fit is
            computed again when needed (and counted).
    """

    max_forward_tokens: int = 2048
    max_distribution_bytes: int = 2**29

    def __post_init__(self) -> None:
        for name, least in (("max_forward_tokens", 1), ("max_distribution_bytes", 0)):
            value = getattr(self, name)
            check(is_count(value, least), f"TreeOptions.{name}", f"be an integer, at least {least}", value)

    def tokens_a_call(self, vocab_size: int) -> int:
        """Return how many tokens one model call takes, so that their distributions fit, too."""
        return max(1, min(self.max_forward_tokens, self.max_distribution_bytes // (4 * vocab_size)))


@dataclass
class TreeCounters:
    """Counts since the tree was opened.

    Args:
        lm_forwards: model calls.
        lm_tokens_forwarded: tokens in them, recomputed ones included, padding excluded.
        lm_tokens_recomputed: tokens that had been forwarded before (their slot or distribution was freed).
        lm_tokens_scored: distinct tokens (nodes) that got a log-prob.
        lm_seconds: time in `score`, `next_log_probs`, `eos_scores` and `keep`.
        oom_backoffs: times that a model call was split because memory ran out.
    """

    lm_forwards: int = 0
    lm_tokens_forwarded: int = 0
    lm_tokens_recomputed: int = 0
    lm_tokens_scored: int = 0
    lm_seconds: float = 0.0
    oom_backoffs: int = 0


class TreeScorer:
    """Natural-log probabilities of token paths, one tree for each utterance, one model call an event.

    Made by `CausalLm.open_tree`. A node is a global integer: a token after a distinct prefix. Nodes are never
    renumbered and stay valid for the life of the scorer. `keep` frees memory only: a freed node that is asked
    for again is computed again, and counted as recomputed.

    Args:
        model: the language model.
        prompts: tokens of each utterance before its text, bos included, at least one each.
        options: bounds on memory.
        aside: run on the model's side stream, at the same time as the caller's kernels (side_stream.py).
    """

    def __init__(
        self, model: TreeModel, prompts: Sequence[Sequence[int]], options: TreeOptions, aside: bool = False
    ) -> None:
        self.model, self.options = model, options
        self.tree = make_tree(model.vocab_size, len(prompts))
        self.counters = TreeCounters()
        self._cache = TreeCache(model.layers, len(prompts), self.tree.slots.capacity)
        self._store = DistributionStore(model.vocab_size, model.device, options.max_distribution_bytes)
        self._calls = ModelCalls(model, options.tokens_a_call(model.vocab_size), self.counters)
        self._side = None
        if aside and model.device.type == "cuda":
            from icefall_fusion.lm.side_stream import side_stream

            self._side = side_stream(model)
        for b, prompt in enumerate(prompts):
            self.tree.add_root(b, prompt)

    # --- the tree ----------------------------------------------------------------------------------------

    def root(self, utterance: int) -> int:
        """Return the node of ``bos + prompt`` of one utterance; its score is 0."""
        return int(self.tree.roots[utterance])

    def roots(self) -> Tensor:
        """Return all roots [B] int64 (CPU)."""
        return torch.from_numpy(self.tree.roots.copy())

    def insert(self, node: int, token_ids: Sequence[int]) -> int:
        """Walk or create the path ``token_ids`` below ``node`` and return its last node; computes nothing."""
        good = is_count(node, 0) and node < len(self.tree)
        check(good, "node", f"lie between 0 and {len(self.tree) - 1}", node)
        return self.tree.insert(int(node), integers(token_ids, "token_ids").tolist())

    def child(self, nodes: Tensor, tokens: Tensor) -> Tensor:
        """Return the children [n] int64 of ``nodes`` [n] by ``tokens`` [n], made as needed.

        Each child made here counts as one scored token (shallow fusion has read its log-prob already).
        """
        above = self._nodes(nodes)
        children, made = self.tree.children(above, integers(tokens, "tokens"))
        self.counters.lm_tokens_scored += made
        return torch.from_numpy(children).to(nodes.device)

    def keep(self, live: Union[Nodes, Sequence[Sequence[int]]]) -> None:
        """Free all that no node of ``live`` (flat, or one list for each utterance) or root can reach upwards.

        Slots are reused; distributions are dropped unless they lie at a live node or between two of them.
        """
        check(isinstance(live, (Tensor, ndarray, Sequence)), "live", "hold nodes", live)
        if not isinstance(live, (Tensor, ndarray)) and len(live) and not np.isscalar(live[0]):
            live = np.concatenate([integers(nodes, "live") for nodes in live])
        with self._timed(wait=False):
            self._store.free(self.tree.release(self._nodes(live)))

    # --- scores ------------------------------------------------------------------------------------------

    def score(self, nodes: Nodes, eos: bool = False) -> Tensor:
        """Return log P(path from root | prompt) [n] float32; one lazy forward for all that is missing.

        Args:
            nodes: one node for each hypothesis of the event; duplicates cost nothing.
            eos: add log P(eos | path), in the same forward.
        """
        return self.launch(nodes, eos)()

    def launch(self, nodes: Nodes, eos: bool = False) -> Callable[[], Tensor]:
        """Start to score as `score` does; return what waits for the scores and returns them.

        On a GPU the model runs until then; with ``aside`` at the same time as the caller's own kernels.
        The nodes count as scored once the scores were waited for.
        """
        with self._timed(wait=False):
            wanted = self._nodes(nodes)
            tree = self.tree
            new = tree.unscored(wanted)
            at, tokens = tree.parent[new], tree.token[new]
            ends = np.unique(wanted) if eos else wanted[:0]
            wait = self._launch_log_probs(
                np.concatenate([at, ends]), np.concatenate([tokens, self._eos(len(ends))])
            )
            self.counters.lm_tokens_scored += len(new)

        def finish() -> Tensor:
            with self._timed(wait=False):
                log_probs = wait()
                tree.set_scores(new, log_probs[: len(new)])
                totals = tree.score[wanted]
                if eos:
                    totals = totals + log_probs[len(new) :][np.searchsorted(ends, wanted)]
                return self._like(nodes, totals)

        return finish

    def known(self, nodes: Nodes) -> tuple[ndarray, ndarray]:
        """Return which of ``nodes`` [n] are scored, bool [n], and log P of their paths [n], else NaN."""
        wanted = self._nodes(nodes)  # before: new nodes may move the tree's arrays
        scores = self.tree.score[wanted]
        return ~np.isnan(scores), scores

    def eos_scores(self, nodes: Nodes) -> Tensor:
        """Return log P(eos | path of node) [n] float32; at most one lazy forward."""
        with self._timed():
            wanted = self._nodes(nodes)
            return self._like(nodes, self._launch_log_probs(wanted, self._eos(len(wanted)))())

    def next_log_probs(self, nodes: Nodes) -> Tensor:
        """Return log P(token | path of node) [n, V] float32 on the model's device; at most one forward."""
        with self._timed():
            wanted = self._nodes(nodes)
            missing = wanted[self.tree.row[wanted] < 0]
            with self._aside():
                for at, log_probs in self._distributions(np.unique(missing)):
                    self._keep_distributions(at, log_probs)
                rows = on_device(self.model.device, torch.from_numpy(self.tree.row[wanted]))
                found = self._store.log_probs.index_select(0, rows)
            return found if self._side is None else self._side.hand_over(found)

    def stats(self) -> dict[str, float]:
        """Return the counters (see `TreeCounters`) and the bytes of keys, values and distributions."""
        return {
            **vars(self.counters),
            "kv_bytes_peak": self._cache.kv_bytes,  # buffers never shrink
            "distribution_bytes_peak": self._store.log_probs.numel() * 4,
        }

    # --- inside ------------------------------------------------------------------------------------------

    def _launch_log_probs(self, at: ndarray, tokens: ndarray) -> Callable[[], ndarray]:
        """Start to compute log P(token | path of node) for pairs of ``at`` [n] and ``tokens`` [n]; return
        what waits for them, [n] float64.
        """
        with self._aside():
            order, values = self._device_log_probs(at, tokens)
            wait = fetch(values)

        def finish() -> ndarray:
            result = np.empty(len(at))
            result[order] = wait()
            return result

        return finish

    def _device_log_probs(self, at: ndarray, tokens: ndarray) -> tuple[ndarray, Tensor]:
        """Return them [n] float64 on the device in some order, and that order [n]."""
        rows = self.tree.row[at]
        known, missing = np.flatnonzero(rows >= 0), np.flatnonzero(rows < 0)
        index, values = [known], [pick(self._store.log_probs, rows[known], tokens[known])]
        for nodes, log_probs in self._distributions(np.unique(at[missing])):
            row = np.minimum(np.searchsorted(nodes, at[missing]), len(nodes) - 1)
            here = nodes[row] == at[missing]
            index.append(missing[here])
            values.append(pick(log_probs, row[here], tokens[missing[here]]))
            if self._store.in_use + len(nodes) <= self._store.max_rows:
                self._keep_distributions(nodes, log_probs)
        return np.concatenate(index), torch.cat(values).double()

    def _distributions(self, nodes: ndarray) -> Iterator[tuple[ndarray, Tensor]]:
        """Yield (some of ``nodes`` [n] sorted, their log-probs [n, V]) until all had a forward."""
        if len(nodes):
            todo = self.make_ready(nodes)
            self._cache.ensure(self.tree.slots.capacity)
            yield from self._calls.run(self.tree, self._cache, todo, nodes)

    def make_ready(self, nodes: ndarray) -> ndarray:
        """Give slots to ``nodes`` and what is above them; return all [n] that must be forwarded, sorted."""
        tree = self.tree
        todo = tree.uncached(nodes)
        if self.model.max_tokens is not None:
            longest = int(tree.depth[todo].max()) + 1
            rule = f"have at most {self.model.max_tokens} tokens (the model's positions), prompt included"
            check(longest <= self.model.max_tokens, "the text", rule, longest)
        tree.assign_slots(todo)
        self._count(todo)
        return todo

    def _count(self, forwarded: ndarray) -> None:
        self.counters.lm_tokens_forwarded += len(forwarded)
        self.counters.lm_tokens_recomputed += int(self.tree.was_forwarded[forwarded].sum())
        self.tree.was_forwarded[forwarded] = True

    def _keep_distributions(self, nodes: ndarray, log_probs: Tensor) -> None:
        rows = self._store.take(len(nodes))
        index = on_device(log_probs.device, torch.from_numpy(rows))
        self._store.log_probs.index_copy_(0, index, log_probs)
        self.tree.assign_rows(nodes, rows)

    def _eos(self, count: int) -> ndarray:
        check(count == 0 or self.model.eos_id is not None, "eos", "be off for a model without eos", True)
        return np.full(count, NONE if self.model.eos_id is None else self.model.eos_id, np.int64)

    def _nodes(self, nodes: Nodes) -> ndarray:
        wanted = integers(nodes, "nodes")
        self.tree.check_nodes(wanted)
        return wanted

    def _like(self, nodes: Nodes, values: ndarray) -> Tensor:
        return torch.from_numpy(values).float().to(nodes.device if isinstance(nodes, Tensor) else "cpu")

    def _aside(self) -> contextlib.AbstractContextManager:
        """Return the context in which the model runs."""
        return contextlib.nullcontext() if self._side is None else self._side.running()

    @contextlib.contextmanager
    def _timed(self, wait: bool = True) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if wait and self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self.counters.lm_seconds += time.perf_counter() - start
