"""Vocabularies in text files: icefall's tokens.txt, WeNet's units.txt, Hugging Face's vocab.json.
Knows: the formats, word marks, blanks. Must not know: SentencePiece, models, searches.
"""
from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple, Optional

from icefall_fusion.common.checks import check
from icefall_fusion.text.scripts import begins_unit

#: Read from a folder that has no bpe.model, the first that is there.
NAMES = ("tokens.txt", "units.txt", "vocab.json")
_DELIMITERS = ("|", " ", "<space>")
_MARK, _CONTINUES = "▁", "##"
_NO_OUTPUT = re.compile(r"#\d+")  # disambiguation symbols, at the end of a table of icefall
_SPECIAL = re.compile(r"<.*>|\[[A-Z]+\]")


class Vocabulary(NamedTuple):
    """What a file says: arguments of `AcousticTokens.from_pieces`."""

    pieces: list[str]
    blank_id: int
    word_start: str
    delimiter: Optional[str]


def read_vocabulary(path: Path, blanks: tuple[str, ...]) -> Vocabulary:
    """Read a file of pieces and their ids; how words begin is found in the pieces.

    Words begin at pieces with "▁", or after a delimiter ("|", a space or "<space>"), or at pieces without
    "##" where some have it. Where no piece has a mark, each piece is a word (said in a warning); but if there
    are characters of scripts without spaces, other letters go on with the word before.

    Args:
        path: lines ``piece id`` (tokens.txt, units.txt), or a JSON object of ids by piece (.json).
        blanks: names of the blank, the likeliest first.

    Raises:
        ValueError: a line is no piece with its id, ids repeat or lack one, or there is no blank.
    """
    ids = _of_json(path) if path.suffix == ".json" else _of_lines(path)
    by_id: dict[int, str] = {}
    for piece, index in ids.items():
        other = by_id.setdefault(index, piece)
        check(other == piece, f"ids of {str(path)!r}", "differ from one another", (index, other, piece))
    rule = f"be 0..{len(by_id) - 1} without a gap"
    missing = next((index for index in range(len(by_id)) if index not in by_id), None)
    check(bool(by_id) and missing is None, f"ids of {str(path)!r}", rule, f"without {missing}")
    pieces = [by_id[index] for index in range(len(by_id))]
    while pieces and _NO_OUTPUT.fullmatch(pieces[-1]):
        pieces.pop()
    blank = next((name for name in blanks if name in pieces), None)
    check(blank is not None, f"pieces of {str(path)!r}", f"have a blank, one of {blanks}", pieces[:3])
    pieces, word_start, delimiter = _marks(pieces, str(path))
    return Vocabulary(pieces, pieces.index(blank), word_start, delimiter)


def _marks(pieces: list[str], name: str) -> tuple[list[str], str, Optional[str]]:
    """Return pieces, the mark of those that begin a word, and the delimiter."""
    plain = [piece for piece in pieces if not _SPECIAL.fullmatch(piece)]
    if any(piece.startswith(_MARK) for piece in plain):
        return pieces, _MARK, None
    for delimiter in _DELIMITERS:
        if delimiter in pieces:
            return pieces, _MARK, delimiter
    if any(piece.startswith(_CONTINUES) and len(piece) > 2 for piece in plain):
        return [_with_mark(piece) for piece in pieces], _MARK, None
    if any(begins_unit(piece) for piece in plain):
        return pieces, _MARK, None
    logging.warning("%s: no piece marks where a word begins; each is taken for a word", name)
    return pieces, "", None


def _with_mark(piece: str) -> str:
    if _SPECIAL.fullmatch(piece):
        return piece
    return piece[2:] if piece.startswith(_CONTINUES) and len(piece) > 2 else _MARK + piece


def _of_lines(path: Path) -> dict[str, int]:
    ids: dict[str, int] = {}
    for number, line in enumerate(_text(path).split("\n"), 1):
        line = line.rstrip("\r")
        if not line.strip():
            continue
        match = re.fullmatch(r"(.+)[ \t]+([0-9]+)", line)
        if match is None:
            raise ValueError(f"{path} line {number} must be a piece and its id, but is {line[:60]!r}")
        piece = match[1].strip(" \t") or " "
        if piece in ids:
            raise ValueError(f"{path} line {number}: pieces must differ, but {piece!r} comes twice")
        ids[piece] = int(match[2])
    return ids


def _of_json(path: Path) -> dict[str, int]:
    try:
        value: Any = json.loads(_text(path))
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON object of ids by piece, but is not: {error}") from error
    good = isinstance(value, dict) and all(type(index) is int for index in value.values())
    check(good, str(path), "be a JSON object of ids by piece", str(value)[:60])
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} must be UTF-8 text, but is not: {error}") from error
