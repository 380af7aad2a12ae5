"""CTC head: encoder frames to piece log-probs, and its loss.
Knows: frames and piece ids. Must not know: data, search, fusion, the encoder.
"""

from __future__ import annotations

from typing import Callable, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Another implementation of the loss: (log_probs [B,T,V], lens [B], targets) -> losses [B].
RowLosses = Callable[[Tensor, Tensor, Sequence[Sequence[int]]], Tensor]


class CtcHead(nn.Module):
    """One linear layer and a log-softmax, always in float32.

    Args:
        size: D of an encoder frame.
        vocab_size: V, blank included.
        blank_id: the blank's id.

    Attributes:
        row_losses: another implementation of the loss; None: torch's.
    """

    def __init__(self, size: int, vocab_size: int, blank_id: int = 0) -> None:
        super().__init__()
        self.blank_id = blank_id
        self.row_losses: Optional[RowLosses] = None
        self.linear = nn.Linear(size, vocab_size)

    def forward(self, frames: Tensor) -> Tensor:
        """Return log-probs [B,T,V] in float32."""
        return self.linear(frames).float().log_softmax(dim=-1)

    def loss(self, frames: Tensor, lens: Tensor, targets: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        """Return the summed CTC loss (Graves et al. 2006) of possible utterances and the number of others.

        Args:
            frames: [B,T,D]; lens: [B].
            targets: pieces of each utterance, without blanks.
        """
        return ctc_loss_sum(self(frames), lens, targets, self.blank_id, self.row_losses)


def ctc_loss_sum(
    log_probs: Tensor, lens: Tensor, targets: Sequence[Sequence[int]], blank_id: int,
    row_losses: Optional[RowLosses] = None,
) -> tuple[Tensor, int]:
    """Sum the CTC loss over utterances that have a path; those too short for their text count zero.

    Args:
        log_probs: [B,T,V] natural-log.
        row_losses: another implementation than torch's.
    """
    needed = [frames_needed(pieces) for pieces in targets]
    possible = [need <= frames for need, frames in zip(needed, lens.tolist())]
    rows = [row for row, (fits, frames) in enumerate(zip(possible, lens.tolist())) if fits and frames > 0]
    if not rows:
        return log_probs.sum() * 0.0, possible.count(False)
    if len(rows) < len(possible):
        index = torch.tensor(rows, device=log_probs.device)
        log_probs, lens = log_probs[index], lens[index]
    kept = [list(targets[row]) for row in rows]
    if row_losses is not None:
        with torch.autocast(log_probs.device.type, enabled=False):
            return row_losses(log_probs, lens, kept).sum(), possible.count(False)
    flat = torch.tensor(
        [piece for pieces in kept for piece in pieces], dtype=torch.long, device=log_probs.device
    )
    sizes = torch.tensor([len(pieces) for pieces in kept], device=log_probs.device)
    with torch.autocast(log_probs.device.type, enabled=False):
        loss = F.ctc_loss(
            log_probs.transpose(0, 1), flat, lens, sizes, blank=blank_id, reduction="sum", zero_infinity=True
        )
    return loss, possible.count(False)


def frames_needed(pieces: Sequence[int]) -> int:
    """Return the least number of frames of a CTC path: one a piece, and a blank between equal neighbors."""
    return len(pieces) + sum(left == right for left, right in zip(pieces, pieces[1:]))


def greedy_pieces(log_probs: Tensor, lens: Tensor, blank_id: int) -> list[list[int]]:
    """Return the pieces of the best path: repeats merged, blanks dropped. log_probs [B,T,V]."""
    best = log_probs.argmax(dim=-1).tolist()
    pieces = []
    for row, length in zip(best, lens.tolist()):
        row = row[:length]
        pieces.append([p for p, before in zip(row, [blank_id] + row) if p != before and p != blank_id])
    return pieces
