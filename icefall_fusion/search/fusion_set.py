"""All fusions of one search together: checked once, moved with the slots, called in turn.
Knows: fusions, beams, stop rules. Must not know: which language model it is, log-probs of frames.
"""
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Optional, Sequence

from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.search.beam import Beam
from icefall_fusion.search.fusion import Fusion
from icefall_fusion.search.stop_rule import StopRule

if TYPE_CHECKING:
    from icefall_fusion.ngram.piece_ngram import PieceNgram
    from icefall_fusion.text.tokens import AcousticTokens

#: Names of scores that an N-best list has of its own.
RESERVED_SOURCES = ("ctc", "words", "total")


class FusionSet:
    """The fusions of one search.

    Attributes:
        members: in the order of their columns in the beam; shallow: those that score extensions.
        ranks: some weight or bonus is not 0, so that the order of the slots is not that of their CTC mass.
        disordered: a fusion has touched the scores since the last pruning left the slots sorted.

    Raises:
        ValueError: two fusions share a source, a source is reserved, a weight is negative or not finite, or a
            word bonus is asked for without a vocabulary.
    """

    def __init__(self, fusions: Sequence[Fusion], tokens: Optional[AcousticTokens]) -> None:
        self.members, self.tokens = list(fusions), tokens
        for fusion in self.members:
            check_fusion(fusion)
            check(tokens is not None or fusion.word_bonus == 0, f"fusion {fusion.source!r}: word_bonus",
                  "be 0 when the search has no tokens", fusion.word_bonus)
        sources = [fusion.source for fusion in self.members]
        check(len(set(sources)) == len(sources), "fusions", "have sources that differ", sources)
        self.ranks = any(fusion.weight != 0 or fusion.word_bonus != 0 for fusion in self.members)
        self.shallow = [fusion for fusion in self.members if fusion.scores_extensions]
        self.disordered = False

    def shallow_ngram(self) -> Optional[PieceNgram]:
        """Return the n-gram if the shallow fusion is that of one n-gram over pieces alone."""
        return self.shallow[0].piece_ngram if len(self.shallow) == 1 else None

    def slack(self, beam: int) -> int:
        """Return by how many ranks language models may change who is among the best K (see candidates.py)."""
        return beam - 1 if self.ranks else 0

    def begin(self, beam: Beam, ids: Sequence[str]) -> None:
        """Start every fusion."""
        for index, fusion in enumerate(self.members):
            fusion.begin(beam, index, self.tokens, ids)

    def stop_rule(self) -> Optional[StopRule]:
        """Return the rule of all fusions together, None if there is no common one; known after `begin`."""
        rules = [fusion.stop_rule() for fusion in self.members]
        stopping = [rule for rule in rules if rule is None or rule.every or rule.ahead is not None]
        if len(stopping) > 1:
            return None
        return stopping[0] if stopping else StopRule(0)

    def carry(self, beam: Beam, moved_from: Tensor, gains: Sequence[Tensor],
              opened: Optional[Tensor]) -> None:
        """Move raw scores, words and states, not ``fused``, and add what slots have gained by growing.

        Args:
            moved_from: [B, K] slots as the fusions knew them when they were last called.
            gains: raw score [B, K] of each shallow fusion, 0 where a slot did not grow.
            opened: [B, K] words begun; None: there are no words.
        """
        beam.permute_scores(moved_from)
        for fusion, gain in zip(self.shallow, gains):
            beam.lm[..., fusion.index] += gain
            if opened is not None:
                beam.words[..., fusion.index] += opened

    def advance(self, beam: Beam, moved_from: Tensor, grew: Tensor) -> None:
        """Let the fusions follow a frame in which slots have moved or grown."""
        for fusion in self.members:
            fusion.advance(beam, moved_from, grew)

    def fuse(self, beam: Beam, frame: int, active: Tensor) -> None:
        """Let the delayed fusions act, and note whether the slots may be out of order afterwards."""
        changed = [fusion.fuse(beam, frame, active) for fusion in self.members]
        self.disordered = self.ranks and any(changed)

    def fuse_now(self, beam: Beam, fires: Tensor) -> None:
        """Let the fusion that has stopped utterances [B] bool score them."""
        for fusion in self.members:
            rule = fusion.stop_rule()
            if rule is not None and rule.every:
                fusion.fuse_now(beam, fires)

    def finish(self, beam: Beam) -> None:
        """Let every fusion score what is left."""
        for fusion in self.members:
            fusion.finish(beam)


def check_fusion(fusion: Fusion) -> None:
    """Refuse a fusion with a bad source, weight or bonus.

    Raises:
        ValueError: see `FusionSet`.
    """
    source, name = fusion.source, f"{type(fusion).__name__}."
    good = bool(source) and source not in RESERVED_SOURCES
    check(good, name + "source", f"be a name, none of {list(RESERVED_SOURCES)}", source)
    good = math.isfinite(fusion.weight) and fusion.weight >= 0
    check(good, name + "weight", "be finite and at least 0", fusion.weight)
    check(math.isfinite(fusion.word_bonus), name + "word_bonus", "be finite", fusion.word_bonus)
