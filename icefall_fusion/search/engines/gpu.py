"""The prefix search by a GPU kernel: many frames of all utterances in one launch, without the host.
Knows: the kernel, beams, frames to search, an n-gram as a table. Must not know: which language model it is.
"""
from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, MutableMapping

import torch
from torch import Tensor

from icefall_fusion.common.devices import load_kernels
from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.search.beam import HASH_FACTOR
from icefall_fusion.search.engines.base import CompiledSearch, columns_needed, hash_keys
from icefall_fusion.search.engines.candidates import frame_columns, make_pairs

if TYPE_CHECKING:
    from icefall_fusion.ngram.piece_ngram import PieceNgram
    from icefall_fusion.search.beam import Beam
    from icefall_fusion.search.engines.base import FramePlan
    from icefall_fusion.search.fusion import FusionSet
    from icefall_fusion.search.search_input import PrefixSearchOptions, SearchInput

MOST_COLUMNS = 1024  # with an n-gram, as in the kernel
_LEAST = 16  # entries of a block
_NEVER_STOPS = 2**30  # frames
_BLOCK = 64  # frames prepared at once


class NgramTable:
    """An n-gram as one hash table: all lengths together, by ``key * 16 + length`` (see ngram.NgramOrder).

    keys: int64 [room], -1 where nothing is; scores, backoffs: float32 [room]; mask: room - 1; probes: places
    to look at, at most.
    """

    def __init__(self, ngram: PieceNgram, device: torch.device) -> None:
        keys = torch.cat([order.keys.cpu() * 16 + order.length for order in ngram.orders])
        room = 1 << max(4, int(4 * len(keys) - 1).bit_length())
        self.mask = room - 1
        owner = torch.full((room,), -1)
        places, todo = self._places(keys), torch.arange(len(keys))
        self.probes = 0
        while len(todo):
            self.probes += 1
            free = owner[places[todo]] < 0
            owner[places[todo[free]]] = todo[free]  # one of those that want a place gets it
            todo = todo[owner[places[todo]] != todo]
            places[todo] = (places[todo] + 1) & self.mask
        self.keys = torch.where(owner < 0, owner, keys[owner]).to(device)
        scores, backoffs = (
            torch.cat([getattr(order, name).cpu().float() for order in ngram.orders])[owner].to(device)
            for name in ("log_probs", "backoffs")
        )
        self.scores, self.backoffs = scores, backoffs

    def _places(self, keys: Tensor) -> Tensor:
        place = keys * HASH_FACTOR
        return (place ^ (place >> 29)) & self.mask

    @staticmethod
    def fits(ngram: PieceNgram) -> bool:
        """Return whether the keys, and the contexts, are numbers of 64 bits, and all pieces are columns."""
        few = ngram.base <= MOST_COLUMNS and ngram.order < 16
        return few and 16 * (ngram.base + 1) ** ngram.order < 2**63


_TABLES: MutableMapping[PieceNgram, dict[str, NgramTable]] = weakref.WeakKeyDictionary()


def _table(ngram: PieceNgram, device: torch.device) -> NgramTable:
    tables = _TABLES.setdefault(ngram, {})
    if str(device) not in tables:
        tables[str(device)] = NgramTable(ngram, device)
    return tables[str(device)]


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
        Unavailable: there is no Triton, the n-gram does not fit, or the kernel fails here.
    """

    def __init__(self, inputs: SearchInput, plan: FramePlan, beam: Beam, options: PrefixSearchOptions,
                 fusions: FusionSet, trusted: bool = False) -> None:
        super().__init__(beam, inputs.live, fusions)
        self.kernel = kernel = load_kernels("icefall_fusion.search.engines.gpu_kernel")
        arena, device = beam.arena, beam.lens.device
        if device.type == "cuda" and not trusted:
            from icefall_fusion.search.engines.gpu_check import check_kernel, form_of

            check_kernel(device, form_of(fusions))
        batch, slots = beam.node.shape
        limit, slack = options.most_columns(plan.log_probs.shape[2]), fusions.slack(slots)
        columns = min(limit, columns_needed(slots, plan.log_probs.shape[2], slack))
        # an n-gram of shallow fusion ranks (2) or is but recorded (1); else it is that of the look-ahead (0)
        ngram, weights, shallow = self.ahead.ngram, (self.ahead.weight, self.ahead.bonus), 0
        if self.ngram is not None:
            ngram, weights, shallow = self.ngram, self.weights, 2 if any(self.weights) else 1
        pairs = make_pairs(slots, columns, slack, torch.device("cpu"))
        wide, candidates = _block(slots), slots + pairs.slot.numel()
        width = max(2 * wide, _block(candidates))
        from_slot = torch.zeros(width, dtype=torch.int32)
        from_column = torch.full((width,), -2, dtype=torch.int32)
        from_slot[:candidates], from_column[:candidates] = pairs.source.int(), pairs.piece_column.int()
        from_column[:slots] = -1
        self.candidates = from_slot.to(device), from_column.to(device)
        self.log_probs = plan.log_probs if plan.log_probs.stride(2) == 1 else plan.log_probs.contiguous()
        if shallow == 2:
            columns = limit  # those that could survive are found in each frame
        self.prepared = _prepare(self.log_probs, plan, beam.blank, columns)
        self.lens, self.score_beam = beam.lens.contiguous(), options.score_beam
        self.keys = hash_keys(self.log_probs.shape[2], device)
        self.integers = torch.zeros(batch, kernel.INTEGERS, wide, dtype=torch.int64, device=device)
        self.numbers = torch.zeros(batch, kernel.NUMBERS, wide, dtype=torch.float32, device=device)
        self.counts = torch.zeros(batch, kernel.COUNTS, dtype=torch.int64, device=device)
        self.tables, order, base = [None] * 3 + [0, 0, *weights], 0, 1
        if ngram is not None:
            if not NgramTable.fits(ngram):
                raise Unavailable(f"its n-gram has at most {MOST_COLUMNS} pieces and keys of 63 bits")
            table, order, base = _table(ngram, device), ngram.order, ngram.base
            self.tables = [table.keys, table.scores, table.backoffs, table.mask, table.probes, *weights]
            self.integers[:, kernel.CONTEXT] = ngram.start_id + 1 if order > 1 else 0
        self._begin(beam)
        self.constants = {
            "K": slots, "KP": wide, "C": columns, "NP": width, "WIDE": columns > 62,
            "CP": _LEAST if shallow == 2 else _block(columns),
            "ROOT": beam.blank, "RANKS": fusions.ranks, "PACED": self.rule is not None,
            "UNIT": self.stops.code, "BOUNDARIES": arena.starts_word is not None,
            "SCORE_BEAM": options.score_beam is not None, "ORDER": order, "BASE": base,
            "SHALLOW": shallow, "AHEAD_EVERY": 0 if self.ahead.ngram is None else self.ahead.every,
            "I": kernel.INTEGERS, "F": kernel.NUMBERS, "W": kernel.COUNTS,
            "num_warps": _warps(width, wide, shallow == 2),
        }  # fmt: skip

    def _begin(self, beam: Beam) -> None:
        """Let all stand at the root."""
        kernel, slots = self.kernel, beam.node.shape[1]
        integers, numbers = self.integers, self.numbers
        integers[:, kernel.NODE] = integers[:, kernel.BOUNDARY] = beam.node[:, :1]
        integers[:, kernel.LAST] = beam.blank
        integers[:, kernel.HASH, :slots] = beam.hash
        integers[:, kernel.PARENT_HASH] = beam.parent_hash[:, :1]
        for name in ("TOTAL", "BLANK", "OPEN"):
            numbers[:, getattr(kernel, name)] = -torch.inf
        numbers[:, kernel.TOTAL, 0] = numbers[:, kernel.BLANK, 0] = 0.0
        self.counts[:, kernel.LONGEST] = self.stops.first_length

    def arguments(self, until: int) -> tuple[Any, ...]:
        """Return what the kernel is called with, beside ``constants``."""
        arena = self.beam.arena
        blank_score, shift, piece, score = self.prepared
        row_stride, frame_stride, _ = self.log_probs.stride()
        return (
            self.log_probs, row_stride, frame_stride, blank_score, shift, piece, score,
            self.lens, until, self.keys, arena.starts_word, *self.candidates,
            self.integers, self.numbers, self.counts, self.beam.offset, *arena.fields,
            self.moved_from, self.grew, self.opened, self.gain, arena.batch,
            self.stops.every or _NEVER_STOPS, self.score_beam or 0.0,
            *self.tables,
        )  # fmt: skip

    def compile(self) -> None:
        """Make the kernel that this search needs, by a call that searches no frame.

        Raises:
            Unavailable: it cannot be made.
        """
        try:
            self._launch(0)
        except Exception as error:  # of a compiler or a driver: any
            reason = f"the kernel cannot be had for this search: {type(error).__name__}: {str(error)[-400:]}"
            raise Unavailable(reason, unusual=True) from error

    def _launch(self, until: int) -> None:
        grid = (self.beam.arena.batch,)
        with torch.cuda.device_of(self.log_probs):
            self.kernel.search_utterances[grid](*self.arguments(until), **self.constants)

    def _search(self, until: int) -> None:
        beam, kernel, slots = self.beam, self.kernel, self.beam.node.shape[1]
        if self.fusions.ranks:
            self.numbers[:, kernel.FUSED, :slots] = beam.fused
        self._launch(until)
        beam.node.copy_(self.integers[:, kernel.NODE, :slots])
        beam.last.copy_(self.integers[:, kernel.LAST, :slots])
        beam.log_total.copy_(self.numbers[:, kernel.TOTAL, :slots])
        beam.log_blank.copy_(self.numbers[:, kernel.BLANK, :slots])
        if self.fusions.ranks:
            beam.fused = self.numbers[:, kernel.FUSED, :slots].clone()
            self.estimate = self.numbers[:, kernel.GIVEN, :slots]
        if self.rule is not None:  # the one wait for the device
            at, fired = self.counts[:, : kernel.FIRED + 1].cpu().unbind(1)
            self.at, self.fired = at, fired > 0


def _prepare(log_probs: Tensor, plan: FramePlan, blank: int, columns: int) -> tuple[Tensor, ...]:
    """Return blank and shift [T, B], piece (int32) and score [T, B, C] of all frames, made block by block."""
    batch, frames, _ = log_probs.shape
    blanks, shifts = (log_probs.new_empty(frames, batch) for _ in "12")
    pieces = torch.empty(frames, batch, columns, dtype=torch.int32, device=log_probs.device)
    scores = log_probs.new_empty(frames, batch, columns)
    for start in range(0, frames, _BLOCK):
        block = slice(start, start + _BLOCK)
        rows = (x[:, block] for x in (log_probs, plan.best, plan.searched))
        made = frame_columns(*rows, blank, columns)
        for whole, part in zip((blanks, shifts, pieces, scores), made):
            whole[block] = part
    return blanks, shifts, pieces, scores


def _warps(width: int, wide: int, ngram: bool) -> int:
    """Return how many warps search an utterance: few wait less for each other, but registers must suffice."""
    if ngram:
        return 4 if wide <= 16 else 8
    return 1 if width <= 128 else 4 if width <= 512 else 8


def _block(size: int) -> int:
    """Return the power of two that holds so many entries."""
    return max(_LEAST, 1 << (size - 1).bit_length())
