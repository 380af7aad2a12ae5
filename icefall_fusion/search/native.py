"""The prefix search by compiled code, on a CPU: the twin of frame_step.py, candidates.py and children.py.
Knows: the compiled library, beams, frames to search, n-grams as tables. Must not know: which language model
takes part, text.

Utterances are searched one after the other with their whole state in the cache; all frames in one call
where no language model takes part, else frame by frame. An n-gram over the pieces joins inside; other
shallow fusion, which scores extensions, is left to the tensors.
"""
from __future__ import annotations

import ctypes
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any, MutableMapping, Optional

import torch
from torch import Tensor

from icefall_fusion.ngram import PieceNgram
from icefall_fusion.search.beam import Beam
from icefall_fusion.search.candidates import FramePlan
from icefall_fusion.search.joint import JointFusion


def serves(joint: JointFusion) -> bool:
    """Return whether compiled code has what the fusions need: no shallow fusion, or that of one n-gram."""
    return not joint.shallow or [ngram_of(fusion) is not None for fusion in joint.shallow] == [True]


def ngram_of(fusion: Any) -> Optional[PieceNgram]:
    """Return the n-gram that a fusion's extension scores are those of, if there is one."""
    return getattr(fusion, "piece_ngram", None)


class _NativeNgram:
    """An n-gram's tables in the library; freed with this object."""

    def __init__(self, library: ctypes.CDLL, ngram: PieceNgram) -> None:
        orders, count = ngram.orders, len(ngram.orders)
        keys = [order.keys.contiguous() for order in orders]
        scores = [order.log_probs.float().contiguous() for order in orders]
        backoffs = [order.backoffs.float().contiguous() for order in orders]
        address = ctypes.c_void_p * count
        arrays = (address(*(x.data_ptr() for x in part)) for part in (keys, scores, backoffs))
        sizes = (ctypes.c_int64 * count)(*(len(x) for x in keys))
        self.handle = library.ngram_open(ngram.base, ngram.start_id, count, sizes, *arrays)
        weakref.finalize(self, library.ngram_close, self.handle)


_TABLES: MutableMapping[PieceNgram, _NativeNgram] = weakref.WeakKeyDictionary()  # made once an n-gram


class NativeSearch:
    """One search over one batch.

    Args:
        library: of native_build.load_native.
        beam: at the root, on the CPU.
        plan: frames, none left out.
        live: [B, T] bool, frames within the utterances.
        joint: fusions that `serves` allows.
        columns: best pieces of a frame that may extend a prefix.
        recover: see PrefixSearchOptions.recover_mass.
        score_beam: see PrefixSearchOptions.score_beam.
    """

    def __init__(self, library: ctypes.CDLL, beam: Beam, plan: FramePlan, live: Tensor, joint: JointFusion,
                 columns: int, recover: bool, score_beam: Optional[float]) -> None:
        self.library, self.beam, self.joint, self.live = library, beam, joint, live
        log_probs = plan.log_probs
        self.log_probs = log_probs if log_probs.stride(2) == 1 else log_probs.contiguous()
        self.best, self.searched = plan.best.contiguous(), plan.searched.contiguous()
        batch, self.frames, pieces = log_probs.shape
        shape = batch, beam.arena.beam
        self.tables, weight, bonus = None, 0.0, 0.0
        if joint.shallow:
            [fusion] = joint.shallow
            weight, bonus, ngram = fusion.weight, fusion.word_bonus, ngram_of(fusion)
            if ngram not in _TABLES:
                _TABLES[ngram] = _NativeNgram(library, ngram)
            self.tables = _TABLES[ngram]
        self.settings = (
            *shape, pieces, beam.blank, columns, int(recover), -1.0 if score_beam is None else score_beam,
            None if self.tables is None else self.tables.handle, weight, bonus,
        )  # fmt: skip
        self.moved_from = torch.zeros(shape, dtype=torch.int64)
        self.grew, self.opened = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
        self.gain = torch.zeros(shape)

    def run(self) -> None:
        """Search all frames; the fusions act after each."""
        state = self.library.prefix_search_open(*self.settings)
        try:
            if self.joint.fusions:
                self._run_with_fusions(state)
            else:
                self._run_alone(state)
        finally:
            self.library.prefix_search_close(state)

    def _run_alone(self, state: int) -> None:
        batch = len(self.best)
        parts = max(1, min(torch.get_num_threads(), batch))
        ends = [batch * part // parts for part in range(parts + 1)]
        if parts == 1:
            self._search(state, 0, self.frames, 0, batch, False)
        else:  # the compiled code lets go of Python's lock
            with ThreadPoolExecutor(parts) as pool:
                work = [pool.submit(self._search, state, 0, self.frames, first, last, False)
                        for first, last in zip(ends, ends[1:])]  # fmt: skip
                for part in work:
                    part.result()
        self.beam.arena.rows = self.frames + 1
        self.beam.frame = self.frames - 1
        self._show(state)

    def _run_with_fusions(self, state: int) -> None:
        beam, batch = self.beam, len(self.best)
        live = self.live.unbind(1)
        for frame in range(self.frames):
            beam.frame = frame
            moved = self._search(state, frame, frame + 1, 0, batch, True)
            beam.arena.rows = frame + 2
            self._show(state)
            if moved:
                gains, opened = [], None
                if self.tables is not None:
                    gains = [self.gain.masked_fill(~self.grew, 0.0)]
                    opened = self.opened & self.grew
                self.joint.move(beam, self.moved_from, self.grew, self.moved_from, gains, opened)
            self.joint.fuse(beam, frame, live[frame])

    def _search(self, state: int, begin: int, end: int, first: int, last: int, follow: bool) -> bool:
        arena, boundaries, starts, fused = self.beam.arena, None, None, None
        if arena.has_boundaries:
            boundaries, starts = arena.fields[2].data_ptr(), arena.starts_word.data_ptr()
        if self.joint.ranks:
            self.beam.fused = self.beam.fused.contiguous()
            fused = self.beam.fused.data_ptr()
        row_stride, frame_stride, _ = self.log_probs.stride()
        moves: list[Optional[int]] = [None] * 4
        if follow:
            moves[:2] = self.moved_from.data_ptr(), self.grew.data_ptr()
            if self.tables is not None:
                moves[2:] = self.opened.data_ptr(), self.gain.data_ptr()
        moved = self.library.prefix_search_run(
            state, self.log_probs.data_ptr(), row_stride, frame_stride, self.best.data_ptr(),
            self.searched.data_ptr(), self.frames, begin, end, first, last, fused,
            arena.fields[0].data_ptr(), arena.fields[1].data_ptr(), boundaries, starts,
            *moves,
        )  # fmt: skip
        return bool(moved)

    def _show(self, state: int) -> None:
        """Bring the beam, which fusions and the export see, to what the search has."""
        beam = self.beam
        self.library.prefix_search_show(
            state, 0, len(self.best), beam.node.data_ptr(), beam.node.stride(0), beam.last.data_ptr(),
            beam.last.stride(0), beam.log_total.data_ptr(), beam.log_blank.data_ptr(),
            beam.log_total.stride(0), beam.offset.data_ptr(),
        )  # fmt: skip
