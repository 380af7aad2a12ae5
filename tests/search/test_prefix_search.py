"""The prefix search against its slow twins, its invariances, its errors.
Knows: search, nbest, tokens. Must not know: large language models.
"""
from __future__ import annotations

import math
import os
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.ctc_prefix import brute_force, dictionary_search
from search_tools import (
    NEVER,
    TOKENS,
    Bigram,
    Spy,
    WordLengths,
    assert_near,
    assert_same,
    each_engine,  # noqa: F401 (a fixture of all tests here)
    emissions,
    listing,
    search,
)

from icefall_fusion.search import PrefixSearchOptions, ctc_greedy_search, ctc_prefix_search
from icefall_fusion.search.engines.base import columns_kept
from icefall_fusion.search.engines.candidates import best_pieces
from icefall_fusion.text.tokens import AcousticTokens

# -- exactness

@pytest.mark.parametrize(("frames", "pieces"), [(1, 2), (3, 2), (4, 3), (5, 3), (3, 5)])
@pytest.mark.parametrize("blank", [0, 1])
def test_nothing_pruned_equals_brute_force_over_all_alignments(frames, pieces, blank):
    log_probs = emissions(frames * 10 + pieces, 2, frames, pieces, blank=blank)
    for rows, nbest in zip(log_probs, search(log_probs, beam=400, blank_id=blank)):
        expected = sorted(brute_force(rows.tolist(), blank).items(), key=lambda entry: -entry[1])
        assert len(nbest) == len(expected)
        assert_same(listing(nbest), expected)
        assert_same(listing(nbest), dictionary_search(rows.tolist(), beam=400, blank=blank))


def test_scores_of_all_prefixes_sum_to_one():
    nbest = search(emissions(1, 1, 5, 3), beam=400)[0]
    assert sum(math.exp(h.scores["ctc"]) for h in nbest) == pytest.approx(1.0, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), frames=st.integers(0, 30), pieces=st.integers(2, 30),
       beam=st.integers(1, 12), sharpness=st.sampled_from([0.5, 2.0, 5.0]),
       bias=st.sampled_from([0.0, 2.0, 6.0]), data=st.data())
def test_pruned_search_equals_dictionary_search(seed, frames, pieces, beam, sharpness, bias, data):
    options = data.draw(st.sampled_from([{}, {"blank_skip": 0.6}, {"top_pieces": 2}]))
    lens = torch.tensor([frames, data.draw(st.integers(0, frames))])
    log_probs = emissions(seed, 2, frames, pieces, sharpness, bias)
    for rows, length, nbest in zip(log_probs, lens.tolist(), search(log_probs, lens, beam=beam, **options)):
        assert_same(listing(nbest), dictionary_search(rows[:length].tolist(), beam, **options))


@pytest.mark.parametrize("beam", [1, 4, 10, 20])
def test_large_vocabulary_and_long_utterances_equal_dictionary_search(beam):
    log_probs = emissions(beam, 2, 150, 200, sharpness=4.0, blank_bias=14.0)
    for rows, nbest in zip(log_probs, search(log_probs, beam=beam)):
        assert_same(listing(nbest), dictionary_search(rows.tolist(), beam), tolerance=1e-3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.0, 0.9))
def test_impossible_pieces_are_legal(seed, share):
    generator = torch.Generator().manual_seed(seed)
    log_probs = emissions(seed, 1, 12, 6)
    keep = torch.rand(log_probs.shape, generator=generator) >= share
    keep.scatter_(2, torch.randint(0, 6, (1, 12, 1), generator=generator), True)
    log_probs = torch.where(keep, log_probs, torch.full_like(log_probs, NEVER)).log_softmax(-1)
    for beam in (1, 3, 8):
        nbest = search(log_probs, beam=beam)[0]
        assert len(nbest) >= 1
        assert all(math.isfinite(h.scores["ctc"]) for h in nbest)
        assert_same(listing(nbest), dictionary_search(log_probs[0].tolist(), beam))


def test_a_prefix_never_stands_twice_in_a_beam_even_if_its_parent_was_reborn():
    reborn = 0
    for seed in range(40):
        log_probs = emissions(seed, 4, 40, 4, sharpness=1.5)
        spy = Spy()
        for nbest in search(log_probs, beam=4, fusions=[spy]):
            spelled = [tuple(h.tokens) for h in nbest]
            assert len(set(spelled)) == len(spelled)
        reborn += spy.reborn
    assert reborn > 0  # the case really occurs


def test_long_audio_keeps_its_precision():
    log_probs = emissions(3, 1, 3000, 5, sharpness=1.0)
    nbest = search(log_probs, beam=3)[0]
    found = dictionary_search(log_probs[0].tolist(), 3)
    assert nbest[0].scores["ctc"] == pytest.approx(found[0][1], rel=1e-6)


def test_candidates_equal_topk():
    values = emissions(0, 3, 7, 501)
    for count in (1, 5, 11, 40, 300, 501):
        found, ids = best_pieces(values, count)
        assert torch.equal(found, values.topk(count, dim=-1).values)
        assert torch.equal(values.gather(-1, ids), found)


def test_agrees_with_flashlight_where_the_choice_is_easy():
    """It keeps two slots a prefix (ends in blank or not) and tells the better one's mass: at least half."""
    module = pytest.importorskip("flashlight.lib.text.decoder")
    options = module.LexiconFreeDecoderOptions(
        beam_size=200, beam_size_token=20, beam_threshold=100, lm_weight=0.0, sil_score=0.0, log_add=True,
        criterion_type=module.CriterionType.CTC)
    decoder = module.LexiconFreeDecoder(options, module.ZeroLM(), -1, 0, [])
    same = 0
    for seed in range(6):
        log_probs = emissions(seed, 4, 60, 20, sharpness=5.0, blank_bias=14.0)
        for rows, nbest in zip(log_probs, search(log_probs, beam=100)):
            best = decoder.decode(rows.contiguous().data_ptr(), *rows.shape)[0]
            path = [piece for piece in best.tokens if piece >= 0]
            theirs = [v for i, v in enumerate(path) if v != 0 and (i == 0 or path[i - 1] != v)]
            exact = float(exact_log_prob(rows, theirs))
            assert exact - math.log(2) - 0.05 < best.score < exact + 1e-3  # 0.05: what it pruned
            (ours,) = (h.scores["ctc"] for h in nbest if h.tokens == theirs)
            assert best.score - 1e-3 < ours < best.score + math.log(2)
            our_exact = float(exact_log_prob(rows, nbest[0].tokens))
            assert our_exact - 0.2 < nbest[0].scores["ctc"] < our_exact + 1e-3
            assert our_exact > exact - 1e-3  # where we differ, ours is the more probable
            same += nbest[0].tokens == theirs
    assert same >= 22  # of 24


# -- invariances

@pytest.mark.parametrize("options", [{}, {"blank_skip": 0.7}, {"recover_mass": True}, {"score_beam": 4.0}])
def test_result_depends_neither_on_batch_nor_on_padding(options):
    lens = torch.tensor([70, 33, 0, 1, 52])
    log_probs = emissions(7, 5, 70, 30, sharpness=3.0, blank_bias=5.0)
    whole = search(log_probs, lens, beam=6, tokens=None, **options)
    for junk in (0.0, NEVER, math.nan, math.inf, -3.0):
        padded = torch.cat([log_probs, log_probs[:, :20]], dim=1)
        for row, length in zip(padded, lens.tolist()):
            row[length:] = junk
        again = search(padded, lens, beam=6, **options)
        assert [n.hypotheses for n in again] == [n.hypotheses for n in whole]
    for b, length in enumerate(lens.tolist()):
        alone = search(log_probs[b : b + 1, :length], lens[b : b + 1], beam=6, **options)[0]
        assert alone.hypotheses == whole[b].hypotheses


def test_fused_search_depends_neither_on_batch_nor_on_padding():
    lens = torch.tensor([40, 17, 1])
    log_probs = emissions(8, 3, 40, 6)
    fusions = lambda: [Bigram(0.7, word_bonus=0.3), WordLengths(0.2, every=3)]  # noqa: E731
    whole = search(log_probs, lens, TOKENS, fusions(), beam=5)
    for b, length in enumerate(lens.tolist()):
        alone = search(log_probs[b : b + 1, :length], lens[b : b + 1], TOKENS, fusions(), beam=5)[0]
        assert alone.hypotheses == whole[b].hypotheses


def test_float64_and_half_precision_are_accepted():
    log_probs = emissions(9, 2, 20, 6)
    assert search(log_probs.double()) == search(log_probs)
    assert search(log_probs.bfloat16())[0][0].tokens == search(log_probs.bfloat16().float())[0][0].tokens


def test_score_beam_only_drops_hypotheses():
    log_probs = emissions(10, 3, 30, 8, sharpness=3.0)
    for wide, narrow in zip(search(log_probs, beam=8), search(log_probs, beam=8, score_beam=3.0)):
        assert narrow[0].tokens == wide[0].tokens
        assert all(h.total > narrow[0].total - 3.5 for h in narrow)
        assert len(narrow) <= len(wide)


def test_blank_skip_lets_a_piece_repeat():
    probs = torch.tensor([[0.05, 0.95], [0.99, 0.01], [0.05, 0.95]]).log().unsqueeze(0)
    assert search(probs, blank_skip=0.9)[0][0].tokens == [1, 1]
    tokens = AcousticTokens.from_pieces(["<blk>", "▁x"], 0)
    times = search(probs, tokens=tokens, blank_skip=0.9)[0][0].times
    assert [round(t.start / 0.04) for t in times] == [0, 2]
    assert len(search(probs[:, 1:2], blank_skip=0.9)[0]) == 1  # nothing left: the empty hypothesis


# -- recovered mass

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), frames=st.integers(0, 25), pieces=st.integers(2, 20),
       beam=st.integers(1, 8), skip=st.sampled_from([None, 0.6]))
def test_recovered_mass_equals_dictionary_search(seed, frames, pieces, beam, skip):
    log_probs = emissions(seed, 1, frames, pieces, sharpness=1.5, blank_bias=2.0)
    columns = columns_kept(beam, pieces - 1)
    expected = dictionary_search(log_probs[0].tolist(), beam, children_of=columns, blank_skip=skip)
    found = search(log_probs, beam=beam, recover_mass=True, blank_skip=skip)[0]
    assert_same(listing(found), expected, 2e-4)


def exact_log_prob(log_probs, tokens):
    lengths = torch.tensor([log_probs.shape[0]]), torch.tensor([len(tokens)])
    targets = torch.tensor([tokens])
    return -torch.nn.functional.ctc_loss(log_probs.unsqueeze(1), targets, *lengths, reduction="sum")


def test_recovered_mass_is_nearer_to_the_exact_probability_and_never_above():
    gaps = {False: 0.0, True: 0.0}
    log_probs = emissions(11, 8, 60, 30, sharpness=2.0, blank_bias=3.0)
    for recover in gaps:
        for rows, nbest in zip(log_probs, search(log_probs, beam=4, recover_mass=recover)):
            gap = float(exact_log_prob(rows, nbest[0].tokens)) - nbest[0].scores["ctc"]
            assert gap > -1e-3
            gaps[recover] += gap
    assert gaps[True] < 0.7 * gaps[False]


# -- small utterances, names, options, errors

def test_empty_and_one_frame_utterances():
    log_probs = emissions(12, 2, 1, 6)
    nbests = search(log_probs, torch.tensor([0, 1]), TOKENS, ids=["none", "one"])
    assert nbests[0].utterance == "none"
    assert nbests[0][0].tokens == [] and nbests[0][0].text == "" and nbests[0][0].scores["ctc"] == 0.0
    assert len(nbests[0]) == 1
    assert_same(listing(nbests[1]), dictionary_search(log_probs[1].tolist(), 10))
    assert search(torch.zeros(0, 0, 5), torch.zeros(0, dtype=torch.int64)) == []
    assert len(search(torch.zeros(1, 0, 5))[0]) == 1


def test_text_words_and_weights():
    best = torch.tensor([0, 1, 2, 0, 3, 3, 0, 4])
    log_probs = torch.full((1, 8, 6), -9.0).scatter_(2, best.view(1, 8, 1), 0.0).log_softmax(-1)
    hypothesis = search(log_probs, tokens=TOKENS, nbest=3)[0][0]
    assert hypothesis.text == "ab cd" and hypothesis.scores["words"] == 2
    assert [(t.word, t.start, t.end) for t in hypothesis.times] == [("ab", 0.04, 0.12), ("cd", 0.16, 0.32)]
    greedy = ctc_greedy_search(log_probs, torch.tensor([8]), TOKENS)[0]
    assert greedy[0].text == "ab cd"
    assert [(t.word, t.start, t.end) for t in greedy[0].times] == [("ab", 0.04, 0.12), ("cd", 0.16, 0.32)]
    assert greedy[0].scores["ctc"] == pytest.approx(float(log_probs.amax(-1).sum()), abs=1e-4)
    assert len(search(log_probs, tokens=TOKENS, nbest=3)[0]) == 3


def test_word_times_find_the_peak_not_the_birth():
    probs = torch.full((1, 6, 3), 1e-4)
    probs[0, :, 1] = torch.tensor([0.02, 0.05, 0.9, 0.1, 1e-4, 1e-4])
    probs[0, :, 0] = 1 - probs[0, :, 1:].sum(-1)
    tokens = AcousticTokens.from_pieces(["<blk>", "▁x", "▁y"], 0)
    times = search(probs.log(), tokens=tokens)[0][0].times
    assert [(t.word, t.start, t.end) for t in times] == [("x", 0.08, 0.12)]


@pytest.mark.parametrize(("field", "value"), [
    ("beam", 0), ("beam", 2.5), ("top_pieces", 0), ("top_pieces", 2.5), ("nbest", 1.5), ("score_beam", 0.0),
    ("blank_skip", 1.5), ("blank_skip", 0.2), ("nbest", 0), ("frame_shift", 0.0)])
def test_bad_options_are_named(field, value):
    with pytest.raises(ValueError, match=rf"PrefixSearchOptions\.{field} must .* {value}"):
        PrefixSearchOptions(**{field: value})


def test_bad_log_probs_name_the_utterance():
    log_probs = emissions(13, 3, 10, 5)
    for value, what in ((math.nan, "NaN"), (math.inf, "inf")):
        bad = log_probs.clone()
        bad[1, 4, 2] = value
        for function in (ctc_prefix_search, ctc_greedy_search):
            with pytest.raises(ValueError, match=rf"utterance second.*{what}.*frame 4"):
                function(bad, torch.tensor([10, 10, 10]), ids=["first", "second", "third"])
    bad = log_probs.clone()
    bad[2, 9] = NEVER
    with pytest.raises(ValueError, match="utterance 2 .*possible piece.*frame 9"):
        search(bad)
    search(bad, torch.tensor([10, 10, 9]))  # padding is nobody's business


@pytest.mark.parametrize("function", [ctc_prefix_search, ctc_greedy_search])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_logits_are_refused_but_not_log_probs_of_any_precision(function, dtype):
    logits = 30 * torch.randn(2, 40, 50, generator=torch.Generator().manual_seed(15))
    lens = torch.tensor([40, 30])
    coarse = logits.to(dtype)
    function(coarse.log_softmax(-1), lens)
    function(coarse - coarse.logsumexp(-1, keepdim=True), lens)
    one = logits.log_softmax(-1)
    one[1, 30:] = 65.0  # padding
    function(one.to(dtype), lens)
    one[1, 7, 3] = 1.5
    with pytest.raises(ValueError, match=r"utterance 1 must be normalized.*log_softmax.* '1\.5 in frame 7'"):
        function(one.to(dtype), lens)
    with pytest.raises(ValueError, match="utterance 0 must be normalized"):
        function(coarse, lens)


def test_bad_arguments_are_named():
    log_probs = emissions(14, 2, 10, 5)
    for function in (ctc_prefix_search, ctc_greedy_search):
        with pytest.raises(ValueError, match=r"lens must be a tensor of integers \[B\], but is 'list'"):
            function(log_probs, [10, 10])
    with pytest.raises(ValueError, match=r"tokens.size must equal the 5 pieces .* 6"):
        search(log_probs, tokens=TOKENS)
    with pytest.raises(ValueError, match="blank_id must be in 0..4"):
        search(log_probs, blank_id=5)
    with pytest.raises(ValueError, match="blank_id must be the blank of tokens"):
        search(emissions(14, 2, 10, 6), tokens=TOKENS, blank_id=2)
    with pytest.raises(ValueError, match=r"lens of utterance 1 must be in 0..10"):
        search(log_probs, torch.tensor([10, 11]))
    with pytest.raises(ValueError, match="log_probs must have 3 dimensions"):
        search(log_probs[0], torch.tensor([10]))
    with pytest.raises(ValueError, match="ids must name 2"):
        search(log_probs, ids=["a"])
    with pytest.raises(ValueError, match="weight must be finite and at least 0"):
        search(log_probs, fusions=[Bigram(-0.5)])
    with pytest.raises(ValueError, match="sources that differ"):
        search(log_probs, fusions=[Bigram(0.5), Bigram(0.5)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"recover_mass": True}, {"blank_skip": 0.9}])
def test_gpu_equals_cpu(options):
    log_probs = emissions(21, 8, 120, 300, sharpness=4.0, blank_bias=14.0)
    lens = torch.tensor([120, 7, 0, 60, 119, 120, 1, 90])
    for here, there in zip(search(log_probs, lens, **options), search(log_probs.cuda(), lens, **options)):
        assert_near(listing(there), listing(here))


def test_autocast_around_the_search_changes_nothing():
    log_probs = emissions(22, 2, 30, 12)
    for options in ({}, {"recover_mass": True}):
        plain = search(log_probs, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert search(log_probs, **options) == plain


def test_random_order_of_utterances_changes_nothing():
    order = list(range(6))
    random.Random(0).shuffle(order)
    log_probs = emissions(20, 6, 40, 12)
    plain = search(log_probs)
    shuffled = search(log_probs[order])
    assert [shuffled[order.index(b)].hypotheses for b in range(6)] == [n.hypotheses for n in plain]


_FORK = """
import faulthandler, os, sys
import torch
from search_tools import TOKENS, emissions
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search

torch.set_num_threads(2)
log_probs = emissions(1, 24, 400, 6)
def search():
    options = PrefixSearchOptions(engine=sys.argv[1])
    return ctc_prefix_search(log_probs, torch.full((24,), 400), options, TOKENS)
before = search()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if search() == before else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_searches_with_one_thread(each_engine):  # noqa: F811
    """With more threads any large operation of PyTorch would wait for ever: its threads do not come along."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", _FORK, each_engine], env=environment, check=True)
