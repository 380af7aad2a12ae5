"""From prefixes of the search to nodes of the LM's token tree, in compiled code: one call an event.
Knows: closed words, their LLM tokens, the tree. Must not know: which LM it is, scores, triggers.

`words.py` does the same in Python, for every tokenizer and tree.
"""
from __future__ import annotations

import ctypes
import operator
import weakref
from typing import TYPE_CHECKING, Any, MutableMapping, Optional, Sequence

import numpy as np
from numpy import ndarray

from icefall_fusion.common.native_build import load_native
from icefall_fusion.fusion.retokenize import MOST_WORDS
from icefall_fusion.lm.token_tree import NativeTokenTree

if TYPE_CHECKING:
    from icefall_fusion.fusion.retokenize import WordTokenizer
    from icefall_fusion.fusion.words import WordNodes
    from icefall_fusion.lm import TreeScorer
    from icefall_fusion.search.beam import PrefixArena


class NativeWordNodes:
    """Tree nodes of the words of prefixes, one batch: one call of compiled code an event.

    It serves tokenizers that go word by word, and a `NativeTokenTree`.

    Args: see `WordNodes`.
    """

    _ROOM = 4096  # pieces of a word

    def __init__(self, library: ctypes.CDLL, scorer: TreeScorer, arena: PrefixArena, tokens: Any,
                 tokenizer: WordTokenizer, prompted: Sequence[bool], ids: Sequence[str],
                 counts: Sequence[int] = ()) -> None:
        self._library, self._tree, self._arena, self._tokens = library, scorer.tree, arena, tokens
        self._tokenizer, self._ids = tokenizer, ids
        self._prompted = np.array(prompted, np.uint8)
        self._table = _spellings(library, tokenizer, tokens)
        roots = np.array([arena.root(b) for b in range(arena.batch)], np.int64)
        nodes = np.ascontiguousarray(scorer.roots().numpy())
        words = np.array(counts or [0] * arena.batch, np.int64)
        self._handle = library.histories_open(
            arena.batch, roots.ctypes.data, nodes.ctypes.data, words.ctypes.data
        )
        weakref.finalize(self, library.histories_close, self._handle)
        self._missing = np.zeros(3 + self._ROOM, np.int64)
        self._asked = np.zeros(1, np.int64)
        self._own = [one.ctypes.data for one in (self._prompted, self._missing, self._asked)]
        self._arrays: list[ndarray] = []  # of the arena, and where they are
        self._places: list[int] = []

    def __len__(self) -> int:
        """Return how many texts are remembered."""
        return self._library.histories_count(self._handle)

    def closed(self, boundaries: ndarray) -> Optional[tuple[ndarray, ndarray]]:
        """Return the tree nodes [n] of the words of ``boundaries`` [n] (arena nodes), and how many words [n].

        None: the tokenizer has turned out not to go word by word; `WordNodes` must take over.

        Raises:
            ValueError: the tokenizer cannot spell a word; the message has the utterance and the word.
        """
        if not self._tokenizer.word_by_word:  # another user of the tokenizer has seen it
            return None
        prefixes = np.ascontiguousarray(boundaries, np.int64)
        nodes, words = np.empty(len(prefixes), np.int64), np.empty(len(prefixes), np.int64)
        arrays = [self._arena.on_host(name) for name in ("parent", "piece", "boundary")]
        if not (self._arrays and all(map(operator.is_, arrays, self._arrays))):
            self._arrays, self._places = arrays, [array.ctypes.data for array in arrays]
        arguments = (
            self._handle, self._table.handle, self._tree.handle, prefixes.ctypes.data, len(prefixes),
            *self._places, self._own[0], nodes.ctypes.data, words.ctypes.data, self._own[1], self._ROOM,
            self._own[2],
        )
        state = -1
        while state != 0:
            state = self._library.histories_nodes(*arguments)
            if state == 2:
                self._tree.make_room()
            elif state == 3 or (state == 1 and not self._learn()):
                return None
        self._tree.grown()
        self._tokenizer.hits += int(self._asked[0])
        self._asked[0] = 0
        return nodes, words

    complete = closed

    def keep(self, boundaries: ndarray) -> Optional[ndarray]:
        """Forget all but ``boundaries`` and what is before them; return their nodes (None: see `closed`)."""
        known = self.closed(boundaries)
        if known is None:
            return None
        prefixes, above = np.ascontiguousarray(boundaries, np.int64), self._arena.on_host("boundary")
        self._library.histories_keep(self._handle, prefixes.ctypes.data, len(prefixes), above.ctypes.data)
        return known[0]

    def _learn(self) -> bool:
        """Find the tokens of the spelling that is missing; return whether that can be done word by word."""
        count, begins, utterance = self._missing[:3].tolist()
        pieces, prompted = self._missing[3 : 3 + count], bool(self._prompted[utterance])
        words = self._tokens.words(pieces.tolist())
        ids: list[int] = []
        hits, misses = self._tokenizer.hits, self._tokenizer.misses
        for index, word in enumerate(words, 0 if begins else 1):
            try:
                more = self._tokenizer.word_ids(word, index, prompted)
            except ValueError as error:
                raise ValueError(f"utterance {self._ids[utterance]!r}: {error}") from error
            if more is None:
                return False
            ids.extend(more)
        self._tokenizer.hits = hits  # they are looked up again
        self._asked[0] -= self._tokenizer.misses - misses
        tokens = np.array(ids, np.int64)
        self._tree.check_tokens(tokens)
        self._library.spellings_learn(
            self._table.handle, pieces.ctypes.data, count, begins, int(prompted), tokens.ctypes.data,
            len(tokens), len(words), MOST_WORDS,
        )
        return True


class _Spellings:
    """A table in the library; freed with this object."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.handle = library.spellings_open()
        weakref.finalize(self, library.spellings_close, self.handle)


# by tokenizer, then by the vocabulary itself: two may have the same pieces and say other words with them
_SPELLINGS: MutableMapping[Any, MutableMapping[Any, _Spellings]] = weakref.WeakKeyDictionary()


def _spellings(library: ctypes.CDLL, tokenizer: WordTokenizer, tokens: Any) -> _Spellings:
    """Return the table of a tokenizer and an acoustic vocabulary; made once."""
    tables = _SPELLINGS.setdefault(tokenizer, weakref.WeakKeyDictionary())
    if tokens not in tables:
        tables[tokens] = _Spellings(library)
    return tables[tokens]


def open_word_nodes(scorer: TreeScorer, arena: PrefixArena, tokens: Any, tokenizer: WordTokenizer,
                    prompted: Sequence[bool], ids: Sequence[str],
                    counts: Sequence[int] = ()) -> NativeWordNodes | WordNodes:
    """Return what knows the tree nodes of a batch's words: compiled code where it serves."""
    arguments = (scorer, arena, tokens, tokenizer, prompted, ids, counts)
    if tokenizer.word_by_word and isinstance(scorer.tree, NativeTokenTree):
        return NativeWordNodes(load_native(), *arguments)
    from icefall_fusion.fusion.words import WordNodes

    return WordNodes(*arguments)
