"""N-grams left out of a back-off model where they tell little (Stolcke 1998, "Entropy-based pruning").
Knows: tables of n-grams, counts of contexts. Must not know: files, how probabilities were estimated.
"""
from __future__ import annotations

from typing import Sequence

import numpy as np
from numpy import ndarray

from icefall_fusion.ngram.arpa import NgramTable
from icefall_fusion.ngram.kneser_ney import Counts, find_keys, log_prob

_LEAST = 1e-12  # of a mass that is left


def prune(
    tables: Sequence[NgramTable], counts: Sequence[Counts], base: int, threshold: float
) -> list[NgramTable]:
    """Leave out n-grams whose loss changes the model by little, the longest first.

    The measure is the relative entropy between the model with and without the one n-gram. A context weighs as
    often as the text has it: the lower orders of a Kneser-Ney model do not say how often that is (Chelba and
    others 2010). N-grams that longer ones begin with stay.

    Args:
        tables: of the lengths 1, 2, ...; not changed.
        counts: of all n-grams of the text, of these lengths.
        base: of keys.
        threshold: relative change of perplexity, above 0, e.g. 1e-8.

    Returns:
        the tables that are left, with back-off weights that let each distribution sum to one.
    """
    tables = [NgramTable(*(values.copy() for values in table)) for table in tables]
    needed = np.zeros(0, np.int64)
    for n in range(len(tables), 1, -1):
        table = tables[n - 1]
        kept = _worth(tables, counts[n - 2], n, base, threshold) | np.isin(table.keys, needed)
        tables[n - 1] = NgramTable(*(values[kept] for values in table))
        needed = np.unique(tables[n - 1].keys // base)
    while len(tables) > 1 and not len(tables[-1].keys):
        tables.pop()
    for n in range(2, len(tables) + 1):  # the shorter contexts' distributions have changed, too
        _set_backoffs(tables, n, base)
    tables[-1].backoffs[:] = 0.0
    return tables


def _worth(
    tables: Sequence[NgramTable], contexts: Counts, n: int, base: int, threshold: float
) -> ndarray:
    """Return which n-grams of length ``n`` change the model by ``threshold`` at least."""
    table = tables[n - 1]
    own, lower, _, group, left, left_lower = _masses(tables, n, base)
    left, left_lower = left[group], left_lower[group]
    before, after = np.log(left / left_lower), np.log((left + own) / (left_lower + lower))
    change = own * (np.log(lower) + after - table.log_probs) + left * (after - before)
    index, present = find_keys(contexts.keys, table.keys // base)
    weight = np.where(present, contexts.counts[index], 0) / contexts.counts.sum()
    return np.expm1(-weight * change) >= threshold


def _set_backoffs(tables: Sequence[NgramTable], n: int, base: int) -> None:
    """Set the back-off weights of the contexts of length ``n - 1``."""
    table, shorter = tables[n - 1], tables[n - 2]
    shorter.backoffs[:] = 0.0
    _, _, first, _, left, left_lower = _masses(tables, n, base)
    index, _ = find_keys(shorter.keys, table.keys[first] // base)
    shorter.backoffs[index] = np.log(left / left_lower)


def _masses(tables: Sequence[NgramTable], n: int, base: int) -> tuple[ndarray, ...]:
    """Return P and the shorter context's P of each n-gram [m], the first n-gram of each context [c], the
    context of each n-gram [m], what either P leaves to all others after each context [c] (twice).
    """
    table = tables[n - 1]
    _, first, group = np.unique(table.keys // base, return_index=True, return_inverse=True)
    shorter = [None, *tables[: n - 1]]  # by length
    lower = np.exp(log_prob(shorter, table.keys % base ** (n - 1), n - 1, base))
    own = np.exp(table.log_probs)
    left, left_lower = (np.maximum(1.0 - np.add.reduceat(part, first), _LEAST) for part in (own, lower))
    return own, lower, first, group, left, left_lower
