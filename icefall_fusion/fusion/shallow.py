"""Shallow fusion: a language model over the acoustic pieces scores every extension of every hypothesis.
Knows: the Fusion base class, token trees. Must not know: which LM it is, words, the frame step.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Sequence

import torch

from icefall_fusion.common.checks import check
from icefall_fusion.fusion.base import LOG_ZERO, LmFusion, asked_slots, live_slots

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.lm import CausalLm
    from icefall_fusion.search.beam import Beam

_KEEP_AFTER = 8  # frames between two clean-ups of the tree


class ShallowFusion(LmFusion):
    """A language model over the acoustic pieces joins the search, at every extension.

    A hypothesis's raw score is ``log P(its pieces)``; at the end of the utterance the end is scored too.
    Blank has no score. Each frame costs at most one call of the model, for all hypotheses whose last piece
    it has not read yet.

    Args:
        lm: a language model whose vocabulary is the acoustic one.
        weight: factor of its natural-log score, at least 0; 0 leaves the search as it is, bit for bit.
        word_bonus: added per word, in nats.
        eos: whether the end of the utterance is scored too.
        source: name of the score in N-best lists.

    Raises:
        ValueError: a bad weight, bonus or source (see `LmFusion`).
    """

    scores_extensions = True

    def __init__(
        self, lm: CausalLm, weight: float, word_bonus: float = 0.0, eos: bool = True, source: str = "nlm"
    ) -> None:
        super().__init__(lm, weight, word_bonus, eos, source)
        self._matched: Any = None

    def begin(self, beam: Beam, index: int, tokens: Any, ids: Sequence[str]) -> None:
        """Start a batch (see ``Fusion.begin``).

        Raises:
            ValueError: the vocabularies of the language model and of the acoustic model differ.
        """
        if tokens is not None and tokens is not self._matched:
            check_same_pieces(self.lm, tokens)
            self._matched = tokens
        self._open(beam, index, ids, None)
        self._frames = 0

    def extension_scores(self, beam: Beam, pieces: Tensor, active: Tensor) -> Tensor:
        """Return log P(piece | pieces so far) [B, K, C] (see ``Fusion.extension_scores``)."""
        batch, beams = beam.node.shape
        scores = beam.lm.new_zeros(batch, beams, pieces.shape[1])
        slots = asked_slots(beam, active)
        if not slots.numel():
            return scores
        nodes, where = beam.state[..., self.index].reshape(-1)[slots].cpu().unique(return_inverse=True)
        log_probs = self._tree.next_log_probs(nodes)  # [n, V]
        wanted = pieces[torch.div(slots, beams, rounding_mode="floor")]  # [n, C]
        self._check_pieces(wanted, log_probs.shape[1])
        chosen = log_probs.to(scores.device)[where.to(slots.device)].gather(1, wanted)
        chosen = self._numbers(beam, slots, chosen.float()).masked_fill(wanted == beam.blank, 0.0)
        scores.view(batch * beams, -1)[slots] = chosen.clamp(min=LOG_ZERO)
        return scores

    def advance(self, beam: Beam, source: Tensor, grew: Tensor) -> None:
        """Move the grown hypotheses to the tree's child by their last piece (see ``Fusion.advance``)."""
        slots = (grew & beam.alive).reshape(-1).nonzero().squeeze(1)
        if slots.numel():
            nodes = beam.state[..., self.index].reshape(-1)[slots].cpu()
            self._move(beam, slots, self._tree.child(nodes, beam.last.reshape(-1)[slots].cpu()))
        self._frames += 1
        if self._frames % _KEEP_AFTER == 0:
            self._tree.keep(beam.state[..., self.index].reshape(-1)[live_slots(beam)].cpu())

    def finish(self, beam: Beam) -> None:
        """Score the end of the utterance of every live hypothesis of the batch in one call."""
        slots = live_slots(beam)
        if self.eos and slots.numel():
            nodes = beam.state[..., self.index].reshape(-1)[slots].cpu()
            ends = self._tree.eos_scores(nodes).to(beam.lm.device, torch.float32)
            self._add(beam, slots, ends)
        self._close()

    def _check_pieces(self, pieces: Tensor, vocab_size: int) -> None:
        if self._matched is None:
            largest = int(pieces.max()) if pieces.numel() else 0
            check(largest < vocab_size, "pieces", f"be below the LM's vocabulary size {vocab_size}", largest)


def check_same_pieces(lm: CausalLm, tokens: Any) -> None:
    """Refuse a language model whose vocabulary is not the acoustic one.

    Args:
        lm: the language model.
        tokens: the acoustic vocabulary.

    Raises:
        ValueError: sizes or pieces differ; the message has both sizes, and the first pieces that differ. Or
            the language model comes without a vocabulary.
    """
    if lm.pieces is not None:
        pieces = list(lm.pieces.pieces)
    else:
        check(lm.tokenizer is not None, f"language model {lm.name!r}", "have a tokenizer or bpe.model", None)
        pieces = lm.tokenizer.convert_ids_to_tokens(list(range(len(lm.tokenizer))))
    sizes = f"the language model {lm.name!r} has {len(pieces)} pieces, the acoustic model {tokens.size}"
    if len(pieces) != tokens.size:  # outputs beyond the pieces are padding
        raise ValueError(f"shallow fusion must have one vocabulary, but {sizes}; use DelayedFusion")
    for number, (ours, theirs) in enumerate(zip(pieces, tokens.pieces)):
        if ours != theirs:
            raise ValueError(
                f"shallow fusion must have one vocabulary, but {sizes} and piece {number} is {ours!r} "
                f"for the language model and {theirs!r} for the acoustic model; use DelayedFusion"
            )
