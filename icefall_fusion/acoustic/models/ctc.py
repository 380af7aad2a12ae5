"""CTC head: encoder frames to piece log-probs, and its loss.
Knows: frames and piece ids. Must not know: data, search, fusion, the encoder.
"""

from __future__ import annotations

from typing import Callable, Optional, Sequence, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icefall_fusion.common.processes import upload

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

    def loss(
        self, frames: Tensor, lens: Sequence[int], targets: Sequence[Sequence[int]],
        padded: Optional[Tensor] = None,
    ) -> tuple[Tensor, int]:
        """Return the summed CTC loss (Graves et al. 2006) of possible utterances and the number of others.

        Args:
            frames: [B,T,D].
            lens, targets, padded: as for `ctc_loss_sum`.
        """
        return ctc_loss_sum(self(frames), lens, targets, self.blank_id, self.row_losses, padded)


def ctc_loss_sum(
    log_probs: Tensor, lens: Union[Tensor, Sequence[int]], targets: Sequence[Sequence[int]], blank_id: int,
    row_losses: Optional[RowLosses] = None, padded: Optional[Tensor] = None,
) -> tuple[Tensor, int]:
    """Sum the CTC loss over utterances that have a path; those too short for their text count zero.

    Which these are, the host finds out; with numbers in ``lens`` it does not wait for a GPU. (Inside torch's
    own loss the lengths are copied to the GPU, which the host waits for: three times forward and back.)

    Args:
        log_probs: [B,T,V] natural-log.
        lens: B numbers, or a tensor of them.
        targets: pieces of each utterance, without blanks.
        row_losses: another implementation than torch's.
        padded: ``targets`` as [B,U] on the device of ``log_probs``, padded with anything.
    """
    device = log_probs.device
    lens = lens.tolist() if isinstance(lens, Tensor) else lens
    possible = [frames_needed(pieces) <= frames for pieces, frames in zip(targets, lens)]
    rows = [row for row, (fits, frames) in enumerate(zip(possible, lens)) if fits and frames > 0]
    if not rows:
        return log_probs.sum() * 0.0, possible.count(False)
    kept = [list(targets[row]) for row in rows]
    kept_lens = [lens[row] for row in rows]
    if len(rows) < len(possible):
        index = upload(rows, device)
        log_probs, padded = log_probs[index], None if padded is None else padded[index]
    with torch.autocast(device.type, enabled=False):
        if row_losses is not None:
            return row_losses(log_probs, upload(kept_lens, device), kept).sum(), possible.count(False)
        if padded is None:
            longest = max(map(len, kept))
            padded = upload([pieces + [0] * (longest - len(pieces)) for pieces in kept], device, torch.long)
        sizes = torch.tensor([len(pieces) for pieces in kept])
        loss = F.ctc_loss(
            log_probs.transpose(0, 1), padded, torch.tensor(kept_lens), sizes, blank=blank_id,
            reduction="sum", zero_infinity=True,
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
