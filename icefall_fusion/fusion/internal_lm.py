"""A transducer's internal language model is taken out again: its joiner without an encoder.
Knows: beams, prefixes, a transducer's predictor and joiner. Must not know: encoders, LLMs, searches.

A transducer has learnt which pieces follow which; beside a language model these are counted twice. What its
predictor alone says, without blank and with zeros in place of the encoder's output as the joiner adds it up
(after its projection, whose bias is gone too), estimates that (Variani et al. 2020, arXiv 2003.07705; Meng
et al. 2021, arXiv 2011.01991): ``total = rnnt + weight_llm * log P_llm - weight * log P_internal``. `lodr.py`
does the same by an n-gram.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Sequence

import torch

from icefall_fusion.common.checks import check
from icefall_fusion.fusion.base import asked_slots
from icefall_fusion.search.engines.predictor import ContextTable
from icefall_fusion.search.fusion import Fusion, StopRule, check_fusion

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.acoustic.transducer import Transducer
    from icefall_fusion.search.beam import Beam, PrefixArena

#: Nats: a piece is taken as no less probable than e to the minus this, so that none is paid for being rare.
MOST = 20.0
#: Numbers that the scores of contexts may be; when there are more, they are made anew as they are asked for.
KEPT = 25_000_000


class InternalLmFusion(Fusion):
    """The internal language model of a transducer is subtracted, at every extension.

    Its raw score is ``-log P(pieces)``, so that weights are at least 0 as all others.

    Args:
        model: the transducer that is searched.
        weight: factor of its natural-log score, at least 0; 0 leaves the search as it is.
        word_bonus: added per word, in nats.
        source: name of the score in N-best lists.

    Raises:
        ValueError: a bad weight, bonus or source.
    """

    scores_extensions = True
    ceiling = MOST

    def __init__(self, model: Transducer, weight: float, word_bonus: float = 0.0,
                 source: str = "ilm") -> None:
        self.model, self.weight, self.word_bonus, self.source = model, weight, word_bonus, source
        check_fusion(self)

    def stop_rule(self) -> StopRule:
        """Return that no utterance has to stop for it."""
        return StopRule(0)

    def begin(self, beam: Beam, index: int, tokens: Any, ids: Sequence[str]) -> None:
        """Start a batch (see ``Fusion.begin``).

        Raises:
            ValueError: the search is over another vocabulary.
        """
        if tokens is not None:
            check(tokens.size == self.model.vocab_size, "InternalLmFusion.model",
                  f"be over {tokens.size} pieces", self.model.vocab_size)
        self.index, self._table = index, ContextTable()

    def extension_scores(self, beam: Beam, pieces: Tensor, active: Tensor) -> Tensor:
        """Return -log P(piece | pieces before) [B, K, C] (see ``Fusion.extension_scores``)."""
        batch, beams = beam.node.shape
        scores = beam.lm.new_zeros(batch, beams, pieces.shape[1])
        slots = asked_slots(beam, active)
        if slots.numel():
            contexts = self._contexts(beam.arena, beam.node.reshape(-1)[slots])
            if scores.device.type == "cpu":
                if self._table.values.numel() > KEPT:
                    self._table = ContextTable()
                rows = self._table.find(contexts, self._scores)
                values = self._table.values[rows]
            else:
                values = self._scores(contexts)
            wanted = pieces[torch.div(slots, beams, rounding_mode="floor")]  # [n, C]
            scores.view(batch * beams, -1)[slots] = values.gather(1, wanted)
        return scores

    def _scores(self, contexts: Tensor) -> Tensor:
        """Return -log P of every piece [N, V] after contexts [N, c]; of blank 0."""
        predictor = self.model.predict(contexts)
        log_probs = self.model.join(torch.zeros_like(predictor), predictor).float()
        log_probs[:, self.model.blank_id] = -torch.inf
        scores = -log_probs.log_softmax(1).clamp(min=-MOST)
        scores[:, self.model.blank_id] = 0.0
        return scores

    def _contexts(self, arena: PrefixArena, nodes: Tensor) -> Tensor:
        """Return the last pieces [n, c] of prefixes, those of the start before the first."""
        columns, start = [], self.model.start
        past = torch.zeros_like(nodes)  # how far before the first piece
        for _ in start:
            piece = arena.piece(nodes)
            past = past + (piece < 0)
            before = torch.tensor(start, device=nodes.device)[-past]  # of past 0 nothing is read
            columns.append(torch.where(piece < 0, before, piece))
            nodes = arena.parent(nodes)
        return torch.stack(columns[::-1], 1)
