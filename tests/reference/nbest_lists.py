"""N-best lists made one hypothesis at a time: the slow twin of search/export.py.
Knows: a beam after its last frame. Must not know: how fast it should be.
"""
from __future__ import annotations

import math
from typing import Optional, Sequence

import torch
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.nbest import Hypothesis, NBest, WordTime
from icefall_fusion.search.beam import Beam, PrefixArena
from icefall_fusion.search.fusion import Fusion
from icefall_fusion.search.search_input import SearchInput
from icefall_fusion.text.tokens import AcousticTokens


def export_nbests(beam: Beam, inputs: SearchInput, frame_map: Optional[Tensor], nbest: int,
                  frame_shift: Optional[float], tokens: Optional[AcousticTokens],
                  fusions: Sequence[Fusion]) -> list[NBest]:
    """Return one N-best list per utterance, best first (ties: by pieces).

    Args:
        beam: after the last frame, its offset complete.
        frame_map: [B, n] real frame of each searched frame, or None when all were searched.
        nbest: hypotheses to return at most.
        frame_shift: seconds per frame, None for no word times.

    Raises:
        ValueError: a score is NaN; the message names utterance and source.
    """
    pieces, births, lengths = trace(beam.arena, beam.node)
    if frame_map is not None and births.numel():
        rows = torch.arange(beam.arena.batch).repeat_interleave(beam.arena.beam).unsqueeze(1)
        births = frame_map.cpu()[rows, births.clamp(min=0)]
    peaks = None
    if frame_shift is not None and tokens is not None:
        peaks = piece_peaks(inputs, pieces, births, lengths, beam.arena.beam).tolist()
    masses = (beam.log_total.double() + beam.offset.unsqueeze(1)).tolist()
    lm_scores = beam.lm.tolist()
    spelled, counts, alive = pieces.tolist(), lengths.tolist(), beam.alive.tolist()
    weights = {"ctc": 1.0, **{f.source: float(f.weight) for f in fusions}}
    if tokens is not None:
        weights["words"] = float(sum(f.word_bonus for f in fusions))
    lists = []
    for b, name in enumerate(inputs.ids):
        entries = []
        for k in range(beam.arena.beam):
            if not alive[b][k]:
                continue
            row = b * beam.arena.beam + k
            ids = spelled[row][: counts[row]]
            scores = {"ctc": masses[b][k], **dict(zip([f.source for f in fusions], lm_scores[b][k]))}
            if tokens is not None:
                scores["words"] = float(len(tokens.word_spans(ids)))
            scores["total"] = _weighted(scores, weights, name)
            entries.append((-scores["total"], ids, scores, row))
        entries.sort(key=lambda entry: entry[:2])
        hypotheses = [_hypothesis(ids, scores, tokens, None if peaks is None else peaks[row], frame_shift)
                      for _, ids, scores, row in entries[:nbest]]
        lists.append(NBest(name, hypotheses, dict(weights)))
    return lists


def _weighted(scores: dict[str, float], weights: dict[str, float], utterance: str) -> float:
    total = 0.0
    for source, weight in weights.items():
        check(not math.isnan(scores[source]), f"score {source!r} of utterance {utterance}", "not be NaN",
              scores[source])
        if weight != 0:
            total += weight * scores[source]
    return total


def _hypothesis(ids: list[int], scores: dict[str, float], tokens: Optional[AcousticTokens],
                peaks: Optional[list[int]], frame_shift: Optional[float]) -> Hypothesis:
    if tokens is None:
        return Hypothesis(ids, "", scores)
    words = tokens.words(ids)
    if peaks is None or frame_shift is None:
        return Hypothesis(ids, " ".join(words), scores)
    return Hypothesis(ids, " ".join(words), scores, word_times(ids, words, peaks, tokens, frame_shift))


def word_times(ids: Sequence[int], words: Sequence[str], peaks: Sequence[int], tokens: AcousticTokens,
               frame_shift: float) -> list[WordTime]:
    """Return the time of each word: from its first piece's frame to one frame past its last piece's.

    A CTC model marks the frame in which it recognizes a piece, not the beginning or end of the sound.

    Args:
        ids: pieces; words: the words they spell; peaks: frame of each piece, rising.
        frame_shift: seconds per frame.
    """
    times = []
    for word, (start, stop) in zip(words, tokens.word_spans(ids)):
        first, last = peaks[start], peaks[stop - 1]
        times.append(WordTime(word, round(first * frame_shift, 6), round((last + 1) * frame_shift, 6)))
    return times


def piece_peaks(inputs: SearchInput, pieces: Tensor, births: Tensor, lengths: Tensor, beam: int) -> Tensor:
    """Return the frame in which each piece of each hypothesis is most probable, from its birth to the next's.

    A prefix can be born frames before its last piece peaks, on a small probability that just made the beam.

    Args:
        pieces, births: [B * K, longest] from PrefixArena.trace, births as real frames; lengths: [B * K].
        beam: K.

    Returns:
        [B * K, longest] int64 on the CPU.
    """
    frames = inputs.log_probs.shape[1]
    if not pieces.numel() or not frames:
        return torch.zeros_like(pieces)
    device = inputs.log_probs.device
    pieces, births, lengths = (x.to(device) for x in (pieces, births, lengths))
    real = torch.arange(pieces.shape[1], device=device) < lengths.unsqueeze(1)
    starts = torch.where(real, births, torch.full_like(births, frames))
    time = torch.arange(frames, device=device).expand(pieces.shape[0], -1).contiguous()
    owner = torch.searchsorted(starts.contiguous(), time, right=True) - 1  # piece that frame t belongs to
    rows = torch.arange(pieces.shape[0], device=device).unsqueeze(1)
    spoken = pieces.gather(1, owner.clamp(min=0)).clamp_(min=0)
    values = inputs.log_probs[torch.div(rows, beam, rounding_mode="floor"), time, spoken]
    inside = (owner >= 0) & inputs.live.repeat_interleave(beam, dim=0)
    values = values.masked_fill(~inside, -torch.inf)
    owner = owner.clamp(min=0)
    best = torch.full(pieces.shape, -torch.inf, dtype=values.dtype, device=device)
    best = best.scatter_reduce(1, owner, values, "amax")
    at_best = torch.where(inside & (values == best.gather(1, owner)), time, torch.full_like(time, frames))
    peaks = torch.full_like(pieces, frames).scatter_reduce(1, owner, at_best, "amin")
    return torch.where(peaks < frames, peaks, births).cpu()


def trace(arena: PrefixArena, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Trace many prefixes back at once.

    Args:
        nodes: [n] int64.

    Returns:
        pieces [n, longest] (first to last, left-aligned, -1 after the end), birth frames [n, longest] and
        lengths [n]; on the CPU.
    """
    nodes = nodes.reshape(-1).cpu()
    parents, all_pieces = (torch.as_tensor(arena.on_host(name)) for name in ("parent", "piece"))
    steps: list[Tensor] = []
    while bool((nodes >= arena.row_size).any()):
        steps.append(nodes)
        nodes = parents[nodes]
    if not steps:
        empty = torch.zeros(nodes.numel(), 0, dtype=torch.int64)
        return empty, empty, torch.zeros(nodes.numel(), dtype=torch.int64)
    path = torch.stack(steps[::-1], dim=1)  # [n, longest], right-aligned: roots stand in front
    real = path >= arena.row_size
    order = real.to(torch.int8).sort(dim=1, descending=True, stable=True).indices
    path, real = path.gather(1, order), real.gather(1, order)
    pieces = torch.where(real, all_pieces[path], torch.full_like(path, -1))
    frames = torch.where(real, path // arena.row_size - 1, torch.full_like(path, -1))
    return pieces, frames, real.sum(1)
