"""Frames to search, and the base class of engines that run many frames in one call.
Knows: beams, the fusions' stop rule. Must not know: how a frame is searched, which language model it is.

Where the fusions have a stop rule (fusion.py), each utterance runs on to its own next stop; then all that
have stopped are scored in one call, whatever their frames. Else all utterances go frame by frame. Both find
the same, for no result of an utterance depends on the others.
"""
from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Iterator, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from icefall_fusion.search.beam import Beam
from icefall_fusion.search.fusion import AheadTerms, FusionSet, StopRule

if TYPE_CHECKING:
    from icefall_fusion.search.search_input import SearchInput

RESCALE_EVERY = 64  # searched frames; the best path's own score is already taken out of every frame


class FramePlan(NamedTuple):
    """The n frames that are searched, with restarts.

    log_probs: [B, n, V]; best: [B, n]; searched: [B, n] bool (False: padding or skipped).
    map: [B, n] real frame of each, or None where all frames are there.
    restarts: n columns [B, 1] bool (frames were left out just before: a piece may repeat), or None.
    """

    log_probs: Tensor
    best: Tensor
    searched: Tensor
    map: Optional[Tensor]
    restarts: Optional[Sequence[Tensor]]


def plan_frames(inputs: SearchInput, blank_skip: Optional[float], leave_out: bool) -> FramePlan:
    """Decide which frames are skipped, and leave them out altogether if nothing needs to keep step with time.

    Args:
        blank_skip: skip frames whose blank probability exceeds this; None: none.
        leave_out: pack the frames that are left (else skipped ones stay, marked as not searched).
    """
    log_probs, best, searched = inputs.log_probs, inputs.best, inputs.live
    frame_map: Optional[Tensor] = None
    restarts: Optional[Sequence[Tensor]] = None
    if blank_skip is not None:
        searched = searched & ~(log_probs[..., inputs.blank].exp() > blank_skip)
        if leave_out and searched.numel():
            kept = int(searched.sum(1).max())
            # searched frames first, in order of time
            frame_map = (~searched).to(torch.int8).sort(dim=1, stable=True).indices[:, :kept]
            searched, best = searched.gather(1, frame_map), best.gather(1, frame_map)
            log_probs = log_probs[torch.arange(len(log_probs), device=best.device).unsqueeze(1), frame_map]
            gaps = torch.diff(frame_map, dim=1, prepend=torch.full_like(frame_map[:, :1], -1)) > 1
            restarts = (gaps & searched).unsqueeze(2).unbind(1)
    return FramePlan(log_probs, best, searched, frame_map, restarts)


@functools.lru_cache(maxsize=16)
def hash_keys(pieces: int, device: torch.device) -> Tensor:
    """Return [V] int64 random numbers, one a piece, always the same; nobody writes to them."""
    generator = torch.Generator().manual_seed(20250109)
    return torch.randint(-(2**62), 2**62, (pieces,), generator=generator).to(device)


def columns_needed(beam: int, limit: int, slack: int) -> int:
    """Return C <= ``limit``, the best non-blank pieces to try (``j <= K + slack`` in candidates.py)."""
    return min(beam + slack + 1, limit)


def columns_kept(beam: int, limit: int) -> int:
    """Return C <= ``limit``, the candidate pieces of a frame when mass is recovered."""
    return min(limit, max(beam + 2, 12))


class CompiledSearch:
    """One search over one batch; `_search` is the engine's own.

    Args:
        beam: at the root.
        live: [B, T] bool, frames within the utterances.
        fusions: whose shallow fusion, if any, is of n-grams or phrases.

    Attributes (of the slots [B, K], since the last stop):
        moved_from: int64, slots they come from; grew: bool; opened: int64, words begun; estimate: float32,
        the look-ahead's share of ``beam.fused``; gain: float32, raw score of each shallow fusion [S, B, K];
        states: int64 of that shape, what each keeps in ``beam.state``, or none.
    Attributes (where scores of a fusion with look-ahead come in late, `late_ahead`):
        landed: [B] bool, whether some have since the last stop; scored: [B, K] float32, the look-ahead's
        estimate of what they are for; totals: [rows, B, K] float32, the estimate of each arena node.
    Attributes (of the utterances [B]):
        at: int64, frames searched; fired: bool, whether the rule has stopped them; both on the host.
        late_at: int64, frames searched at the late stop of each, -1: there is none; on the host.
        ends: int64 on the device, frames before which each must stop anyway.
        before: the fewest frames searched of one that goes on.
    """

    def __init__(self, beam: Beam, live: Tensor, fusions: FusionSet) -> None:
        self.beam, self.fusions, self.live, self.frames = beam, fusions, live, live.shape[1]
        self.rule = fusions.stop_rule()
        self.ahead = (self.rule and self.rule.ahead) or AheadTerms(None, 0.0, 0.0, 1)
        batch, device, shape = beam.arena.batch, beam.lens.device, beam.node.shape
        self.moved_from, self.opened = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in "12")
        self.grew = torch.zeros(shape, dtype=torch.bool, device=device)
        self.estimate = torch.zeros(shape, dtype=torch.float32, device=device)
        self.gain = torch.zeros((len(fusions.shallow), *shape), dtype=torch.float32, device=device)
        self.states: Sequence[Tensor] = ()
        self.late_ahead = self.stops.late > 0 and self.ahead.ngram is not None
        self.landed, self.scored = torch.zeros_like(self.grew[:, 0]), torch.zeros_like(self.estimate)
        self.totals = self.estimate.new_zeros(0, *shape)
        self.at, self.fired = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.bool)
        self.before, self.late_at = 0, torch.full_like(self.at, -1)
        self._lens, self.ends = beam.lens.cpu(), beam.lens.clone(memory_format=torch.contiguous_format)

    @property
    def stops(self) -> StopRule:
        """When utterances stop; never where they go frame by frame."""
        return self.rule or StopRule(0)

    def run(self) -> None:
        """Search all frames; the fusions act where their rule stops utterances, or after each frame."""
        for _ in self.steps():
            pass

    def steps(self) -> Iterator[None]:
        """Do the same in steps, which end while a fusion waits for a model (see ``Fusion.in_steps``)."""
        if self.rule is not None:
            yield from self.run_to_stops()
            self.end()
        else:
            self._run_frame_by_frame()

    def _make_totals(self) -> None:
        """Have room in ``totals`` for all nodes of the arena."""
        shape = self.beam.arena.fields[0].shape
        if self.late_ahead and len(self.totals) < shape[0]:
            longer = self.estimate.new_zeros(shape)
            longer[: len(self.totals)] = self.totals
            self.totals = longer

    def _search(self, until: int) -> None:
        """Let all go on, before frame ``until`` or to where the rule stops them.

        Brings ``beam`` to where they stand, ``beam.fused`` included, and sets all attributes.
        """
        raise NotImplementedError

    def run_to_stops(self) -> Iterator[None]:
        """Search all frames that are there, in steps; more may come (see streaming.py)."""
        beam, fusions, late_at, going = self.beam, self.fusions, self.late_at, True
        while going:
            standing = self.at.numpy()[self.at.numpy() < self._lens.numpy()]
            self.before = int(standing.min()) if len(standing) else self.frames
            self._search(self.frames)
            if self.late_ahead:
                self.landed.zero_()
            at = self.at.numpy()
            beam.arena.reach(self.before + 1, int(at.max()) + 1)
            going = bool((at < self._lens.numpy()).any())
            fusions.carry(beam, self.moved_from, self.gain, self.opened)
            for fusion, states in zip(fusions.shallow, self.states):
                beam.state[..., fusion.index] = states
            lands = self.at == late_at
            if self.fired.numpy().any() or lands.numpy().any():
                yield from fusions.in_steps(beam, self.fired, lands)
                if beam.landed is not None:
                    rows, until = beam.landed
                    self.landed.copy_(rows)
                    self.scored.copy_(self.totals.view(-1)[until])
                    beam.landed = None
                if self.stops.late:
                    late_at[lands] = -1
                    late_at[self.fired] = self.at[self.fired] + self.stops.late
                    self._set_ends()

    def end(self) -> None:
        """Note that no frames follow."""
        self.beam.frame = self.frames - 1
        self.beam.fused -= self.estimate  # `finish` scores all that is not scored yet

    def set_lens(self, lens: Tensor) -> None:
        """Let utterances end at ``lens`` [B]: streams learn later of more frames."""
        self._lens = lens.cpu()
        self._set_ends()

    def _set_ends(self) -> None:
        ends = torch.where(self.late_at < 0, self._lens, torch.minimum(self._lens, self.late_at))
        self.ends.copy_(ends.pin_memory() if self.ends.is_cuda else ends, non_blocking=True)

    def _run_frame_by_frame(self) -> None:
        beam, fusions = self.beam, self.fusions
        stay = torch.arange(self.moved_from.shape[1], device=self.moved_from.device)
        for frame, live in enumerate(self.live.unbind(1)):
            beam.frame = frame
            self._search(frame + 1)
            beam.arena.reach(frame + 1, frame + 2)
            if bool((self.grew | (self.moved_from != stay)).any()):
                fusions.carry(beam, self.moved_from, self.gain, self.opened)
                fusions.advance(beam, self.moved_from, self.grew)
            fusions.fuse(beam, frame, live)
