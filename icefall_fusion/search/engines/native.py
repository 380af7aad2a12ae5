"""The prefix search by compiled code, on a CPU: the twin of frame_step.py, candidates.py and children.py.
Knows: the compiled library, beams, frames to search, n-grams as tables. Must not know: which language model
takes part, text.

Utterances are searched one after the other with their whole state in the cache. An n-gram over the pieces
joins inside; other shallow fusion, which scores extensions, is left to the tensors.
"""
from __future__ import annotations

import contextlib
import ctypes
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, MutableMapping, Optional

import torch

from icefall_fusion.common.native_build import load_native
from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.search.beam import HASH_FACTOR, NO_PARENT_HASH, ROOT_HASH, ROUNDING, Beam
from icefall_fusion.search.engines.base import CompiledSearch, FramePlan, columns_kept, columns_needed

if TYPE_CHECKING:
    from icefall_fusion.ngram.piece_ngram import PieceNgram
    from icefall_fusion.search.fusion import FusionSet
    from icefall_fusion.search.search_input import PrefixSearchOptions, SearchInput


class _NativeNgram:
    """An n-gram's tables in the library; freed with this object."""

    def __init__(self, library: ctypes.CDLL, ngram: PieceNgram) -> None:
        orders, count = ngram.orders, len(ngram.orders)
        keys = [order.keys.cpu().contiguous() for order in orders]
        scores = [order.log_probs.cpu().float().contiguous() for order in orders]
        backoffs = [order.backoffs.cpu().float().contiguous() for order in orders]
        address = ctypes.c_void_p * count
        arrays = (address(*(x.data_ptr() for x in part)) for part in (keys, scores, backoffs))
        sizes = (ctypes.c_int64 * count)(*(len(x) for x in keys))
        self.handle = library.ngram_open(ngram.base, ngram.start_id, count, sizes, *arrays)
        weakref.finalize(self, library.ngram_close, self.handle)


_TABLES: MutableMapping[PieceNgram, _NativeNgram] = weakref.WeakKeyDictionary()  # made once an n-gram


class NativeSearch(CompiledSearch):
    """One search over one batch, on the CPU.

    Args:
        inputs: of the search.
        plan: frames, none left out.
        beam: at the root.
        options: of the search.
        fusions: begun; see CompiledSearch.

    Raises:
        Unavailable: there is no compiled code.
    """

    def __init__(self, inputs: SearchInput, plan: FramePlan, beam: Beam, options: PrefixSearchOptions,
                 fusions: FusionSet) -> None:
        super().__init__(beam, inputs.live, fusions)
        self.library = library = load_native()
        log_probs = plan.log_probs
        self.log_probs = log_probs if log_probs.stride(2) == 1 else log_probs.contiguous()
        self.best, self.searched = plan.best.contiguous(), plan.searched.contiguous()
        self.lens = beam.lens.contiguous()
        self.tables = [native_tables(library, ngram) for ngram in (self.ngram, self.ahead.ngram)]
        handles = [None if tables is None else tables.handle for tables in self.tables]
        batch, slots = beam.node.shape
        self.settings = (
            ctypes.c_int64(HASH_FACTOR), ROOT_HASH, NO_PARENT_HASH, ROUNDING,
            batch, slots, log_probs.shape[2], beam.blank, self._columns(options, log_probs.shape[2]),
            int(options.recover_mass), int(fusions.ranks),
            -1.0 if options.score_beam is None else options.score_beam, handles[0], *self.weights,
            self.stops.every, self.stops.code, handles[1], *self.ahead[1:],
        )  # fmt: skip
        # the compiled code lets go of Python's lock; within a frame there is too little to share
        threads = 1 if self.rule is None else max(1, min(torch.get_num_threads(), batch))
        ends = [batch * part // threads for part in range(threads + 1)]
        self.parts = list(zip(ends, ends[1:]))

    def _columns(self, options: PrefixSearchOptions, pieces: int) -> int:
        """Return how many best pieces of a frame may extend a prefix."""
        limit = options.most_columns(pieces)
        if options.recover_mass:
            return columns_kept(options.beam, limit)
        if any(self.weights):
            return limit  # those that could survive are found in each frame
        return min(limit, columns_needed(options.beam, pieces, self.fusions.slack(options.beam)))

    def run(self) -> None:
        """Search all frames; the fusions act where their rule stops utterances, or after each."""
        self.state = self.library.prefix_search_open(*self.settings)
        try:
            with ThreadPoolExecutor(len(self.parts)) as self.pool:
                super().run()
        finally:
            self.library.prefix_search_close(self.state)

    def _search(self, until: int) -> None:
        self.beam.fused = self.beam.fused.contiguous()
        if len(self.parts) == 1:
            self._search_part(until, *self.parts[0])
        else:
            for work in [self.pool.submit(self._search_part, until, *part) for part in self.parts]:
                work.result()
        self._show()

    def _search_part(self, until: int, first: int, last: int) -> None:
        arena, boundaries, starts = self.beam.arena, None, None
        if arena.has_boundaries:
            boundaries, starts = arena.fields[2].data_ptr(), arena.starts_word.data_ptr()
        row_stride, frame_stride, _ = self.log_probs.stride()
        self.library.prefix_search_run(
            self.state, self.log_probs.data_ptr(), row_stride, frame_stride, self.best.data_ptr(),
            self.searched.data_ptr(), self.lens.data_ptr(), self.frames, until, int(self.rule is not None),
            first, last, arena.fields[0].data_ptr(), arena.fields[1].data_ptr(), boundaries, starts,
            self.beam.fused.data_ptr(), self.moved_from.data_ptr(), self.grew.data_ptr(),
            self.opened.data_ptr(), self.gain.data_ptr(), self.estimate.data_ptr(), self.at.data_ptr(),
            self.fired.data_ptr(),
        )  # fmt: skip

    def _show(self) -> None:
        """Bring the beam, which fusions and the export see, to what the search has."""
        beam = self.beam
        self.library.prefix_search_show(
            self.state, 0, len(self.best), beam.node.data_ptr(), beam.node.stride(0), beam.last.data_ptr(),
            beam.last.stride(0), beam.log_total.data_ptr(), beam.log_blank.data_ptr(),
            beam.log_total.stride(0), beam.offset.data_ptr(),
        )  # fmt: skip


def prepare_ngram(ngram: PieceNgram) -> None:
    """Lay an n-gram out as compiled code wants it, which the first search would do otherwise."""
    if ngram.device.type == "cpu":
        with contextlib.suppress(Unavailable):
            native_tables(load_native(), ngram)


def native_tables(library: ctypes.CDLL, ngram: Optional[PieceNgram]) -> Optional[_NativeNgram]:
    """Return an n-gram's tables, made once."""
    if ngram is None:
        return None
    if ngram not in _TABLES:
        _TABLES[ngram] = _NativeNgram(library, ngram)
    return _TABLES[ngram]
