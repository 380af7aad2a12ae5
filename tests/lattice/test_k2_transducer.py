"""The transducer loss by k2: against a plain recursion and k2's own simple and pruned losses.
Knows: k2, the transducer head. Must not know: training.
"""
from __future__ import annotations

import pytest
import torch

from icefall_fusion.acoustic.models.transducer import TransducerHead, TransducerOptions
from icefall_fusion.acoustic.models.transducer_loss import band_starts, joined_cells, rnnt_loss_sum
from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.lattice.k2_fsas import load_k2, rnnt_loss_rows

try:
    k2 = load_k2()
except Unavailable:
    k2 = None
pytestmark = [pytest.mark.k2, pytest.mark.skipif(k2 is None, reason="k2 is not here")]
PIECES = 9
LENS, TARGETS = [13, 8, 5], [[3, 3, 1, 7, 2, 8], [4, 5], []]


def head(prune_range: int = 3) -> TransducerHead:
    torch.manual_seed(2)
    options = TransducerOptions(predictor_size=12, joiner_size=10, prune_range=prune_range)
    made = TransducerHead(16, PIECES, 0, options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2)
    made.lattice_loss = rnnt_loss_rows
    return made


def plain(cells: torch.Tensor, frames: int, tokens: int) -> torch.Tensor:
    """Return the loss of one utterance's cells [T,U+1,2], cell by cell."""
    total: dict = {(0, 0): torch.zeros(())}
    for frame in range(frames):
        for said in range(tokens + 1):
            ways = []
            if frame > 0:
                ways.append(total[frame - 1, said] + cells[frame - 1, said, 0])
            if said > 0:
                ways.append(total[frame, said - 1] + cells[frame, said - 1, 1])
            if ways:
                total[frame, said] = torch.stack(ways).logsumexp(0)
    return -(total[frames - 1, tokens] + cells[frames - 1, tokens, 0])


@pytest.mark.parametrize("most", [4, 0])
def test_the_recursion_equals_a_plain_one(most) -> None:
    torch.manual_seed(1)
    cells = torch.randn(3, 7, most + 1, 2).requires_grad_()
    lens, sizes = [7, 5, 1], [most, min(2, most), 0]
    found = rnnt_loss_rows(cells, torch.tensor(lens), torch.tensor(sizes))
    wanted = torch.stack([plain(cells[row], *pair) for row, pair in enumerate(zip(lens, sizes))])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), cells)[0] for x in (found, wanted)))


def test_simple_loss_bands_and_pruned_loss_are_k2s() -> None:
    model, x = head(), torch.randn(3, 13, 16)
    found = rnnt_loss_sum(model, x, LENS, TARGETS)
    padded = torch.tensor([[*t, *[0] * (6 - len(t))] for t in TARGETS])
    bounds = torch.tensor([[0, 0, len(t), n] for t, n in zip(TARGETS, LENS)])
    before = model.predictor(model.histories(padded))
    heard, said = model.simple_am_proj(x), model.simple_lm_proj(before)
    simple, (labels, blanks) = k2.rnnt_loss_simple(said, heard, padded, 0, bounds, reduction="sum",
                                                   return_grad=True)
    torch.testing.assert_close(found.simple, simple)
    ranges = k2.get_rnnt_prune_ranges(labels, blanks, bounds, 3)  # [B,T,S]
    occupied = (torch.nn.functional.pad(labels, (0, 0, 0, 1))[..., :-1] + blanks).transpose(1, 2)
    starts = band_starts(occupied, torch.tensor(LENS), torch.tensor([len(t) for t in TARGETS]), 3)
    for row, frames in enumerate(LENS):
        assert starts[row, :frames].tolist() == ranges[row, :frames, 0].tolist()
    states = model.joiner.decoder_proj(before)
    frames, near = k2.do_rnnt_pruning(model.project(x), states, ranges)
    pruned = k2.rnnt_loss_pruned(model.joiner(frames, near), padded, ranges, 0, bounds, reduction="sum")
    torch.testing.assert_close(found.loss, pruned)
    cells = joined_cells(model, model.project(x), states, padded, ranges[..., 0], 3)
    mine = rnnt_loss_rows(cells, torch.tensor(LENS), torch.tensor([len(t) for t in TARGETS])).sum()
    torch.testing.assert_close(mine, pruned)
