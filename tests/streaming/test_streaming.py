"""Streaming decoding: packets, batches and chunks change nothing; the whole with a chunk mask is the oracle.
Knows: tiny models, noise. Must not know: how a stream is decoded.
"""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_tools import CHUNK, NAMES, OPTIONS, SEARCH, decode_in_packets, fusions_of, noise, same, whole

from icefall_fusion.acoustic.models import ChunkOptions
from icefall_fusion.data.fbank import extract
from icefall_fusion.data.features import pad_features
from icefall_fusion.fusion import DelayedFusion, FixedInterval
from icefall_fusion.fusion.hotwords import HotWordFusion
from icefall_fusion.fusion.triggers import frames_of
from icefall_fusion.search import ctc_greedy_search
from icefall_fusion.streaming import EndpointOptions, StreamingDecoder, StreamOptions


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_equals_the_whole(made, name) -> None:
    audio = noise(1, 41_003)
    wanted = whole(made[0], [audio], fusions_of(made, name), names=["talk"])[0]
    decoder = StreamingDecoder(made[0], fusions_of(made, name), SEARCH, OPTIONS)
    assert len(wanted[0].words()) > 5
    same(decode_in_packets(decoder, audio, [1600]), wanted)
    assert not decoder.streams


@pytest.mark.parametrize("samples", [0, 1, 79, 80, 399, 400, 640, 2559, 2560, 2561, 5120, 5200])
def test_short_streams(made, samples) -> None:
    audio = noise(2, samples)
    wanted = whole(made[0], [audio], fusions_of(made, "shortest"), names=["talk"])[0]
    decoder = StreamingDecoder(made[0], fusions_of(made, "shortest"), SEARCH, OPTIONS)
    same(decode_in_packets(decoder, audio, [1000]), wanted)


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(NAMES),
    sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=6),
    listen=st.integers(1, 5),
    chunk=st.sampled_from([ChunkOptions(2, 3), CHUNK, ChunkOptions(6, None), ChunkOptions(16, 1)]),
    options=st.sampled_from([SEARCH, replace(SEARCH, recover_mass=True), replace(SEARCH, blank_skip=0.6),
                             replace(SEARCH, beam=3, score_beam=8.0, top_pieces=4, nbest=2)]),
)
def test_packets_change_nothing(made, name, sizes, listen, chunk, options) -> None:
    audio = noise(3, 30_011)
    if sum(sizes) < 20 * len(sizes):
        sizes = [*sizes, 4000]
    wanted = whole(made[0], [audio], fusions_of(made, name), options, chunk, ["talk"])[0]
    decoder = StreamingDecoder(made[0], fusions_of(made, name), options, StreamOptions(chunk=chunk))
    same(decode_in_packets(decoder, audio, sizes, listen), wanted)


@settings(deadline=None, max_examples=15)
@given(
    name=st.sampled_from(NAMES),
    begins=st.lists(st.integers(0, 9), min_size=2, max_size=5),
    seed=st.integers(0, 3),
)
def test_streams_of_any_phase_share_a_decoder(made, name, begins, seed) -> None:
    rng = np.random.default_rng(seed)
    audio = [noise(10 + n, int(rng.integers(0, 30_000))) for n in range(len(begins))]
    names = [f"talk-{n}" for n in range(len(begins))]
    wanted = [whole(made[0], [a], fusions_of(made, name), names=[n])[0] for a, n in zip(audio, names)]
    decoder = StreamingDecoder(made[0], fusions_of(made, name), SEARCH, replace(OPTIONS, streams=len(begins)))
    streams, places, found = [None] * len(begins), [0] * len(begins), {}
    for clock in range(60):
        ending = []
        for n, begin in enumerate(begins):
            if clock < begin or n in found:
                continue
            if streams[n] is None:
                streams[n] = decoder.open(names[n])
            step = int(rng.integers(500, 4000))
            streams[n].accept(audio[n][places[n] : places[n] + step])
            places[n] += step
            if places[n] >= len(audio[n]):
                ending.append(n)
        decoder.decode()
        found.update(zip(ending, decoder.finish([streams[n] for n in ending])))
    for n in range(len(begins)):
        same(found[n], wanted[n])


def test_events_of_streams_are_one_call(made) -> None:
    audio = noise(4, 32_000)
    calls, tokens = [], []
    for count in (1, 4):
        decoder = StreamingDecoder(made[0], fusions_of(made, "shortest"), SEARCH, OPTIONS)
        streams = [decoder.open() for _ in range(count)]
        for start in range(0, len(audio), 3200):
            for stream in streams:
                stream.accept(audio[start : start + 3200])
            decoder.decode()
        texts = {nbest[0].text for nbest in decoder.finish(streams)}
        assert len(texts) == 1
        calls.append(decoder.stats()["lm_forwards"])
        tokens.append(decoder.stats()["lm_tokens_forwarded"])
    assert calls[0] == calls[1] > 5
    assert 4 * tokens[0] == tokens[1] >= 4 * calls[0]


def test_triggers_have_times() -> None:
    assert FixedInterval.of_time(640) == FixedInterval(16)
    assert [frames_of(1), frames_of(100), frames_of(100, 0.02)] == [1, 2, 5]
    with pytest.raises(ValueError, match="milliseconds"):
        frames_of(0)


def test_weight_0_is_no_language_model(made) -> None:
    audio = noise(5, 40_000)
    lists = []
    for fusions in ([], [DelayedFusion(made[1], 0.0)]):
        decoder = StreamingDecoder(made[0], fusions, SEARCH, OPTIONS)
        lists.append(decode_in_packets(decoder, audio, [2000]))
    without, with_lm = lists
    assert [h.tokens for h in without] == [h.tokens for h in with_lm]
    assert [h.scores["ctc"] for h in without] == [h.scores["ctc"] for h in with_lm]


@settings(deadline=None, max_examples=20)
@given(
    samples=st.integers(0, 30_000),
    sizes=st.lists(st.integers(100, 9000), min_size=1, max_size=4),
    chunk=st.sampled_from([ChunkOptions(2, 3), CHUNK, ChunkOptions(16, 1)]),
)
def test_a_greedy_stream_equals_greedy_search_of_the_whole(made, samples, sizes, chunk) -> None:
    audio = noise(6, 30_000)[:samples]
    features, lens = pad_features([extract(audio)])
    with torch.no_grad():
        out, lens = made[0].encoder(features, lens, chunk)
    wanted = ctc_greedy_search(made[0].ctc_log_probs(out), lens, made[0].tokens, ["talk"])[0]
    decoder = StreamingDecoder(made[0], options=StreamOptions(chunk=chunk), greedy=True)
    same(decode_in_packets(decoder, audio, sizes), wanted)


def test_a_greedy_stream_commits_words_that_are_over(made) -> None:
    with pytest.raises(ValueError, match="fusions must be none in greedy search"):
        StreamingDecoder(made[0], fusions_of(made, "ngram"), greedy=True)
    decoder = StreamingDecoder(made[0], options=replace(OPTIONS, endpoint=EndpointOptions(0, 0, 1.0)),
                               greedy=True)
    stream, audio, segments, before = decoder.open(), noise(7, 64_000), [], ""
    for start in range(0, len(audio), 800):
        stream.accept(audio[start : start + 800])
        partial, ended = stream.partial(), stream.take_segments()
        segments += ended
        assert ended or (partial.committed + " ").startswith(before + " " if before else "")
        assert len(partial.unstable.split()) <= 1
        before = partial.committed
    segments.append(stream.finish())
    times = [time for nbest in segments for time in nbest[0].times]
    assert len(segments) > 3 and len(times) > 10
    assert [time.start for time in times] == sorted(time.start for time in times)
    assert times[-1].start > 2.5


def test_each_stream_may_have_hot_words_of_its_own(made) -> None:
    audio, lists = noise(5, 30_000), (None, ["a sailor"], [("sean sea", 9.0)], [])
    decoder = StreamingDecoder(made[0], fusions_of(made, "hotwords"), SEARCH, OPTIONS)
    streams = [decoder.open(str(number), hotwords=phrases) for number, phrases in enumerate(lists)]
    for stream in streams:
        stream.accept(audio)
    found = decoder.finish(streams)
    delayed = fusions_of(made, "hotwords")[1]
    for nbest, phrases in zip(found, lists):
        hot = fusions_of(made, "hotwords")[:1] if phrases is None else [HotWordFusion(phrases, 0.7)]
        same(nbest, whole(made[0], [audio], [*hot, delayed], names=[nbest.utterance])[0])
    plain = StreamingDecoder(made[0], [], SEARCH, OPTIONS)
    paid = StreamingDecoder(made[0], [HotWordFusion(["sean sea"], 0.7, word_bonus=0.5)], SEARCH, OPTIONS)
    stream = paid.open("talk", hotwords=["a sailor"])  # weight and word bonus are the decoder's
    stream.accept(audio)
    assert stream.finish().weights == {"ctc": 1.0, "hotwords": 0.7, "words": 0.5}
    stream = paid.open("talk", hotwords=[])  # no phrases: words are paid for still
    stream.accept(audio)
    assert stream.finish().weights == {"ctc": 1.0, "hotwords": 0.7, "words": 0.5}
    eager = StreamingDecoder(made[0], [HotWordFusion(["sean sea"], 0.7, boost=9.0)], SEARCH, OPTIONS)
    stream = eager.open("talk", hotwords=["a sailor"])  # and so is its boost
    stream.accept(audio)
    hot = HotWordFusion(["a sailor"], 0.7, boost=9.0)
    same(eager.finish([stream])[0], whole(made[0], [audio], [hot], names=["talk"])[0])
    stream = plain.open("talk", hotwords=["a sailor"])
    stream.accept(audio)
    same(plain.finish([stream])[0], whole(made[0], [audio], [HotWordFusion(["a sailor"])], names=["talk"])[0])


def test_bad_hot_words_of_a_stream_are_told_when_it_opens(made) -> None:
    decoder = StreamingDecoder(made[0], [], SEARCH, OPTIONS)
    for phrases, message in ((["ßß"], "spelled"), ([""], "empty"), ([("a", float("nan"))], "boost")):
        with pytest.raises(ValueError, match=message):
            decoder.open(hotwords=phrases)
    with pytest.raises(TypeError, match="list of phrases"):
        decoder.open(hotwords="a sailor")
    with pytest.raises(ValueError, match="greedy"):
        StreamingDecoder(made[0], [], SEARCH, OPTIONS, greedy=True).open(hotwords=["a"])
    assert not decoder.streams
