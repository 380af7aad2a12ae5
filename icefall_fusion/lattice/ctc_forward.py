"""CTC scores of given piece sequences, summed over all alignments: many sequences of many utterances at once.
Knows: log-probs, pieces. Must not know: k2, searches, words.
"""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

_NEVER = -1e30  # stands for log 0: differences stay numbers
_CELLS = 2**22  # states of all sequences at once


@torch.no_grad()
def ctc_scores(
    log_probs: Tensor,
    lens: Tensor,
    lists: Sequence[Sequence[Sequence[int]]],
    blank: int = 0,
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
    owners = [row for row, found in enumerate(lists) for _ in found]
    flat = [list(pieces) for found in lists for pieces in found]
    longest = max(map(len, flat), default=0)
    step = max(1, _CELLS // (2 * longest + 1))
    scores: list[float] = []
    for start in range(0, len(flat), step):
        some = slice(start, start + step)
        scores += _forward(log_probs, lens, flat[some], owners[some], blank, topology == "modified")
    values = iter(scores)
    return [[next(values) for _ in found] for found in lists]


def _forward(
    log_probs: Tensor,
    lens: Tensor,
    flat: Sequence[list[int]],
    owners: Sequence[int],
    blank: int,
    modified: bool,
) -> list[float]:
    device = log_probs.device
    sizes = torch.tensor([len(pieces) for pieces in flat], device=device)
    states = torch.full((len(flat), 2 * int(sizes.max()) + 1), blank, device=device)  # [N,S]: - a - b -
    for row, pieces in enumerate(flat):
        states[row, 1 : 2 * len(pieces) : 2] = torch.tensor(pieces, dtype=torch.int64, device=device)
    jumps = torch.zeros_like(states, dtype=torch.bool)  # whether a state can follow the one two before it
    jumps[:, 3::2] = (states[:, 3::2] != states[:, 1:-2:2]) | modified
    owner = torch.tensor(owners, device=device)
    frames = lens.to(device)[owner]
    alpha = torch.full(states.shape, _NEVER, dtype=torch.float64, device=device)
    alpha[:, 0] = 0.0
    first = True
    for frame in range(int(frames.max()) if len(flat) else 0):
        heard = log_probs[owner, frame].double().gather(1, states)
        if first:  # a path begins with a blank or the first piece
            after, first = torch.full_like(alpha, _NEVER), False
            after[:, :2] = heard[:, :2]
        else:
            ways = torch.stack([alpha, _shift(alpha, 1), _shift(alpha, 2).masked_fill(~jumps, _NEVER)])
            after = (torch.logsumexp(ways, 0) + heard).clamp(min=_NEVER)
        alpha = torch.where((frame < frames).unsqueeze(1), after, alpha)
    last = 2 * sizes.unsqueeze(1)
    ends = torch.cat([alpha.gather(1, last), alpha.gather(1, (last - 1).clamp(min=0))], 1)
    ends[:, 1].masked_fill_(sizes == 0, _NEVER)
    total = torch.logsumexp(ends, 1)
    return total.masked_fill(total <= _NEVER / 2, float("-inf")).tolist()


def _shift(alpha: Tensor, by: int) -> Tensor:
    moved = torch.full_like(alpha, _NEVER)
    moved[:, by:] = alpha[:, :-by] if by < alpha.shape[1] else moved[:, by:]
    return moved
