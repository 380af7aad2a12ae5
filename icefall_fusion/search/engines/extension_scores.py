"""Shallow fusion in the tensor engine: which extensions are scored, and their scores.
Knows: fusions that score extensions, candidates, beams. Must not know: which language model it is.
"""
from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.search.beam import ROUNDING, Beam
from icefall_fusion.search.engines.frame_step import Candidates, ranked
from icefall_fusion.search.fusion import FusionSet


class ExtensionScores:
    """Scores of the fusions for the candidates of a search, frame by frame.

    Args:
        fusions: of the search, begun.
        beam: of the search.
    """

    def __init__(self, fusions: FusionSet, beam: Beam) -> None:
        self.fusions, self.beam = fusions, beam
        self.ceiling = sum(f.weight * f.ceiling + max(0.0, f.word_bonus) for f in fusions.shallow)
        self._raw: list[Tensor] = []
        self._opens: Optional[Tensor] = None

    def rank(self, out: Candidates, piece: Tensor, active: Optional[Tensor]) -> Tensor:
        """Return the ranking scores of the candidates [B, K + P]: mass and language models together.

        Args:
            out: the candidates' masses; extensions that cannot survive are struck out here.
            piece: [B, C] candidate pieces.
            active: [B] bool, see `Fusion.extension_scores`; None without shallow fusion.
        """
        if not self.fusions.members:
            return out.real_total
        extra = self.beam.fused.index_select(1, out.pairs.slot)
        if active is not None and out.pairs.columns:
            extra = self._add_scores(out, piece, active, extra)
        total = out.real_total
        if not self.fusions.ranks:
            return total
        return ranked(total, torch.cat([self.beam.fused, extra], dim=1))

    def _add_scores(self, out: Candidates, piece: Tensor, active: Tensor, extra: Tensor) -> Tensor:
        """Return ``extra`` [B, P] plus the scores of shallow fusions; strike out hopeless extensions."""
        beam, slot, column = self.beam, out.pairs.slot, out.pairs.column
        active = self._ask(out, active, extra)
        at = slot * out.pairs.columns + column
        self._opens = None
        if beam.arena.starts_word is not None:
            first = (beam.last == beam.blank).index_select(1, slot)
            self._opens = beam.arena.begins_word(piece.index_select(1, column), first)
        self._raw = []
        anyone = bool(active.any())  # waits for the device
        for fusion in self.fusions.shallow:
            if not anyone:
                self._raw.append(torch.zeros_like(out.new_total))
                continue
            expected = (*beam.last.shape, piece.shape[1])
            scores = fusion.extension_scores(beam, piece, active)
            check(scores.shape == expected, f"extension_scores of {fusion.source!r}",
                  f"have shape {expected}", tuple(scores.shape))
            self._raw.append(scores.to(extra.dtype).flatten(1).index_select(1, at))
        if anyone:  # a fusion whose model fails takes its scores out of all hypotheses
            extra = beam.fused.index_select(1, slot)
        for fusion, raw in zip(self.fusions.shallow, self._raw):
            if fusion.weight != 0:
                extra = extra + fusion.weight * raw
            if fusion.word_bonus != 0:
                extra = extra + fusion.word_bonus * self._opens
        return extra

    def _ask(self, out: Candidates, active: Tensor, extra: Tensor) -> Tensor:
        """Find the slots with an extension that could survive if the models were certain of it.

        Sets ``beam.asked`` [B, K], strikes out the extensions of all others, and returns [B] who has any.
        """
        beam = self.beam
        hopeful = (out.new_total > -torch.inf) & active.unsqueeze(1)
        if self.fusions.ranks:  # else the raw scores are recorded, whoever survives
            worst = ranked(out.stay_total, beam.fused).amin(1, keepdim=True)
            hopeful &= out.new_total + extra + (self.ceiling + ROUNDING) >= worst
        asked = torch.zeros_like(beam.last).scatter_add_(1, out.pairs.slot.expand_as(hopeful), hopeful.long())
        beam.asked = asked > 0
        out.masses[:, :, out.beam : -1].masked_fill_(~hopeful.unsqueeze(1), -torch.inf)
        return active & beam.asked.any(1)

    def follow(self, out: Candidates, chosen: Tensor, source: Tensor, grew: Tensor,
               moved_from: Tensor) -> None:
        """Move all scores and states to their new slots and pay for extensions.

        Args:
            chosen: [B, K] candidate positions; source: [B, K] slots now; grew: [B, K] bool.
            moved_from: [B, K] slots as the fusions knew them after the last frame.
        """
        beam, gains, opened = self.beam, [], None
        beam.fused = beam.fused.gather(1, source)
        if self.fusions.shallow and out.pairs.columns:
            at = (chosen - out.beam).clamp_(min=0)
            opened = None if self._opens is None else grew & self._opens.gather(1, at)
            gains = [raw.gather(1, at).masked_fill_(~grew, 0.0) for raw in self._raw]
        for fusion, gain in zip(self.fusions.shallow, gains):
            if fusion.weight != 0:
                beam.fused += fusion.weight * gain
            if opened is not None and fusion.word_bonus != 0:
                beam.fused += fusion.word_bonus * opened
        self.fusions.carry(beam, moved_from, gains, opened)
        self.fusions.advance(beam, moved_from, grew)
