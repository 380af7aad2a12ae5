"""k2: its one importer. Small steps with its FSAs that several files need, its losses of CTC and transducers.
Knows: k2, graphs, log-probs. Must not know: language models, tokenizers, files.

Both k2 1.23.4 and 1.24.4 have all functions that this folder calls.
"""
from __future__ import annotations

from typing import Any, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from icefall_fusion.common.unavailable import Unavailable, asked_once
from icefall_fusion.lattice.graph import DecodingGraph

_LAST_POSTERIOR = 1e-2  # arcs above it are never removed
_NO_BEAM = 1e10
_REMEDY = "bash tools/install_k2.sh prints the line that installs the k2 that fits this torch and Python"


@asked_once
def load_k2() -> Any:
    """Return the module k2.

    Raises:
        Unavailable: it is not installed, or was built for another torch or Python; with the remedy.
    """
    try:
        import k2

        k2.Fsa, k2.intersect_dense_pruned  # noqa: B018 (a folder of this name imports too)
    except (ImportError, OSError, AttributeError, RuntimeError) as error:  # undefined symbols among them
        if isinstance(error, ModuleNotFoundError) and error.name == "k2":
            raise Unavailable(f"k2 is not installed: {_REMEDY}") from error
        reason = f"k2 does not fit torch {torch.__version__} ({error}): uninstall it; then {_REMEDY}"
        raise Unavailable(reason) from error
    return k2


def to_fsa(graph: DecodingGraph, device: torch.device) -> Any:
    """Return a graph as a k2 FsaVec of one, with the attributes ``piece``, ``output`` and ``hlg``."""
    k2 = load_k2()
    columns = [x.to(torch.int32) for x in (graph.source, graph.target, graph.label)]
    arcs = torch.stack([*columns, graph.score.float().contiguous().view(torch.int32)], dim=1)
    fsa = k2.Fsa(arcs.contiguous())
    fsa.piece, fsa.output, fsa.hlg = graph.piece.clone(), graph.output.clone(), graph.score.float().clone()
    return k2.create_fsa_vec([fsa]).to(device)


def to_dense(log_probs: Tensor, lens: Tensor, rows: Sequence[int]) -> Any:
    """Return the log-probs [B,T,V] of some rows as a k2 DenseFsaVec."""
    segments = torch.tensor([[row, 0, int(lens[row])] for row in rows], dtype=torch.int32)
    return load_k2().DenseFsaVec(log_probs.float(), segments)


def numbered(fsas: Any, scores: Tensor) -> Any:
    """Return lattices with other scores [A] and the number of each arc as their only attribute, ``arc``."""
    plain = load_k2().Fsa(fsas.arcs).clone()  # its scores are its own then
    plain.scores = scores.float()
    plain.arc = torch.arange(int(fsas.num_arcs), dtype=torch.int32, device=fsas.device)
    return plain


def arc_bounds(fsas: Any) -> Tensor:
    """Return where the arcs of each FSA of a vector begin, and where the last end: [n+1] int64."""
    shape = fsas.arcs.shape()
    return shape.row_splits(2)[shape.row_splits(1).long()].long()


def thin_out(fsa: Any, most: int, first: float) -> Any:
    """Return a lattice without its least probable arcs.

    Args:
        fsa: one lattice.
        most: arcs to keep at most; more stay if all of them have a posterior above 0.01.
        first: arcs with a smaller posterior are removed; the limit is raised tenfold until the rest fits.
    """
    k2 = load_k2()
    fsas, least = k2.create_fsa_vec([fsa]), first
    while fsas.num_arcs > most and least <= _LAST_POSTERIOR:
        fsas, least = k2.prune_on_arc_post(fsas, least, True), 10 * least
    return fsas[0]


def ctc_loss_rows(log_probs: Tensor, lens: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
    """Return the CTC loss of each utterance [B] by k2, differentiable; torch's wherever there is a path.

    Args:
        log_probs: [B,T,V], blank 0; lens: [B], each at least 1.
        targets: pieces of each utterance.
    """
    k2 = load_k2()
    order = sorted(range(len(targets)), key=lambda row: -int(lens[row]))  # the longest first, as k2 wants it
    graphs = k2.ctc_graph([list(targets[row]) for row in order], device=log_probs.device)
    lattice = k2.intersect_dense(graphs, to_dense(log_probs, lens, order), output_beam=_NO_BEAM)
    totals = lattice.get_tot_scores(log_semiring=True, use_double_scores=True)
    back = torch.argsort(torch.tensor(order)).to(totals.device)
    return -totals[back].float()


def rnnt_loss_rows(cells: Tensor, lens: Tensor, sizes: Tensor) -> Tensor:
    """Return the transducer loss of each utterance [B] by k2's recursion over its cells, differentiable.

    Args:
        cells: [B,T,U+1,2] log-probs of the blank and of the next token.
        lens: [B] frames, each at least 1; sizes: [B] tokens.
    """
    k2 = load_k2()
    frames, tokens = cells.shape[1], cells.shape[2] - 1
    beyond = torch.arange(frames + 1, device=cells.device) >= lens[:, None]  # a token needs a frame
    blanks = cells[..., 0].transpose(1, 2)  # [B,U+1,T]
    if tokens == 0:
        return -blanks[:, 0].masked_fill(beyond[:, :-1], 0.0).sum(1)
    labels = F.pad(cells[:, :, :-1, 1].transpose(1, 2), (0, 1)).masked_fill(beyond[:, None], -torch.inf)
    bounds = torch.zeros(len(cells), 4, dtype=torch.long, device=cells.device)
    bounds[:, 2], bounds[:, 3] = sizes, lens
    return -k2.mutual_information_recursion(labels.contiguous(), blanks.contiguous(), bounds)
