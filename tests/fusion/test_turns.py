"""Groups of utterances searched in turns: the results of one batch, and the model's work under the host's.
Knows: tiny random language models, random log-probs. Must not know: trained models.

What needs a GPU (streams) has never run on one.
"""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from icefall_fusion.fusion import (
    DelayedFusion,
    FixedInterval,
    LookAhead,
    NgramFusion,
    ShallowFusion,
    ShortestHypothesis,
)
from icefall_fusion.lm import CausalLm, TreeScorer
from icefall_fusion.lm.loading import Vocabulary
from icefall_fusion.search import Fusion, PrefixSearchOptions, ctc_prefix_search
from icefall_fusion.search.fusion import FusionSet, StopRule
from icefall_fusion.search.search_input import check_input
from icefall_fusion.search.turns import alternate, automatic_groups, select
from tests.fusion.test_fusion import (  # noqa: F401 (fixtures)
    TRIGGERS,
    assert_same,
    byte_tokenizer,
    emissions,
    names,
    nlm,
    tiny_model,
    tokens,
)
from tests.ngram.test_ngram import OPTIONS, ngram  # noqa: F401 (a fixture)
from tests.search_tools import assert_near


@pytest.fixture(scope="module")
def llm() -> CausalLm:
    """A model in float64: its float32 scores do not depend on what else is in the call."""
    tokenizer = byte_tokenizer()
    model = tiny_model(len(tokenizer), 1).double()
    return CausalLm(model, Vocabulary(tokenizer, None, 0, 1), "exact", self_check=False)


def decode(log_probs, lens, tokens, fusions, groups, ids=None, **options):  # noqa: F811
    chosen = PrefixSearchOptions(beam=4, groups=groups, **options)
    return ctc_prefix_search(log_probs, lens, chosen, tokens, fusions, ids)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 9),
    groups=st.integers(2, 5),
    trigger=st.sampled_from(TRIGGERS),
    weight=st.sampled_from([0.0, 0.5]),
    ahead=st.booleans(),
    shallow=st.sampled_from([None, "ngram", "nlm"]),
    engine=st.sampled_from(["auto", "torch"]),
    prompted=st.booleans(),
)
def test_groups_find_what_one_batch_finds(
    llm, nlm, ngram, tokens, seed, batch, groups, trigger, weight, ahead, shallow, engine, prompted  # noqa: F811
):
    log_probs, lens = emissions(batch, 30, seed)
    lens[seed % batch] = 0
    ids = [f"u{number}" for number in range(batch)]
    prompt = {name: "the boat is"[: number % 12] for number, name in enumerate(ids)} if prompted else None

    def fusions():
        look = LookAhead(ngram) if ahead else None
        first = {None: [], "ngram": [NgramFusion(ngram, 0.2)], "nlm": [ShallowFusion(nlm, 0.3)]}[shallow]
        return [*first, DelayedFusion(llm, weight, 0.4, trigger, prompt=prompt, look_ahead=look)]

    whole, parts = (decode(log_probs, lens, tokens, fusions(), count, ids, engine=engine)
                    for count in (1, groups))
    assert [nbest.utterance for nbest in parts] == ids
    for one, other in zip(whole, parts):
        assert one.weights == other.weights
        if shallow == "nlm" or engine == "torch":  # float32: rounding depends on the batch's size
            assert_same([one], [other])
        else:
            assert one.hypotheses == other.hypotheses  # pieces, texts, times and scores, bit for bit


def test_one_group_is_scored_while_the_other_is_searched(llm, tokens, monkeypatch):  # noqa: F811
    done, launch = [], TreeScorer.launch

    def told(scorer, nodes, eos=False):
        wait, roots = launch(scorer, nodes, eos), len(scorer.tree.roots)
        done.append(("launch", roots))

        def waits():
            done.append(("wait", roots))
            return wait()

        return waits

    monkeypatch.setattr(TreeScorer, "launch", told)
    log_probs, _ = emissions(5, 24, 3)
    decode(log_probs, torch.full((5,), 24), tokens, [DelayedFusion(llm, 0.5, trigger=FixedInterval(6))], 2)
    larger, smaller = 3, 2  # utterances of the two groups
    turn = [("wait", larger), ("launch", larger), ("wait", smaller), ("launch", smaller)]
    # four events and the end of each group
    assert done == [("launch", larger), ("launch", smaller), *4 * turn, ("wait", larger), ("wait", smaller)]


def test_counters_of_groups_add_up(llm, tokens):  # noqa: F811
    log_probs, lens = emissions(6, 40, 5)
    rows = alternate(lens.tolist(), 2)
    fusion = DelayedFusion(llm, 0.5, 0.2, FixedInterval(8))
    decode(log_probs, lens, tokens, [fusion], 1)  # all words are known to the tokenizer from here on
    decode(log_probs, lens, tokens, [fusion], 2)
    alone = []
    for group in rows:
        one = DelayedFusion(llm, 0.5, 0.2, FixedInterval(8))
        decode(log_probs[group], lens[group], tokens, [one], 1)
        alone.append(one.stats())
    stats = fusion.stats()
    assert stats.pop("groups_peak") == 2 and set(stats) == set(alone[0])
    for name in set(stats) - {"lm_seconds", "retokenize_hit_rate"}:
        assert stats[name] == sum(one[name] for one in alone), name
    assert stats["events"] > 5 and stats["lm_tokens_scored"] > 0 and stats["kv_bytes_peak"] > 0
    assert stats["retokenize_hit_rate"] == 1
    decode(log_probs, lens, tokens, [fusion], 1)  # counts anew
    assert fusion.stats()["events"] == 5


def test_an_ngram_forgets_the_groups_of_an_earlier_batch(llm, ngram, tokens):  # noqa: F811
    log_probs, lens = emissions(4, 24, 5)
    fusions = [NgramFusion(ngram, 0.2), DelayedFusion(llm, 0.5, 0.2, FixedInterval(8))]
    decode(log_probs, lens, tokens, fusions, 2)
    decode(log_probs, lens, tokens, fusions, 1)
    assert not any("groups_peak" in fusion.stats() for fusion in fusions)


def test_an_error_in_a_group_names_the_utterance(llm, tokens):  # noqa: F811
    log_probs, lens = emissions(4, 24, 2)
    fusion = DelayedFusion(llm, 0.5, trigger=FixedInterval(6), prompt={"a": "the", "b": "", "c": "sea"})
    for groups in (1, 2):
        with pytest.raises(ValueError, match="prompt must have a text for each utterance, but is 'd'"):
            decode(log_probs, lens, tokens, [fusion], groups, ["a", "b", "c", "d"])
    nan = DelayedFusion(llm, 0.5, trigger=FixedInterval(6))
    weight = llm.model.get_output_embeddings().weight
    before = weight.data[:].clone()
    weight.data.fill_(float("nan"))
    try:
        for groups in (1, 2):
            with pytest.raises(ValueError, match="scores of the language model 'exact' must be numbers"):
                decode(log_probs, lens, tokens, [nan], groups)
    finally:
        weight.data.copy_(before)
    found = [decode(log_probs, lens, tokens, [nan], groups) for groups in (1, 2)]  # it serves again
    assert_same(*found)


class LastPiece(Fusion):
    """A fusion that ranks by the last piece every few frames, in one step."""

    source, weight, every = "last", 1.0, 4

    def stop_rule(self):
        return StopRule(self.every)

    def fuse_now(self, beam, fires):
        gain = 0.7 * (beam.last % 3) * fires.unsqueeze(1)
        beam.lm[..., self.index] += gain
        beam.fused += gain

    def fuse(self, beam, frame, active):
        due = (frame + 1) % self.every == 0
        if due:
            self.fuse_now(beam, active)
        return due


class LastPieces(LastPiece):
    def for_groups(self, count):
        return [LastPieces() for _ in range(count)]


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_fusion_that_scores_in_one_step_serves_groups_too(tokens, engine):  # noqa: F811
    log_probs, lens = emissions(5, 24, 8)
    whole, parts = (decode(log_probs, lens, tokens, [LastPieces()], groups, engine=engine)
                    for groups in (1, 3))
    assert [nbest.hypotheses for nbest in whole] == [nbest.hypotheses for nbest in parts]
    rule = "PrefixSearchOptions.groups must be none or 1 with the fusion 'last'"
    with pytest.raises(ValueError, match=rule):
        decode(log_probs, lens, tokens, [LastPiece()], 2, engine=engine)


def test_a_subclass_that_scores_in_its_own_way_is_asked(llm, tokens):  # noqa: F811
    class Told(DelayedFusion):
        calls = 0

        def fuse_now(self, beam, fires):
            Told.calls += 1
            super().fuse_now(beam, fires)

    log_probs, lens = emissions(4, 24, 1)
    found = [decode(log_probs, lens, tokens, [kind(llm, 0.5, trigger=FixedInterval(6))], 2)
             for kind in (Told, DelayedFusion)]
    assert Told.calls > 4
    assert_same(*found)


def test_groups_have_work_to_the_end_and_the_rows_of_a_sorted_batch_are_not_copied():
    assert alternate([3, 9, 5, 9, 0], 2) == [[1, 2, 4], [3, 0]]
    assert alternate([1, 2], 1) == [[0, 1]]
    log_probs = torch.randn(5, 9, 6).log_softmax(-1)
    for lens in ([9, 8, 7, 4, 0], [3, 9, 5, 9, 0]):
        inputs = check_input(log_probs, torch.tensor(lens), 0, None, list("abcde"))
        for rows in alternate(lens, 2):
            part = select(inputs, rows)
            longest = lens[rows[0]]
            assert part.ids == ["abcde"[row] for row in rows] and part.lens.equal(inputs.lens[rows])
            for name in ("log_probs", "best", "live"):
                assert getattr(part, name).equal(getattr(inputs, name)[rows, :longest])
            memory = [one.log_probs.untyped_storage().data_ptr() for one in (part, inputs)]
            assert (memory[0] == memory[1]) == (lens[0] == 9)


def test_two_groups_are_taken_by_themselves_where_they_gain(llm, nlm, tokens):  # noqa: F811
    delayed, shallow, own = DelayedFusion(llm, 0.5), ShallowFusion(nlm, 0.5), LastPiece()
    with FakeTensorMode():
        on_gpu = torch.empty(16, 3, 4, device="cuda")
    inputs = check_input(torch.zeros(16, 3, 4) - 1.4, torch.full((16,), 3), 0, None, None)
    for log_probs, ids, fusions, groups in (
        (on_gpu, inputs.ids, [delayed], 2),
        (on_gpu, inputs.ids, [shallow, delayed], 2),
        (on_gpu, inputs.ids[1:], [delayed], 1),  # too few
        (inputs.log_probs, inputs.ids, [delayed], 1),  # a CPU
        (on_gpu, inputs.ids, [shallow], 1),  # nothing is collected
        (on_gpu, inputs.ids, [own, delayed], 1),  # it serves one group alone
    ):
        asked = inputs._replace(log_probs=log_probs, ids=ids)
        assert automatic_groups(asked, FusionSet(fusions, tokens)) == groups


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("trigger", TRIGGERS, ids=names)
def test_groups_on_a_gpu_are_one_batch_on_a_cpu(tokens, trigger):  # noqa: F811
    tokenizer, found = byte_tokenizer(), []
    log_probs, lens = emissions(20, 60, 6)
    for device, groups in (("cpu", 1), ("cuda", None), ("cuda", 3)):
        model = tiny_model(len(tokenizer), 1).to(device)
        lm = CausalLm(model, Vocabulary(tokenizer, None, 0, 1), "tiny", self_check=False)
        fusion = DelayedFusion(lm, 0.5, 0.7, trigger)
        found.append(decode(log_probs.to(device), lens, tokens, [fusion], groups))
        assert len(fusion._groups) == {1: 0, None: 2, 3: 3}[groups]
    for on_gpu in found[1:]:
        for one, other in zip(found[0], on_gpu):
            assert_near(*([(tuple(h.tokens), h.total) for h in nbest] for nbest in (other, one)), 1e-2)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 5),
    late=st.sampled_from([1, 2, 3, 5, 9, 50]),
    trigger=st.sampled_from([*TRIGGERS, ShortestHypothesis("pieces", 3)]),
    shallow=st.booleans(),
    groups=st.sampled_from([1, 2]),
    engine=st.sampled_from(["native", "torch"]),
    every=st.sampled_from([None, 1, 3]),
)
def test_late_scores_land_at_each_utterances_own_pace(
    llm, ngram, tokens, seed, batch, late, trigger, shallow, groups, engine, every  # noqa: F811
):
    """Its slow twin goes frame by frame: the same, bit for bit, in the same engine."""

    class FrameByFrame(DelayedFusion):
        def stop_rule(self):
            return None

    log_probs, lens = emissions(batch, 30, seed)
    lens[seed % batch] = seed % 3
    found, calls = [], []
    for kind in (DelayedFusion, FrameByFrame):
        look = None if every is None else LookAhead(ngram, 0.6, every)
        fusion = kind(llm, 0.5, 0.4, trigger, late=late, look_ahead=look)
        first = [NgramFusion(ngram, 0.2)] if shallow else []
        found.append(decode(log_probs, lens, tokens, [*first, fusion], groups, engine=engine))
        calls.append(fusion.stats()["events"])
    assert calls[0] <= calls[1]
    for one, other in zip(*found):
        if (shallow or every) and engine == "native":  # n-grams' scores are added up in another order
            assert_same([one], [other], 1e-4)
        else:
            assert one.hypotheses == other.hypotheses


def test_late_scores_stop_an_utterance_no_more_than_they_must(llm, ngram, tokens, monkeypatch):  # noqa: F811
    from icefall_fusion.search.engines.native import NativeSearch

    runs, search = [], NativeSearch._search
    monkeypatch.setattr(NativeSearch, "_search", lambda self, until: (search(self, until),
                                                                      runs.append(self.at.tolist()))[0])
    log_probs, _ = emissions(2, 24, 3)
    fusion = DelayedFusion(llm, 0.5, trigger=FixedInterval(10), late=4)
    decode(log_probs, torch.tensor([24, 13]), tokens, [fusion], 1)
    assert runs == [[10, 10], [14, 13], [20, 13], [24, 13]]
    runs.clear()
    look = DelayedFusion(llm, 0.5, trigger=FixedInterval(10), late=4, look_ahead=LookAhead(ngram))
    decode(log_probs, torch.tensor([24, 13]), tokens, [look], 1)
    assert runs == [[10, 10], [14, 13], [20, 13], [24, 13]]
