"""The token tree with its growth and climbs in compiled code; the same arrays, and the same results.
Knows: the compiled library, numpy arrays. Must not know: torch, models, texts, search, fusion.
"""
from __future__ import annotations

import ctypes
import weakref
from typing import Sequence

import numpy as np
from numpy import ndarray

from icefall_fusion.common.native_build import load_native
from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.lm.token_tree import TokenTree


def make_tree(vocab_size: int, utterances: int) -> TokenTree:
    """Return an empty tree, the compiled one where it can be had."""
    try:
        return NativeTokenTree(load_native(), vocab_size, utterances)
    except Unavailable:
        return TokenTree(vocab_size, utterances)


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

    def __len__(self) -> int:
        return self._size

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
        before, found = self._size, np.empty(len(nodes), np.int64)
        where = (nodes.ctypes.data, tokens.ctypes.data, len(nodes), found.ctypes.data)
        while not self._library.token_tree_children(self.handle, *where):
            self.make_room()
        self.grown()
        return found, self._size - before

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
        nodes, found = np.ascontiguousarray(nodes, np.int64), np.empty(self._size, np.int64)
        where = (nodes.ctypes.data, len(nodes), slots, found.ctypes.data)
        return found[: self._library.token_tree_climb(self.handle, *where)].copy()

    def check_tokens(self, tokens: ndarray) -> None:
        """Raise ValueError unless all are tokens of the model."""
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            self._check_tokens(tokens.tolist())

    def _append_first(self, utterance: int, token: int) -> int:
        self._ensure(self._size + 1)
        node = ctypes.c_int64()
        self._library.token_tree_first(self.handle, utterance, token, ctypes.byref(node))
        self.grown()
        return node.value

    def _flush(self) -> None:
        """Do nothing: nodes are in the arrays as soon as they are made."""

    def _allocate(self, capacity: int) -> None:
        super()._allocate(capacity)
        arrays = (self.parent, self.token, self.depth, self.utterance, self.score, self.slots.of_node)
        self._library.token_tree_bind(self.handle, capacity, *(array.ctypes.data for array in arrays))
