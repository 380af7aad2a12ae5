"""Written Spanish to spoken words: numbers, ordinals, money, common titles.
Knows: Spanish letters, how numbers are read. Must not know: pieces, models, files.
"""
from __future__ import annotations

import functools
import re
import unicodedata

from icefall_fusion.text import any_script

_DOTTED = {
    "sr": "señor", "sra": "señora", "srta": "señorita", "sres": "señores", "dr": "doctor", "dra": "doctora",
    "dña": "doña", "ud": "usted", "uds": "ustedes", "vd": "usted", "vds": "ustedes", "etc": "etcétera",
    "núm": "número", "pág": "página", "págs": "páginas", "cap": "capítulo", "prof": "profesor",
    "gral": "general", "sto": "santo", "sta": "santa", "lic": "licenciado", "avda": "avenida",
}
#: No Spanish word is spelled so; they are expanded with or without the dot.
_BARE = {name: _DOTTED[name] for name in "sr sra srta sres dr dra dña uds vds etc".split()}
_DOTTED_PATTERN = re.compile(r"\b(%s)\." % "|".join(_DOTTED))
_RAISED = (
    (re.compile(r"(?<=[0-9])\s?º(?=\s?[CF]\b)"), "°"),
    (re.compile(r"\b[Nn]\.?[º°]"), "número "),
    (re.compile(r"\bD\.?ª"), "doña "),
    (re.compile(r"\bD\.(?=\s+[A-ZÁÉÍÓÚÑ])"), "don"),
)
_ORDINAL = re.compile(r"\b([0-9]{1,4}|[0-9]\.[0-9]{3})\.?\s?([ºª])")
_SHORT_ORDINAL = re.compile(r"\b([0-9]{1,4})(\.?er|[re]?ro|[re]?ra|do|da|to|ta|mo|ma|vo|va|no|na)\b")
#: What an ordinal number ends in, by its last digit: 2do, 7ma.
_ORDINAL_ENDS = ("m", "r", "d", "r", "t", "t", "t", "m", "v", "n")
_HAS_DIGIT = re.compile("[0-9]")
_AMOUNT = r"([0-9]{1,3}(?:\.[0-9]{3})+(?![0-9])|[0-9]+)([,.][0-9]+)?"
_MONEY_BEFORE = re.compile(r"([$€£])\s?" + _AMOUNT + r"(\s(?:mil|millón|millones)\b)?")
_MONEY_AFTER = re.compile(_AMOUNT + r"(\s(?:mil|millón|millones))?\s?([$€£])")
_MONEY_NAMES = {"$": ("dólar", "dólares"), "€": ("euro", "euros"), "£": ("libra", "libras")}
_CLOCK = re.compile(r"\b([0-9]{1,2}):([0-5][0-9])(?::([0-5][0-9]))?\b")
_DATE = re.compile(r"(?<![\w/.-])(0?[1-9]|[12][0-9]|3[01])([/-])(0?[1-9]|1[0-2])\2([12][0-9]{3})(?![\w/-])")
_MONTHS = "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre".split()
_FRACTION = re.compile(r"(?:\b([0-9]+)\s+)?(?<![\w/⁄.,])([0-9]{1,2})[/⁄]([0-9]{1,3})(?![\w/⁄])")
_FRACTION_NAMES = {2: "medio", 3: "tercio", 4: "cuarto", 5: "quinto", 6: "sexto", 7: "séptimo", 8: "octavo",
                   9: "noveno", 10: "décimo"}
_NUMBER = re.compile(_AMOUNT + r"(\s?[%‰])?(?=(\s(?:mil|millón|millones)\b)?)")
_MINUS = re.compile(r"(?<![\w.,)%‰°])-(?=[$€£]?[0-9])")
_DEGREES = re.compile(r"°\s?([cf])?\b|°")
_SCALES = {"c": "centígrados ", "f": "fahrenheit ", None: ""}
#: Ordinals as they are said, for what num2words has.
_ORDINAL_WORDS = (("décimoprimero", "undécimo"), ("décimosegundo", "duodécimo"), ("quadr", "cuadr"))
_BEFORE_THOUSANDS = re.compile(r"uno (?=mil\b|millones\b|billones\b)")
_FRACTION_SIGNS = re.compile("[½¼¾⅓⅔⅛]")
_ACCENTS = frozenset("áéíóúüñ")
_LETTERS = str.maketrans({"æ": "ae", "œ": "oe", "ß": "ss", "ł": "l", "ø": "o", "ð": "d", "þ": "th", "ı": "i",
                          "đ": "d", "ħ": "h", "ŧ": "t", "ŋ": "ng"})
_MOST_DIGITS = 15


def normalize(text: str) -> str:
    """Return the spoken words of Spanish text: lower case a-z, ñ, á, é, í, ó, ú, ü; single spaces.

    Numbers, ordinals, money and common titles are spelled out. Accents of other languages are stripped.
    Idempotent.
    """
    text = unicodedata.normalize("NFC", text.translate(any_script.QUOTES))
    for pattern, words in _RAISED:
        text = pattern.sub(words, text)
    text = _ORDINAL.sub(_spell_ordinal, text)
    text = any_script.fold(_FRACTION_SIGNS.sub(lambda match: f" {match.group()}", text))
    if _HAS_DIGIT.search(text):
        text = _MINUS.sub(" menos ", text.replace("−", "-"))
        text = _DEGREES.sub(lambda match: f" grados {_SCALES[match[1]]}", text)
        text = _SHORT_ORDINAL.sub(_spell_short_ordinal, _DATE.sub(_spell_date, text))
        text = _CLOCK.sub(_spell_clock, text)
        text = _FRACTION.sub(_spell_fraction, text)
        text = _MONEY_BEFORE.sub(lambda m: _spell_money(m[1], m[2], m[3], m[4]), text)
        text = _MONEY_AFTER.sub(lambda m: _spell_money(m[4], m[1], m[2], m[3]), text)
        text = _NUMBER.sub(_spell_number, text)
    text = _DOTTED_PATTERN.sub(lambda match: _DOTTED[match[1]] + " ", text.replace("&", " y "))
    if not text.isascii():
        text = "".join([_plain(letter) for letter in text.translate(_LETTERS)])
    words = "".join([letter if letter.isalpha() else " " for letter in text.replace("'", "")]).split()
    return " ".join([_BARE.get(word, word) for word in words])


@functools.lru_cache(maxsize=4096)
def _plain(letter: str) -> str:
    """Return a letter with an accent that Spanish has, or none; a space for a letter of another script."""
    if letter.isascii() or letter in _ACCENTS:
        return letter
    if not letter.isalpha():
        return "" if unicodedata.category(letter) in ("Mn", "Cf") else " "
    bare = "".join([part for part in unicodedata.normalize("NFKD", letter) if part.isascii()])
    return bare if bare.isalpha() else " "


@functools.lru_cache(maxsize=65536)
def _words_of(number: int, form: str = "cardinal") -> str:
    from num2words import num2words  # only text with digits pays for it

    words = str(num2words(number, lang="es", to=form)).lower()
    for written, said in _ORDINAL_WORDS if form == "ordinal" else ():
        words = words.replace(written, said)
    return _BEFORE_THOUSANDS.sub("un ", words).replace("veintiun ", "veintiún ")


def _before_noun(words: str, feminine: bool = False) -> str:
    """Return a cardinal as it stands before a noun: ``veintiún``, ``treinta y una``, ``doscientas``."""
    if feminine:
        return re.sub(r"(cient|quinient)os\b", r"\1as", re.sub(r"uno$", "una", words))
    return re.sub(r"uno$", "un", words).replace("veintiun", "veintiún") if words.endswith("uno") else words


def _cardinal(digits: str) -> str:
    digits = digits.replace(".", "")
    if len(digits) > _MOST_DIGITS or (len(digits) > 1 and digits[0] == "0"):
        return _digit_by_digit(digits)
    return _words_of(int(digits))


def _digit_by_digit(digits: str) -> str:
    return " ".join([_words_of(int(digit)) for digit in digits])


def _spell_ordinal(match: "re.Match[str]") -> str:
    return f" {_ordinal(int(match[1].replace('.', '')), match[2] == 'ª')} "


def _ordinal(number: int, feminine: bool) -> str:
    words = _words_of(number, "ordinal")
    if feminine:
        words = " ".join([word[:-1] + "a" if word.endswith("o") else word for word in words.split()])
    return words


def _spell_short_ordinal(match: "re.Match[str]") -> str:
    number, end = int(match[1]), match[2].lower().lstrip(".")
    if end == "er":
        words = _ordinal(number, False)
        return f" {words[:-1]} " if words.endswith(("primero", "tercero")) else match[0]
    if number == 0 or end[-2] != _ORDINAL_ENDS[number % 10]:
        return match[0]
    return f" {_ordinal(number, end[-1] == 'a')} "


def _spell_date(match: "re.Match[str]") -> str:
    day, month, year = int(match[1]), int(match[3]), int(match[4])
    return f" {_words_of(day)} de {_MONTHS[month - 1]} de {_words_of(year)} "


def _spell_clock(match: "re.Match[str]") -> str:
    hour, minute, second = int(match[1]), int(match[2]), int(match[3] or 0)
    words = re.sub(r"uno$", "una", _words_of(hour)) + (f" y {_words_of(minute)}" if minute else "")
    if second:
        words += f" y {_before_noun(_words_of(second))} segundo{'s' if second > 1 else ''}"
    return f" {words} "


def _spell_fraction(match: "re.Match[str]") -> str:
    whole, top, bottom = match[1], int(match[2]), int(match[3])
    before = f"{_cardinal(whole)} y " if whole else ""
    if bottom not in _FRACTION_NAMES or top < 1:
        return f" {before}{_words_of(top)} partido por {_words_of(bottom)} "
    number = "un" if top == 1 else _words_of(top)
    return f" {before}{number} {_FRACTION_NAMES[bottom]}{'' if top == 1 else 's'} "


def _spell_money(sign: str, digits: str, decimals: str, scale: str) -> str:
    one, many = _MONEY_NAMES[sign]
    words = _amount(digits, decimals)
    unit = one if words == "uno" and not scale else many
    if not decimals:
        words = _before_noun(words, sign == "£" and not scale and "mill" not in words)
    words += scale or ""
    return f" {words} {'de ' if words.endswith(('millón', 'millones')) else ''}{unit} "


def _spell_number(match: "re.Match[str]") -> str:
    words = _amount(match[1], match[2])
    if match[3]:
        return f" {words} por {'mil' if match[3].strip() == '‰' else 'ciento'} "
    return f" {_before_noun(words) if match[4] and not match[2] else words} "


def _amount(digits: str, decimals: str) -> str:
    if not decimals:
        return _cardinal(digits)
    return f"{_cardinal(digits)} {'coma' if decimals[0] == ',' else 'punto'} {_digit_by_digit(decimals[1:])}"
