"""Paths of k2's lattices: the best, random ones, those of a lattice that an n-gram over words has rescored.
Knows: k2's lattices, graphs. Must not know: language models, tokenizers, files, N-best lists.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Sequence

import numpy as np
import torch

from icefall_fusion.lattice.graph import DecodingGraph
from icefall_fusion.lattice.k2_lattice import arcs_of_each, load_k2, thin_out, to_fsa


class Paths(NamedTuple):
    """Paths of all lattices of a vector, one after the other.

    owner: [n] which lattice each is of; splits: [n+1] where its arcs begin; arcs: indices into all arcs.
    ngram: [n] log-prob of the words by an n-gram, or None.
    """

    owner: np.ndarray
    splits: np.ndarray
    arcs: np.ndarray
    ngram: Any = None

    def path(self, number: int) -> np.ndarray:
        """Return the arcs of one path."""
        return self.arcs[self.splits[number] : self.splits[number + 1]]


def best_path(fsas: Any, scores: torch.Tensor) -> Paths:
    """Return k2's shortest path of each lattice under scores [A] of its arcs."""
    numbered = _with_scores(fsas, scores)
    numbered.place = torch.arange(int(fsas.num_arcs), dtype=torch.int32, device=fsas.device)
    return _of_linear(load_k2().shortest_path(numbered, True))


def random_paths(fsas: Any, scores: torch.Tensor, count: int) -> Paths:
    """Return pseudo-random paths (always the same ones), the better the more often, and the best one.

    Args:
        fsas: k2's lattices.
        scores: [A] of arcs, scaled as they are to be drawn by.
        count: paths drawn from each.
    """
    k2 = load_k2()
    drawn = k2.random_paths(_with_scores(fsas, scores), True, count)
    shape = drawn.shape
    per_lattice = shape.row_splits(1).cpu().numpy().astype(np.int64)
    splits = shape.row_splits(2).cpu().numpy().astype(np.int64)
    owner = np.repeat(np.arange(len(per_lattice) - 1), np.diff(per_lattice))
    arcs = drawn.values.cpu().numpy().astype(np.int64)
    return join_paths([best_path(fsas, scores), Paths(owner, splits, arcs)])


def join_paths(parts: Sequence[Paths]) -> Paths:
    """Return the paths of several as one (without n-gram scores unless all have them)."""
    shifts = np.cumsum([0, *(len(part.arcs) for part in parts)])
    splits = [part.splits[:-1] + shift for part, shift in zip(parts, shifts)]
    ngram = None if any(part.ngram is None for part in parts) else np.concatenate([p.ngram for p in parts])
    owner, arcs = (np.concatenate([getattr(part, name) for part in parts]) for name in ("owner", "arcs"))
    return Paths(owner, np.append(np.concatenate(splits), shifts[-1]), arcs, ngram)


def _with_scores(fsas: Any, scores: torch.Tensor) -> Any:
    """Return the lattices with other scores and nothing else."""
    plain = load_k2().Fsa(fsas.arcs)
    plain = plain.clone()  # its scores are its own then
    plain.scores = scores.float()
    return plain


def _of_linear(fsas: Any) -> Paths:
    """Return the paths that a vector of linear FSAs has in the attribute ``place`` (below 0: no arc)."""
    shape = fsas.arcs.shape()
    bounds = shape.row_splits(2)[shape.row_splits(1).long()].cpu().numpy().astype(np.int64)
    place = fsas.place.cpu().numpy().astype(np.int64)
    kept = np.concatenate([[0], np.cumsum(place >= 0)])
    return Paths(np.arange(len(bounds) - 1), kept[bounds], place[place >= 0])


class WordNgram:
    """An n-gram over words as a k2 graph: scores of word sequences, and lattices rescored as a whole.

    Args:
        graph: of kind G.
        device: of the lattices.
    """

    def __init__(self, graph: DecodingGraph, device: torch.device) -> None:
        k2 = load_k2()
        self.loops = k2.arc_sort(to_fsa(graph, device))  # each state may wait where lattices say nothing
        self.loops.ngram = self.loops.scores.clone()
        self.plain = k2.arc_sort(k2.remove_epsilon_self_loops(self.loops))
        for fsa in (self.loops, self.plain):
            for name in ("piece", "saying", "hlg"):
                delattr(fsa, name)

    def score(self, sentences: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the natural-log probability of each sentence of word ids, its end included.

        Of several ways to back off the best one counts.
        """
        k2 = load_k2()
        if not sentences:
            return np.zeros(0)
        fsas = k2.linear_fsa([list(words) for words in sentences], device=self.plain.device)
        fsas = k2.arc_sort(k2.add_epsilon_self_loops(fsas))
        every = torch.zeros(len(sentences), dtype=torch.int32, device=self.plain.device)
        met = k2.intersect_device(self.plain, fsas, every, sorted_match_a=True)
        met = k2.top_sort(k2.connect(met))
        return met.get_tot_scores(use_double_scores=True, log_semiring=False).cpu().numpy()

    def rescore(
        self,
        fsas: Any,
        acoustic: torch.Tensor,
        scores: torch.Tensor,
        least: float,
        sayings: Sequence[tuple[int, ...]],
        scales: Sequence[float],
        count: int,
        most: int = 20_000,
    ) -> tuple[Paths, int]:
        """Let the n-gram take the place of a graph's own in whole lattices.

        Returns best and random paths, and of how many lattices more than the improbable had to go.

        Args:
            fsas: k2's lattices, with the attribute ``saying``.
            acoustic: [A] scores of arcs without the graph's.
            scores: [A] scores of arcs with the graph's.
            least: arcs that are less probable than this under ``scores`` are left out: an n-gram makes a
                lattice a hundred times as large.
            sayings: word ids by saying.
            scales: of the n-gram: the best path under each is returned.
            count: random paths of each, drawn under the first scale.
            most: arcs of lattices that are rescored at once; see LatticeOptions.rescore_arcs.
        """
        k2 = load_k2()
        kept = _with_scores(fsas, scores)
        kept.place = torch.arange(int(fsas.num_arcs), dtype=torch.int32, device=fsas.device)
        kept = k2.prune_on_arc_post(kept, least, True)
        table = k2.RaggedTensor([list(saying) for saying in sayings]).to(fsas.device)
        parts, counts, thinned = [], arcs_of_each(kept), 0
        for place, arcs in enumerate(counts):
            part = kept[place]
            if arcs > most:
                part, counts[place] = thin_out(part, most, 10 * least)
                thinned += 1
            parts.append(part)
        found, begin = [], 0
        for end in _bounds_of_groups(counts, most):
            together = k2.create_fsa_vec(parts[begin:end])
            words, _ = table.index(fsas.saying[together.place.long()], axis=0)
            for paths in self._rescore(together, words, acoustic, scales, count):
                found.append(paths._replace(owner=paths.owner + begin))
            begin = end
        return join_paths(found), thinned

    def _rescore(
        self, kept: Any, words: Any, acoustic: torch.Tensor, scales: Sequence[float], count: int
    ) -> list[Paths]:
        """Return best and random paths of a few lattices, whose arcs have the attribute ``place``.

        Args:
            words: ragged word ids of each arc.
            acoustic, scales, count: see `rescore`.
        """
        k2, places = load_k2(), kept.place.long()
        final = (kept.labels == -1).nonzero().squeeze(1)
        lattices = _with_scores(kept, acoustic[places])
        lattices.aux_labels = _with_final(words, final, kept)
        lattices.place = (places + 1).to(torch.int32)  # 0 will stand for arcs that inversion adds
        turned = k2.invert(lattices)
        every = torch.zeros(kept.shape[0], dtype=torch.int32, device=kept.device)
        met = k2.intersect_device(self.loops, turned, every, sorted_match_a=True)
        met = k2.top_sort(k2.connect(met))
        ngram, heard = met.ngram.clone(), met.scores - met.ngram
        met.place = met.place - 1
        found = []
        for scale in scales:
            met.scores = heard + scale * ngram
            path = k2.shortest_path(met, True)
            found.append(_of_linear(path)._replace(ngram=_sums(path)))
        if count:
            met.scores = heard + scales[0] * ngram
            found.append(_random_of(met, count))
        return found


def _bounds_of_groups(counts: Sequence[int], most: int) -> list[int]:
    """Return where groups of neighbours end that have at most so many arcs together (one may have more)."""
    ends, arcs = [], 0
    for place, count in enumerate(counts):
        if arcs and arcs + count > most:
            ends.append(place)
            arcs = 0
        arcs += count
    return [*ends, len(counts)] if len(counts) else []


def _with_final(words: Any, final: torch.Tensor, fsas: Any) -> Any:
    """Return ragged words with -1 at the end of what arcs into the final state say, as k2 asks for."""
    k2 = load_k2()
    splits = words.shape.row_splits(1).long()
    extra = torch.zeros(int(fsas.num_arcs), dtype=torch.int64, device=splits.device)
    extra[final] = 1
    sizes = splits[1:] - splits[:-1]
    after = torch.zeros_like(splits)
    after[1:] = (sizes + extra).cumsum(0)
    values = torch.full((int(after[-1]),), -1, dtype=torch.int32, device=splits.device)
    inside = torch.arange(len(words.values), device=splits.device)
    owner = torch.arange(len(sizes), device=splits.device).repeat_interleave(sizes)
    values[after[:-1][owner] + inside - splits[:-1][owner]] = words.values
    shape = k2.ragged.create_ragged_shape2(row_splits=after.to(torch.int32), cached_tot_size=len(values))
    return k2.RaggedTensor(shape, values)


def _sums(paths: Any) -> np.ndarray:
    """Return the n-gram's score of each linear FSA."""
    shape = paths.arcs.shape()
    bounds = shape.row_splits(2)[shape.row_splits(1).long()].cpu().long()
    total = torch.cat([torch.zeros(1, dtype=torch.float64), paths.ngram.cpu().double().cumsum(0)])
    return (total[bounds[1:]] - total[bounds[:-1]]).numpy()


def _random_of(met: Any, count: int) -> Paths:
    drawn = load_k2().random_paths(met, True, count)
    per_lattice = drawn.shape.row_splits(1).cpu().numpy().astype(np.int64)
    splits = drawn.shape.row_splits(2).cpu().numpy().astype(np.int64)
    arcs = drawn.values.long()
    place = met.place[arcs].cpu().numpy().astype(np.int64)
    ngram = np.concatenate([[0.0], np.cumsum(met.ngram[arcs].cpu().double().numpy())])
    kept = np.concatenate([[0], np.cumsum(place >= 0)])
    owner = np.repeat(np.arange(len(per_lattice) - 1), np.diff(per_lattice))
    return Paths(owner, kept[splits], place[place >= 0], ngram[splits[1:]] - ngram[splits[:-1]])
