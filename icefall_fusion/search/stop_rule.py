"""A stop rule that watches one batch frame by frame: the twin of what compiled engines ask.
Knows: beams, the rule. Must not know: language models, what happens at a stop.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.search.beam import Beam
    from icefall_fusion.search.fusion import StopRule


class StopRuleRun:
    """A rule watching one batch frame by frame; a few small gathers a frame.

    Args:
        rule: whose ``ahead`` is not looked at.
        beam: before the first frame.
    """

    def __init__(self, rule: StopRule, beam: Beam) -> None:
        self.rule: Optional[StopRule] = rule
        self._rule = rule
        self._begun = torch.zeros_like(beam.node)  # [B, K] words or pieces begun, the open one included
        # [B] length of the shortest hypothesis at the last event
        self._fused_at = torch.full_like(self._begun[:, 0], rule.first_length)

    def advance(self, beam: Beam, source: Tensor, grew: Tensor) -> None:
        """Follow prune and re-order (see ``Fusion.advance``)."""
        if self._rule.unit is None:
            return
        begun = self._begun.gather(1, source)
        if self._rule.unit == "words":
            grew = grew & beam.arena.begins_word(beam.last, begun == 0)
        self._begun = begun + grew

    def fires(self, beam: Beam, frame: int, active: Tensor) -> Optional[Tensor]:
        """Return the utterances that fuse now, bool [B]; None: surely none (costs no wait for the device).

        Args:
            beam: after this frame's pruning.
            frame: index of the encoder output frame, from 0.
            active: bool [B], the utterances that have not ended.
        """
        every = self._rule.every
        if every == 0 or (frame + 1) % every:
            return None
        if self._rule.unit is None:
            return active
        alive = beam.alive
        longest = self._begun.amax(1, keepdim=True)
        shortest = torch.where(alive, self._begun, longest).amin(1)
        fires = active & (shortest > self._fused_at) & alive.any(1)
        if not bool(fires.any()):  # the one wait for the device
            return None
        self._fused_at = torch.where(fires, shortest, self._fused_at)
        return fires
