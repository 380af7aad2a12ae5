"""Who watches a beam changes nothing in it, and tells what was there.
Knows: BeamWatch, small searches with tiny language models. Must not know: trained models.
"""
from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icefall_fusion.fusion import AtEnd, DelayedFusion, EveryFrame, ShortestHypothesis
from icefall_fusion.fusion.watch import (
    AFTER,
    BY_MASS,
    BY_SCORES,
    IN_LIST,
    NEVER,
    BeamWatch,
    _Sight,
    _Words,
)
from icefall_fusion.scoring.wer import compare_words
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search
from icefall_fusion.text.tokens import AcousticTokens
from tests.fusion.test_fusion import (
    emissions,
    llm,  # noqa: F401 (a fixture)
    tokens,  # noqa: F401 (a fixture)
)

OPTIONS = PrefixSearchOptions(beam=4)


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), trigger=st.sampled_from([ShortestHypothesis(), EveryFrame(), AtEnd()]))
def test_the_lists_stay_as_they_are_and_the_words_of_the_end_are_theirs(llm, tokens, seed, trigger):  # noqa: F811
    log_probs, lens = emissions(batch=3, frames=24, seed=seed, peak=2.0)
    plain = ctc_prefix_search(log_probs, lens, OPTIONS, tokens, [DelayedFusion(llm, 0.4, 0.5, trigger)])
    references = {nbest.utterance: nbest[len(nbest) - 1].words() for nbest in plain}
    speaker = DelayedFusion(llm, 0.4, 0.5, trigger)
    watch = BeamWatch(references, speaker)
    watched = ctc_prefix_search(log_probs, lens, OPTIONS, tokens, [speaker, watch])
    for one, other in zip(plain, watched):
        assert [(h.tokens, h.text, h.total) for h in one] == [
            (h.tokens, h.text, pytest.approx(h.total, abs=1e-4)) for h in other]
        reference = references[one.utterance]
        matcher, union = _Words(reference), 0
        for hypothesis in other:
            union |= matcher.right(tuple(hypothesis.words()))
        assert watch.final[one.utterance] == union == 2 ** len(reference) - 1  # the last one is the reference
        assert watch.fates(one.utterance, range(len(reference))) == [IN_LIST] * len(reference)
        seen = sum(1 << word for word in watch.last[one.utterance])
        assert seen & union == union and watch.spoken[one.utterance] & ~seen == 0
        if isinstance(trigger, AtEnd):  # `finish` scores all that is left
            assert watch.spoken[one.utterance] == union
    assert watch.fates("other", [0]) is None


@given(st.lists(st.sampled_from("abc"), max_size=5), st.lists(st.sampled_from("abc"), max_size=5))
def test_right_words_are_those_of_a_best_alignment_with_a_beginning(reference, words) -> None:
    found = _Words(reference).right(tuple(words))
    places = [place for place in range(len(reference)) if found >> place & 1]
    errors = min(compare_words(reference[:stop], words).errors for stop in range(len(reference) + 1))
    fits = []
    for stop in range(len(reference) + 1):  # every way to leave as many right ones
        if compare_words(reference[:stop], words).errors == errors:
            fits.append(stop)
    best = 0
    for stop, count in itertools.product(fits, range(len(words) + 1)):
        best = max(best, count) if _can(reference[:stop], words, count, errors) else best
    assert len(places) <= best and (len(words) > 0 or not places)
    chosen = iter(words)
    assert all(any(word == other for other in chosen) for word in (reference[p] for p in places))


def _can(reference, words, right, errors) -> bool:
    """Whether an alignment with so many errors leaves so many words right."""
    def count(r, w, left, budget):
        if budget < 0:
            return False
        if not r and not w:
            return left == 0 and budget == 0
        ways = []
        if r and w:
            same = r[0] == w[0]
            ways.append(count(r[1:], w[1:], left - same, budget - (not same)))
        if r:
            ways.append(count(r[1:], w, left, budget - 1))
        if w:
            ways.append(count(r, w[1:], left, budget - 1))
        return any(ways)

    return count(tuple(reference), tuple(words), right, errors)



def test_each_fate_is_told(llm) -> None:  # noqa: F811
    """A beam of two: words that never enter, that leave early, that the LLM has heard, that stay."""
    pieces = AcousticTokens.from_pieces(["<blk>", "▁cat", "▁dog", "▁sea", "▁sat", "▁sun"], 0)

    def frame(**probs):
        row = torch.full((6,), 1e-6)
        for name, value in probs.items():
            row[["blk", "cat", "dog", "sea", "sat", "sun"].index(name)] = value
        return (row / row.sum()).log()

    log_probs = torch.stack([
        frame(cat=0.6, dog=0.4), frame(blk=1.0), frame(sea=0.7, sat=0.3), frame(blk=1.0),
        frame(sun=0.5, blk=0.5)])[None]
    speaker = DelayedFusion(llm, 0.0, 0.0, AtEnd(), "lower")
    words = {"0": ["dog", "sat", "sun", "ship"]}
    watch = BeamWatch(words, speaker)
    [nbest] = ctc_prefix_search(log_probs, torch.tensor([5]), PrefixSearchOptions(beam=2), pieces,
                                [speaker, watch])
    fates = dict(zip(words["0"], watch.fates("0", range(4))))
    texts = [hypothesis.text for hypothesis in nbest]
    assert sorted(texts) == ["cat sea", "cat sea sun"]  # equally probable
    assert fates["dog"] == BY_MASS and fates["ship"] == NEVER and fates["sun"] == IN_LIST
    assert fates["sat"] == NEVER  # "dog sea" (0.28) has more mass than "cat sat" (0.18)
    speaker = DelayedFusion(llm, 0.0, 0.0, EveryFrame(), "lower")
    watch = BeamWatch(words, speaker)
    ctc_prefix_search(log_probs, torch.tensor([5]), PrefixSearchOptions(beam=2), pieces, [speaker, watch])
    assert watch.fates("0", [0]) == [AFTER]  # "dog" was closed by "sea" while "dog sea" was in the beam
    watch.spoken["0"], watch.last["0"] = 0, {0: _Sight(1, 0), 1: _Sight(1, 1)}
    assert watch.fates("0", [0, 1]) == [BY_SCORES, BY_MASS]  # another one stood higher by scores alone
