"""One frame of exact CTC prefix beam search over dense [B, K] tensors: extend, merge, prune.
Knows: beams, candidate pairs. Must not know: language models (their scores come as tensors), files, text.

Graves 2006 (section 4.2.2 of his thesis), Hannun et al. 2014: a prefix keeps the mass of its alignments that
end in blank and of those that do not. A prefix's only parent is the prefix without its last piece, so the
only masses that meet are a slot's own and the extension of its parent's slot; no search for equal prefixes is
needed.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Optional

import torch
from torch import Tensor

from icefall_fusion.search.beam import (
    DEAD_HASH,
    HASH,
    HASH_FACTOR,
    LAST,
    NO_PARENT_HASH,
    NODE,
    PARENT_HASH,
    REPEATS,
    Beam,
)
from icefall_fusion.search.engines.base import hash_keys
from icefall_fusion.search.engines.candidates import Pairs

if TYPE_CHECKING:
    from icefall_fusion.search.engines.children import Children

_NEVER = -torch.inf


class Frame(NamedTuple):
    """Scores of one frame (see candidates.Frames): row [B, V] log-probs; blank, shift [B, 1]; piece, score
    [B, C]; pair_score [B, P]."""

    row: Tensor
    blank: Tensor
    shift: Tensor
    piece: Tensor
    score: Tensor
    pair_score: Tensor


class Candidates:
    """All ways to go on from a beam in one frame: K stays, then P extensions, then one waste column.

    total, blank, nonblank: [B, K + P + 1] views of natural-log masses.
    """

    def __init__(self, batch: int, pairs: Pairs, beam: int, device: torch.device) -> None:
        self.pairs, self.beam = pairs, beam
        size = (batch, 3, beam + pairs.slot.numel() + 1)
        self.masses = torch.full(size, _NEVER, dtype=torch.float32, device=device)
        self.total, self.blank, self.nonblank = self.masses.unbind(1)
        self.stay_total, self.stay_blank, self.stay_nonblank = (x[:, :beam] for x in self.masses.unbind(1))
        self.new_total, self.new_blank, self.new_nonblank = (x[:, beam:-1] for x in self.masses.unbind(1))
        self.real_total = self.total[:, :-1]
        # positions of (slot k, no column): adding (column - C) gives those of (slot k, column)
        self.row_ends = torch.arange(1, beam + 1, device=device) * (pairs.columns + 1) + pairs.columns
        self.column_minus_count = torch.arange(-pairs.columns, 0, device=device)


class FrameStep:
    """Extend, merge and prune a beam by one frame, in place.

    Args:
        beam: the beam.
        pieces: V.
        score_beam: slots this far (nats) below the best die; None: none do.
    """

    def __init__(self, beam: Beam, pieces: int, score_beam: Optional[float]) -> None:
        self.beam, self.score_beam = beam, score_beam
        device = beam.lens.device
        self.keys = hash_keys(pieces, device)
        self.one_to_beam = torch.arange(1, beam.arena.beam + 1, dtype=torch.float32, device=device)
        self._columns = torch.zeros(beam.arena.batch, pieces, dtype=torch.int64, device=device)

    def stay(self, frame: Frame, out: Candidates) -> tuple[Tensor, Tensor]:
        """Score all prefixes that stay, their parents' extensions merged in.

        Returns:
            last_score [B, K]: score of each slot's last piece; parent_slots [B, K] (1 + slot, 0 for none).
        """
        beam = self.beam
        last_score = frame.row.gather(1, beam.last).add_(frame.shift)
        parent_slots = self.parent_slots()
        incoming = beam.carried.gather(1, parent_slots + beam.integers[:, REPEATS])
        nonblank = torch.logaddexp(beam.log_nonblank, incoming)
        torch.add(nonblank, last_score, out=out.stay_nonblank)
        torch.add(beam.log_total, frame.blank, out=out.stay_blank)
        torch.logaddexp(out.stay_blank, out.stay_nonblank, out=out.stay_total)
        return last_score, parent_slots

    def extend(self, frame: Frame, out: Candidates, last_score: Tensor, parent_slots: Tensor) -> None:
        """Score all extensions; those that are in the beam already are struck out (stay has merged them)."""
        pairs = out.pairs
        torch.add(self.beam.log_total.index_select(1, pairs.slot), frame.pair_score, out=out.new_total)
        column = self._last_column(frame, out)
        repeat = pairs.position[out.row_ends + column]
        out.total.scatter_(1, repeat, self.beam.log_blank + last_score)
        self._strike(out, parent_slots, column)
        out.new_nonblank.copy_(out.new_total)

    def strike_out(self, frame: Frame, out: Candidates, parent_slots: Tensor) -> None:
        """Strike out the extensions that are in the beam already."""
        self._strike(out, parent_slots, self._last_column(frame, out))

    def _last_column(self, frame: Frame, out: Candidates) -> Tensor:
        """Return [B, K] the column of each slot's last piece, minus C; 0 if it is not among the columns."""
        # a table of all pieces, filled and cleared again: cheaper than comparing K x C pieces
        self._columns.scatter_(1, frame.piece, out.column_minus_count.expand_as(frame.piece))
        column = self._columns.gather(1, self.beam.last)
        self._columns.scatter_(1, frame.piece, 0)
        return column

    def _strike(self, out: Candidates, parent_slots: Tensor, column: Tensor) -> None:
        pairs = out.pairs
        merged = pairs.position[parent_slots * (pairs.columns + 1) + (pairs.columns + column)]
        out.total.scatter_(1, merged, _NEVER)

    def prune(self, frame: Frame, out: Candidates, scores: Tensor, children: Optional[Children] = None,
              ) -> tuple[Tensor, Tensor, Tensor]:
        """Keep the K best candidates by ``scores`` [B, K + P], best first.

        Args:
            children: where the extensions' masses come from, if mass is recovered.

        Returns:
            chosen [B, K] positions, source [B, K] slots, grew [B, K] bool (of slots that live).
        """
        beam, pairs = self.beam, out.pairs
        values, chosen = scores.topk(out.beam, dim=1)
        source = pairs.source[chosen]
        grew = chosen >= out.beam
        piece = frame.piece.gather(1, pairs.piece_column[chosen]) if pairs.columns else beam.last
        dead = values == _NEVER
        if self.score_beam is not None:
            running = frame.shift > _NEVER  # an utterance that has ended keeps what it has
            dead |= (values < values[:, :1] - self.score_beam) & running
        grew_alive = grew & ~dead
        masses = out.masses.gather(2, chosen.unsqueeze(1).expand(-1, 3, -1))
        if children is not None:
            for mass, split in zip((masses[:, 1], masses[:, 2]), children.split(chosen, out.beam)):
                mass.copy_(torch.where(grew_alive, split, mass))
        if self.score_beam is not None:
            masses = masses.masked_fill(dead.unsqueeze(1), _NEVER)
        self._follow(source, piece, grew)
        beam.hash.masked_fill_(dead, DEAD_HASH)  # nobody's parent and nobody's child
        beam.parent_hash.masked_fill_(dead, NO_PARENT_HASH)
        beam.log_total.copy_(masses[:, 0])
        beam.log_blank.copy_(masses[:, 1])
        beam.log_nonblank = masses[:, 2]
        return chosen, source, grew_alive

    def parent_slots(self) -> Tensor:
        """Return 1 + the slot that holds each prefix's parent, 0 if none does: [B, K] int64.

        Prefixes are compared by a 64-bit hash of their pieces, not by node: a parent that was pruned and is
        born again has another node but the same hash.
        """
        linked = self.beam.parent_hash.unsqueeze(2) == self.beam.hash.unsqueeze(1)
        # at most one slot is the parent, so a product finds it (and is faster than a maximum)
        return torch.matmul(linked.to(self.one_to_beam.dtype), self.one_to_beam).to(torch.int64)

    def _follow(self, source: Tensor, piece: Tensor, grew: Tensor) -> None:
        """Let each slot become what slot ``source`` was, extended by ``piece`` where it ``grew``."""
        beam = self.beam
        before = beam.integers.gather(2, source.unsqueeze(1).expand(-1, 5, -1))
        node, last, content = before[:, NODE], before[:, LAST], before[:, HASH]
        after = torch.empty_like(before)
        after[:, NODE] = beam.arena.add_row(node, piece)
        after[:, LAST] = piece
        # multiply, then exclusive-or: no polynomial identity makes two different prefixes collide
        torch.bitwise_xor(content * HASH_FACTOR, self.keys[piece], out=after[:, HASH])
        after[:, PARENT_HASH] = content
        torch.mul(last == piece, beam.arena.beam + 1, out=after[:, REPEATS])
        beam.integers = torch.where(grew.unsqueeze(1), after, before)

    def restart(self, after_skip: Tensor) -> None:
        """Let all alignments of the utterances [B, 1] bool that just skipped frames end in blank."""
        beam = self.beam
        beam.log_blank.copy_(torch.where(after_skip, beam.log_total, beam.log_blank))
        beam.log_nonblank = beam.log_nonblank.masked_fill(after_skip, _NEVER)

    def rescale(self, which: Tensor) -> None:
        """Make the best mass 0 in utterances [B] bool and put the difference into ``beam.offset``."""
        beam = self.beam
        best = beam.log_total.amax(1).masked_fill_(~which, 0.0)
        beam.carried -= best.unsqueeze(1)
        beam.log_nonblank = beam.log_nonblank - best.unsqueeze(1)
        beam.offset += best

    def sort(self) -> Tensor:
        """Sort the slots by score, best first (ties in place, dead slots last); return their order [B, K].

        The fusions' lm, words and state stay where they are: they follow once a frame (``permute_scores``).
        """
        beam = self.beam
        scores = beam.score.masked_fill(~beam.alive, _NEVER)
        order = scores.sort(dim=1, descending=True, stable=True).indices
        beam.integers = beam.integers.gather(2, order.unsqueeze(1).expand(-1, 5, -1))
        beam.log_total.copy_(beam.log_total.gather(1, order))
        beam.log_blank.copy_(beam.log_blank.gather(1, order))
        beam.log_nonblank = beam.log_nonblank.gather(1, order)
        beam.fused = beam.fused.gather(1, order)
        return order


def ranked(mass: Tensor, fused: Tensor) -> Tensor:
    """Return log mass and language model scores together; what is dead stays so, whatever it carries."""
    return (mass + fused).masked_fill(mass == -torch.inf, -torch.inf)
