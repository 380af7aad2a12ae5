"""Lattices of a batch as plain tensors: each arc takes one frame and has one score per source.
Knows: tensors. Must not know: k2, log-probs, searches, language models.

Legend as in search/beam.py; A arcs of all lattices together.
"""
from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Mapping, Sequence

import torch
from torch import Tensor

from icefall_fusion.common.checks import check

SOURCES = ("ctc", "hlg")  # of the scores of arcs


@dataclass(frozen=True)
class Lattices:
    """Lattices of B utterances, end to end.

    Args:
        ids: B names.
        lens: [B] int64 frames, on the CPU.
        bounds: [B+1] int64 where the arcs of each begin, on the CPU; an empty lattice has none.
        source, target: [A] int64 states, counted from 0 (the start) in each lattice; arcs are sorted by
            source, and every arc leads to a state of the next frame (the last: to the one final state).
        label: [A] int64 piece of the frame, 0 for blank, -1 into the final state.
        piece: [A] int64 piece that begins, 0 for none.
        output: [A] int64 output label (an index into `DecodingGraph.outputs`), 0 for none.
        frame: [A] int64; of arcs into the final state the number of frames.
        ctc, hlg: [A] float32 natural-log scores of the acoustic model and of the graph.
    """

    ids: list[str]
    lens: Tensor
    bounds: Tensor
    source: Tensor
    target: Tensor
    label: Tensor
    piece: Tensor
    output: Tensor
    frame: Tensor
    ctc: Tensor
    hlg: Tensor

    def __post_init__(self) -> None:
        sizes = (len(self.ids), len(self.lens), len(self.bounds) - 1)
        check(len(set(sizes)) == 1, "Lattices.ids, lens and bounds", "be of as many utterances", sizes)
        last = int(self.bounds[-1])
        check(last == len(self.source), "Lattices.bounds", f"end with {len(self.source)} arcs", last)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def counts(self) -> Tensor:
        """[B] int64, arcs of each lattice."""
        return self.bounds[1:] - self.bounds[:-1]

    def arcs(self) -> dict[str, Tensor]:
        """Return the tensors of arcs by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)[3:]}

    def select(self, rows: Sequence[int]) -> Lattices:
        """Return the lattices of some utterances."""
        index = torch.tensor(list(rows), dtype=torch.int64)
        bounds = bounds_of(self.counts[index])
        shift = (self.bounds[:-1][index] - bounds[:-1]).repeat_interleave(self.counts[index])
        arcs = (torch.arange(int(bounds[-1])) + shift).to(self.source.device)
        chosen = {name: values[arcs] for name, values in self.arcs().items()}
        return Lattices([self.ids[row] for row in rows], self.lens[index], bounds, **chosen)

    def score(self, weights: Mapping[str, float]) -> Tensor:
        """Return the weighted score of every arc, [A] float64; a weight of 0 counts nothing."""
        total = torch.zeros(len(self.source), dtype=torch.float64, device=self.source.device)
        for source in SOURCES:
            if weights.get(source, 0.0) != 0:
                total += weights[source] * getattr(self, source).double()
        return total

    def to(self, device: torch.device) -> Lattices:
        """Return them on a device."""
        moved = {name: values.to(device) for name, values in self.arcs().items()}
        return Lattices(self.ids, self.lens, self.bounds, **moved)


def bounds_of(counts: Tensor) -> Tensor:
    """Return where the arcs of each lattice begin, and where the last end: [B+1] from [B] counts."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def join(batches: Sequence[Lattices]) -> Lattices:
    """Return the lattices of several batches as one."""
    bounds = bounds_of(torch.cat([batch.counts for batch in batches]))
    arcs = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in batches[0].arcs()}
    ids = [name for batch in batches for name in batch.ids]
    return Lattices(ids, torch.cat([batch.lens for batch in batches]), bounds, **arcs)
