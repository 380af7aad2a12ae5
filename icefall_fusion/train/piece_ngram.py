"""Job ``train-ngram``: a back-off n-gram over the acoustic pieces, from a stream of ids to an ARPA file.
Knows: token streams, counts, ARPA files. Must not know: neural models, search, fusion.

Legend: a row of ids is a n-gram, its first n - 1 ids are its context, its last n - 1 its suffix.
"""
from __future__ import annotations

import contextlib
import gzip
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence, TextIO

import numpy as np
import torch
from numpy import ndarray

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike, atomic_path
from icefall_fusion.ngram.piece_ngram import (
    END,
    LN10,
    START,
    PieceNgram,
    describe_pieces,
    longest_order,
    piece_ids,
)
from icefall_fusion.text.tokens import AcousticTokens
from icefall_fusion.train.token_stream import document_bounds

LOG_ZERO = -99.0 * LN10  # as toolkits write it
_FEW = np.array([0.0, 0.5, 1.0, 1.5])  # discounts where there is too little text to estimate them


@dataclass(frozen=True)
class TrainNgramOptions:
    """Train an n-gram over the acoustic pieces, for shallow fusion and for the look-ahead of delayed fusion.

    All n-grams are held in memory: about 60 bytes for each piece of the text and each order.

    Args:
        data: folder with ``train.npy`` and ``dev.npy``: ids of documents ``bos t1 .. tn eos`` end to end.
        tokens: the acoustic model's ``bpe.model``, or its folder.
        out: the ARPA file to write; gzipped if it ends in .gz.
        order: longest n-gram.
        cutoffs: for n = 2, 3, ...: n-grams that count less are left out; missing ones are 1 (none left out).
            What counts is Kneser-Ney's: occurrences of the longest, of shorter ones the pieces they follow.
        digits: of the numbers in the file, 2 to 9; fewer make it smaller.
    """

    data: str
    tokens: str
    out: str
    order: int = 3
    cutoffs: tuple[int, ...] = (1, 3, 5)
    digits: int = 5

    def __post_init__(self) -> None:
        check(self.order >= 1, "TrainNgramOptions.order", "be at least 1", self.order)
        for name in ("data", "tokens", "out"):
            check(bool(getattr(self, name)), f"TrainNgramOptions.{name}", "be given", getattr(self, name))
        good = all(cutoff >= 1 for cutoff in self.cutoffs)
        check(good, "TrainNgramOptions.cutoffs", "be at least 1", self.cutoffs)
        check(2 <= self.digits <= 9, "TrainNgramOptions.digits", "be 2 to 9", self.digits)


def run(options: TrainNgramOptions) -> int:
    """Run the job ``train-ngram``; prints the sizes, and the perplexity of dev a word as ``train-lm`` does.

    Raises:
        FileNotFoundError, ValueError: streams or vocabulary are missing or do not fit each other.
    """
    tokens = AcousticTokens.load(options.tokens)
    mark = tokens.sos_eos_id
    check(mark is not None, f"pieces of {options.tokens}", "have <sos/eos>", mark)
    longest = longest_order(tokens.size)
    rule = f"be at most {longest} for {tokens.size} pieces"
    check(options.order <= longest, "TrainNgramOptions.order", rule, options.order)
    streams = []
    for name in ("train", "dev"):
        path = Path(options.data) / f"{name}.npy"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        stream = np.load(path)
        check(int(stream.max(initial=0)) < tokens.size, f"ids of {path}", f"be below {tokens.size}",
              int(stream.max(initial=0)))
        streams.append((stream, document_bounds(stream, mark, mark, str(path))))
    (train, bounds), (dev, dev_bounds) = streams
    counts = count_ngrams(train, bounds, tokens.size, options.order)
    estimates = kneser_ney(counts, tokens.size, options.cutoffs)
    write_arpa(options.out, estimates, tokens.pieces, options.digits)
    words = sum(len(tokens.words(dev[begin + 1 : end - 1].tolist())) + 1 for begin, end in dev_bounds)
    marked = torch.from_numpy(with_marks(dev, dev_bounds, tokens.size))
    scores, _ = PieceNgram.load(options.out, tokens.pieces).score_sentences(marked)
    perplexity = math.exp(-float(scores.double().sum()) / words)
    sizes = ", ".join(f"{len(estimate.keys)} {n}-grams" for n, estimate in enumerate(estimates, 1))
    print(f"{options.out}: {sizes}; {perplexity:.1f} perplexity a word on dev")
    return 0


class Counts(NamedTuple):
    """The n-grams of one length: keys (see NgramOrder) [n] int64, rising, and how often each counts."""

    keys: ndarray
    counts: ndarray


class Estimate(NamedTuple):
    """What an ARPA file says of the n-grams of one length: keys [n], natural logs [n] and [n]."""

    keys: ndarray
    log_probs: ndarray
    backoffs: ndarray


def count_ngrams(stream: ndarray, bounds: ndarray, size: int, order: int) -> list[Counts]:
    """Count the n-grams of documents ``bos t1 .. tn eos`` that stand end to end.

    Args:
        stream: [n] ids, all below ``size``.
        bounds: [documents, 2] where each begins (its bos) and one past its end (its eos).
        size: number of pieces; in keys, START is ``size`` and END ``size + 1``.
        order: longest n.

    Returns:
        for n = 1 .. order how often each n-gram is in a document.
    """
    base = size + 2
    ids = with_marks(stream, bounds, size)
    result, keys, whole = [], ids, np.ones(len(ids), bool)
    for n in range(1, order + 1):
        if n > 1:
            keys = keys[:-1] * base + ids[n - 1 :]
            whole = whole[:-1] & (ids[n - 1 :] != size)  # nothing goes on from one document to the next
        result.append(Counts(*np.unique(keys[whole], return_counts=True)))
    return result


def with_marks(stream: ndarray, bounds: ndarray, size: int) -> ndarray:
    """Return int64 ids with START (``size``) and END (``size + 1``) for the documents' own marks."""
    ids = stream.astype(np.int64)
    ids[bounds[:, 0]], ids[bounds[:, 1] - 1] = size, size + 1
    return ids


def kneser_ney(counts: Sequence[Counts], size: int, cutoffs: Sequence[int] = ()) -> list[Estimate]:
    """Estimate by interpolated, modified Kneser-Ney (Chen and Goodman 1998, section 3).

    Args:
        counts: of `count_ngrams`.
        size: number of pieces.
        cutoffs: for n = 2, 3, ...: n-grams that count less are left out and their mass goes to shorter
            contexts; what a longer n-gram begins with stays. Missing ones are 1.

    Returns:
        for each n the n-grams that stay.
    """
    base = size + 2
    counts = [count for count in counts if len(count.keys)]  # no document may be long enough for more
    cutoffs = [0, *cutoffs, *[1] * len(counts)][: len(counts)]
    adjusted = [_continuations(*pair, n, base) for n, pair in enumerate(zip(counts, counts[1:]), 1)]
    adjusted.append(counts[-1])
    unigrams = np.zeros(base, np.int64)
    unigrams[adjusted[0].keys] = adjusted[0].counts
    followers = np.delete(np.arange(base), size)  # all but START, seen or not
    adjusted[0] = Counts(followers, unigrams[followers])
    uniform = Estimate(np.zeros(1, np.int64), np.zeros(1) - math.log(size + 1), np.zeros(1))
    estimates = [uniform]  # n-grams of length 0
    for n, (count, kept) in enumerate(zip(adjusted, _kept(adjusted, cutoffs, base)), 1):
        if not kept.any():  # then none of the longer ones either
            break
        own, contexts, weights = _discounted(count, kept, base)
        place, found = _find(estimates[-1].keys, contexts)
        estimates[-1].backoffs[place[found]] = np.log(weights[found])
        keys = count.keys[kept]
        lower = np.exp(log_prob(estimates, keys % base ** (n - 1), n - 1, base))
        weight = np.exp(estimates[-1].backoffs[np.searchsorted(estimates[-1].keys, keys // base)])
        logs = np.log(own + weight * lower)
        if n == 1:
            keys, logs = np.append(keys, size), np.append(logs, LOG_ZERO)
            order = np.argsort(keys)
            keys, logs = keys[order], logs[order]
        estimates.append(Estimate(keys, logs, np.zeros(len(keys))))
    return estimates[1:]


def log_prob(estimates: Sequence[Estimate], keys: ndarray, n: int, base: int) -> ndarray:
    """Return log P of the last id of n-grams given the ids before it [len(keys)], backing off as needed.

    Args:
        estimates: of the lengths 0, 1, ..., n at least.
        keys: of n-grams of length ``n``.
        n: their length.
        base: of keys.
    """
    result = np.zeros(len(keys))
    backing = np.arange(len(keys))  # those that were not found so far
    while len(backing):
        place, found = _find(estimates[n].keys, keys)
        result[backing[found]] += estimates[n].log_probs[place[found]]
        backing, keys = backing[~found], keys[~found]
        if n > 1:
            place, found = _find(estimates[n - 1].keys, keys // base)
            result[backing[found]] += estimates[n - 1].backoffs[place[found]]
        n -= 1
        keys = keys % base**n
    return result


def _continuations(counts: Counts, longer: Counts, n: int, base: int) -> Counts:
    """Return how many ids each n-gram follows; what begins a document follows none and keeps its count."""
    keys, different = np.unique(longer.keys % base**n, return_counts=True)
    place, found = _find(keys, counts.keys)
    return Counts(counts.keys, np.where(found, different[place], counts.counts))


def _kept(counts: Sequence[Counts], cutoffs: Sequence[int], base: int) -> list[ndarray]:
    """Return which n-grams of each length stay."""
    kept, needed = [], np.zeros(0, np.int64)
    for count, cutoff in zip(reversed(counts), reversed(cutoffs)):
        stays = (count.counts >= cutoff) | np.isin(count.keys, needed)
        needed = np.unique(count.keys[stays] // base)
        kept.append(stays)
    return kept[::-1]


def _discounted(count: Counts, kept: ndarray, base: int) -> tuple[ndarray, ndarray, ndarray]:
    """Return the discounted probabilities of the kept [n], all contexts [m] and what is left for each [m]."""
    contexts, first = np.unique(count.keys // base, return_index=True)
    total = np.add.reduceat(count.counts, first)
    totals = np.repeat(total, np.diff(np.append(first, len(count.keys))))
    own = (count.counts - _discounts(count.counts)[np.minimum(count.counts, 3)]) / totals
    left = 1.0 - np.add.reduceat(np.where(kept, own, 0.0), first)
    return own[kept], contexts, np.clip(left, np.exp(LOG_ZERO), 1.0)


def _discounts(counts: ndarray) -> ndarray:
    """Return what is taken from n-grams that count 0, 1, 2 and more, from the counts of counts."""
    ones, twos, threes, fours = (float((counts == n).sum()) for n in (1, 2, 3, 4))
    if min(ones, twos, threes) == 0:
        return _FEW
    share = ones / (ones + 2 * twos)
    discounts = np.array([0.0, 1 - 2 * share * twos / ones, 2 - 3 * share * threes / twos,
                          3 - 4 * share * fours / threes])
    good = (discounts[1:] > 0).all() and (discounts < np.array([1, 1, 2, 3])).all()
    return discounts if good else _FEW


def _find(sorted_keys: ndarray, keys: ndarray) -> tuple[ndarray, ndarray]:
    """Return the place of each key and whether it is there (of at least one sorted key)."""
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return place, sorted_keys[place] == keys


def write_arpa(
    path: PathLike, estimates: Sequence[Estimate], pieces: Sequence[str], digits: int = 5
) -> None:
    """Write an ARPA file, gzipped if it is named so.

    Args:
        path: the file.
        estimates: of lengths 1, 2, ...
        pieces: text of every id; what is named as START or END is silent and left out.
        digits: of each number.
    """
    names = [*pieces, START, END]
    ids = piece_ids(pieces)
    silent = np.array([i for i, name in enumerate(names) if ids[name] != i], np.int64)
    last = len(estimates)
    lines = [
        _lines(n, estimate, names, silent, n == last, digits) for n, estimate in enumerate(estimates, 1)
    ]
    with atomic_path(path) as temporary, _writer(temporary) as file:
        file.write(f"{describe_pieces(pieces)}\n\\data\\\n")
        file.writelines(f"ngram {n}={len(rows)}\n" for n, rows in enumerate(lines, 1))
        for n, rows in enumerate(lines, 1):
            file.write(f"\n\\{n}-grams:\n")
            file.writelines(rows)
        file.write("\n\\end\\\n")


def _lines(
    n: int, estimate: Estimate, names: Sequence[str], silent: ndarray, last: bool, digits: int
) -> list[str]:
    ids = np.stack([estimate.keys // len(names) ** place % len(names) for place in range(n)][::-1], axis=1)
    spoken = ~np.isin(ids, silent).any(axis=1)
    columns = (ids[spoken], estimate.log_probs[spoken] / LN10, estimate.backoffs[spoken] / LN10)
    return [
        f"{first:.{digits}g}\t{' '.join(names[i] for i in row)}"
        + ("\n" if last else f"\t{second:.{digits}g}\n")
        for row, first, second in zip(*(column.tolist() for column in columns))
    ]


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[TextIO]:
    with path.open("wb") as file:
        if path.suffix == ".gz":  # neither name nor time in it: equal models are equal files
            with gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
                with io.TextIOWrapper(packed, encoding="utf-8") as text:
                    yield text
        else:
            with io.TextIOWrapper(file, encoding="utf-8") as text:
                yield text
