"""The token tree as integers: nodes, who is scored, who is cached in which slot, who may be forgotten.
Knows: numpy arrays of integers and scores. Must not know: torch, models, texts, search, fusion.
"""
from __future__ import annotations

from typing import Callable, Optional, Sequence, Union

import numpy as np
from numpy import ndarray

from icefall_fusion.common.checks import check
from icefall_fusion.lm.slots import SlotTable

NONE = -1


class TokenTree:
    """One tree of tokens for each utterance; a node is a token after a distinct token prefix.

    Node ids are global, grow from parent to child, and are never reused: `release` gives back slots and rows
    (memory), while the few integers of a node stay, so that a node that comes back is just computed again.

    Attributes, each with one entry a node:
        parent: node before this one, -1 at the first token.
        token: token id.
        depth: number of tokens before this one (0 for the first), its position id in the model.
        utterance: tree it belongs to.
        score: log P(path | root), natural log, float64; nan as long as it is unknown. 0 from root upwards.
        row: row of the distribution store that holds the distribution after this node, or -1.
        slots.of_node: slot of its keys and values in the utterance's buffer, or -1.
        was_forwarded: the model has seen it, so that another time is a recomputation.
    """

    def __init__(self, vocab_size: int, utterances: int) -> None:
        self.vocab_size = vocab_size
        self.roots = np.full(utterances, NONE, np.int64)
        self.slots = SlotTable(utterances)
        self._stored = np.zeros(0, np.int64)  # nodes that have a row
        self._size = 0
        self._allocate(256)
        self._children: dict[int, int] = {}  # parent * vocab_size + token -> node
        self._new: list[tuple[int, int]] = []  # (parent, token) of nodes that are not in the arrays yet

    def __len__(self) -> int:
        return self._size + len(self._new)

    # --- growing -----------------------------------------------------------------------------------------

    def add_root(self, utterance: int, tokens: Sequence[int]) -> int:
        """Make the path of ``tokens`` (bos and prompt, at least one) and return its last node, the root."""
        check(len(tokens) > 0, "prompt", "hold at least one token when the model has no bos", list(tokens))
        check(self.roots[utterance] == NONE, "utterance", "have no root yet", utterance)
        self._check_tokens(tokens)
        first = self._append_first(utterance, int(tokens[0]))
        node = self.insert(first, tokens[1:])
        self._flush()
        self.score[first : node + 1] = 0.0
        self.roots[utterance] = node
        return node

    def insert(self, node: int, tokens: Sequence[int]) -> int:
        """Walk or make the path ``tokens`` below ``node`` and return its last node."""
        children, vocab_size = self._children, self.vocab_size
        for token in tokens:
            key = node * vocab_size + token
            child = children.get(key)
            if child is None:
                if not 0 <= token < vocab_size:
                    self._check_tokens([token])
                child = children[key] = self._size + len(self._new)
                self._new.append((node, token))
            node = child
        return node

    def children(self, nodes: ndarray, tokens: ndarray) -> tuple[ndarray, int]:
        """Return the children [n] of ``nodes`` [n] by ``tokens`` [n], and how many had to be made."""
        before = len(self)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            self._check_tokens(tokens.tolist())
        found = [self.insert(node, (token,)) for node, token in zip(nodes.tolist(), tokens.tolist())]
        return np.array(found, np.int64), len(self) - before

    def path(self, node: int) -> list[int]:
        """Return the tokens from just after the root down to ``node``."""
        self._flush()
        tokens, root = [], self.roots[self.utterance[node]]
        while node != root:
            tokens.append(int(self.token[node]))
            node = int(self.parent[node])
        return tokens[::-1]

    # --- asking ------------------------------------------------------------------------------------------

    def check_nodes(self, nodes: ndarray) -> None:
        """Raise ValueError unless every entry is a node; nodes just made become visible in the arrays."""
        self._flush()
        if len(nodes) and not 0 <= nodes.min() <= nodes.max() < self._size:
            check(False, "nodes", f"lie between 0 and {self._size - 1}", [int(nodes.min()), int(nodes.max())])

    def unscored(self, nodes: ndarray) -> ndarray:
        """Return ``nodes`` and their ancestors without a score, each once, parents before children."""
        return self._climb(nodes, lambda level: np.isnan(self.score[level]))

    def uncached(self, nodes: ndarray) -> ndarray:
        """Return ``nodes`` (cached or not) and their ancestors without a slot, each once, parents first."""
        above = self.parent[nodes]
        missing = self._climb(above[above != NONE], lambda level: self.slots.of_node[level] < 0)
        return np.union1d(nodes, missing)

    # --- writing -----------------------------------------------------------------------------------------

    def set_scores(self, nodes: ndarray, log_probs: ndarray) -> None:
        """Fill in the scores of ``nodes`` (parents first) from the log-probs of their own tokens."""
        depth = self.depth[nodes]
        for level in np.unique(depth):
            chosen = nodes[depth == level]
            self.score[chosen] = self.score[self.parent[chosen]] + log_probs[depth == level]

    def assign_slots(self, nodes: ndarray) -> None:
        """Give a slot to each of ``nodes`` (parents first, parents cached or among them) that has none."""
        new = nodes[self.slots.of_node[nodes] < 0]
        self.slots.assign(new, self.parent, self.utterance, self.depth)

    def release(self, live: ndarray) -> ndarray:
        """Free what no node of ``live`` needs; return the freed rows of the distribution store.

        Slots stay for live nodes and their ancestors. Rows stay for nodes that may get new children: the
        live nodes and those between two of them; a branch above all live nodes, or below them where no live
        node follows, would need a hypothesis that is gone.
        """
        self._flush()
        live = np.unique(live)
        anchors = np.union1d(self._nearest(live, lambda level: self.slots.of_node[level] >= 0), self.roots)
        self.slots.release(anchors[anchors != NONE], self.parent, self.utterance)
        stored = self._stored
        dropped = ~self._below(stored, live) | (self.slots.of_node[stored] < 0)
        freed, self._stored = stored[dropped], stored[~dropped]
        rows = self.row[freed]
        self.row[freed] = NONE
        return rows

    def assign_rows(self, nodes: ndarray, rows: ndarray) -> None:
        """Note that the distributions after ``nodes`` [n] lie in ``rows`` [n] of the store."""
        self.row[nodes] = rows
        self._stored = np.concatenate([self._stored, nodes])

    def _below(self, nodes: ndarray, live: ndarray) -> ndarray:
        """Return which of ``nodes`` are live or below a live node [n] bool."""
        highest = np.full(len(self.roots), np.iinfo(np.int64).max)
        np.minimum.at(highest, self.utterance[live], self.depth[live])
        self._marked[live] = True
        result = np.zeros(len(nodes), bool)
        above, moving = nodes.copy(), np.arange(len(nodes))
        while len(moving):
            at = above[moving]
            result[moving] = self._marked[at]
            moving = moving[~self._marked[at] & (self.depth[at] > highest[self.utterance[at]])]
            above[moving] = self.parent[above[moving]]
        self._marked[live] = False
        return result

    # --- inside ------------------------------------------------------------------------------------------

    def _climb(self, nodes: ndarray, missing: Callable[[ndarray], ndarray]) -> ndarray:
        """Return the nodes at or above ``nodes`` up to the first not ``missing``, each once, sorted."""
        found, level = [], np.unique(nodes)
        while len(level):
            level = level[missing(level)]
            found.append(level)
            above = self.parent[level]
            level = np.unique(above[above != NONE])
        return np.unique(np.concatenate(found)) if found else level

    def _nearest(self, nodes: ndarray, reached: Callable[[ndarray], ndarray]) -> ndarray:
        """Return the nearest node at or above each of ``nodes`` that is ``reached``, where there is one."""
        found, level = [nodes[:0]], nodes
        while len(level):
            done = reached(level)
            found.append(level[done])
            above = self.parent[level[~done]]
            level = np.unique(above[above != NONE])
        return np.unique(np.concatenate(found))

    def _append_first(self, utterance: int, token: int) -> int:
        self._flush()
        node = self._size
        self._ensure(node + 1)
        self.parent[node], self.token[node] = NONE, token
        self.depth[node], self.utterance[node] = 0, utterance
        self._size += 1
        return node

    def _flush(self) -> None:
        """Move the nodes made since the last call into the arrays."""
        if not self._new:
            return
        start, end = self._size, self._size + len(self._new)
        self._ensure(end)
        new = np.array(self._new, np.int64)
        parents = self.parent[start:end] = new[:, 0]
        self.token[start:end] = new[:, 1]
        depth, utterance = self.depth, self.utterance
        for node, parent in enumerate(parents.tolist(), start):  # a parent may itself be new: in order
            depth[node] = depth[parent] + 1
            utterance[node] = utterance[parent]
        self._size = end
        self._new.clear()

    def _ensure(self, size: int) -> None:
        if size > len(self.parent):
            self._allocate(max(size, 2 * len(self.parent)))

    def _allocate(self, capacity: int) -> None:
        self.parent = _longer(getattr(self, "parent", None), capacity, np.int64, NONE)
        self.token = _longer(getattr(self, "token", None), capacity, np.int64, NONE)
        self.depth = _longer(getattr(self, "depth", None), capacity, np.int64, 0)
        self.utterance = _longer(getattr(self, "utterance", None), capacity, np.int64, NONE)
        self.score = _longer(getattr(self, "score", None), capacity, np.float64, np.nan)
        self.row = _longer(getattr(self, "row", None), capacity, np.int64, NONE)
        self.was_forwarded = _longer(getattr(self, "was_forwarded", None), capacity, np.bool_, False)
        self._marked = np.zeros(capacity, bool)
        self.slots.ensure_nodes(capacity)

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        wrong = [token for token in tokens if not 0 <= token < self.vocab_size]
        check(not wrong, "token ids", f"lie between 0 and {self.vocab_size - 1}", wrong[:5])


def integers(values: Union[ndarray, Sequence[int]], name: str) -> ndarray:
    """Return ``values`` flat, as int64 [n].

    Raises:
        ValueError: they are not integers; the message has ``name``.
    """
    array = np.asarray(values)
    check(array.size == 0 or array.dtype.kind in "iu", name, "hold integers", values)
    return array.astype(np.int64, copy=False).reshape(-1)


def _longer(array: Optional[ndarray], size: int, dtype: type, fill: float) -> ndarray:
    """Return a copy of ``array`` with room for ``size`` entries, the new ones filled."""
    longer = np.full(size, fill, dtype)
    if array is not None:
        longer[: len(array)] = array
    return longer
