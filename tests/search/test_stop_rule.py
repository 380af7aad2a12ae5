"""Utterances that run on to their own next fusion event: the same as all in step, in fewer calls of the LM.
Knows: tiny random language models, both searches. Must not know: trained models.
"""
from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icefall_fusion.fusion import DelayedFusion, FixedInterval, LookAhead, NgramFusion, ShortestHypothesis
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search
from icefall_fusion.search.stop_rule import StopRuleRun
from tests.fusion.test_fusion import TRIGGERS, assert_same, emissions, llm, names, tokens  # noqa: F401 (fixtures)
from tests.ngram.test_ngram import OPTIONS, ngram  # noqa: F401 (a fixture)


def decode(engine, log_probs, lens, tokens, fusions, beam=4, **options):  # noqa: F811
    chosen = PrefixSearchOptions(beam=beam, engine=engine, **options)
    return ctc_prefix_search(log_probs, lens, chosen, tokens, fusions)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    trigger=st.sampled_from([*TRIGGERS, ShortestHypothesis("pieces", 3)]),
    beam=st.sampled_from([1, 3, 8]),
    ahead=st.sampled_from([None, 1, 3]),
    shallow=st.booleans(),
    options=st.sampled_from(OPTIONS),
)
def test_own_stops_are_all_in_step(llm, ngram, tokens, seed, trigger, beam, ahead, shallow, options):  # noqa: F811
    log_probs, lens = emissions(batch=5, frames=30, seed=seed, peak=2.0)
    lens[3] = 0
    found = []
    for engine in ("native", "torch"):
        look = None if ahead is None else LookAhead(ngram, 0.6, ahead)
        fusions = [DelayedFusion(llm, 0.4, 0.5, trigger, look_ahead=look)]
        if shallow:
            fusions.append(NgramFusion(ngram, 0.3, 0.1))
        found.append(decode(engine, log_probs, lens, tokens, fusions, beam, **options))
    for own, in_step in zip(*found):
        most = max(1, min(len(own), len(in_step)) - 1)  # the last may tie with one that is not there
        totals = [[h.total for h in nbest][:most] for nbest in (own, in_step)]
        assert totals[0] == pytest.approx(totals[1], abs=2e-3)
        assert own[0].tokens == in_step[0].tokens and own[0].times == in_step[0].times
        assert own[0].scores == pytest.approx(in_step[0].scores, abs=2e-3)


@pytest.mark.parametrize("trigger", [ShortestHypothesis(), FixedInterval(3)], ids=names)
def test_calls_of_the_lm_are_those_of_the_utterance_with_the_most_events(llm, tokens, trigger):  # noqa: F811
    log_probs, lens = emissions(batch=6, frames=40, seed=3)
    calls = {}
    for engine in ("native", "torch"):
        fusion = DelayedFusion(llm, 0.4, 0.5, trigger)
        decode(engine, log_probs, lens, tokens, [fusion])
        calls[engine] = fusion.stats()
    alone = []
    for b in range(6):
        fusion = DelayedFusion(llm, 0.4, 0.5, trigger)
        decode("native", log_probs[b : b + 1], lens[b : b + 1], tokens, [fusion])
        alone.append(fusion.stats())
    assert calls["native"]["events"] == max(stats["events"] for stats in alone)
    assert calls["native"]["events"] <= calls["torch"]["events"]
    if isinstance(trigger, ShortestHypothesis):  # in step, the others' events come in between
        assert calls["native"]["events"] < calls["torch"]["events"]
    for stats in calls.values():
        for name in ("lm_tokens_scored", "histories_scored"):
            assert stats[name] == sum(one[name] for one in alone)


def test_threads_change_nothing(llm, ngram, tokens):  # noqa: F811
    log_probs, lens = emissions(batch=7, frames=40, seed=4)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            fusions = [DelayedFusion(llm, 0.4, 0.5, look_ahead=LookAhead(ngram)), NgramFusion(ngram, 0.2)]
            found.append(decode("native", log_probs, lens, tokens, fusions))
    finally:
        torch.set_num_threads(before)
    assert_same(*found)


@dataclass(frozen=True)
class _EverySecondFrame(FixedInterval):
    """A condition of somebody else's, of which no rule is known."""

    frames: int = 2

    def start(self, beam, tokens):  # noqa: F811
        run = super().start(beam, tokens)
        run.rule = None
        return run


def test_fusions_without_a_common_rule_go_in_step(llm, tokens):  # noqa: F811
    log_probs, lens = emissions(batch=4, seed=6)

    def two(engine):
        first = DelayedFusion(llm, 0.3, 0.2, ShortestHypothesis())
        second = DelayedFusion(llm, 0.2, 0.3, FixedInterval(4), source="other")
        return decode(engine, log_probs, lens, tokens, [first, second])

    assert_same(two("native"), two("torch"), 1e-3)
    own, usual = (
        decode("native", log_probs, lens, tokens, [DelayedFusion(llm, 0.4, 0.5, trigger)])
        for trigger in (_EverySecondFrame(), FixedInterval(2))
    )
    assert_same(own, usual, 1e-4)


def test_another_condition_is_asked_not_the_rule_of_its_parent(llm, tokens):  # noqa: F811
    """Classes that only say *when* in another way, or follow frames, must not go by what they inherit."""

    class StepsOfItsOwn(StopRuleRun):
        def fires(self, beam, frame, active):
            return active if frame in (5, 11) else None

    class FewFrames(FixedInterval):
        def start(self, beam, tokens):
            run = StepsOfItsOwn(self.rule(), beam)
            run.rule = None
            return run

    class Follows(DelayedFusion):
        calls = 0

        def advance(self, beam, source, grew):
            Follows.calls += 1
            super().advance(beam, source, grew)

    log_probs, lens = emissions(batch=2, frames=20, seed=2)
    events = []
    for engine in ("native", "torch"):
        fusion = DelayedFusion(llm, 0.4, 0.5, FewFrames(3))
        decode(engine, log_probs, lens, tokens, [fusion])
        events.append(fusion.stats()["events"])
    assert events == [2, 2]
    decode("native", log_probs, lens, tokens, [Follows(llm, 0.4, 0.5)])
    assert Follows.calls > 0


def test_host_copies_of_prefixes_end_where_utterances_stand(llm, tokens, monkeypatch):  # noqa: F811
    from icefall_fusion.search.beam import PrefixArena

    told = []
    monkeypatch.setattr(PrefixArena, "reach", lambda self, first, rows: told.append((first, rows)))
    log_probs, _ = emissions(batch=3, frames=24, seed=1)
    fusion = DelayedFusion(llm, 0.4, 0.5, FixedInterval(6))
    decode("native", log_probs, torch.tensor([24, 24, 0]), tokens, [fusion])
    assert told == [(1, 7), (7, 13), (13, 19), (19, 25)]
