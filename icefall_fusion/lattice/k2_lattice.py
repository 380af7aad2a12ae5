"""From a decoding graph and log-probs to lattices, by k2.
Knows: k2's FSAs, graphs, log-probs. Must not know: language models, tokenizers, files.
"""
from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any, Mapping, MutableMapping, NamedTuple, Sequence

import torch

from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.common.checks import check, check_at_least
from icefall_fusion.common.counters import add_counters
from icefall_fusion.lattice.graph import DecodingGraph
from icefall_fusion.lattice.k2_fsas import load_k2, thin_out, to_dense, to_fsa
from icefall_fusion.lattice.lattices import Lattices, bounds_of

_FIRST_POSTERIOR = 1e-12  # of the arcs that leave a lattice that is too large first
_WIDEN = 4.0  # factor of the search beam where there was no path


@dataclass(frozen=True)
class LatticeOptions:
    """How lattices are made and pruned.

    Args:
        search_beam: pruning of the states in a frame, in nats below the best state.
        output_beam: pruning of the lattice, in nats below the best path.
        min_active_states: number of states that are kept in a frame whatever their score.
        max_active_states: largest number of states in a frame.
        graph_scale: factor of the graph's scores beside CTC's while the lattice is made.
        max_arcs: largest number of arcs of a lattice; a larger one loses its least probable arcs.
        rescore_posterior: arcs with a smaller posterior are removed before a whole lattice is rescored.
        rescore_arcs: largest number of arcs that are rescored together. A larger lattice loses its least
            probable arcs until it fits, for an n-gram makes it a hundred times as large.
        paths: number of random paths for an N-best list.
        path_scale: factor of all scores while paths are drawn; a lower one gives more different paths.
    """

    search_beam: float = 15.0
    output_beam: float = 8.0
    min_active_states: int = 30
    max_active_states: int = 2500
    graph_scale: float = 1.0
    max_arcs: int = 2_000_000
    rescore_posterior: float = 1e-5
    rescore_arcs: int = 20_000
    paths: int = 100
    path_scale: float = 0.5

    def __post_init__(self) -> None:
        name = "LatticeOptions."
        for field in ("search_beam", "output_beam", "path_scale"):
            check(getattr(self, field) > 0, name + field, "be above 0", getattr(self, field))
        check_at_least(0, self, "graph_scale", "min_active_states")
        fewest, most = self.min_active_states, self.max_active_states
        rule = f"be at least {max(1, fewest)} (min_active_states)"
        check(most >= max(1, fewest), name + "max_active_states", rule, most)
        posterior = self.rescore_posterior
        check(0 < posterior < 1, name + "rescore_posterior", "be between 0 and 1", posterior)
        check_at_least(1, self, "max_arcs", "rescore_arcs", "paths")


class K2Lattices(NamedTuple):
    """The lattices of a batch.

    fsas: k2's FsaVec of the lattices that have a path, in the order of the batch; None if there are none.
    plain: all lattices as plain tensors, their arcs in the order of k2's.
    """

    fsas: Any
    plain: Lattices


class LatticeMaker:
    """A decoding graph on a device, ready to make lattices.

    Args:
        graph: H, HL or HLG.
        options: see LatticeOptions.
        device: of the log-probs.

    Raises:
        Unavailable: there is no k2 that works.
    """

    def __init__(self, graph: DecodingGraph, options: LatticeOptions, device: torch.device) -> None:
        check(graph.kind != "G", "the decoding graph", "be H, HL or HLG", graph.kind)
        self.graph, self.options, self.device = graph, options, torch.device(device)
        self._fsa = to_fsa(graph, self.device)
        self._fsa.scores = options.graph_scale * self._fsa.hlg

    def make(self, emissions: Emissions, counters: MutableMapping[str, float]) -> K2Lattices:
        """Return the lattices of a batch.

        An utterance without a path is searched again with a wider beam. A lattice that is too large loses its
        least probable arcs. Both are counted and logged.

        Args:
            emissions: log-probs on the device of the graph.
            counters: to which ``lattice_arcs``, ``lattice_frames``, ``lattices_pruned``,
                ``lattices_widened`` and ``lattices_empty`` of the batch are added.

        Raises:
            ValueError: the log-probs are on another device, or of another number of pieces.
        """
        device, pieces = emissions.log_probs.device, emissions.log_probs.shape[2]
        rule = f"be on the device of the graph ({self.device}): move one of them"
        check(device.type == self.device.type, "log_probs", rule, str(device))
        rule = f"have the {self.graph.pieces} pieces of the graph"
        check(pieces == self.graph.pieces, "log_probs", rule, pieces)
        ids, counts, beam = emissions.ids, Counter(), self.options.search_beam
        todo = [row for row, frames in enumerate(emissions.lens.tolist()) if frames > 0]
        lattices = self._intersect(emissions, todo, beam, counts)
        todo = [row for row in todo if row not in lattices]
        if todo:
            beam *= _WIDEN
            counts["lattices_widened"] += len(todo)
            logging.warning("no path within search_beam %g of %s: searched again with %g",
                            self.options.search_beam, [ids[row] for row in todo[:3]], beam)
            lattices.update(self._intersect(emissions, todo, beam, counts))
            todo = [row for row in todo if row not in lattices]
        if todo:
            counts["lattices_empty"] += len(todo)
            logging.warning(
                "no path through the graph for %s, with search_beam %g and max_active_states %d either: "
                "raise both; an utterance of a few frames may be shorter than any word of the graph",
                [ids[row] for row in todo[:3]], beam, self.options.max_active_states,
            )
        made = _join(lattices, emissions)
        counts.update(lattice_arcs=len(made.plain.source), lattice_frames=int(emissions.lens.sum()))
        add_counters(counters, counts)
        return made

    def _intersect(
        self, emissions: Emissions, rows: Sequence[int], beam: float, counts: Counter[str]
    ) -> dict[int, Any]:
        """Return the lattices of some rows of a batch by row, without those that have no path."""
        if not rows:
            return {}
        k2, options = load_k2(), self.options
        fsas = k2.intersect_dense_pruned(
            self._fsa, to_dense(emissions.log_probs, emissions.lens, rows), search_beam=beam,
            output_beam=options.output_beam, min_active_states=options.min_active_states,
            max_active_states=options.max_active_states, frame_idx_name="frame",
        )
        lattices = {row: fsas[index] for index, row in enumerate(rows)}
        lattices = {row: fsa for row, fsa in lattices.items() if fsa.num_arcs}
        for row, fsa in lattices.items():
            if fsa.num_arcs > options.max_arcs:
                lattices[row] = thin = thin_out(fsa, options.max_arcs, _FIRST_POSTERIOR)
                counts["lattices_pruned"] += 1
                logging.warning("the lattice of %s had %d arcs: pruned to %d (LatticeOptions.max_arcs is %d)",
                                emissions.ids[row], fsa.num_arcs, thin.num_arcs, options.max_arcs)
        return lattices


def _join(lattices: Mapping[int, Any], emissions: Emissions) -> K2Lattices:
    """Return the lattices of a batch from those of its rows; rows without one have no arcs."""
    ids, lens, log_probs = list(emissions.ids), emissions.lens.cpu().long(), emissions.log_probs.float()
    if not lattices:
        nothing = torch.zeros(0, dtype=torch.int64, device=log_probs.device)
        bounds, scores = torch.zeros(len(ids) + 1, dtype=torch.int64), (nothing.float(), nothing.float())
        return K2Lattices(None, Lattices(ids, lens, bounds, *[nothing] * 6, *scores))
    counts = torch.tensor([lattices[row].num_arcs if row in lattices else 0 for row in range(len(ids))])
    fsas = load_k2().create_fsa_vec([lattices[row] for row in sorted(lattices)])
    source, target, label, _ = fsas.arcs.values().long().unbind(1)
    row = torch.arange(len(ids)).repeat_interleave(counts).to(log_probs.device)
    frame, labels = fsas.frame.long(), (label, fsas.piece.long(), fsas.output.long())
    ctc = log_probs[row, frame.clamp(max=log_probs.shape[1] - 1), label.clamp(min=0)]
    scores = (ctc.masked_fill(label < 0, 0.0), fsas.hlg.float())
    return K2Lattices(fsas, Lattices(ids, lens, bounds_of(counts), source, target, *labels, frame, *scores))
