"""Back-off n-gram over acoustic pieces as sorted tensors: thousands of contexts scored in a few gathers.
Knows: tensors, ARPA files. Must not know: acoustic models, search, fusion, how counts become probabilities.
"""
from __future__ import annotations

import functools
import gzip
import math
from pathlib import Path
from typing import Optional, Sequence, TextIO

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from icefall_fusion.checks import check
from icefall_fusion.files import PathLike

NOTHING = -1  # in a context: there is no piece so far back
START, END = "<s>", "</s>"
_MOST_PLACES = 2**22  # a direct index of so many keys is faster than a search, and takes 32 MB at most
_LN10 = math.log(10.0)
_IMPOSSIBLE = -99.0  # log10, as toolkits write 0


class NgramOrder:
    """All n-grams of one length, sorted by key.

    The key of a n-gram is the number that its piece ids are the digits of, oldest first, in the base of all
    ids; so the key of the context of a n-gram is a prefix of its own.

    Args:
        length: n.
        keys: [n] int64, rising.
        log_probs: [n] float32, natural log of P(last piece | pieces before it).
        backoffs: [n] float32, natural log of the weight of shorter contexts after this n-gram.
    """

    def __init__(self, length: int, keys: Tensor, log_probs: Tensor, backoffs: Tensor) -> None:
        self.length, self.keys, self.log_probs, self.backoffs = length, keys, log_probs, backoffs
        self._places: Optional[Tensor] = None  # of every possible key, where those are few; or NOTHING
        if len(keys) and int(keys[-1]) < _MOST_PLACES:
            self._places = torch.full((int(keys[-1]) + 2,), NOTHING, device=keys.device)
            self._places[keys] = torch.arange(len(keys), device=keys.device)

    def to(self, device: torch.device) -> NgramOrder:
        """Return the table on a device."""
        return NgramOrder(self.length, *(x.to(device) for x in (self.keys, self.log_probs, self.backoffs)))

    def find(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the place of each key and whether it is there, two tensors of the keys' shape."""
        if self._places is not None:
            place = self._places[keys.clamp(max=len(self._places) - 1)]
            return place.clamp(min=0), place >= 0
        place = torch.searchsorted(self.keys, keys).clamp_(max=len(self.keys) - 1)
        return place, self.keys[place] == keys


class PieceNgram:
    """A back-off n-gram language model over acoustic pieces (Katz 1987), as ARPA files hold it.

    Every table is a sorted tensor, so that a search asks about all its hypotheses at once, without leaving
    the device.

    Args:
        size: V, number of pieces; the ids of START and END follow them.
        orders: the n-grams of length 1, 2, ...; unigrams of every id.
        name: for messages.
    """

    def __init__(self, size: int, orders: Sequence[NgramOrder], name: str = "n-gram") -> None:
        self.size, self.base, self.orders, self.name = size, size + 2, list(orders), name
        self.start_id = size
        self.end_id = self.eos_id = size + 1
        longest = int(63 / math.log2(self.base))
        check(1 <= len(orders) <= longest, "orders", f"be 1..{longest} for {size} pieces", len(orders))
        check(len(orders[0].keys) == self.base, "unigrams", f"be {self.base}", len(orders[0].keys))

    @property
    def order(self) -> int:
        """The longest n."""
        return len(self.orders)

    @property
    def device(self) -> torch.device:
        """Where its tables are."""
        return self.orders[0].keys.device

    def to(self, device: torch.device) -> PieceNgram:
        """Return the model on a device."""
        if self.device == torch.device(device):
            return self
        return PieceNgram(self.size, [order.to(device) for order in self.orders], self.name)

    def check_size(self, pieces: int) -> None:
        """Raise ValueError, with both sizes, unless the acoustic model has as many pieces."""
        check(self.size == pieces, f"the n-gram {self.name}", f"be over {pieces} acoustic pieces", self.size)

    def score(self, contexts: Sequence[Tensor], pieces: Tensor) -> Tensor:
        """Return natural-log P(piece | context) of the pieces' shape.

        Args:
            contexts: the piece before, the one before that, ...; as many as there are, each of the shape of
                ``pieces``; START or NOTHING at the beginning of the sentence.
            pieces: ids, END included.
        """
        scores = self.orders[0].log_probs[pieces]
        history = torch.zeros_like(pieces)  # key of the context, as long as it is known
        known = torch.ones_like(pieces, dtype=torch.bool)
        for shorter, longer, piece in zip(self.orders, self.orders[1:], contexts):
            known = known & (piece >= 0)
            history = history + piece.clamp(min=0) * self.base ** (shorter.length - 1)
            place, found = shorter.find(history)
            backoff = torch.where(known & found, shorter.backoffs[place], 0.0)
            place, found = longer.find(history * self.base + pieces)
            scores = torch.where(known & found, longer.log_probs[place], scores + backoff)
        return scores

    def score_sentences(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Score sentences that stand end to end, each beginning with START and ending with END.

        Args:
            ids: [n] int64.

        Returns:
            natural-log probability of every id but START [m], and the number of its sentence [m].
        """
        place = (ids != self.start_id).nonzero().squeeze(1)
        contexts: list[Tensor] = []
        beyond = torch.zeros_like(place, dtype=torch.bool)
        for back in range(1, self.order):
            context = ids[(place - back).clamp(min=0)].masked_fill(beyond, NOTHING)
            contexts.append(context)
            beyond = beyond | (context == self.start_id)
        return self.score(contexts, ids[place]), torch.cumsum(ids == self.start_id, 0)[place] - 1

    @classmethod
    def load(cls, path: PathLike, pieces: Sequence[str]) -> PieceNgram:
        """Read an ARPA file (``.gz`` or not) whose words are acoustic pieces.

        Args:
            path: the file.
            pieces: text of every id; those that the file lacks are taken as impossible.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no ARPA file, is cut short, or holds something that is no piece.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no ARPA file at {path}")
        ids = piece_ids(pieces)
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rt", encoding="utf-8") as file:
                tables = _read_tables(file, ids, str(path))
        except (OSError, EOFError, UnicodeDecodeError) as error:  # gzip's words for a broken file
            raise ValueError(f"{path} must be an ARPA file, but reading says: {error}") from error
        return cls(len(pieces), tables, str(path))


def piece_ids(pieces: Sequence[str]) -> dict[str, int]:
    """Return the id of every piece, of START and of END.

    Raises:
        ValueError: pieces repeat, or are START or END.
    """
    names = [*pieces, START, END]
    ids = {name: index for index, name in enumerate(names)}
    twice = len(names) - len(ids)
    check(twice == 0, "pieces", f"differ from one another, {START} and {END} (duplicates)", twice)
    return ids


def _read_tables(file: TextIO, ids: dict[str, int], name: str) -> list[NgramOrder]:
    counts: list[int] = []
    tables: list[NgramOrder] = []
    for line in file:
        line = line.strip()
        if line.startswith("ngram "):
            counts.append(int(line.partition("=")[2]))
        elif line.endswith("-grams:"):
            length = len(tables) + 1
            check(length <= len(counts), name, "announce its n-grams under \\data\\", line)
            tables.append(_read_table(file, length, counts[length - 1], ids, name))
        elif line == "\\end\\":
            break
    check(len(tables) == len(counts) >= 1, name, f"have {max(1, len(counts))} orders of n-grams", len(tables))
    return tables


def _read_table(file: TextIO, length: int, count: int, ids: dict[str, int], name: str) -> NgramOrder:
    base = len(ids)
    keys, numbers = np.empty(count, np.int64), np.zeros((count, 2), np.float32)
    row = 0
    for line in file:
        fields = line.split()
        if not fields:
            break
        check(len(fields) in (length + 1, length + 2), f"{name}, {length}-grams",
              f"have lines of a number, {length} pieces and perhaps a number", line.strip())
        try:
            found = [ids[piece] for piece in fields[1 : length + 1]]
        except KeyError as error:
            raise ValueError(f"{name} must be an n-gram of the acoustic pieces, but holds {error}") from None
        check(row < count, f"{name}, {length}-grams", f"be {count} as announced", "more")
        keys[row] = functools.reduce(lambda key, piece: key * base + piece, found)
        numbers[row] = float(fields[0]), float(fields[length + 1]) if len(fields) > length + 1 else 0.0
        row += 1
    check(row == count, f"{name}, {length}-grams", f"be {count} as announced", row)
    if length == 1:  # pieces that the text never had
        absent = np.setdiff1d(np.arange(base), keys)
        keys = np.concatenate([keys, absent])
        numbers = np.concatenate([numbers, np.tile(np.float32([_IMPOSSIBLE, 0]), (len(absent), 1))])
    order = np.argsort(keys, kind="stable")
    twice = int((np.diff(keys[order]) == 0).sum())
    check(twice == 0, f"{name}, {length}-grams", "differ from one another (duplicates)", twice)
    return _make_order(length, keys[order], numbers[order])


def _make_order(length: int, keys: ndarray, numbers: ndarray) -> NgramOrder:
    """Return an order from sorted keys [n] and log10 numbers [n, 2]: probabilities, back-off weights."""
    natural = torch.from_numpy(numbers.astype(np.float32) * np.float32(_LN10))
    return NgramOrder(length, torch.from_numpy(keys), natural[:, 0].contiguous(), natural[:, 1].contiguous())
