"""Delayed fusion in a stream: the text behind a cut is forgotten, the LLM reads its last words as context.
Knows: delayed fusion, words before a cut, trees in lanes. Must not know: audio, when to cut, which LM it is.

After a cut the arena's root stands for the words before it (search/streaming.py). The LLM's tree first grows
on: its root moves down to the node of those words, and no score changes. When the tree has become long, it is
replaced: the new one has the last words as its prompt. What those before had scored is taken out of all
hypotheses alike, so that their order stays, and is added again in the stream's result.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Optional, Sequence

import numpy as np
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.common.counters import add_counters
from icefall_fusion.fusion.delayed import DelayedFusion
from icefall_fusion.fusion.lm_stream import LmStream
from icefall_fusion.fusion.word_nodes import open_word_nodes
from icefall_fusion.fusion.words import WordNodes
from icefall_fusion.text.scripts import join_words, split_units
from icefall_fusion.text.styles import adapt, adapt_word

if TYPE_CHECKING:
    from icefall_fusion.lm.tree_lanes import TreeLanes
    from icefall_fusion.search.beam import Beam


class DelayedStream(LmStream, DelayedFusion):
    """A delayed fusion of one stream.

    Args:
        fusion, lanes, tell: see `LmStream`.
        context: earlier text, after the prompt; read, not scored.
        words: most words of prompt and text that the LLM keeps as its context.

    Attributes:
        base: log P of the words that are in the tree no more.
    """

    def __init__(self, fusion: DelayedFusion, lanes: TreeLanes, context: Sequence[str], words: int,
                 tell: Optional[Callable[[str, Exception], None]] = None) -> None:
        super().__init__(fusion, lanes, tell)
        self._most = words
        several = isinstance(fusion.prompt, Mapping)
        check(not several, "DelayedFusion.prompt", "be one text in a stream", fusion.prompt)
        rule = "be words in a stream: what is held back would be lost at a cut"
        check(fusion.boundaries == "words", "DelayedFusion.boundaries", rule, fusion.boundaries)
        before = [*split_units(fusion.prompt or ""), *split_units(adapt(context, self.text))]
        self._before = before[-words:]
        self.prompt = join_words(self._before) or None
        self.base, self._cut, self._past = 0.0, 0, dict[str, float]()

    def begin(self, beam: Beam, index: int, tokens: Any, ids: Sequence[str]) -> None:
        """Start a stream (see ``Fusion.begin``)."""
        try:
            super().begin(beam, index, tokens, ids)
        except Exception:
            self.close()  # the lane is needed by others
            raise
        self._words_in_tree = len(self._before)

    def in_steps(self, beam: Beam, fires: Optional[Tensor], lands: Optional[Tensor] = None) -> Iterator[None]:
        """Score in steps (see ``Fusion.in_steps``), unless the language model fails or has failed."""
        if self.failed:
            return
        try:
            yield from super().in_steps(beam, fires, lands)
        except Exception as error:  # whatever it is: the stream goes on
            self._fail(beam, error)

    def _fuse_in_steps(self, beam: Beam, fires: Tensor, frame: int) -> Iterator[None]:
        """Do the same where a search by tensors asks frame by frame."""
        if self.failed:
            return
        try:
            yield from super()._fuse_in_steps(beam, fires, frame)
        except Exception as error:
            self._fail(beam, error)

    def _land(self, beam: Beam, landing: Tensor) -> tuple[Optional[Tensor], Optional[Tensor]]:
        if self.failed:
            return None, None
        try:
            return super()._land(beam, landing)
        except Exception as error:
            self._fail(beam, error)
            return None, None

    def prepare_cut(self, beam: Beam, node: int) -> None:
        """Find and score the words of an arena node that will be the root."""
        if self.failed:
            return
        try:
            nodes, counts = self._ask("closed", np.array([node], np.int64))
            self._words_in_tree += int(counts[0]) - self._cut
            self._root, self._cut = int(nodes[0]), int(counts[0])
            self._root_score = float(self._tree.score([self._root])[0])
        except Exception as error:
            self._fail(beam, error)

    def cut(self, beam: Beam, words: Sequence[str]) -> None:
        """Go on from the new root of the arena.

        Args:
            beam: its arena has been cut.
            words: those that were cut off, since the last cut.
        """
        if self.failed:
            return
        first = self._cut - len(words)
        adapted = [adapt_word(word, first + number, self.text) for number, word in enumerate(words)]
        self._before = [*self._before, *adapted][-self._most :]
        self._tree.move_root(self._root)
        self._reopen()
        landed = self._flying is None or not bool(self._flying.flying().any())
        if landed and self._tree_is_long():
            self._renew_tree(beam)

    def _fail(self, beam: Beam, error: Exception) -> None:
        super()._fail(beam, error)
        self.base = 0.0

    def _tree_is_long(self) -> bool:
        deep = int(self._tree.tree.depth[self._root])
        longest = self.lm.max_tokens
        return self._words_in_tree > 2 * self._most or (longest is not None and deep > longest // 2)

    def _renew_tree(self, beam: Beam) -> None:
        """Replace the tree by one whose prompt is the last words."""
        score = self._root_score
        self._past = self._count()
        self._close()
        prompt = self.lm.encode(join_words(self._before))
        self._tree = self.lm.open_tree(1, [prompt], aside=self.late > 0)
        self._words_in_tree, self._scored = len(self._before), np.zeros(0, np.bool_)
        self._words_asked = np.array([self._tokenizer.hits, self._tokenizer.misses])
        self._events, self._cleaned_at = 0, len(self._tree.tree)
        self._reopen()
        beam.state[..., self.index] = self._tree.root(0)
        beam.lm[..., self.index] -= score
        beam.fused -= self.weight * score
        self.base += score

    def _reopen(self) -> None:
        """Let the known words begin at the roots of arena and tree, which `_cut` words come before."""
        _, *rest = self._texts
        self._texts = (self._tree, *rest[:5], [self._cut])
        in_python = isinstance(self._word_nodes, WordNodes)
        self._word_nodes = WordNodes(*self._texts) if in_python else open_word_nodes(*self._texts)

    def _count(self) -> dict[str, float]:
        total = dict(self._past)
        add_counters(total, super()._count())
        return total
