"""An n-gram over words as a k2 graph: scores of sentences, and whole lattices rescored by it.
Knows: k2's lattices, graphs, paths. Must not know: tokenizers, files, N-best lists.
"""
from __future__ import annotations

from typing import Any, MutableMapping, Sequence

import numpy as np
import torch

from icefall_fusion.common.counters import add_counters
from icefall_fusion.lattice.graph import DecodingGraph
from icefall_fusion.lattice.k2_fsas import load_k2, numbered, thin_out, to_fsa
from icefall_fusion.lattice.k2_lattice import K2Lattices, LatticeOptions
from icefall_fusion.lattice.paths import Paths, best_paths, draw_paths, join_paths

#: N-gram weights: the best path of a rescored lattice under each of them is in its N-best list.
NGRAM_SCALES = (0.5, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.3, 1.7)


class WordNgram:
    """An n-gram over words.

    Args:
        graph: of kind G.
        outputs: word ids of each output label of the lattices.
        device: of the lattices.
    """

    def __init__(
        self, graph: DecodingGraph, outputs: Sequence[tuple[int, ...]], device: torch.device
    ) -> None:
        k2 = load_k2()
        self._loops = k2.arc_sort(to_fsa(graph, device))  # a loop for arcs of lattices without output
        self._loops.ngram = self._loops.scores.clone()
        self._plain = k2.arc_sort(k2.remove_epsilon_self_loops(self._loops))
        for fsa in (self._loops, self._plain):
            for name in ("piece", "output", "hlg"):
                delattr(fsa, name)
        # the words of each output label; then, for arcs into the final state, with the -1 that k2 asks for
        self._outputs = [list(output) for output in outputs]
        self._words = k2.RaggedTensor(self._outputs + [[*row, -1] for row in self._outputs]).to(device)

    def score(self, sentences: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the natural-log probability of each sentence of word ids, its end included.

        Of several ways to back off the best one counts.
        """
        k2 = load_k2()
        if not sentences:
            return np.zeros(0)
        fsas = k2.linear_fsa([list(words) for words in sentences], device=self._plain.device)
        met = _intersect(self._plain, k2.arc_sort(k2.add_epsilon_self_loops(fsas)))
        return met.get_tot_scores(use_double_scores=True, log_semiring=False).cpu().numpy()

    def score_outputs(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the natural-log probability of each sequence of output labels, as `score` does."""
        return self.score([[w for label in labels for w in self._outputs[label]] for labels in sequences])

    def rescore(
        self, lattices: K2Lattices, options: LatticeOptions, counters: MutableMapping[str, float],
        scales: Sequence[float] = NGRAM_SCALES,
    ) -> Paths:
        """Put the n-gram in place of the graph's own scores in whole lattices; return best and random paths.

        An n-gram makes a lattice a hundred times as large, so improbable arcs leave it first.

        Args:
            lattices: that have a path.
            options: ``rescore_posterior``, ``rescore_arcs``, ``graph_scale``, ``paths``.
            counters: to which ``lattices_thinned`` is added: lattices cut down to ``rescore_arcs``.
            scales: of the n-gram: the best path under each is returned; random ones are of the first.
        """
        k2, plain, most = load_k2(), lattices.plain, options.rescore_arcs
        kept = numbered(lattices.fsas, options.graph_scale * plain.hlg + plain.ctc)
        kept = k2.prune_on_arc_post(kept, options.rescore_posterior, True)
        fsas = [kept[index] for index in range(kept.shape[0])]
        large = [index for index, fsa in enumerate(fsas) if fsa.num_arcs > most]
        for index in large:
            fsas[index] = thin_out(fsas[index], most, 10 * options.rescore_posterior)
        add_counters(counters, {"lattices_thinned": len(large)})
        paths, begin = [], 0
        for end in _ends_of_groups([fsa.num_arcs for fsa in fsas], most):
            some = self._rescore(k2.create_fsa_vec(fsas[begin:end]), lattices, scales, options.paths)
            paths += [p._replace(owner=p.owner + begin) for p in some]
            begin = end
        return join_paths(paths)

    def _rescore(
        self, kept: Any, lattices: K2Lattices, scales: Sequence[float], count: int
    ) -> list[Paths]:
        """Return best and random paths of a few lattices.

        Args:
            kept: k2's, with the attribute ``arc``: their arcs' numbers in ``lattices``.
            scales: see `rescore`.
            count: random paths of each.
        """
        k2, arcs = load_k2(), kept.arc.long()
        few = numbered(kept, lattices.plain.ctc[arcs])
        few.arc = kept.arc + 1  # 0 will stand for arcs that inversion adds
        rows = lattices.plain.output[arcs] + len(self._outputs) * (kept.labels == -1)
        few.aux_labels, _ = self._words.index(rows.to(torch.int32), axis=0)
        met = _intersect(self._loops, k2.invert(few))
        ngram, acoustic = met.ngram.clone(), met.scores - met.ngram
        met.arc = met.arc - 1
        paths = []
        for scale in scales:
            met.scores = acoustic + scale * ngram
            paths.append(best_paths(met))
        met.scores = acoustic + scales[0] * ngram
        return [*paths, draw_paths(met, count)]


def _intersect(ngram: Any, fsas: Any) -> Any:
    """Return each FSA of a vector intersected with the n-gram."""
    k2 = load_k2()
    every = torch.zeros(fsas.shape[0], dtype=torch.int32, device=fsas.device)
    met = k2.intersect_device(ngram, fsas, every, sorted_match_a=True)
    return k2.top_sort(k2.connect(met))


def _ends_of_groups(counts: Sequence[int], most: int) -> list[int]:
    """Return where groups of neighbours end that have ``most`` arcs together at most (one may have more)."""
    ends, arcs = [], 0
    for index, count in enumerate(counts):
        if arcs and arcs + count > most:
            ends.append(index)
            arcs = 0
        arcs += count
    return [*ends, len(counts)] if len(counts) else []
