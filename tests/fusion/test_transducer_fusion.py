"""Language models in the transducer search: those of the CTC search, against slow twins and themselves.
Knows: tiny random language models, a tiny random transducer. Must not know: trained models.
"""
from __future__ import annotations

import functools

import pytest
import torch

from icefall_fusion.fusion import (
    AtEnd,
    DelayedFusion,
    HotWordFusion,
    InternalLmFusion,
    LookAhead,
    NgramFusion,
    ShallowFusion,
)
from icefall_fusion.fusion.internal_lm import MOST
from icefall_fusion.fusion.rescoring import rescore_with_lm
from tests.fusion.test_fusion import (
    PIECES,
    SLOW_TRIGGERS,
    TRIGGERS,
    assert_same,
    llm,  # noqa: F401 (a fixture)
    names,
    nlm,  # noqa: F401 (a fixture)
    slow_delayed,
    slow_shallow,
    text_log_prob,
    tokens,  # noqa: F401 (a fixture)
)
from tests.ngram.test_ngram import ngram, slow_ngram, slow_score  # noqa: F401 (a fixture)
from tests.reference.fused_search import SlowFusion, fused_search
from tests.transducer_tools import (
    TinyTransducer,
    each_engine,  # noqa: F401 (a fixture of all tests here)
    encodings,
    search,
)


@pytest.fixture(scope="module")
def model() -> TinyTransducer:
    model = TinyTransducer(len(PIECES), width=16, sharpness=1.5, blank_bias=1.0)
    model.joiner.output_linear.bias.data[1:3] -= 9.0  # marks and unknown pieces are rare
    return model


def speech(seed, batch=3, frames=20):
    generator = torch.Generator().manual_seed(seed)
    lens = torch.randint(frames // 2, frames + 1, (batch,), generator=generator)
    lens[0] = frames
    return encodings(seed, batch, frames, 16), lens


def compare_with_twin(model, nbests, encoder, lens, beam, tokens, fusions):  # noqa: F811
    for nbest, one, length in zip(nbests, encoder, lens.tolist()):
        log_probs = model.rows(one)
        rows = [functools.partial(log_probs, frame) for frame in range(length)]
        expected = fused_search(rows, beam, tokens, fusions, "rnnt")
        assert [tuple(h.tokens) for h in nbest] == [prefix for prefix, _ in expected]
        for hypothesis, (_, scores) in zip(nbest, expected):
            assert hypothesis.scores == pytest.approx(scores, abs=1e-3)


# the twin knows late scores by words; where one word's tokens begin another's ("a", "aa") the tree knows more
@pytest.mark.parametrize(("trigger", "late"), [*((trigger, 0) for trigger in TRIGGERS), (TRIGGERS[4], 3)])
def test_delayed_fusion_is_its_slow_twin(llm, model, tokens, trigger, late):  # noqa: F811
    encoder, lens = speech(late)
    nbests = search(model, encoder, lens, tokens, [DelayedFusion(llm, 0.5, 0.7, trigger, late=late)], beam=4)
    slow = slow_delayed(llm, 0.5, 0.7, SLOW_TRIGGERS[type(trigger).__name__](trigger))
    slow.late = late
    compare_with_twin(model, nbests, encoder, lens, 4, tokens, [slow])


@pytest.mark.parametrize("bonus", [0.0, 0.9])
def test_shallow_fusions_are_their_slow_twins(nlm, ngram, model, tokens, bonus):  # noqa: F811
    encoder, lens = speech(4)
    fusions = [ShallowFusion(nlm, 0.5, bonus), NgramFusion(ngram, 0.3)]
    nbests = search(model, encoder, lens, tokens, fusions, beam=4)
    slow = [slow_shallow(nlm, 0.5, bonus), slow_ngram(ngram, 0.3, 0.0)]
    compare_with_twin(model, nbests, encoder, lens, 4, tokens, slow)


def slow_internal_lm(model, weight):
    @functools.cache
    def after(context):
        state = model.predict(torch.tensor([context]))
        log_probs = model.join(torch.zeros_like(state), state)[0]
        return log_probs[1:].log_softmax(0).tolist()  # without blank

    def piece_score(prefix, piece):
        return min(MOST, -after((*model.start, *prefix)[-model.context_size :])[piece - 1])

    def whole(prefix, words):
        return sum(piece_score(prefix[:i], piece) for i, piece in enumerate(prefix))

    return SlowFusion("ilm", weight, 0.0, whole, piece_score=piece_score)


@pytest.mark.parametrize("seed", range(2))
def test_the_internal_lm_beside_an_llm_is_its_slow_twin(llm, model, tokens, seed):  # noqa: F811
    encoder, lens = speech(seed)
    fusions = [InternalLmFusion(model, 0.3), DelayedFusion(llm, 0.5, 0.7, TRIGGERS[4])]
    nbests = search(model, encoder, lens, tokens, fusions, beam=4)
    slow = slow_delayed(llm, 0.5, 0.7, SLOW_TRIGGERS["ShortestHypothesis"](TRIGGERS[4]))
    compare_with_twin(model, nbests, encoder, lens, 4, tokens, [slow_internal_lm(model, 0.3), slow])


def test_the_internal_lm_keeps_no_more_scores_than_it_may(model, tokens, monkeypatch):  # noqa: F811
    encoder, lens = speech(1)
    fusion, most = InternalLmFusion(model, 0.3), 5 * len(PIECES)
    expected = search(model, encoder, lens, tokens, [fusion], beam=4)
    assert fusion._table.values.numel() > most
    monkeypatch.setattr("icefall_fusion.fusion.internal_lm.KEPT", most)
    assert_same(search(model, encoder, lens, tokens, [fusion], beam=4), expected)
    grown = 4 * len(lens)  # contexts of one frame, beside those before
    assert len(fusion._table.rows) <= 64 + grown


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("trigger", TRIGGERS[2:5], ids=names)
def test_look_ahead_is_its_slow_twin(llm, ngram, model, tokens, trigger, every):  # noqa: F811
    encoder, lens = speech(7)
    fusion = DelayedFusion(llm, 0.5, 0.7, trigger, look_ahead=LookAhead(ngram, 0.8, every))
    nbests = search(model, encoder, lens, tokens, [fusion], beam=4)
    slow = slow_delayed(llm, 0.5, 0.7, SLOW_TRIGGERS[type(trigger).__name__](trigger))
    slow.ahead_every = every
    slow.ahead = lambda prefix, piece: (
        0.5 * 0.8 * slow_score(ngram, prefix, piece) + 0.7 * (tokens.starts_word[piece] or not prefix))
    compare_with_twin(model, nbests, encoder, lens, 4, tokens, [slow])


@pytest.mark.parametrize("symbols", [1, 3])
def test_weight_zero_is_no_lm(llm, nlm, ngram, model, tokens, symbols):  # noqa: F811
    """Bit for bit by tensors. Compiled code joins other rows at once, which changes products' last bits."""
    encoder, lens = speech(2)
    several = [([DelayedFusion(llm, 0.0), NgramFusion(ngram, 0.0)], {}, 1e-4),
               ([DelayedFusion(llm, 0.0)], {"engine": "torch"}, 0.0),
               ([ShallowFusion(nlm, 0.0), InternalLmFusion(model, 0.0)], {"engine": "torch"}, 0.0)]
    for fused, options, tolerance in several:
        options = {"beam": 6, "symbols": symbols, **options}
        bare = search(model, encoder, lens, tokens, **options)
        for one, other in zip(bare, search(model, encoder, lens, tokens, fused, **options)):
            assert [(h.tokens, h.times) for h in one] == [(h.tokens, h.times) for h in other]
            assert [h.total for h in one] == pytest.approx([h.total for h in other], abs=tolerance, rel=0)
            assert [h.scores["rnnt"] for h in other] == [h.total for h in other]


@pytest.mark.parametrize("symbols", [1, 3])
def test_at_end_is_rescoring_of_the_final_beam(llm, model, tokens, symbols):  # noqa: F811
    encoder, lens = speech(3, batch=4)
    fused = search(model, encoder, lens, tokens, [DelayedFusion(llm, 0.7, 0.5, AtEnd())], beam=8,
                   symbols=symbols)
    bare = search(model, encoder, lens, tokens, beam=8, symbols=symbols)
    weights = {"rnnt": 1.0, "llm": 0.7, "words": 0.5}
    assert_same(fused, [nbest.reweight(weights) for nbest in rescore_with_lm(bare, llm)])


@pytest.mark.parametrize("symbols", [1, 3])
@pytest.mark.parametrize("trigger", TRIGGERS[:5], ids=names)
def test_a_batch_is_its_utterances_one_by_one(llm, nlm, ngram, model, tokens, trigger, symbols):  # noqa: F811
    encoder, lens = speech(5, batch=5)
    lens[3] = 0

    def decode(rows):
        ahead = LookAhead(ngram, 0.7)
        fusions = [ShallowFusion(nlm, 0.2, 0.2), InternalLmFusion(model, 0.1),
                   DelayedFusion(llm, 0.4, 0.5, trigger, look_ahead=ahead),
                   HotWordFusion([("a sea", 3.0)], 1.0)]
        return search(model, encoder[rows], lens[rows], tokens, fusions, beam=4, symbols=symbols)

    assert_same(decode(list(range(5))), [decode([row])[0] for row in range(5)], 1e-3)


@pytest.mark.parametrize("symbols", [1, 3])
def test_scores_are_those_of_the_whole_text(llm, model, tokens, symbols):  # noqa: F811
    encoder, lens = speech(6)
    fusions = [InternalLmFusion(model, 0.2), DelayedFusion(llm, 0.4, 0.5)]
    slow = slow_internal_lm(model, 0.2)
    for hypothesis in (h for n in search(model, encoder, lens, tokens, fusions, symbols=symbols) for h in n):
        assert hypothesis.scores["llm"] == pytest.approx(text_log_prob(llm, hypothesis.text), abs=1e-3)
        ilm = slow.end_score(tuple(hypothesis.tokens), hypothesis.words())
        assert hypothesis.scores["ilm"] == pytest.approx(ilm, abs=1e-3)
