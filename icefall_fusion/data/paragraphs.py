"""The paragraphs of a plain-text book: Project Gutenberg's frame goes, hard-wrapped lines are joined.
Knows: lines of text. Must not know: sentences, utterances, files.
"""
from __future__ import annotations

import itertools
import re
from typing import Sequence

_WIDEST, _NARROWEST = 90, 40  # characters: longer lines are paragraphs, shorter ones verse or lists
_LINE_ENDS_SENTENCE = re.compile(r"""[.!?]["'’”)\]_]*\s*$""")
_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
_HYPHENATED = re.compile(r"\b([^\W\d_]+(?:-[^\W\d_]+)*)-$")
_START = re.compile(
    r"^[ \t]*\*\*\* ?START OF\b.*(?:GUTENBERG|E-?BOOK|E-?TEXT)(?:[^*\n]*\n?[^*\n]*\*\*\*|.*$)", re.M
)
_SMALL_PRINT = re.compile(r"^\*END ?\*? ?THE SMALL PRINT!.*$", re.M)
_END = re.compile(
    r"^[ \t]*(?:\*\*\* ?END OF\b.*(?:GUTENBERG|E-?BOOK|E-?TEXT)|End of (?:the |this )?Project Gutenberg)",
    re.M | re.I,
)
_CREDITS = re.compile(
    r"\A\s*(?:(?:This )?(?:e-?text |e-?book )?(?:was )?(?:produced|prepared) by|transcribed (?:from|by))\b"
    r".*?\n\s*?\n",
    re.S | re.I,
)


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs of a book: its lines or, where it is hard-wrapped, the joined lines of blocks.

    A block is the lines between two blank ones. One whose lines are mostly not full (verse, a title page, a
    table of contents) stays as it is even there.
    """
    lines = gutenberg_body(text).splitlines()
    if not is_hard_wrapped(lines):
        return lines
    width = _width(_inner_lines(lines))
    words = frozenset(_WORD.findall("\n".join(lines).lower()))
    joined: list[str] = []
    for block in _blocks(lines):
        full = [_is_full(line, after, width) for line, after in _inner_lines(block)]
        joined.extend([_join(block, words)] if 2 * sum(full) >= len(full) else block)
    return joined


def is_hard_wrapped(lines: Sequence[str]) -> bool:
    """Return whether lines end where the page did, not where a paragraph or a sentence does.

    So it is when 19 of 20 lines have at most 90 characters and, of the lines that another one follows
    directly, at least 4 of 5 are full and fewer than 4 of 5 end a sentence. A line is full when it would be
    longer than 80 % of the usual width with the first word of the next; that width is at least 40.
    """
    inner = _inner_lines(lines)
    if not inner:
        return False
    lengths = [len(line.rstrip()) for line in lines if line.strip()]
    width = _width(inner)
    return (
        sum(length <= _WIDEST for length in lengths) >= 0.95 * len(lengths)
        and width >= _NARROWEST
        and sum(_is_full(line, after, width) for line, after in inner) >= 0.8 * len(inner)
        and sum(_LINE_ENDS_SENTENCE.search(line) is not None for line, _ in inner) < 0.8 * len(inner)
    )


def gutenberg_body(text: str) -> str:
    """Return the text between Project Gutenberg's marks, without its credits and its _italics_.

    Text without such marks is returned as it is. Before 2004 the header ended with the "small print".
    """
    start = _START.search(text) or _SMALL_PRINT.search(text, 0, len(text) // 2)
    end = _END.search(text, start.end() if start else 0)
    if start is None:
        return text[: end.start()] if end else text
    body = text[start.end() : end.start() if end else None]
    return _CREDITS.sub("", body, count=1).replace("_", "")


def _blocks(lines: Sequence[str]) -> list[list[str]]:
    return [list(block) for blank, block in itertools.groupby(lines, _is_blank) if not blank]


def _is_blank(line: str) -> bool:
    return not line.strip()


def _inner_lines(lines: Sequence[str]) -> list[tuple[str, str]]:
    """Return the lines that another one follows directly, each with that one."""
    pairs = zip(lines, lines[1:])
    return [(line, after) for line, after in pairs if not (_is_blank(line) or _is_blank(after))]


def _width(inner: Sequence[tuple[str, str]]) -> int:
    """Return the usual width: a length that 1 of 20 inner lines may exceed (tables do)."""
    lengths = sorted(len(line.rstrip()) for line, _ in inner)
    return lengths[int(0.95 * (len(lengths) - 1))]


def _is_full(line: str, after: str, width: int) -> bool:
    return len(line.rstrip()) + 1 + len(after.split()[0]) > 0.8 * width


def _join(block: Sequence[str], words: frozenset[str]) -> str:
    """Join the lines of a paragraph; ``words``, those of the book, tell what a hyphen at a line's end means.

    "exam-" and "ple" are "example" where the book has this word and not "exam-ple". Other words keep the
    hyphen, without a space ("spring-cart") but before and, or, to ("two- and threefold").
    """
    joined = [block[0].strip()]
    for line in block[1:]:
        line = line.strip()
        first, second = _HYPHENATED.search(joined[-1]), _WORD.match(line)
        if first is None or second is None or second.group() in ("and", "or", "to"):
            joined.append(" ")
        else:
            parts = first.group(1).lower(), second.group().lower()
            if "".join(parts) in words and "-".join(parts) not in words:
                joined[-1] = joined[-1][:-1]
        joined.append(line)
    return "".join(joined)
