"""Language models in the prefix search: shallow and delayed, against slow twins, with small real models.
Knows: search, tokens. Must not know: large language models.
"""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.ctc_prefix import brute_force, dictionary_search
from search_tools import (
    TOKENS,
    Bigram,
    Spy,
    WordLengths,
    assert_same,
    bigram_score,
    bigram_table,
    each_engine,  # noqa: F401 (a fixture of all tests here)
    emissions,
    listing,
    search,
)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), beam=st.integers(1, 9), weight=st.sampled_from([0.1, 0.6, 2.0]),
       bonus=st.sampled_from([0.0, 1.5, -0.5]))
def test_shallow_fusion_equals_dictionary_search(seed, beam, weight, bonus):
    log_probs = emissions(seed, 2, 25, 6, blank_bias=2.0)
    table = bigram_table()

    def gain(prefix, piece):
        starts = TOKENS.starts_word[piece] or not prefix
        return weight * float(table[prefix[-1] if prefix else 0, piece]) + bonus * starts

    nbests = search(log_probs, tokens=TOKENS, fusions=[Bigram(weight, bonus)], beam=beam)
    for rows, nbest in zip(log_probs, nbests):
        expected = dictionary_search(rows.tolist(), beam, extension_score=gain)
        assert_same(listing(nbest), expected)
        for hypothesis, (_, mass, fused) in zip(nbest, expected):
            assert hypothesis.scores["bigram"] == pytest.approx(bigram_score(hypothesis.tokens), abs=1e-4)
            assert hypothesis.total == pytest.approx(mass + fused, abs=1e-3)
        assert nbest.weights == {"ctc": 1.0, "bigram": weight, "words": bonus}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), beam=st.integers(1, 6))
def test_shallow_fusion_with_recovered_mass_equals_dictionary_search(seed, beam):
    log_probs = emissions(seed, 1, 20, 6, blank_bias=2.0)
    table = bigram_table()
    expected = dictionary_search(
        log_probs[0].tolist(), beam, children_of=5,
        extension_score=lambda prefix, piece: 0.7 * float(table[prefix[-1] if prefix else 0, piece]))
    nbest = search(log_probs, tokens=TOKENS, fusions=[Bigram(0.7)], beam=beam, recover_mass=True)[0]
    assert_same(listing(nbest), expected, 2e-4)


def test_unpruned_shallow_fusion_equals_a_sum_over_all_alignments():
    log_probs = emissions(15, 1, 4, 6)
    nbest = search(log_probs, tokens=TOKENS, fusions=[Bigram(0.8, eos=True)], beam=1500)[0]
    masses = brute_force(log_probs[0].tolist())
    assert len(nbest) == len(masses)
    for hypothesis in nbest:
        lm = bigram_score(hypothesis.tokens, eos=True)
        assert hypothesis.total == pytest.approx(masses[tuple(hypothesis.tokens)] + 0.8 * lm, abs=1e-4)
    assert [h.total for h in nbest] == sorted((h.total for h in nbest), reverse=True)


@pytest.mark.parametrize("fusions", [
    lambda: [Bigram(0.0)], lambda: [WordLengths(0.0)], lambda: [WordLengths(0.0), Bigram(0.0)]])
@pytest.mark.parametrize("options", [{}, {"blank_skip": 0.7}, {"recover_mass": True}])
def test_weight_zero_is_no_fusion_bit_for_bit(fusions, options):
    log_probs = emissions(16, 4, 150, 6, blank_bias=3.0)
    if any(isinstance(fusion, Bigram) for fusion in fusions()):  # shallow fusion is for tensors
        options = {**options, "engine": "torch"}
    plain = search(log_probs, tokens=TOKENS, beam=7, **options)
    fused = search(log_probs, tokens=TOKENS, fusions=fusions(), beam=7, **options)
    for without, with_zero in zip(plain, fused):
        assert listing(without) == listing(with_zero)
        assert [h.total for h in without] == [h.total for h in with_zero]
        assert [h.times for h in without] == [h.times for h in with_zero]


@pytest.mark.parametrize("every", [0, 1, 4])
def test_delayed_scores_are_those_of_the_whole_text(every):
    log_probs = emissions(17, 3, 60, 6, blank_bias=2.0)
    plain = search(log_probs, tokens=TOKENS, beam=6)
    nbests = search(log_probs, tokens=TOKENS, fusions=[WordLengths(0.3, 0.8, every)], beam=6)
    for without, nbest in zip(plain, nbests):
        for h in nbest:
            score = -sum(len(word) ** 2 for word in h.words())
            assert h.scores["lengths"] == score and h.scores["words"] == len(h.words())
            assert h.total == pytest.approx(h.scores["ctc"] + 0.3 * score + 0.8 * len(h.words()), abs=1e-4)
        if every == 0:  # never before the end: rescoring of the final beam
            assert sorted(listing(nbest)) == sorted(listing(without))


def test_shallow_and_delayed_fusion_compose():
    log_probs = emissions(18, 2, 50, 6, blank_bias=2.0)
    nbests = search(log_probs, tokens=TOKENS, fusions=[Bigram(0.4, 0.2), WordLengths(0.1, 0.5, 5)], beam=8)
    for nbest in nbests:
        for h in nbest:
            assert h.scores["bigram"] == pytest.approx(bigram_score(h.tokens), abs=1e-3)
            assert h.scores["lengths"] == -sum(len(word) ** 2 for word in h.words())
        assert nbest.reweight(nbest.weights).hypotheses == nbest.hypotheses


def test_shallow_fusion_is_only_asked_when_an_extension_can_survive():
    log_probs = torch.full((1, 40, 6), -30.0)
    log_probs[..., 0] = 0.0
    log_probs[0, 5, 1:4] = -0.7
    fusion = Bigram(0.5)
    search(log_probs.log_softmax(-1), tokens=TOKENS, fusions=[fusion], beam=2)
    assert fusion.calls < 10


def test_a_word_bonus_needs_a_vocabulary():
    with pytest.raises(ValueError, match="word_bonus must be 0 when the search has no tokens"):
        search(emissions(0, 1, 3, 6), fusions=[Bigram(0.5, 1.0)])


def test_arena_boundaries_close_words():
    class Watch(Spy):
        def fuse(self, beam, frame, active):
            for b in range(beam.node.shape[0]):
                for k in range(beam.node.shape[1]):
                    if not beam.alive[b, k]:
                        continue
                    pieces = beam.arena.pieces(int(beam.node[b, k]))
                    closed = int(beam.boundary[b, k])
                    starts = [i for i, v in enumerate(pieces) if TOKENS.starts_word[v]]
                    assert beam.arena.pieces(closed) == pieces[: starts[-1] if starts else 0]
                    opened = beam.arena.pieces_between(int(beam.node[b, k]), closed)
                    assert beam.arena.pieces(closed) + opened == pieces
                    assert int(beam.node[b, k]) % beam.arena.row_size // beam.arena.beam == b

    search(emissions(19, 2, 30, 6), tokens=TOKENS, fusions=[Watch()], beam=5)
