"""Phrases in the GPU kernel: the same as by tensors and by the slow twin. An interpreter runs it on a CPU.
Knows: search, phrases, tiny language models. Must not know: trained models.

The kernel has never run on a GPU.
"""
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.fusion import DelayedFusion, FixedInterval, HotWordFusion, LookAhead, NgramFusion
from icefall_fusion.fusion import ShortestHypothesis as Shortest
from icefall_fusion.fusion.word_ngram import VocabularyFusion, word_automaton
from icefall_fusion.ngram.phrases import PhraseAutomaton, PhraseTensors
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search, engines
from icefall_fusion.search.engines import gpu_ngram, gpu_phrases
from tests.fusion.test_fusion import compare_with_twin, emissions, llm, tokens  # noqa: F401 (fixtures)
from tests.fusion.test_hotwords import (
    LETTERS,
    PIECES,
    TOKENS,
    Counted,
    letter_lists,
    log_probs_of,
    phrase_lists,
)
from tests.ngram.test_ngram import ngram  # noqa: F401 (a fixture)
from tests.search_tools import assert_near

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOT = [("the sea", 3.0), ("a", 0.5), ("sea", 1.5), ("bing", 2.0)]


def decode(engine, emitted, fusions, vocabulary=TOKENS, beam=4, ids=None, **options):
    log_probs, lens = (x.to(DEVICE) for x in emitted)
    chosen = PrefixSearchOptions(beam=beam, engine=engine, **options)
    return ctc_prefix_search(log_probs, lens, chosen, vocabulary, fusions, ids)


def same(kernel, tensors):
    for one, other in zip(kernel, tensors):
        most = max(1, min(len(one), len(other)) - 1)  # the last may tie with one that is not there
        assert [h.tokens for h in one][:most] == [h.tokens for h in other][:most]
        for a, b in zip(one[:most], other[:most]):
            assert a.scores == pytest.approx(b.scores, abs=1e-4)
            assert a.total == pytest.approx(b.total, abs=1e-4)


@pytest.mark.parametrize(
    ("beam", "weight", "options"),
    [(5, 0.7, {}), (9, 40.0, {"blank_skip": 0.7}), (4, 1.0, {"score_beam": 3.0})],
)
def test_each_utterance_has_its_own_phrases_as_by_tensors(beam, weight, options):
    log_probs, _ = log_probs_of(beam, 4, 10, len(PIECES))
    lens, shared = torch.tensor([10, 7, 9, 0]), [("a c", 2.5), ("ab", 7.0)]
    phrases = {"one": ["ab", ("cdd", -3.0), "c d"], "two": shared, "three": [], "four": shared}
    both = [decode(engine, (log_probs, lens), [HotWordFusion(phrases, weight, word_bonus=0.3)], beam=beam,
                   ids=list(phrases), **options) for engine in ("triton", "torch")]
    same(*both)
    assert any(h.scores["hotwords"] > 0 for h in both[0][0])


@pytest.mark.parametrize("seed", [1, 2])
def test_it_finds_what_the_slow_twin_finds(seed):
    phrases = [((1,), 1.25), ((1, 2), 3.0), ((1, 2, 3), 7.25), ((3, 1, 2), 0.5), ((3, 2, 2, 4), -2.0)]
    emitted = log_probs_of(seed, 1, 14, len(PIECES))
    nbests = decode("triton", emitted, [HotWordFusion(PhraseAutomaton(len(PIECES), phrases), 0.8)], beam=5)
    slow = Counted(phrases, TOKENS)
    compare_with_twin(nbests, *emitted, 5, TOKENS, [slow.fusion(0.8)])
    for hypothesis in nbests[0]:  # what was given back leaves nothing behind
        assert hypothesis.scores["hotwords"] == slow.complete(tuple(hypothesis.tokens))


def _beside(lm, grams, name):
    return {
        "ngram": [NgramFusion(grams, 0.3, 0.2)],
        "ngram, llm": [NgramFusion(grams, 0.3, 0.2), DelayedFusion(lm, 0.4, 0.5, Shortest())],
        "llm": [DelayedFusion(lm, 0.4, 0.5, FixedInterval(3))],
        "late": [DelayedFusion(lm, 0.4, 0.5, Shortest(), late=2)],
        "ahead": [DelayedFusion(lm, 0.4, 0.5, Shortest(), look_ahead=LookAhead(grams, 0.6, 2))],
        "idle ngram": [NgramFusion(grams, 0.0)],
    }[name]


@pytest.mark.parametrize("weight", [0.8, 0.0])
@pytest.mark.parametrize("name", ["ngram", "ngram, llm", "llm", "late", "ahead", "idle ngram"])
def test_phrases_stand_beside_others_as_by_tensors(llm, ngram, tokens, name, weight):  # noqa: F811
    log_probs, lens = emissions(batch=2, frames=9, seed=3, peak=2.0)
    same(*(
        decode(engine, (log_probs, lens), [HotWordFusion(HOT, weight), *_beside(llm, ngram, name)], tokens)
        for engine in ("triton", "torch")
    ))


def test_weight_zero_and_no_phrases_change_nothing_bit_for_bit():
    emitted = log_probs_of(7, 2, 14, len(PIECES))
    bare = decode("triton", emitted, [])
    for fusion in (HotWordFusion(["a c", "cd"], 0.0), HotWordFusion([], 0.0)):
        for one, other in zip(bare, decode("triton", emitted, [fusion])):
            assert [(h.tokens, h.scores["ctc"], h.total) for h in one] == [
                (h.tokens, h.scores["ctc"], h.total) for h in other]


def test_words_outside_a_list_cost_the_same(tokens):  # noqa: F811
    log_probs, lens = emissions(batch=1, frames=9, seed=6, peak=2.0)
    for oov in (-3.0, -torch.inf):
        fusions = [VocabularyFusion(["the", "sea", "bing"], tokens, oov)]
        same(*(decode(engine, (log_probs, lens), fusions, tokens) for engine in ("triton", "torch")))


def _check_edges(one):
    """Hold the edges and the tables of a list to the automaton's own steps, for all nodes and pieces."""
    device = torch.device("cpu")
    tensors = PhraseTensors([one], device)
    nodes, pieces = torch.meshgrid(torch.arange(1, len(one)), torch.arange(one.size), indexing="ij")
    wanted = tensors.next(nodes, pieces).numpy()
    table = np.tile(one.from_root, (len(one), 1))
    node, piece, child = gpu_phrases.all_edges(one)
    table[node, piece] = child
    assert (table[1:] == wanted).all()
    base = one.size + 2
    made = gpu_phrases.phrases_of([one], base, device)
    cells = {int(key): cell for cell, key in enumerate(made.key.tolist()) if key >= 0}
    assert sorted(cells) == sorted((node * base + piece).tolist())
    for key, cell in cells.items():
        buckets = gpu_ngram.buckets_of(torch.tensor(key), int(made.mask))
        assert cell // gpu_ngram.BUCKET in [int(bucket) for bucket in buckets]
        assert int(made.child[cell]) == table[key // base, key % base]
        assert float(made.held[cell]) == one.pending[int(made.child[cell])]
    assert made.root_child.tolist() == one.from_root.tolist()


@settings(max_examples=40, deadline=None)
@given(phrases=phrase_lists, letters=letter_lists)
def test_all_steps_of_an_automaton_are_in_its_table(phrases, letters):
    _check_edges(PhraseAutomaton(len(PIECES), phrases))
    _check_edges(PhraseAutomaton(LETTERS.size, letters, head=1))


def test_all_steps_of_a_vocabulary_are_in_its_table(tokens):  # noqa: F811
    _check_edges(word_automaton(["the", "sea", "seas", "bing"], tokens, -2.0))


def test_thousands_of_phrases_are_one_table_made_once(monkeypatch):
    rng = np.random.default_rng(0)
    entries = {(1, *rng.integers(1, 5, rng.integers(1, 9)).tolist()): 2.0 for _ in range(3000)}
    automaton = PhraseAutomaton(len(PIECES), list(entries.items()))
    emitted = log_probs_of(1, 1, 10, len(PIECES))
    same(*(decode(engine, emitted, [HotWordFusion(automaton)]) for engine in ("triton", "torch")))
    monkeypatch.setattr(gpu_phrases, "_make_list", None)
    decode("triton", emitted, [HotWordFusion(automaton)])


def test_what_it_does_not_serve_is_refused_or_left_to_tensors(monkeypatch, caplog):
    emitted = log_probs_of(2, 1, 6, len(PIECES))
    two = [HotWordFusion(["ab"]), HotWordFusion(["cd"], source="others")]
    with pytest.raises(ValueError, match=r"that of one n-gram .* one list of phrases \(hotwords, others\)"):
        decode("triton", emitted, two)
    monkeypatch.setattr(gpu_phrases, "MOST_EDGES", 1)
    with pytest.raises(ValueError, match="a list of phrases has more than 1 edges for it"):
        decode("triton", emitted, [HotWordFusion(["abd c"])])
    monkeypatch.setattr(engines, "ENGINES", {**engines.ENGINES, "native": engines.ENGINES["triton"]})
    engines.tell.cache_clear()
    found = ctc_prefix_search(*emitted, PrefixSearchOptions(beam=4), TOKENS, two)
    same(found, decode("torch", emitted, two))
    assert "tensors, several times slower: it has no shallow fusion" in caplog.text
    with pytest.raises(Unavailable, match="at most 1024 pieces"):
        gpu_phrases.phrases_of([PhraseAutomaton(1100, [])], 1102, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device; has never run on one")
@pytest.mark.parametrize("name", ["llm", "ahead", "ngram, llm"])
def test_a_gpu_agrees_with_tensors_and_a_cpu(llm, ngram, tokens, name):  # noqa: F811
    emitted = emissions(batch=8, frames=120, seed=5, peak=2.0)
    fusions = [HotWordFusion(HOT, 0.8), *_beside(llm, ngram, name)]
    nbests = [decode(engine, emitted, fusions, tokens, 10) for engine in ("triton", "torch")]
    nbests.append(ctc_prefix_search(*emitted, PrefixSearchOptions(beam=10), tokens, fusions))
    for kernel, *others in zip(*nbests):
        for other in others:
            assert_near(*([(tuple(h.tokens), h.total) for h in nbest] for nbest in (kernel, other)), 1e-2)
