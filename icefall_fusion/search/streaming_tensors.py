"""The search of one stream by tensors, frame by frame: for fusions that compiled code does not serve.
Knows: the tensor engine, its beam. Must not know: language models, audio.

It holds all frames and prefixes of its segment: nothing is forgotten before the segment ends.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Iterator

import numpy as np
import torch

from icefall_fusion.common.checks import check
from icefall_fusion.search.beam import DEAD_HASH, NO_PARENT_HASH
from icefall_fusion.search.engines.base import FramePlan, plan_frames
from icefall_fusion.search.engines.tensors import TensorSearch
from icefall_fusion.search.streaming import StreamingSearch

if TYPE_CHECKING:
    from icefall_fusion.search.search_input import SearchInput


class TensorStreamingSearch(StreamingSearch):
    """The search of one stream; arguments and results as of `StreamingSearch`, engine auto or torch."""

    forgets = False

    def _open(self, inputs: SearchInput) -> TensorSearch:
        good = self.options.engine in ("auto", "torch")
        check(good, "PrefixSearchOptions.engine", "be auto or torch in a stream with this fusion",
              self.options.engine)
        self._at = 0  # frames searched
        plan = plan_frames(inputs, None, leave_out=False)
        return TensorSearch(inputs, plan, self.beam, self.options, self.fusions)

    def advance(self) -> Iterator[None]:
        """Search all frames that are there, in one step."""
        first, self._at = self._at, self.frames
        self._search.run_frames(first, self.frames)
        yield from ()

    def keep(self, slots: np.ndarray) -> None:
        """Drop all hypotheses but those in ``slots``."""
        beam, dead = self.beam, torch.ones(self.beam.arena.beam, dtype=torch.bool)
        dead[torch.from_numpy(slots)] = False
        for values in (beam.log_total, beam.log_blank, beam.log_nonblank):
            values[0, dead] = -torch.inf
        beam.hash[0, dead], beam.parent_hash[0, dead] = DEAD_HASH, NO_PARENT_HASH
        if self._search.children is not None:
            self._search.children.total[0, dead] = self._search.children.emitted[0, dead] = 0.0
        self.fusions.disordered = True

    def _end(self) -> None:
        self.beam.frame = self.frames - 1

    def _show(self) -> None:
        held = slice(0, self.frames)
        parts = self._log_probs[:, held], self._best[:, held], self._searched[:, held]
        live = torch.ones(1, self.frames, dtype=torch.bool)
        self._search.see(FramePlan(*parts, None, None), live)
        self.beam.lens.fill_(self.frames)

    def _begin_feed(self) -> None:
        """Do nothing: the tensor engine counts its frames itself."""
