"""N-grams over words, from KenLM's binaries and ARPA files: scores of the nodes of a tree of words.
Knows: words, the library kenlm, our own ARPA reader. Must not know: acoustic pieces, searches, fusions.

KenLM's library reads both kinds of file. Without it our own reader serves ARPA files (`PieceNgram` with words
as its pieces), whose keys have 63 bits: at most 3-grams of 200,000 words. Scores are the same.
"""
from __future__ import annotations

import importlib.util
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Collection, Optional, Sequence

import numpy as np
import torch
from numpy import ndarray

from icefall_fusion.common.checks import check, check_choice, is_number
from icefall_fusion.common.files import PathLike
from icefall_fusion.ngram.arpa import LN10, LOG_ZERO, arpa_words, longest_order
from icefall_fusion.ngram.piece_ngram import NOTHING, PieceNgram
from icefall_fusion.text.styles import TEXT_STYLES

#: Ids of words that the n-gram does not know begin here: one of `_STRANGERS`, by the word's checksum.
FIRST_STRANGER = 2**30
_STRANGERS = 4096
#: Ids of the start of a sentence, of an empty context, and of the end; then the number of all ids.
START_ID, EMPTY_ID, END_ID, ID_COUNT = (FIRST_STRANGER + _STRANGERS + n for n in range(4))
_BINARY = b"mmap lm http://kheafield.com/code"  # KenLM's binaries begin so
_UNKNOWN = ("<unk>", "<UNK>")
_MARKS = (*_UNKNOWN, "<s>", "</s>")


@dataclass(frozen=True)
class WordNgramOptions:
    """An n-gram over words, for wordngram-delayed.

    Args:
        path: KenLM binary (with the package kenlm) or ARPA file; empty: there is none.
        text: how it sees words: as-is, lower or sentence.
        oov_score: natural log that a word which it does not know gets beside the score of <unk>. Below 0 the
            known words of an ARPA file guide the search: a word costs this as soon as none of them begins so.
    """

    path: str = ""
    text: str = "as-is"
    oov_score: float = 0.0

    def __post_init__(self) -> None:
        check_choice(self.text, TEXT_STYLES, "WordNgramOptions.text")


class WordNgram:
    """A back-off n-gram over words (Katz 1987).

    Args:
        path: KenLM binary or ARPA file (an ARPA file may be gzipped).
        unigrams: words that count as known; None: all of the n-gram.
        oov_score: natural log that is added for a word that is not known, e.g. below 0.
        reader: kenlm, own, or auto: kenlm where it is installed, else own.
        units: words of scripts without spaces that the n-gram lacks are read as characters, each a word.

    Attributes:
        order: the longest n; name, path: of the file; binary: whether it is a KenLM binary.

    Raises:
        FileNotFoundError: the file is missing.
        ModuleNotFoundError: it is a KenLM binary, or kenlm is asked for, and kenlm is not installed.
        ValueError: the file is neither, is cut short, or has longer n-grams than the reader takes.
    """

    def __init__(self, path: PathLike, unigrams: Optional[Collection[str]] = None, oov_score: float = 0.0,
                 reader: str = "auto", units: bool = True) -> None:
        check_choice(reader, ("auto", "kenlm", "own"), "WordNgram.reader")
        check(is_number(oov_score), "WordNgram.oov_score", "be finite", oov_score)
        good = unigrams is None or not isinstance(unigrams, str) and all(isinstance(w, str) for w in unigrams)
        check(good, "WordNgram.unigrams", "be None or words", unigrams)
        self.units = units
        self.path, self.name, self.oov_score = Path(path), str(path), float(oov_score)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no n-gram at {path}")
        self.unigrams = None if unigrams is None else frozenset(unigrams)
        with open(self.path, "rb") as file:
            self.binary = file.read(len(_BINARY)) == _BINARY
        self._tables: Any = _KenlmTables(self.path) if self._by_kenlm(reader) else _OwnTables(self.path)
        self.order: int = self._tables.order
        self._ids: dict[str, int] = {}
        self._strangers = [""] * _STRANGERS  # the last word of each id
        self._refused = np.zeros(1024, bool)  # of each word of the n-gram: whether it counts as not known
        #: What fusions make of it once (fusion/word_ngram.py).
        self.views: dict[Any, Any] = {}

    def _by_kenlm(self, reader: str) -> bool:
        installed = importlib.util.find_spec("kenlm") is not None
        if installed and reader != "own":
            return True
        if self.binary or reader == "kenlm":
            check(reader != "own", "WordNgram.reader", f"be kenlm for the KenLM binary {self.path}", reader)
            raise ModuleNotFoundError(f"{self.path} needs the package kenlm: pip install kenlm")
        if reader == "auto":
            logging.warning("kenlm is not installed: the ARPA file %s is read by our own reader", self.path)
        return False

    def has(self, word: str) -> bool:
        """Return whether the n-gram has a word."""
        return word in self._ids or self._tables.has(word)

    def word_id(self, word: str) -> int:
        """Return the id of a word; words that the n-gram lacks share `_STRANGERS` ids and their score."""
        found = self._ids.get(word)
        if found is None:
            if not self._tables.has(word):
                found = FIRST_STRANGER + zlib.crc32(word.encode()) % _STRANGERS
                self._strangers[found - FIRST_STRANGER] = word
                return found
            found = self._ids[word] = self._tables.add(word)
            if found >= len(self._refused):
                self._refused = np.concatenate([self._refused, np.zeros(found + 1, bool)])
            self._refused[found] = self.unigrams is not None and word not in self.unigrams
        return found

    def word(self, one: int) -> str:
        """Return the word of an id, of a word that is not known the last one that had it."""
        if one >= FIRST_STRANGER:
            return self._strangers[one - FIRST_STRANGER]
        return self._tables.words[one]

    def known_words(self) -> Optional[list[str]]:
        """Return all words that count as known; None: KenLM's binaries do not tell them."""
        words = self.unigrams
        if words is None and not self.binary:
            words = arpa_words(self.path)[0]
        if words is None:
            return None
        return sorted(word for word in words if word not in _MARKS and self._tables.has(word))

    def __deepcopy__(self, memo: dict[int, Any]) -> WordNgram:
        return self  # copies would read the file again

    def __reduce__(self) -> tuple[Any, ...]:
        reader = "kenlm" if isinstance(self._tables, _KenlmTables) else "own"
        return WordNgram, (self.path, self.unigrams, self.oov_score, reader, self.units)

    def open(self, oov_score: Optional[float] = None) -> WordScores:
        """Return what scores the nodes of one tree; ``oov_score``: in place of the n-gram's own."""
        return WordScores(self, oov_score)

    def log_prob(self, words: Sequence[str], boundary: bool = True) -> float:
        """Return the natural log of P(words), with their start and end as context if ``boundary``."""
        parents = np.arange(-1, len(words))
        tokens = np.array([START_ID if boundary else EMPTY_ID, *map(self.word_id, words)], np.int64)
        scores, nodes = self.open(), np.arange(1, len(tokens))
        total = float(scores.score(parents, tokens, nodes).sum())
        if boundary:
            total += float(scores.ends(parents, tokens, np.array([len(words)]))[0])
        return total


class WordScores:
    """Scores of the nodes of one tree: a node is a word after its parent, a first node has the parent -1."""

    def __init__(self, ngram: WordNgram, oov_score: Optional[float]) -> None:
        self._ngram, self._run, self._oov_score = ngram, ngram._tables.open(), oov_score

    def score(self, parents: ndarray, tokens: ndarray, nodes: ndarray) -> ndarray:
        """Return natural-log P(word | words before) of nodes [n], each after its parents.

        Args:
            parents, tokens: of all nodes of the tree, its own arrays.
            nodes: [n]; their parents are among them, before them, or were scored before.
        """
        refused, wanted = self._ngram._refused, tokens[nodes]
        strange = wanted >= FIRST_STRANGER
        strange = strange | refused[np.where(strange, 0, wanted)]
        more = self._ngram.oov_score if self._oov_score is None else self._oov_score
        return self._run.score(parents, tokens, nodes) + np.where(strange, more, 0.0)

    def ends(self, parents: ndarray, tokens: ndarray, nodes: ndarray) -> ndarray:
        """Return natural-log P(end of sentence | words) of nodes [n]."""
        return self._run.ends(parents, tokens, nodes)


class _KenlmTables:
    """An n-gram in KenLM's library."""

    def __init__(self, path: Path) -> None:
        import kenlm

        self.library = kenlm
        config = kenlm.Config()
        config.show_progress, config.arpa_complain = False, kenlm.ARPALoadComplain.NONE
        try:
            self.model = kenlm.Model(str(path), config)
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[-300:]
            raise ValueError(f"{path} must be an n-gram that KenLM reads, but: {reason}") from error
        self.order, self.words = int(self.model.order), []

    def has(self, word: str) -> bool:
        return word in self.model

    def add(self, word: str) -> int:
        self.words.append(word)
        return len(self.words) - 1

    def open(self) -> _KenlmRun:
        return _KenlmRun(self)


class _KenlmRun:
    """KenLM's states of the nodes of a tree."""

    def __init__(self, tables: _KenlmTables) -> None:
        self._model, self._words, self._new = tables.model, tables.words, tables.library.State
        self._states: dict[int, Any] = {}

    def score(self, parents: ndarray, tokens: ndarray, nodes: ndarray) -> ndarray:
        scores, words, base_score = np.empty(len(nodes)), self._words, self._model.BaseScore
        values = zip(nodes.tolist(), parents[nodes].tolist(), tokens[nodes].tolist())
        for index, (node, parent, token) in enumerate(values):
            before = self._states.get(parent)
            before = self._state(parents, tokens, parent) if before is None else before
            after = self._states[node] = self._new()
            scores[index] = base_score(before, "<unk>" if token >= FIRST_STRANGER else words[token], after)
        return scores * LN10

    def ends(self, parents: ndarray, tokens: ndarray, nodes: ndarray) -> ndarray:
        after = self._new()
        states = [self._state(parents, tokens, node) for node in nodes.tolist()]
        return np.array([self._model.BaseScore(state, "</s>", after) for state in states]) * LN10

    def _state(self, parents: ndarray, tokens: ndarray, node: int) -> Any:
        """Return the state of a node, by those before it if need be (those of earlier words)."""
        state, token = self._states.get(node), int(tokens[node])
        if state is None:
            state = self._states[node] = self._new()
            if token == START_ID:
                self._model.BeginSentenceWrite(state)
            elif token == EMPTY_ID:
                self._model.NullContextWrite(state)
            else:
                before = self._state(parents, tokens, int(parents[node]))
                word = "<unk>" if token >= FIRST_STRANGER else self._words[token]
                self._model.BaseScore(before, word, state)
        return state


class _OwnTables:
    """An n-gram in our own tables."""

    def __init__(self, path: Path) -> None:
        self.words, longest = arpa_words(path)
        most = longest_order(len(self.words))
        rule = f"be at most {most} for {len(self.words)} words (pip install kenlm reads longer ones)"
        check(longest <= most, f"the longest n-gram of {path}", rule, longest)
        self.ngram = PieceNgram.load(path, self.words)
        self.order = self.ngram.order
        self._ids = {word: index for index, word in enumerate(self.words)}
        self.unknown = next((self._ids.pop(word) for word in _UNKNOWN if word in self._ids), NOTHING)

    def has(self, word: str) -> bool:
        return word in self._ids

    def add(self, word: str) -> int:
        return self._ids[word]

    def open(self) -> _OwnTables:
        return self

    def score(self, parents: ndarray, tokens: ndarray, nodes: ndarray) -> ndarray:
        return self._score(parents, tokens, parents[nodes], self._pieces(tokens[nodes]))

    def ends(self, parents: ndarray, tokens: ndarray, nodes: ndarray) -> ndarray:
        return self._score(parents, tokens, nodes, np.full(len(nodes), self.ngram.end_id))

    def _score(self, parents: ndarray, tokens: ndarray, at: ndarray, wanted: ndarray) -> ndarray:
        """Return natural-log P(word ``wanted`` [n] | words up to the nodes ``at`` [n])."""
        contexts = []
        for _ in range(self.order - 1):
            here = np.where(at >= 0, self._pieces(tokens[at]), NOTHING)
            contexts.append(torch.from_numpy(here))
            at = np.where(at >= 0, parents[at], -1)
        scores = self.ngram.score(contexts, torch.from_numpy(np.where(wanted < 0, 0, wanted)))
        return np.where(wanted < 0, LOG_ZERO, scores.double().numpy())

    def _pieces(self, tokens: ndarray) -> ndarray:
        pieces = np.where(tokens >= FIRST_STRANGER, self.unknown, tokens)
        pieces[tokens == START_ID], pieces[tokens == EMPTY_ID] = self.ngram.start_id, NOTHING
        return pieces
