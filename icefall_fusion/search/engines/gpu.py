"""The prefix search by a GPU kernel: many frames of all utterances in one launch, without the host.
Knows: the kernel, beams, frames to search, an n-gram as a table. Must not know: which language model it is.
"""
from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, MutableMapping, Optional

import torch
from torch import Tensor

from icefall_fusion.common.devices import kernels_run_on, load_kernels
from icefall_fusion.search.engines.base import EngineSearch, lacks, ngram_of
from icefall_fusion.search.engines.candidates import columns_needed, frame_columns, make_pairs
from icefall_fusion.search.engines.frame_step import hash_keys
from icefall_fusion.search.stop_rule import UNITS

if TYPE_CHECKING:
    from icefall_fusion.ngram.piece_ngram import PieceNgram
    from icefall_fusion.search.beam import Beam
    from icefall_fusion.search.engines.candidates import FramePlan
    from icefall_fusion.search.fusion_set import JointFusion

MOST_SLOTS = 62  # with language models; a bit for each of twice as many columns fits two integers
MOST_COLUMNS = 1024  # with an n-gram, as in the kernel
_LEAST = 16  # entries of a block
_NEVER_STOPS = 2**30  # frames
_BLOCK = 64  # frames prepared at once


def load_kernel() -> tuple[Optional[Any], str]:
    """Return the module of the kernel and "", or None and why there is none."""
    return load_kernels("icefall_fusion.search.engines.gpu_kernel")


def why_not(beam: int, recover: bool, joint: JointFusion, device: torch.device) -> str:
    """Return why the kernel does not serve a search, "" if it does."""
    if not kernels_run_on(device):
        return f"it is for a GPU, the log-probs are on {device}"
    if lacks(joint):
        return lacks(joint)
    if recover:
        return "it cannot recover mass"
    if beam > MOST_SLOTS:
        return f"its beam is at most {MOST_SLOTS}, here {beam}"
    pace = joint.pace()
    ngrams = [ngram_of(fusion) for fusion in joint.shallow]
    ngrams += [pace.ahead.ngram] if pace is not None and pace.ahead is not None else []
    if len(ngrams) > 1:
        return "it has one n-gram, for shallow fusion or for look-ahead"
    if any(not NgramTable.fits(ngram) for ngram in ngrams):
        return f"its n-gram has at most {MOST_COLUMNS} pieces and keys of 63 bits"
    return ""


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
        place = keys * 0x2545F4914F6CDD1D
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


class DeviceSearch(EngineSearch):
    """One search over one batch, on a GPU.

    Args:
        beam, live, joint: see EngineSearch.
        plan: frames, none left out.
        limit: best pieces of a frame that may extend a prefix, at most.
        score_beam: see PrefixSearchOptions.score_beam.
    """

    def __init__(self, beam: Beam, plan: FramePlan, live: Tensor, joint: JointFusion, limit: int,
                 score_beam: Optional[float]) -> None:
        super().__init__(beam, live, joint)
        self.kernel, _ = load_kernel()
        kernel, arena, device = self.kernel, beam.arena, beam.lens.device
        batch, slots = beam.node.shape
        slack = slots - 1 if joint.ranks else 0
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
        self.lens, self.score_beam = beam.lens.contiguous(), score_beam
        self.keys = hash_keys(self.log_probs.shape[2], device)
        self.integers = torch.zeros(batch, kernel.INTEGERS, wide, dtype=torch.int64, device=device)
        self.numbers = torch.zeros(batch, kernel.NUMBERS, wide, device=device)
        self.counts = torch.zeros(batch, kernel.COUNTS, dtype=torch.int64, device=device)
        self.tables, order, base = [None] * 3 + [0, 0, *weights], 0, 1
        if ngram is not None:
            table, order, base = _table(ngram, device), ngram.order, ngram.base
            self.tables = [table.keys, table.scores, table.backoffs, table.mask, table.probes, *weights]
            self.integers[:, kernel.CONTEXT] = ngram.start_id + 1 if order > 1 else 0
        self._begin(beam)
        self.constants = {
            "K": slots, "KP": wide, "C": columns, "NP": width, "WIDE": columns > 62,
            "CP": _LEAST if shallow == 2 else _block(columns),
            "ROOT": beam.blank, "RANKS": joint.ranks, "PACED": self.pace is not None,
            "UNIT": UNITS.index(self.stops.unit), "BOUNDARIES": arena.has_boundaries,
            "SCORE_BEAM": score_beam is not None, "ORDER": order, "BASE": base,
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
        # with one word begun none is closed; a piece is closed at once
        self.counts[:, kernel.LONGEST] = 1 if self.stops.unit == "words" else 0

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
        """Make the kernel that this search needs, by a call that searches no frame."""
        self._launch(0)

    def _launch(self, until: int) -> None:
        grid = (self.beam.arena.batch,)
        with torch.cuda.device_of(self.log_probs):
            self.kernel.search_utterances[grid](*self.arguments(until), **self.constants)

    def _search(self, until: int) -> None:
        beam, kernel, slots = self.beam, self.kernel, self.beam.node.shape[1]
        if self.joint.ranks:
            self.numbers[:, kernel.FUSED, :slots] = beam.fused
        self._launch(until)
        beam.node.copy_(self.integers[:, kernel.NODE, :slots])
        beam.last.copy_(self.integers[:, kernel.LAST, :slots])
        beam.log_total.copy_(self.numbers[:, kernel.TOTAL, :slots])
        beam.log_blank.copy_(self.numbers[:, kernel.BLANK, :slots])
        if self.joint.ranks:
            beam.fused = self.numbers[:, kernel.FUSED, :slots].clone()
            self.given = self.numbers[:, kernel.GIVEN, :slots]
        if self.pace is not None:  # the one wait for the device
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
