"""Hot words in the search: against a slow twin that counts phrases in prefixes, in all engines.
Knows: small searches, phrases. Must not know: trained models.
"""
from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icefall_fusion.fusion import DelayedFusion, FixedInterval, HotWordFusion, NgramFusion, ShortestHypothesis
from icefall_fusion.fusion.hotwords import make_automaton, read_hotwords
from icefall_fusion.ngram.phrases import PhraseAutomaton, PhraseTensors
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search, engines
from icefall_fusion.text.tokens import AcousticTokens
from tests.fusion.test_fusion import (
    SLOW_TRIGGERS,
    compare_with_twin,
    emissions,
    llm,  # noqa: F401 (a fixture)
    names,
    slow_delayed,
    tokens,  # noqa: F401 (a fixture)
)
from tests.ngram.test_ngram import ngram, slow_ngram  # noqa: F401 (a fixture)
from tests.reference.fused_search import SlowFusion

PIECES = ["<blk>", "▁a", "b", "▁c", "d", "▁", "<unk>"]
TOKENS = AcousticTokens.from_pieces(PIECES, 0)
LETTERS = AcousticTokens.from_pieces(["<pad>", "|", "a", "b", "c"], 0, delimiter="|")
COUNT = 2.0**-15  # nats by which boosts on trial may miss: they are rounded
boosts = st.sampled_from([0.5, 1.25, 3.0, 7.25, -2.0])


def lists(first, others):
    """Return lists of phrases as pieces with boosts; many begin or end alike."""
    ids = st.tuples(st.sampled_from(first), st.lists(st.sampled_from(others), max_size=3))
    entry = st.tuples(ids.map(lambda parts: (parts[0], *parts[1])), boosts)
    return st.lists(entry, max_size=6, unique_by=lambda one: one[0])


phrase_lists = lists([1, 3], [1, 2, 3, 4])
letter_lists = lists([2, 3, 4], [1, 2, 3, 4]).map(lambda them: [one for one in them if one[0][-1] != 1])


class Counted:
    """The slow twin: looks through the whole prefix for each phrase, each time."""

    def __init__(self, phrases, tokens, head=None) -> None:  # noqa: F811
        front = () if head is None else (head,)
        self.phrases = [((*front, *ids), boost) for ids, boost in phrases]
        self.front, self.tokens = front, tokens

    def complete(self, prefix, ended=True) -> float:
        """Return the boosts of all phrases in a prefix that a word follows, or (ended) its end."""
        whole, total = (*self.front, *prefix), 0.0
        for ids, boost in self.phrases:
            for end in range(len(ids), len(whole) + 1):
                closed = self.tokens.starts_word[whole[end]] if end < len(whole) else ended
                total += boost * (closed and whole[end - len(ids) : end] == ids)
        return total

    def on_trial(self, prefix) -> float:
        """Return the most that the beginning of a phrase has earned that is the prefix's end."""
        whole, most, skipped = (*self.front, *prefix), 0.0, len(self.front)
        for ids, boost in self.phrases:
            for n in range(skipped + 1, min(len(ids), len(whole)) + 1):
                if whole[len(whole) - n :] == ids[:n]:
                    most = max(most, boost * (n - skipped) / (len(ids) - skipped))
        return most

    def paid(self, prefix) -> float:
        return self.complete(prefix, ended=False) + self.on_trial(prefix)

    def fusion(self, weight) -> SlowFusion:
        return SlowFusion(
            "hotwords", weight, 0.0, lambda prefix, words: self.complete(tuple(prefix)),
            piece_score=lambda prefix, piece: self.paid((*prefix, piece)) - self.paid(prefix),
        )


def log_probs_of(seed, batch, frames, pieces, peak=2.0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, frames, pieces, generator=generator) * peak
    values[..., 0] += 2.0 * (torch.rand(batch, frames, generator=generator) > 0.3)
    return values.log_softmax(-1), torch.full((batch,), frames)


def search(emitted, fusions, engine="auto", vocabulary=TOKENS, beam=6, ids=None, **options):
    chosen = PrefixSearchOptions(beam=beam, engine=engine, **options)
    return ctc_prefix_search(*emitted, chosen, vocabulary, fusions, ids)


def results(nbests):
    return [[(h.tokens, h.scores) for h in nbest] for nbest in nbests]


@pytest.mark.parametrize("engine", ["native", "torch"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), phrases=phrase_lists, beam=st.integers(1, 9),
       weight=st.sampled_from([0.3, 1.0, 60.0]))
def test_search_equals_the_slow_twin(engine, seed, phrases, beam, weight):
    emitted = log_probs_of(seed, 1, 18, len(PIECES))
    fusion = HotWordFusion(PhraseAutomaton(len(PIECES), phrases), weight)
    nbests = search(emitted, [fusion], engine, beam=beam)
    slow = Counted(phrases, TOKENS)
    compare_with_twin(nbests, *emitted, beam, TOKENS, [slow.fusion(weight)])
    for hypothesis in nbests[0]:  # what was given back leaves nothing behind
        assert abs(hypothesis.scores["hotwords"] - slow.complete(tuple(hypothesis.tokens))) == 0.0


@pytest.mark.parametrize("engine", ["native", "torch"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), phrases=letter_lists)
def test_letters_with_a_delimiter_equal_the_slow_twin(engine, seed, phrases):
    emitted = log_probs_of(seed, 1, 18, LETTERS.size)
    fusion = HotWordFusion(PhraseAutomaton(LETTERS.size, phrases, head=1))
    nbests = search(emitted, [fusion], engine, LETTERS, beam=5)
    compare_with_twin(nbests, *emitted, 5, LETTERS, [Counted(phrases, LETTERS, head=1).fusion(1.0)])


@settings(max_examples=60, deadline=None)
@given(phrases=phrase_lists, more=phrase_lists, path=st.lists(st.integers(1, 4), max_size=14))
def test_the_automaton_pays_what_counting_pays(phrases, more, path):
    automata = [PhraseAutomaton(len(PIECES), entries) for entries in (more, phrases)]
    tensors = PhraseTensors(automata, torch.device("cpu"))
    slow, paid = Counted(phrases, TOKENS), 0.0
    node = torch.tensor(tensors.bases[automata[1]])
    most = np.concatenate([automaton.most for automaton in automata])
    for at, piece in enumerate(path):
        piece = torch.tensor(piece)
        change = float(tensors.score(node, piece, torch.tensor(TOKENS.starts_word)[piece]))
        assert change <= most[int(node)] and abs(change) <= automata[1].reach
        paid, node = paid + change, tensors.next(node, piece)
        assert abs(paid - slow.paid(tuple(path[: at + 1]))) < COUNT
    paid += float(tensors.complete[node] - tensors.pending[node])
    assert abs(paid - slow.complete(tuple(path))) < COUNT


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), phrases=phrase_lists, weight=st.sampled_from([0.5, 400.0]),
       options=st.sampled_from([{}, {"score_beam": 3.0}, {"blank_skip": 0.6}, {"recover_mass": True},
                                {"top_pieces": 3}]))
def test_compiled_search_finds_what_tensors_find(seed, phrases, weight, options):
    emitted = log_probs_of(seed, 3, 20, len(PIECES))
    both = [search(emitted, [HotWordFusion(PhraseAutomaton(len(PIECES), phrases), weight)], engine, **options)
            for engine in ("native", "torch")]
    for native, tensors in zip(*both):
        most = max(1, min(len(native), len(tensors)) - 1)  # the last may tie with one that is not there
        totals = [[hypothesis.total for hypothesis in nbest][:most] for nbest in (native, tensors)]
        assert totals[0] == pytest.approx(totals[1], abs=2e-3, rel=1e-5)
        assert native[0].scores == pytest.approx(tensors[0].scores, abs=1e-3, rel=1e-5)


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("trigger", [ShortestHypothesis(), FixedInterval(5)], ids=names)
def test_hot_words_stand_beside_an_ngram_and_a_language_model(
    llm, ngram, tokens, trigger, engine  # noqa: F811
):
    emitted = emissions(seed=3)
    phrases = [("the sea", 3.0), ("a", 0.5), ("sea", 1.5), ("bing", 2.0)]
    delayed = DelayedFusion(llm, 0.4, 0.5, trigger)
    fusions = [HotWordFusion(phrases, 0.8), NgramFusion(ngram, 0.3, 0.2), delayed]
    nbests = search(emitted, fusions, engine, tokens, beam=4)
    spelled = [(tuple(tokens.encode(text)), boost) for text, boost in phrases]
    trigger = SLOW_TRIGGERS[type(trigger).__name__](trigger)
    slow = [Counted(spelled, tokens).fusion(0.8), slow_ngram(ngram, 0.3, 0.2)]
    slow.append(slow_delayed(llm, 0.4, 0.5, trigger))
    compare_with_twin(nbests, *emitted, 4, tokens, slow)


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("options", [{}, {"blank_skip": 0.6}, {"recover_mass": True}], ids=str)
def test_weight_zero_and_no_phrases_change_nothing_bit_for_bit(options, engine):
    emitted = log_probs_of(7, 4, 60, len(PIECES))
    bare = search(emitted, [], engine, **options)
    for fusion in (HotWordFusion(["a c", "cd"], 0.0), HotWordFusion([], 1.0), HotWordFusion([("ab", 0.0)])):
        found = search(emitted, [fusion], engine, **options)
        for one, other in zip(bare, found):
            if fusion.weight == 0.0:
                assert [(h.tokens, h.scores["ctc"], h.total) for h in one] == [
                    (h.tokens, h.scores["ctc"], h.total) for h in other]
            else:
                assert [h.tokens for h in one] == [h.tokens for h in other]
                assert {h.scores["hotwords"] for h in other} == {0.0}
                assert [h.total for h in one] == pytest.approx([h.total for h in other], abs=1e-4)


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("groups", [None, 2])
def test_each_utterance_has_its_own_phrases_whatever_its_batch(llm, engine, groups):  # noqa: F811
    log_probs, lens = log_probs_of(11, 5, 30, len(PIECES))
    lens[3], shared = 0, [("a c", 2.5)]
    phrases = {"one": ["ab"], "two": shared, "three": [], "four": ["cd"], "five": shared}
    ids = list(phrases)

    def decode(rows):
        fusions = [HotWordFusion(phrases), DelayedFusion(llm, 0.1, 0.0, FixedInterval(7))]
        return search((log_probs[rows], lens[rows]), fusions, engine, ids=[ids[row] for row in rows],
                      groups=groups if len(rows) > 1 else None)

    together = decode(list(range(5)))
    for row, name in enumerate(ids):
        assert [h.tokens for h in together[row]] == [h.tokens for h in decode([row])[0]]
        counted = Counted([(tuple(TOKENS.encode(p[0])), p[1]) if isinstance(p, tuple)
                           else (tuple(TOKENS.encode(p)), 5.0) for p in phrases[name]], TOKENS)
        for one, other in zip(together[row], decode([row])[0]):
            assert one.scores == pytest.approx(other.scores, abs=1e-4)
            assert one.scores["hotwords"] == pytest.approx(counted.complete(tuple(one.tokens)), abs=1e-4)


def test_a_boost_moves_a_phrase_to_the_front_and_a_part_of_it_does_not():
    emitted = log_probs_of(5, 1, 40, len(PIECES))
    bare = search(emitted, [])[0]
    assert "ab c" not in bare[0].text
    found = search(emitted, [HotWordFusion([("ab c", 30.0)])])[0]
    words = found[0].words()
    count = sum(pair == ("ab", "c") for pair in zip(words, words[1:]))
    assert count > 0 and found[0].scores["hotwords"] == 30.0 * count


def test_thousands_of_phrases_are_one_automaton():
    rng = np.random.default_rng(0)
    entries = {(1, *rng.integers(1, 5, rng.integers(1, 9)).tolist()): 2.0 for _ in range(5000)}
    automaton = PhraseAutomaton(len(PIECES), list(entries.items()))
    assert len(automaton) == 1 + len({ids[:n] for ids in entries for n in range(1, len(ids) + 1)})
    assert (automaton.shorter[1:] < np.arange(1, len(automaton))).all()
    emitted = log_probs_of(1, 2, 40, len(PIECES))
    both = [search(emitted, [HotWordFusion(automaton)], engine) for engine in ("native", "torch")]
    for native, tensors in zip(*both):
        assert native[0].tokens == tensors[0].tokens
        assert native[0].scores == pytest.approx(tensors[0].scores, abs=1e-3)


def test_an_engine_of_one_list_gives_way_with_one_warning(caplog, monkeypatch):
    emitted = log_probs_of(2, 2, 20, len(PIECES))
    two = [HotWordFusion(["ab"]), HotWordFusion(["cd"], source="others")]
    expected = search(emitted, two, "torch")
    fewer = engines.ENGINES["native"]._replace(shallow="one")  # as the GPU kernel serves
    monkeypatch.setitem(engines.ENGINES, "native", fewer)
    engines.tell.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = [search(emitted, two) for _ in range(2)]
    assert results(found[0]) == results(found[1]) == results(expected)
    assert len(caplog.records) == 1 and "one list of phrases (hotwords, others)" in caplog.text
    with pytest.raises(ValueError, match="engine must be auto or torch"):
        search(emitted, two, "native")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; has never run on one")
def test_a_gpu_finds_the_same():
    log_probs, lens = log_probs_of(3, 4, 40, len(PIECES))
    here = search((log_probs, lens), [HotWordFusion(["ab", "a c"])])
    there = search((log_probs.cuda(), lens.cuda()), [HotWordFusion(["ab", "a c"])])
    for one, other in zip(here, there):
        assert one[0].tokens == other[0].tokens
        assert one[0].scores == pytest.approx(other[0].scores, abs=1e-3)


@pytest.mark.parametrize(("phrases", "message"), [
    ([""], r"phrases\[0\] must not be empty"),
    (["ab", "  "], r"phrases\[1\] must not be empty"),
    (["xyz"], "phrases must be spelled by the acoustic pieces .*, but is 'xyz'"),
    (["AB"], "phrases must be spelled"),
    ([("ab", float("nan"))], "boost of the phrase 'ab' must be a number of nats from -1000 to 1000"),
    ([("ab", 2000)], "boost of the phrase 'ab' must be a number"),
    ([("ab", 1.0), ("ab", 2.0)], "the phrase 'ab' must have one boost"),
    ({"other": []}, "phrases must have a list for each utterance, but is '0'"),
])
def test_bad_phrases_are_named(phrases, message):
    with pytest.raises(ValueError, match=message):
        search(log_probs_of(0, 1, 5, len(PIECES)), [HotWordFusion(phrases)])


def test_bad_arguments_are_named():
    emitted = log_probs_of(0, 1, 5, len(PIECES))
    for bad in ("ab", 3, [("ab", 1.0, 2.0)], [3], {"0": "ab"}):
        with pytest.raises(TypeError, match="phrases"):
            HotWordFusion(bad)
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="HotWordFusion.weight must be finite and at least 0"):
            HotWordFusion([], bad)
    with pytest.raises(ValueError, match="tokens must be passed to the search for hot words"):
        search(emitted, [HotWordFusion([])], vocabulary=None)
    with pytest.raises(ValueError, match="phrases must be over 7 acoustic pieces, but is 4"):
        search(emitted, [HotWordFusion(PhraseAutomaton(4, []))])
    for bad, message in (([((), 1.0)], "at least one piece"), ([((9,), 1.0)], "pieces below 7"),
                         ([((1,), 1.0), ((1,), 1.0)], "each phrase once"), ([((1,), "x")], "number of nats")):
        with pytest.raises(ValueError, match=message):
            PhraseAutomaton(len(PIECES), bad)


def test_a_file_of_phrases(tmp_path):
    path = tmp_path / "hot.txt"
    path.write_text("a  c\t2.5\n\nab\ncd\t-1\n", encoding="utf-8")
    assert read_hotwords(path, 4.0) == [("a c", 2.5), ("ab", 4.0), ("cd", -1.0)]
    assert len(make_automaton(read_hotwords(path), TOKENS)) == 6
    for content, message in (("ab\nx\tnan\n", ":2 must be a number of nats"),
                             ("ab\tmuch\n", ":1 must be a number"),
                             ("\t3\n", ":1 must have a phrase"), ("ab\t1\t2\n", ":1 must be a number")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_hotwords(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be UTF-8 text"):
        read_hotwords(path)
    with pytest.raises(FileNotFoundError, match="no file of hot words"):
        read_hotwords(tmp_path / "absent")
