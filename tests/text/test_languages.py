"""Languages: their normalizers, units, joining of words, and text that a language does not keep.
Knows: icefall_fusion.text. Must not know: torch, models, files outside the repository.
"""
from __future__ import annotations

import logging
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from icefall_fusion.text import any_script, mandarin, normalizer, spanish
from icefall_fusion.text.language import ENGLISH, Language, check_texts, language_of
from icefall_fusion.text.scripts import begins_unit, has_unspaced, join_words, split_units, unspaced

SPANISH = {
    "El Sr. García pagó 1.234,50 € por 3 libros, ¿verdad?": (
        "el señor garcía pagó mil doscientos treinta y cuatro coma cinco cero euros por tres libros verdad"
    ),
    "D. Quijote y Dña. Ana: el 1.º y la 2ª, a las 3:15": (
        "don quijote y doña ana el primero y la segunda a las tres y quince"
    ),
    "¡Ñandú! n\u0303o, pingüino, façade, à la carte": "ñandú ño pingüino facade a la carte",
    "5 % de $2 millones; 1/2, 3½": "cinco por ciento de dos millones de dólares un medio tres y un medio",
    "37,5 °C, ２１": "treinta y siete coma cinco grados centígrados veintiuno",
    "«Ud. y Vd.», etc.": "usted y usted etcétera",
    "€1 y £1": "un euro y una libra",
    "中文": "",
}
MANDARIN = {
    "２０２４年，他有３个苹果，花了￥12.5万。": "二零二四年他有三个苹果花了十二点五万元",
    "完成了30%，3/4，08:05 见": "完成了百分之三十四分之三八点零五分见",
    "他说：“你好！”——用Python写AI程序 hello world": "他说你好用python写ai程序hello world",
    "−5℃ 和 2个人、1,205": "负五摄氏度和两个人一千二百零五",
    "二〇二四😀": "二零二四",
    "007": "零零七",
}
#: What a review found to be read in another way.
MANDARIN_FORMS = [
    ("第2个", "第二个"), ("第 2 天", "第二天"), ("第2次", "第二次"), ("2年级", "二年级"), ("2次方", "二次方"),
    ("2 个", "两个"), ("2天", "两天"), ("12个", "十二个"),
    ("2024 年", "二零二四年"), ("1000年前", "一千年前"), ("3000年历史", "三千年历史"),
    ("2000年前", "二千年前"), ("1500年的历史", "一千五百年的历史"), ("1066年", "一零六六年"),
    ("2023年前三季度", "二零二三年前三季度"), ("2000年前后", "二零零零年前后"),
    ("2024年历史新高", "二零二四年历史新高"),
    ("1½", "一又二分之一"), ("3 1/2", "三又二分之一"), ("½3", "二分之一三"), ("10²", "十的平方"),
    ("10²³", "十的二十三次方"), ("１０²", "十的平方"),
    ("5-10天", "五到十天"), ("5~10", "五到十"), ("5～10", "五到十"), ("10-20", "十到二十"),
    ("5-10km", "五到十km"), ("2-3个", "两到三个"), ("5%-10%", "百分之五到百分之十"),
    ("-10~-5度", "负十到负五度"), ("1.5-2", "一点五到二"), ("5-10-15", "五十十五"), ("b2-3", "b二三"),
    ("2023-2024年", "二零二三到二零二四年"), ("1990—2000年", "一九九零到二零零零年"),
    ("12:30-13:45", "十二点三十分到十三点四十五分"),
    ("2024-01-05", "二零二四年一月五日"), ("2024/1/5", "二零二四年一月五日"), ("1/2/3", "一二三"),
    ("3:2", "三比二"), ("8:30:15", "八点三十分十五秒"), ("8:00:05", "八点零分零五秒"), ("8:00", "八点"),
    ("二○○八年", "二零零八年"), ("○○公司", "公司"),
    ("5‰", "千分之五"), ("100€", "一百欧元"), ("5$", "五美元"), ("5€ 10€", "五欧元十欧元"),
    ("2万€", "二万欧元"), ("٣个", "三个"),
]
SPANISH_FORMS = [
    ("37ºC", "treinta y siete grados centígrados"), ("37 º C", "treinta y siete grados centígrados"),
    ("37ºF", "treinta y siete grados fahrenheit"), ("37° en casa", "treinta y siete grados en casa"),
    ("37° celsius", "treinta y siete grados celsius"),
    ("nº 3", "número tres"), ("n.º 5", "número cinco"), ("N° 5", "número cinco"), ("Dª Ana", "doña ana"),
    ("D.ª Ana", "doña ana"), ("D. Ana", "don ana"),
    ("1er piso", "primer piso"), ("3.er", "tercer"), ("2do", "segundo"), ("4ta", "cuarta"),
    ("10mo", "décimo"), ("1ero", "primero"), ("5no", "cinco no"),
    ("1.234º", "milésimo ducentésimo trigésimo cuarto"),
    ("O’Donnell", "odonnell"), ("O'Donnell", "odonnell"),
    ("12/10/1998", "doce de octubre de mil novecientos noventa y ocho"), ("1/3/5", "uno tres cinco"),
    ("1-2-2003", "uno de febrero de dos mil tres"), ("1/100", "uno partido por cien"),
    ("a la 1:15", "a la una y quince"), ("13:05:30", "trece y cinco y treinta segundos"),
    ("21:00", "veintiuna"),
    ("3 ½", "tres y un medio"), ("3½", "tres y un medio"), ("3 1/2", "tres y un medio"), ("10²", "diez dos"),
    ("11º", "undécimo"), ("12ª", "duodécima"), ("111º", "centésimo undécimo"), ("40º", "cuadragésimo"),
    ("21 mil", "veintiún mil"), ("21.000", "veintiún mil"), ("101.000.000", "ciento un millones"),
    ("1 millón", "un millón"), ("€21", "veintiún euros"), ("£31", "treinta y una libras"),
    ("£200", "doscientas libras"), ("£1 millón", "un millón de libras"), ("$21 mil", "veintiún mil dólares"),
    ("$1.000.000", "un millón de dólares"),
    ("-5 grados", "menos cinco grados"), ("−5", "menos cinco"), ("-$5", "menos cinco dólares"),
    ("10-5", "diez cinco"), ("- 5 huevos", "cinco huevos"), ("5‰", "cinco por mil"),
    ("tengo ٣", "tengo tres"),
]
ANY_FORMS = [("3½", "3 1 2"), ("½½", "1 2 1 2"), ("10²³", "10 23"), ("²3", "2 3"), ("x²", "x2"),
             ("٣ ３", "3 3")]
ANY = {
    "Привет, МИР! Ёлка": "привет мир ёлка",
    "שלום \u200fעולם": "שלום עולם",
    "Straße I’m naïve cafe\u0301": "straße i'm naïve café",
    "สวัสดี ครับ": "สวัสดีครับ",
    "こんにちは、世界！ﾊﾟｿｺﾝ": "こんにちは世界パソコン",
    "한국어 문장": "한국어 문장",
    "👩‍💻 ok ❤️ 1️⃣": "ok 1",
    "'quoted' O'Neil": "quoted o'neil",
}
NUMBERS = {
    0: "零", 10: "十", 11: "十一", 20: "二十", 101: "一百零一", 110: "一百一十", 1001: "一千零一",
    1010: "一千零一十", 10010: "一万零一十", 100500: "十万零五百", 12345: "一万二千三百四十五",
    10**8 + 1: "一亿零一", 123456789: "一亿二千三百四十五万六千七百八十九", 10**12 + 10: "一万亿零一十",
}
#: Letters, marks and signs of many scripts, with forms that compose, decompose or run right to left.
WRITTEN = st.text(
    alphabet="aZñÑn\u0303éeıİßæ’'. ,;¿½３9/5:%€$￥ºª°-−"
    "中文〇零世界、。！かがゞﾊﾟไทยกำЁеاَ\u200fשּׁ한각😀\ufe0f１Ⅷ\ufdfa",
    max_size=30,
)
NORMALIZERS = {"es": spanish.normalize, "zh": mandarin.normalize, "any": any_script.normalize}


@pytest.mark.parametrize("name,examples", [("es", SPANISH), ("zh", MANDARIN), ("any", ANY)])
def test_examples(name, examples) -> None:
    assert {written: NORMALIZERS[name](written) for written in examples} == examples


@pytest.mark.parametrize("normalize,written,spoken", [
    *((mandarin.normalize, *pair) for pair in MANDARIN_FORMS),
    *((spanish.normalize, *pair) for pair in SPANISH_FORMS),
    *((any_script.normalize, *pair) for pair in ANY_FORMS),
])
def test_forms_of_numbers(normalize, written, spoken) -> None:
    assert normalize(written) == spoken and normalize(spoken) == spoken


def test_digits_that_vanish_are_told(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        check_texts({"u1": "I have ٣ cats", "u2": "ok"}, ENGLISH)
    assert "'en' does not keep some letters of 1 of 2, e.g. '٣' in u1" in caplog.text


def test_numbers_as_mandarin_reads_them() -> None:
    assert {number: mandarin.number_words(number) for number in NUMBERS} == NUMBERS
    with pytest.raises(ValueError, match="number must lie in 0"):
        mandarin.number_words(10**16)


def test_every_number_is_read_in_another_way_and_as_it_is_counted() -> None:
    """Read back by the rules of counting, which the reader does not share."""
    digits = {name: value for value, name in enumerate("零一二三四五六七八九")}
    units = {"十": 10, "百": 100, "千": 1000}

    def value_of(words: str) -> int:
        for name, unit in (("亿", 10**8), ("万", 10**4)):
            high, found, low = words.rpartition(name)
            if found:
                return value_of(high) * unit + (value_of(low) if low else 0)
        total, digit = 0, None
        for character in words:
            if character in units:
                total, digit = total + (1 if digit is None else digit) * units[character], None
            else:
                digit = digits[character]
        return total + (digit or 0)

    for number in [*range(12_000), *(7 * 10**k + 3 * 10 ** (k // 2) for k in range(16)), 10**16 - 1]:
        assert value_of(mandarin.number_words(number)) == number


@given(st.one_of(st.text(max_size=30), WRITTEN))
@example("İ\u200b\u3099")
def test_normalizers_are_idempotent(written) -> None:
    for normalize in NORMALIZERS.values():
        spoken = normalize(written)
        assert normalize(spoken) == spoken
        assert spoken == spoken.strip() and "  " not in spoken


@given(WRITTEN)
def test_composed_and_decomposed_accents_are_the_same(written) -> None:
    for name, normalize in NORMALIZERS.items():
        if name != "es" or "º" not in written:
            assert normalize(unicodedata.normalize("NFD", written)) == normalize(written), name


@given(WRITTEN)
def test_units_join_to_the_normalized_text(written) -> None:
    for name in ("zh", "ja", "th"):
        language = Language(name)
        text = language.normalize(written)
        assert join_words(language.units(written)) == text
        assert all(len(unit) > 0 and " " not in unit for unit in language.units(written))


def test_words_between_spaces_and_units_without() -> None:
    assert split_units("用python code写") == ["用", "python", "code", "写"]
    assert join_words(["用", "python", "code", "写"]) == "用python code写"
    assert join_words(["the", "cat"]) == "the cat" and split_units("the cat") == ["the", "cat"]
    assert unspaced("你 好 ， 世界 。 ok") == "你好，世界。ok"
    assert split_units("かﾞ ได้") == ["かﾞ", "ไ", "ด้"]
    assert begins_unit("世界") and not begins_unit("a世") and not begins_unit("▁世") and not begins_unit("")
    assert has_unspaced("a世") and not has_unspaced("ñ한")


def test_english_is_what_it_was() -> None:
    assert language_of() == ENGLISH == Language() and ENGLISH.plain() == {}
    assert ENGLISH.units("Mr. 3 Cafés") == normalizer.normalize("Mr. 3 Cafés").split()
    assert ENGLISH.unit == "words" and ENGLISH.rate == "WER"


def test_a_language_is_an_option_or_kept_with_a_model() -> None:
    kept = Language("zh", "icefall_fusion.text.any_script:normalize").plain()
    assert language_of(kept=kept).plain() == kept
    assert language_of("es", kept=kept) == Language("es")  # the normalizer was that of the other language
    assert language_of("zh", kept=kept).normalizer.endswith("any_script:normalize")
    assert Language("zh-TW").rate == "CER" and Language("pt-BR").rate == "WER"
    assert Language("ru").normalize("Ёлка!") == "ёлка" and Language("generic").unit == "words"


def shout(text: str) -> str:
    """Return a text in upper case: a normalizer of a user."""
    return text.upper()


def test_a_normalizer_of_ones_own() -> None:
    assert language_of("en", f"{__name__}:shout").units("Mr. 3") == ["MR.", "3"]


@pytest.mark.parametrize("name,normalize,message", [
    ("Spanish", "", "language must be an ISO 639 code, e.g. en, es, zh, or generic, but is 'Spanish'"),
    (7, "", "language must be an ISO 639 code"),
    ("en", "shout", "normalizer must be module:function, e.g. .* but is 'shout'"),
    ("en", "no_such_module:f", "normalizer must be module:function that can be imported.*no_such_module"),
    ("en", "json:no_such", "normalizer must be module:function that can be imported.*no_such"),
    ("en", "json:__name__", "normalizer must name a function"),
])
def test_bad_languages(name, normalize, message) -> None:
    with pytest.raises(ValueError, match=message):
        language_of(name, normalize)


def test_text_that_vanishes_is_an_error_with_the_text() -> None:
    texts = {"u1": "hello", "u2": "你好", "u3": "Привет", "u4": "", "u5": None, "u6": "..."}
    with pytest.raises(ValueError, match="'en', but of 2 of 6 no word is left, e.g. u2: '你好'; .*--lang"):
        check_texts(texts, ENGLISH)
    with pytest.raises(ValueError, match="of 2 of 6 no word is left"):
        check_texts(texts, Language("es"))
    with pytest.raises(ValueError, match="of 1 of 1 no word is left"):
        check_texts({"u1": "你好３"}, ENGLISH)  # "three" would be left
    check_texts(texts, Language("zh"))


def test_a_few_texts_that_vanish_are_told_and_stop_nothing(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        check_texts({"u1": "hello", "u2": "Ἀχιλλεύς", "u3": "a cat", "u4": "你好"}, ENGLISH)
    (record,) = caplog.records
    assert "the language 'en' has no word of 2 of 4, e.g. u2: 'Ἀχιλλεύς'" in record.getMessage()


@pytest.mark.parametrize("name,base,rate", [
    ("cmn", "zh", "CER"), ("zho", "zh", "CER"), ("chi", "zh", "CER"), ("cmn-Hans", "zh", "CER"),
    ("jpn", "ja", "CER"), ("tha", "th", "CER"), ("khm", "km", "CER"), ("eng", "en", "WER"),
    ("spa", "es", "WER"), ("rus", "rus", "WER"),
])
def test_codes_of_three_letters_are_the_same_languages(name, base, rate) -> None:
    language, same = Language(name), Language(base)
    assert (language.base, language.rate) == (base, rate)
    assert language.normalize("Mr. 3 n.º 2个") == same.normalize("Mr. 3 n.º 2个")


@pytest.mark.parametrize("written,spoken", [
    ("2元", "两元"), ("2名学生", "两名学生"), ("2小时", "两小时"), ("2 公里", "两公里"), ("$2", "两美元"),
    ("第2名", "第二名"), ("2元一次方程", "二元一次方程"), ("2元论", "二元论"), ("2月2日", "二月二日"),
    ("12元", "十二元"),
    ("13800138000", "一三八零零一三八零零零"), ("电话13912345678。", "电话一三九一二三四五六七八"),
    ("13800138000元", "一百三十八亿零一十三万八千元"), ("23800138000", "二百三十八亿零一十三万八千"),
    ("13,800,138,000", "一百三十八亿零一十三万八千"), ("13,800,138,000个", "一百三十八亿零一十三万八千个"),
    ("人口13800138000人", "人口一百三十八亿零一十三万八千人"),
    ("13800138000吨", "一百三十八亿零一十三万八千吨"), ("13800138000多", "一百三十八亿零一十三万八千多"),
    ("13800138000人工", "一三八零零一三八零零零人工"),
    ("2元素", "二元素"), ("2周期", "二周期"), ("2名词", "二名词"), ("2步骤", "二步骤"),
    ("2元函数", "二元函数"), ("2周期间", "两周期间"), ("2周年", "两周年"), ("2名单身汉", "两名单身汉"),
    ("2名人质", "两名人质"),
])
def test_counters_and_telephones_of_mandarin(written, spoken) -> None:
    assert Language("zh").normalize(written) == spoken


def test_letters_with_a_stroke_are_latin_letters_in_spanish() -> None:
    assert Language("es").normalize("Đoković y Ħal Tarxien") == "dokovic y hal tarxien"


def test_a_text_is_looked_at_and_told_of_once(caplog, monkeypatch) -> None:
    texts, calls = {"u1": "hello", "u2": "a once told word мир", "u3": "another"}, []
    normalize = Language.normalize
    monkeypatch.setattr(Language, "normalize", lambda self, text: calls.append(text) or normalize(self, text))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):  # once for each method of a decode
            check_texts(texts, ENGLISH)
        check_texts({"u2": texts["u2"], "u1": "hello"}, ENGLISH)  # without an utterance that was skipped
    assert len(caplog.records) == 1 and calls.count(texts["u2"]) == 1
    with caplog.at_level(logging.WARNING):
        check_texts({**texts, "u4": "one more мир of them"}, ENGLISH)
    assert len(caplog.records) == 2 and "of 2 of 4, e.g." in caplog.records[1].getMessage()


def long_words(text: str) -> str:
    """Return the words of a text that have two letters at least: a normalizer of a user."""
    return " ".join(word for word in text.lower().split() if len(word) > 1)


def test_a_normalizer_may_drop_words_of_one_letter(caplog) -> None:
    language = Language("el", f"{__name__}:long_words")
    with caplog.at_level(logging.WARNING):
        check_texts({"u1": "ένα μήλο", "u2": "η Ἀχαΐα"}, language)
    assert not caplog.records and language.lost("ένα μήλο") == []
    with pytest.raises(ValueError, match="of 1 of 1 no word is left"):
        check_texts({"u1": "ή ὁ"}, language)


def test_text_that_is_kept_in_part_gets_one_warning_with_an_example(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        check_texts({"u1": "hello", "u2": "naïve 3½ ok", "u4": "an \u200fa"}, ENGLISH)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        check_texts({"u1": "hello 你好", "u2": "ok мир", "u3": "😀", "u4": "...", "u5": "fine"}, ENGLISH)
    signs, letters = (record.getMessage() for record in caplog.records)
    assert "2 of 5 have signs alone and no words, e.g. u3: '😀'" in signs
    assert "'en' does not keep some letters of 2 of 5, e.g. '你好' in u1: 'hello 你好'" in letters
