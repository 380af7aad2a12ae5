"""Written text: one normalizer for references and hypotheses alike.
Knows: characters, words, spelling of numbers. Must not know: torch, pieces, models, files.
"""
from __future__ import annotations

import functools
import re
import unicodedata

_QUOTES = str.maketrans(dict.fromkeys("’‘ʼ‛´ʹ", "'"))
_FRACTIONS = str.maketrans({"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "⅛": " 1/8"})
_LETTERS = str.maketrans({"æ": "ae", "œ": "oe", "ß": "ss", "ł": "l", "ø": "o", "ð": "th", "þ": "th"})
#: Abbreviations with a dot, and the words they stand for. ``st`` is read as saint: streets are rarely
#: shortened in books.
_DOTTED = {
    "mr": "mister", "mrs": "missus", "dr": "doctor", "st": "saint", "messrs": "messieurs", "mme": "madame",
    "mlle": "mademoiselle", "capt": "captain", "col": "colonel", "gen": "general", "lieut": "lieutenant",
    "lt": "lieutenant", "sergt": "sergeant", "sgt": "sergeant", "prof": "professor", "rev": "reverend",
    "hon": "honorable", "esq": "esquire", "jr": "junior", "etc": "et cetera", "co": "company",
    "vol": "volume",
}
#: No English word is spelled so; they are expanded with or without the dot.
_BARE = {word: _DOTTED[word] for word in ("mr", "mrs", "dr", "st", "messrs", "mme", "mlle", "etc")}
_JOINED = re.compile(r"\bto-(?=(?:day|night|morrow)\b)")
_DOTTED_PATTERN = re.compile(r"\b(%s)\." % "|".join(_DOTTED))
_NUMBER_SIGN = re.compile(r"\bno\.\s*(?=[0-9])")
_OPENING_QUOTES = re.compile(r"(?<![a-z])'{2,}(?=[a-z])")  # a quotation that begins with an elision: ''tis
_NOT_TEXT = re.compile(r"[^a-z']+|'{2,}")
#: An apostrophe at the edge of a word is taken for a quotation mark, except in these.
_ELISIONS = frozenset(
    "'tis 'twas 'twere 'twill 'twould 'twixt 'em 'un 'uns 'im 'e 'ave 'ad 'as 'tisn't 'twasn't 'twouldn't"
    " 'bout 'cause 'til 'ome 'ouse 'ow o' th' wi' ha'".split()
)


def normalize(text: str) -> str:
    """Return the spoken words of ``text``: lower-case a-z and apostrophes, one space between words.

    Numbers, ordinals, years, money and common titles are spelled out, accents are stripped, "&" is "and".
    Idempotent: ``normalize(normalize(text)) == normalize(text)``.

    Args:
        text: any text, of any length.
    """
    if not text.isascii():
        text = _to_ascii(text)
    text = text.lower()
    if "-" in text:
        text = _JOINED.sub("to", text)
    if "&" in text:
        text = text.replace("&c", " et cetera").replace("&", " and ")
    if _DIGIT.search(text):
        text = _spell_numbers(text)
    if "." in text:
        text = _DOTTED_PATTERN.sub(_expand_dotted, text)
    if "''" in text:
        text = _OPENING_QUOTES.sub("'", text)
    return " ".join(_clean_words(_NOT_TEXT.sub(" ", text).split()))


def _to_ascii(text: str) -> str:
    text = unicodedata.normalize("NFKD", text.translate(_QUOTES).translate(_FRACTIONS)).translate(_QUOTES)
    text = text.lower().translate(_LETTERS)
    return "".join([letter for letter in text if not unicodedata.combining(letter)])


def _clean_words(words: list[str]) -> list[str]:
    cleaned = []
    for word in words:
        if word[0] == "'" or word[-1] == "'":
            if word not in _ELISIONS:
                word = _strip_apostrophes(word)
        if word:
            cleaned.append(_BARE.get(word, word))
    return cleaned


def _strip_apostrophes(word: str) -> str:
    """Strip edge apostrophes but for those of a known elision: ``'twas'`` is ``'twas``."""
    if word[:-1] in _ELISIONS:
        return word[:-1]
    if word[1:] in _ELISIONS:
        return word[1:]
    return word.strip("'")


def _expand_dotted(match: "re.Match[str]") -> str:
    return _DOTTED[match.group(1)] + " "


# --- numbers -------------------------------------------------------------------------------------------

_DIGIT = re.compile("[0-9]")
_CLOCK = re.compile(r"\b([0-9]{1,2}):([0-5][0-9])\b")
_FRACTION = re.compile(r"(?:\b([0-9]+)\s+)?\b([0-9]{1,2})[/⁄]([0-9]{1,2})\b")
_MONEY = re.compile(
    r"([£$€])\s?([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(\.[0-9]+)?(\s(?:hundred|thousand|million|billion)\b)?"
)
_NUMBER = re.compile(
    r"([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(\.[0-9]+)?(?:(st|nd|rd|th|d|'?s)\b)?(\s?%)?"
)
_MONEY_NAMES = {"£": ("pound", "pence"), "$": ("dollar", "cents"), "€": ("euro", "cents")}
_FRACTION_NAMES = {2: "half", 4: "quarter"}
_MAX_DIGITS = 15


def _spell_numbers(text: str) -> str:
    text = _NUMBER_SIGN.sub("number ", text).replace("°", " degrees ")
    text = _CLOCK.sub(_spell_clock, text)
    text = _FRACTION.sub(_spell_fraction, text)
    text = _MONEY.sub(_spell_money, text)
    return _NUMBER.sub(_spell_number, text)


@functools.lru_cache(maxsize=65536)
def _words_of(number: int, form: str = "cardinal") -> str:
    from num2words import num2words  # only text with digits pays for it

    return re.sub("[^a-z]+", " ", num2words(number, to=form).lower()).strip()


def _cardinal(digits: str) -> str:
    digits = digits.replace(",", "")
    if len(digits) > _MAX_DIGITS or (len(digits) > 1 and digits[0] == "0"):
        return _digit_by_digit(digits)
    return _words_of(int(digits))


def _digit_by_digit(digits: str) -> str:
    return " ".join([_words_of(int(digit)) for digit in digits])


def _ordinal(digits: str) -> str:
    number = int(digits.replace(",", "")[:_MAX_DIGITS])
    return _words_of(number, "ordinal")


def _plural(words: str) -> str:
    if words.endswith("y"):
        return words[:-1] + "ies"
    return words + ("es" if words.endswith(("x", "s")) else "s")


def _spell_clock(match: "re.Match[str]") -> str:
    hour, minute = int(match.group(1)), int(match.group(2))
    if minute == 0:
        return " %s o'clock " % _words_of(hour)
    return " %s %s%s " % (_words_of(hour), "oh " if minute < 10 else "", _words_of(minute))


def _spell_fraction(match: "re.Match[str]") -> str:
    whole, top, bottom = match.group(1), int(match.group(2)), int(match.group(3))
    if bottom < 2 or top < 1:
        parts = "%s %s" % (_words_of(top), _words_of(bottom))
        return " %s %s " % (_cardinal(whole) if whole else "", parts)
    name = _FRACTION_NAMES.get(bottom) or _words_of(bottom, "ordinal")
    if top > 1:
        name = "halves" if bottom == 2 else _plural(name)
    if whole:
        return " %s and %s %s " % (_cardinal(whole), "a" if top == 1 else _words_of(top), name)
    return " %s %s " % (_words_of(top), name)


def _spell_money(match: "re.Match[str]") -> str:
    sign, amount, decimals, scale = match.groups()
    unit, small = _MONEY_NAMES[sign]
    spelled = _cardinal(amount)
    unit = unit if spelled == "one" and not scale else unit + "s"
    if decimals and len(decimals) == 3 and not scale:
        return " %s %s and %s %s " % (spelled, unit, _words_of(int(decimals[1:])), small)
    point = " point " + _digit_by_digit(decimals[1:]) if decimals else ""
    return " %s%s%s %s " % (spelled, point, scale or "", unit)


def _spell_number(match: "re.Match[str]") -> str:
    digits, decimals, suffix, percent = match.groups()
    if decimals:
        spelled = _cardinal(digits) + " point " + _digit_by_digit(decimals[1:])
    elif suffix in ("st", "nd", "rd", "th", "d"):
        spelled = _ordinal(digits)
    elif len(digits) == 4 and "1100" <= digits <= "2099":
        spelled = _words_of(int(digits), "year")
    else:
        spelled = _cardinal(digits)
    if suffix in ("s", "'s"):
        spelled = _plural(spelled)
    return " %s%s " % (spelled, " percent" if percent else "")
