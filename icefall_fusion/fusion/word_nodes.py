"""From prefixes of the search to nodes of the LM's token tree: closed words, re-tokenized, each once.
Knows: closed words, their LLM tokens, the tree. Must not know: which LM it is, scores, triggers.
"""
from __future__ import annotations

import ctypes
import weakref
from typing import TYPE_CHECKING, Any, MutableMapping, Optional, Sequence

import numpy as np
from numpy import ndarray

from icefall_fusion.common.native_build import load_native
from icefall_fusion.fusion.retokenize import MOST_WORDS
from icefall_fusion.fusion.words import ClosedWords, History
from icefall_fusion.lm.token_tree import NativeTokenTree

if TYPE_CHECKING:
    from icefall_fusion.fusion.retokenize import WordTokenizer
    from icefall_fusion.lm import TreeScorer
    from icefall_fusion.search.beam import PrefixArena


class WordPlacer:
    """Places of texts in the token tree, one batch.

    Args:
        scorer: whose tree it is.
        arena: the prefixes of the search.
        tokens: the acoustic vocabulary.
        tokenizer: words -> LM tokens.
        prompted: of each utterance, whether its text goes on after a prompt.
        ids: names of the utterances.
    """

    def __init__(self, scorer: TreeScorer, arena: PrefixArena, tokens: Any, tokenizer: WordTokenizer,
                 prompted: Sequence[bool], ids: Sequence[str]) -> None:
        self.scorer, self.arena, self.tokens, self.tokenizer = scorer, arena, tokens, tokenizer
        self.prompted, self.ids = list(prompted), ids
        self._words = ClosedWords(arena, tokens)
        for utterance, node in enumerate(scorer.roots().tolist()):
            self._words.root(utterance).node = node

    def __len__(self) -> int:
        """Return how many texts are remembered."""
        return len(self._words)

    def place(self, boundaries: ndarray) -> tuple[ndarray, ndarray]:
        """Return the tree nodes [n] of the words of ``boundaries`` [n] (arena nodes), and how many words [n].

        Raises:
            ValueError: the tokenizer cannot spell a word; the message has the utterance and the word.
        """
        distinct, where = np.unique(boundaries, return_inverse=True)
        return self._of_histories(self.histories(distinct), where)

    def complete(self, nodes: ndarray) -> tuple[ndarray, ndarray]:
        """Return the same of all words of prefixes, the open last one included (end of utterance)."""
        return self._of_histories(self._words.complete(nodes.tolist()), np.arange(len(nodes)))

    def keep(self, boundaries: ndarray) -> ndarray:
        """Forget all but ``boundaries`` and what they go back to; return their tree nodes."""
        self._words.keep(boundaries.tolist())
        return self.place(boundaries)[0]

    def histories(self, boundaries: ndarray) -> list[History]:
        """Return the histories of boundaries, placed in the tree."""
        found = self._words.closed(boundaries.tolist())
        for history in found:
            self._insert(history)
        return found

    def scored_parts(self, boundaries: ndarray) -> list[History]:
        """Return the longest part of each boundary's history whose words have a score; the root has one."""
        return [self._scored_part(history) for history in self.histories(boundaries)]

    def _scored_part(self, history: History) -> History:
        while not self.scorer.known([history.node])[0][0]:
            history = history.before
        return history

    def _of_histories(self, histories: Sequence[History], where: ndarray) -> tuple[ndarray, ndarray]:
        for history in histories:
            self._insert(history)
        nodes = np.array([history.node for history in histories], np.int64)
        counts = np.array([history.count for history in histories], np.int64)
        return nodes[where], counts[where]

    def _insert(self, history: History) -> None:
        """Find the tree node of a history and of all it goes back to."""
        chain = []
        while history.node < 0:
            chain.append(history)
            history = history.before
        for after in reversed(chain):
            try:
                after.node = self._extend(history, after)
            except ValueError as error:  # a word that the tokenizer cannot spell
                raise ValueError(f"utterance {self.ids[after.utterance]!r}: {error}") from error
            history = after

    def _extend(self, before: History, history: History) -> int:
        node, prompted = before.node, self.prompted[history.utterance]
        for index, word in enumerate(history.words, before.count):
            ids = self.tokenizer.word_ids(word, index, prompted)
            if ids is None:  # this tokenizer may change the tokens of earlier words: walk from the root
                whole = self.tokenizer.encode_whole(history.all_words(), prompted)
                return self.scorer.insert(self._words.root(history.utterance).node, whole)
            node = self.scorer.insert(node, ids)
        return node


class NativePlacer:
    """The same in compiled code, for tokenizers that go word by word: one call for all prefixes of an event.

    Args: see WordPlacer; the tree is a NativeTokenTree.
    """

    _ROOM = 4096  # pieces of a word

    def __init__(self, library: ctypes.CDLL, scorer: TreeScorer, arena: PrefixArena, tokens: Any,
                 tokenizer: WordTokenizer, prompted: Sequence[bool], ids: Sequence[str]) -> None:
        self._library, self._tree, self._arena, self._tokens = library, scorer.tree, arena, tokens
        self._tokenizer, self._ids = tokenizer, ids
        self._prompted = np.array(prompted, np.uint8)
        self._table = _spellings(library, tokenizer, tokens)
        roots = np.array([arena.root(b) for b in range(arena.batch)], np.int64)
        nodes = np.ascontiguousarray(scorer.roots().numpy())
        self._handle = library.histories_open(arena.batch, roots.ctypes.data, nodes.ctypes.data)
        weakref.finalize(self, library.histories_close, self._handle)
        self._missing = np.zeros(3 + self._ROOM, np.int64)
        self._asked = np.zeros(1, np.int64)

    def __len__(self) -> int:
        """Return how many texts are remembered."""
        return self._library.histories_count(self._handle)

    def place(self, boundaries: ndarray) -> Optional[tuple[ndarray, ndarray]]:
        """Do what WordPlacer does; None: the tokenizer has turned out not to go word by word.

        Raises:
            ValueError: see WordPlacer.
        """
        if not self._tokenizer.word_by_word:  # found out by somebody else
            return None
        places = np.ascontiguousarray(boundaries, np.int64)
        nodes, words = np.empty(len(places), np.int64), np.empty(len(places), np.int64)
        arrays = [self._arena.on_host(name) for name in ("parent", "piece", "boundary")]
        arguments = (
            self._handle, self._table.handle, self._tree.handle, places.ctypes.data, len(places),
            *(array.ctypes.data for array in arrays), self._prompted.ctypes.data, nodes.ctypes.data,
            words.ctypes.data, self._missing.ctypes.data, self._ROOM, self._asked.ctypes.data,
        )  # fmt: skip
        state = -1
        while state != 0:
            state = self._library.histories_place(*arguments)
            if state == 2:
                self._tree.make_room()
            elif state == 3 or (state == 1 and not self._learn()):
                return None
        self._tree.grown()
        self._tokenizer.hits += int(self._asked[0])
        self._asked[0] = 0
        return nodes, words

    complete = place

    def keep(self, boundaries: ndarray) -> Optional[ndarray]:
        """Do what WordPlacer does."""
        placed = self.place(boundaries)
        if placed is None:
            return None
        places, above = np.ascontiguousarray(boundaries, np.int64), self._arena.on_host("boundary")
        self._library.histories_keep(self._handle, places.ctypes.data, len(places), above.ctypes.data)
        return placed[0]

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
        )  # fmt: skip
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


def open_placer(scorer: TreeScorer, arena: PrefixArena, tokens: Any, tokenizer: WordTokenizer,
                prompted: Sequence[bool], ids: Sequence[str]) -> NativePlacer | WordPlacer:
    """Return the placer of a batch: the compiled one where it serves."""
    arguments = (scorer, arena, tokens, tokenizer, prompted, ids)
    if tokenizer.word_by_word and isinstance(scorer.tree, NativeTokenTree):
        return NativePlacer(load_native(), *arguments)
    return WordPlacer(*arguments)
