"""Forward masses of all children of the live prefixes: a pruned child is reborn with its due mass.
Knows: masses, beams, candidates. Must not know: language models, how candidates are ranked.

A prefix that falls out of the beam and is born again from its parent has lost the mass of its earlier
alignments. ESPnet's time-synchronous search remembers what it computed in the last frame; here the children of
every live prefix keep their CTC forward masses as long as the prefix lives. Masses are linear, relative to the
best slot: in a frame all become ``mass * p(blank)``, and only the C candidate pieces of the frame can be
emitted, so that all else is [B, K, C] work. What no candidate emits is below the C-th best piece's probability
and is left out. While a child is live itself, its slot's total is written back, so that nothing is lost when it
dies; its own children are forgotten with it.
"""
from __future__ import annotations

import torch
from torch import Tensor

from icefall_fusion.search.beam import Beam
from icefall_fusion.search.frame_step import Candidates, Frame

_TINY = 1e-30  # of the best slot's mass; less is nothing (and would be slow: denormal numbers)


def columns_kept(beam: int, pieces: int) -> int:
    """Return C, the candidate pieces of a frame when mass is recovered."""
    return min(pieces, max(2 * beam, 16))


class Children:
    """Masses of the children of every slot.

    total: [B, K, V] mass of each child, blank-ended and not; the blank's own column is scratch.
    emitted: [B, K, C] the part that does not end in blank, of the last frame's candidate pieces (of others 0).
    """

    def __init__(self, beam: Beam, pieces: int, columns: int) -> None:
        batch, slots, device = beam.arena.batch, beam.arena.beam, beam.lens.device
        self.beam = beam
        self.total = torch.zeros(batch, slots, pieces, device=device)
        self._next_total = torch.zeros_like(self.total)
        self.emitted = torch.zeros(batch, slots, columns, device=device)
        self.piece = torch.zeros(batch, columns, dtype=torch.int64, device=device)
        self.slots = torch.arange(slots, device=device)

    def extend(self, frame: Frame, out: Candidates) -> None:
        """Move all children by one frame and write them into ``out`` as extensions (all K x C pairs)."""
        beam = self.beam
        best = beam.log_total.amax(1, keepdim=True)
        whole, ended = (beam.log_total - best).exp_(), (beam.log_blank - best).exp_()
        piece = frame.piece.unsqueeze(1)  # [B, 1, C]
        repeats = piece == beam.last.unsqueeze(2)
        incoming = torch.where(repeats, ended.unsqueeze(2), whole.unsqueeze(2))
        emitted = torch.bmm(self.emitted, (self.piece.unsqueeze(2) == piece).to(self.emitted.dtype))
        emitted = (emitted + incoming) * frame.score.exp().unsqueeze(1)
        self.total *= frame.blank.exp().unsqueeze(2)
        place = piece.expand_as(emitted)
        ended_in_blank = self.total.gather(2, place)
        total = ended_in_blank + emitted
        self.total.scatter_(2, place, total)
        self.emitted, self.piece, self._best = emitted, frame.piece, best
        shift = best.unsqueeze(2)
        targets = (out.new_total, out.new_blank, out.new_nonblank)
        for target, mass in zip(targets, (total, ended_in_blank, emitted)):
            target.copy_((mass.log() + shift).flatten(1))

    def write_back(self, out: Candidates, parent_slots: Tensor) -> None:
        """Put live children's masses in their parents' rows; slots without a live parent write scratch."""
        live = parent_slots > 0
        row = torch.where(live, parent_slots - 1, self.slots)
        column = torch.where(live, self.beam.last, torch.full_like(row, self.beam.blank))
        place = row * self.total.shape[2] + column
        self.total.flatten(1).scatter_(1, place, (out.stay_total - self._best).exp())

    def restart(self, after_skip: Tensor) -> None:
        """Take blank as the last thing heard in the utterances [B, 1] bool that just skipped frames."""
        self.emitted = self.emitted.masked_fill(after_skip.unsqueeze(2), 0.0)

    def follow(self, source: Tensor, grew: Tensor) -> None:
        """Give each slot the children of the slot it stayed in; a newborn prefix has none yet."""
        best = self.beam.log_total.amax(1, keepdim=True)
        scale = (self._best - best).exp() * ~grew  # [B, K]
        move = (source.unsqueeze(2) == self.slots) * scale.unsqueeze(2)  # [B, K, K], one entry a row
        torch.bmm(move, self.total, out=self._next_total)
        self.total, self._next_total = self._next_total, self.total
        self.emitted = torch.bmm(move, self.emitted)
        if self.beam.frame % 4 == 0:
            self.total.masked_fill_(self.total < _TINY, 0.0)
