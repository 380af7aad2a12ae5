"""Paths of lattices to N-best lists: words, pieces, times, a score by source; the best path of a lattice.
Knows: plain lattices, vocabularies, NBest. Must not know: k2, language models, how paths were found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Mapping, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from icefall_fusion.lattice.value import Lattices
from icefall_fusion.nbest import Hypothesis, NBest, WordTime
from icefall_fusion.search.export import word_times

if TYPE_CHECKING:
    from icefall_fusion.lattice.beam import Final
    from icefall_fusion.search.fusion import Fusion
    from icefall_fusion.text.tokens import AcousticTokens

_NEVER = float("-inf")


def export_paths(
    final: Final,
    labels: Any,
    graph_weight: float,
    fusions: Sequence[Fusion],
    tokens: Optional[AcousticTokens],
    frame_shift: Optional[float],
) -> list[NBest]:
    """Return one N-best list per utterance, best first (ties: by words).

    Args:
        final: of a beam search along lattices.
        labels: vocabulary of what arcs say.
        graph_weight: factor of the graph's scores.
        tokens: the acoustic pieces; frame_shift: seconds a frame; none of either: no word times.
    """
    weights = {"ctc": 1.0, "hlg": float(graph_weight), **{f.source: float(f.weight) for f in fusions}}
    weights["words"] = float(sum(f.word_bonus for f in fusions))
    paths = _trace(final)
    masses, graphs, scores = final.mass.tolist(), final.hlg.tolist(), final.beam.lm.tolist()
    said, _, counts = final.beam.arena.trace(final.beam.node)
    said, counts = said.tolist(), counts.tolist()
    lists = []
    for row, name in enumerate(final.lattices.ids):
        found = []
        for slot, mass in enumerate(masses[row]):
            if mass == _NEVER:
                continue
            flat = row * len(masses[row]) + slot
            words = labels.words(said[flat][: counts[flat]])
            raw = {
                "ctc": mass - graph_weight * graphs[row][slot] if graph_weight else mass,
                "hlg": graphs[row][slot],
                **dict(zip([f.source for f in fusions], scores[row][slot])),
            }
            raw["words"] = float(len(words))
            raw["total"] = sum(weight * raw[source] for source, weight in weights.items() if weight)
            found.append(make_hypothesis(final.lattices, paths[flat], words, raw, tokens, frame_shift))
        found.sort(key=lambda h: (-h.total, h.text))
        lists.append(NBest(name, found[: final.nbest], dict(weights)))
    return lists


def _trace(final: Final) -> list[np.ndarray]:
    """Return the arcs of the best path of every slot of the beam, first to last, [B*K] arrays."""
    batch, size = final.mass.shape
    if not final.steps:
        return [np.zeros(0, np.int64)] * (batch * size)
    slot = torch.arange(size, device=final.mass.device).expand(batch, size)
    found: list[Tensor] = []
    for before, arcs in reversed(final.steps):
        found.append(arcs.gather(1, slot))
        slot = before.gather(1, slot)
    table = torch.stack(found[::-1], dim=2).view(batch * size, -1).cpu().numpy()
    return [row[row >= 0] for row in table]


def make_hypothesis(
    lattices: Lattices,
    path: np.ndarray,
    words: Sequence[str],
    scores: Mapping[str, float],
    tokens: Optional[AcousticTokens],
    frame_shift: Optional[float],
) -> Hypothesis:
    """Return the hypothesis of one path: its pieces, words, and when they were heard.

    Args:
        lattices: of the batch.
        path: arcs, as indices into all arcs.
        words: that it says.
        scores: by source, with the total.
        tokens, frame_shift: for word times, which are the frames in which pieces begin.
    """
    arcs = torch.from_numpy(np.ascontiguousarray(path)).to(lattices.piece.device)
    pieces, frames = lattices.piece[arcs].tolist(), lattices.frame[arcs].tolist()
    begun = [(piece, frame) for piece, frame in zip(pieces, frames) if piece > 0]
    ids, births = [piece for piece, _ in begun], [frame for _, frame in begun]
    times: list[WordTime] = []
    if tokens is not None and frame_shift is not None and tokens.words(ids) == list(words):
        times = word_times(ids, words, births, tokens, frame_shift)
    return Hypothesis(ids, " ".join(words), dict(scores), times)


def best_paths(
    lattices: Lattices,
    weights: Mapping[str, float],
    word_bonus: float = 0.0,
    sizes: Optional[Sequence[int]] = None,
) -> list[Tensor]:
    """Return the best path of each lattice (Viterbi): indices of arcs, first to last; none where it is empty.

    Args:
        lattices: of a batch.
        weights: of ``ctc`` and ``hlg``.
        word_bonus: for each word, in nats.
        sizes: words of each saying; none: one each.
    """
    score = lattices.score(weights)
    if word_bonus:
        said = torch.tensor([0, 1] if sizes is None else list(sizes), device=score.device)
        score = score + word_bonus * said[lattices.saying.clamp(max=len(said) - 1)]
    found = []
    for begin, end in zip(lattices.bounds.tolist(), lattices.bounds[1:].tolist()):
        if begin == end:
            found.append(torch.zeros(0, dtype=torch.int64))
            continue
        found.append(
            begin
            + _viterbi(
                lattices.source[begin:end].cpu(),
                lattices.target[begin:end].cpu(),
                lattices.frame[begin:end].cpu(),
                score[begin:end].cpu(),
            )
        )
    return found


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
