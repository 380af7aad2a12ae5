"""Greedy CTC search: the best path of a batch, with word times.
Knows: log-probs, vocabularies. Must not know: beams, language models.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Optional, Sequence

import torch
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.nbest import Hypothesis, NBest
from icefall_fusion.search.ctc_prefix import word_times
from icefall_fusion.search.search_input import check_input

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
    check(frame_shift > 0, "frame_shift", "be above 0 seconds", frame_shift)
    blank = blank_id if blank_id is not None else tokens.blank_id if tokens is not None else 0
    given = check_input(log_probs, lens, blank, tokens, ids)
    totals = given.best.double().sum(1).tolist()
    path = given.log_probs.argmax(-1) if given.log_probs.numel() else given.live.long()
    paths, best, lengths = path.tolist(), given.best.tolist(), given.lens.tolist()
    lists = []
    for b, name in enumerate(given.ids):
        pieces, peaks = _collapse(paths[b][: lengths[b]], best[b], blank)
        scores = {"ctc": totals[b], "total": totals[b]}
        weights = {"ctc": 1.0}
        text, times = "", []
        if tokens is not None:
            words = tokens.words(pieces)
            scores["words"], weights["words"] = float(len(words)), 0.0
            text, times = " ".join(words), word_times(pieces, words, peaks, tokens, frame_shift)
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
