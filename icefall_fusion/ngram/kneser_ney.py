"""Counts of n-grams over acoustic pieces, and probabilities from them by modified Kneser-Ney.
Knows: streams of ids, keys of n-grams. Must not know: files, searches.

Legend: a row of ids is an n-gram, its first n - 1 ids are its context, its last n - 1 its suffix.
"""
from __future__ import annotations

import math
from typing import NamedTuple, Sequence

import numpy as np
from numpy import ndarray

from icefall_fusion.ngram.arpa import LOG_ZERO, NgramTable

_DEFAULT_DISCOUNTS = np.array([0.0, 0.5, 1.0, 1.5])  # for a text too small to estimate them


class Counts(NamedTuple):
    """The n-grams of one length: keys (see NgramTable) [n] int64, rising, and their counts."""

    keys: ndarray
    counts: ndarray


def count_ngrams(stream: ndarray, bounds: ndarray, size: int, order: int) -> list[Counts]:
    """Count the n-grams of documents ``bos t1 .. tn eos`` that stand end to end.

    Args:
        stream: [n] ids, all below ``size``.
        bounds: [documents, 2] index of each document's bos, and of its eos plus one.
        size: number of pieces; in keys, START is ``size`` and END ``size + 1``.
        order: longest n.

    Returns:
        for n = 1 .. order the count of each n-gram.
    """
    base = size + 2
    ids = with_marks(stream, bounds, size)
    result, keys, whole = [], ids, np.ones(len(ids), bool)
    for n in range(1, order + 1):
        if n > 1:
            keys = keys[:-1] * base + ids[n - 1 :]
            whole = whole[:-1] & (ids[n - 1 :] != size)  # no n-gram spans two documents
        result.append(Counts(*np.unique(keys[whole], return_counts=True)))
    return result


def with_marks(stream: ndarray, bounds: ndarray, size: int) -> ndarray:
    """Return int64 ids with START (``size``) and END (``size + 1``) in place of each bos and eos."""
    ids = stream.astype(np.int64)
    ids[bounds[:, 0]], ids[bounds[:, 1] - 1] = size, size + 1
    return ids


def kneser_ney(counts: Sequence[Counts], size: int, cutoffs: Sequence[int] = ()) -> list[NgramTable]:
    """Estimate by interpolated, modified Kneser-Ney (Chen and Goodman 1998, section 3).

    Args:
        counts: of `count_ngrams`.
        size: number of pieces.
        cutoffs: for n = 2, 3, ...: the smallest count that is kept; the mass of the others goes to shorter
            contexts. Prefixes of kept n-grams are kept too. Missing cutoffs are 1.

    Returns:
        the kept n-grams of each length.
    """
    base = size + 2
    counts = [count for count in counts if len(count.keys)]  # documents may be too short for the longest
    cutoffs = [0, *cutoffs, *[1] * len(counts)][: len(counts)]
    adjusted = [_continuations(*pair, n, base) for n, pair in enumerate(zip(counts, counts[1:]), 1)]
    adjusted.append(counts[-1])
    unigrams = np.zeros(base, np.int64)
    unigrams[adjusted[0].keys] = adjusted[0].counts
    followers = np.delete(np.arange(base), size)  # all but START, also those without a count
    adjusted[0] = Counts(followers, unigrams[followers])
    uniform = NgramTable(np.zeros(1, np.int64), np.zeros(1) - math.log(size + 1), np.zeros(1))
    estimates = [uniform]  # n-grams of length 0
    for n, (count, kept) in enumerate(zip(adjusted, _kept(adjusted, cutoffs, base)), 1):
        if not kept.any():  # then no longer n-gram is kept either
            break
        own, contexts, weights = _discounted(count, kept, base)
        index, present = find_keys(estimates[-1].keys, contexts)
        estimates[-1].backoffs[index[present]] = np.log(weights[present])
        keys = count.keys[kept]
        lower = np.exp(log_prob(estimates, keys % base ** (n - 1), n - 1, base))
        weight = np.exp(estimates[-1].backoffs[np.searchsorted(estimates[-1].keys, keys // base)])
        logs = np.log(own + weight * lower)
        if n == 1:
            keys, logs = np.append(keys, size), np.append(logs, LOG_ZERO)
            order = np.argsort(keys)
            keys, logs = keys[order], logs[order]
        estimates.append(NgramTable(keys, logs, np.zeros(len(keys))))
    return estimates[1:]


def log_prob(estimates: Sequence[NgramTable], keys: ndarray, n: int, base: int) -> ndarray:
    """Return log P(last id | ids before it) of n-grams [len(keys)], backing off as needed.

    Args:
        estimates: of the lengths 0, 1, ..., n at least.
        keys: of n-grams of length ``n``.
        n: their length.
        base: of keys.
    """
    result = np.zeros(len(keys))
    backing = np.arange(len(keys))  # n-grams that no table has had so far
    while len(backing):
        index, present = find_keys(estimates[n].keys, keys)
        result[backing[present]] += estimates[n].log_probs[index[present]]
        backing, keys = backing[~present], keys[~present]
        if n > 1:
            index, present = find_keys(estimates[n - 1].keys, keys // base)
            result[backing[present]] += estimates[n - 1].backoffs[index[present]]
        n -= 1
        keys = keys % base**n
    return result


def _continuations(counts: Counts, longer: Counts, n: int, base: int) -> Counts:
    """Return how many different ids precede each n-gram; the first of a document keeps its count."""
    keys, different = np.unique(longer.keys % base**n, return_counts=True)
    index, present = find_keys(keys, counts.keys)
    return Counts(counts.keys, np.where(present, different[index], counts.counts))


def _kept(counts: Sequence[Counts], cutoffs: Sequence[int], base: int) -> list[ndarray]:
    """Return which n-grams of each length are kept."""
    kept, needed = [], np.zeros(0, np.int64)
    for count, cutoff in zip(reversed(counts), reversed(cutoffs)):
        keep = (count.counts >= cutoff) | np.isin(count.keys, needed)
        needed = np.unique(count.keys[keep] // base)
        kept.append(keep)
    return kept[::-1]


def _discounted(count: Counts, kept: ndarray, base: int) -> tuple[ndarray, ndarray, ndarray]:
    """Return discounted probabilities of kept n-grams [n], all contexts [m] and the mass left to each [m]."""
    contexts, first = np.unique(count.keys // base, return_index=True)
    total = np.add.reduceat(count.counts, first)
    totals = np.repeat(total, np.diff(np.append(first, len(count.keys))))
    own = (count.counts - _discounts(count.counts)[np.minimum(count.counts, 3)]) / totals
    left = 1.0 - np.add.reduceat(np.where(kept, own, 0.0), first)
    return own[kept], contexts, np.clip(left, np.exp(LOG_ZERO), 1.0)


def _discounts(counts: ndarray) -> ndarray:
    """Return the discounts for counts of 0, 1, 2 and more, estimated from the counts of counts."""
    ones, twos, threes, fours = (float((counts == n).sum()) for n in (1, 2, 3, 4))
    if min(ones, twos, threes) == 0:
        return _DEFAULT_DISCOUNTS
    share = ones / (ones + 2 * twos)
    discounts = np.array([0.0, 1 - 2 * share * twos / ones, 2 - 3 * share * threes / twos,
                          3 - 4 * share * fours / threes])
    good = (discounts[1:] > 0).all() and (discounts < np.array([1, 1, 2, 3])).all()
    return discounts if good else _DEFAULT_DISCOUNTS


def find_keys(sorted_keys: ndarray, keys: ndarray) -> tuple[ndarray, ndarray]:
    """Return the index of each key and whether it is present; there must be at least one sorted key."""
    index = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return index, sorted_keys[index] == keys
