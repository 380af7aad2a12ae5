"""An n-gram over pieces as one hash table, as the GPU kernel reads it.
Knows: n-grams. Must not know: searches.

The table holds the n-grams of 2 and more pieces, by ``key * 16 + length`` (see NgramOrder). A hash points
each to two buckets of `BUCKET` cells, and it lies in one of them (cuckoo hashing: Pagh, Rodler 2004). So a
look-up reads two buckets at once and then one value: two loads after one another, whatever the n-gram. Single
pieces need no hash. At most 7/8 of the cells are full: the 1.6 million n-grams of MiniBooks take 34 MB, less
than the second cache of an H100.
"""
from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, MutableMapping, Optional

import numpy as np
import torch
from torch import Tensor

from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.search.beam import HASH_FACTOR
from icefall_fusion.search.engines.gpu_layout import BUCKET, MOST_COLUMNS, Ngram

if TYPE_CHECKING:
    from icefall_fusion.ngram.piece_ngram import PieceNgram

_ROUNDS = 500

_TABLES: MutableMapping[PieceNgram, dict[torch.device, Ngram]] = weakref.WeakKeyDictionary()


def table_of(ngram: PieceNgram, device: torch.device) -> Ngram:
    """Return the table of an n-gram on a device, made once.

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


def buckets_of(keys: Tensor, mask: int) -> tuple[Tensor, Tensor]:
    """Return the two buckets that the hash of each key points to."""
    mixed = keys * HASH_FACTOR
    return (mixed ^ (mixed >> 29)) & mask, (mixed >> 40) & mask


def _make_table(ngram: PieceNgram, device: torch.device) -> Ngram:
    first, *longer = ngram.orders  # there is a unigram of every piece
    none = torch.zeros(0, dtype=torch.int64)
    keys = torch.cat([none, *(order.keys.cpu() * 16 + order.length for order in longer)])
    buckets, cells = place_keys(keys)
    key = torch.full((buckets * BUCKET,), -1)
    key[cells] = keys
    score, backoff = torch.zeros(len(key)), torch.zeros(len(key))
    score[cells] = torch.cat([none.float(), *(order.log_probs.cpu().float() for order in longer)])
    backoff[cells] = torch.cat([none.float(), *(order.backoffs.cpu().float() for order in longer)])
    table = (key, score, backoff, first.log_probs.float(), first.backoffs.float())
    return Ngram(*(column.to(device) for column in table), buckets - 1)


def place_keys(keys: Tensor) -> tuple[int, Tensor]:
    """Return how many buckets keys [n] need, and a cell for each in one of its two buckets."""
    buckets = 4
    while 7 * BUCKET * buckets < 8 * len(keys):
        buckets *= 2
    cells = _place(keys, buckets)
    while cells is None:
        buckets *= 2
        cells = _place(keys, buckets)
    return buckets, cells


def _place(keys: Tensor, buckets: int) -> Optional[Tensor]:
    """Return a cell for each key in one of its two buckets; None where none was found.

    All lie in their first bucket to begin with. Of a bucket with too many, some taken at random go to their
    other one, until none has too many.
    """
    one, two = (bucket.numpy() for bucket in buckets_of(keys, buckets - 1))
    at, chance = one.copy(), np.random.default_rng(0)
    changed = np.ones(buckets, np.bool_)
    for _ in range(_ROUNDS):
        rows = chance.permutation(np.flatnonzero(changed[at]))
        rows = rows[np.argsort(at[rows], kind="stable")]
        moving = rows[_places(at[rows]) >= BUCKET]
        if not len(moving):
            break
        at[moving] = one[moving] + two[moving] - at[moving]
        changed[:] = False
        changed[at[moving]] = True
    else:
        return None
    rows = np.argsort(at, kind="stable")
    cells = np.empty_like(at)
    cells[rows] = at[rows] * BUCKET + _places(at[rows])
    return torch.from_numpy(cells)


def _places(at: np.ndarray) -> np.ndarray:
    """Return the place of each entry among those that are equal to it; they are sorted."""
    begins = np.ones(len(at), np.bool_)
    begins[1:] = at[1:] != at[:-1]
    number = np.arange(len(at))
    return number - np.maximum.accumulate(np.where(begins, number, 0))
