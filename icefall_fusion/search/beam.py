"""What a batched prefix beam search carries from frame to frame.
Knows: tensors, prefixes. Must not know: language models, tokenizers, the frame step.

Legend of dimensions (used all over the package):
    B utterances   K beam slots   T frames   V pieces (blank included)   C candidate pieces of a frame
    N tree or arena nodes   S fusions (index; in an LLM's cache: slots)   L layers of a language model
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor

from icefall_fusion.search.arena import PrefixArena
from icefall_fusion.search.shared_numbers import DEAD_HASH, HASH_FACTOR, NO_PARENT_HASH, ROOT_HASH

if TYPE_CHECKING:
    from icefall_fusion.search.search_input import SearchInput

_NODE, _LAST, _HASH, _PARENT_HASH, _REPEATS = range(5)  # rows of Beam's integers


class Beam:
    """The hypotheses of a batch between two frames; dense tensors, all on the device of the log-probs.

    Rows belong to utterances, columns to slots. A slot whose ``log_total`` is -inf is dead (``alive`` False)
    and its other values mean nothing. The search only moves these values (one gather a frame); where an
    extension and a stay meet in one prefix, the masses add and the stay's node, lm, words and state are kept.
    Slots are in no promised order while fusions take part.

    Attributes:
        arena: where prefixes are spelled out.
        node: [B, K] int64, arena node of each prefix.
        last: [B, K] int64, last piece (blank at the root).
        log_blank, log_nonblank: [B, K] float32, natural-log mass of the alignments that end in blank / not.
        log_total: [B, K] float32, their log-sum. These three are relative to ``offset`` of the utterance.
        offset: [B] float64; after the last frame ``log_total + offset`` is the absolute log-probability.
        lm: [B, K, S] float32, RAW (unweighted) natural-log score that fusion s has inputs.
        words: [B, K, S] int64, words whose bonus fusion s has paid.
        state: [B, K, S] int64, one integer of the fusion's own (its tree node).
        fused: [B, K] float32, ``sum_s weight_s * lm_s + word_bonus_s * words_s``. Whoever changes lm or words
            changes fused too. Look-ahead adds to it for a while; after ``finish`` it is this sum.
        lens: [B] int64, frames of each utterance; a row is frozen from its own end on.
        asked: [B, K] bool, while ``extension_scores`` is called: slots of which an extension could survive.
        frame: the frame just searched (-1 before the first; of no meaning in ``Fusion.fuse_now``).
        blank: id of blank.
    """

    def __init__(self, arena: PrefixArena, lens: Tensor, blank: int, fusions: int = 0) -> None:
        batch, beam, device = arena.batch, arena.beam, lens.device
        self.arena, self.lens, self.blank, self.frame = arena, lens, blank, -1
        # node, last, hash, parent_hash, repeats; see the properties
        self._ints = torch.zeros(batch, 5, beam, dtype=torch.int64, device=device)
        self._ints[:, _NODE] = arena.first_ids[:, :1]
        self._ints[:, _LAST] = blank
        self._ints[:, _HASH, 0] = ROOT_HASH
        self._ints[:, _PARENT_HASH] = NO_PARENT_HASH
        # [never, log_total of each slot | never, log_blank of each slot]: one gather finds the mass that an
        # extension of slot i carries over, at i + 1 or, if it repeats the last piece, K + 1 further; at 0:
        # none
        self._carried = torch.full((batch, 2 * (beam + 1)), -torch.inf, dtype=torch.float32, device=device)
        self._carried[:, 1] = self._carried[:, beam + 2] = 0.0
        self.log_nonblank = torch.full((batch, beam), -torch.inf, dtype=torch.float32, device=device)
        self.offset = torch.zeros(batch, dtype=torch.float64, device=device)
        self.asked = self.alive
        self.lm = torch.zeros(batch, beam, fusions, dtype=torch.float32, device=device)
        self.words = torch.zeros(batch, beam, fusions, dtype=torch.int64, device=device)
        self.state = torch.zeros(batch, beam, fusions, dtype=torch.int64, device=device)
        self.fused = torch.zeros(batch, beam, dtype=torch.float32, device=device)

    @classmethod
    def at_root(
        cls, inputs: SearchInput, beam: int, starts_word: Optional[Tensor] = None, fusions: int = 0
    ) -> Beam:
        """Return the beam of K = ``beam`` slots before the first frame of a batch, with an arena for all.

        Args:
            starts_word: [V] bool, where words are closed; see PrefixArena.
            fusions: S.
        """
        batch, frames, _ = inputs.log_probs.shape
        arena = PrefixArena(batch, beam, inputs.log_probs.device, starts_word, rows=frames + 1)
        return cls(arena, inputs.lens, inputs.blank, fusions)

    @property
    def node(self) -> Tensor:
        return self._ints[:, _NODE]

    @property
    def last(self) -> Tensor:
        return self._ints[:, _LAST]

    @property
    def hash(self) -> Tensor:
        """[B, K] int64, equal for equal prefixes of an utterance; 0 for a dead slot."""
        return self._ints[:, _HASH]

    @property
    def parent_hash(self) -> Tensor:
        """[B, K] int64, hash of the prefix without its last piece; no slot's for a root or a dead slot."""
        return self._ints[:, _PARENT_HASH]

    @property
    def log_total(self) -> Tensor:
        return self._carried[:, 1 : self.arena.beam + 1]

    @property
    def log_blank(self) -> Tensor:
        return self._carried[:, self.arena.beam + 2 :]

    @property
    def alive(self) -> Tensor:
        """[B, K] bool."""
        return self.log_total > -torch.inf

    @property
    def boundary(self) -> Tensor:
        """[B, K] int64, arena node of the closed part of each prefix."""
        return self.arena.boundary(self.node)

    @property
    def score(self) -> Tensor:
        """[B, K] float32, what ranks the slots: ``log_total + fused`` (relative to ``offset``)."""
        return self.log_total + self.fused

    def ranks(self) -> Tensor:
        """Return the slots of each utterance, best first: [B, K] int64; dead ones last, ties in place."""
        scores = self.score.masked_fill(~self.alive, -torch.inf)
        return scores.sort(dim=1, descending=True, stable=True).indices

    # -- what the search does with it
    def parent_slots(self, one_to_beam: Tensor) -> Tensor:
        """Return 1 + the slot that holds each prefix's parent, 0 if none does: [B, K] int64.

        Prefixes are compared by a 64-bit hash of their pieces, not by node: a parent that was pruned and is
        born again has another node but the same hash.

        Args:
            one_to_beam: [K] float, 1..K.
        """
        linked = self.parent_hash.unsqueeze(2) == self.hash.unsqueeze(1)
        # at most one slot is the parent, so a product finds it (and is faster than a maximum)
        return torch.matmul(linked.to(one_to_beam.dtype), one_to_beam).to(torch.int64)

    def carried_from(self, parent_slots: Tensor) -> Tensor:
        """Return [B, K] the mass that each prefix gets from its parent's slot, before its piece's score."""
        return self._carried.gather(1, parent_slots + self._ints[:, _REPEATS])

    def follow(self, source: Tensor, piece: Tensor, grew: Tensor, keys: Tensor) -> None:
        """Let each slot become what it came from, extended by ``piece`` where it ``grew``.

        Args:
            source: [B, K] slot of the prefix that stayed or was extended.
            piece: [B, K] piece of the extension (not read where the slot did not grow).
            grew: [B, K] bool.
            keys: [V] int64 random numbers, the hash keys.
        """
        before = self._ints.gather(2, source.unsqueeze(1).expand(-1, 5, -1))
        node, last, content = before[:, _NODE], before[:, _LAST], before[:, _HASH]
        after = torch.empty_like(before)
        after[:, _NODE] = self.arena.add_row(node, piece)
        after[:, _LAST] = piece
        # multiply, then exclusive-or: no polynomial identity makes two different prefixes collide
        torch.bitwise_xor(content * HASH_FACTOR, keys[piece], out=after[:, _HASH])
        after[:, _PARENT_HASH] = content
        torch.mul(last == piece, self.arena.beam + 1, out=after[:, _REPEATS])
        self._ints = torch.where(grew.unsqueeze(1), after, before)

    def restart(self, after_skip: Tensor) -> None:
        """Take blank as the last thing heard in the utterances [B, 1] bool that just skipped frames."""
        self.log_blank.copy_(torch.where(after_skip, self.log_total, self.log_blank))
        self.log_nonblank = self.log_nonblank.masked_fill(after_skip, -torch.inf)

    def rescale(self, which: Tensor) -> None:
        """Make the best mass 0 in utterances [B] bool and put the difference into ``offset``."""
        best = self.log_total.amax(1).masked_fill_(~which, 0.0)
        self._carried -= best.unsqueeze(1)
        self.log_nonblank = self.log_nonblank - best.unsqueeze(1)
        self.offset += best

    def bury(self, dead: Tensor) -> None:
        """Make dead slots [B, K] bool nobody's parent and nobody's child."""
        self.hash.masked_fill_(dead, DEAD_HASH)
        self.parent_hash.masked_fill_(dead, NO_PARENT_HASH)

    def permute(self, source: Tensor) -> None:
        """Re-order prefixes, masses and ``fused``: slot k becomes what slot ``source[b, k]`` was.

        The fusions' lm, words and state stay where they are: they follow once a frame (``permute_scores``).
        """
        self._ints = self._ints.gather(2, source.unsqueeze(1).expand(-1, 5, -1))
        self.log_total.copy_(self.log_total.gather(1, source))
        self.log_blank.copy_(self.log_blank.gather(1, source))
        self.log_nonblank = self.log_nonblank.gather(1, source)
        self.fused = self.fused.gather(1, source)

    def permute_scores(self, source: Tensor) -> None:
        """Re-order lm, words and state."""
        wide = source.unsqueeze(2).expand_as(self.lm)
        self.lm, self.words, self.state = (x.gather(1, wide) for x in (self.lm, self.words, self.state))
