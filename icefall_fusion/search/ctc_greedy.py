"""Greedy CTC search: the best path of a batch, with word times.
Knows: log-probs, vocabularies. Must not know: beams, language models.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Optional, Sequence

import torch
from torch import Tensor

from icefall_fusion.nbest import Hypothesis, NBest
from icefall_fusion.search.export import word_times
from icefall_fusion.search.search_input import check_frame_shift, check_input

if TYPE_CHECKING:
    from icefall_fusion.text.tokens import AcousticTokens


@torch.no_grad()
def ctc_greedy_search(
    log_probs: Tensor,
    lens: Tensor,
    tokens: Optional[AcousticTokens] = None,
    ids: Optional[Sequence[str]] = None,
    frame_shift: float = 0.04,
    blank_id: Optional[int] = None,
) -> list[NBest]:
    """Return the pieces of the single most probable alignment of each utterance (one hypothesis each).

    Args:
        log_probs: [B, T, V] natural-log probabilities, any float type; -inf is allowed.
        lens: [B] frames of each utterance, 0..T.
        tokens: the vocabulary; none: hypotheses have no text and no word times.
        ids: utterance names; none: "0", "1", ...
        frame_shift: seconds per frame, for word times (a piece's frame is where its run is most probable).
        blank_id: id of blank; none: that of ``tokens``, or 0.

    Returns:
        One NBest per utterance; score "ctc" is the log-probability of the best path, not of the pieces.

    Raises:
        ValueError: as ctc_prefix_search.
    """
    check_frame_shift(frame_shift, "frame_shift")
    inputs = check_input(log_probs, lens, blank_id, tokens, ids)
    totals = inputs.best.double().sum(1).tolist()
    path = inputs.log_probs.argmax(-1) if inputs.log_probs.numel() else inputs.live.long()
    paths, best, lengths = path.tolist(), inputs.best.tolist(), inputs.lens.tolist()
    lists = []
    for b, name in enumerate(inputs.ids):
        pieces, peaks = _collapse(paths[b][: lengths[b]], best[b], inputs.blank)
        scores = {"ctc": totals[b], "total": totals[b]}
        weights = {"ctc": 1.0}
        text, times = "", []
        if tokens is not None:
            spans = tokens.word_spans(pieces)
            words = tokens.words(pieces, spans)
            scores["words"], weights["words"] = float(len(words)), 0.0
            text, times = " ".join(words), word_times(words, spans, peaks, frame_shift)
        lists.append(NBest(name, [Hypothesis(pieces, text, scores, times)], weights))
    return lists


def _collapse(path: Sequence[int], best: Sequence[float], blank: int) -> tuple[list[int], list[int]]:
    """Return the pieces of a path and the most probable frame of each one's run."""
    pieces: list[int] = []
    peaks: list[int] = []
    before = blank
    for frame, piece in enumerate(path):
        if piece != blank and piece != before:
            pieces.append(piece)
            peaks.append(frame)
        elif piece != blank and best[frame] > best[peaks[-1]]:
            peaks[-1] = frame
        before = piece
    return pieces, peaks
