"""N-best lists of lattices: from a beam, from paths, from the one best path.
Knows: plain lattices, output labels, NBest. Must not know: k2, language models, how lattices were searched.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Mapping, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.lattice.ctc_forward import ctc_scores
from icefall_fusion.lattice.graph import Labels, WordTokens
from icefall_fusion.lattice.lattices import Lattices
from icefall_fusion.nbest import Hypothesis, NBest, WordTime
from icefall_fusion.search.export import word_times
from icefall_fusion.text.tokens import AcousticTokens

if TYPE_CHECKING:
    from icefall_fusion.lattice.beam import SearchedBeam
    from icefall_fusion.lattice.paths import Paths
    from icefall_fusion.lattice.word_ngram import WordNgram
    from icefall_fusion.search.fusion import Fusion

_NEVER = float("-inf")


def beam_lists(
    searched: SearchedBeam, labels: Labels, graph_weight: float, fusions: Sequence[Fusion],
    tokens: Optional[AcousticTokens], frame_shift: Optional[float],
) -> list[NBest]:
    """Return the hypotheses of a beam as one N-best list per utterance, best first (ties: by words).

    Args:
        searched: the beam after the last frame.
        labels: vocabulary of the output labels.
        graph_weight: factor of the graph's scores.
        fusions: that took part.
        tokens: the acoustic pieces; frame_shift: seconds a frame; none of either: no word times.
    """
    weights = {"ctc": 1.0, "hlg": float(graph_weight), **{f.source: float(f.weight) for f in fusions}}
    weights["words"] = float(sum(f.word_bonus for f in fusions))
    paths = _trace(searched)
    masses, graphs, scores = searched.mass.tolist(), searched.hlg.tolist(), searched.beam.lm.tolist()
    arena = searched.beam.arena
    path, counts = arena.trace(searched.beam.node.reshape(-1).cpu().numpy())
    outputs = arena.on_host("piece")[path].tolist()
    lists = []
    for row, name in enumerate(searched.lattices.ids):
        hypotheses = []
        for slot, mass in enumerate(masses[row]):
            if mass == _NEVER:
                continue
            flat = row * len(masses[row]) + slot
            words = labels.words(outputs[flat][: counts[flat]])
            raw = {
                "ctc": mass - graph_weight * graphs[row][slot] if graph_weight else mass,
                "hlg": graphs[row][slot],
                **dict(zip([f.source for f in fusions], scores[row][slot])),
                "words": float(len(words)),
            }
            raw["total"] = sum(weight * raw[source] for source, weight in weights.items() if weight)
            hypotheses.append(_hypothesis(searched.lattices, paths[flat], words, raw, tokens, frame_shift))
        hypotheses.sort(key=lambda h: (-h.total, h.text))
        lists.append(NBest(name, hypotheses[: searched.nbest], dict(weights)))
    return lists


def path_lists(
    paths: Paths, lattices: Lattices, emissions: Emissions, labels: Labels, weights: Mapping[str, float],
    topology: str, ngram: Optional[WordNgram],
) -> list[NBest]:
    """Return the paths of each lattice as a list, one hypothesis for each sequence of output labels.

    Of equal sequences the path with the best graph score counts. ``ctc`` is summed over all alignments.

    Args:
        paths: of the lattices that have arcs.
        lattices: of ``emissions``.
        labels: vocabulary of the output labels.
        weights: of ``ctc`` and ``hlg``.
        topology: of the graph.
        ngram: gives the score ``ngram``; None: there is no such score.
    """
    output, piece = lattices.output.cpu().numpy(), lattices.piece.cpu().numpy()
    hlg = lattices.hlg.cpu().double().numpy()
    rows = lattices.counts.nonzero().squeeze(1).tolist()
    best: list[dict[tuple[int, ...], tuple[float, np.ndarray]]] = [{} for _ in lattices.ids]
    for number, owner in enumerate(paths.owner.tolist()):
        arcs, known = paths.path(number), best[rows[owner]]
        key, score = tuple(label for label in output[arcs].tolist() if label), float(hlg[arcs].sum())
        if key not in known or known[key][0] < score:
            known[key] = (score, arcs)
    pieces = [[[p for p in piece[arcs].tolist() if p] for _, arcs in known.values()] for known in best]
    ctc = ctc_scores(emissions.log_probs, emissions.lens, pieces, 0, topology)
    ngram_scores = iter(())
    if ngram is not None:
        ngram_scores = iter(ngram.score_outputs([key for known in best for key in known]))
    lists = []
    for row, known in enumerate(best):
        hypotheses = []
        for (key, (score, arcs)), acoustic in zip(known.items(), ctc[row]):
            words = labels.words(key)
            scores = {"ctc": acoustic, "hlg": score}
            scores.update({} if ngram is None else {"ngram": float(next(ngram_scores))})
            scores.update(words=float(len(words)), total=0.0)
            hypotheses.append(_hypothesis(lattices, arcs, words, scores, emissions.tokens,
                                          emissions.frame_shift))
        nbest = NBest(lattices.ids[row], hypotheses) if hypotheses else no_words(emissions, row)
        lists.append(nbest.reweight(weights))
    return lists


def best_lists(
    lattices: Lattices, emissions: Emissions, labels: Labels, weights: Mapping[str, float]
) -> list[NBest]:
    """Return the best path of each lattice as a list of one (``ctc`` is of that alignment alone).

    Args:
        lattices: of ``emissions``.
        labels: vocabulary of the output labels.
        weights: of ``ctc``, ``hlg`` and ``words``.
    """
    score = lattices.score(weights)
    if weights.get("words") and isinstance(labels, WordTokens):  # pieces are no words
        words_of = torch.tensor([len(output) for output in labels.outputs], device=score.device)
        score += weights["words"] * words_of[lattices.output]
    lists = []
    for row, path in enumerate(best_paths(lattices, score)):
        nbest = no_words(emissions, row)
        if len(path):
            arcs = path.to(lattices.source.device)
            words = labels.words([label for label in lattices.output[arcs].tolist() if label])
            scores = {name: float(getattr(lattices, name)[arcs].double().sum()) for name in ("ctc", "hlg")}
            scores.update(words=float(len(words)), total=0.0)
            made = _hypothesis(lattices, path.numpy(), words, scores, emissions.tokens, emissions.frame_shift)
            nbest = NBest(lattices.ids[row], [made])
        lists.append(nbest.reweight(weights))
    return lists


def no_words(emissions: Emissions, row: int) -> NBest:
    """Return the list of an utterance without a lattice: no words, the score of blanks alone."""
    blanks = emissions.log_probs[row, : int(emissions.lens[row]), emissions.tokens.blank_id]
    ctc = float(blanks.double().sum())
    scores = {"ctc": ctc, "hlg": 0.0, "ngram": 0.0, "words": 0.0, "total": ctc}
    return NBest(emissions.ids[row], [Hypothesis([], "", scores)])


def best_paths(lattices: Lattices, score: Tensor) -> list[Tensor]:
    """Return the best path of each lattice (Viterbi): its arcs, first to last; none where it is empty.

    Args:
        lattices: of a batch.
        score: [A] of each arc.
    """
    paths = []
    for begin, end in zip(lattices.bounds.tolist(), lattices.bounds[1:].tolist()):
        arcs = (x[begin:end].cpu() for x in (lattices.source, lattices.target, lattices.frame, score))
        paths.append(begin + _viterbi(*arcs) if begin < end else torch.zeros(0, dtype=torch.int64))
    return paths


def _viterbi(source: Tensor, target: Tensor, frame: Tensor, score: Tensor) -> Tensor:
    states, count = int(target.max()) + 1, len(source)
    best = torch.full((states,), _NEVER, dtype=torch.float64)
    best[0] = 0.0
    entering = torch.full((states,), count)
    order = frame.sort(stable=True).indices
    for arcs in order.split(torch.bincount(frame).tolist()):
        if not len(arcs):
            continue
        value, to = best[source[arcs]] + score[arcs], target[arcs]
        best.scatter_reduce_(0, to, value, "amax")
        won = torch.where(value == best[to], arcs, count)
        entering.scatter_reduce_(0, to, won, "amin")
    path, state = [], states - 1
    while state != 0:
        path.append(int(entering[state]))
        state = int(source[path[-1]])
    return torch.tensor(path[::-1], dtype=torch.int64)


def _trace(searched: SearchedBeam) -> list[np.ndarray]:
    """Return the arcs of the best path of every slot of the beam, first to last, [B*K] arrays."""
    batch, size = searched.mass.shape
    if not searched.steps:
        return [np.zeros(0, np.int64)] * (batch * size)
    slot = torch.arange(size, device=searched.mass.device).expand(batch, size)
    backwards: list[Tensor] = []
    for before, arcs in reversed(searched.steps):
        backwards.append(arcs.gather(1, slot))
        slot = before.gather(1, slot)
    table = torch.stack(backwards[::-1], dim=2).view(batch * size, -1).cpu().numpy()
    return [row[row >= 0] for row in table]


def _hypothesis(
    lattices: Lattices, path: np.ndarray, words: Sequence[str], scores: dict[str, float],
    tokens: Optional[AcousticTokens], frame_shift: Optional[float],
) -> Hypothesis:
    """Return the hypothesis of one path: its pieces, words, and their times.

    Args:
        lattices: of the batch.
        path: arcs, as indices into all arcs.
        words: of its output labels.
        scores: by source, with the total.
        tokens, frame_shift: for word times, which are the frames in which pieces begin.
    """
    arcs = torch.from_numpy(np.ascontiguousarray(path)).to(lattices.piece.device)
    pieces, frames = lattices.piece[arcs].tolist(), lattices.frame[arcs].tolist()
    begun = [(piece, frame) for piece, frame in zip(pieces, frames) if piece > 0]
    ids, births = [piece for piece, _ in begun], [frame for _, frame in begun]
    times: list[WordTime] = []
    if tokens is not None and frame_shift is not None and tokens.words(ids) == list(words):
        times = word_times(words, tokens.word_spans(ids), births, frame_shift)
    return Hypothesis(ids, " ".join(words), scores, times)
