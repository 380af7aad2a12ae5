"""The last pieces of a beam's prefixes, and values by such contexts: each context is asked for once.
Knows: a transducer's predictor, beams. Must not know: how a frame is searched, language models.
"""
from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Callable, MutableMapping

import torch
from torch import Tensor

if TYPE_CHECKING:
    from icefall_fusion.acoustic.transducer import Transducer
    from icefall_fusion.search.beam import Beam


_MOST = 65_536  # contexts that are kept from search to search
_ASKED = 8  # of them, once a search, to see whether it is still the same model


class ContextTable:
    """Values by context, on a CPU; a table that grows."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, ...], int] = {}
        self.values = torch.zeros(0, 0)

    def find(self, contexts: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the rows [n] of ``values`` for contexts [n, c].

        ``function`` makes values [N, J] of contexts; it is called once for all new ones.
        """
        asked = [tuple(context) for context in contexts.tolist()]
        new = [context for context in dict.fromkeys(asked) if context not in self.rows]
        if new:
            self._add(new, function(torch.tensor(new, dtype=torch.int64)).float())
        return torch.tensor([self.rows[context] for context in asked], dtype=torch.int64)

    def _add(self, contexts: list[tuple[int, ...]], values: Tensor) -> None:
        first = len(self.rows)
        count = first + len(contexts)
        if count > len(self.values):
            with torch.inference_mode(False):  # a table outlives the mode in which it grows
                longer = values.new_zeros(max(64, 2 * count), values.shape[1])
            longer[:first] = self.values[:first] if first else 0.0
            self.values = longer
        self.values[first:count] = values
        self.rows.update(zip(contexts, range(first, count)))  # last: no context without its values


_TABLES: MutableMapping[object, ContextTable] = weakref.WeakKeyDictionary()


def take_table(model: Transducer) -> ContextTable:
    """Return the predictor's outputs by context, row 0 those of the start; kept from search to search.

    The table is the caller's alone until `keep_table`: a search beside it, in another thread too, makes its
    own. It is made anew when the model says something else of the start or of some contexts more (in older
    models of icefall the start's state is that of no piece, which training may leave alone).
    """
    table = None
    with contextlib.suppress(TypeError):  # it can have no weak reference, or no hash
        table = _TABLES.pop(model, None)
    some = [tuple(model.start)] if table is None else list(table.rows)[:: len(table.rows) // _ASKED + 1]
    outputs = model.predict(torch.tensor(some, dtype=torch.int64)).float()
    if table is not None:
        known = table.values[[table.rows[context] for context in some]]
        if known.shape == outputs.shape and torch.allclose(known, outputs, rtol=1e-4, atol=1e-6):
            return table  # products of other batches have other last digits
    table = ContextTable()
    table.find(torch.tensor(some[:1], dtype=torch.int64), lambda contexts: outputs[:1])
    return table


def keep_table(model: Transducer, table: ContextTable) -> None:
    """Keep a table that `take_table` gave for the next search, unless it has grown too large."""
    if len(table.rows) <= _MOST:
        with contextlib.suppress(TypeError):
            _TABLES[model] = table


class Contexts:
    """The contexts of a beam's slots, and what the predictor says of them.

    On a CPU the outputs of all contexts seen are kept. On a GPU all slots are asked in every step: to ask for
    new contexts alone the host would have to wait.

    Args:
        model: a transducer.
        beam: at the root.
    """

    def __init__(self, model: Transducer, beam: Beam) -> None:
        self.model, self.beam = model, beam
        start = torch.tensor(model.start, dtype=torch.int64, device=beam.node.device)
        self.last = start.repeat(*beam.node.shape, 1)  # [B, K, c]
        self.tabled = beam.node.device.type == "cpu"
        self.table = take_table(model) if self.tabled else ContextTable()
        self.row = torch.zeros_like(beam.node)  # [B, K], of the table

    def outputs(self, slots: Tensor) -> Tensor:
        """Return the predictor's outputs [n, J] for flat slots [n]."""
        if self.tabled:
            return self.table.values[self.row.reshape(-1)[slots]]
        return self.model.predict(self.last.flatten(0, 1)[slots]).float()

    def keep(self) -> None:
        """Keep the outputs for the next search; this one asks no more."""
        if self.tabled:
            keep_table(self.model, self.table)

    def follow(self, source: Tensor, grew: Tensor) -> None:
        """Let each slot [B, K] have the context of slot ``source``, and its last piece where it ``grew``."""
        before = self.last.gather(1, source.unsqueeze(2).expand_as(self.last))
        after = torch.cat([before[..., 1:], self.beam.last.unsqueeze(2)], 2)
        self.last = torch.where(grew.unsqueeze(2), after, before)
        if self.tabled:
            self.row = self.row.gather(1, source)
            slots = grew.reshape(-1).nonzero().squeeze(1)
            if len(slots):
                contexts = self.last.flatten(0, 1)[slots]
                self.row.view(-1)[slots] = self.table.find(contexts, self.model.predict)
