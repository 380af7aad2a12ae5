"""Forward masses of all children of the live prefixes: a pruned child is reborn with its due mass.
Knows: masses, beams, candidates. Must not know: language models, how candidates are ranked.

A prefix that falls out of the beam and is born again from its parent has lost the mass of its earlier
alignments. ESPnet's time-synchronous search remembers what it computed in the last frame; here the children
of every live prefix keep their CTC forward masses as long as the prefix lives. Masses are linear, relative to
the best slot: in a frame all become ``mass * p(blank)``, and only the C candidate pieces of the frame can be
emitted, so that all else is of size [B, K, C]. Masses emitted by other pieces are left out: their
probability is below the C-th best piece's. While a child is live itself, its slot's total replaces its mass
here before each frame, so that nothing is lost when it dies; its own children are forgotten with it.
"""
from __future__ import annotations

import torch
from torch import Tensor

from icefall_fusion.search.beam import TINY_MASS, Beam
from icefall_fusion.search.engines.frame_step import Candidates, Frame


class Children:
    """Masses of the children of every slot.

    total: [B, K, V] mass of each child, blank-ended and not; the blank's own column is scratch.
    emitted: [B, K, C] mass that does not end in blank, of the last frame's candidate pieces (others: 0).
    """

    def __init__(self, beam: Beam, pieces: int, columns: int) -> None:
        batch, slots, device = beam.arena.batch, beam.arena.beam, beam.lens.device
        self.beam = beam
        self.total = torch.zeros(batch, slots, pieces, dtype=torch.float32, device=device)
        self.emitted = torch.zeros(batch, slots, columns, dtype=torch.float32, device=device)
        self.piece = torch.zeros(batch, columns, dtype=torch.int64, device=device)
        self.slots = torch.arange(slots, device=device)

    def restart(self, after_skip: Tensor) -> None:
        """Let all alignments of the utterances [B, 1] bool that just skipped frames end in blank."""
        self.emitted = self.emitted.masked_fill(after_skip.unsqueeze(2), 0.0)

    def extend(self, frame: Frame, out: Candidates, parent_slots: Tensor) -> None:
        """Move all children by one frame; write their totals into ``out`` as extensions (K x C pairs)."""
        beam = self.beam
        self._best = beam.log_total.amax(1, keepdim=True)
        whole, ended = (beam.log_total - self._best).exp_(), (beam.log_blank - self._best).exp_()
        self._take_live(parent_slots, whole)
        piece = frame.piece.unsqueeze(1)  # [B, 1, C]
        incoming = torch.where(piece == beam.last.unsqueeze(2), ended.unsqueeze(2), whole.unsqueeze(2))
        emitted = _exact_bmm(self.emitted, (self.piece.unsqueeze(2) == piece).to(self.emitted.dtype))
        emitted = emitted.add_(incoming).mul_(frame.score.exp().unsqueeze(1))
        self._place = piece.expand_as(emitted)
        self._blank = frame.blank.exp().unsqueeze(2)  # [B, 1, 1]
        self._ended = self.total.gather(2, self._place).mul_(self._blank)
        total = self._ended + emitted
        self._remember_live(out, parent_slots, piece, emitted, total)
        self.emitted, self.piece = torch.threshold_(emitted, TINY_MASS, 0.0), frame.piece
        self._candidates = torch.threshold_(total, TINY_MASS, 0.0)
        torch.add(total.log().flatten(1), self._best, out=out.new_total)
        # in a frame that is not searched nobody is born again, whatever stands in the padding
        out.new_total.masked_fill_(frame.shift == -torch.inf, -torch.inf)

    def _remember_live(self, out: Candidates, parent_slots: Tensor, piece: Tensor, emitted: Tensor,
                       total: Tensor) -> None:
        """Store the beam's masses of children that are live themselves, for when they are pruned."""
        linked = parent_slots.unsqueeze(1) == self.slots.unsqueeze(1) + 1  # [B, parent, child]
        linked = linked.to(total.dtype)
        same = (piece == self.beam.last.unsqueeze(2)).to(total.dtype)  # [B, child, C]
        live = _exact_bmm(linked, same) > 0
        for values, log_mass in ((emitted, out.stay_nonblank), (total, out.stay_total)):
            mass = (log_mass - self._best).exp().unsqueeze(2)
            values.copy_(torch.where(live, _exact_bmm(linked, same * mass), values))
        self._ended = torch.where(live, total - emitted, self._ended)

    def _take_live(self, parent_slots: Tensor, whole: Tensor) -> None:
        """Put live children's totals in their parents' rows; slots without a live parent write scratch."""
        live = parent_slots > 0
        row = torch.where(live, parent_slots - 1, self.slots)
        column = self.beam.last.masked_fill(~live, self.beam.blank)
        self.total.flatten(1).scatter_(1, row * self.total.shape[2] + column, whole)

    def split(self, chosen: Tensor, stays: int) -> tuple[Tensor, Tensor]:
        """Return the (blank-ended, other) log-mass [B, K] of chosen extensions; of stays anything."""
        place = (chosen - stays).clamp_(min=0)
        emitted = self.emitted.flatten(1).gather(1, place)
        ended = self._ended.flatten(1).gather(1, place)  # no difference: it may be tiny beside the rest
        return ended.log_() + self._best, emitted.log() + self._best

    def follow(self, source: Tensor, grew: Tensor) -> None:
        """Give each slot the children of the slot it stayed in; newborn and dead prefixes have none."""
        best = self.beam.log_total.amax(1, keepdim=True)
        scale = (self._best - best).exp().masked_fill(grew | ~self.beam.alive, 0.0)  # [B, K]
        move = (source.unsqueeze(2) == self.slots) * scale.unsqueeze(2)  # [B, K, K], at most one entry a row
        self.total = _exact_bmm(move * self._blank, self.total)
        self.emitted = _exact_bmm(move, self.emitted)
        self.total.scatter_(2, self._place, _exact_bmm(move, self._candidates))
        if self.beam.frame % 16 == 0:
            torch.threshold_(self.total, TINY_MASS, 0.0)


def _exact_bmm(left: Tensor, right: Tensor) -> Tensor:
    """Return the batched product in full float32, whatever TF32 is allowed to do elsewhere."""
    if not left.is_cuda:
        return torch.bmm(left, right)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return torch.bmm(left, right)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
