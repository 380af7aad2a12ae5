"""The prefix search by a GPU kernel: many frames of all utterances in one launch, without the host.
Knows: the kernel, beams, frames to search. Must not know: which language model it is.

The files of this engine: gpu_layout.py names the kernel's arguments and state; gpu_kernel.py is the kernel;
gpu_ngram.py and gpu_phrases.py make hash tables; gpu_check.py compares the kernel with tensors before the
first search on a device. This file prepares a search, launches the kernel and copies the results to the beam.
Without a GPU, Triton's interpreter runs the kernel slowly (``TRITON_INTERPRET=1``), as the tests do.
"""
from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

from icefall_fusion.common.devices import load_kernels
from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.search.engines import gpu_layout
from icefall_fusion.search.engines.base import CompiledSearch, columns_needed, hash_keys
from icefall_fusion.search.engines.candidates import frame_columns, make_pairs
from icefall_fusion.search.engines.gpu_ngram import table_of
from icefall_fusion.search.engines.gpu_phrases import phrases_of

if TYPE_CHECKING:
    from icefall_fusion.search.beam import Beam
    from icefall_fusion.search.engines.base import FramePlan
    from icefall_fusion.search.fusion import Fusion, FusionSet
    from icefall_fusion.search.search_input import PrefixSearchOptions, SearchInput

KERNEL = "icefall_fusion.search.engines.gpu_kernel"
_LEAST = 16  # entries of a block
_ENTRIES = 256  # extensions that an n-gram or phrases score at once
_NEVER_STOPS = 2**30  # frames
_BLOCK = 2**24  # log-probs prepared at once
#: Warps that search an utterance: (how many of n-gram and phrases rank extensions, slots W at most,
#: candidates N at most, warps); the first row that fits counts. Few warps wait less for each other, more have
#: more registers and less work each. By spills and an estimate of cycles (tools/bench/kernel_registers.py),
#: not yet by time.
WARPS = (
    (0, 16, 64, 1), (0, 32, 512, 4), (0, 64, math.inf, 8),
    (1, 16, math.inf, 4), (1, 64, math.inf, 8), (2, 64, math.inf, 8),
)


class GpuSearch(CompiledSearch):
    """One search over one batch, on a GPU.

    Args:
        inputs: of the search.
        plan: frames, none left out.
        beam: at the root.
        options: of the search.
        fusions: begun; see CompiledSearch.
        trusted: leave out the trial of the kernel on this device.

    Raises:
        Unavailable: there is no Triton, n-gram or phrases are too large, or the kernel fails here.
    """

    def __init__(self, inputs: SearchInput, plan: FramePlan, beam: Beam, options: PrefixSearchOptions,
                 fusions: FusionSet, trusted: bool = False) -> None:
        super().__init__(beam, inputs.live, fusions)
        self.kernel = load_kernels(KERNEL)
        arena, device = beam.arena, beam.lens.device
        if device.type == "cuda" and not trusted:
            from icefall_fusion.search.engines.gpu_check import check_kernel, form_of

            check_kernel(device, form_of(fusions, options.score_beam))
        slots, pieces = beam.node.shape[1], plan.log_probs.shape[2]
        gram, hot = fusions.one_each() or (None, None)
        self.gain = [torch.zeros_like(self.estimate) for _ in fusions.shallow]  # each of memory of its own
        limit, slack = options.most_columns(pieces), fusions.slack(slots)
        columns = columns_needed(slots, limit, slack)
        width = _power_of_two(slots)
        candidates = _candidates(slots, columns, slack, 2 * width, device)
        count = len(candidates.slot)
        shallow, phrases = _role(gram), _role(hot)
        scores = (shallow == 2) + (phrases == 2)  # how many rank extensions
        if scores:
            columns = limit  # the kernel itself leaves out those that cannot survive
        ngram, weight, bonus = self.ahead[:3]
        if gram is not None:
            ngram, weight, bonus = gram.piece_ngram, gram.weight, gram.word_bonus
        table = gpu_layout.Ngram() if ngram is None else table_of(ngram, device)
        base = ngram.base if ngram is not None else 1 if hot is None else pieces + 2
        context = ngram.start_id + 1 if ngram is not None and ngram.order > 1 else 0
        changes = gpu_layout.Changes(self.moved_from, self.grew, self.opened, *map(self._gain, (gram, hot)))
        self.state = gpu_layout.root_state(beam, width, changes, context, self.stops.first_length)
        lists = self._phrases(hot, base)
        self.estimate = self.state.ahead.estimate[:, :slots]
        log_probs = plan.log_probs if plan.log_probs.stride(2) == 1 else plan.log_probs.contiguous()
        self._before = (
            log_probs, *log_probs.stride()[:2], self.ends, *candidates,
            _prepare(log_probs, plan, beam.blank, columns),
            gpu_layout.Pieces(hash_keys(pieces, device), arena.starts_word), gpu_layout.Arena(*arena.fields),
            table._replace(weight=weight, bonus=bonus), lists, self._late(), self.state,
        )
        self._after = self.stops.every or _NEVER_STOPS, options.score_beam or 0.0
        self.form = gpu_layout.Form(
            slots=slots, width=width, columns=columns,
            column_block=max(4, _ENTRIES // width) if scores else _power_of_two(columns),
            candidates=count,
            blank=beam.blank, ranks=fusions.ranks, stops=self.rule is not None, unit=self.stops.code,
            words=arena.starts_word is not None, score_beam=options.score_beam is not None,
            order=0 if ngram is None else ngram.order, base=base,
            shallow=shallow, phrases=phrases, ahead_every=0 if self.ahead.ngram is None else self.ahead.every,
            late=self.late_ahead,
        )
        self.went = 0  # frames that the first utterance went on from the last stop
        self.warps = _warps(scores, width, count)

    def _gain(self, fusion: Optional[Fusion]) -> Tensor:
        """Return where the kernel writes the raw scores of a shallow fusion; nobody reads those of none."""
        return torch.zeros_like(self.estimate) if fusion is None else self.gain[self._number(fusion)]

    def _late(self) -> gpu_layout.Late:
        self._make_totals()
        tensors = (self.landed, self.scored, self.totals) if self.late_ahead else ()
        return gpu_layout.Late(*tensors)

    def _number(self, fusion: Fusion) -> int:
        return self.fusions.shallow.index(fusion)

    def _phrases(self, hot: Optional[Fusion], base: int) -> gpu_layout.Phrases:
        """Return the phrases as the kernel reads them; let all hypotheses begin where they begin."""
        if hot is None:
            return gpu_layout.Phrases()
        beam, index = self.beam, self._number(hot)
        bases = [hot.phrase_bases[automaton] for automaton in hot.phrases]
        shown = torch.tensor(bases, device=beam.state.device).unsqueeze(1)  # what `beam.state` counts from
        self.state.phrase[:] = beam.state[:, :1, hot.index] - shown
        self._shown = index, shown
        self.states = [torch.zeros_like(beam.node) for _ in self.fusions.shallow]
        made = phrases_of(hot.phrases, base, beam.state.device)
        return made._replace(weight=hot.weight, bonus=hot.word_bonus)

    def arguments(self, until: int) -> tuple[Any, ...]:
        """Return the arguments of the kernel, without its form."""
        return (*self._before, until, *self._after)

    def compile(self) -> None:
        """Compile the kernel that this search needs, by a launch that searches no frame.

        Raises:
            Unavailable: it cannot be compiled or launched.
        """
        try:
            self._launch(0)
        except Exception as error:  # of a compiler or a driver: any
            reason = f"the kernel cannot be had for this search: {type(error).__name__}: {str(error)[-400:]}"
            raise Unavailable(reason, unusual=True) from error

    def _launch(self, until: int) -> None:
        run = self.kernel.search_utterances[(self.beam.arena.batch,)]
        with torch.cuda.device_of(self.beam.lens):
            run(*self.arguments(until), form=self.form, num_warps=self.warps)

    def _search(self, until: int) -> None:
        beam, prefix, mass = self.beam, self.state.prefix, self.state.mass
        slots = beam.node.shape[1]
        if self.fusions.ranks:
            mass.fused[:, :slots] = beam.fused
        self._launch(until)
        beam.node.copy_(prefix.node[:, :slots])
        beam.last.copy_(prefix.last[:, :slots])
        beam.log_total.copy_(mass.total[:, :slots])
        beam.log_blank.copy_(mass.blank[:, :slots])
        if self.fusions.ranks:
            beam.fused = mass.fused[:, :slots].clone()
        if self.states:
            number, shown = self._shown
            torch.add(self.state.phrase[:, :slots], shown, out=self.states[number])
        if self.rule is not None:
            self._show()

    def _show(self) -> None:
        """Bring to the host what is read there: where utterances stand, their hypotheses, new prefixes.

        It is the one wait for the device from stop to stop.
        """
        beam, prefix, counts = self.beam, self.state.prefix, self.state.counts
        shown = [counts.at, counts.fired]
        if self.fusions.members:
            ahead = self.rule.every if self.rule.unit is None else max(_LEAST, 2 * self.went)
            start = int(self.at.max())
            beam.arena.send(self.before + 1, min(start + ahead, self.frames) + 1)
            alive = beam.alive.long()
            shown += [x[:, : alive.shape[1]].flatten() for x in (alive, prefix.node, prefix.boundary)]
        at, fired, *seen = torch.cat(shown).cpu().split([len(x) for x in shown])
        self.at, self.fired = at, fired > 0
        if seen:
            beam.seen, self.went = [x.view(beam.node.shape) for x in seen], int(at.max()) - start


def _role(fusion: Optional[Fusion]) -> int:
    """Return what a shallow fusion does: 2: rank extensions, 1: be recorded alone, 0: it is not there."""
    return 0 if fusion is None else 2 if fusion.weight != 0 or fusion.word_bonus != 0 else 1


@functools.lru_cache(maxsize=64)  # nobody writes to them
def _candidates(slots: int, columns: int, slack: int, least: int,
                device: torch.device) -> gpu_layout.Candidates:
    """Return the stays and the extensions that can survive, padded to a block of at least ``least``."""
    pairs = make_pairs(slots, columns, slack, torch.device("cpu"))
    count = len(pairs.source)
    block = max(least, _power_of_two(count))
    slot = torch.zeros(block, dtype=torch.int32)
    column = torch.full((block,), gpu_layout.NO_CANDIDATE, dtype=torch.int32)
    slot[:count], column[:count] = pairs.source, pairs.piece_column
    column[:slots] = gpu_layout.STAY
    return gpu_layout.Candidates(slot.to(device), column.to(device))


def _prepare(log_probs: Tensor, plan: FramePlan, blank: int, columns: int) -> gpu_layout.Frames:
    """Return all frames, prepared block by block."""
    batch, frames, _ = log_probs.shape
    blanks, shifts = (log_probs.new_empty(frames, batch) for _ in "12")
    pieces = torch.empty(frames, batch, columns, dtype=torch.int32, device=log_probs.device)
    whole = gpu_layout.Frames(blanks, shifts, pieces, log_probs.new_empty(frames, batch, columns))
    step = max(1, _BLOCK // max(1, batch * log_probs.shape[2]))
    for start in range(0, frames, step):
        block = slice(start, start + step)
        rows = (x[:, block] for x in (log_probs, plan.best, plan.searched))
        for field, made in zip(whole, frame_columns(*rows, blank, columns)):
            field[block] = made
    return whole


def _warps(ranks: int, width: int, candidates: int) -> int:
    """Return how many warps search an utterance, by `WARPS`."""
    fit = (row[3] for row in WARPS if row[0] == ranks and width <= row[1] and candidates <= row[2])
    return next(fit)


def _power_of_two(size: int) -> int:
    """Return the size of a block that holds ``size`` entries."""
    return max(_LEAST, 1 << (size - 1).bit_length())
