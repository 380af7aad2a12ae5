"""Written Mandarin to spoken characters: numbers are read out, signs go.
Knows: Han characters, how numbers are read. Must not know: pieces, models, files.
"""
from __future__ import annotations

import re
import unicodedata

from icefall_fusion.text import any_script

_DIGITS = "零一二三四五六七八九"
_TENS = ("", "十", "百", "千")
_MYRIADS = ((10**8, "亿"), (10**4, "万"))
_MOST_DIGITS = 16
_HAS_DIGIT = re.compile("[0-9]")
_GROUPED = re.compile(r"(?<![0-9])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")
_ZEROS = re.compile("(?<=[零〇一二三四五六七八九])○+|○+(?=[零〇一二三四五六七八九])")
_POWER = re.compile(r"(?<=\d)([⁰¹²³⁴⁵⁶⁷⁸⁹]+)")
_POWERS = {2: "平方", 3: "立方"}
_DATE = re.compile(r"(?<![0-9./-])([0-9]{4})([-/])(0?[1-9]|1[0-2])\2(0?[1-9]|[12][0-9]|3[01])(?![0-9/-])")
_TO = re.compile(
    r"(?<=(?<![0-9.])[0-9]{4})[-~–—](?=[0-9]{4}\s?年)|(?<=:[0-5][0-9])[-~–—](?=[0-9]{1,2}:[0-5][0-9])"
)
_YEAR = re.compile(r"(?<![0-9.])([0-9]{4})(?=(?:[至到][0-9]{4})?\s?年(.{0,3}))")
_LONG_AGO = re.compile("前(?![后後0-9一二三四五六七八九十两半])|的?[历歷]史|之久")
_RANGE = re.compile(
    r"(?<![0-9a-z./:~–—])(?<![0-9a-z%‰]-)((?:0|[1-9][0-9]*)(?:\.[0-9]+)?)(\s?[%‰])?[-~–—](-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?)"
    r"(?![0-9]|[.:/~–—-]+[0-9])"
)
_CLOCK = re.compile(r"(?<![0-9:])([01]?[0-9]|2[0-4]):([0-5][0-9])(?::([0-5][0-9]))?(?![0-9:])")
_RATIO = re.compile(r"(?<=[0-9]):(?=[0-9])")
_FRACTION = re.compile(r"(?:(?<![0-9./])([0-9]+)\s)?(?<![0-9/⁄])([0-9]+)[/⁄]([0-9]+)(?![0-9/⁄])")
_COUNTERS = (
    "(?:(?!年[级級]|次方|元[一二]?次|元论|元[素组音件旦]|元(?:方程|函数|关系|运算|分类)|周期(?!间)|周[边围末]"
    "|名[词字]|名单(?![身亲])|名称(?!职)|米[饭粉粒色]|头[部发像条盔衔]|匹配|双[方向边语]|遍[布历及]|句[型法式子]"
    "|步[骤兵枪伐行])["
    "个個位只条张本件次种天年岁点块家座杯瓶辆元名米周头匹双遍句步]"
    "|小时|分钟|公里|公斤|美元|欧元|英镑|星期)"
)
_COUNTER = re.compile(rf"\s?{_COUNTERS}")
_NUMBER = re.compile(rf"((?<![0-9a-z])-)?([0-9]+)(\.[0-9]+)?(\s?[%‰])?(?:\s?({_COUNTERS}))?")
_TELEPHONE = re.compile("1[3-9][0-9]{9}")
_AMOUNT = re.compile(  # what stands behind a count
    r"\s?(?:[万萬亿億多余户戶吨噸股亩畝棵艘]|人(?![工员員名在接])|台(?![湾灣北中南])|[日韩港]元|港币|人民币|卢布|法郎"
    "|平方|立方|千[克瓦]|字节|比特|赫兹|摄氏度)"
)
_PARTS = {"%": "百分之", "‰": "千分之"}
_MONEY_BEFORE = re.compile(r"(?<![0-9万亿])([¥$€£])\s?([0-9]+(?:\.[0-9]+)?)([万亿]*)")
_MONEY_AFTER = re.compile(r"(?<=[0-9万亿])\s?([¥$€£])")
_CURRENCIES = {"¥": "元", "$": "美元", "€": "欧元", "£": "英镑"}


def normalize(text: str) -> str:
    """Return the spoken characters of Mandarin text, without spaces but between words of Latin letters.

    Arabic digits are read out: 2024年 by digits, 1,205 as a number, 30% as 百分之三十, 8:30 as 八点三十分,
    3:2 as 三比二, 5-10 as 五到十, 2024-01-05 as a date, a number of a mobile telephone by digits. 〇 is 零.
    Simplified and traditional characters stay what they are. Idempotent.
    """
    text = any_script.fold(_POWER.sub(_read_power, text)).replace("−", "-")
    if "○" in text:
        text = _ZEROS.sub(lambda match: "零" * len(match.group()), text)
    if _HAS_DIGIT.search(text):
        grouped = {match.replace(",", "") for match in _GROUPED.findall(text)}
        text = _GROUPED.sub(lambda match: match.group().replace(",", ""), text)
        text = text.replace("°c", "摄氏度").replace("°", "度")
        text = _MONEY_BEFORE.sub(lambda match: f"{match[2]}{match[3]}{_CURRENCIES[match[1]]}", text)
        text = _MONEY_AFTER.sub(lambda match: _CURRENCIES[match[1]], text)
        text = _DATE.sub(lambda date: f"{digit_by_digit(date[1])}年{int(date[3])}月{int(date[4])}日", text)
        text = _RANGE.sub(_read_range, _YEAR.sub(_read_year, _TO.sub("到", text)))
        text = _RATIO.sub("比", _CLOCK.sub(_read_clock, text))
        text = _FRACTION.sub(_read_fraction, text)
        text = _NUMBER.sub(lambda match: _read_number(match, match[2] in grouped), text)
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


def _read_power(match: "re.Match[str]") -> str:
    power = int(unicodedata.normalize("NFKC", match[1]))
    return f"的{_POWERS.get(power) or number_words(power) + '次方'}"


def _read_year(match: "re.Match[str]") -> str:
    """Return a year by digits; a number of years stays."""
    year, ago = int(match[1]), _LONG_AGO.match(match[2]) is not None
    if not 1000 < year <= 2100 or ago and (year % 100 == 0 or year < 1900):
        return match[1]
    return digit_by_digit(match[1])


def _read_range(match: "re.Match[str]") -> str:
    two = match[1] == "2" and not match[2] and _COUNTER.match(match.string, match.end())
    return f"{'两' if two else match[1]}{match[2] or ''}到{match[3]}"


def _read_fraction(match: "re.Match[str]") -> str:
    whole = f"{_whole(match[1])}又" if match[1] else ""
    return f"{whole}{_whole(match[3])}分之{_whole(match[2])}"


def _read_clock(match: "re.Match[str]") -> str:
    hour, minute, second = int(match[1]), int(match[2]), int(match[3] or 0)
    words = "两点" if hour == 2 else number_words(hour) + "点"
    if minute or second:
        words += f"{'零' if minute < 10 else ''}{number_words(minute)}分" if minute else "零分"
    return words + (f"{'零' if second < 10 else ''}{number_words(second)}秒" if second else "")


def _read_number(match: "re.Match[str]", grouped: bool) -> str:
    """Return a number in words; one of a mobile telephone by digits, unless it was printed in groups."""
    minus, digits, decimals, part, counter = match.groups()
    words = _whole(digits)
    counts = grouped or minus or decimals or part or counter or _AMOUNT.match(match.string, match.end())
    if _TELEPHONE.fullmatch(digits) and not counts:
        return digit_by_digit(digits)
    if decimals:
        words += "点" + digit_by_digit(decimals[1:])
    elif counter and words == "二" and not part and not match.string[: match.start()].rstrip().endswith("第"):
        words = "两"
    return f"{'负' if minus else ''}{_PARTS[part.strip()] if part else ''}{words}{counter or ''}"
