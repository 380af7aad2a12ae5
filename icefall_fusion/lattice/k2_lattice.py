"""k2: its one importer. Graphs and log-probs to lattices, CTC losses; plain tensors go out.
Knows: k2, graphs, log-probs. Must not know: language models, tokenizers, files.

Both k2 1.23.4 and 1.24.4 have all that is used here.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any, Sequence

import torch
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.lattice.graph import DecodingGraph
from icefall_fusion.lattice.value import Lattices

_FIRST_POSTERIOR, _LAST_POSTERIOR = 1e-12, 1e-2  # of arcs of lattices that are too large
_NO_BEAM = 1e10
_WIDEN = 4.0  # factor of the search beam where nothing was found
_REMEDY = "bash tools/install_k2.sh prints the line that installs the k2 that fits this torch and Python"


@functools.lru_cache(maxsize=1)
def load_k2() -> Any:
    """Return the module k2.

    Raises:
        ModuleNotFoundError: it is not installed, or was built for another torch or Python; with the remedy.
    """
    try:
        import k2

        k2.Fsa, k2.intersect_dense_pruned  # noqa: B018 (a folder of this name imports too)
    except ModuleNotFoundError as error:
        if error.name != "k2":
            raise ModuleNotFoundError(_mismatch(error), name="k2") from error
        raise ModuleNotFoundError(f"k2 is not installed: {_REMEDY}", name="k2") from error
    except (ImportError, OSError, AttributeError, RuntimeError) as error:  # undefined symbols among them
        raise ModuleNotFoundError(_mismatch(error), name="k2") from error
    return k2


def _mismatch(error: BaseException) -> str:
    return f"k2 does not fit torch {torch.__version__} (it says: {error}): uninstall it; then {_REMEDY}"


def why_no_k2() -> str:
    """Return why k2 cannot be imported, or an empty text if it can."""
    try:
        load_k2()
    except ModuleNotFoundError as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class LatticeOptions:
    """How lattices are made and pruned.

    Args:
        search_beam: nats below the best that a state may be in a frame.
        output_beam: nats below the best path that a lattice keeps.
        min_active_states: states that stay in a frame whatever their score.
        max_active_states: states in a frame at most.
        graph_scale: factor of the graph's own scores beside CTC's while the lattice is made.
        max_arcs: of an utterance's lattice; larger ones lose their least probable arcs until they fit.
        rescore_posterior: before a whole lattice is rescored, arcs that are less probable than this leave it.
        rescore_arcs: of lattices that are rescored together, then; a larger lattice loses its least probable
            arcs until it fits (an n-gram makes it a hundred times as large).
        paths: random paths drawn for an N-best list.
        path_scale: factor of all scores while paths are drawn: lower ones differ more.
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
        check(self.graph_scale >= 0, name + "graph_scale", "be at least 0", self.graph_scale)
        check(
            self.min_active_states >= 0, name + "min_active_states", "be at least 0", self.min_active_states
        )
        least = max(1, self.min_active_states)
        rule = f"be at least {least} (min_active_states)"
        check(self.max_active_states >= least, name + "max_active_states", rule, self.max_active_states)
        posterior = self.rescore_posterior
        check(0 < posterior < 1, name + "rescore_posterior", "be between 0 and 1", posterior)
        for field in ("max_arcs", "rescore_arcs", "paths"):
            check(getattr(self, field) >= 1, name + field, "be at least 1", getattr(self, field))


class LatticeMaker:
    """A decoding graph on a device, ready to make lattices.

    Args:
        graph: H, HL or HLG.
        options: see LatticeOptions.
        device: of the log-probs.

    Raises:
        ModuleNotFoundError: there is no k2 that works.
    """

    def __init__(self, graph: DecodingGraph, options: LatticeOptions, device: torch.device) -> None:
        check(graph.kind != "G", "the decoding graph", "be H, HL or HLG", graph.kind)
        self.graph, self.options, self.device = graph, options, torch.device(device)
        self.fsa = to_fsa(graph, self.device)
        self.fsa.scores = options.graph_scale * self.fsa.hlg
        self.counters = {"lattices_pruned": 0, "lattices_widened": 0, "lattices_empty": 0}

    def make(self, log_probs: Tensor, lens: Tensor, ids: Sequence[str]) -> tuple[Any, list[int]]:
        """Return lattices as a k2 FsaVec, and of which rows they are (none of an utterance without one).

        What finds nothing is searched again with a wider beam; what is too large loses its least probable
        arcs; both are counted in ``counters`` and said.

        Args:
            log_probs: [B,T,V] natural-log, on the device of the graph.
            lens: [B] frames.
            ids: names, for messages.

        Raises:
            ValueError: the log-probs are on another device, or of another number of pieces.
        """
        check(
            log_probs.device.type == self.device.type,
            "log_probs",
            f"be on the device of the graph ({self.device}): move one of them",
            str(log_probs.device),
        )
        check(
            log_probs.shape[2] == self.graph.pieces,
            "log_probs",
            f"have the {self.graph.pieces} pieces of the graph",
            log_probs.shape[2],
        )
        k2, options = load_k2(), self.options
        rows = [row for row, frames in enumerate(lens.tolist()) if frames > 0]
        parts: dict[int, Any] = {}
        beam = options.search_beam
        todo = rows
        for attempt in range(2):
            if not todo:
                break
            fsas = self._intersect(log_probs, lens, todo, beam)
            arcs = arcs_of_each(fsas)
            for place, row in enumerate(todo):
                if arcs[place]:
                    parts[row] = self._fit(fsas[place], arcs[place], ids[row])
            todo = [row for row in todo if row not in parts]
            if todo and attempt == 0:
                beam *= _WIDEN
                self.counters["lattices_widened"] += len(todo)
                logging.warning("no path within search_beam %g of %s: searched again with %g",
                                options.search_beam, [ids[row] for row in todo[:3]], beam)  # fmt: skip
        if todo:
            self.counters["lattices_empty"] += len(todo)
            logging.warning(
                "no path through the graph for %s, with search_beam %g and max_active_states %d either: "
                "raise both; an utterance of a few frames may be shorter than any word of the graph",
                [ids[row] for row in todo[:3]], beam, options.max_active_states,
            )  # fmt: skip
        found = sorted(parts)
        return (k2.create_fsa_vec([parts[row] for row in found]) if found else None), found

    def _intersect(self, log_probs: Tensor, lens: Tensor, rows: Sequence[int], beam: float) -> Any:
        k2, options = load_k2(), self.options
        return k2.intersect_dense_pruned(
            self.fsa, _dense(log_probs, lens, rows), search_beam=beam, output_beam=options.output_beam,
            min_active_states=options.min_active_states, max_active_states=options.max_active_states,
            frame_idx_name="frame",
        )  # fmt: skip

    def _fit(self, fsa: Any, arcs: int, name: str) -> Any:
        """Return a lattice without its least probable arcs, if it is too large."""
        if arcs <= self.options.max_arcs:
            return fsa
        thin, left = thin_out(fsa, self.options.max_arcs, _FIRST_POSTERIOR)
        self.counters["lattices_pruned"] += 1
        logging.warning("the lattice of %s had %d arcs: pruned to %d (LatticeOptions.max_arcs is %d)",
                        name, arcs, left, self.options.max_arcs)  # fmt: skip
        return thin


def thin_out(fsa: Any, most: int, first: float) -> tuple[Any, int]:
    """Return a lattice without its least probable arcs, and how many are left.

    Args:
        fsa: one lattice.
        most: arcs wanted at most; more stay where all are more probable than 0.01.
        first: arcs below this posterior leave first; it is raised tenfold until the rest fits.
    """
    k2, arcs = load_k2(), int(fsa.num_arcs)
    fsas, least = k2.create_fsa_vec([fsa]), first
    while arcs > most and least <= _LAST_POSTERIOR:
        fsas, least = k2.prune_on_arc_post(fsas, least, True), 10 * least
        arcs = int(fsas.num_arcs)
    return fsas[0], arcs


def _dense(log_probs: Tensor, lens: Tensor, rows: Sequence[int]) -> Any:
    segments = torch.tensor([[row, 0, int(lens[row])] for row in rows], dtype=torch.int32)
    return load_k2().DenseFsaVec(log_probs.float(), segments)


def to_fsa(graph: DecodingGraph, device: torch.device) -> Any:
    """Return a graph as a k2 FsaVec of one, with the attributes ``piece``, ``saying`` and ``hlg``."""
    k2 = load_k2()
    columns = [x.to(torch.int32) for x in (graph.source, graph.target, graph.label)]
    arcs = torch.stack([*columns, graph.score.float().contiguous().view(torch.int32)], dim=1)
    fsa = k2.Fsa(arcs.contiguous())
    fsa.piece, fsa.saying, fsa.hlg = graph.piece.clone(), graph.saying.clone(), graph.score.float().clone()
    return k2.create_fsa_vec([fsa]).to(device)


def arcs_of_each(fsas: Any) -> list[int]:
    """Return the number of arcs of each FSA of a vector."""
    bounds = _arc_bounds(fsas)
    return (bounds[1:] - bounds[:-1]).tolist()


def _arc_bounds(fsas: Any) -> Tensor:
    shape = fsas.arcs.shape()
    return shape.row_splits(2)[shape.row_splits(1).long()].long()


def to_plain(fsas: Any, rows: Sequence[int], log_probs: Tensor, lens: Tensor, ids: Sequence[str]) -> Lattices:
    """Return the lattices that `LatticeMaker.make` found as plain tensors; of other rows they have no arcs.

    Args:
        fsas: k2's; ``rows`` says of which row each is.
        log_probs: [B,T,V]; lens: [B]; ids: B names.
    """
    batch, device = len(ids), log_probs.device
    bounds = torch.zeros(batch + 1, dtype=torch.int64)
    if fsas is None:
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return Lattices(
            list(ids), lens.cpu().long(), bounds, *[nothing] * 6, nothing.float(), nothing.float()
        )
    counts = torch.zeros(batch, dtype=torch.int64)
    counts[torch.tensor(list(rows))] = torch.tensor(arcs_of_each(fsas))
    bounds[1:] = counts.cumsum(0)
    values = fsas.arcs.values().long()
    source, target, label, frame = values[:, 0], values[:, 1], values[:, 2], fsas.frame.long()
    row = torch.arange(batch).repeat_interleave(counts).to(device)
    heard = log_probs.float()[row, frame.clamp(max=max(0, log_probs.shape[1] - 1)), label.clamp(min=0)]
    ctc = heard.masked_fill(label < 0, 0.0)
    said = (fsas.piece.long(), fsas.saying.long())
    return Lattices(
        list(ids), lens.cpu().long(), bounds, source, target, label, *said, frame, ctc, fsas.hlg.float()
    )


# --- CTC ----------------------------------------------------------------------------------------------


def ctc_loss_rows(log_probs: Tensor, lens: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
    """Return the CTC loss of each utterance [B] by k2, differentiable; torch's wherever there is a path.

    Args:
        log_probs: [B,T,V], blank 0; lens: [B], each at least 1.
        targets: pieces of each utterance.
    """
    k2 = load_k2()
    order = sorted(range(len(targets)), key=lambda row: -int(lens[row]))  # the longest first, as k2 wants it
    graphs = k2.ctc_graph([list(targets[row]) for row in order], device=log_probs.device)
    lattice = k2.intersect_dense(graphs, _dense(log_probs, lens, order), output_beam=_NO_BEAM)
    totals = lattice.get_tot_scores(log_semiring=True, use_double_scores=True)
    back = torch.argsort(torch.tensor(order)).to(totals.device)
    return -totals[back].float()
