"""An n-gram over pieces as one hash table, as the GPU kernel reads it.
Knows: n-grams. Must not know: searches.

The table holds the n-grams of all lengths, by ``key * 16 + length`` (see NgramOrder). An entry lies in the
cell that its hash points to, or in the next free one. A look-up reads a fixed number of cells, the most that
any entry needs. To end at an empty cell instead made the kernel spill registers.
"""
from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, MutableMapping

import torch
from torch import Tensor

from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.search.beam import HASH_FACTOR
from icefall_fusion.search.engines.gpu_layout import MOST_COLUMNS, Ngram

if TYPE_CHECKING:
    from icefall_fusion.ngram.piece_ngram import PieceNgram

_TABLES: MutableMapping[PieceNgram, dict[torch.device, tuple[Ngram, int]]] = weakref.WeakKeyDictionary()


def table_of(ngram: PieceNgram, device: torch.device) -> tuple[Ngram, int]:
    """Return the table of an n-gram on a device, made once, and how many cells a look-up must read.

    Raises:
        Unavailable: there are too many pieces, or keys and contexts are no numbers of 63 bits.
    """
    good = ngram.base <= MOST_COLUMNS and ngram.order < 16
    if not good or 16 * (ngram.base + 1) ** ngram.order >= 2**63:
        raise Unavailable(f"its n-gram has at most {MOST_COLUMNS} pieces and keys of 63 bits")
    tables = _TABLES.setdefault(ngram, {})
    if device not in tables:
        tables[device] = _make_table(ngram, device)
    return tables[device]


def first_cells(keys: Tensor, mask: int) -> Tensor:
    """Return the cell that the hash of each key points to."""
    cell = keys * HASH_FACTOR
    return (cell ^ (cell >> 29)) & mask


def _make_table(ngram: PieceNgram, device: torch.device) -> tuple[Ngram, int]:
    keys = torch.cat([order.keys.cpu() * 16 + order.length for order in ngram.orders])
    room = 1 << max(4, int(4 * len(keys) - 1).bit_length())
    mask, probes = room - 1, 0
    owner = torch.full((room,), -1)
    cells, todo = first_cells(keys, mask), torch.arange(len(keys))
    while len(todo):
        probes += 1
        free = owner[cells[todo]] < 0
        owner[cells[todo[free]]] = todo[free]  # one of the entries that want a cell gets it
        todo = todo[owner[cells[todo]] != todo]
        cells[todo] = (cells[todo] + 1) & mask
    scores = torch.cat([order.log_probs.cpu().float() for order in ngram.orders])
    backoffs = torch.cat([order.backoffs.cpu().float() for order in ngram.orders])
    columns = torch.where(owner < 0, owner, keys[owner]), scores[owner], backoffs[owner]
    return Ngram(*(column.to(device) for column in columns), mask), probes
