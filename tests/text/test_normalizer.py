"""The normalizer and the forms of text that an LLM reads: examples and invariances.
Knows: icefall_fusion.text.normalizer. Must not know: torch, models, files outside the repository.
"""
from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icefall_fusion.text.normalizer import normalize
from icefall_fusion.text.styles import TEXT_STYLES, adapt, adapt_word

EXAMPLES = {
    "Mr. and Mrs. Smith met Dr. Brown at St. Paul's.": (
        "mister and missus smith met doctor brown at saint paul's"
    ),
    "Mr Smith": "mister smith",
    "In 1830 he paid £3,500; in 1905, $1.": (
        "in eighteen thirty he paid three thousand five hundred pounds in nineteen oh five one dollar"
    ),
    "the 21st, the 2nd and the 3d": "the twenty first the second and the third",
    "the 1890's and 1900": "the eighteen nineties and nineteen hundred",
    "3.14 is 2½ or 3/4, 5%": "three point one four is two and a half or three quarters five percent",
    "at 8:30, No. 5": "at eight thirty number five",
    "007": "zero zero seven",
    "£5 million, $3.50": "five million pounds three dollars and fifty cents",
    "Café Æsop naïve Œdipus": "cafe aesop naive oedipus",
    "“Don’t,” said he; ‘’tis ten o’clock.’": "don't said he 'tis ten o'clock",
    "'Hello there,' he said": "hello there he said",
    "the dogs' dinner": "the dogs dinner",
    "give 'em the top o' the morning": "give 'em the top o' the morning",
    "Thomson & Co., etc.": "thomson and company et cetera",
    "To-day or to-morrow, well-nigh": "today or tomorrow well nigh",
    "one—two--three": "one two three",
    "x''y": "x y",
    "Ποῦ; 日本": "",
    "": "",
}


@pytest.mark.parametrize("written", EXAMPLES)
def test_examples(written: str) -> None:
    assert normalize(written) == EXAMPLES[written]


BOOKISH = st.text(alphabet="abMmrRsSt.' 0123456789,£$%&-/½’ÆéσŁİſ:\"", max_size=40)


@given(st.one_of(st.text(max_size=60), BOOKISH))
def test_normalize_is_idempotent_and_keeps_to_its_alphabet(written: str) -> None:
    spoken = normalize(written)
    assert normalize(spoken) == spoken
    assert re.fullmatch("(?:[a-z']+(?: [a-z']+)*)?", spoken)


@given(BOOKISH)
def test_case_and_outer_space_do_not_matter(written: str) -> None:
    assert normalize(f"  {written.upper().lower()}\n") == normalize(written.upper().lower())


def test_long_numbers_are_read_digit_by_digit() -> None:
    assert normalize("1" * 400).split() == ["one"] * 400


def test_sentence_style() -> None:
    assert adapt(["'tis", "i", "i'll", "irish"], "sentence") == "'Tis I I'll irish"
    assert adapt("I THINK HE SAID I'M LATE".split(), "sentence") == "I think he said I'm late"
    assert adapt("THE CAT".split(), "sentence") == "The cat"
    assert adapt(["Ab", "C"], "lower") == "ab c"
    assert adapt(["Ab", "C"], "as-is") == "Ab C"


@given(st.lists(st.text(alphabet="abi'", min_size=1, max_size=6), max_size=8), st.sampled_from(TEXT_STYLES))
def test_adapted_words_join_to_the_adapted_text(words: list[str], style: str) -> None:
    adapted = [adapt_word(word, index, style) for index, word in enumerate(words)]
    assert " ".join(adapted) == adapt(words, style)
    assert [word.lower() for word in adapted] == [word.lower() for word in words]


def test_unknown_style_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="style must be one of .*did you mean 'sentence'"):
        adapt(["a"], "sentense")
    with pytest.raises(ValueError, match="index must be at least 0, but is -1"):
        adapt_word("a", -1, "sentence")
