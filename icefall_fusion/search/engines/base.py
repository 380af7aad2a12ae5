"""A search that keeps its own state and runs many frames in one call; how it and the fusions take turns.
Knows: beams, the pace of fusions. Must not know: how a frame is searched, which language model takes part.

Where the fusions tell their pace (stop_rule.py), each utterance runs on to its own next stop; then all that
have stopped are scored in one call, whatever their frames. Else all utterances go frame by frame. Both find
the same, for no result of an utterance depends on the others.
"""
from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from icefall_fusion.ngram.piece_ngram import PieceNgram
from icefall_fusion.search.beam import Beam
from icefall_fusion.search.fusion_set import JointFusion
from icefall_fusion.search.stop_rule import Ahead, Pace


def lacks(joint: JointFusion) -> str:
    """Return what such a search lacks for the fusions, "" if nothing: it has shallow fusion of one n-gram."""
    if not joint.shallow or [ngram_of(fusion) is not None for fusion in joint.shallow] == [True]:
        return ""
    names = ", ".join(fusion.source for fusion in joint.shallow)
    return f"it has no shallow fusion but that of one n-gram over pieces ({names})"


def ngram_of(fusion: Any) -> Optional[PieceNgram]:
    """Return the n-gram that a fusion's extension scores are those of, if there is one."""
    return getattr(fusion, "piece_ngram", None)


class EngineSearch:
    """One search over one batch; `_search` is the engine's own.

    Args:
        beam: at the root.
        live: [B, T] bool, frames within the utterances.
        joint: fusions of which it `lacks` nothing.

    Attributes:
        ngram: of the shallow fusion, or None; weights: of its natural log, and of a word that begins.
    Attributes (of the slots [B, K], since the last stop):
        moved_from: int64, slots they come from; grew: bool; opened: int64, words begun; gain: float, raw
        score of the n-gram; given: float, the look-ahead's part of ``beam.fused``.
    Attributes (of the utterances [B]):
        at: int64, frames searched; fired: bool, whether the pace has stopped them; both on the host.
    """

    def __init__(self, beam: Beam, live: Tensor, joint: JointFusion) -> None:
        self.beam, self.joint, self.live, self.frames = beam, joint, live, live.shape[1]
        self.pace = joint.pace()
        self.ahead = (self.pace and self.pace.ahead) or Ahead(None, 0.0, 0.0, 1)
        self.ngram: Optional[PieceNgram] = None
        self.weights = 0.0, 0.0
        if joint.shallow:
            [fusion] = joint.shallow
            self.ngram, self.weights = ngram_of(fusion), (fusion.weight, fusion.word_bonus)
        batch, device, shape = beam.arena.batch, beam.lens.device, beam.node.shape
        self.moved_from, self.opened = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in "12")
        self.grew = torch.zeros(shape, dtype=torch.bool, device=device)
        self.gain, self.given = (torch.zeros(shape, device=device) for _ in "12")
        self.at, self.fired = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.bool)
        self._ends = beam.lens.cpu()

    @property
    def stops(self) -> Pace:
        """When utterances stop; never where they go frame by frame."""
        return self.pace or Pace(0)

    def run(self) -> None:
        """Search all frames; the fusions act at their pace, or after each."""
        if self.pace is not None:
            self._run_at_their_pace()
        else:
            self._run_frame_by_frame()

    def _search(self, until: int) -> None:
        """Let all go on, before frame ``until`` or to where the pace stops them.

        Brings ``beam`` to where they stand, ``beam.fused`` included, and sets all attributes.
        """
        raise NotImplementedError

    def _run_at_their_pace(self) -> None:
        beam, joint, going = self.beam, self.joint, True
        while going:
            standing = self.at[self.at < self._ends]
            before = int(standing.min()) if len(standing) else self.frames
            self._search(self.frames)
            beam.arena.reach(before + 1, int(self.at.max()) + 1)
            going = bool((self.at < self._ends).any())
            joint.carry(beam, self.moved_from, self._gains(), self.opened)
            if bool(self.fired.any()):
                joint.fuse_now(beam, self.fired.to(beam.lens.device))
        beam.frame = self.frames - 1
        beam.fused -= self.given  # `finish` scores all that is not scored yet

    def _run_frame_by_frame(self) -> None:
        beam, joint = self.beam, self.joint
        stay = torch.arange(self.moved_from.shape[1], device=self.moved_from.device)
        for frame, live in enumerate(self.live.unbind(1)):
            beam.frame = frame
            self._search(frame + 1)
            beam.arena.reach(frame + 1, frame + 2)
            if bool((self.grew | (self.moved_from != stay)).any()):
                joint.carry(beam, self.moved_from, self._gains(), self.opened)
                joint.advance(beam, self.moved_from, self.grew)
            joint.fuse(beam, frame, live)

    def _gains(self) -> list[Tensor]:
        return [self.gain] if self.joint.shallow else []
