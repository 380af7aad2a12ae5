"""The forms in which a language model reads words: as they are, lower case, or as a sentence.
Knows: words. Must not know: torch, pieces, models, files.
"""
from __future__ import annotations

from typing import Sequence

from icefall_fusion.common.checks import check, check_choice

TEXT_STYLES = ("as-is", "lower", "sentence")


def adapt(words: Sequence[str], style: str, spaced: bool = False) -> str:
    """Return normalized words as the text that an LLM is asked to score.

    Words of scripts without spaces (text/scripts.py) have none between them, unless ``spaced``.

    Args:
        words: words without spaces.
        style: ``as-is``; ``lower``; or ``sentence``: lower case, the first word and I capitalized.

    Raises:
        ValueError: the style is unknown.
    """
    text = " ".join([adapt_word(word, index, style) for index, word in enumerate(words)])
    if not text.isascii() and not spaced:
        from icefall_fusion.text.scripts import unspaced

        text = unspaced(text)
    return text


def adapt_word(word: str, index: int, style: str) -> str:
    """Return one word as `adapt` writes it at position ``index`` (0 is the first word of the utterance).

    Raises:
        ValueError: the style is unknown or the index negative.
    """
    if style == "as-is":
        return word
    if style == "lower":
        return word.lower()
    check_choice(style, TEXT_STYLES, "style")
    check(index >= 0, "index", "be at least 0", index)
    word = word.lower()
    if index == 0 or word == "i" or word.startswith("i'"):
        return _capitalize(word)
    return word


def _capitalize(word: str) -> str:
    for position, letter in enumerate(word):
        if letter.isalpha():
            return word[:position] + letter.upper() + word[position + 1 :]
    return word
