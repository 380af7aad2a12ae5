"""The token tree as integers: nodes, which are scored, which are cached in which slot, which may be freed.
Knows: numpy arrays of integers and scores, the compiled library. Must not know: models, texts, search.

`TokenTree` is all Python. `NativeTokenTree` grows and climbs in compiled code, with the same results.
"""
from __future__ import annotations

import ctypes
import weakref
from typing import Callable, Sequence

import numpy as np
from numpy import ndarray

from icefall_fusion.common.checks import check
from icefall_fusion.common.native_build import load_native
from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.lm.tree_memory import SlotTable

NONE = -1
#: The arrays with one entry a node, and the entry of a node that is not there yet.
_EMPTY = {"parent": NONE, "token": NONE, "depth": 0, "utterance": NONE, "row": NONE, "score": np.nan,
          "was_forwarded": False}


class TokenTree:
    """One tree of tokens for each utterance; a node is a token after a distinct token prefix.

    Node ids are global, grow from parent to child, and are never reused: `release` gives back slots and rows
    (memory), but the few integers of a node stay. A node that comes back is computed again.

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

    def __len__(self) -> int:
        return self._size

    # --- growing -----------------------------------------------------------------------------------------

    def add_root(self, utterance: int, tokens: Sequence[int]) -> int:
        """Make the path of ``tokens`` (bos and prompt, at least one) and return its last node, the root."""
        check(len(tokens) > 0, "prompt", "hold at least one token when the model has no bos", list(tokens))
        check(self.roots[utterance] == NONE, "utterance", "have no root yet", utterance)
        self.check_tokens(np.array(tokens, np.int64))
        first = self._append_first(utterance, int(tokens[0]))
        node = self.insert(first, tokens[1:])
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
                    self.check_tokens(np.array([token]))
                child = children[key] = self._append(node, token, self.depth[node] + 1, self.utterance[node])
            node = child
        return node

    def children(self, nodes: ndarray, tokens: ndarray) -> tuple[ndarray, int]:
        """Return the children [n] of ``nodes`` [n] by ``tokens`` [n], and how many had to be made."""
        before = len(self)
        self.check_tokens(tokens)
        made = [self.insert(node, (token,)) for node, token in zip(nodes.tolist(), tokens.tolist())]
        return np.array(made, np.int64), len(self) - before

    def path(self, node: int) -> list[int]:
        """Return the tokens from just after the root down to ``node``."""
        tokens, root = [], self.roots[self.utterance[node]]
        while node != root:
            tokens.append(int(self.token[node]))
            node = int(self.parent[node])
        return tokens[::-1]

    # --- asking ------------------------------------------------------------------------------------------

    def check_nodes(self, nodes: ndarray) -> None:
        """Raise ValueError unless every entry is a node."""
        if len(nodes) and not 0 <= nodes.min() <= nodes.max() < self._size:
            check(False, "nodes", f"lie between 0 and {self._size - 1}", [int(nodes.min()), int(nodes.max())])

    def check_tokens(self, tokens: ndarray) -> None:
        """Raise ValueError unless all are tokens of the model."""
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            wrong = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
            check(False, "token ids", f"lie between 0 and {self.vocab_size - 1}", wrong[:5].tolist())

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
        live nodes and those between two of them. Only a hypothesis that is gone could need another row.
        """
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

    def _climb(self, nodes: ndarray, missing: Callable[[ndarray], ndarray]) -> ndarray:
        """Return the nodes at or above ``nodes`` up to the first not ``missing``, each once, sorted."""
        visited, level = [], np.unique(nodes)
        while len(level):
            level = level[missing(level)]
            visited.append(level)
            above = self.parent[level]
            level = np.unique(above[above != NONE])
        return np.unique(np.concatenate(visited)) if visited else level

    def _nearest(self, nodes: ndarray, reached: Callable[[ndarray], ndarray]) -> ndarray:
        """Return the nearest node at or above each of ``nodes`` that is ``reached``, where there is one."""
        nearest, level = [nodes[:0]], nodes
        while len(level):
            done = reached(level)
            nearest.append(level[done])
            above = self.parent[level[~done]]
            level = np.unique(above[above != NONE])
        return np.unique(np.concatenate(nearest))

    def _append_first(self, utterance: int, token: int) -> int:
        return self._append(NONE, token, 0, utterance)

    def _append(self, parent: int, token: int, depth: int, utterance: int) -> int:
        node = self._size
        self._ensure(node + 1)
        self.parent[node], self.token[node] = parent, token
        self.depth[node], self.utterance[node] = depth, utterance
        self._size += 1
        return node

    def _ensure(self, size: int) -> None:
        if size > len(self.parent):
            self._allocate(max(size, 2 * len(self.parent)))

    def _allocate(self, capacity: int) -> None:
        """Make every array ``capacity`` long; nodes keep their entries."""
        for name, fill in _EMPTY.items():
            array = np.full(capacity, fill)
            old = getattr(self, name, array[:0])
            array[: len(old)] = old
            setattr(self, name, array)
        self._marked = np.zeros(capacity, bool)
        self.slots.ensure_nodes(capacity)


class NativeTokenTree(TokenTree):
    """See TokenTree.

    Args:
        library: of native_build.load_native.
        vocab_size, utterances: see TokenTree.

    Attributes:
        handle: the tree in the library, for what grows it there (closed words); call `grown` after that.
    """

    def __init__(self, library: ctypes.CDLL, vocab_size: int, utterances: int) -> None:
        self._library = library
        self.handle = library.token_tree_open(vocab_size)
        weakref.finalize(self, library.token_tree_close, self.handle)
        super().__init__(vocab_size, utterances)

    def grown(self) -> None:
        """Take note of nodes that the library made."""
        self._size = self._library.token_tree_size(self.handle)

    def make_room(self) -> None:
        """Double the room for nodes."""
        self._allocate(2 * len(self.parent))

    def insert(self, node: int, tokens: Sequence[int]) -> int:
        """Walk or make the path ``tokens`` below ``node`` and return its last node."""
        ids = np.ascontiguousarray(tokens, np.int64)
        self.check_tokens(ids)
        last = ctypes.c_int64(node)
        while not self._library.token_tree_insert(self.handle, ctypes.byref(last), ids.ctypes.data, len(ids)):
            self.make_room()
        self.grown()
        return last.value

    def children(self, nodes: ndarray, tokens: ndarray) -> tuple[ndarray, int]:
        """Return the children [n] of ``nodes`` [n] by ``tokens`` [n], and how many had to be made."""
        self.check_tokens(tokens)
        nodes, tokens = np.ascontiguousarray(nodes, np.int64), np.ascontiguousarray(tokens, np.int64)
        before, made = self._size, np.empty(len(nodes), np.int64)
        arrays = (nodes.ctypes.data, tokens.ctypes.data, len(nodes), made.ctypes.data)
        while not self._library.token_tree_children(self.handle, *arrays):
            self.make_room()
        self.grown()
        return made, self._size - before

    def unscored(self, nodes: ndarray) -> ndarray:
        """Return ``nodes`` and their ancestors without a score, each once, parents before children."""
        return self._climbed(nodes, 0)

    def uncached(self, nodes: ndarray) -> ndarray:
        """Return ``nodes`` (cached or not) and their ancestors without a slot, each once, parents first."""
        return self._climbed(nodes, 1)

    def set_scores(self, nodes: ndarray, log_probs: ndarray) -> None:
        """Fill in the scores of ``nodes`` (parents first) from the log-probs of their own tokens."""
        nodes = np.ascontiguousarray(nodes, np.int64)
        log_probs = np.ascontiguousarray(log_probs, np.float64)
        self._library.token_tree_set_scores(self.handle, nodes.ctypes.data, len(nodes), log_probs.ctypes.data)

    def _climbed(self, nodes: ndarray, slots: int) -> ndarray:
        nodes, visited = np.ascontiguousarray(nodes, np.int64), np.empty(self._size, np.int64)
        arguments = (nodes.ctypes.data, len(nodes), slots, visited.ctypes.data)
        return visited[: self._library.token_tree_climb(self.handle, *arguments)].copy()

    def _append_first(self, utterance: int, token: int) -> int:
        self._ensure(self._size + 1)
        node = ctypes.c_int64()
        self._library.token_tree_first(self.handle, utterance, token, ctypes.byref(node))
        self.grown()
        return node.value

    def _allocate(self, capacity: int) -> None:
        super()._allocate(capacity)
        arrays = (self.parent, self.token, self.depth, self.utterance, self.score, self.slots.of_node)
        self._library.token_tree_bind(self.handle, capacity, *(array.ctypes.data for array in arrays))


def make_tree(vocab_size: int, utterances: int) -> TokenTree:
    """Return an empty tree, the compiled one where it can be had."""
    try:
        return NativeTokenTree(load_native(), vocab_size, utterances)
    except Unavailable:
        return TokenTree(vocab_size, utterances)
