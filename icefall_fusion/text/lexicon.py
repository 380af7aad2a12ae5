"""The lexicon of a decoding graph: words, how the acoustic pieces spell them, disambiguation symbols.
Knows: words, acoustic pieces. Must not know: torch, k2, ARPA files, searches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Sequence

from icefall_fusion.common.checks import check
from icefall_fusion.text.tokens import AcousticTokens

_SHOWN = 3  # words in a message


@dataclass(frozen=True)
class Lexicon:
    """Words and their spelling.

    Args:
        words: each once; the id of a word in a graph is its index + 1 (0 is "no word").
        spellings: the pieces of each.
        marks: for each word the number of its disambiguation symbol, 0 where it needs none: with the symbol
            no spelling equals another one or begins another one.
    """

    words: list[str]
    spellings: list[list[int]]
    marks: list[int]


def make_lexicon(words: Iterable[str], tokens: AcousticTokens) -> Lexicon:
    """Spell words as SentencePiece does.

    Args:
        words: of the language; repeated ones count once.
        tokens: the acoustic pieces.

    Raises:
        ValueError: there are none, or some cannot be spelled (they are named): the pieces lack a character,
            or join differently than words that stand alone.
    """
    unique = list(dict.fromkeys(words))
    check(len(unique) > 0, "words of the lexicon", "be one at least", 0)
    spellings = [tokens.encode(word) for word in unique]
    bad = [
        word
        for word, pieces in zip(unique, spellings)
        if tokens.unk_id in pieces or tokens.words(pieces) != [word]
    ]
    rule = f"be spelled by the acoustic pieces, but {len(bad)} are not; leave them out of the word list"
    check(not bad, "words of the lexicon", rule, bad[:_SHOWN])
    return Lexicon(unique, spellings, disambiguation_marks(spellings))


def disambiguation_marks(spellings: Sequence[Sequence[int]]) -> list[int]:
    """Return for each spelling the number of its disambiguation symbol, 0 for none.

    Spellings that occur once and begin no other need none; equal ones get 1, 2, ... in turn.
    """
    counts: dict[tuple[int, ...], int] = {}
    begins: set[tuple[int, ...]] = set()
    for spelling in spellings:
        key = tuple(spelling)
        counts[key] = counts.get(key, 0) + 1
        begins.update(key[:length] for length in range(1, len(key)))
    used: dict[tuple[int, ...], int] = {}
    marks = []
    for spelling in spellings:
        key = tuple(spelling)
        if counts[key] == 1 and key not in begins:
            marks.append(0)
            continue
        used[key] = used.get(key, 0) + 1
        marks.append(used[key])
    return marks
