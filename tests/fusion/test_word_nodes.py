"""Texts placed in the token tree by compiled code: the same as one by one in Python.
Knows: tiny language models, small searches. Must not know: trained models.
"""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icefall_fusion.fusion import DelayedFusion, FixedInterval, ShortestHypothesis, delayed
from icefall_fusion.fusion.word_nodes import NativeWordNodes, open_word_nodes
from icefall_fusion.fusion.words import WordNodes
from icefall_fusion.lm import CausalLm
from icefall_fusion.lm.loading import Vocabulary
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search
from icefall_fusion.text.tokens import AcousticTokens
from tests.fusion.test_fusion import (
    PIECES,
    assert_same,
    byte_tokenizer,
    emissions,
    llm,  # noqa: F401 (a fixture)
    tiny_model,
    tokens,  # noqa: F401 (a fixture)
)


def by_python(scorer, arena, tokens, tokenizer, prompted, ids):  # noqa: F811
    return WordNodes(scorer, arena, tokens, tokenizer, prompted, ids)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    text=st.sampled_from(["as-is", "lower", "sentence"]),
    trigger=st.sampled_from([ShortestHypothesis(), FixedInterval(2)]),
    prompt=st.sampled_from([None, "the boat", {"0": "", "1": "a sea", "2": "it is"}]),
    often=st.booleans(),
)
def test_compiled_code_places_texts_where_python_does(llm, tokens, seed, text, trigger, prompt, often):  # noqa: F811
    log_probs, lens = emissions(batch=3, frames=30, seed=seed, peak=2.0)
    found, stats = [], []
    for opener in (open_word_nodes, by_python):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(delayed, "open_word_nodes", opener)
            if often:  # clean up after each event
                patch.setattr(delayed, "_KEEP_AFTER", -1)
            fusion = DelayedFusion(llm, 0.4, 0.5, trigger, text, prompt)
            found.append(ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=5), tokens, [fusion]))
            stats.append(fusion.stats())
    assert_same(*found, 1e-4)
    for name in ("histories_scored", "events", "lm_tokens_scored", "lm_tokens_forwarded"):
        assert stats[0][name] == stats[1][name], name
    words = [one["retokenize_words"] for one in stats]  # of texts that are known nothing is asked
    assert 0.8 * words[1] <= words[0] <= words[1]


def test_it_is_compiled_code_that_places(llm, tokens, monkeypatch):  # noqa: F811
    kinds = []

    def opened(*given):
        kinds.append(type(open_word_nodes(*given)))
        return open_word_nodes(*given)

    monkeypatch.setattr(delayed, "open_word_nodes", opened)
    log_probs, lens = emissions(batch=2)
    ctc_prefix_search(log_probs, lens, None, tokens, [DelayedFusion(llm, 0.4)])
    assert kinds == [NativeWordNodes]


def test_a_tokenizer_that_changes_its_mind_goes_on_by_whole_texts(llm, tokens, monkeypatch):  # noqa: F811
    log_probs, lens = emissions(batch=2, frames=30, seed=2)
    usual = ctc_prefix_search(log_probs, lens, None, tokens, [DelayedFusion(llm, 0.4, 0.5, FixedInterval(4))])
    tokenizer = byte_tokenizer()
    own = CausalLm(llm.model, Vocabulary(tokenizer, None, 0, 1), "own", self_check=False)
    fusion = DelayedFusion(own, 0.4, 0.5, FixedInterval(4))
    spell, asked = fusion._tokenizer._spell, []

    def fails_later(text, begins):
        asked.append(text)
        if len(asked) > 3:
            fusion._tokenizer._fall_back("nothing in particular")
            return None
        return spell(text, begins)

    fusion._tokenizer.check_acoustic(tokens)
    asked.clear()
    monkeypatch.setattr(fusion._tokenizer, "_spell", fails_later)
    with pytest.warns(UserWarning, match="cannot be used word by word"):
        found = ctc_prefix_search(log_probs, lens, None, tokens, [fusion])
    assert not fusion._tokenizer.word_by_word
    assert_same(found, usual, 1e-4)


def test_a_word_that_cannot_be_spelled_names_its_utterance(llm, monkeypatch):  # noqa: F811
    strange = AcousticTokens.from_pieces([*PIECES[:-1], "▁☃"], 0)
    log_probs = torch.full((2, 6, len(PIECES)), -20.0)
    log_probs[..., 0] = 0.0
    log_probs[1, 1, 0], log_probs[1, 1, len(PIECES) - 1] = -20.0, 0.0  # then a word that closes it
    log_probs[1, 4, 0], log_probs[1, 4, 3] = -20.0, 0.0
    fusion = DelayedFusion(llm, 0.4, 0.5, FixedInterval(1))
    spell = fusion._tokenizer._spell

    def refuse(text, begins):
        if "☃" in text:
            raise ValueError(f"the language model's tokenizer must spell every word, but {text!r}")
        return spell(text, begins)

    fusion._tokenizer.check_acoustic(strange)
    monkeypatch.setattr(fusion._tokenizer, "_spell", refuse)
    lens = torch.tensor([6, 6])
    with pytest.raises(ValueError, match="utterance 'two': the language model's tokenizer must spell"):
        ctc_prefix_search(log_probs, lens, None, strange, [fusion], ids=["one", "two"])


def test_many_nodes_and_many_spellings_find_room(tokens):  # noqa: F811
    tokenizer = byte_tokenizer()
    lm = CausalLm(tiny_model(len(tokenizer), 3), Vocabulary(tokenizer, None, 0, 1), "new", self_check=False)
    log_probs, lens = emissions(batch=4, frames=60, seed=9, peak=1.0)
    fusion = DelayedFusion(lm, 0.3, 0.2, FixedInterval(2))
    ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=16), tokens, [fusion])
    stats = fusion.stats()
    assert stats["lm_tokens_scored"] > 512  # the first arrays hold 256
    assert 0 < stats["retokenize_hits"] < stats["retokenize_words"]


def test_vocabularies_of_the_same_pieces_may_say_other_words(llm):  # noqa: F811
    log_probs, lens = emissions(batch=1, frames=20, seed=3)
    found = []
    for word_start in ("▁", ""):  # without a mark every piece is a word
        own = CausalLm(llm.model, Vocabulary(byte_tokenizer(), None, 0, 1), "new", self_check=False)
        for lm in (llm, own):
            vocabulary = AcousticTokens.from_pieces(PIECES, 0, word_start)
            found.append(ctc_prefix_search(log_probs, lens, None, vocabulary, [DelayedFusion(lm, 0.3, 0.2)]))
    assert_same(found[0], found[1])
    assert_same(found[2], found[3])
    assert found[0][0][0].text != found[2][0][0].text
