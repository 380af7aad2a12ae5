"""What the searches refuse: every wrong argument is named, whatever it is, and by no other exception.
Knows: the search's arguments. Must not know: how it is searched.
"""
from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from search_tools import TOKENS, Bigram, emissions

from icefall_fusion.search import PrefixSearchOptions, ctc_greedy_search, ctc_prefix_search
from icefall_fusion.text.tokens import AcousticTokens

LOG_PROBS, LENS = emissions(1, 2, 6, 6), torch.tensor([6, 4])
JUNK = [
    None, True, -1, 0, 3, 2.5, math.nan, math.inf, -math.inf, 10**400, 1j, "3", "", b"x", [], [1, 2], (), {},
    {"beam": 3}, object(), len, np.float32(0.5), np.int64(4), np.zeros((2, 6, 6), np.float32),
    np.array([6, 4]), TOKENS,
    torch.tensor(3), torch.zeros(0), torch.zeros(2, 6, 6), LOG_PROBS, LENS, PrefixSearchOptions(), "\ud800",
]
TENSORS = [
    LOG_PROBS.to(torch.complex64), LOG_PROBS.to(torch.int32), LOG_PROBS.bool(), LOG_PROBS.to_sparse(),
    LOG_PROBS.to("meta"), torch.nested.nested_tensor([LOG_PROBS[0], LOG_PROBS[1, :4]]), LOG_PROBS[0],
    LOG_PROBS[None], torch.quantize_per_tensor(LOG_PROBS, 0.1, 0, torch.qint8), LENS.to(torch.complex64),
    LENS.float(), LENS.bool(), LENS.to_sparse(), LENS.to("meta"), LENS.to(torch.int8), LENS[:1],
    LENS - 7, LENS + 1,
]
OPTIONS = [field.name for field in dataclasses.fields(PrefixSearchOptions)]
ARGUMENTS = ["log_probs", "lens", "tokens", "ids", "blank_id"]
PLACES = [(ctc_prefix_search, name) for name in (*ARGUMENTS, "options", "fusions")]
PLACES += [(ctc_greedy_search, name) for name in (*ARGUMENTS, "frame_shift")]
numbers = st.one_of(st.integers(-9, 9), st.floats(), st.text(max_size=3), st.lists(st.integers()))


def shown(value: object) -> str:
    return str(value.shape) if isinstance(value, torch.Tensor) else repr(value)


@pytest.mark.parametrize("field", OPTIONS)
def test_options_of_any_value_are_named_or_serve(field):
    @settings(max_examples=30, deadline=None)
    @given(value=numbers)
    def set_to(value):
        try:
            options = PrefixSearchOptions(**{field: value})
        except ValueError as error:
            assert str(error).startswith(f"PrefixSearchOptions.{field} must "), shown(value)
        else:
            if field != "engine":  # which one is here is another question
                assert len(ctc_prefix_search(LOG_PROBS, LENS, options, TOKENS)) == 2

    set_to()
    for value in JUNK + TENSORS:
        set_to.hypothesis.inner_test(value)


@pytest.mark.parametrize(("function", "name"), PLACES, ids=lambda x: getattr(x, "__name__", x))
def test_arguments_of_any_value_are_named_or_serve(function, name):
    @settings(max_examples=20, deadline=None)
    @given(value=numbers)
    def set_to(value):
        try:
            nbests = function(**{"log_probs": LOG_PROBS, "lens": LENS, name: value})
        except ValueError as error:
            # the log-probs may be those that do not fit the lengths
            assert str(error).startswith((name, "lens") if name == "log_probs" else name), shown(value)
        else:
            assert len(nbests) == 2 and all(nbest.hypotheses for nbest in nbests)

    set_to()
    for value in JUNK + TENSORS:
        set_to.hypothesis.inner_test(value)


@pytest.mark.parametrize("name", ["source", "weight", "word_bonus"])
def test_fusions_of_any_setting_are_named_or_serve(name):
    for value in JUNK + TENSORS:
        fusion = Bigram(0.5)
        setattr(fusion, name, value)
        try:
            ctc_prefix_search(LOG_PROBS, LENS, tokens=TOKENS, fusions=[fusion])
        except ValueError as error:
            assert str(error).startswith(f"Bigram.{name} must "), shown(value)


@pytest.mark.parametrize("name", ["pieces", "blank_id", "word_start", "delimiter"])
def test_vocabularies_of_any_setting_are_named_or_serve(name):
    for value in JUNK + TENSORS:
        try:
            named = {"pieces": ["<blk>", "▁a", "|"], "blank_id": 0, name: value}
            tokens = AcousticTokens.from_pieces(**named)
        except ValueError as error:
            assert str(error).startswith(name), shown(value)
        else:
            tokens.fingerprint()


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(ValueError, match=r"pieces\[1\] must be text that UTF-8 can write, but is '\\ud800'"):
        AcousticTokens.from_pieces(["<blk>", "\ud800", "a"], 0)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_log_probs_that_need_a_gradient_are_searched(engine):
    options = PrefixSearchOptions(engine=engine)
    wanted = ctc_prefix_search(LOG_PROBS, LENS, options, TOKENS)
    assert ctc_prefix_search(LOG_PROBS.clone().requires_grad_(), LENS, options, TOKENS) == wanted
