"""A model that opens the trees of the same utterances once: what it has scored stays known.
Knows: CausalLm, its trees. Must not know: what is decoded, or why again.

Tuning decodes the same utterances under many weights. Most hypotheses come back, and their log-probs do not
depend on any weight.
"""
from __future__ import annotations

from typing import Callable, Hashable, Optional, Sequence

from numpy import ndarray
from torch import Tensor

from icefall_fusion.lm.causal_lm import CausalLm
from icefall_fusion.lm.tree_scorer import Nodes, TreeOptions, TreeScorer


class RememberingTree(TreeScorer):
    """A tree in which the end of a text is a node too, so that its score is kept like all others."""

    def launch(self, nodes: Nodes, eos: bool = False) -> Callable[[], Tensor]:
        """Start to score as `TreeScorer.launch` does."""
        if not eos:
            return super().launch(nodes)
        ends = super().launch(self._ends(self._nodes(nodes)))
        return lambda: self._like(nodes, ends().numpy())

    def eos_scores(self, nodes: Nodes) -> Tensor:
        """Return log P(eos | path of node) [n] float32; at most one lazy forward."""
        wanted = self._nodes(nodes)
        totals = super().launch(self._ends(wanted))()
        return self._like(nodes, totals.numpy() - self.tree.score[wanted])

    def _ends(self, nodes: ndarray) -> ndarray:
        return self.tree.children(nodes, self._eos(len(nodes)))[0]


class RememberingLm(CausalLm):
    """A model whose `open_tree` returns the tree that it opened before for the same utterances.

    Such a tree keeps the scores of all its nodes; keys, values and distributions are freed as ever. Its
    counters go on. Two users of one tree must not be at work at the same time.

    Args:
        lm: the model; its weights are shared.
    """

    tree_kind = RememberingTree

    def __init__(self, lm: CausalLm) -> None:
        vars(self).update(vars(lm))
        self._trees: dict[Hashable, tuple[Optional[list[list[int]]], TreeScorer]] = {}

    def open_tree(
        self,
        batch: int,
        prompts: Optional[Sequence[Sequence[int]]] = None,
        options: Optional[TreeOptions] = None,
        aside: bool = False,
        names: Optional[Sequence[str]] = None,
    ) -> TreeScorer:
        """Return the tree of the utterances ``names`` after these prompts (see `CausalLm.open_tree`).

        Without names, and where the prompts are others than last time, the tree is a new one.
        """
        key, earlier = (tuple(names or ()), options, aside), prompts and [list(ids) for ids in prompts]
        if key in self._trees and self._trees[key][0] == earlier:
            tree = self._trees[key][1]
            tree.keep([])  # of the last decode nothing is needed but the scores
            return tree
        tree = super().open_tree(batch, prompts, options, aside)
        if names:
            self._trees[key] = (earlier, tree)
        return tree
