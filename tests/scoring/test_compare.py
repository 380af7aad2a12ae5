"""Two methods word by word: alignment, kinds, significance.
Knows: scoring.compare. Must not know: how texts were recognized.
"""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icefall_fusion.scoring.compare import Comparison, Slot, bootstrap, three_way
from icefall_fusion.scoring.wer import EPS, compare_words
from icefall_fusion.scoring.word_kinds import KINDS, WordKinds

WORDS = st.lists(st.sampled_from("a b c d".split()), max_size=8)
SOUNDS = {"see": "si", "sea": "si", "two": "tu", "to": "tu"}


@given(WORDS, WORDS, WORDS)
def test_both_texts_are_whole_and_have_the_fewest_errors(reference, a, b) -> None:
    slots = three_way(reference, a, b)
    for column, words in ((0, reference), (1, a), (2, b)):
        assert [slot[column] for slot in slots if slot[column] != EPS] == words
    assert sum(slot.a != slot.reference for slot in slots) == compare_words(reference, a).errors
    assert sum(slot.b != slot.reference for slot in slots) == compare_words(reference, b).errors
    assert [slot for slot in slots if slot == (EPS, EPS, EPS)] == []


def test_insertions_of_both_stand_together() -> None:
    slots = three_way("we saw".split(), "we then saw".split(), "we then also saw now".split())
    assert slots == [("we", "we", "we"), (EPS, "then", "then"), (EPS, EPS, "also"), ("saw", "saw", "saw"),
                     (EPS, EPS, "now")]
    assert [slot.outcome for slot in slots] == ["right", "wrong", "lost", "right", "lost"]


def test_each_error_has_a_kind() -> None:
    counts = {"the": 40_000, "see": 500, "keeper": 300, "two": 300, "quodling": 1, "marsh": 100}
    kinds = WordKinds(counts, {"marsh"}, lambda word: SOUNDS.get(word, word))
    assert kinds.of_error(EPS, "the") == "inserted" and kinds.of_error("the", EPS) == "deleted"
    assert kinds.of_error("sea", "see") == "homophone" and kinds.of_error("two", "to") == "homophone"
    assert kinds.of_error("two", "three") == "number" and kinds.of_error("the", "a") == "function word"
    assert kinds.of_error("marsh", "march") == kinds.of_error("quodling", "a") == "name or rare word"
    assert kinds.of_error("keeper", "keep") == "other"
    assert WordKinds(counts).of_error("two", "to") == "number"  # nobody tells how words sound


def test_wins_and_losses_are_counted_by_kind_with_examples() -> None:
    kinds = WordKinds({"see": 9, "keeper": 9, "saw": 9}, (), lambda word: SOUNDS.get(word, word))
    made = Comparison(
        {"u": "we see the keeper", "v": "we see", "w": "the keeper saw"},
        {"u": "we sea the keeper", "v": "we sea", "w": "the keeper saw"},
        {"u": "we see the keep", "v": "we see", "w": "keeper saw it"}, kinds)
    assert made.wer() == (pytest.approx(100 * 2 / 9), pytest.approx(100 * 3 / 9))
    table = made.by_kind()
    assert list(table) == list(KINDS)
    assert table["homophone"] == {"won": 2, "lost": 0, "wrong": 0}
    assert table["other"]["lost"] == table["deleted"]["lost"] == table["inserted"]["lost"] == 1
    assert made.outcomes() == {"right": 5, "won": 2, "lost": 3}
    assert made.examples("homophone", "won", 5) == [("u", 1)]  # the same reading twice
    assert made.slots["u"][1] == Slot("see", "sea", "see")
    with pytest.raises(ValueError, match="hypotheses must hold every utterance of references"):
        Comparison({"u": "a"}, {"u": "a"}, {}, kinds)
    with pytest.raises(ValueError, match="references must have words"):
        Comparison({"u": ""}, {"u": "a"}, {"u": ""}, kinds)


def test_the_bootstrap_tells_chance_from_progress() -> None:
    rng = np.random.default_rng(0)
    words = np.full(200, 20)
    a = rng.poisson(3, 200)
    better = bootstrap(words, a, np.maximum(a - 1, 0))
    assert better.improvement == 1.0 and better.low < better.difference < better.high < 0
    same = bootstrap(words, a, a)
    assert same == bootstrap(words, a, a) and same.improvement == 0.5 and same.difference == 0
    chance = bootstrap(words, a, rng.permutation(a))
    assert 0.02 < chance.improvement < 0.98 and chance.low < 0 < chance.high
    # the interval of a mean is that of the normal distribution
    noise = rng.poisson(3, 2000)
    wide = bootstrap(np.full(2000, 20), np.zeros(2000), noise)
    expected = 100 * 1.96 * noise.std() / 20 / np.sqrt(2000)
    assert (wide.high - wide.low) / 2 == pytest.approx(expected, rel=0.05)
