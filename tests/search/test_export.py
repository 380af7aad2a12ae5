"""N-best lists from a beam: all at once and lazily, bit for bit those of the slow twin.
Knows: beams, vocabularies, N-best lists. Must not know: engines.
"""
from __future__ import annotations

import copy
import json
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import nbest_lists
from search_tools import TOKENS, WordLengths, emissions

from icefall_fusion.nbest import NBest, to_json
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search
from icefall_fusion.search.beam import Beam
from icefall_fusion.search.engines import open_search
from icefall_fusion.search.export import Hypotheses, count_words, export_nbests
from icefall_fusion.search.fusion import FusionSet
from icefall_fusion.search.search_input import check_input
from icefall_fusion.text.tokens import AcousticTokens

VOCABULARIES = [
    AcousticTokens.from_pieces(["<blk>", "<s>", "<unk>", "▁", "▁a", "b", "▁c", "d"], 0),
    AcousticTokens.from_pieces(["<pad>", "|", "a", "b", "c", "'", "<unk>", "</s>"], 0, delimiter="|"),
    AcousticTokens.from_pieces(list("abcdefgh"), 7, word_start=""),
    None,
]
OPTIONS = [{}, {"blank_skip": 0.6}, {"score_beam": 3.0}]


def searched(seed, tokens, beam, options, fused):
    """Return the arguments of export_nbests after a search of four utterances, one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    blank = 0 if tokens is None else tokens.blank_id
    log_probs = emissions(seed, 4, 24, 8, 2.5, 2.0, blank)
    log_probs = log_probs.masked_fill(torch.rand(log_probs.shape, generator=generator) < 0.1, -math.inf)
    log_probs[..., blank].clamp_(min=-3.0)
    inputs = check_input(log_probs, torch.tensor([24, 11, 0, 1]), blank, tokens, None)
    chosen = PrefixSearchOptions(beam=beam, **options)
    fusions = [SimpleNamespace(source=name, weight=w, word_bonus=bonus) for name, w, bonus in fused]
    state, together = Beam.at_root(inputs, beam, None, len(fusions)), FusionSet([], None)
    search, plan = open_search(inputs, state, chosen, together)
    search.run()
    state.offset += inputs.best.double().mul(inputs.live).sum(1)
    state.lm = torch.randn(4, beam, len(fusions), generator=generator).round()  # totals tie at times
    state.lm = state.lm.masked_fill(torch.rand(state.lm.shape, generator=generator) < 0.1, -math.inf)
    return state, inputs, plan.map, tokens, fusions


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6), beam=st.sampled_from([1, 4, 9]), options=st.sampled_from(OPTIONS),
    tokens=st.sampled_from(VOCABULARIES), nbest=st.integers(1, 9),
    frame_shift=st.sampled_from([None, 0.04, 1]),
    fused=st.sampled_from([[], [("llm", 0.3, 0.5)], [("llm", 0.0, 0.0), ("ngram", 0.7, -0.25)]]),
    tied=st.booleans(),
)
def test_lists_are_those_of_the_slow_twin(seed, beam, options, tokens, nbest, frame_shift, fused, tied):
    state, inputs, frame_map, tokens, fusions = searched(seed, tokens, beam, options, fused)
    if tied:
        state.log_total.copy_(torch.where(state.alive, state.log_total.round(), state.log_total))
    arguments = (state, inputs, frame_map, nbest, frame_shift, tokens, fusions)
    found, expected = export_nbests(*arguments), nbest_lists.export_nbests(*arguments)
    assert found == expected and expected == found
    for one, other in zip(found, expected):
        assert to_json(one.as_plain()) == to_json(other.as_plain())
        assert repr(one) == repr(other)


@settings(max_examples=60)
@given(
    rows=st.lists(st.lists(st.integers(0, 7), max_size=9), min_size=1),
    tokens=st.sampled_from(VOCABULARIES[:3]),
)
def test_words_are_counted_as_they_are_spelled(rows, tokens):
    longest = max(map(len, rows))
    pieces = torch.tensor([row + [-1] * (longest - len(row)) for row in rows], dtype=torch.int64).numpy()
    assert count_words(pieces, tokens).tolist() == [len(tokens.words(row)) for row in rows]


def test_a_score_that_is_not_a_number_is_refused_at_the_search():
    class Broken(WordLengths):
        def finish(self, beam):
            beam.lm[1, 0] = math.nan

    log_probs, names = emissions(2, 3, 9, 6), ["one", "two", "three"]
    with pytest.raises(ValueError, match="score 'lengths' of utterance two must not be NaN"):
        ctc_prefix_search(log_probs, torch.tensor([9, 9, 9]), None, TOKENS, [Broken(0.2)], names)


def test_hypotheses_are_made_when_they_are_read_and_are_like_a_list():
    log_probs = emissions(3, 2, 12, 6)
    lists = [ctc_prefix_search(log_probs, torch.tensor([12, 9]), None, TOKENS) for _ in "12"]
    nbest = lists[0][0]
    hypotheses = nbest.hypotheses
    assert isinstance(hypotheses, Hypotheses) and len(nbest) == 10
    assert hypotheses._made == [None] * 10
    best = nbest[0]
    assert nbest[0] is best and hypotheses._made[1:] == [None] * 9
    plain = list(lists[1][0])
    assert hypotheses == plain and plain == hypotheses and hypotheses != plain[:9] and hypotheses != 1
    assert NBest(nbest.utterance, plain, nbest.weights) == nbest == lists[1][0]
    assert hypotheses[-1] == plain[-1] and hypotheses[2:9:3] == plain[2:9:3] and best in hypotheses
    assert list(reversed(hypotheses)) == plain[::-1] and repr(hypotheses) == repr(plain)
    with pytest.raises(IndexError):
        hypotheses[10]
    for copied in (pickle.loads(pickle.dumps(nbest)), copy.deepcopy(nbest)):
        assert copied == nbest and type(copied.hypotheses) is list
    assert NBest.from_plain(json.loads(to_json(nbest.as_plain()))) == nbest
    assert nbest.reweight(nbest.weights).hypotheses == hypotheses
    with pytest.raises(TypeError):
        hash(hypotheses)
