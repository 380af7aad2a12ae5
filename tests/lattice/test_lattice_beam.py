"""Beam search along lattices: against all paths, against the prefix search, with fusions that watch words.
Knows: search, plain lattices. Must not know: k2, large language models.
"""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lattice_tools import TOKENS, assert_same_pieces, ctc_lattices, log_probs
from reference.lattice_paths import collapse, words_of_paths
from search_tools import Bigram, WordLengths

from icefall_fusion.lattice.beam import LatticeBeamOptions, lattice_beam_search
from icefall_fusion.lattice.ctc_forward import ctc_scores
from icefall_fusion.lattice.graph import WordTokens
from icefall_fusion.lattice.lattices import join
from icefall_fusion.lattice.nbest_lists import best_paths
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search

pytestmark = pytest.mark.k2  # it needs none, but has to work with its old torch too
ALL = LatticeBeamOptions(beam=400)


def lattices(seed, lens, hlg=True):
    lens = torch.tensor(lens)
    found = ctc_lattices(log_probs(seed, len(lens), int(lens.max())), lens)
    if hlg:
        generator = torch.Generator().manual_seed(seed)
        found.hlg.copy_(-torch.rand(TOKENS.size, generator=generator)[found.output] * (found.output > 0))
    return found


@pytest.mark.parametrize("merge", ["sum", "max"])
def test_a_beam_that_holds_all_finds_the_words_of_all_paths(merge) -> None:
    found = lattices(1, [3, 2, 0])
    options = LatticeBeamOptions(beam=400, merge=merge)
    nbests = lattice_beam_search(found, 0.7, TOKENS, options)
    for row, nbest in enumerate(nbests):
        expected = words_of_paths(found, row, 0.7, merge)
        assert {tuple(h.tokens) for h in nbest} == set(expected)
        for h in nbest:
            total, hlg = expected[tuple(h.tokens)]
            assert h.total == pytest.approx(total, abs=1e-4)
            assert h.scores["hlg"] == pytest.approx(hlg, abs=1e-4)
            assert h.total == pytest.approx(h.scores["ctc"] + 0.7 * h.scores["hlg"], abs=1e-5)
        assert [h.total for h in nbest] == sorted((h.total for h in nbest), reverse=True)


def test_along_the_whole_ctc_lattice_it_is_the_prefix_search() -> None:
    emissions, lens = log_probs(3, 2, 4), torch.tensor([4, 3])
    nbests = lattice_beam_search(ctc_lattices(emissions, lens), 0.0, TOKENS, ALL)
    expected = ctc_prefix_search(emissions, lens, PrefixSearchOptions(beam=400), TOKENS)
    assert_same_pieces(nbests, expected, 1e-4)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 9))
def test_an_utterance_is_the_same_in_any_batch(seed, lens, beam) -> None:
    if not max(lens):
        lens = [*lens, 2]
    found = lattices(seed, lens)
    options = LatticeBeamOptions(beam=beam)
    fusion = WordLengths(0.3, 0.1)
    together = lattice_beam_search(found, 0.5, TOKENS, options, [fusion])
    for row, nbest in enumerate(together):
        alone = lattice_beam_search(found.select([row]), 0.5, TOKENS, options, [WordLengths(0.3, 0.1)])[0]
        assert [h.text for h in alone] == [h.text for h in nbest]
        assert [h.total for h in alone] == pytest.approx([h.total for h in nbest], abs=1e-5)


@pytest.mark.parametrize("every", [0, 1, 2])
def test_a_fusion_scores_the_words_of_each_hypothesis_whatever_its_trigger(every) -> None:
    found = lattices(5, [4, 3])
    nbests = lattice_beam_search(found, 0.5, TOKENS, ALL, [WordLengths(0.4, 0.2, every)])
    for row, nbest in enumerate(nbests):
        plain = words_of_paths(found, row, 0.5)
        assert len(nbest) == len(plain)
        for h in nbest:
            raw = -sum(len(word) ** 2 for word in h.words())
            assert h.scores["lengths"] == raw
            total = plain[tuple(h.tokens)][0] + 0.4 * raw + 0.2 * len(h.words())
            assert h.total == pytest.approx(total, abs=1e-4)


def test_weight_0_changes_nothing() -> None:
    found = lattices(6, [4, 4])
    for beam in (2, 5):
        options = LatticeBeamOptions(beam=beam)
        plain = lattice_beam_search(found, 0.5, TOKENS, options)
        watched = lattice_beam_search(found, 0.5, TOKENS, options, [WordLengths(0.0)])
        for one, other in zip(plain, watched):
            assert [(h.text, h.scores["ctc"]) for h in one] == [(h.text, h.scores["ctc"]) for h in other]


def test_words_that_one_arc_says_together_are_the_words_that_two_arcs_say() -> None:
    found = lattices(7, [3], hlg=False)
    labels = WordTokens(["x", "y"], [(), (1,), (2,), (1, 2), (2, 1)])
    nbest = lattice_beam_search(found, 0.0, labels, ALL)[0]
    texts = [h.text for h in nbest]
    assert len(set(texts)) == len(texts)  # "x y" comes from 1 2 and from 3
    expected: dict[str, float] = {}
    for outputs, (total, _) in words_of_paths(found, 0, 0.0).items():
        text = " ".join(labels.words(outputs))
        expected[text] = log_add(expected.get(text, -math.inf), total)
    assert {h.text: h.total for h in nbest} == pytest.approx(expected, abs=1e-4)


def test_viterbi_is_the_best_of_all_paths() -> None:
    found = lattices(8, [4, 0, 3])
    score = found.score({"ctc": 1.0, "hlg": 0.8})
    paths = best_paths(found, score)
    assert len(paths[1]) == 0
    for row in (0, 2):
        total = float(score[paths[row]].sum())
        best = max(score for score, _ in words_of_paths(found, row, 0.8, "max").values())
        assert total == pytest.approx(best, abs=1e-5)


def test_word_times_are_of_the_frames_of_the_best_path() -> None:
    emissions = torch.full((1, 5, TOKENS.size), -50.0)
    for frame, piece in enumerate([1, 0, 2, 3, 3]):
        emissions[0, frame, piece] = 0.0
    found = ctc_lattices(emissions, torch.tensor([5]))
    best = lattice_beam_search(found, 0.0, TOKENS, ALL, tokens=TOKENS, frame_shift=0.04)[0][0]
    assert [(t.word, t.start, t.end) for t in best.times] == [("ab", 0.0, 0.12), ("c", 0.12, 0.16)]


def test_lattices_join_and_part_again() -> None:
    one, two = lattices(9, [3, 2]), lattices(10, [1, 4])
    both = join([one, two])
    for rows, part in (([0, 1], one), ([2, 3], two)):
        chosen = both.select(rows)
        assert all(torch.equal(getattr(chosen, name), values) for name, values in part.arcs().items())


@pytest.mark.parametrize("topology", ["standard", "modified"])
def test_ctc_scores_are_sums_over_alignments(topology) -> None:
    emissions, lens = log_probs(11, 2, 4), torch.tensor([4, 3])
    lists = [[[1, 2], [], [1, 1, 2], [1, 1, 1]], [[3], [1, 2, 3, 4]]]
    found = ctc_scores(emissions, lens, lists, topology=topology)
    for row, pieces in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)):
        total = -math.inf
        for path in torch.cartesian_prod(*[torch.arange(TOKENS.size)] * int(lens[row])).tolist():
            if lists[row][pieces] in collapse(path, topology):
                score = sum(float(emissions[row, frame, label]) for frame, label in enumerate(path))
                ways = collapse(path, topology).count(lists[row][pieces])
                total = log_add(total, score + math.log(ways))
        assert found[row][pieces] == pytest.approx(total, abs=1e-4)
    if topology == "standard":
        loss = torch.nn.functional.ctc_loss(
            emissions[:1].transpose(0, 1), torch.tensor([1, 2]), lens[:1], torch.tensor([2]), reduction="sum"
        )
        assert found[0][0] == pytest.approx(-float(loss), abs=1e-4)


def log_add(one, other):
    return float(np.logaddexp(one, other))


def test_shallow_fusion_along_a_lattice_is_refused() -> None:
    with pytest.raises(ValueError, match="fusions along a lattice must be delayed"):
        lattice_beam_search(lattices(12, [3]), 0.0, TOKENS, ALL, [Bigram(0.5)])


@pytest.mark.parametrize("wrong", [{"beam": 0}, {"merge": "mean"}, {"score_beam": 0.0}, {"nbest": 0}])
def test_options_are_checked(wrong) -> None:
    with pytest.raises(ValueError, match=f"LatticeBeamOptions.{next(iter(wrong))} must"):
        LatticeBeamOptions(**wrong)
