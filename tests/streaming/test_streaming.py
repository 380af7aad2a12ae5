"""Streaming decoding: packets, batches and chunks change nothing; the whole with a chunk mask is the oracle.
Knows: tiny models, noise. Must not know: how a stream is decoded.
"""
from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icefall_fusion.acoustic.models import ChunkOptions, load
from icefall_fusion.data.fbank import extract
from icefall_fusion.data.features import pad_features
from icefall_fusion.fusion import (
    AtEnd,
    DelayedFusion,
    FixedInterval,
    LookAhead,
    NgramFusion,
    ShortestHypothesis,
)
from icefall_fusion.lm import CausalLm
from icefall_fusion.ngram.piece_ngram import PieceNgram
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search
from icefall_fusion.streaming import StreamingDecoder, StreamOptions

NAMES = ("none", "shortest", "interval", "at-end", "prompt", "late", "look-ahead", "ngram", "both")
CHUNK = ChunkOptions(4, 2)
SEARCH = PrefixSearchOptions(beam=6)
OPTIONS = StreamOptions(chunk=CHUNK)


@functools.lru_cache(maxsize=1)
def models(folder):
    acoustic = load(tiny.acoustic_model(folder / "ctc_aed"))
    with torch.no_grad():  # so that noise has words, and hypotheses differ
        acoustic.encoder.mean.copy_(extract(noise(1, 40_000)).mean(0))
        acoustic.ctc.linear.weight.mul_(0.6)
        acoustic.ctc.linear.bias[torch.tensor(acoustic.tokens.starts_word)] += 1
        acoustic.ctc.linear.bias[1:3] -= 20  # no sentence marks, no unknown
    lm = CausalLm.from_pretrained(tiny.language_model(folder / "llm", 12, pieces=False))
    ngram = PieceNgram.load(tiny.ngram(folder), acoustic.tokens.pieces)
    return acoustic, lm, ngram


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return models(tmp_path_factory.mktemp("streaming"))


@functools.lru_cache(maxsize=16)
def noise(seed: int, samples: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    loud = np.sin(np.arange(samples) * 2 * np.pi / 4000) ** 2
    return (rng.normal(0, 0.1, samples) * loud).astype(np.float32)


def whole(acoustic, audio, fusions=(), search=SEARCH, chunk=CHUNK, names=None):
    """Decode whole utterances by the model with its chunk mask."""
    features, lens = pad_features([extract(samples) for samples in audio])
    with torch.no_grad():
        out, lens = acoustic.encoder(features, lens, chunk)
        log_probs = acoustic.ctc_log_probs(out)
    search = replace(search, frame_shift=0.04)
    return ctc_prefix_search(log_probs, lens, search, acoustic.tokens, fusions, names)


def fusions_of(made, name):
    _, lm, ngram = made
    return {
        "none": [],
        "shortest": [DelayedFusion(lm, 0.4, 0.5)],
        "interval": [DelayedFusion(lm, 0.4, 0.5, FixedInterval(5))],
        "at-end": [DelayedFusion(lm, 0.4, 0.5, AtEnd())],
        "prompt": [DelayedFusion(lm, 0.4, 0.5, prompt="the sea at dawn")],
        "late": [DelayedFusion(lm, 0.4, 0.5, late=3)],
        "look-ahead": [DelayedFusion(lm, 0.4, 0.5, look_ahead=LookAhead(ngram))],
        "ngram": [NgramFusion(ngram, 0.3, 0.2)],
        "both": [NgramFusion(ngram, 0.3, 0.2), DelayedFusion(lm, 0.4, 0.5, ShortestHypothesis("pieces", 2))],
    }[name]


def same(found, wanted, times=True):
    assert found.utterance == wanted.utterance and found.weights == wanted.weights
    assert [h.tokens for h in found] == [h.tokens for h in wanted]
    assert [h.text for h in found] == [h.text for h in wanted]
    for one, other in zip(found, wanted):
        assert one.scores == pytest.approx(other.scores, abs=1e-4, rel=1e-6)
        assert not times or one.times == other.times


def decode_in_packets(decoder, audio, sizes, listen=1):
    """Decode audio by one stream, in packets whose sizes come in turn; ask for text after some of them."""
    stream, start, number = decoder.open("talk"), 0, 0
    while start < len(audio):
        stop = start + sizes[number % len(sizes)]
        stream.accept(audio[start:stop])
        if number % listen == 0:
            stream.partial()
        start, number = stop, number + 1
    return stream.finish()


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


def test_weight_0_is_no_language_model(made) -> None:
    audio = noise(5, 40_000)
    lists = []
    for fusions in ([], [DelayedFusion(made[1], 0.0)]):
        decoder = StreamingDecoder(made[0], fusions, SEARCH, OPTIONS)
        lists.append(decode_in_packets(decoder, audio, [2000]))
    without, with_lm = lists
    assert [h.tokens for h in without] == [h.tokens for h in with_lm]
    assert [h.scores["ctc"] for h in without] == [h.scores["ctc"] for h in with_lm]
