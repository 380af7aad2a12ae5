"""CTC scores of piece sequences, summed over all alignments: many sequences of many utterances at once.
Knows: log-probs, pieces. Must not know: k2, searches, words.
"""
from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

_NEVER = -1e30  # stands for log 0: differences stay numbers
_CELLS = 2**22  # states of all sequences at once


@torch.no_grad()
def ctc_scores(
    log_probs: Tensor, lens: Tensor, lists: Sequence[Sequence[Sequence[int]]], blank: int = 0,
    topology: str = "standard",
) -> list[list[float]]:
    """Return log P(pieces | audio) of piece sequences of each utterance (Graves et al. 2006).

    Args:
        log_probs: [B,T,V] natural-log; lens: [B] frames.
        lists: for each utterance its piece sequences, without blanks.
        blank: id of the blank.
        topology: standard, or modified (no blank is needed between equal pieces).

    Returns:
        natural logs; -inf where the frames are too few.
    """
    owners = torch.tensor([row for row, sequences in enumerate(lists) for _ in sequences])
    flat = [torch.tensor(list(pieces), dtype=torch.int64) for sequences in lists for pieces in sequences]
    step = max(1, _CELLS // (2 * max(map(len, flat), default=0) + 1))
    scores: list[float] = []
    for start in range(0, len(flat), step):
        some = slice(start, start + step)
        scores += _forward(log_probs, lens, flat[some], owners[some], blank, topology == "modified")
    values = iter(scores)
    return [[next(values) for _ in sequences] for sequences in lists]


def _forward(
    log_probs: Tensor, lens: Tensor, flat: list[Tensor], owner: Tensor, blank: int, modified: bool
) -> list[float]:
    """Return the score of each of N sequences [length]; ``owner`` [N] is its utterance."""
    device = log_probs.device
    padded = pad_sequence(flat, batch_first=True, padding_value=blank).to(device)
    states = torch.full((len(flat), 2 * padded.shape[1] + 1), blank, device=device)  # [N,S]: - a - b -
    states[:, 1::2] = padded
    jumps = torch.zeros_like(states, dtype=torch.bool)  # whether a state can follow the one two before it
    jumps[:, 3::2] = (states[:, 3::2] != states[:, 1:-2:2]) | modified
    owner = owner.to(device)
    frames = lens.to(device)[owner]
    alpha = torch.full(states.shape, _NEVER, dtype=torch.float64, device=device)
    alpha[:, 0] = 0.0
    for frame in range(int(frames.max())):
        before = torch.stack([pad(alpha, (by, 0), value=_NEVER)[:, : alpha.shape[1]] for by in range(3)])
        before[2].masked_fill_(~jumps, _NEVER)
        after = torch.logsumexp(before, 0) + log_probs[owner, frame].double().gather(1, states)
        alpha = torch.where((frame < frames).unsqueeze(1), after.clamp(min=_NEVER), alpha)
    last = 2 * torch.tensor([len(pieces) for pieces in flat], device=device).unsqueeze(1)
    ends = torch.cat([alpha.gather(1, last), alpha.gather(1, (last - 1).clamp(min=0))], 1)
    ends[:, 1:].masked_fill_(last == 0, _NEVER)
    total = torch.logsumexp(ends, 1)
    return total.masked_fill(total <= _NEVER / 2, float("-inf")).tolist()
