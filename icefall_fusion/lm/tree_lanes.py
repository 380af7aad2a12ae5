"""Token trees that come and go, each in a lane of one cache; what waits in all of them is one model call.
Knows: token trees, slots, model calls. Must not know: tokenizers, search, fusion, streams' audio.

A `TreeScorer` of many utterances lives as long as its batch. Streams begin and end at any time, and the tree
of a stream is replaced when its text has become long. So each stream has a tree of its own. Keys and values
share buffers [lanes, S, H, D], and `launch` only notes what is wanted: the first wait for scores runs the
model once over the new tokens of all trees. If that fails, the model runs for each tree alone: the failure
of one is not that of the others.
"""
from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Callable, Iterator, NamedTuple, Optional, Sequence

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from icefall_fusion.common.checks import check, is_count
from icefall_fusion.lm.tree_forward import ModelCalls, fetch, pick
from icefall_fusion.lm.tree_memory import FIRST_SLOTS, TreeCache
from icefall_fusion.lm.tree_scorer import TreeCounters, TreeOptions, TreeScorer

if TYPE_CHECKING:
    from icefall_fusion.lm.causal_lm import CausalLm


_Part = tuple["LaneScorer", ndarray, Tensor]  # a tree, some of its nodes [n] sorted, their log-probs [n, V]


class TreeLanes:
    """A language model whose trees share memory and model calls; stands for the model in a fusion.

    Args:
        lm: the language model.
        lanes: trees at once, at most; the cache has room for those that there have been.
        options: bounds on memory, of each tree.

    Attributes:
        counters: of the model calls and their tokens, those of trees that are gone too.
    """

    def __init__(self, lm: CausalLm, lanes: int, options: Optional[TreeOptions] = None) -> None:
        check(is_count(lanes), "lanes", "be an integer, at least 1", lanes)
        self.lm, self.name, self.eos_id, self.device = lm, lm.name, lm.eos_id, lm.device
        self.max_tokens, self.pieces, self.tokenizer = lm.max_tokens, lm.pieces, lm.tokenizer
        self.options = TreeOptions() if options is None else options
        self.counters = TreeCounters()
        self.cache = TreeCache(lm.layers, 1, FIRST_SLOTS)
        self.calls = ModelCalls(lm, self.options.tokens_a_call(lm.vocab_size), self.counters)
        self._lanes, self._free = lanes, list(range(lanes))  # a heap
        self._waiting: list[_Request] = []

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self.lm.encode(text)

    def open_tree(self, batch: int, prompts: Optional[Sequence[Sequence[int]]] = None,
                  options: Optional[TreeOptions] = None, aside: bool = False,
                  names: Optional[Sequence[str]] = None) -> LaneScorer:
        """Return a tree in a free lane (see `CausalLm.open_tree`); ``close`` it after use.

        Raises:
            ValueError: more than one utterance, or no lane is free.
        """
        check(batch == 1, "batch", "be 1: a stream has a tree of its own", batch)
        check(len(self._free) > 0, "lanes", "have one that is free", f"{self._lanes} in use")
        start = self.lm.start_ids(prompts[0] if prompts else ())
        lane = self._free[0]
        if lane >= self.cache.utterances:
            self.cache.ensure(0, min(self._lanes, 2 * self.cache.utterances))
        scorer = LaneScorer(self, lane, start)
        heapq.heappop(self._free)
        return scorer

    def give_back(self, scorer: LaneScorer) -> None:
        """Let others use a tree's lane; what it waits for is not computed."""
        heapq.heappush(self._free, scorer.lane)
        self._waiting = [request for request in self._waiting if request.scorer is not scorer]

    def ask(self, scorer: LaneScorer, at: ndarray, tokens: ndarray) -> Callable[[], ndarray]:
        """Note that log P(token | path of node) is wanted; return what waits for it, [n] float64."""
        request = _Request(scorer, at, tokens)
        self._waiting.append(request)

        def wait() -> ndarray:
            if request.scores is None:
                self.run()
            return request.scores()

        return wait

    def run(self) -> None:
        """Start the model on all that is wanted; on a GPU nobody waits for it."""
        waiting, self._waiting = self._waiting, []
        parts: dict[LaneScorer, list[ndarray]] = {}
        for request in waiting:
            missing = request.at[request.scorer.tree.row[request.at] < 0]
            parts.setdefault(request.scorer, []).append(missing)
        found = [(scorer, np.unique(np.concatenate(lists))) for scorer, lists in parts.items()]
        made, failed = self._made([part for part in found if len(part[1])])
        for request in waiting:
            error = failed.get(request.scorer)
            if error is None:
                request.read(made)
            else:
                request.fail(error)
        for scorer, nodes, log_probs in made:
            scorer.store(nodes, log_probs)

    def _made(
        self, parts: Sequence[tuple[LaneScorer, ndarray]]
    ) -> tuple[list[_Part], dict[LaneScorer, Exception]]:
        """Return what `distributions` yields, and why trees have none; if all fail together, each alone."""
        try:
            return list(self.distributions(parts)), {}
        except Exception as error:  # whatever it is: the search waits for an answer
            if len(parts) == 1:
                return [], {parts[0][0]: error}
        made, failed = [], {}
        for part in parts:
            some, errors = self._made([part])
            made += some
            failed.update(errors)
        return made, failed

    def distributions(
        self, parts: Sequence[tuple[LaneScorer, ndarray]]
    ) -> Iterator[_Part]:
        """Yield (tree, some of its nodes [n] sorted, their log-probs [n, V]) until all had a forward.

        Args:
            parts: trees and distinct nodes [n] sorted of each, n at least 1.
        """
        if not parts:
            return
        todo: list[ndarray] = []
        had = [scorer.tree.slots.of_node[nodes] >= 0 for scorer, nodes in parts]
        try:
            for scorer, nodes in parts:
                todo.append(scorer.make_ready(nodes))
            yield from self._forwarded(parts, todo)
        except Exception:
            for (scorer, nodes), new, known in zip(parts, todo, had):
                scorer.take_back(np.setdiff1d(new, nodes[known]))
            raise
        for (scorer, _), new in zip(parts, todo):
            scorer.count(new)

    def _forwarded(self, parts: Sequence[tuple[LaneScorer, ndarray]],
                   todo: Sequence[ndarray]) -> Iterator[_Part]:
        self.cache.ensure(max(scorer.tree.slots.capacity for scorer, _ in parts))
        joined = _Joined([scorer for scorer, _ in parts], todo, self.cache.utterances)
        firsts = np.cumsum([0, *map(len, todo)])
        wanted = [first + np.searchsorted(new, nodes) for first, new, (_, nodes) in zip(firsts, todo, parts)]
        everything = np.arange(firsts[-1])
        for places, log_probs in self.calls.run(joined, self.cache, everything, np.concatenate(wanted)):
            ends = np.searchsorted(places, firsts)
            for number, (scorer, _) in enumerate(parts):
                here = slice(ends[number], ends[number + 1])
                if here.stop > here.start:
                    yield scorer, todo[number][places[here] - firsts[number]], log_probs[here]


class LaneScorer(TreeScorer):
    """The tree of one stream; made by `TreeLanes.open_tree`.

    Args:
        lanes: whose cache it uses.
        lane: its row there.
        start: bos and prompt.
    """

    def __init__(self, lanes: TreeLanes, lane: int, start: Sequence[int]) -> None:
        super().__init__(lanes.lm, [start], lanes.options)
        self._lanes, self.lane, self._cache, self._closed = lanes, lane, lanes.cache, False

    def close(self) -> None:
        """Free the lane, once; the tree cannot be asked any more."""
        if not self._closed:
            self._closed = True
            self._lanes.give_back(self)

    def move_root(self, node: int) -> None:
        """Let a node below the root be the root: `roots` and `keep` go no further up. Scores stay."""
        self._nodes([node])
        self.tree.roots[0] = node

    def _count(self, forwarded: ndarray) -> None:
        """Count nothing yet: the forward may fail."""

    def count(self, forwarded: ndarray) -> None:
        """Count nodes whose forward has succeeded, for all trees too."""
        super()._count(forwarded)
        self._lanes.counters.lm_tokens_forwarded += len(forwarded)

    def take_back(self, nodes: ndarray) -> None:
        """Free the slots of nodes whose forward has failed: asked for again, they are forwarded again."""
        slots = self.tree.slots
        held = np.setdiff1d(np.flatnonzero(slots.of_node >= 0), nodes)
        slots.release(held, self.tree.parent, self.tree.utterance)

    def store(self, nodes: ndarray, log_probs: Tensor) -> None:
        """Keep distributions for later children, if there is room."""
        if self._store.in_use + len(nodes) <= self._store.max_rows:
            self._keep_distributions(nodes, log_probs)

    def known_log_probs(self, at: ndarray, tokens: ndarray) -> Tensor:
        """Return log P(token | path of node) [n] of nodes whose distributions are kept."""
        return pick(self._store.log_probs, self.tree.row[at], tokens)

    def _launch_log_probs(self, at: ndarray, tokens: ndarray) -> Callable[[], ndarray]:
        return self._lanes.ask(self, at, tokens)

    def _distributions(self, nodes: ndarray) -> Iterator[tuple[ndarray, Tensor]]:
        for _, some, log_probs in self._lanes.distributions([(self, nodes)] if len(nodes) else []):
            yield some, log_probs


class _Request:
    """What one launch wants: log P(token | path of node) for ``at`` [n] and ``tokens`` [n]."""

    def __init__(self, scorer: LaneScorer, at: ndarray, tokens: ndarray) -> None:
        self.scorer, self.at, self.tokens = scorer, at, tokens
        self.scores: Optional[Callable[[], ndarray]] = None

    def fail(self, error: Exception) -> None:
        """Let who waits for the scores get an error."""

        def scores() -> ndarray:
            raise error

        self.scores = scores

    def read(self, made: Sequence[_Part]) -> None:
        """Pick the scores: of distributions that were kept, and of those just made."""
        known = np.flatnonzero(self.scorer.tree.row[self.at] >= 0)
        order, values = [known], [self.scorer.known_log_probs(self.at[known], self.tokens[known])]
        for scorer, nodes, log_probs in made:
            if scorer is not self.scorer:
                continue
            row = np.minimum(np.searchsorted(nodes, self.at), len(nodes) - 1)
            here = np.flatnonzero((nodes[row] == self.at) & (self.scorer.tree.row[self.at] < 0))
            order.append(here)
            values.append(pick(log_probs, row[here], self.tokens[here]))
        wait, places = fetch(torch.cat(values).double()), np.concatenate(order)

        def scores() -> ndarray:
            result = np.empty(len(self.at))
            result[places] = wait()
            return result

        self.scores = scores


class _JoinedSlots(NamedTuple):
    """The slots of the nodes of a call (see `SlotTable`); a node is its place among them."""

    used: ndarray
    of_node: ndarray
    rows: ndarray
    depths: ndarray

    def bits(self, utterances: ndarray, nodes: ndarray, length: int) -> ndarray:
        """See `SlotTable.bits`."""
        return self.rows[nodes, : (length + 7) // 8]

    def visible(self, utterances: ndarray, nodes: ndarray, length: int) -> ndarray:
        """See `SlotTable.visible`."""
        return np.unpackbits(self.bits(utterances, nodes, length), axis=-1, count=length).view(bool)

    def in_window(self, utterances: ndarray, depths: ndarray, length: int, window: int) -> ndarray:
        """See `SlotTable.in_window`."""
        return depths[:, None] - self.depths[utterances, :length] < window


class _Joined:
    """Nodes of several trees, as the tree of one model call sees them: lanes are its utterances."""

    def __init__(self, scorers: Sequence[LaneScorer], todo: Sequence[ndarray], lanes: int) -> None:
        trees = [scorer.tree for scorer in scorers]
        lane = np.array([scorer.lane for scorer in scorers], np.int64)
        self.utterance = np.repeat(lane, [len(nodes) for nodes in todo])
        self.token, self.depth, of_node = (
            np.concatenate([array(tree)[nodes] for tree, nodes in zip(trees, todo)])
            for array in (lambda t: t.token, lambda t: t.depth, lambda t: t.slots.of_node)
        )
        most = max(tree.slots.capacity for tree in trees)
        used, depths = np.zeros(lanes, np.int64), np.zeros((lanes, most), np.int64)
        rows = np.zeros((len(self.token), most // 8), np.uint8)
        first = 0
        for tree, row, nodes in zip(trees, lane, todo):
            size = tree.slots.capacity
            used[row], depths[row, :size] = tree.slots.used[0], tree.slots.depth[0]
            none = np.zeros(len(nodes), np.int64)
            rows[first : first + len(nodes), : size // 8] = tree.slots.bits(none, nodes, size)
            first += len(nodes)
        self.slots = _JoinedSlots(used, of_node, rows, depths)
