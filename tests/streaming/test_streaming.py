"""Streaming decoding: packets, batches and chunks change nothing; the whole with a chunk mask is the oracle.
Knows: tiny models, noise. Must not know: how a stream is decoded.
"""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_tools import CHUNK, NAMES, OPTIONS, SEARCH, decode_in_packets, fusions_of, noise, same, whole

from icefall_fusion.acoustic.models import ChunkOptions
from icefall_fusion.fusion import DelayedFusion, FixedInterval
from icefall_fusion.fusion.triggers import frames_of
from icefall_fusion.streaming import StreamingDecoder, StreamOptions


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
    calls = []
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
    assert calls[0] == calls[1] > 5


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
