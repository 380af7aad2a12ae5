"""When an utterance stops to be scored, and how it is ranked meanwhile; the rule as tensors evaluate it.
Knows: frames, lengths of hypotheses, an n-gram for look-ahead. Must not know: language models, who searches.

The condition is each utterance's own (Hori et al. 2025, section 3). So a search that knows it need not ask
after every frame, nor keep its utterances in step: each runs on to its own next event, and those that wait
are then scored in one call. The rule is two numbers; the compiled engines get them as `StopRule.code`.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.ngram.piece_ngram import PieceNgram
    from icefall_fusion.search.beam import Beam

_UNITS = (None, "words", "pieces")


class AheadTerms(NamedTuple):
    """Look-ahead: what ranks the part of a hypothesis that is not scored yet (see fusion/look_ahead.py).

    ngram: over the acoustic pieces; weight: of its natural-log score; bonus: for a word that has begun;
    every: new pieces count only after every so many frames.
    """

    ngram: PieceNgram
    weight: float
    bonus: float
    every: int


class StopRule(NamedTuple):
    """When an utterance stops for a fusion, a value without state.

    every: look after every so many frames; 0: never, it runs on to its end.
    unit: None: each look stops it; ``words`` or ``pieces``: if its shortest live hypothesis has begun more of
        them than at the last stop.
    ahead: the look-ahead, if there is one.
    """

    every: int
    unit: Optional[str] = None
    ahead: Optional[AheadTerms] = None

    @property
    def code(self) -> int:
        """Number of the unit for compiled engines: 0 none, 1 words, 2 pieces."""
        return _UNITS.index(self.unit)

    @property
    def first_length(self) -> int:
        """The length that counts as scored at the start: with one word begun none is closed, a piece is."""
        return 1 if self.unit == "words" else 0


class StopRuleRun:
    """A rule watching one batch frame by frame; a few small gathers a frame.

    Args:
        rule: whose ``ahead`` is not looked at.
        beam: before the first frame.
        tokens: the acoustic vocabulary, where words are counted.
    """

    def __init__(self, rule: StopRule, beam: Beam, tokens: Any) -> None:
        self.rule: Optional[StopRule] = rule
        self._rule, device = rule, beam.node.device
        self._starts = torch.tensor(tokens.starts_word, device=device) if rule.unit == "words" else None
        self._begun = torch.zeros_like(beam.node)  # [B, K] words or pieces begun, the open one included
        # [B] length of the shortest hypothesis at the last event
        self._fused_at = torch.full_like(self._begun[:, 0], rule.first_length)

    def advance(self, beam: Beam, source: Tensor, grew: Tensor) -> None:
        """Follow prune and re-order (see ``Fusion.advance``)."""
        if self._rule.unit is None:
            return
        begun = self._begun.gather(1, source)
        if self._starts is not None:
            # The first piece begins a word, whether it is marked so or not.
            grew = grew & (self._starts[beam.last] | (begun == 0))
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
