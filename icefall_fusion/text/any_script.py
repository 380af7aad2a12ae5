"""Written text of any script: the normalizer of languages that have none of their own.
Knows: characters and their Unicode categories. Must not know: languages, numbers, pieces, models.
"""
from __future__ import annotations

import re
import unicodedata

from icefall_fusion.text.scripts import unspaced

QUOTES = str.maketrans(dict.fromkeys("’‘ʼ‛´ʹ＇", "'"))
_INNER = re.compile(r"(?<=\w)'(?=\w)")
_KEPT = ("L", "M", "N")
_PLAIN = re.compile(r"[a-z0-9 ]*")
_FRACTIONS, _RAISED = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒⅟↉", "⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉"
#: Where NFKC would join two numbers to one: 3½ would be 31/2, and 10² be 102.
_JOINT = re.compile(
    rf"(?<=\d)(?=[{_FRACTIONS}{_RAISED}])|(?<=[{_FRACTIONS}{_RAISED}])(?=\d)"
    rf"|(?<=[{_FRACTIONS}])(?=[{_FRACTIONS}{_RAISED}])|(?<=[{_RAISED}])(?=[{_FRACTIONS}])"
)
_DIGIT = re.compile(r"(?![0-9])\d")


def fold(text: str) -> str:
    """Return a text in lower case and in NFKC: full-width forms are plain, accents are joined to letters.

    Digits of all scripts are 0-9. There is a space between a number and a fraction sign or raised digits.
    """
    if not text.isascii():
        text = _DIGIT.sub(lambda match: str(unicodedata.decimal(match.group())), _JOINT.sub(" ", text))
    while True:  # a lower-case letter may have another compatible form
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())
        if folded == text:
            return text
        text = folded


def normalize(text: str) -> str:
    """Return the words of a text of any script: letters, marks and digits in lower case (UAX 15, NFKC).

    An apostrophe inside a word stays. Signs, emoji and invisible characters of text direction go. There is no
    space next to a character of a script that has none. Idempotent.
    """
    if _PLAIN.fullmatch(text):
        return " ".join(text.split())
    letters = []
    text = fold(text.translate(QUOTES)).translate(QUOTES)
    for place, letter in enumerate(text):
        category = unicodedata.category(letter)
        if letter == "'":
            inner = _INNER.match(text, place) is not None
            letters.append("'" if inner else " ")
        elif category[0] in _KEPT and not "\ufe00" <= letter <= "\ufe0f" and category != "Me":
            letters.append(letter)
        elif category != "Cf" and not "\ufe00" <= letter <= "\ufe0f":
            letters.append(" ")
    words = [word for word in "".join(letters).split() if any(letter.isalnum() for letter in word)]
    return unicodedata.normalize("NFKC", unspaced(" ".join(words)))  # marks may stand together only now
