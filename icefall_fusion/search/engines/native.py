"""The prefix search by compiled code, on a CPU: the twin of frame_step.py, candidates.py and children.py.
Knows: the compiled library, beams, frames to search, n-grams as tables. Must not know: which language model
joins, text.

Utterances are searched one after the other with their whole state in the cache. N-grams over the pieces and
phrases join inside; other shallow fusion, which scores extensions, is left to the tensors.
"""
from __future__ import annotations

import contextlib
import ctypes
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Iterator, MutableMapping, Optional

import torch

from icefall_fusion.common.native_build import load_native
from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.search.beam import HASH_FACTOR, NO_PARENT_HASH, ROOT_HASH, ROUNDING, TINY_MASS, Beam
from icefall_fusion.search.engines.base import (
    CompiledSearch,
    FramePlan,
    columns_kept,
    columns_needed,
    hash_keys,
)

if TYPE_CHECKING:
    from icefall_fusion.ngram.piece_ngram import PieceNgram
    from icefall_fusion.search.fusion import Fusion, FusionSet
    from icefall_fusion.search.search_input import PrefixSearchOptions, SearchInput


class _NativeNgram:
    """An n-gram's tables in the library; freed with this object."""

    def __init__(self, library: ctypes.CDLL, ngram: PieceNgram) -> None:
        orders, count = ngram.orders, len(ngram.orders)
        keys = [order.keys.cpu().contiguous() for order in orders]
        scores = [order.log_probs.cpu().float().contiguous() for order in orders]
        backoffs = [order.backoffs.cpu().float().contiguous() for order in orders]
        address = ctypes.c_void_p * count
        arrays = (address(*(x.data_ptr() for x in tensors)) for tensors in (keys, scores, backoffs))
        sizes = (ctypes.c_int64 * count)(*(len(x) for x in keys))
        self.handle = library.ngram_open(ngram.base, ngram.start_id, count, sizes, *arrays)
        weakref.finalize(self, library.ngram_close, self.handle)


_TABLES: MutableMapping[PieceNgram, _NativeNgram] = weakref.WeakKeyDictionary()  # made once an n-gram


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


_NUMBER, _REAL, _POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class _Settings(ctypes.Structure):
    """`Settings` of search_types.h: the same fields in the same order."""

    _fields_ = [
        *_fields(_NUMBER, "hash_factor root_hash no_parent_hash"), *_fields(_REAL, "rounding tiny_mass"),
        ("keys", _POINTER), *_fields(_NUMBER, "batch beam pieces blank columns recover ranks"),
        ("score_beam", _REAL), ("scorers", _POINTER), *_fields(_NUMBER, "scorer_count weighs"),
        *_fields(_NUMBER, "every unit first_length"),
        ("ahead", _POINTER), *_fields(_REAL, "ahead_weight ahead_bonus"),
        *_fields(_NUMBER, "ahead_every late_ahead"),
    ]


class _Phrases(ctypes.Structure):
    """`Phrases` of phrases.h: the same fields in the same order."""

    _fields_ = [
        *_fields(_POINTER, "piece first shorter from_root pending complete most child"),
        *_fields(_NUMBER, "start base"),
    ]


class _Scorer(ctypes.Structure):
    """`Scorer` of phrases.h: the same fields in the same order."""

    _fields_ = [*_fields(_POINTER, "ngram phrases"), *_fields(_REAL, "weight bonus reach")]


class _Batch(ctypes.Structure):
    """`Batch` of search_types.h: the same fields in the same order."""

    _fields_ = [
        ("log_probs", _POINTER), *_fields(_NUMBER, "row_stride frame_stride"),
        *_fields(_POINTER, "best searched lens"), ("frames", _NUMBER),
        *_fields(_POINTER, "parents pieces boundaries starts fused moved_from opened grew gain estimate"),
        *_fields(_POINTER, "states node last"), *_fields(_NUMBER, "node_stride last_stride"),
        *_fields(_POINTER, "log_total log_blank"), ("mass_stride", _NUMBER),
        *_fields(_POINTER, "offset landed scored totals at fired"),
    ]


class NativeSearch(CompiledSearch):
    """One search over one batch, on the CPU.

    Args:
        inputs: of the search.
        plan: frames, none left out.
        beam: at the root.
        options: of the search.
        fusions: begun; see CompiledSearch.
        pieces: V; None: as the log-probs have.

    Raises:
        Unavailable: there is no compiled code.
    """

    def __init__(self, inputs: SearchInput, plan: FramePlan, beam: Beam, options: PrefixSearchOptions,
                 fusions: FusionSet, pieces: Optional[int] = None) -> None:
        super().__init__(beam, inputs.live, fusions)
        self.library = library = load_native()
        log_probs = plan.log_probs
        self.log_probs = log_probs if log_probs.stride(2) == 1 else log_probs.contiguous()
        self.best, self.searched = plan.best.contiguous(), plan.searched.contiguous()
        pieces = pieces or log_probs.shape[2]
        self.keys = hash_keys(pieces, log_probs.device)
        self._kept: list[Any] = []
        self._arrays: tuple[Any, ...] = ()  # where they are, and as the compiled code wants them
        self.scorers = (_Scorer * len(fusions.shallow))(*map(self._scorer, fusions.shallow))
        ahead = native_tables(library, self.ahead.ngram)
        weighs = any(fusion.weight != 0 or fusion.word_bonus != 0 for fusion in fusions.shallow)
        self.states = torch.zeros_like(self.gain, dtype=torch.int64)
        batch, slots = beam.node.shape
        self.settings = _Settings(
            hash_factor=HASH_FACTOR, root_hash=ROOT_HASH, no_parent_hash=NO_PARENT_HASH,
            rounding=ROUNDING, tiny_mass=TINY_MASS, keys=self.keys.data_ptr(),
            batch=batch, beam=slots, pieces=pieces, blank=beam.blank,
            columns=self._columns(options, pieces, weighs),
            recover=options.recover_mass, ranks=fusions.ranks,
            score_beam=-1.0 if options.score_beam is None else options.score_beam,
            scorers=ctypes.addressof(self.scorers), scorer_count=len(self.scorers), weighs=weighs,
            every=self.stops.every, unit=self.stops.code, first_length=self.stops.first_length,
            ahead=ahead and ahead.handle, ahead_weight=self.ahead.weight, ahead_bonus=self.ahead.bonus,
            ahead_every=self.ahead.every, late_ahead=self.late_ahead,
        )
        # the compiled code lets go of Python's lock; within a frame there is too little to share
        threads = 1 if self.rule is None else max(1, min(torch.get_num_threads(), batch))
        ends = [batch * share // threads for share in range(threads + 1)]
        self.shares = list(zip(ends, ends[1:]))

    def _scorer(self, fusion: Fusion) -> _Scorer:
        """Return a shallow fusion as compiled code reads it; what it reads lives as long as the fusion."""
        weights = {"weight": fusion.weight, "bonus": fusion.word_bonus}
        if fusion.piece_ngram is not None:
            return _Scorer(ngram=native_tables(self.library, fusion.piece_ngram).handle, **weights)
        names = [name for name, _ in _Phrases._fields_[:-2]]
        made = {}
        for one, base in fusion.phrase_bases.items():
            arrays = [getattr(one, name) for name in names]
            pointers = [None if array is None else array.ctypes.data for array in arrays]
            made[one] = _Phrases(*pointers, one.start, base)
        rows = (_Phrases * len(fusion.phrases))(*(made[one] for one in fusion.phrases))
        self._kept.append(rows)
        reach = max(one.reach for one in made)
        return _Scorer(phrases=ctypes.addressof(rows), reach=reach, **weights)

    def _columns(self, options: PrefixSearchOptions, pieces: int, weighs: bool) -> int:
        """Return how many best pieces of a frame may extend a prefix."""
        limit = options.most_columns(pieces)
        if options.recover_mass:
            return columns_kept(options.beam, limit)
        if weighs:
            return limit  # each frame chooses those that could survive
        return columns_needed(options.beam, limit, self.fusions.slack(options.beam))

    def steps(self) -> Iterator[None]:
        """Search all frames (see `CompiledSearch.steps`)."""
        self.state = self.library.prefix_search_open(ctypes.byref(self.settings))
        try:
            with ThreadPoolExecutor(len(self.shares)) as self.pool:
                yield from super().steps()
        finally:
            self.library.prefix_search_close(self.state)

    def _search(self, until: int) -> None:
        self.beam.fused = self.beam.fused.contiguous()
        arrays, stops = self._batch(), int(self.rule is not None)

        def search(share: tuple[int, int]) -> None:
            self.library.prefix_search_run(self.state, ctypes.byref(arrays), until, stops, *share)

        if len(self.shares) == 1:
            search(self.shares[0])
        else:
            list(self.pool.map(search, self.shares))

    def _batch(self) -> _Batch:
        """Return the arrays that the compiled code reads and writes; made anew when one has moved."""
        beam = self.beam
        self._make_totals()
        own = self.log_probs, self.best, self.searched, self.estimate, self.totals
        moving = *own, beam.fused, beam.integers, beam.carried, *beam.arena.fields
        where = self.frames, *(one.data_ptr() for one in moving)
        if self._arrays[:1] != (where,):
            self._arrays = where, self._new_batch()
        return self._arrays[1]

    def _new_batch(self) -> _Batch:
        beam, arena, boundaries, starts = self.beam, self.beam.arena, None, None
        if arena.starts_word is not None:
            boundaries, starts = arena.fields[2].data_ptr(), arena.starts_word.data_ptr()
        row_stride, frame_stride, _ = self.log_probs.stride()
        read = {name: getattr(self, name).data_ptr() for name in ("log_probs", "best", "searched")}
        written = ("moved_from", "opened", "grew", "gain", "estimate", "states", "landed", "scored", "totals",
                   "at", "fired")
        return _Batch(
            **read, lens=self.ends.data_ptr(), frames=self.frames,
            row_stride=row_stride, frame_stride=frame_stride,
            parents=arena.fields[0].data_ptr(), pieces=arena.fields[1].data_ptr(),
            boundaries=boundaries, starts=starts, fused=beam.fused.data_ptr(),
            **{name: getattr(self, name).data_ptr() for name in written},
            node=beam.node.data_ptr(), node_stride=beam.node.stride(0),
            last=beam.last.data_ptr(), last_stride=beam.last.stride(0),
            log_total=beam.log_total.data_ptr(), log_blank=beam.log_blank.data_ptr(),
            mass_stride=beam.log_total.stride(0), offset=beam.offset.data_ptr(),
        )


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
