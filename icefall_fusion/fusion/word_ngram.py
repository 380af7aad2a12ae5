"""An n-gram over words as a language model of delayed fusion: its tokens are words.
Knows: a word n-gram, the token tree. Must not know: acoustic models, files.
"""
from __future__ import annotations

import time
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Callable, Iterable, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.fusion.base import LOG_ZERO
from icefall_fusion.fusion.delayed import DelayedFusion, Prompt
from icefall_fusion.fusion.hotwords import HotWordFusion
from icefall_fusion.fusion.triggers import ShortestHypothesis, Trigger
from icefall_fusion.lm.token_tree import make_tree
from icefall_fusion.nbest import NBest
from icefall_fusion.ngram.vocabulary import WordAutomaton
from icefall_fusion.ngram.word_ngram import EMPTY_ID, END_ID, ID_COUNT, START_ID, WordNgram, WordScores
from icefall_fusion.text.scripts import has_unspaced, split_units

if TYPE_CHECKING:
    from icefall_fusion.search.beam import Beam
    from icefall_fusion.text.tokens import AcousticTokens

_KEEP_AFTER = 4096  # new words an utterance between two clean-ups


class WordNgramFusion(DelayedFusion):
    """An n-gram over words joins the search: closed words are scored at an event, the open one at the end.

    It goes the way of Hori et al. 2025, section 3, with an n-gram in place of the LLM, and stands beside one.

    Args:
        ngram: the n-gram; a word that it does not know has the score of ``<unk>`` and its ``oov_score``.
        weight: factor of its natural-log score, at least 0; 0 leaves the search as it is, bit for bit.
        word_bonus: added per scored word, in nats.
        trigger: when to score. Beside an LLM take the same for both: they then share their events.
        text: how the n-gram sees words: ``as-is``, ``lower`` or ``sentence``.
        prompt: earlier words, for all utterances or by utterance id: a context, not scored.
        boundary: whether the start of a sentence is a context and its end is scored.
        source: name of the score in N-best lists.
        oov_score: in place of the n-gram's own; 0 beside a `VocabularyFusion`, which charges it.

    Raises:
        ValueError: see `DelayedFusion`.
    """

    def __init__(
        self,
        ngram: WordNgram,
        weight: float,
        word_bonus: float = 0.0,
        trigger: Trigger = ShortestHypothesis(every=4),  # noqa: B008 (a frozen value)
        text: str = "as-is",
        prompt: Prompt = None,
        boundary: bool = True,
        source: str = "wordngram",
        oov_score: Optional[float] = None,
    ) -> None:
        check(isinstance(ngram, WordNgram), "WordNgramFusion.ngram", "be a WordNgram", type(ngram).__name__)
        check(isinstance(boundary, bool), "WordNgramFusion.boundary", "be True or False", boundary)
        lm = ngram.views.setdefault((boundary, oov_score), _WordLm(ngram, boundary, oov_score))
        super().__init__(lm, weight, word_bonus, trigger, text, prompt, boundary, source)

    def _clean(self, beam: Beam) -> None:
        """Forget old words seldom: they take little room, and to look for them takes long."""
        if len(self._tree.tree) - self._cleaned_at > _KEEP_AFTER * beam.arena.batch:
            super()._clean(beam)

    def _launch(self, beam: Beam, fires: Optional[Tensor]) -> Any:
        """Score by arrays in one step, as there is nothing to wait for; equal to `DelayedFusion`."""
        if beam.lens.device.type != "cpu" or self._flying is not None:
            return super()._launch(beam, fires)
        alive = beam.log_total.numpy() > -np.inf
        at = (alive if fires is None else alive & fires.numpy()[:, None]).nonzero()
        if len(at[0]):
            self._events += fires is not None
            prefixes = beam.node.numpy()[at]
            if fires is not None:
                prefixes = beam.arena.on_host("boundary")[prefixes]
            nodes, counts = (x.numpy() for x in self._nodes(torch.from_numpy(prefixes), fires is None))
            self._write_arrays(beam, at, nodes, counts, fires is None and self.eos)
            if fires is not None:
                self._clean(beam)
        return None

    def _write_arrays(self, beam: Beam, at: tuple[np.ndarray, ...], nodes: np.ndarray, counts: np.ndarray,
                      eos: bool) -> None:
        """Give the slots ``at`` [2][n] their scores, words and states."""
        found = self._tree.scores(nodes, eos)
        if np.isnan(found).any():
            slots = torch.from_numpy(at[0] * beam.arena.beam + at[1])
            self._numbers(beam, slots, torch.from_numpy(found))
        scores = np.maximum(found.astype(np.float32), np.float32(LOG_ZERO))
        lm, paid = beam.lm.numpy()[..., self.index], beam.words.numpy()[..., self.index]
        gain = np.float32(self.weight) * (scores - lm[at])
        gain += np.float32(self.word_bonus) * (counts - paid[at]).astype(np.float32)
        lm[at], paid[at] = scores, counts
        beam.fused.numpy()[at] += gain
        beam.state.numpy()[..., self.index][at] = nodes

    def _count(self) -> dict[str, float]:
        """Return its seconds and scored words alone: other counters are those of an LLM beside it."""
        return self._tree.stats()


class VocabularyFusion(HotWordFusion):
    """Words outside a list cost ``oov_score``, as soon as a word leaves the prefix tree of the list.

    It guides the pruning in the middle of words, where an n-gram over words knows nothing yet, and is the
    n-gram's score of unknown words at the same time (its own `oov_score` is then 0).

    Args:
        words: of the list.
        tokens: the acoustic vocabulary.
        oov_score: natural log, at most 0; -inf: other words do not survive.
        weight: factor of the score, at least 0.
        lower: whether the list has words in lower case and the acoustic vocabulary has not.
        source: name of the score in N-best lists.

    Raises:
        ValueError: there are no words, or a bad score, weight or source.
    """

    def __init__(self, words: Iterable[str], tokens: AcousticTokens, oov_score: float, weight: float = 1.0,
                 lower: bool = False, source: str = "oov") -> None:
        super().__init__(word_automaton(words, tokens, oov_score, lower), weight, source=source)


def join_oov(nbests: Iterable[NBest], source: str = "wordngram", oov: str = "oov") -> list[NBest]:
    """Return lists in which the score of unknown words is part of the n-gram's.

    A list stays as it is where the two have different weights, as in a stream whose n-gram has failed.
    """
    joined = []
    for nbest in nbests:
        if nbest.weights[source] != nbest.weights[oov]:
            joined.append(nbest)
            continue
        hypotheses = []
        for found in nbest:
            scores = dict(found.scores)
            scores[source] += scores.pop(oov)
            hypotheses.append(replace(found, scores=scores))
        weights = {name: weight for name, weight in nbest.weights.items() if name != oov}
        joined.append(NBest(nbest.utterance, hypotheses, weights))
    return joined


def word_automaton(words: Iterable[str], tokens: AcousticTokens, oov_score: float,
                   lower: bool = False, units: bool = True) -> WordAutomaton:
    """Return words as an automaton over acoustic pieces; see `VocabularyFusion`.

    Args:
        units: a piece of several characters of a script without spaces is known if all of them are words,
            as the n-gram reads it then (see `WordNgram`).
    """
    words = dict.fromkeys(words)
    letters: list[Optional[list[int]]] = []
    for piece in range(tokens.size):
        text = "".join(tokens.words([piece]))
        if units and has_unspaced(text) and all(unit in words for unit in split_units(text)):
            words.setdefault(text)
        silent = piece == tokens.unk_id or not text and not tokens.starts_word[piece]
        letters.append(None if silent else [ord(letter) for letter in (text.lower() if lower else text)])
    known = [[ord(letter) for letter in word] for word in words if word]
    return WordAutomaton(known, letters, tokens.starts_word, oov_score)


class _WordLm:
    """A word n-gram as delayed fusion wants its language model."""

    pieces, eos_id, max_tokens = None, END_ID, None

    def __init__(self, ngram: WordNgram, boundary: bool, oov_score: Optional[float]) -> None:
        self.ngram, self.name, self._first = ngram, ngram.name, START_ID if boundary else EMPTY_ID
        self._oov_score = oov_score
        self.tokenizer = _Words(weakref.proxy(ngram))  # what is made for a tokenizer lives as long as it does

    def encode(self, text: str) -> list[int]:
        """Return the ids of earlier words."""
        return self.tokenizer.encode(text)

    def open_tree(self, utterances: int, prompts: Optional[Sequence[Sequence[int]]] = None,
                  aside: bool = False, names: Sequence[str] = ()) -> _WordTree:
        """Return a tree of words for each utterance."""
        prompts = [[]] * utterances if prompts is None else prompts
        scores = self.ngram.open(self._oov_score)
        return _WordTree(scores, [[self._first, *prompt] for prompt in prompts])


class _Words:
    """The words of an n-gram as a tokenizer: one token a word.

    Of scripts without spaces, a word that the n-gram lacks is one token for each of its units.
    """

    unk_token_id, spaced = None, True

    def __init__(self, ngram: WordNgram) -> None:
        self._ngram = ngram

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        words = [word for word in text.split(" ") if word]
        if self._ngram.units and not text.isascii():
            words = [unit for word in words for unit in self._units(word)]
        return [self._ngram.word_id(word) for word in words]

    def _units(self, word: str) -> list[str]:
        return split_units(word) if has_unspaced(word) and not self._ngram.has(word) else [word]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.convert_ids_to_tokens(ids))

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self._ngram.word(one) for one in ids]


class _WordTree:
    """What `TreeScorer` is for an LLM: scores of paths of words, one tree for each utterance."""

    def __init__(self, scores: WordScores, prompts: Sequence[Sequence[int]]) -> None:
        self.tree = make_tree(ID_COUNT, len(prompts))
        for utterance, prompt in enumerate(prompts):
            self.tree.add_root(utterance, prompt)
        self._scores, self._words, self._seconds = scores, 0, 0.0

    def roots(self) -> Tensor:
        return torch.from_numpy(self.tree.roots.copy())

    def root(self, utterance: int) -> int:
        return int(self.tree.roots[utterance])

    def move_root(self, node: int) -> None:
        """Let a node below the root be the root (see `LaneScorer`)."""
        self.tree.roots[0] = node

    def insert(self, node: int, token_ids: Sequence[int]) -> int:
        return self.tree.insert(node, list(token_ids))

    def keep(self, live: Any) -> None:
        """Free nothing: a node is a few numbers."""

    def known(self, nodes: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return which nodes are scored, and their scores, else NaN (see `TreeScorer.known`)."""
        scores = self.tree.score[np.asarray(nodes, np.int64)]
        return ~np.isnan(scores), scores

    def close(self) -> None:
        """Do nothing: all is freed with the tree."""

    def score(self, nodes: Sequence[int]) -> np.ndarray:
        """Return log P(words of each node) [n]."""
        return self.scores(np.asarray(nodes, np.int64), False)

    def launch(self, nodes: Tensor, eos: bool = False) -> Callable[[], Tensor]:
        """Return what returns log P(words of each node) [n] float32, with the end's if ``eos``."""
        found = torch.from_numpy(self.scores(nodes.numpy(), eos)).float()
        return lambda: found

    def scores(self, wanted: np.ndarray, eos: bool) -> np.ndarray:
        """Return the same at once [n] float64."""
        start, tree = time.perf_counter(), self.tree
        new = tree.unscored(wanted)
        if len(new):
            tree.set_scores(new, self._scores.score(tree.parent, tree.token, new))
        scores = tree.score[wanted]
        if eos:
            last, where = np.unique(wanted, return_inverse=True)
            scores = scores + self._scores.ends(tree.parent, tree.token, last)[where]
        self._words += len(new)
        self._seconds += time.perf_counter() - start
        return scores

    def stats(self) -> dict[str, float]:
        return {"lm_seconds": self._seconds, "word_ngram_words": self._words}
