"""All language models of a search together: what they add to the ranking, and when they are called.
Knows: the Fusion protocol, beams, candidates. Must not know: which language model it is, log-probs of frames.
"""
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Optional, Sequence

import torch
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.search.beam import Beam, Fusion
from icefall_fusion.search.engines.frame_step import Candidates
from icefall_fusion.search.stop_rule import Pace

if TYPE_CHECKING:
    from icefall_fusion.text.tokens import AcousticTokens

_RESERVED = ("ctc", "words", "total")
ROUNDING = 1e-3  # nats; more than the rounding of sums of scores


class JointFusion:
    """The fusions of one search.

    Attributes:
        ranks: some weight or bonus is not 0, so that the order of the slots is not that of their CTC mass.
        extends: some fusion scores extensions (shallow fusion); known after ``begin``.
        disordered: a fusion has touched the scores since the last pruning left the slots sorted.

    Raises:
        ValueError: two fusions share a source, a source is reserved, a weight is negative or not finite, or a
            word bonus is asked for without a vocabulary.
    """

    def __init__(self, fusions: Sequence[Fusion], tokens: Optional[AcousticTokens]) -> None:
        self.fusions, self.tokens = list(fusions), tokens
        for fusion in self.fusions:
            name = f"fusion {fusion.source!r}: "
            check(fusion.source not in _RESERVED, "fusion.source", f"differ from {_RESERVED}", fusion.source)
            check(math.isfinite(fusion.weight) and fusion.weight >= 0, name + "weight",
                  "be at least 0 and finite", fusion.weight)
            check(math.isfinite(fusion.word_bonus), name + "word_bonus", "be finite", fusion.word_bonus)
            check(tokens is not None or fusion.word_bonus == 0, name + "word_bonus",
                  "be 0 when the search has no tokens", fusion.word_bonus)
        sources = [fusion.source for fusion in self.fusions]
        check(len(set(sources)) == len(sources), "fusions", "have sources that differ", sources)
        self.ranks = any(fusion.weight != 0 or fusion.word_bonus != 0 for fusion in self.fusions)
        self.disordered = False
        self.shallow: list[Fusion] = []
        self._raw: list[Tensor] = []
        self._opens: Optional[Tensor] = None
        self._starts_word: Optional[Tensor] = None

    @property
    def extends(self) -> bool:
        return bool(self.shallow)

    @property
    def ceiling(self) -> float:
        """The most that all shallow fusions can add to an extension."""
        gains = [f.weight * getattr(f, "ceiling", 0.0) + max(0.0, f.word_bonus) for f in self.shallow]
        return sum(gains)

    def begin(self, beam: Beam, ids: Sequence[str]) -> None:
        """Start every fusion and learn which of them score extensions (one call with one piece)."""
        for index, fusion in enumerate(self.fusions):
            fusion.begin(beam, index, self.tokens, ids)
        self.shallow = []
        active = beam.lens > 0
        if not bool(active.any()):
            return
        piece = torch.full_like(beam.lens, 1 if beam.blank == 0 else 0).unsqueeze(1)  # [B, 1]
        self.shallow = [f for f in self.fusions if f.extension_scores(beam, piece, active) is not None]
        if self.tokens is not None:
            self._starts_word = torch.tensor(self.tokens.starts_word, device=beam.lens.device)

    def score(self, beam: Beam, out: Candidates, piece: Tensor, active: Tensor) -> Tensor:
        """Return what ranks the candidates, [B, K + P]: mass and language models together.

        Args:
            out: the candidates' masses; extensions of inactive utterances are struck out here.
            piece: [B, C] candidate pieces; active: [B] bool, see Fusion.extension_scores.
        """
        if not self.fusions:
            return out.real_total
        extra = beam.fused.index_select(1, out.pairs.slot)
        if self.shallow and out.pairs.columns:
            extra = self._extension_scores(beam, out, piece, active, extra)
        total = out.real_total
        if not self.ranks:
            return total
        scores = total + torch.cat([beam.fused, extra], dim=1)
        return scores.masked_fill(total == -torch.inf, -torch.inf)  # dead slots may carry anything

    def _extension_scores(self, beam: Beam, out: Candidates, piece: Tensor, active: Tensor,
                          extra: Tensor) -> Tensor:
        """Return ``extra`` [B, P] with what the shallow fusions add; strike out what cannot survive."""
        slot, column = out.pairs.slot, out.pairs.column
        active = self._ask(beam, out, active, extra)
        place = slot * out.pairs.columns + column
        at_root = (beam.last == beam.blank).index_select(1, slot)
        self._opens = None
        if self._starts_word is not None:
            self._opens = self._starts_word[piece].index_select(1, column) | at_root
        self._raw = []
        anyone = bool(active.any())  # waits for the device
        for fusion in self.shallow:
            raw = fusion.extension_scores(beam, piece, active) if anyone else torch.zeros_like(out.new_total)
            expected = (*beam.last.shape, piece.shape[1])
            if anyone:
                check(raw is not None and raw.shape == expected, f"extension_scores of {fusion.source!r}",
                      f"have shape {expected}", None if raw is None else tuple(raw.shape))
                raw = raw.to(extra.dtype).flatten(1).index_select(1, place)
            self._raw.append(raw)
            if fusion.weight != 0:
                extra = extra + fusion.weight * raw
            if fusion.word_bonus != 0:
                extra = extra + fusion.word_bonus * self._opens
        return extra

    def _ask(self, beam: Beam, out: Candidates, active: Tensor, extra: Tensor) -> Tensor:
        """Find the slots with an extension that could survive if the models were certain of it.

        Sets ``beam.asked`` [B, K], strikes out the extensions of all others, and returns [B] who has any.
        """
        if self.ranks:
            stays = out.stay_total + beam.fused
            worst = stays.masked_fill(out.stay_total == -torch.inf, -torch.inf).amin(1, keepdim=True)
            hopeful = out.new_total + extra + (self.ceiling + ROUNDING) >= worst
            hopeful &= (out.new_total > -torch.inf) & active.unsqueeze(1)
        else:  # the raw scores are recorded, whoever survives
            hopeful = (out.new_total > -torch.inf) & active.unsqueeze(1)
        asked = torch.zeros_like(beam.last).scatter_add_(1, out.pairs.slot.expand_as(hopeful), hopeful.long())
        beam.asked = asked > 0
        out.masses[:, :, out.beam : -1].masked_fill_(~hopeful.unsqueeze(1), -torch.inf)
        return active & beam.asked.any(1)

    def follow(self, beam: Beam, out: Candidates, chosen: Tensor, source: Tensor, grew: Tensor,
               moved_from: Tensor) -> None:
        """Move all scores and states to their new slots and pay for extensions.

        Args:
            chosen: [B, K] candidate positions; source: [B, K] slots now; grew: [B, K] bool.
            moved_from: [B, K] slots as the fusions knew them after the last frame.
        """
        if not self.fusions:
            return
        gains, opened = [], None
        if self.shallow and out.pairs.columns:
            place = (chosen - out.beam).clamp_(min=0)
            opened = None if self._opens is None else grew & self._opens.gather(1, place)
            gains = [raw.gather(1, place).masked_fill_(~grew, 0.0) for raw in self._raw]
        self.move(beam, source, grew, moved_from, gains, opened)

    def move(self, beam: Beam, source: Tensor, grew: Tensor, moved_from: Tensor, gains: Sequence[Tensor],
             opened: Optional[Tensor]) -> None:
        """Move all scores and states to their new slots and pay what slots have gained by growing.

        Args:
            source, grew, moved_from: see `follow`.
            gains: raw score [B, K] of each shallow fusion, 0 where a slot did not grow.
            opened: [B, K] bool, slots that began a word; None: there are no words.
        """
        beam.fused = beam.fused.gather(1, source)
        for fusion, gain in zip(self.shallow, gains):
            if fusion.weight != 0:
                beam.fused += fusion.weight * gain
            if opened is not None and fusion.word_bonus != 0:
                beam.fused += fusion.word_bonus * opened
        self.carry(beam, moved_from, gains, opened)
        self.advance(beam, moved_from, grew)

    def carry(self, beam: Beam, moved_from: Tensor, gains: Sequence[Tensor],
              opened: Optional[Tensor]) -> None:
        """Move raw scores, words and states, not ``fused``, and add what slots have gained (see `move`)."""
        beam.permute_scores(moved_from)
        for fusion, gain in zip(self.shallow, gains):
            beam.lm[..., fusion.index] += gain
            if opened is not None:
                beam.words[..., fusion.index] += opened

    def advance(self, beam: Beam, moved_from: Tensor, grew: Tensor) -> None:
        """Let the fusions follow a frame in which slots have moved or grown."""
        for fusion in self.fusions:
            fusion.advance(beam, moved_from, grew)

    def pace(self) -> Optional[Pace]:
        """Return the pace of all fusions, if a search can keep it; known after ``begin``."""
        paces = [fusion.pace() if hasattr(fusion, "pace") else None for fusion in self.fusions]
        stopping = [pace for pace in paces if pace is None or pace.every or pace.ahead is not None]
        if len(stopping) > 1:
            return None
        return stopping[0] if stopping else Pace(0)

    def fuse_now(self, beam: Beam, fires: Tensor) -> None:
        """Let the fusion that has stopped utterances [B] bool score them."""
        for fusion in self.fusions:
            if fusion.pace().every:
                fusion.fuse_now(beam, fires)

    def fuse(self, beam: Beam, frame: int, active: Tensor) -> None:
        """Let the delayed fusions act, and see whether the slots may be out of order afterwards."""
        before, version = beam.fused, _version(beam.fused)
        for fusion in self.fusions:
            fusion.fuse(beam, frame, active)
        untouched = beam.fused is before and version is not None and _version(before) == version
        self.disordered = self.ranks and not untouched

    def finish(self, beam: Beam) -> None:
        """Let every fusion score what is left."""
        for fusion in self.fusions:
            fusion.finish(beam)


def _version(tensor: Tensor) -> Optional[int]:
    """Return how often a tensor was changed in place, None if that is not counted (inference mode)."""
    return None if tensor.is_inference() else tensor._version
