"""Look-ahead: until the LLM scores a word, a cheap n-gram over the pieces stands in for it.
Knows: beams, prefixes, a piece n-gram. Must not know: LMs, their trees and tokenizers, triggers.

In delayed fusion a hypothesis in the middle of a word, or one whose words were closed after the last event,
is pruned by its acoustic score alone. Here it is ranked by an estimate as well, which goes away as soon as
the LLM has spoken: final scores do not change, only who survives (language model look-ahead: Ortmanns, Ney,
Eiden 1996; here for prefixes in a beam).
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional

import torch

from icefall_fusion.common.checks import check, is_count, is_number
from icefall_fusion.fusion.ngram_fusion import piece_contexts
from icefall_fusion.ngram.piece_ngram import PieceNgram

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.search.beam import Beam, PrefixArena
    from icefall_fusion.search.fusion import AheadTerms


SCALE = 0.7  # of the MiniBooks models a good one; weights matter more


@dataclass(frozen=True)
class LookAhead:
    """How words that the LLM has not scored yet are ranked.

    Args:
        ngram: over the acoustic pieces.
        scale: factor of its natural-log score beside that of the LLM: the weight is ``scale`` times the
            fusion's; above 0.
        every: take new pieces into account only after every so many frames, at least 1.
    """

    ngram: PieceNgram
    scale: float = SCALE
    every: int = 1

    def __post_init__(self) -> None:
        check(isinstance(self.ngram, PieceNgram), "LookAhead.ngram", "be a PieceNgram", self.ngram)
        good = is_number(self.scale) and self.scale > 0
        check(good, "LookAhead.scale", "be finite and above 0", self.scale)
        check(is_count(self.every), "LookAhead.every", "be an integer, at least 1", self.every)


class LookAheadRun:
    """Look-ahead over one batch: what was added to each prefix for pieces that the LLM has not scored.

    Every node of the arena has the sum of its estimates since the root; the estimate of its unscored part is
    the difference to its boundary's, so nothing has to be traced back.

    Args:
        ahead: the n-gram and its weights.
        beam: before anything was estimated.
    """

    def __init__(self, ahead: AheadTerms, beam: Beam) -> None:
        device = beam.node.device
        self._every, self._ngram = ahead.every, ahead.ngram.to(device)
        self._weight, self._bonus = ahead.weight, ahead.bonus
        # Of each node: all estimates since the root; those until the boundary that was scored last; and how
        # much of the difference ``beam.fused`` holds.
        roots = beam.arena.row_size
        self._total, self._scored, self._added = (
            torch.zeros(roots, dtype=torch.float32, device=device) for _ in range(3)
        )

    def advance(self, beam: Beam, grew: Tensor) -> None:
        """Estimate the pieces that hypotheses [B, K] bool have just grown by."""
        arena, node = beam.arena, beam.node
        size = arena.rows * arena.row_size
        if len(self._total) < size:
            self._total, self._scored, self._added = (
                _longer(x, 2 * size) for x in (self._total, self._scored, self._added)
            )
        before = torch.where(grew, arena.parent(node), node)
        gain = self._estimate(arena, before, beam.last)
        self._total[node] = self._total[before] + torch.where(grew, gain, torch.zeros_like(gain))
        self._scored[node], self._added[node] = self._scored[before], self._added[before]

    def fuse(
        self, beam: Beam, frame: int, active: Tensor, scored: Optional[Tensor], until: Optional[Tensor]
    ) -> bool:
        """Bring ``beam.fused`` up to date; return whether it was changed.

        Args:
            beam: after the LLM's scores have come in.
            frame: index of the encoder output frame, from 0.
            active: bool [B], utterances that have not ended.
            scored: bool [B], utterances whose scores came in this frame; None: no one's.
            until: [B, K] arena nodes up to which hypotheses are scored then; None: where ``scored`` is.
        """
        due = (frame + 1) % self._every == 0
        if scored is None and not due:
            return False
        node = beam.node
        before, added = self._scored[node], self._added[node]
        if scored is not None:
            before = torch.where(scored.unsqueeze(1), self._total[until], before)
            self._scored[node] = before
        # what others in the batch do must not matter
        now = active if due else active & scored
        ahead = torch.where(now.unsqueeze(1), self._total[node] - before, added)
        beam.fused += ahead - added
        self._added[node] = ahead
        return True

    def finish(self, beam: Beam) -> None:
        """Take back all that was added."""
        beam.fused -= self._added[beam.node]

    def _estimate(self, arena: PrefixArena, before: Tensor, piece: Tensor) -> Tensor:
        """Return what prefixes ``before`` get for growing by ``piece``, both [B, K]."""
        score = self._ngram.score(piece_contexts(arena, before, self._ngram), piece)
        first = before < arena.row_size  # a root: the first piece begins a word, marked or not
        return self._weight * score + self._bonus * arena.begins_word(piece, first)


def _longer(values: Tensor, size: int) -> Tensor:
    longer = values.new_zeros(size)
    longer[: len(values)] = values
    return longer
