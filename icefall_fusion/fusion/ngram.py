"""N-grams over the acoustic pieces in the search: shallow fusion, and look-ahead for delayed fusion.
Knows: beams, prefixes, a piece n-gram. Must not know: LLMs, their trees and tokenizers, triggers.

Look-ahead: in delayed fusion a hypothesis in the middle of a word, or one whose words were closed after the
last event, is pruned by its acoustic score alone. With look-ahead an n-gram scores the text that the LLM has
not reached; its score is removed once the LLM's arrives. Final scores do not change, only who survives
(language model look-ahead: Ortmanns, Ney, Eiden 1996; here for prefixes in a beam).
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional, Sequence

import torch

from icefall_fusion.common.checks import check, is_count, is_number
from icefall_fusion.fusion.base import LmFusion, asked_slots, live_slots
from icefall_fusion.ngram.piece_ngram import NOTHING, PieceNgram
from icefall_fusion.search.fusion import StopRule

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.search.beam import Beam, PrefixArena
    from icefall_fusion.search.fusion import AheadTerms

SCALE = 0.7  # good with the MiniBooks models; weights matter more


class NgramFusion(LmFusion):
    """A back-off n-gram over the acoustic pieces joins the search, at every extension.

    Args:
        lm: the n-gram.
        weight: factor of its natural-log score, at least 0; 0 leaves the search as it is, bit for bit.
        word_bonus: added per word, in nats.
        eos: whether the end of the utterance is scored too.
        source: name of the score in N-best lists.

    Raises:
        ValueError: a bad weight, bonus or source (see `LmFusion`).
    """

    scores_extensions = True

    def __init__(
        self, lm: PieceNgram, weight: float, word_bonus: float = 0.0, eos: bool = True, source: str = "ngram"
    ) -> None:
        super().__init__(lm, weight, word_bonus, eos, source)
        self.piece_ngram = lm

    def stop_rule(self) -> StopRule:
        """Return that no utterance has to stop for an n-gram."""
        return StopRule(0)

    def begin(self, beam: Beam, index: int, tokens: Any, ids: Sequence[str]) -> None:
        """Start a batch (see ``Fusion.begin``).

        Raises:
            ValueError: the search has no acoustic vocabulary, or the n-gram is over another number of pieces.
        """
        check(tokens is not None, "tokens", "be passed to the search for an n-gram", None)
        self.lm.check_size(tokens.size)
        self._ngram = self.lm.to(beam.node.device)
        self.index, self._ids, self._groups = index, ids, ()

    def extension_scores(self, beam: Beam, pieces: Tensor, active: Tensor) -> Tensor:
        """Return log P(piece | pieces before) [B, K, C] (see ``Fusion.extension_scores``)."""
        batch, beams = beam.node.shape
        scores = beam.lm.new_zeros(batch, beams, pieces.shape[1])
        slots = asked_slots(beam, active)
        if slots.numel():
            wanted = pieces[torch.div(slots, beams, rounding_mode="floor")]  # [n, C]
            contexts = piece_contexts(beam.arena, beam.node.reshape(-1)[slots], self._ngram)
            log_probs = self._ngram.score([context.unsqueeze(1) for context in contexts], wanted)
            scores.view(batch * beams, -1)[slots] = log_probs.masked_fill(wanted == beam.blank, 0.0)
        return scores

    def finish(self, beam: Beam) -> None:
        """Score the end of the utterance of every live hypothesis."""
        slots = live_slots(beam)
        if self.eos and slots.numel():
            contexts = piece_contexts(beam.arena, beam.node.reshape(-1)[slots], self._ngram)
            ends = self._ngram.score(contexts, torch.full_like(slots, self._ngram.end_id))
            self._add(beam, slots, ends)


def piece_contexts(arena: PrefixArena, nodes: Tensor, ngram: PieceNgram) -> list[Tensor]:
    """Return the last pieces of prefixes, newest first, as `PieceNgram.score` wants them.

    Args:
        arena: of the prefixes.
        nodes: int64 of any shape.
        ngram: whose order says how many.
    """
    contexts: list[Tensor] = []
    beyond = torch.zeros_like(nodes, dtype=torch.bool)  # the start of the sentence is behind us
    for _ in range(ngram.order - 1):
        piece = arena.piece(nodes)
        root = piece < 0
        contexts.append(torch.where(root, ngram.start_id, piece).masked_fill(beyond, NOTHING))
        beyond, nodes = beyond | root, arena.parent(nodes)
    return contexts


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
    """Look-ahead over one batch: the n-gram's score of the pieces that the LLM has not reached.

    Every node of the arena has the sum of its n-gram scores since the root. The score of the unscored pieces
    is the difference to the boundary's sum, so nothing is traced back.

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
        # other utterances of the batch must not matter
        now = active if due else active & scored
        ahead = torch.where(now.unsqueeze(1), self._total[node] - before, added)
        beam.fused += ahead - added
        self._added[node] = ahead
        return True

    def finish(self, beam: Beam) -> None:
        """Remove all look-ahead scores."""
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
