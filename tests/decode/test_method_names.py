"""Names of methods: what they parse into, their weights, what ``all`` is.
Knows: icefall_fusion.decode.method_names. Must not know: models and searches.
"""
from __future__ import annotations

import math
from dataclasses import replace

import pytest

from icefall_fusion.decode.method_names import (
    METHODS,
    choose_methods,
    parse_method,
    parse_methods,
)
from icefall_fusion.decode.weights import weights_of


def test_names_of_methods() -> None:
    assert parse_methods("all") == list(METHODS) and len(METHODS) == 19
    assert parse_method("ctc-prefix").sources == [] and parse_method("ctc-greedy").search == "greedy"
    assert parse_method("llm-delayed-interval-7").fusions[0].trigger.frames == 7
    assert parse_method("nlm-shallow+llm-delayed-every-frame").sources == ["nlm", "llm"]
    both = parse_method("attention-rescoring+llm-delayed-shortest")
    assert [spec.source for spec in both.fusions] == ["llm"] and both.needs == {"llm", "attention"}
    ahead = parse_method("ngram-shallow+llm-delayed-interval-7-ahead").fusions
    assert [(spec.source, spec.look_ahead) for spec in ahead] == [("ngram", False), ("llm", True)]
    [late] = parse_method("llm-delayed-shortest-late-8-ahead").fusions
    assert late == replace(parse_method("llm-delayed-shortest").fusions[0], late=8, look_ahead=True)
    tuned = {"llm-delayed-shortest-ahead": {"llm": 0.7, "words": 0.2}}
    assert weights_of("llm-delayed-shortest-late-8-ahead", tuned) == {"ctc": 1.0, "llm": 0.7, "words": 0.2}
    wrong_names = ["nlm-shallow-ahead", "llm-delayed-ahead", "llm-delayed-shortest-ahead-ahead"]
    wrong_names += ["llm-delayed-late-3", "nlm-shallow-late-3", "llm-delayed-shortest-ahead-late-3"]
    for wrong in wrong_names:
        with pytest.raises(ValueError, match="method must be built of known components"):
            parse_method(wrong)
    with pytest.raises(ValueError, match="use each source of scores once"):
        parse_method("llm-delayed-shortest+llm-nbest-rescoring")
    with pytest.raises(ValueError, match="FixedInterval.frames must be an integer, at least 1"):
        parse_method("llm-delayed-interval-0")
    assert weights_of("ctc-prefix", {"ctc-prefix": {}}) == {"ctc": 1.0}
    with pytest.raises(ValueError, match="did you mean 'llm'"):
        weights_of("llm-delayed-shortest", {"llm-delayed-shortest": {"lm": 0.5}})
    for wrong in (math.nan, math.inf, "1", None):
        with pytest.raises(ValueError, match="attention-rescoring.attention must be a number"):
            weights_of("attention-rescoring", {"attention-rescoring": {"attention": wrong}})



def test_all_is_what_the_models_allow(caplog) -> None:
    assert choose_methods("all", {"attention", "nlm", "llm", "matched_llm", "ngram", "lodr"}) == list(METHODS)
    chosen = choose_methods("all", {"llm"})
    assert "llm-delayed-shortest" in chosen and "ctc-greedy" in chosen and len(chosen) == 7
    assert "llm-delayed-shortest-ahead is skipped: there is no ngram" in caplog.text
    with pytest.raises(ValueError, match="ngram.path must name a model for the method 'llm-.*-ahead'"):
        choose_methods("all,llm-delayed-shortest-ahead", {"llm"})

