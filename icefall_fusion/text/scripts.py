"""Scripts that are written without spaces between words: their characters, joining and splitting of text.
Knows: characters. Must not know: languages, pieces, models.

Han, Japanese syllables, Thai, Lao, Burmese and Khmer have no spaces between words. There every character is a
unit of its own, with the marks that stand on it. All other scripts have words between spaces; so has Latin
text inside Chinese.
"""
from __future__ import annotations

import re
import unicodedata
from typing import Iterable

_LETTERS = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x323AF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),  # Han
    (0x3005, 0x3007), (0x3031, 0x3035), (0x303B, 0x303C), (0x3041, 0x30FA), (0x30FC, 0x30FF),  # Japanese
    (0x31F0, 0x31FF), (0xFF66, 0xFF9F), (0x3105, 0x312F), (0x31A0, 0x31BF),  # half-width, Bopomofo
    (0x0E01, 0x0E3A), (0x0E40, 0x0E5B), (0x0E81, 0x0EDF), (0x1000, 0x109F), (0x1780, 0x17FF),
)
_SIGNS = ((0x3001, 0x3003), (0x3008, 0x3011), (0x3014, 0x301F), (0xFF01, 0xFF0F), (0xFF1A, 0xFF20))


def _as_class(codes: Iterable[int]) -> str:
    return "".join(re.escape(chr(code)) for code in codes)


def _ranges(ranges: Iterable[tuple[int, int]]) -> str:
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


#: Marks that stand on a character of these scripts: Thai vowels, voicing marks.
_MARKS = _as_class(
    code
    for first, last in (*_LETTERS, (0x3099, 0x309A))
    if last < 0x10000 and first not in (0x4E00, 0x3400, 0xF900)
    for code in range(first, last + 1)
    if unicodedata.category(chr(code)) in ("Mn", "Mc", "Me") or code in (0xFF9E, 0xFF9F)
)
_UNSPACED = _ranges(_LETTERS)
_BEGINS = re.compile(f"(?![{_MARKS}])[{_UNSPACED}]")
_UNIT = re.compile(f"(?![{_MARKS}])[{_UNSPACED}][{_MARKS}]*|(?:(?![{_UNSPACED}])\\S|[{_MARKS}])+")
_RUN = re.compile(f"[{_UNSPACED}]+|[^{_UNSPACED}]+")
_SPACE = re.compile(f"(?<=[{_UNSPACED}{_ranges(_SIGNS)}]) +| +(?=[{_UNSPACED}{_ranges(_SIGNS)}])")


def begins_unit(text: str) -> bool:
    """Return whether a text begins with a character that is a unit of its own; a mark is none."""
    return _BEGINS.match(text) is not None


def has_unspaced(text: str) -> bool:
    """Return whether a text has a character of a script without spaces."""
    return not text.isascii() and _BEGINS.search(text) is not None


def unspaced(text: str) -> str:
    """Return a text without the spaces next to characters of scripts that have none."""
    return text if text.isascii() else _SPACE.sub("", text)


def runs(text: str) -> list[str]:
    """Return a text in runs of characters of scripts without spaces, and of others; joined, it is `unspaced`.

    Such a run has no space inside.
    """
    return [match.group() for match in _RUN.finditer(unspaced(text))]


def join_words(words: Iterable[str]) -> str:
    """Return words as they are written: with spaces between them, where their scripts have any."""
    return unspaced(" ".join(words))


def split_units(text: str) -> list[str]:
    """Return the words of a text; of scripts without spaces each character, with the marks on it."""
    return text.split() if text.isascii() else _UNIT.findall(text)
