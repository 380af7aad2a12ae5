"""What fusions of a neural language model have in common in a stream: its tree ends with it, and it may fail.
Knows: fusions, trees in lanes. Must not know: which fusion it is, audio, when segments end.

A language model that fails is left out from then on, and what it has scored is taken out of all hypotheses,
as if its weight had been 0: some would have its score for more words than others.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Optional

import torch

from icefall_fusion.fusion.base import LmFusion, live_slots

if TYPE_CHECKING:
    from icefall_fusion.lm.tree_lanes import TreeLanes
    from icefall_fusion.search.beam import Beam


class LmStream(LmFusion):
    """The base, before that of the fusion itself, of a fusion of one stream.

    Args:
        fusion: whose settings it has.
        lanes: of the fusion's language model, where its tree lies.
        tell: is called with the source and the error if the language model fails; None: it is raised.

    Attributes:
        failed: whether the language model has failed.
    """

    _tree: Any

    def __init__(self, fusion: LmFusion, lanes: TreeLanes,
                 tell: Optional[Callable[[str, Exception], None]] = None) -> None:
        vars(self).update(vars(fusion))
        self.lm, self._tell, self.failed = lanes, tell, False

    def close(self) -> None:
        """Free the tree of a stream that ends without a result."""
        if self._tree is not None:
            self._close()

    def _fail(self, beam: Beam, error: Exception) -> None:
        """Leave the language model out."""
        if self._tell is None:
            raise error
        slots = live_slots(beam)
        self._put(beam, slots, torch.zeros(len(slots)), torch.zeros_like(slots))
        self.weight, self.word_bonus, self.failed = 0.0, 0.0, True
        self.close()
        self._tell(self.source, error)

    def _close(self) -> None:
        self._tree.close()
        super()._close()
