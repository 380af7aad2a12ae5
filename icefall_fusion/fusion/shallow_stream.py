"""Shallow fusion of a neural language model in a stream.
Knows: shallow fusion, what streams share. Must not know: audio, when segments end, which LM it is.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

from icefall_fusion.fusion.lm_stream import LmStream
from icefall_fusion.fusion.shallow import ShallowFusion

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.search.beam import Beam


class ShallowStream(LmStream, ShallowFusion):
    """A shallow fusion of one stream; arguments are those of `LmStream`."""

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
