"""The extensions of a frame that can enter the beam, chosen for many frames at once.
Knows: log-probs, the bound that keeps the choice exact. Must not know: prefixes, language models.

Why so few candidates suffice. Let the K slots be sorted by score and the pieces of a frame by log-prob, both
descending. Extension (i, j) of slot i by piece j scores ``slot_i + piece_j``, so every (i', j') with i' <= i
and j' <= j scores at least as much: (i + 1)(j + 1) - 1 rivals, each a distinct prefix. Two kinds of rival may
score less than that sum: a repeat (piece j' is the last piece of slot i'; only the blank-ended mass extends),
one per row i', so at most i + 1 of them; and, only where language models add to the ranking, a rival that is
already a prefix in the beam and keeps the LM score it has there. At most K - 1 slots have their parent in the
beam, so at most K - 1 of these. (Without language models such a slot scores at least the extension's mass,
since the masses add.) Hence (i, j) can be among the best K only if (i + 1)(j + 1) - 1 - (i + 1) - slack < K,
that is ``(i + 1) * j <= K + slack`` with slack 0 or K - 1. That leaves about K (1 + ln K) pairs instead of K
V, and nothing is lost: the additions are monotone in floating point too.
"""
from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """A set of P (slot, column) pairs to try; positions count the K stays in front. All int64.

    slot: [P] slot rank; column: [P] column of the frame's candidate pieces.
    source: [K + P] slot that position p comes from; piece_column: [K + P] (0 for a stay).
    position: [(K + 1) * (C + 1)] position of pair (i, j) at ``(i + 1) * (C + 1) + j``; K + P if not in the
    set. columns: C.
    """

    slot: Tensor
    column: Tensor
    source: Tensor
    piece_column: Tensor
    position: Tensor
    columns: int


def make_pairs(beam: int, columns: int, slack: Optional[int], device: torch.device) -> Pairs:
    """Return the pairs that can survive, or all K x C of them if ``slack`` is None (see above)."""
    slots, cols = torch.meshgrid(torch.arange(beam), torch.arange(columns), indexing="ij")
    kept = torch.ones_like(slots, dtype=torch.bool) if slack is None else (slots + 1) * cols <= beam + slack
    slot, column = slots[kept], cols[kept]
    count = slot.numel()
    position = torch.full((beam + 1, columns + 1), beam + count)
    position[slot + 1, column] = torch.arange(count) + beam
    stays = torch.arange(beam)
    source, piece_column = torch.cat([stays, slot]), torch.cat([torch.zeros_like(stays), column])
    fields = (slot, column, source, piece_column, position.view(-1))
    return Pairs(*(field.to(device) for field in fields), columns=columns)


def best_pieces(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` largest values of the last axis and their ids, sorted; the same as topk, faster.

    The best ``count`` pieces lie in the ``count`` groups with the largest maxima, so only those are sorted.
    """
    size = scores.shape[-1]
    width = int((0.6 * size / count) ** 0.5) if count else 0
    if scores.is_cuda or width < 2:
        values, ids = scores.topk(count, dim=-1)
        return values, ids
    groups = size // width  # group g: pieces g, g + groups, g + 2 groups, ...
    body = scores[..., : groups * width].unflatten(-1, (width, groups))
    chosen = body.amax(-2).topk(count, dim=-1).indices  # [..., count]
    ids = chosen.unsqueeze(-2) + groups * torch.arange(width, device=scores.device).unsqueeze(-1)
    ids = ids.flatten(-2)
    if groups * width < size:
        rest = torch.arange(groups * width, size, device=scores.device)
        ids = torch.cat([ids, rest.expand(*ids.shape[:-1], -1)], dim=-1)
    values, order = scores.gather(-1, ids).topk(count, dim=-1)
    return values, ids.gather(-1, order)


class Frames(NamedTuple):
    """A block of n frames, time first, made ready for the search; scores are relative to the frame's best.

    blank: [n, B, 1] score of blank (0 in frozen and skipped frames).
    shift: [n, B, 1], added to a log-prob it makes a score (-inf in frozen and skipped frames).
    piece: [n, B, C] best non-blank pieces, best first; score: [n, B, C] their scores.
    pair_score: [n, B, P] score of each pair's piece.
    """

    blank: Tensor
    shift: Tensor
    piece: Tensor
    score: Tensor
    pair_score: Tensor


def prepare_frames(log_probs: Tensor, best: Tensor, searched: Tensor, blank: int, pairs: Pairs) -> Frames:
    """Choose each frame's candidate pieces and normalize their scores.

    A frame that is not searched (after the end of its utterance, or skipped) becomes one in which only blank
    can occur: totals and order of the slots cannot change in it, and a piece may repeat after it.

    Args:
        log_probs: [B, n, V] float32; best: [B, n] the largest of each frame; searched: [B, n] bool.
        blank: id of blank.
        pairs: the pairs to score.
    """
    blank_score, shift, piece, score = frame_columns(log_probs, best, searched, blank, pairs.columns)
    blank_score, shift = blank_score.unsqueeze(-1), shift.unsqueeze(-1)
    return Frames(blank_score, shift, piece, score, score.index_select(-1, pairs.column))


def frame_columns(
    log_probs: Tensor, best: Tensor, searched: Tensor, blank: int, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return blank and shift [n, B], piece and score [n, B, C] of frames, time first (see `Frames`)."""
    never = torch.full_like(best, -torch.inf)
    shift = torch.where(searched, -best, never)
    blank_score = torch.where(searched, log_probs[..., blank] - best, torch.zeros_like(best))
    if columns:
        values, ids = best_pieces(log_probs, columns + 1)
        # leave blank out; the pieces after it move up
        places = torch.arange(columns, device=ids.device)
        places = places + (ids == blank).int().cumsum(-1)[..., :columns]
        piece, score = ids.gather(-1, places), values.gather(-1, places) + shift.unsqueeze(-1)
    else:
        score = shift.unsqueeze(-1).expand(-1, -1, 0)
        piece = score.to(torch.int64)
    blank_score, shift, piece, score = (
        field.transpose(0, 1).contiguous() for field in (blank_score, shift, piece, score)
    )
    return blank_score, shift, piece, score
