"""Exact CTC prefix beam search, batched over utterances, with language models joining as it goes.
Knows: the order of work in a frame, options, blocks of frames. Must not know: which language model it is.
"""
from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, Optional, Sequence

import torch
from torch import Tensor

from icefall_fusion.checks import check, check_choice
from icefall_fusion.nbest import NBest
from icefall_fusion.search.beam import Beam, Fusion, PrefixArena
from icefall_fusion.search.candidates import (
    FramePlan,
    best_pieces,
    columns_needed,
    make_pairs,
    plan_frames,
    prepare_frames,
)
from icefall_fusion.search.children import Children, columns_kept
from icefall_fusion.search.device_search import DeviceSearch, why_not
from icefall_fusion.search.engine import serves
from icefall_fusion.search.export import export_nbests
from icefall_fusion.search.frame_step import Candidates, Frame, FrameStep, hash_keys
from icefall_fusion.search.joint import ROUNDING, JointFusion
from icefall_fusion.search.native import NativeSearch
from icefall_fusion.search.native_build import load_native
from icefall_fusion.search.search_input import SearchInput, check_input

if TYPE_CHECKING:
    from icefall_fusion.tokens import AcousticTokens

ENGINES = ("auto", "native", "triton", "torch")
_BLOCK = 48  # frames prepared at once: large enough to amortize calls, small enough to stay in cache


@dataclass(frozen=True)
class PrefixSearchOptions:
    """Options of the prefix beam search. The defaults are exact, given the beam.

    Args:
        beam: prefixes kept per utterance (K).
        top_pieces: only this many best pieces of a frame may extend a prefix; none: all (exact, no slower).
        score_beam: prefixes that score this many nats less than the best are dropped; none: no limit.
        blank_skip: frames whose blank probability exceeds this are taken as pure blank (a piece may repeat
            after them); between 0.5 and 1; none: no frame is skipped. 0.999 is harmless and faster.
        recover_mass: keep the forward masses of pruned children of live prefixes and give them back when such
            a prefix is born again: closer to the true probability, slower.
        nbest: hypotheses returned; none: all of the beam.
        frame_shift: seconds per frame, for word times.
        word_times: whether hypotheses carry word times.
        engine: native: compiled code, for a CPU and without shallow fusion but that of an n-gram (built by a
            C++ compiler on first use); triton: one kernel, for a GPU and without shallow fusion, recovered
            mass or a beam above 62; torch: tensors, for every device and fusion; auto: native or triton where
            it can be had and serves, else torch. All find the same.
    """

    beam: int = 10
    top_pieces: Optional[int] = None
    score_beam: Optional[float] = None
    blank_skip: Optional[float] = None
    recover_mass: bool = False
    nbest: Optional[int] = None
    frame_shift: float = 0.04
    word_times: bool = True
    engine: str = "auto"

    def __post_init__(self) -> None:
        name = "PrefixSearchOptions."
        check(_counts(self.beam), name + "beam", "be an integer, at least 1", self.beam)
        for field in ("top_pieces", "nbest"):
            value = getattr(self, field)
            check(value is None or _counts(value), name + field, "be none or an integer, at least 1", value)
        check(self.score_beam is None or self.score_beam > 0, name + "score_beam", "be none or above 0",
              self.score_beam)
        check(self.blank_skip is None or 0.5 <= self.blank_skip <= 1, name + "blank_skip",
              "be none or between 0.5 and 1", self.blank_skip)
        check(self.frame_shift > 0, name + "frame_shift", "be above 0 seconds", self.frame_shift)
        check_choice(self.engine, ENGINES, name + "engine")


def _counts(value: object) -> bool:
    return isinstance(value, Integral) and value >= 1


@torch.no_grad()
def ctc_prefix_search(
    log_probs: Tensor,
    lens: Tensor,
    options: Optional[PrefixSearchOptions] = None,
    tokens: Optional[AcousticTokens] = None,
    fusions: Sequence[Fusion] = (),
    ids: Optional[Sequence[str]] = None,
    blank_id: Optional[int] = None,
) -> list[NBest]:
    """Search the most probable piece sequences (sum over alignments) of a batch of utterances.

    Exact CTC prefix beam search (Graves 2006; Hannun et al. 2014), with shallow fusion before and delayed
    fusion (Hori et al. 2025, section 2) after each pruning. The result of an utterance depends neither on the
    batch it is in nor on what stands in the padding. Runs on the device of ``log_probs``.

    Args:
        log_probs: [B, T, V] natural-log probabilities, any float type; -inf is allowed.
        lens: [B] frames of each utterance, 0..T.
        options: see PrefixSearchOptions; none: the defaults.
        tokens: the vocabulary; none: hypotheses have no text, word times and word bonus.
        fusions: language models, see beam.Fusion.
        ids: utterance names; none: "0", "1", ...
        blank_id: id of blank; none: that of ``tokens``, or 0.

    Returns:
        One NBest per utterance, best first; scores "ctc" (exact log-mass that the beam kept), one per fusion,
        "words" and "total".

    Raises:
        ValueError: shapes, lengths, blank or vocabulary do not fit; NaN or +inf among the log-probs, values
            clearly above 0 (logits), or a frame in which nothing is possible (the message names the
            utterance).
    """
    options = options or PrefixSearchOptions()
    with torch.autocast(log_probs.device.type, enabled=False):  # masses need float32
        return _search(log_probs, lens, options, tokens, fusions, ids, blank_id)


def _search(log_probs: Tensor, lens: Tensor, options: PrefixSearchOptions, tokens: Optional[AcousticTokens],
            fusions: Sequence[Fusion], ids: Optional[Sequence[str]], blank_id: Optional[int]) -> list[NBest]:
    blank = blank_id if blank_id is not None else tokens.blank_id if tokens is not None else 0
    given = check_input(log_probs, lens, blank, tokens, ids)
    joint = JointFusion(fusions, tokens)
    if not given.ids:
        return []
    batch, frames, pieces = given.log_probs.shape
    device = given.log_probs.device
    starts_word = None
    if tokens is not None and joint.fusions:
        starts_word = torch.tensor(tokens.starts_word, device=device)
    arena = PrefixArena(batch, options.beam, device, starts_word, rows=frames + 1)
    beam = Beam(arena, given.lens, blank, len(joint.fusions))
    joint.begin(beam, given.ids)
    limit = pieces - 1 if options.top_pieces is None else min(options.top_pieces, pieces - 1)
    engine, library = _choose_engine(options, joint, device)
    # compiled code passes over skipped frames in no time; tensors are better off without them
    plan = plan_frames(given, options.blank_skip, leave_out=engine == "torch" and not joint.fusions)
    if engine == "triton":
        keys = hash_keys(pieces, device)
        DeviceSearch(beam, plan, given.live, joint, limit, options.score_beam, keys).run()
    elif engine == "native":
        columns = min(limit, columns_needed(options.beam, pieces, options.beam - 1 if joint.ranks else 0))
        if any(fusion.weight != 0 or fusion.word_bonus != 0 for fusion in joint.shallow):
            columns = limit  # those that could survive are found in each frame
        if options.recover_mass:
            columns = columns_kept(options.beam, limit)
        NativeSearch(
            library, beam, plan, given.live, joint, columns, options.recover_mass, options.score_beam
        ).run()
    else:
        _PrefixSearch(given, plan, beam, options, limit, joint).run()
    beam.offset += (given.best.double() * given.live).sum(1)
    joint.finish(beam)
    return export_nbests(beam, given, plan.map, options.nbest or options.beam,
                         options.frame_shift if options.word_times else None, tokens, fusions)


@functools.lru_cache(maxsize=1)
def _tell(why: str) -> None:
    logging.warning("the prefix search runs on tensors, several times slower: %s", why)


def _choose_engine(
    options: PrefixSearchOptions, joint: JointFusion, device: torch.device
) -> tuple[str, Optional[Any]]:
    """Return the engine to take, and the compiled library if that is it.

    Raises:
        ValueError: one is asked for by name where it does not serve.
    """
    wanted = options.engine
    if wanted == "auto":
        wanted = "triton" if device.type == "cuda" else "native"
    if wanted == "torch":
        return wanted, None
    library, unusual = None, False  # unusual: worth telling, for it costs time and can be mended
    if wanted == "triton":
        why = why_not(options.beam, options.recover_mass, joint, device)
        if not why and device.type == "cuda":
            why = _kernel_fails(device)
            unusual = bool(why)
    else:
        why = "" if device.type == "cpu" else f"it is for the CPU, the log-probs are on {device}"
        if not serves(joint):
            names = ", ".join(fusion.source for fusion in joint.shallow)
            why = f"it has no shallow fusion but that of one n-gram over pieces ({names})"
        if not why:
            library, why = load_native()
            unusual = bool(why)
    check(not why or options.engine == "auto", "PrefixSearchOptions.engine", f"be auto or torch: {why}",
          options.engine)
    if unusual:
        _tell(why)
    return ("torch", None) if why else (wanted, library)


@functools.lru_cache(maxsize=None)
def _kernel_fails(device: torch.device) -> str:
    """Return "" if the kernel finds on a device what tensors find there, else what happens; tried once."""
    generator = torch.Generator().manual_seed(1)
    log_probs = (3 * torch.randn(3, 90, 40, generator=generator)).log_softmax(-1).to(device)
    lens, found = torch.tensor([90, 61, 0]), []
    for engine in ("torch", "triton"):
        options = PrefixSearchOptions(beam=8, engine=engine)
        given = check_input(log_probs, lens, 0, None, None)
        arena = PrefixArena(3, 8, device, rows=91)
        beam, joint = Beam(arena, given.lens, 0), JointFusion([], None)
        plan = plan_frames(given, None, leave_out=False)
        try:
            if engine == "torch":
                _PrefixSearch(given, plan, beam, options, 39, joint).run()
            else:
                DeviceSearch(beam, plan, given.live, joint, 39, None, hash_keys(40, device)).run()
        except Exception as error:  # of a compiler or driver: any
            return f"the kernel does not run on {device}: {type(error).__name__}: {error}"[:500]
        found.append((beam.log_total.double() + beam.offset.unsqueeze(1)).cpu())
    worst = float((found[0] - found[1]).nan_to_num(0.0).abs().max())
    return "" if worst < 1e-2 else f"the kernel's scores on {device} differ from those of tensors by {worst} nats"


class _PrefixSearch:
    """One search over one batch: blocks of frames, and in each frame extend, merge, prune, fuse.

    Which pieces may extend: without shallow fusion the few pairs of slot and piece that the proof in
    candidates.py leaves; with it, all pieces that could survive if the language model were certain of them.
    """

    def __init__(self, given: SearchInput, plan: FramePlan, beam: Beam, options: PrefixSearchOptions,
                 limit: int, joint: JointFusion) -> None:
        self.joint, self.blank, self.beam, self.limit = joint, given.blank, beam, limit
        self.log_probs, self.best, self.searched = plan.log_probs, plan.best, plan.searched
        self.restarts, self.rescale = plan.restarts, plan.rescale
        self.live = given.live
        batch, _, pieces = self.log_probs.shape
        device = self.log_probs.device
        self.step = FrameStep(beam, pieces, options.score_beam)
        self.widens = joint.extends and joint.ranks
        self.wide: dict[int, Candidates] = {}
        slack: Optional[int] = options.beam - 1 if joint.ranks else 0
        self.children: Optional[Children] = None
        if options.recover_mass:
            self.widens = False
            columns, slack = columns_kept(options.beam, self.limit), None
            self.children = Children(self.beam, pieces, columns)
        else:
            columns = 0 if self.widens else min(self.limit, columns_needed(options.beam, pieces, slack))
        self.out = Candidates(batch, make_pairs(options.beam, columns, slack, device), options.beam, device)

    def run(self) -> None:
        """Search all frames; the fusions act after each."""
        frames = self.log_probs.shape[1]
        for start in range(0, frames, _BLOCK):
            stop = min(start + _BLOCK, frames)
            block = slice(start, stop)
            ready = prepare_frames(self.log_probs[:, block], self.best[:, block], self.searched[:, block],
                                   self.blank, self.out.pairs)
            for frame, *scores in zip(range(start, stop), *(x.unbind(0) for x in ready)):
                self._search_frame(frame, Frame(self.log_probs[:, frame], *scores))

    def _search_frame(self, number: int, frame: Frame) -> None:
        beam, step, joint = self.beam, self.step, self.joint
        beam.frame = number
        if number in self.rescale:
            beam.rescale(self.rescale[number])
        if self.restarts is not None:
            beam.restart(self.restarts[number])
            if self.children is not None:
                self.children.restart(self.restarts[number])
        order = None
        if joint.disordered and not self.widens and self.children is None:
            order = beam.ranks()
            beam.permute(order)
        out = self.out
        last_score, parent_slots = step.stay(frame, out)
        active = None
        if joint.extends:
            active = self.searched[:, number]
            if self.widens:
                frame, out, active = self._widen(frame, active)
        if self.children is not None:
            self.children.extend(frame, out, parent_slots)
            step.strike_out(frame, out, parent_slots)
        else:
            step.extend(frame, out, last_score, parent_slots)
        scores = joint.score(beam, out, frame.piece, active)
        chosen, source, grew = step.prune(frame, out, scores, self.children)
        if self.children is not None:
            self.children.follow(source, chosen >= out.beam)
        if joint.fusions:
            moved_from = source if order is None else order.gather(1, source)
            joint.follow(beam, out, chosen, source, grew, moved_from)
            joint.fuse(beam, number, self.live[:, number])

    def _widen(self, frame: Frame, active: Tensor) -> tuple[Frame, Candidates, Tensor]:
        """Choose the pieces that could enter the beam if shallow fusion were certain of them (exact)."""
        beam, stays = self.beam, self.out
        scores = frame.row + frame.shift  # [B, V]
        scores[:, self.blank] = -torch.inf
        stay_scores = stays.stay_total + beam.fused
        worst = stay_scores.masked_fill(stays.stay_total == -torch.inf, -torch.inf).amin(1)
        best = beam.score.masked_fill(~beam.alive, -torch.inf).amax(1)
        needed = worst - best - self.joint.ceiling - ROUNDING
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
