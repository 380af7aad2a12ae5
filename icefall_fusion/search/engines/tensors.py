"""The prefix search by tensors, on any device and with any fusion: one Python iteration a frame.
Knows: the order of work in a frame, blocks of frames. Must not know: which language model it is.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Iterator, Optional

import torch
from torch import Tensor

from icefall_fusion.search.beam import ROUNDING, Beam
from icefall_fusion.search.engines.base import RESCALE_EVERY, FramePlan, columns_kept, columns_needed
from icefall_fusion.search.engines.candidates import best_pieces, make_pairs, prepare_frames
from icefall_fusion.search.engines.children import Children
from icefall_fusion.search.engines.extension_scores import ExtensionScores
from icefall_fusion.search.engines.frame_step import Candidates, Frame, FrameStep, ranked
from icefall_fusion.search.fusion import FusionSet

if TYPE_CHECKING:
    from icefall_fusion.search.search_input import PrefixSearchOptions, SearchInput

_BLOCK = 48  # frames prepared at once: large enough to amortize calls, small enough to stay in cache


class TensorSearch:
    """One search over one batch: blocks of frames, and in each frame extend, merge, prune, fuse.

    Which pieces may extend: without shallow fusion the few pairs of slot and piece that the proof in
    candidates.py leaves; with it, all pieces that could survive if the language model were certain of them.
    """

    def __init__(self, inputs: SearchInput, plan: FramePlan, beam: Beam, options: PrefixSearchOptions,
                 fusions: FusionSet) -> None:
        self.fusions, self.blank, self.beam = fusions, inputs.blank, beam
        self.see(plan, inputs.live)
        batch, _, pieces = self.log_probs.shape
        device = self.log_probs.device
        self.limit = options.most_columns(pieces)
        self.step = FrameStep(beam, pieces, options.score_beam)
        self.extensions = ExtensionScores(fusions, beam)
        self.widens = bool(fusions.shallow) and fusions.ranks
        self.wide: dict[int, Candidates] = {}
        slack: Optional[int] = fusions.slack(options.beam)
        self.children: Optional[Children] = None
        if options.recover_mass:
            self.widens = False
            columns, slack = columns_kept(options.beam, self.limit), None
            self.children = Children(self.beam, pieces, columns)
        else:
            columns = 0 if self.widens else columns_needed(options.beam, self.limit, slack)
        self.out = Candidates(batch, make_pairs(options.beam, columns, slack, device), options.beam, device)

    rule = None  # it asks the fusions after each frame

    def steps(self) -> Iterator[None]:
        """Search all frames in one step (see `CompiledSearch.steps`)."""
        self.run()
        yield from ()

    def see(self, plan: FramePlan, live: Tensor) -> None:
        """Take in all frames, and which of them are within the utterances [B, T] bool."""
        self.log_probs, self.best, self.searched = plan.log_probs, plan.best, plan.searched
        self.restarts, self.live = plan.restarts, live
        done = self.searched.cumsum(1) - 1
        due = self.searched & (done > 0) & (done % RESCALE_EVERY == 0)  # scores go back to around 0
        self.rescale = {t: due[:, t] for t in due.any(0).nonzero().flatten().tolist()}

    def run(self) -> None:
        """Search all frames; the fusions act after each."""
        self.run_frames(0, self.log_probs.shape[1])

    def run_frames(self, first: int, last: int) -> None:
        """Do the same with the frames from ``first`` up to ``last``."""
        for start in range(first, last, _BLOCK):
            stop = min(start + _BLOCK, last)
            block = slice(start, stop)
            ready = prepare_frames(self.log_probs[:, block], self.best[:, block], self.searched[:, block],
                                   self.blank, self.out.pairs)
            for frame, *scores in zip(range(start, stop), *(x.unbind(0) for x in ready)):
                self._search_frame(frame, Frame(self.log_probs[:, frame], *scores))

    def _search_frame(self, number: int, frame: Frame) -> None:
        beam, step, fusions = self.beam, self.step, self.fusions
        beam.frame = number
        if number in self.rescale:
            step.rescale(self.rescale[number])
        if self.restarts is not None:
            step.restart(self.restarts[number])
            if self.children is not None:
                self.children.restart(self.restarts[number])
        order = None
        if fusions.disordered and not self.widens and self.children is None:
            order = step.sort()
        out = self.out
        last_score, parent_slots = step.stay(frame, out)
        active = None
        if fusions.shallow:
            active = self.searched[:, number]
            if self.widens:
                frame, out, active = self._widen(frame, active)
        if self.children is not None:
            self.children.extend(frame, out, parent_slots)
            step.strike_out(frame, out, parent_slots)
        else:
            step.extend(frame, out, last_score, parent_slots)
        scores = self.extensions.rank(out, frame.piece, active)
        chosen, source, grew = step.prune(frame, out, scores, self.children)
        if self.children is not None:
            self.children.follow(source, chosen >= out.beam)
        if fusions.members:
            moved_from = source if order is None else order.gather(1, source)
            self.extensions.follow(out, chosen, source, grew, moved_from)
            fusions.fuse(beam, number, self.live[:, number])

    def _widen(self, frame: Frame, active: Tensor) -> tuple[Frame, Candidates, Tensor]:
        """Choose the pieces that could enter the beam if shallow fusion were certain of them (exact)."""
        beam, stays = self.beam, self.out
        scores = frame.row + frame.shift  # [B, V]
        scores[:, self.blank] = -torch.inf
        worst = ranked(stays.stay_total, beam.fused).amin(1)
        best = beam.score.masked_fill(~beam.alive, -torch.inf).amax(1)
        needed = worst - best - self.extensions.ceiling - ROUNDING
        counts = ((scores >= needed.unsqueeze(1)) & (scores > -torch.inf)).sum(1)
        active = active & (counts > 0)
        count = int((counts * active).max())  # the one wait for the device
        count = min(self.limit, -(-count // 8) * 8)  # few different sizes
        if count == 0:
            return frame, stays, active
        if count not in self.wide:
            pairs = make_pairs(stays.beam, count, None, scores.device)
            self.wide[count] = Candidates(scores.shape[0], pairs, stays.beam, scores.device)
        out = self.wide[count]
        out.masses[:, :, : out.beam] = stays.masses[:, :, : out.beam]
        score, piece = best_pieces(scores, count)
        return frame._replace(piece=piece, score=score, pair_score=score.repeat(1, out.beam)), out, active
