"""Outputs of a stateless predictor for the prefixes of a beam, each context asked for once.
Knows: a transducer's predictor, beams. Must not know: how a frame is searched, language models.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from icefall_fusion.acoustic.transducer import Transducer
    from icefall_fusion.search.beam import Beam


class Contexts:
    """The last pieces of each slot's prefix, and what the predictor says of them.

    On a CPU the outputs of all contexts seen are kept as a table. On a GPU all slots are asked in every step:
    to ask for new contexts alone the host would have to wait.

    Args:
        model: a transducer.
        beam: at the root.
    """

    def __init__(self, model: Transducer, beam: Beam) -> None:
        self.model, self.beam = model, beam
        start = torch.tensor(model.start, dtype=torch.int64, device=beam.node.device)
        self.last = start.repeat(*beam.node.shape, 1)  # [B, K, c]
        self.tabled = beam.node.device.type == "cpu"
        first = model.predict(self.last[:1, 0]).float()  # [1, J]
        self.row = torch.zeros_like(beam.node)  # [B, K], of the table
        self.rows = {tuple(start.tolist()): 0}
        self.table = first.repeat(64, 1) if self.tabled else first

    def outputs(self, slots: Tensor) -> Tensor:
        """Return the predictor's outputs [n, J] for flat slots [n]."""
        if self.tabled:
            return self.table[self.row.reshape(-1)[slots]]
        return self.model.predict(self.last.flatten(0, 1)[slots]).float()

    def follow(self, source: Tensor, grew: Tensor) -> None:
        """Let each slot [B, K] have the context of slot ``source``, and its last piece where it ``grew``."""
        before = self.last.gather(1, source.unsqueeze(2).expand_as(self.last))
        after = torch.cat([before[..., 1:], self.beam.last.unsqueeze(2)], 2)
        self.last = torch.where(grew.unsqueeze(2), after, before)
        if self.tabled:
            self.row = self.row.gather(1, source)
            slots = grew.reshape(-1).nonzero().squeeze(1)
            if len(slots):
                self.row.view(-1)[slots] = self._look_up(self.last.flatten(0, 1)[slots])

    def _look_up(self, contexts: Tensor) -> Tensor:
        """Return the rows [n] of contexts [n, c]; the predictor is asked once for all new ones."""
        rows, known, new = [], self.rows, []
        for context in map(tuple, contexts.tolist()):
            row = known.get(context)
            if row is None:
                row = known[context] = len(known)
                new.append(context)
            rows.append(row)
        if new:
            first = len(known) - len(new)
            if len(known) > len(self.table):
                longer = self.table.new_empty(2 * len(known), self.table.shape[1])
                longer[:first] = self.table[:first]
                self.table = longer
            asked = torch.tensor(new, dtype=torch.int64)
            self.table[first : len(known)] = self.model.predict(asked).float()
        return torch.tensor(rows, dtype=torch.int64)
