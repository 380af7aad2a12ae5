"""Endless audio: what is committed stays, what is forgotten changes nothing, memory stays flat; endpoints.
Knows: tiny models, noise. Must not know: how a stream is decoded.
"""
from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from stream_tools import NAMES, OPTIONS, SEARCH, decode_in_packets, fusions_of, noise, same, whole

from icefall_fusion.fusion import DelayedFusion
from icefall_fusion.fusion.streaming import DelayedStream
from icefall_fusion.lm.tree_lanes import TreeLanes
from icefall_fusion.streaming import EndpointOptions, StreamingDecoder, StreamOptions
from icefall_fusion.streaming.endpoint import Endpoint
from icefall_fusion.streaming.segment import Segment

FORGETFUL = replace(OPTIONS, window=0.6)


NARROW = replace(SEARCH, beam=3)  # hypotheses agree sooner


def spy_on(monkeypatch, name):
    """Note the state of fusions at each call of one of their methods."""
    calls, plain = [], getattr(DelayedStream, name)

    def noted(self, *arguments):
        calls.append(self._cut)
        return plain(self, *arguments)

    monkeypatch.setattr(DelayedStream, name, noted)
    return calls


@pytest.mark.parametrize(("name", "change"), [
    *((name, {}) for name in NAMES), ("shortest", {"recover_mass": True}),
    ("look-ahead", {"blank_skip": 0.6}),
])
def test_forgetting_changes_nothing(made, monkeypatch, name, change) -> None:
    audio, search = noise(6, 90_007), replace(NARROW, **change)
    cuts = spy_on(monkeypatch, "cut")
    wanted = whole(made[0], [audio], fusions_of(made, name), search, names=["talk"])[0]
    decoder = StreamingDecoder(made[0], fusions_of(made, name), search, FORGETFUL)
    found = decode_in_packets(decoder, audio, [1000, 4000])
    same(found, wanted, times=False)
    assert found[0].times == wanted[0].times
    never = ("none", "ngram", "at-end", "nlm", "nlm, late llm")  # no LLM that hears of cuts
    assert name in never or len(set(cuts)) > 2


def test_the_llm_keeps_the_last_words_as_its_context(made, monkeypatch) -> None:
    audio, lm = noise(7, 120_000), made[1]
    renewals = spy_on(monkeypatch, "_renew_tree")
    fusion = DelayedFusion(lm, 0.4, 0.5, prompt="a cat met")
    decoder = StreamingDecoder(made[0], [fusion], NARROW, replace(FORGETFUL, context_words=4))
    found = decode_in_packets(decoder, audio, [5000])
    assert len(renewals) > 2
    for hypothesis in found:
        words, score = hypothesis.words(), 0.0
        for first, last in zip([0, *renewals], [*renewals, len(words)]):
            prompt = " ".join(["a", "cat", "met", *words[:first]][-4:])
            text = "".join(f" {word}" for word in words[first:last])
            score += lm.log_prob(text, prompt, eos=last == len(words))
        assert hypothesis.scores["llm"] == pytest.approx(score, abs=1e-3)
        total = hypothesis.scores["ctc"] + 0.4 * score + 0.5 * len(words)
        assert hypothesis.total == pytest.approx(total, abs=1e-3)


def test_a_forgetful_llm_of_weight_0_changes_nothing(made, monkeypatch) -> None:
    acoustic = copy.deepcopy(made[0])
    with torch.no_grad():  # surer: hypotheses agree without a language model
        acoustic.ctc.linear.weight.mul_(6)
        acoustic.ctc.linear.bias.mul_(3)
    audio, renewals = noise(6, 90_007), spy_on(monkeypatch, "_renew_tree")
    plain = whole(acoustic, [audio], [], NARROW)[0]
    options = replace(FORGETFUL, context_words=2)
    decoder = StreamingDecoder(acoustic, [DelayedFusion(made[1], 0.0)], NARROW, options)
    found = decode_in_packets(decoder, audio, [5000])
    assert [h.tokens for h in found] == [h.tokens for h in plain]
    assert len(renewals) > 1


@pytest.mark.parametrize("after", [None, 0.4, 2.0])
@pytest.mark.parametrize("late", [0, 4])
def test_committed_text_only_grows(made, after, late) -> None:
    audio = noise(8, 120_000)
    options = replace(FORGETFUL, commit_after=after, context_words=6)
    decoder = StreamingDecoder(made[0], [DelayedFusion(made[1], 0.6, 0.5, late=late)], NARROW, options)
    stream, before, waits = decoder.open(), "", []
    for start in range(0, len(audio), 2560):
        stream.accept(audio[start : start + 2560])
        partial = stream.partial()
        words = [word.word for word in partial.words]
        assert (partial.committed + " ").startswith(before + " " if before else "")
        assert words == [*partial.committed.split(), *partial.unstable.split()]
        assert words[: partial.stable] == partial.committed.split() and 0 <= partial.age < 0.5
        starts = [word.start for word in partial.words]
        assert starts == sorted(starts)
        before = partial.committed
        waits.append(start / 16000 - partial.words[partial.stable - 1].end if partial.stable else 0.0)
    found = stream.finish()
    assert found[0].text.startswith(before) and len(before.split()) > 10
    if after is not None:
        assert max(waits[10:]) < after + 1.0


def test_memory_is_flat(made) -> None:
    """Eight minutes of log-probs: nothing that a segment holds, but the text, grows after the first three."""
    acoustic, lm, ngram = made
    generator = torch.Generator().manual_seed(3)
    lanes = TreeLanes(lm, 1)
    fusion = DelayedStream(DelayedFusion(lm, 0.3, 0.5), lanes, (), 20)
    search = replace(SEARCH, frame_shift=0.04)
    segment = Segment(acoustic.tokens, search, [fusion], "talk", 0, 100, 75)
    bias = torch.zeros(acoustic.tokens.size)
    bias[acoustic.tokens.blank_id] = 6.0
    peaks = []
    for _minute in range(8):
        most = np.zeros(8)
        for _ in range(94):
            logits = 2.5 * torch.randn(16, acoustic.tokens.size, generator=generator) + bias
            for _ in segment.decode(logits.log_softmax(1)):
                lanes.run()
            tree = fusion._tree
            held = segment._search
            sizes = (held.frames, held.beam.arena.fields[0].numel(), held._log_probs.numel(), len(tree.tree),
                     tree.tree.slots.capacity, lanes.cache.kv_bytes, len(fusion._word_nodes),
                     tree._store.log_probs.numel())
            most = np.maximum(most, sizes)
        peaks.append(most)
    early, late = np.max(peaks[:3], 0), np.max(peaks[3:], 0)
    assert (late <= 1.5 * early).all(), (early, late)
    assert segment.frames == 8 * 94 * 16 and len(segment.words().words) > 300


def test_endpoints_cut_a_stream_into_segments(made) -> None:
    endpoint = EndpointOptions(silence=0, pause=0, longest=1.0)
    audio, names = noise(9, 64_000), []
    fusion = DelayedFusion(made[1], 0.4, 0.5)
    for packet in (700, 20_000):
        decoder = StreamingDecoder(made[0], [fusion], SEARCH, replace(OPTIONS, endpoint=endpoint))
        stream, segments = decoder.open("talk"), []
        for start in range(0, len(audio), packet):
            stream.accept(audio[start : start + packet])
            assert stream.partial().segment == len(segments) + len(stream._done)
            segments += stream.take_segments()
        segments.append(stream.finish())
        names.append([(h.text, h.times) for nbest in segments for h in nbest])
        assert len(segments) == 4 + (len(audio) > 4 * 16000)
        for number, nbest in enumerate(segments):
            times = nbest[0].times
            assert all(number <= t.start < t.end <= number + 1.001 for t in times)
    assert names[0] == names[1]
    # the second segment is decoded after the first one's text
    prompted = [n for n in segments if n.hypotheses][1]
    wanted = made[1].log_prob(" " + prompted[0].text, segments[0][0].text, eos=True)
    assert prompted[0].scores["llm"] == pytest.approx(wanted, abs=1e-3)


def test_endpoint_rules() -> None:
    options = EndpointOptions(silence=0.4, pause=0.2, longest=2.0)

    def ends(frames):
        return Endpoint(options, 0.04).find(frames)

    assert ends([True] * 9) is None and ends([True] * 12) == 10  # rule 1
    assert ends([False] + [True] * 4 + [False]) is None and ends([True, False] + [True] * 9) == 7  # rule 2
    assert ends([False] * 60) == 50 and ends([True, False] * 30) == 50  # rule 3
    assert Endpoint(None, 0.04).find([True] * 1000) is None
    split = Endpoint(options, 0.04)
    assert [split.find([False, True]), split.find([True, True]), split.find([True, True])] == [None, None, 2]


def test_streams_that_vanish_leave_nothing(made) -> None:
    options = replace(OPTIONS, streams=2)
    decoder = StreamingDecoder(made[0], [DelayedFusion(made[1], 0.4)], SEARCH, options)
    for _ in range(5):
        streams = [decoder.open(), decoder.open()]
        with pytest.raises(ValueError, match="at most 2"):
            decoder.open()
        for stream in streams:
            stream.accept(noise(1, 20_000))
        decoder.decode()
        for stream in streams:
            stream.close()
        with pytest.raises(ValueError, match="open"):
            streams[0].accept(noise(1, 100))
    same(decode_in_packets(decoder, noise(1, 20_000), [3000]),
         whole(made[0], [noise(1, 20_000)], [DelayedFusion(made[1], 0.4)], names=["talk"])[0])


@pytest.mark.parametrize(("make", "message"), [
    (lambda: StreamOptions(window=0), "StreamOptions.window"),
    (lambda: StreamOptions(commit_after=-1.0), "StreamOptions.commit_after"),
    (lambda: StreamOptions(streams=0), "StreamOptions.streams"),
    (lambda: StreamOptions(endpoint=2), "StreamOptions.endpoint"),
    (lambda: EndpointOptions(pause=-1), "EndpointOptions.pause"),
])
def test_bad_options_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_keys_and_values_are_there_for_the_streams_that_there_were(made) -> None:
    """A decoder that may hold many streams has memory for the lanes in use; the lowest is taken again."""
    lanes = TreeLanes(made[1], 6)
    trees = [lanes.open_tree(1)]

    def score(tree):
        return float(tree.score([tree.insert(tree.root(0), made[1].encode("the sea at dawn"))])[0])

    wanted = score(trees[0])
    one = lanes.cache.kv_bytes
    assert one > 0
    for count, held in ((2, 2), (3, 4), (5, 6), (6, 6)):
        while len(trees) < count:
            trees.append(lanes.open_tree(1))
        assert score(trees[-1]) == pytest.approx(wanted, abs=1e-5)
        assert lanes.cache.kv_bytes == held * one
    with pytest.raises(ValueError, match="free, but is '6 in use'"):
        lanes.open_tree(1)
    below = trees[0].insert(trees[0].root(0), made[1].encode("the sea at dawn the cat"))
    fresh = made[1].open_tree(1)  # what was written before the buffers grew is still there
    same = fresh.insert(fresh.root(0), made[1].encode("the sea at dawn the cat"))
    assert float(trees[0].score([below])[0]) == pytest.approx(float(fresh.score([same])[0]), abs=1e-4)
    for number in (4, 1):
        trees[number].close()
    assert [lanes.open_tree(1).lane for _ in "12"] == [1, 4]


@pytest.mark.parametrize("name", ["ngram", "both"])
def test_dropped_hypotheses_leave_the_scores_of_pieces_to_their_own(made, name) -> None:
    """What commitment by time drops was not the last: those behind it keep their states of n-grams."""
    ngram = made[2]
    options = replace(OPTIONS, commit_after=0.2)
    decoder = StreamingDecoder(made[0], fusions_of(made, name), SEARCH, options)
    for hypothesis in decode_in_packets(decoder, noise(8, 90_000), [2560]):
        ids = torch.tensor([ngram.start_id, *hypothesis.tokens, ngram.end_id])
        score = float(ngram.score_sentences(ids)[0].sum())
        assert hypothesis.scores["ngram"] == pytest.approx(score, abs=1e-2)
