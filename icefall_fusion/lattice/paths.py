"""Paths of k2's lattices: the best ones and random ones, as arrays of arcs.
Knows: k2's lattices. Must not know: language models, tokenizers, files, N-best lists.
"""
from __future__ import annotations

from typing import Any, NamedTuple, Sequence

import numpy as np
from torch import Tensor

from icefall_fusion.lattice.k2_fsas import arc_bounds, load_k2, numbered


class Paths(NamedTuple):
    """Paths of all lattices of a vector, one after the other.

    owner: [n] index of the lattice of each; splits: [n+1] where its arcs begin; arcs: indices into all arcs.
    """

    owner: np.ndarray
    splits: np.ndarray
    arcs: np.ndarray

    def path(self, number: int) -> np.ndarray:
        """Return the arcs of one path."""
        return self.arcs[self.splits[number] : self.splits[number + 1]]


def random_paths(fsas: Any, scores: Tensor, count: int) -> Paths:
    """Return the best path and pseudo-random ones (always the same); better paths are drawn more often.

    Args:
        fsas: k2's lattices.
        scores: [A] of arcs; a path is drawn with the probability that they give it.
        count: paths drawn from each lattice.
    """
    fsas = numbered(fsas, scores)
    return join_paths([best_paths(fsas), draw_paths(fsas, count)])


def best_paths(fsas: Any) -> Paths:
    """Return the best path of each lattice; the attribute ``arc`` numbers the arcs (below 0: no arc)."""
    path = load_k2().shortest_path(fsas, True)
    return _make_paths(np.arange(path.shape[0]), arc_bounds(path), path.arc)


def draw_paths(fsas: Any, count: int) -> Paths:
    """Return random paths of each lattice; the attribute ``arc`` numbers the arcs (below 0: no arc)."""
    drawn = load_k2().random_paths(fsas, True, count)
    paths_of_each = np.diff(drawn.shape.row_splits(1).cpu().numpy())
    owner = np.repeat(np.arange(len(paths_of_each)), paths_of_each)
    return _make_paths(owner, drawn.shape.row_splits(2), fsas.arc[drawn.values.long()])


def join_paths(several: Sequence[Paths]) -> Paths:
    """Return the paths of several as one."""
    shifts = np.cumsum([0, *(len(paths.arcs) for paths in several)])
    splits = [paths.splits[:-1] + shift for paths, shift in zip(several, shifts)]
    owner, arcs = (np.concatenate([getattr(paths, name) for paths in several]) for name in ("owner", "arcs"))
    return Paths(owner, np.append(np.concatenate(splits), shifts[-1]), arcs)


def _make_paths(owner: np.ndarray, splits: Tensor, arc: Tensor) -> Paths:
    """Return paths without the entries of ``arc`` below 0."""
    arcs = arc.cpu().numpy().astype(np.int64)
    kept = np.concatenate([[0], np.cumsum(arcs >= 0)])
    return Paths(owner, kept[splits.cpu().numpy()], arcs[arcs >= 0])
