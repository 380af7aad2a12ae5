"""Language models and encoders that fail while streams are decoded: who is hit, who is not, what is said.
Knows: tiny models, noise. Must not know: how a stream is decoded.

The models are real; a hook on one of their layers raises.
"""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from stream_tools import (
    OPTIONS,
    SEARCH,
    decode_in_packets,
    failing,
    fusions_of,
    layer_of,
    noise,
    same,
    whole,
)

from icefall_fusion.fusion import DelayedFusion, FixedInterval, LookAhead
from icefall_fusion.lm.tree_lanes import TreeLanes
from icefall_fusion.lm.tree_memory import TreeCache, TreeLayer
from icefall_fusion.ngram.piece_ngram import PieceNgram
from icefall_fusion.streaming import EndpointOptions, StreamingDecoder

FORGETFUL = replace(OPTIONS, window=0.6, context_words=4)
AHEAD = "look-ahead", "late look-ahead", "late, seldom ahead"


@pytest.mark.parametrize("name", ["shortest", "late", *AHEAD, "interval", "at-end", "hotwords"])
def test_a_dead_llm_is_no_llm(made, name) -> None:
    audio = noise(1, 41_003)
    fusions = [f for f in fusions_of(made, name) if not isinstance(f, DelayedFusion)]
    wanted = whole(made[0], [audio], fusions, names=["talk"])[0]
    decoder = StreamingDecoder(made[0], fusions_of(made, name), SEARCH, OPTIONS)
    with failing(layer_of(made[1]), range(10_000)):
        found = decode_in_packets(decoder, audio, [3000])
    if name not in AHEAD:  # which stays as a guide
        assert [h.tokens for h in found] == [h.tokens for h in wanted]
        for one, other in zip(found, wanted):
            assert one.scores["llm"] == 0 and one.total == pytest.approx(other.total, abs=1e-3)
    check_totals(found)
    assert found.weights["llm"] == 0


def check_totals(nbest) -> None:
    for one in nbest:
        total = sum(weight * one.scores[source] for source, weight in nbest.weights.items())
        assert one.total == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("name", ["shortest", "late", *AHEAD, "both", "hotwords"])
@pytest.mark.parametrize("first", [1, 5, 9])
@pytest.mark.parametrize("options", [OPTIONS, FORGETFUL], ids=["", "forgetful"])
def test_an_llm_that_fails_midway_is_taken_out_of_all_hypotheses(made, name, first, options) -> None:
    audio = noise(6, 90_007)
    decoder = StreamingDecoder(made[0], fusions_of(made, name), replace(SEARCH, beam=3), options)
    with failing(layer_of(made[1]), range(first, 10_000)) as calls:
        stream, before = decoder.open("talk"), ""
        for start in range(0, len(audio), 3000):
            stream.accept(audio[start : start + 3000])
            committed = stream.partial().committed
            assert (committed + " ").startswith(before + " " if before else "")
            before = committed
        warnings = stream.take_warnings()
        found = stream.finish()
    warnings += stream.take_warnings()
    assert calls[0] == first + 1  # it is not asked again
    assert len(warnings) == 1 and "'llm' failed (RuntimeError: call" in warnings[0]
    assert found.weights["llm"] == 0 and all(h.scores["llm"] == 0 for h in found)
    check_totals(found)
    totals = [h.total for h in found]
    assert totals == sorted(totals, reverse=True) and found[0].text.startswith(before)
    found = decode_in_packets(decoder, noise(1, 41_003), [4000])
    if options is OPTIONS:
        same(found, whole(made[0], [noise(1, 41_003)], fusions_of(made, name), replace(SEARCH, beam=3),
                          names=["talk"])[0])


@pytest.mark.parametrize("name", ["shortest", "prompt"])
def test_the_failure_of_one_stream_is_not_that_of_others(made, name) -> None:
    """The call of all fails, then the first of those of each alone: one stream goes on without the LLM."""
    audio = [noise(seed, 36_000) for seed in (1, 2, 3)]
    wanted = whole(made[0], audio, fusions_of(made, name), names=["0", "1", "2"])
    for first in (0, 3, 6):
        decoder = StreamingDecoder(made[0], fusions_of(made, name), SEARCH, OPTIONS)
        streams = [decoder.open() for _ in audio]
        with failing(layer_of(made[1]), (first, first + 1)) as calls:
            for start in range(0, 36_000, 4000):
                for stream, samples in zip(streams, audio):
                    stream.accept(samples[start : start + 4000])
                decoder.decode()
            found = decoder.finish(streams)
        hit = [n for n, stream in enumerate(streams) if stream.take_warnings()]
        assert calls[0] > first + 4
        assert len(hit) == 1, hit
        for number, (nbest, other) in enumerate(zip(found, wanted)):
            if number in hit:
                assert nbest.weights["llm"] == 0
            else:
                same(nbest, other)


def test_the_next_segment_tries_the_llm_again(made) -> None:
    options = replace(OPTIONS, endpoint=EndpointOptions(silence=0, pause=0, longest=1.0))
    decoder = StreamingDecoder(made[0], fusions_of(made, "shortest"), SEARCH, options)
    with failing(layer_of(made[1]), (0,)):
        stream = decoder.open("talk")
        stream.accept(noise(9, 64_000))
        last = stream.finish()
    segments = [*stream.take_segments(), last]
    assert [n.weights["llm"] for n in segments][:4] == [0.0, 0.4, 0.4, 0.4]
    assert segments[1][0].scores["llm"] < 0 and len(stream.take_warnings()) == 1


def test_scores_that_are_no_numbers_are_a_failure(made) -> None:
    layer = layer_of(made[1])
    handle = layer.register_forward_hook(lambda *_: torch.full_like(_[2], torch.nan)
                                         if isinstance(_[2], torch.Tensor) else _[2])
    try:
        decoder = StreamingDecoder(made[0], fusions_of(made, "shortest"), SEARCH, OPTIONS)
        stream = decoder.open("talk")
        stream.accept(noise(1, 41_003))
        found = stream.finish()
    finally:
        handle.remove()
    wanted = whole(made[0], [noise(1, 41_003)])[0]
    assert [h.tokens for h in found] == [h.tokens for h in wanted]
    assert "NaN" in stream.take_warnings()[0]


def test_a_broken_stream_is_not_that_of_others(made) -> None:
    """One stream's audio gives no log-probs: it ends with an error, its memory is free, the others go on."""
    audio = noise(2, 36_000)
    wanted = whole(made[0], [audio], fusions_of(made, "shortest"), names=["good"])[0]
    decoder = StreamingDecoder(made[0], fusions_of(made, "shortest"), SEARCH, replace(OPTIONS, streams=2))
    good, bad = decoder.open("good"), decoder.open("bad")
    loud = np.full(36_000, 3e38, np.float32)  # its power is infinite
    for start in range(0, 36_000, 6000):
        good.accept(audio[start : start + 6000])
        if start == 0:
            bad.accept(loud)
        decoder.decode()
    with pytest.raises(ValueError, match="bad"):
        bad.partial()
    with pytest.raises(ValueError, match="bad"):
        bad.accept(audio)
    assert decoder.streams == [good]
    other = decoder.open("other")
    same(good.finish(), wanted)
    other.close()


def test_an_encoder_that_fails_breaks_the_streams_of_its_round(made) -> None:
    audio = noise(2, 36_000)
    decoder = StreamingDecoder(made[0], fusions_of(made, "shortest"), SEARCH, OPTIONS)
    streams, idle = [decoder.open(), decoder.open()], decoder.open("idle")
    with failing(made[0].ctc.linear, (0,)):
        for stream in streams:
            stream.accept(audio[:10_000])
        decoder.decode()
    for stream in streams:
        with pytest.raises(RuntimeError, match="call 0 fails"):
            stream.partial()
    idle.accept(audio)
    same(idle.finish(), whole(made[0], [audio], fusions_of(made, "shortest"), names=["idle"])[0])
    assert not decoder.streams


def test_a_stream_that_cannot_begin_takes_no_lane(made) -> None:
    """What is wrong is told each time, not that the lanes of the language model are in use."""
    other = DelayedFusion(made[1], 0.3, trigger=FixedInterval(5), source="other")
    unlike = [DelayedFusion(made[1], 0.4), other]
    decoder = StreamingDecoder(made[0], unlike, SEARCH, replace(OPTIONS, streams=2))
    for _ in range(4):
        with pytest.raises(ValueError, match="have one stop rule together in a stream"):
            decoder.open()
    assert not decoder.streams


def test_a_look_ahead_of_another_size_takes_no_lane(made, tmp_path) -> None:
    letters = ["<blk>", "▁a", "b"]
    path = tmp_path / "letters.arpa"
    path.write_text(tiny.arpa_text("\n".join(f"-1.0\t{piece}" for piece in ["<s>", "</s>", *letters])))
    look = LookAhead(PieceNgram.load(path, letters))
    decoder = StreamingDecoder(made[0], [DelayedFusion(made[1], 0.4, look_ahead=look)], SEARCH,
                               replace(OPTIONS, streams=2))
    for _ in range(4):
        with pytest.raises(ValueError, match="be over .* acoustic pieces, but is '?3"):
            decoder.open()


def test_a_lane_is_given_back_once(made) -> None:
    lanes = TreeLanes(made[1], 2)
    tree = lanes.open_tree(1)
    tree.close()
    tree.close()
    assert [lanes.open_tree(1).lane for _ in "12"] == [0, 1]


def test_tokens_are_counted_once_if_the_call_of_all_fails(made) -> None:
    counts = []
    for calls in ((), (0,)):
        lanes = TreeLanes(made[1], 2)
        trees = [lanes.open_tree(1) for _ in "12"]
        with failing(layer_of(made[1]), calls):
            nodes = [tree.insert(tree.root(0), made[1].encode("the sea at dawn")) for tree in trees]
            for wait in [tree.launch(torch.tensor([node])) for tree, node in zip(trees, nodes)]:
                wait()
        own = [(tree.stats()["lm_tokens_forwarded"], tree.stats()["lm_tokens_recomputed"]) for tree in trees]
        counts.append((lanes.counters.lm_tokens_forwarded, own))
    assert counts[0][0] > 0 and counts[1] == counts[0]


def test_bad_names_and_contexts_are_named(made) -> None:
    decoder = StreamingDecoder(made[0], [], SEARCH, OPTIONS)
    for arguments, message in (({"name": 5}, "name must be"), ({"context": None}, "context must be")):
        with pytest.raises((TypeError, ValueError), match=message):
            decoder.open(**arguments)


def test_memory_that_runs_out_between_layers_leaves_no_small_ones(monkeypatch) -> None:
    cache, states, calls = TreeCache(3, 1, 64), torch.ones(1, 2, 5, 4), []
    for layer in cache.layers:
        layer.lazy_initialization(states, states)
    plain = TreeLayer.grow

    def grow(layer) -> None:
        calls.append(layer)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        plain(layer)

    monkeypatch.setattr(TreeLayer, "grow", grow)
    with pytest.raises(torch.OutOfMemoryError):
        cache.ensure(96, 2)
    cache.ensure(96, 2)
    assert {(layer.keys.shape, layer.values.shape) for layer in cache.layers} == {
        (torch.Size([2, 96, 2, 4]), torch.Size([2, 96, 2, 4]))}
