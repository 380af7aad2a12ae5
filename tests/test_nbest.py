"""N-best lists: reweighting, JSON lines, oracle.
Knows: icefall_fusion.nbest. Must not know: searches and models.
"""
from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icefall_fusion.nbest import (
    Hypothesis,
    NBest,
    WordTime,
    read_nbests,
    to_json,
    write_nbests,
)
from icefall_fusion.scoring.wer import oracle

finite = st.floats(-1e4, 0, allow_nan=False)


def make(utterance: str = "u1") -> NBest:
    scores = {"ctc": -2.0, "llm": -9.0, "words": 2, "total": -2.0}
    first = Hypothesis([3, 4], "a b", scores, [WordTime("a", 0, 0.5)])
    second = Hypothesis([5], "ab", {"ctc": -3.0, "llm": -4.0, "words": 1, "total": -3.0})
    return NBest(utterance, [first, second])


def test_reweight_sums_sources_and_sorts() -> None:
    nbest = make()
    again = nbest.reweight({"ctc": 1.0, "llm": 0.5, "words": 0.25})
    assert [h.text for h in again] == ["ab", "a b"]
    assert again[0].total == pytest.approx(-3.0 - 2.0 + 0.25)
    assert again.weights == {"ctc": 1.0, "llm": 0.5, "words": 0.25}
    assert [h.text for h in nbest] == ["a b", "ab"] and nbest[0].total == -2.0  # the first list is untouched


def test_missing_source_is_an_error_unless_its_weight_is_zero() -> None:
    with pytest.raises(ValueError, match="'nlm' has no score in a hypothesis of utterance u1"):
        make().reweight({"ctc": 1.0, "nlm": 0.3})
    assert make().reweight({"ctc": 1.0, "nlm": 0.0})[0].text == "a b"
    with pytest.raises(ValueError, match="total"):
        make().reweight({"total": 1.0})


def test_zero_weight_ignores_infinite_scores() -> None:
    nbest = NBest("u", [Hypothesis([], "", {"ctc": -1.0, "llm": -math.inf, "total": -1.0})])
    assert nbest.reweight({"ctc": 1.0, "llm": 0.0})[0].total == -1.0
    assert nbest.reweight({"ctc": 1.0, "llm": 0.1})[0].total == -math.inf


def test_total_is_always_there() -> None:
    with pytest.raises(ValueError, match="'total'"):
        Hypothesis([1], "a", {"ctc": -1.0})


def test_with_scores_adds_a_source() -> None:
    nbest = make().with_scores("attention", [-1.0, -5.0])
    assert [h.scores["attention"] for h in nbest] == [-1.0, -5.0]
    assert "attention" in nbest.sources() and "total" not in nbest.sources()
    with pytest.raises(ValueError, match="one score per hypothesis of u1"):
        make().with_scores("attention", [0.0])


@given(st.lists(st.tuples(finite, finite, st.integers(0, 30)), min_size=1, max_size=6), st.text(max_size=8))
def test_json_round_trip_is_exact(rows, name) -> None:
    hypotheses = [
        Hypothesis([i], f"w{i}", {"ctc": c, "llm": m, "words": w, "total": c})
        for i, (c, m, w) in enumerate(rows)
    ]
    nbest = NBest(name, hypotheses, {"ctc": 1.0})
    line = to_json(nbest.as_plain())
    assert "\n" not in line
    assert NBest.from_plain(json.loads(line)) == nbest


def test_files(tmp_path) -> None:
    path = tmp_path / "sub" / "nbest.jsonl"
    write_nbests(path, [make("u1"), make("u2")])
    assert read_nbests(path) == [make("u1"), make("u2")]
    for line in ("{}", "[]", '{"utterance": "u", "weights": {}, "hypotheses": [[]]}'):
        path.write_text(line + "\n")
        with pytest.raises(ValueError, match="nbest.jsonl line 1"):
            read_nbests(path)


def test_an_error_in_writing_leaves_the_old_file_and_no_other(tmp_path) -> None:
    path = tmp_path / "nbest.jsonl"
    write_nbests(path, [make("u1")])

    def full_disk():
        yield make("u2")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_nbests(path, full_disk())
    assert read_nbests(path) == [make("u1")]
    assert list(tmp_path.iterdir()) == [path]


def test_oracle() -> None:
    assert oracle(make(), "ab").text == "ab"
    assert oracle(make(), "A b, c").text == "a b"  # words are normalized
    with pytest.raises(ValueError, match="the list of u9 must hold a hypothesis"):
        oracle(NBest("u9", []), "a")
