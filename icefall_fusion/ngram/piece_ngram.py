"""Back-off n-gram over acoustic pieces as sorted tensors: thousands of contexts scored in a few gathers.
Knows: tensors, ARPA files. Must not know: acoustic models, search, fusion, how counts become probabilities.
"""
from __future__ import annotations

import functools
import hashlib
import itertools
import math
import zlib
from pathlib import Path
from typing import Optional, Sequence, TextIO

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike, opener

NOTHING = -1  # in a context: there is no piece so far back
START, END, UNKNOWN = "<s>", "</s>", "<unk>"
_MOST_PLACES = 2**22  # a direct index of so many keys is faster than a search, and takes 32 MB at most
LN10 = math.log(10.0)
_PIECES = "# pieces "  # begins a comment before the data, of our own files
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

    def tensors(self) -> list[Tensor]:
        """Return all that it holds."""
        index = [] if self._places is None else [self._places]
        return [self.keys, self.log_probs, self.backoffs, *index]

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
        self._copies: dict[torch.device, PieceNgram] = {}
        self.start_id = size
        self.end_id = self.eos_id = size + 1
        longest = longest_order(size)
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

    @property
    def table_bytes(self) -> int:
        """What its tables take."""
        return sum(x.numel() * x.element_size() for order in self.orders for x in order.tensors())

    def to(self, device: torch.device) -> PieceNgram:
        """Return the model on a device; it is copied there once."""
        device = torch.device(device)
        if self.device == device:
            return self
        if device not in self._copies:
            orders = [order.to(device) for order in self.orders]
            self._copies[device] = PieceNgram(self.size, orders, self.name)
        return self._copies[device]

    def check_size(self, pieces: int) -> None:
        """Raise ValueError, with both sizes, unless the acoustic model has as many pieces."""
        check(self.size == pieces, f"the n-gram {self.name}", f"be over {pieces} acoustic pieces", self.size)

    def score(self, contexts: Sequence[Tensor], pieces: Tensor) -> Tensor:
        """Return natural-log P(piece | context) of the pieces' shape.

        Args:
            contexts: the piece before, the one before that, ...; as many as there are, each of a shape that
                broadcasts to that of ``pieces``; START or NOTHING at the beginning of the sentence.
            pieces: ids, END included.
        """
        scores = self.orders[0].log_probs[pieces]
        if not contexts:
            return scores
        history = torch.zeros_like(contexts[0])  # key of the context, as long as it is known
        known = torch.ones_like(history, dtype=torch.bool)
        for shorter, longer, piece in zip(self.orders, self.orders[1:], contexts):
            known = known & (piece >= 0)
            history = history + piece.clamp(min=0) * self.base ** (shorter.length - 1)
            place, found = shorter.find(history)
            backoff = shorter.backoffs[place].masked_fill(~(known & found), 0.0)
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
            ValueError: it is no ARPA file, is cut short, holds something that is no piece, or says that it
                was made of other pieces (files of other toolkits do not say of which).
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no ARPA file at {path}")
        try:
            with opener(path)(path, "rt", encoding="utf-8") as file:
                tables = _read_tables(file, pieces, str(path))
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:  # gzip's words for a broken file
            raise ValueError(f"{path} must be an ARPA file, but reading says: {error}") from error
        return cls(len(pieces), tables, str(path))


def piece_ids(pieces: Sequence[str]) -> dict[str, int]:
    """Return the id of every piece, of START and of END.

    Acoustic vocabularies may have silent pieces of the same names (wav2vec 2.0's have): to an n-gram START
    and END are its own, and those pieces are never said.

    Raises:
        ValueError: pieces repeat, or hold white space.
    """
    twice = len(pieces) - len(set(pieces))
    check(twice == 0, "pieces", "differ from one another (duplicates)", twice)
    odd = [piece for piece in pieces if piece.split() != [piece]]
    check(not odd, "pieces", "not be empty or hold white space, as an ARPA file is to have them", odd[:3])
    return {**{piece: index for index, piece in enumerate(pieces)}, START: len(pieces), END: len(pieces) + 1}


def describe_pieces(pieces: Sequence[str]) -> str:
    """Return the comment by which an ARPA file says of which pieces it is, in whatever order they are."""
    return f"{_PIECES}{len(pieces)} {hashlib.sha1(chr(10).join(sorted(pieces)).encode()).hexdigest()}"


def _check_pieces(line: str, pieces: Sequence[str], name: str) -> None:
    if line != describe_pieces(pieces):
        raise ValueError(
            f"{name} must be an n-gram of these {len(pieces)} acoustic pieces, but was made of "
            f"{line[len(_PIECES) :].split(' ')[0]} others: make it again with them (job train-ngram)"
        )


def longest_order(size: int) -> int:
    """Return the longest n for which n-grams over ``size`` pieces, START and END have keys of 63 bits."""
    return int(63 / math.log2(size + 2))


def _read_tables(file: TextIO, pieces: Sequence[str], name: str) -> list[NgramOrder]:
    counts: list[int] = []
    tables: list[NgramOrder] = []
    ids = piece_ids(pieces)
    base = max(ids.values()) + 1
    for line in file:
        line = line.strip()
        if line.startswith(_PIECES):
            _check_pieces(line, pieces, name)
        elif line.startswith("ngram "):
            count = line.partition("=")[2].strip()
            check(count.isdecimal(), f"{name}, {line!r}", "have a count of n-grams", count)
            counts.append(int(count))
            longest = longest_order(base - 2)
            rule = f"be at most {longest} for {base - 2} acoustic pieces"
            check(len(counts) <= longest, f"{name}: its longest n-gram", rule, len(counts))
        elif line.endswith("-grams:"):
            length = len(tables) + 1
            check(length <= len(counts), name, "announce its n-grams under \\data\\", line)
            tables.append(_read_table(file, length, counts[length - 1], ids, base, name))
        elif line == "\\end\\":
            break
    check(len(tables) == len(counts) >= 1, name, f"have {max(1, len(counts))} orders of n-grams", len(tables))
    while not len(tables[-1].keys):  # a short text has none of the longest; unigrams there always are
        tables.pop()
    return tables


def _read_table(
    file: TextIO, length: int, count: int, ids: dict[str, int], base: int, name: str
) -> NgramOrder:
    where = f"{name}, {length}-grams"
    lines = list(itertools.takewhile(str.strip, file))
    quick = _read_plain_lines(lines, length, ids, base)
    keys, values = _read_lines(lines, length, ids, base, where, name) if quick is None else quick
    check(len(lines) == count, where, f"be {count} as announced", len(lines))
    ordered, places = np.unique(keys, return_index=True)
    check(len(ordered) == len(keys), where, "differ from one another (duplicates)", len(keys) - len(ordered))
    values = values[places]
    if length == 1:  # pieces that the text never had
        known, ordered = ordered, np.arange(base)
        full = np.tile(np.array([_IMPOSSIBLE, 0.0]), (base, 1))
        full[known] = values
        values = full
    log_probs, backoffs = torch.from_numpy(values.astype(np.float32) * np.float32(LN10)).unbind(1)
    return NgramOrder(length, torch.from_numpy(ordered), log_probs.contiguous(), backoffs.contiguous())


def _read_plain_lines(
    lines: Sequence[str], length: int, ids: dict[str, int], base: int
) -> Optional[tuple[ndarray, ndarray]]:
    """Return keys [n] and numbers [n, 2] if all lines are of one form, with known pieces, else None."""
    separators = {line.count(" ") + line.count("\t") for line in lines}
    width = 1 + max(separators, default=0)
    fields = "".join(lines).split()  # one list of text: millions of small lists would keep the collector busy
    if separators not in ({length}, {length + 1}) or len(fields) != width * len(lines):
        return None
    try:
        keys = np.zeros(len(lines), np.int64)
        for place in range(1, length + 1):
            pieces = map(ids.__getitem__, fields[place::width])
            keys = keys * base + np.fromiter(pieces, np.int64, len(lines))
        values = np.zeros((len(lines), 2))
        for column, place in enumerate(range(0, width, length + 1)):  # the longest have no back-off weight
            values[:, column] = np.fromiter(map(float, fields[place::width]), np.float64, len(lines))
    except (KeyError, ValueError):
        return None
    return None if np.isnan(values).any() else (keys, np.maximum(values, _IMPOSSIBLE))


def _read_lines(
    lines: Sequence[str], length: int, ids: dict[str, int], base: int, where: str, name: str
) -> tuple[ndarray, ndarray]:
    """Return what `_read_plain_lines` does, of any lines that ARPA files may have; tells what is wrong."""
    keys: list[int] = []
    numbers: list[tuple[float, float]] = []
    for line in lines:
        fields = line.split()
        check(len(fields) in (length + 1, length + 2), where,
              f"have lines of a number, {length} pieces and perhaps a number", line.strip())
        if UNKNOWN in fields and UNKNOWN not in ids:
            continue  # toolkits give it a probability; here nothing is unknown
        try:
            found = [ids[piece] for piece in fields[1 : length + 1]]
        except KeyError as error:
            raise ValueError(f"{name} must be an n-gram of the acoustic pieces, but holds {error}") from None
        keys.append(functools.reduce(lambda key, piece: key * base + piece, found))
        backoff = fields[length + 1] if len(fields) > length + 1 else "0"
        numbers.append((_number(fields[0], where, line), _number(backoff, where, line)))
    return np.array(keys, np.int64), np.array(numbers, np.float64).reshape(-1, 2)


def _number(text: str, where: str, line: str) -> float:
    """Return a number of an ARPA file; log 0 becomes the lowest that toolkits write."""
    try:
        value = max(float(text), _IMPOSSIBLE)
    except ValueError:
        value = math.nan
    check(not math.isnan(value), f"{where}, {line.strip()!r}", "have numbers", text)
    return value
