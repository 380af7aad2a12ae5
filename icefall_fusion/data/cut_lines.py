"""Knows: manifests of cuts line by line, plain or gzipped, whole or cut short; where JSON has a duration.
Must not know: in which order cuts are used, features, audio, models.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from typing import BinaryIO, Iterable, Iterator, NamedTuple

from lhotse import MonoCut
from lhotse.serialization import deserialize_item

from icefall_fusion.common.files import PathLike

#: How lhotse begins the line of a cut: the duration is read without parsing the JSON.
_HEAD = re.compile(rb'\{"id": "(?:[^"\\]|\\.)*", "start": [^,"{}]*, "duration": ([0-9.eE+-]+), ')


class TruncatedError(ValueError):
    """A gzipped file was cut short or is damaged; the lines before that were read."""


class CutLine(NamedTuple):
    """A cut of a manifest as JSON, parsed when it is used: a sampler needs no more than its duration.

    Attributes:
        number: of the line, from 1.
        duration: seconds.
        line: the JSON.
    """

    number: int
    duration: float
    line: bytes

    def cut(self) -> MonoCut:
        """Return the cut.

        Raises:
            ValueError: the line is no cut.
        """
        return parse_cut(self.line, f"line {self.number} of the manifest")


def read_lines(path: PathLike) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line with its end) of a file, gzipped where its name ends in ``.gz``.

    Raises:
        TruncatedError: the file was cut short or is damaged, after all whole lines before that were yielded.
    """
    with open(path, "rb") as file:
        yield from read_stream(file, path)


def read_stream(file: BinaryIO, path: PathLike) -> Iterator[tuple[int, bytes]]:
    """As `read_lines`, of an open file; ``path`` is its name."""
    number = 0
    # no larger buffer around it: of a file that was cut short it would lose lines that are there
    lines: Iterable[bytes] = gzip.GzipFile(fileobj=file) if str(path).endswith(".gz") else file
    try:
        for number, line in enumerate(lines, 1):
            yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        message = f"{path} is truncated or damaged after line {number}: {error}"
        raise TruncatedError(message) from None


def read_cut_lines(path: PathLike) -> Iterator[CutLine]:
    """Yield the cuts of a manifest; lines that lhotse wrote are not parsed.

    Raises:
        TruncatedError: see `read_lines`.
        ValueError: a line (of another program's, which must be parsed) is no cut; the message has its number.
    """
    for number, line in read_lines(path):
        yield cut_line(number, line, path)


def cut_line(number: int, line: bytes, path: PathLike) -> CutLine:
    """Return a line of the manifest ``path`` with its duration."""
    head = _HEAD.match(line)
    if head is not None:
        return CutLine(number, float(head[1]), line)
    return CutLine(number, parse_cut(line, f"{path}, line {number}").duration, line)


def parse_cut(line: bytes, where: str) -> MonoCut:
    """Return a line's cut; raises ValueError with ``where`` it stands when it is none."""
    try:
        cut = deserialize_item(json.loads(line))
        _ = cut.duration, cut.supervisions  # recordings, features and supervisions lack one of these
    except Exception as error:  # lhotse raises what its constructors raise: KeyError, TypeError, ...
        raise ValueError(f"{where} is no cut of lhotse's: {error!r}") from None
    return cut
