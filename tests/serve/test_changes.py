"""Which words a language model has changed, and what else was possible at their places.
Knows: N-best lists. Must not know: servers, streams.
"""
from __future__ import annotations

import pytest
from serve_tools import LIVE, SEARCH, fusions_of

from icefall_fusion.nbest import Hypothesis, NBest
from icefall_fusion.serve.changes import word_notes
from icefall_fusion.serve.engine import Engine
from icefall_fusion.serve.limits import Limits
from icefall_fusion.streaming import StreamingDecoder

WEIGHTS = {"ctc": 1.0, "llm": 0.5, "words": 0.0}
WITHOUT = {"ctc": 1.0, "llm": 0.0, "words": 0.0}


def nbest_of(*rows):
    made = [Hypothesis([], text, {"ctc": ctc, "llm": llm, "words": float(len(text.split())),
                                  "total": ctc + 0.5 * llm}) for text, ctc, llm in rows]
    return NBest("talk", made, dict(WEIGHTS))


@pytest.mark.parametrize(("texts", "without", "alternatives"), [
    # the best list by the LLM, then that which is best without it
    (["the sea is calm", "the see is calm"], [None, "see", None, None], [[], ["see"], [], []]),
    (["a cat sat", "a big cat sat"], [None, "big cat", None], [[], ["big cat"], []]),
    (["a big cat", "a cat"], [None, "", None], [[], [], []]),
    (["we saw", "we saw it"], [None, "saw it"], [[], ["saw it"]]),
    (["same words"], [None, None], [[], []]),
    (["hello", ""], [""], [[]]),
    (["", "hello"], [], []),
])
def test_words_stand_beside_those_of_others(texts, without, alternatives) -> None:
    rows = [(text, -5.0 - (n == 0), -2.0 - 10.0 * n) for n, text in enumerate(texts)]
    notes = word_notes(nbest_of(*rows), WITHOUT)
    assert [note.without_llm for note in notes] == without
    assert [note.alternatives for note in notes] == alternatives


def test_nothing_is_changed_where_the_llm_agrees() -> None:
    notes = word_notes(nbest_of(("red shells", -1.0, -1.0), ("read shells", -4.0, -1.0)), WITHOUT)
    assert [note.without_llm for note in notes] == [None, None]
    assert notes[0].alternatives == ["read"]


@pytest.mark.parametrize(("name", "given", "without"), [
    ("nlm", {"nlm": 0.3, "words": 0.2}, {"nlm": 0.0, "words": 0.0}),
    ("words, llm", {"wordngram": 0.3, "llm": 0.4, "oov": 0.3, "words": 0.7},
     {"wordngram": 0.3, "llm": 0.0, "oov": 0.3, "words": 0.2}),
    ("nlm", {"nlm": 0.0, "words": 0.0}, {"nlm": 0.0, "words": 0.0}),  # it has failed
])
def test_neural_language_models_are_taken_out_and_ngrams_stay(made, name, given, without) -> None:
    engine = Engine(StreamingDecoder(made[0], fusions_of(made, name), SEARCH, LIVE), Limits())
    assert engine.without_llm({"ctc": 1.0, **given}) == pytest.approx({"ctc": 1.0, **without})
