"""A search that keeps its own state and runs many frames in one call; how it and the fusions take turns.
Knows: beams, the fusions' stop rule. Must not know: how a frame is searched, which language model it is.

Where the fusions have a stop rule (stop_rule.py), each utterance runs on to its own next stop; then all that
have stopped are scored in one call, whatever their frames. Else all utterances go frame by frame. Both find
the same, for no result of an utterance depends on the others.
"""
from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from icefall_fusion.ngram.piece_ngram import PieceNgram
from icefall_fusion.search.beam import Beam
from icefall_fusion.search.fusion_set import FusionSet
from icefall_fusion.search.stop_rule import AheadTerms, StopRule


class CompiledSearch:
    """One search over one batch; `_search` is the engine's own.

    Args:
        beam: at the root.
        live: [B, T] bool, frames within the utterances.
        fusions: whose shallow fusion, if any, is that of one n-gram.

    Attributes:
        ngram: of the shallow fusion, or None; weights: of its natural log, and of a word that begins.
    Attributes (of the slots [B, K], since the last stop):
        moved_from: int64, slots they come from; grew: bool; opened: int64, words begun; gain: float32, raw
        score of the n-gram; estimate: float32, the look-ahead's part of ``beam.fused``.
    Attributes (of the utterances [B]):
        at: int64, frames searched; fired: bool, whether the rule has stopped them; both on the host.
    """

    def __init__(self, beam: Beam, live: Tensor, fusions: FusionSet) -> None:
        self.beam, self.fusions, self.live, self.frames = beam, fusions, live, live.shape[1]
        self.rule = fusions.stop_rule()
        self.ahead = (self.rule and self.rule.ahead) or AheadTerms(None, 0.0, 0.0, 1)
        self.ngram: Optional[PieceNgram] = fusions.shallow_ngram()
        self.weights = 0.0, 0.0
        if self.ngram is not None:
            self.weights = fusions.shallow[0].weight, fusions.shallow[0].word_bonus
        batch, device, shape = beam.arena.batch, beam.lens.device, beam.node.shape
        self.moved_from, self.opened = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in "12")
        self.grew = torch.zeros(shape, dtype=torch.bool, device=device)
        self.gain, self.estimate = (
            torch.zeros(shape, dtype=torch.float32, device=device) for _ in "12"
        )
        self.at, self.fired = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.bool)
        self._ends = beam.lens.cpu()

    @property
    def stops(self) -> StopRule:
        """When utterances stop; never where they go frame by frame."""
        return self.rule or StopRule(0)

    def run(self) -> None:
        """Search all frames; the fusions act where their rule stops utterances, or after each frame."""
        if self.rule is not None:
            self._run_to_stops()
        else:
            self._run_frame_by_frame()

    def _search(self, until: int) -> None:
        """Let all go on, before frame ``until`` or to where the rule stops them.

        Brings ``beam`` to where they stand, ``beam.fused`` included, and sets all attributes.
        """
        raise NotImplementedError

    def _run_to_stops(self) -> None:
        beam, fusions, going = self.beam, self.fusions, True
        while going:
            standing = self.at[self.at < self._ends]
            before = int(standing.min()) if len(standing) else self.frames
            self._search(self.frames)
            beam.arena.reach(before + 1, int(self.at.max()) + 1)
            going = bool((self.at < self._ends).any())
            fusions.carry(beam, self.moved_from, self._gains(), self.opened)
            if bool(self.fired.any()):
                fusions.fuse_now(beam, self.fired.to(beam.lens.device))
        beam.frame = self.frames - 1
        beam.fused -= self.estimate  # `finish` scores all that is not scored yet

    def _run_frame_by_frame(self) -> None:
        beam, fusions = self.beam, self.fusions
        stay = torch.arange(self.moved_from.shape[1], device=self.moved_from.device)
        for frame, live in enumerate(self.live.unbind(1)):
            beam.frame = frame
            self._search(frame + 1)
            beam.arena.reach(frame + 1, frame + 2)
            if bool((self.grew | (self.moved_from != stay)).any()):
                fusions.carry(beam, self.moved_from, self._gains(), self.opened)
                fusions.advance(beam, self.moved_from, self.grew)
            fusions.fuse(beam, frame, live)

    def _gains(self) -> list[Tensor]:
        return [self.gain] if self.ngram is not None else []
