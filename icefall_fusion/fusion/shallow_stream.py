"""Shallow fusion of a neural language model in a stream: its tree comes and goes, and it may fail.
Knows: shallow fusion, trees in lanes. Must not know: audio, when segments end, which LM it is.

A language model that fails is left out from then on, and what it has scored is taken out of all hypotheses,
as if its weight had been 0 (see streaming.py).
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Callable

import torch

from icefall_fusion.fusion.base import live_slots
from icefall_fusion.fusion.shallow import ShallowFusion

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.lm.tree_lanes import TreeLanes
    from icefall_fusion.search.beam import Beam


class ShallowStream(ShallowFusion):
    """A shallow fusion of one stream.

    Args:
        fusion: whose settings it has.
        lanes: of the fusion's language model, where its tree lies.
        tell: is called with the source and the error if the language model fails.
    """

    def __init__(self, fusion: ShallowFusion, lanes: TreeLanes,
                 tell: Callable[[str, Exception], None]) -> None:
        vars(self).update(vars(fusion))
        self.lm, self._tell, self.failed = lanes, tell, False

    def extension_scores(self, beam: Beam, pieces: Tensor, active: Tensor) -> Tensor:
        """Return log P(piece | pieces so far) [B, K, C], 0 if the language model fails or has failed."""
        if not self.failed:
            try:
                return super().extension_scores(beam, pieces, active)
            except Exception as error:  # whatever it is: the stream goes on
                self._fail(beam, error)
        return beam.lm.new_zeros(*beam.node.shape, pieces.shape[1])

    def advance(self, beam: Beam, source: Tensor, grew: Tensor) -> None:
        """Move the grown hypotheses on (see ``Fusion.advance``)."""
        if not self.failed:
            super().advance(beam, source, grew)

    def finish(self, beam: Beam) -> None:
        """Score the end of the segment."""
        if not self.failed:
            try:
                super().finish(beam)
            except Exception as error:
                self._fail(beam, error)

    def close(self) -> None:
        """Free the tree of a stream that ends without a result."""
        if self._tree is not None:
            self._close()

    def _fail(self, beam: Beam, error: Exception) -> None:
        slots = live_slots(beam)
        self._put(beam, slots, torch.zeros(len(slots)), torch.zeros_like(slots))
        self.weight, self.word_bonus, self.failed = 0.0, 0.0, True
        self.close()
        self._tell(self.source, error)

    def _close(self) -> None:
        self._tree.close()
        super()._close()
