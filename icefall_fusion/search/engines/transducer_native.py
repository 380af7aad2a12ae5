"""The beam search of transducers by compiled code, on a CPU: the twin of engines/transducer.py.
Knows: the compiled library, a transducer's joiner and predictor. Must not know: language models, text.

Every utterance goes on by itself to its next stop. A step asks the joiner once for all open prefixes of all
utterances that go on, whatever their frames; the compiled code merges, prunes and moves the beams.
"""
from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Iterator

import numpy as np
import torch
from torch import Tensor

from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.search.engines.base import CompiledSearch, FramePlan
from icefall_fusion.search.engines.native import NativeSearch
from icefall_fusion.search.engines.predictor import keep_table, take_table
from icefall_fusion.search.engines.transducer import join_states, marked_frames

if TYPE_CHECKING:
    from icefall_fusion.acoustic.transducer import Transducer
    from icefall_fusion.search.beam import Beam
    from icefall_fusion.search.fusion import FusionSet
    from icefall_fusion.search.search_input import PrefixSearchOptions, SearchInput

_POINTER = ctypes.c_void_p


class _Rows(ctypes.Structure):
    """`Rows` of transducer.h: the same fields in the same order."""

    _fields_ = [(name, _POINTER) for name in "encoder predictor contexts counts marks lost".split()]


class NativeTransducer(NativeSearch):
    """One search over one batch, on the CPU; arguments as of `TransducerEngine`.

    Raises:
        Unavailable: there is no compiled code, or it does not serve this search.
    """

    def __init__(self, inputs: SearchInput, model: Transducer, beam: Beam, options: PrefixSearchOptions,
                 fusions: FusionSet) -> None:
        plan = FramePlan(inputs.log_probs, inputs.best, inputs.live, None, None)  # the encoder's outputs
        super().__init__(inputs, plan, beam, options, fusions, int(model.vocab_size))
        self.model, self.symbols, base = model, options.symbols, model.vocab_size + 1
        if self.rule is None and self.symbols > 1:
            raise Unavailable("its fusions ask after each piece of a frame")
        if base ** len(model.start) >= 2**62:
            raise Unavailable("contexts of the predictor are too many to be numbered")
        self.powers = base ** torch.arange(len(model.start) - 1, -1, -1)
        self.base, self.encoder = base, self.log_probs.contiguous().flatten(0, 1)
        self.start = int((self.powers * (torch.tensor(model.start) + 1)).sum())
        self.outputs = take_table(model)  # by context
        self.known = torch.zeros(0, dtype=torch.int64)  # rows of it, as the compiled code counts contexts
        self._predict(torch.tensor([self.start]))
        arena, rows = beam.arena, 1 + self.frames * self.symbols
        while arena.fields[0].shape[0] < rows:
            arena.grow()
        nodes = rows * arena.row_size
        self.marks = torch.zeros(nodes, dtype=torch.int64)
        self.lost = torch.zeros(arena.batch, dtype=torch.bool)
        self.asked = [torch.zeros(arena.row_size, dtype=torch.int64) for _ in range(3)]
        self.counts = np.zeros(2, np.int64)
        pointers = [values.data_ptr() for values in self.asked]
        self.rows = _Rows(*pointers, self.counts.ctypes.data, self.marks.data_ptr(), self.lost.data_ptr())

    def _columns(self, options: PrefixSearchOptions, pieces: int, weighs: bool) -> int:
        if options.top_pieces is not None:
            raise Unavailable("it has no top_pieces for transducers")
        return pieces - 1  # each step chooses those that could survive

    def steps(self) -> Iterator[None]:
        """Search all frames (see `CompiledSearch.steps`)."""
        settings, power = ctypes.byref(self.settings), int(self.powers[0])
        self.state = self.library.transducer_open(settings, self.symbols, self.base, power, self.start)
        try:
            yield from CompiledSearch.steps(self)
            keep_table(self.model, self.outputs)
        finally:
            self.library.transducer_close(self.state)

    def _search(self, until: int) -> None:
        self.beam.fused = self.beam.fused.contiguous()
        step, stops, counts = self.library.transducer_step, int(self.rule is not None), self.counts
        arrays, rows = ctypes.byref(self._batch()), ctypes.byref(self.rows)
        step(self.state, arrays, rows, None, 0, until, stops)
        while counts[0]:
            encoder, predictor = (values[: counts[0]] for values in self.asked[:2])
            states = self.outputs.values.index_select(0, self.known[predictor])
            log_probs = join_states(self.model, self.encoder.index_select(0, encoder), states).contiguous()
            step(self.state, arrays, rows, log_probs.data_ptr(), log_probs.shape[1], until, stops)
            if counts[1]:
                self._predict(self.asked[2][: counts[1]])
        self.beam.arena.reach(1, 1 + int(self.at.max()) * self.symbols)

    def _predict(self, contexts: Tensor) -> None:
        """Ask the predictor for new contexts [n], as compiled code numbers them."""
        pieces = contexts.unsqueeze(1) // self.powers % self.base - 1
        self.known = torch.cat([self.known, self.outputs.find(pieces, self.model.predict)])

    def peaks(self, inputs: SearchInput, utterances: np.ndarray, path: np.ndarray, *rest: np.ndarray
              ) -> np.ndarray:
        """Return the frame [n, longest] in which each piece of paths was emitted (see `piece_peaks`)."""
        return marked_frames(self.marks, path, self.frames)
