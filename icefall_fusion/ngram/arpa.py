"""ARPA files of n-grams over acoustic pieces: read into sorted tables, written from them.
Knows: pieces, keys of n-grams, the file format. Must not know: how n-grams are scored or estimated.
"""
from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import itertools
import math
import zlib
from pathlib import Path
from typing import Iterator, NamedTuple, Optional, Sequence, TextIO

import numpy as np
from numpy import ndarray

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike, atomic_path, opener

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
LN10 = math.log(10.0)
_LOG10_ZERO = -99.0  # log10 of 0, as toolkits write it
LOG_ZERO = _LOG10_ZERO * LN10
_PIECES = "# pieces "  # starts a comment before the data of our own files


class NgramTable(NamedTuple):
    """All n-grams of one length, as an ARPA file has them.

    The key of an n-gram is the number whose digits are its piece ids, oldest first, in the base of all ids
    (pieces, START and END). So the key of an n-gram's context is a prefix of its own.

    Args:
        keys: [n] int64, rising.
        log_probs: [n] natural log of P(last piece | pieces before it).
        backoffs: [n] natural log of the back-off weight of the n-gram as a context.
    """

    keys: ndarray
    log_probs: ndarray
    backoffs: ndarray


def read_arpa(path: PathLike, pieces: Sequence[str]) -> list[NgramTable]:
    """Read an ARPA file (``.gz`` or not) whose words are acoustic pieces.

    Args:
        path: the file.
        pieces: text of every id; those that the file lacks become impossible unigrams.

    Returns:
        the n-grams of length 1, 2, ... in float32.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is no ARPA file, is cut short, has something that is no piece, or states that it was
            made of other pieces (files of other toolkits do not state their pieces).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no ARPA file at {path}")
    try:
        with opener(path)(path, "rt", encoding="utf-8") as file:
            return _read_tables(file, pieces, str(path))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:  # gzip's errors for a broken file
        raise ValueError(f"{path} must be an ARPA file, but cannot be read: {error}") from error


def arpa_words(path: Path) -> tuple[list[str], int]:
    """Return the words of an ARPA file's unigrams, marks left out, and the longest n that it announces.

    Raises:
        ValueError: it has no unigrams.
    """
    words, longest, inside = [], 0, False
    try:
        with opener(path)(path, "rt", encoding="utf-8") as file:
            for line in file:
                if line.startswith("ngram "):
                    longest += 1
                elif line.startswith("\\"):
                    if inside:
                        break
                    inside = line.strip() == "\\1-grams:"
                elif inside and line.strip():
                    words += line.split()[1:2]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{path} must be an ARPA file, but cannot be read: {error}") from error
    words = [word for word in words if word not in (START, END)]
    check(bool(words) and longest > 0, f"{path}", "be an ARPA file with unigrams", f"{len(words)} words")
    return words, longest


def write_arpa(path: PathLike, tables: Sequence[NgramTable], pieces: Sequence[str], digits: int = 5) -> None:
    """Write an ARPA file, gzipped if it ends in .gz.

    Args:
        path: the file.
        tables: n-grams of length 1, 2, ...
        pieces: text of every id; pieces named START or END are silent and left out.
        digits: of each number.
    """
    names = [*pieces, START, END]
    ids = piece_ids(pieces)
    silent = np.array([i for i, name in enumerate(names) if ids[name] != i], np.int64)
    last = len(tables)
    lines = [_lines(n, table, names, silent, n == last, digits) for n, table in enumerate(tables, 1)]
    with atomic_path(path) as temporary, _writer(temporary) as file:
        file.write(f"{_describe_pieces(pieces)}\n\\data\\\n")
        file.writelines(f"ngram {n}={len(rows)}\n" for n, rows in enumerate(lines, 1))
        for n, rows in enumerate(lines, 1):
            file.write(f"\n\\{n}-grams:\n")
            file.writelines(rows)
        file.write("\n\\end\\\n")


def piece_ids(pieces: Sequence[str]) -> dict[str, int]:
    """Return the id of every piece, of START and of END.

    Acoustic vocabularies may have silent pieces of the same names (wav2vec 2.0's have). They never occur: an
    n-gram has its own START and END.

    Raises:
        ValueError: pieces repeat, or have white space.
    """
    twice = len(pieces) - len(set(pieces))
    check(twice == 0, "pieces", "differ from one another (duplicates)", twice)
    odd = [piece for piece in pieces if piece.split() != [piece]]
    check(not odd, "pieces", "not be empty or have white space (an ARPA file needs that)", odd[:3])
    return {**{piece: index for index, piece in enumerate(pieces)}, START: len(pieces), END: len(pieces) + 1}


def longest_order(size: int) -> int:
    """Return the longest n for which n-grams over ``size`` pieces, START and END have keys of 63 bits."""
    return int(63 / math.log2(size + 2))


def _describe_pieces(pieces: Sequence[str]) -> str:
    """Return the comment that identifies the pieces of an ARPA file; their order does not matter."""
    return f"{_PIECES}{len(pieces)} {hashlib.sha1(chr(10).join(sorted(pieces)).encode()).hexdigest()}"


def _check_pieces(line: str, pieces: Sequence[str], name: str) -> None:
    if line != _describe_pieces(pieces):
        raise ValueError(
            f"{name} must be an n-gram of these {len(pieces)} acoustic pieces, but was made of "
            f"{line[len(_PIECES) :].split(' ')[0]} others: make it again with them (job train-ngram)"
        )


def _read_tables(file: TextIO, pieces: Sequence[str], name: str) -> list[NgramTable]:
    counts: list[int] = []
    tables: list[NgramTable] = []
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
    while not len(tables[-1].keys):  # a short text may have none of the longest; it has unigrams
        tables.pop()
    return tables


def _read_table(
    file: TextIO, length: int, count: int, ids: dict[str, int], base: int, name: str
) -> NgramTable:
    """Read the lines of n-grams of one length, which must be ``count``; missing unigrams are impossible."""
    where = f"{name}, {length}-grams"
    lines = list(itertools.takewhile(str.strip, file))
    quick = _read_uniform_lines(lines, length, ids, base)
    keys, values = _read_lines(lines, length, ids, base, where, name) if quick is None else quick
    check(len(lines) == count, where, f"be {count} as announced", len(lines))
    ordered, first = np.unique(keys, return_index=True)
    check(len(ordered) == len(keys), where, "differ from one another (duplicates)", len(keys) - len(ordered))
    values = values[first]
    if length == 1:  # pieces that the text never had
        known, ordered = ordered, np.arange(base)
        full = np.tile(np.array([_LOG10_ZERO, 0.0]), (base, 1))
        full[known] = values
        values = full
    log_probs, backoffs = np.ascontiguousarray((values.astype(np.float32) * np.float32(LN10)).T)
    return NgramTable(ordered, log_probs, backoffs)


def _read_uniform_lines(
    lines: Sequence[str], length: int, ids: dict[str, int], base: int
) -> Optional[tuple[ndarray, ndarray]]:
    """Return keys [n] and log10 values [n, 2] if all lines have one form and known pieces, else None."""
    separators = {line.count(" ") + line.count("\t") for line in lines}
    width = 1 + max(separators, default=0)
    fields = "".join(lines).split()  # one list of text: millions of small lists would keep the collector busy
    if separators not in ({length}, {length + 1}) or len(fields) != width * len(lines):
        return None
    try:
        keys = np.zeros(len(lines), np.int64)
        for column in range(1, length + 1):
            pieces = map(ids.__getitem__, fields[column::width])
            keys = keys * base + np.fromiter(pieces, np.int64, len(lines))
        values = np.zeros((len(lines), 2))
        for index, column in enumerate(range(0, width, length + 1)):  # the longest have no back-off weight
            values[:, index] = np.fromiter(map(float, fields[column::width]), np.float64, len(lines))
    except (KeyError, ValueError):
        return None
    return None if np.isnan(values).any() else (keys, np.maximum(values, _LOG10_ZERO))


def _read_lines(
    lines: Sequence[str], length: int, ids: dict[str, int], base: int, where: str, name: str
) -> tuple[ndarray, ndarray]:
    """As `_read_uniform_lines`, for all lines that ARPA files may have; a wrong line raises ValueError."""
    keys: list[int] = []
    numbers: list[tuple[float, float]] = []
    for line in lines:
        fields = line.split()
        check(len(fields) in (length + 1, length + 2), where,
              f"have lines of a number, {length} pieces and perhaps a number", line.strip())
        if UNKNOWN in fields and UNKNOWN not in ids:
            continue  # toolkits give it a probability; here nothing is unknown
        try:
            digits = [ids[piece] for piece in fields[1 : length + 1]]
        except KeyError as error:
            raise ValueError(f"{name} must be an n-gram of the acoustic pieces, but holds {error}") from None
        keys.append(functools.reduce(lambda key, piece: key * base + piece, digits))
        backoff = fields[length + 1] if len(fields) > length + 1 else "0"
        numbers.append((_number(fields[0], where, line), _number(backoff, where, line)))
    return np.array(keys, np.int64), np.array(numbers, np.float64).reshape(-1, 2)


def _number(text: str, where: str, line: str) -> float:
    """Parse a number; log 0 becomes the lowest that toolkits write."""
    try:
        value = max(float(text), _LOG10_ZERO)
    except ValueError:
        value = math.nan
    check(not math.isnan(value), f"{where}, {line.strip()!r}", "have numbers", text)
    return value


def _lines(
    n: int, table: NgramTable, names: Sequence[str], silent: ndarray, last: bool, digits: int
) -> list[str]:
    """Return the lines of n-grams of length ``n``; the longest have no back-off weights."""
    ids = np.stack([table.keys // len(names) ** digit % len(names) for digit in range(n)][::-1], axis=1)
    spoken = ~np.isin(ids, silent).any(axis=1)
    columns = (ids[spoken], table.log_probs[spoken] / LN10, table.backoffs[spoken] / LN10)
    return [
        f"{first:.{digits}g}\t{' '.join(names[i] for i in row)}"
        + ("\n" if last else f"\t{second:.{digits}g}\n")
        for row, first, second in zip(*(column.tolist() for column in columns))
    ]


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[TextIO]:
    with path.open("wb") as file:
        if path.suffix == ".gz":  # neither name nor time in it: equal models are equal files
            with gzip.GzipFile("", "wb", 9, file, mtime=0) as zipped:
                with io.TextIOWrapper(zipped, encoding="utf-8") as text:
                    yield text
        else:
            with io.TextIOWrapper(file, encoding="utf-8") as text:
                yield text
