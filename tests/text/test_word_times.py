"""From marks of a CTC model to the times at which words sound: order, limits, constants.
Knows: WordTiming. Must not know: searches, models.
"""
from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icefall_fusion.nbest import WordTime
from icefall_fusion.text.word_times import SHORTEST, WordTiming

TIMING = WordTiming(lead=0.04, tail=0.02, least=0.08, letter=0.06)


def test_a_word_starts_before_its_mark_and_lasts_by_its_letters_until_the_next_one() -> None:
    marks = [WordTime("lighthouse", 0.4, 0.6), WordTime("a", 0.8, 0.84), WordTime("keeper", 1.8, 2.4)]
    first, second, third = TIMING.apply(marks)
    assert (first.start, first.end) == (0.36, 0.76)  # 0.4 + 0.08 + 0.6 is later than the next start
    assert second.start == 0.76 and second.end == pytest.approx(0.94)  # a pause follows
    assert third.start == 1.76 and third.end == pytest.approx(2.42)  # its last mark is later than its letters
    assert TIMING.apply(marks, seconds=2.41)[2].end == 2.41


def test_no_constants_leave_the_marks() -> None:
    marks = [WordTime("ab", 0.04, 0.12, 0.5), WordTime("c", 0.16, 0.32)]
    assert WordTiming(0.0, 0.0, 0.0, 0.0).apply(marks) == marks
    assert TIMING.apply([]) == []


@given(st.lists(st.tuples(st.text("ab", min_size=1, max_size=30), st.integers(1, 9), st.integers(0, 9)),
                max_size=8), st.floats(-0.2, 0.4), st.floats(-0.3, 0.3))
def test_words_follow_one_another_and_last_a_while(parts, lead, tail) -> None:
    marks, frame = [], 0
    for word, gap, length in parts:
        frame += gap
        marks.append(WordTime(word, round(frame * 0.04, 6), round((frame + length + 1) * 0.04, 6)))
        frame += length
    words = WordTiming(lead, tail).apply(marks, seconds=(frame + 1) * 0.04)
    assert [word.word for word in words] == [mark.word for mark in marks]
    assert all(word.start >= 0 and word.end >= word.start + SHORTEST - 1e-6 for word in words)
    assert all(one.end <= other.start + 1e-6 for one, other in zip(words, words[1:]))


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.1", 100.0])
def test_bad_constants_are_named(value) -> None:
    with pytest.raises(ValueError, match=r"WordTiming\.letter must be some seconds"):
        WordTiming(letter=value)
