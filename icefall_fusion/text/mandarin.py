"""Written Mandarin to spoken characters: numbers are read out, signs go.
Knows: Han characters, how numbers are read. Must not know: pieces, models, files.
"""
from __future__ import annotations

import re

from icefall_fusion.text import any_script

_DIGITS = "零一二三四五六七八九"
_TENS = ("", "十", "百", "千")
_MYRIADS = ((10**8, "亿"), (10**4, "万"))
_MOST_DIGITS = 16
_HAS_DIGIT = re.compile("[0-9]")
_GROUPED = re.compile(r"(?<![0-9])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")
_YEAR = re.compile(r"(?<![0-9.])([0-9]{2,4})(?=年)")
_CLOCK = re.compile(r"(?<![0-9])([01]?[0-9]|2[0-4]):([0-5][0-9])(?![0-9])")
_FRACTION = re.compile(r"(?<![0-9])([0-9]+)[/⁄]([0-9]+)(?![0-9])")
_COUNTERS = "个位只条张本件次种天年岁点块家座杯瓶辆"
_NUMBER = re.compile(rf"((?<![0-9a-z])-)?([0-9]+)(\.[0-9]+)?(\s?%)?([{_COUNTERS}])?")
_MONEY = re.compile(r"([¥￥$€£])\s?([0-9]+(?:\.[0-9]+)?)([万亿]*)")
_CURRENCIES = {"¥": "元", "￥": "元", "$": "美元", "€": "欧元", "£": "英镑"}


def normalize(text: str) -> str:
    """Return the spoken characters of Mandarin text, without spaces but between words of Latin letters.

    Arabic digits are read out: 2024年 by digits, 1,205 as a number, 30% as 百分之三十, 8:30 as 八点三十分.
    〇 is 零. Simplified and traditional characters stay what they are. Idempotent.
    """
    text = any_script.fold(text).replace("−", "-")
    if _HAS_DIGIT.search(text):
        text = _GROUPED.sub(lambda match: match.group().replace(",", ""), text)
        text = text.replace("°c", "摄氏度").replace("°", "度")
        text = _MONEY.sub(lambda match: f"{match[2]}{match[3]}{_CURRENCIES[match[1]]}", text)
        text = _YEAR.sub(lambda match: digit_by_digit(match[1]) if len(match[1]) > 3 else match[1], text)
        text = _CLOCK.sub(_read_clock, text)
        text = _FRACTION.sub(lambda match: f"{_whole(match[2])}分之{_whole(match[1])}", text)
        text = _NUMBER.sub(_read_number, text)
    return any_script.normalize(text.replace("〇", "零"))


def digit_by_digit(digits: str) -> str:
    """Return the names of digits."""
    return "".join(_DIGITS[int(digit)] for digit in digits)


def number_words(number: int) -> str:
    """Return how a number from 0 to 10^16 - 1 is read.

    Raises:
        ValueError: it is outside.
    """
    if not 0 <= number < 10**_MOST_DIGITS:
        raise ValueError(f"number must lie in 0..10^{_MOST_DIGITS} - 1, but is {number!r}")
    words = _read(number) if number else _DIGITS[0]
    return words[1:] if words.startswith("一十") else words


def _read(number: int) -> str:
    """Return how a number above 0 is read; 10 is 一十 here."""
    for value, name in _MYRIADS:
        if number >= value:
            high, low = divmod(number, value)
            gap = _DIGITS[0] if 0 < low < value // 10 else ""
            return _read(high) + name + gap + (_read(low) if low else "")
    return _below_myriad(number)


def _below_myriad(number: int) -> str:
    words, gap = "", False
    for place in range(3, -1, -1):
        digit = number // 10**place % 10
        if digit == 0:
            gap = bool(words)
            continue
        words += (_DIGITS[0] if gap else "") + _DIGITS[digit] + _TENS[place]
        gap = False
    return words


def _whole(digits: str) -> str:
    if len(digits) > _MOST_DIGITS or (len(digits) > 1 and digits[0] == "0"):
        return digit_by_digit(digits)
    return number_words(int(digits))


def _read_clock(match: "re.Match[str]") -> str:
    hour, minute = int(match[1]), int(match[2])
    words = "两点" if hour == 2 else number_words(hour) + "点"
    if minute == 0:
        return words
    return f"{words}{'零' if minute < 10 else ''}{number_words(minute)}分"


def _read_number(match: "re.Match[str]") -> str:
    minus, digits, decimals, percent, counter = match.groups()
    words = _whole(digits)
    if decimals:
        words += "点" + digit_by_digit(decimals[1:])
    elif counter and words == "二" and not percent:
        words = "两"
    return f"{'负' if minus else ''}{'百分之' if percent else ''}{words}{counter or ''}"
