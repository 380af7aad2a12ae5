"""Shallow fusion of an n-gram over the acoustic pieces: classical, and cheap.
Knows: beams, prefixes, a piece n-gram. Must not know: LLMs, trees, words, the frame step.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Sequence

import torch

from icefall_fusion.common.checks import check
from icefall_fusion.fusion.base import LmFusion, asked_slots, live_slots
from icefall_fusion.ngram.piece_ngram import NOTHING, PieceNgram
from icefall_fusion.search.fusion import StopRule

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.search.beam import Beam, PrefixArena


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
        check(tokens is not None, "tokens", "be given to the search for an n-gram", None)
        self.lm.check_size(tokens.size)
        self._ngram = self.lm.to(beam.node.device)
        self.index, self._ids = index, ids

    def extension_scores(self, beam: Beam, pieces: Tensor, active: Tensor) -> Tensor:
        """Return log P(piece | pieces before) [B, K, C] (see ``Fusion.extension_scores``)."""
        batch, beams = beam.node.shape
        scores = beam.lm.new_zeros(batch, beams, pieces.shape[1])
        slots = asked_slots(beam, active)
        if slots.numel():
            wanted = pieces[torch.div(slots, beams, rounding_mode="floor")]  # [n, C]
            contexts = piece_contexts(beam.arena, beam.node.reshape(-1)[slots], self._ngram)
            found = self._ngram.score([context.unsqueeze(1) for context in contexts], wanted)
            scores.view(batch * beams, -1)[slots] = found.masked_fill(wanted == beam.blank, 0.0)
        return scores

    def finish(self, beam: Beam) -> None:
        """Score the end of the utterance of every live hypothesis."""
        slots = live_slots(beam)
        if self.eos and slots.numel():
            contexts = piece_contexts(beam.arena, beam.node.reshape(-1)[slots], self._ngram)
            ends = self._ngram.score(contexts, torch.full_like(slots, self._ngram.end_id))
            self._write(beam, slots, beam.lm[..., self.index].reshape(-1)[slots] + ends)


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
