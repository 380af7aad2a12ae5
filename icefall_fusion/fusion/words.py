"""Closed words of prefixes, and their nodes in the LM's token tree, each once: the way of all tokenizers.
Knows: the prefix arena, acoustic pieces, LLM tokens, the tree. Must not know: which LM it is, triggers.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional, Sequence

import numpy as np
from numpy import ndarray

if TYPE_CHECKING:
    from icefall_fusion.fusion.retokenize import WordTokenizer
    from icefall_fusion.lm import TreeScorer
    from icefall_fusion.search.beam import PrefixArena


class History:
    """Words of one prefix: those of ``before`` and then ``words`` (one word, or none where it is empty).

    Attributes:
        before: the shorter history, None at the root.
        words: what this one adds.
        count: number of words in all.
        utterance: whose words they are.
        prefix: the arena node whose words these are (the boundary of prefixes).
        node: the LM's tree node, -1 as long as it is unknown.
        shown: number of words whose tokens are in that node's text: all, but where boundaries hold some back.
    """

    __slots__ = ("before", "words", "count", "utterance", "prefix", "node", "shown")

    def __init__(
        self, before: Optional[History], words: Sequence[str], utterance: int, prefix: int
    ) -> None:
        self.before = before
        self.words = tuple(words)
        self.utterance, self.prefix = utterance, prefix
        self.count = (before.count if before is not None else 0) + len(self.words)
        self.node, self.shown = -1, self.count

    def all_words(self) -> list[str]:
        """Return every word, first to last."""
        added = []
        history: Optional[History] = self
        while history is not None:
            added.append(history.words)
            history = history.before
        return [word for words in reversed(added) for word in words]


class ClosedWords:
    """The histories of a batch, one for each arena node that is the boundary of a prefix.

    A word is closed when a piece that starts a word follows. A boundary adds one word to the words of its own
    boundary, so each word is traced once.

    Args:
        arena: the prefixes of the search.
        tokens: the acoustic vocabulary (anything with ``words(ids) -> list[str]``).
    """

    def __init__(self, arena: PrefixArena, tokens: Any) -> None:
        self._arena = arena
        self._tokens = tokens
        roots = [arena.root(number) for number in range(arena.batch)]
        self._known = {root: History(None, (), number, root) for number, root in enumerate(roots)}

    def root(self, utterance: int) -> History:
        """Return the history without words of one utterance."""
        return self._known[self._arena.root(utterance)]

    def closed(self, boundaries: Sequence[int]) -> list[History]:
        """Return the history of each boundary node."""
        self._learn(boundaries)
        return [self._known[node] for node in boundaries]

    def complete(self, nodes: Sequence[int]) -> list[History]:
        """Return the history of all words of each prefix, the open last one included (end of utterance)."""
        boundaries = self._boundaries(nodes)
        closed = self.closed(boundaries)
        return [
            before if node == boundary else self._after(before, node, boundary)
            for node, boundary, before in zip(nodes, boundaries, closed)
        ]

    def keep(self, boundaries: Sequence[int]) -> None:
        """Forget all histories but those of ``boundaries`` and what they go back to.

        The boundary of a later prefix is a prefix of the beam or one of their boundaries. So nothing that is
        forgotten is asked for again.
        """
        self._learn(boundaries)
        wanted = {id(self.root(utterance)) for utterance in range(self._arena.batch)}
        for node in boundaries:
            history: Optional[History] = self._known[node]
            while history is not None and id(history) not in wanted:
                wanted.add(id(history))
                history = history.before
        self._known = {node: history for node, history in self._known.items() if id(history) in wanted}

    def __len__(self) -> int:
        return len(self._known)

    def _learn(self, nodes: Sequence[int]) -> None:
        before_of: dict[int, int] = {}
        missing = [node for node in dict.fromkeys(nodes) if node not in self._known]
        while missing:
            boundaries = self._boundaries(missing)
            before_of.update(zip(missing, boundaries))
            missing = [n for n in dict.fromkeys(boundaries) if n not in self._known and n not in before_of]
        # Nodes are numbered by birth: a boundary is younger than what it goes back to.
        for node in sorted(before_of):
            self._known[node] = self._after(self._known[before_of[node]], node, before_of[node])

    def _boundaries(self, nodes: Sequence[int]) -> list[int]:
        return self._arena.on_host("boundary")[np.array(nodes, np.int64)].tolist()

    def _after(self, before: History, node: int, boundary: int) -> History:
        words = self._tokens.words(self._arena.pieces_between(node, boundary))
        return History(before, words, before.utterance, node)


class WordNodes:
    """Tree nodes of the words of prefixes, one batch: in Python, for every tokenizer.

    Args:
        scorer: whose tree it is.
        arena: the prefixes of the search.
        tokens: the acoustic vocabulary.
        tokenizer: words -> LM tokens.
        prompted: of each utterance, whether its text follows a prompt.
        ids: names of the utterances.
        counts: words of each utterance before the roots of arena and tree; empty: none.
    """

    def __init__(self, scorer: TreeScorer, arena: PrefixArena, tokens: Any, tokenizer: WordTokenizer,
                 prompted: Sequence[bool], ids: Sequence[str], counts: Sequence[int] = ()) -> None:
        self.scorer, self.tokenizer = scorer, tokenizer
        self.prompted, self.ids = list(prompted), ids
        self._words = ClosedWords(arena, tokens)
        for utterance, node in enumerate(scorer.roots().tolist()):
            self._words.root(utterance).node = node
        for utterance, count in enumerate(counts):
            root = self._words.root(utterance)
            root.count = root.shown = count
            self.prompted[utterance] |= count > 0

    def __len__(self) -> int:
        """Return how many texts are remembered."""
        return len(self._words)

    def closed(self, boundaries: ndarray) -> tuple[ndarray, ndarray]:
        """Return the tree nodes [n] of the words of ``boundaries`` [n] (arena nodes), and how many words [n].

        Raises:
            ValueError: the tokenizer cannot spell a word; the message has the utterance and the word.
        """
        distinct, where = np.unique(boundaries, return_inverse=True)
        return self._of_histories(self._words.closed(distinct.tolist()), where)

    def complete(self, nodes: ndarray) -> tuple[ndarray, ndarray]:
        """Return the same of all words of prefixes, the open last one included (end of utterance)."""
        return self._of_histories(self._words.complete(nodes.tolist()), np.arange(len(nodes)), True)

    def keep(self, boundaries: ndarray) -> ndarray:
        """Forget all but ``boundaries`` and what they go back to; return their tree nodes."""
        self._words.keep(boundaries.tolist())
        return self.closed(boundaries)[0]

    def histories(self, boundaries: ndarray) -> list[History]:
        """Return the histories of boundaries, their tree nodes known."""
        histories = self._words.closed(boundaries.tolist())
        for history in histories:
            self._insert(history)
        return histories

    def scored_parts(self, boundaries: ndarray) -> list[History]:
        """Return the longest scored history at or before each boundary; the root is scored."""
        return [self._scored_part(history) for history in self.histories(boundaries)]

    def _scored_part(self, history: History) -> History:
        while not self.scorer.known([history.node])[0][0]:
            history = history.before
        return history

    def _of_histories(self, histories: Sequence[History], where: ndarray,
                      complete: bool = False) -> tuple[ndarray, ndarray]:
        for history in histories:
            self._insert(history, complete)
        nodes = np.array([history.node for history in histories], np.int64)
        counts = np.array([history.shown for history in histories], np.int64)
        return nodes[where], counts[where]

    def _insert(self, history: History, complete: bool = False) -> None:
        """Find the tree node of a history and of all it goes back to; a complete one holds nothing back."""
        chain, last = [], history
        while history.node < 0:
            chain.append(history)
            history = history.before
        for after in reversed(chain):
            try:
                after.node = self._extend(history, after, complete and after is last)
            except ValueError as error:  # a word that the tokenizer cannot spell
                raise ValueError(f"utterance {self.ids[after.utterance]!r}: {error}") from error
            history = after

    def _extend(self, before: History, history: History, complete: bool) -> int:
        node, prompted = before.node, self.prompted[history.utterance]
        hold = None if self.tokenizer.word_by_word else getattr(self.tokenizer, "encode_closed", None)
        if hold is not None:
            words = history.all_words()
            whole, shown = (self.tokenizer.encode_whole(words, prompted), len(words)) if complete else hold(
                words, prompted
            )
            history.shown += shown - len(words)
            return self.scorer.insert(self._words.root(history.utterance).node, whole)
        for index, word in enumerate(history.words, before.count):
            ids = self.tokenizer.word_ids(word, index, prompted)
            if ids is None:  # this tokenizer may change the tokens of earlier words: walk from the root
                whole = self.tokenizer.encode_whole(history.all_words(), prompted)
                return self.scorer.insert(self._words.root(history.utterance).node, whole)
            node = self.scorer.insert(node, ids)
        return node
