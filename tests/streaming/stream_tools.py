"""Helpers of the tests of streams: tiny models, noise, whole-utterance decoding.
Knows: tiny models. Must not know: what is tested.
"""
from __future__ import annotations

import contextlib
import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from icefall_fusion.acoustic.models import ChunkOptions, load
from icefall_fusion.data.fbank import extract
from icefall_fusion.data.features import pad_features
from icefall_fusion.fusion import (
    AtEnd,
    DelayedFusion,
    FixedInterval,
    LookAhead,
    NgramFusion,
    ShallowFusion,
    ShortestHypothesis,
)
from icefall_fusion.fusion.hotwords import HotWordFusion
from icefall_fusion.fusion.lodr import LodrFusion
from icefall_fusion.fusion.word_ngram import VocabularyFusion, WordNgramFusion
from icefall_fusion.lm import CausalLm
from icefall_fusion.ngram.piece_ngram import PieceNgram
from icefall_fusion.ngram.word_ngram import WordNgram
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search
from icefall_fusion.streaming import StreamOptions

NAMES = ("none", "shortest", "interval", "at-end", "prompt", "late", "look-ahead", "ngram", "both",
         "nlm", "nlm, late llm", "late look-ahead", "late, seldom ahead", "hotwords", "lodr", "words",
         "words, llm")
CHUNK = ChunkOptions(4, 2)
SEARCH = PrefixSearchOptions(beam=6)
OPTIONS = StreamOptions(chunk=CHUNK)


def make_models(folder):
    acoustic = load(tiny.acoustic_model(folder / "ctc_aed"))
    with torch.no_grad():  # so that noise has words, and hypotheses differ
        acoustic.encoder.mean.copy_(extract(noise(1, 40_000)).mean(0))
        acoustic.ctc.linear.weight.mul_(0.6)
        acoustic.ctc.linear.bias[torch.tensor(acoustic.tokens.starts_word)] += 1
        acoustic.ctc.linear.bias[1:3] -= 20  # no sentence marks, no unknown
    lm = CausalLm.from_pretrained(tiny.language_model(folder / "llm", 12, pieces=False))
    ngram = PieceNgram.load(tiny.ngram(folder), acoustic.tokens.pieces)
    return acoustic, lm, ngram


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


@functools.cache
def matched_lm() -> CausalLm:
    """Return a language model over the acoustic pieces."""
    with tempfile.TemporaryDirectory() as folder:
        return CausalLm.from_pretrained(tiny.language_model(Path(folder, "nlm"), 12, pieces=True))


@functools.cache
def word_ngram() -> WordNgram:
    text = tiny.arpa_text("-2.0\t<unk>\n-99\t<s>\t-0.5\n-1.0\t</s>\n-0.5\tsea\t-0.25\n-1.5\ta\t-0.125",
                          "-0.3\t<s> a\n-0.2\ta sea")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "words.arpa")
        path.write_text(text)
        return WordNgram(path, oov_score=-1.0)


def fusions_of(made, name):
    acoustic, lm, ngram = made
    return {
        "none": [],
        "shortest": [DelayedFusion(lm, 0.4, 0.5)],
        "interval": [DelayedFusion(lm, 0.4, 0.5, FixedInterval(5))],
        "at-end": [DelayedFusion(lm, 0.4, 0.5, AtEnd())],
        "prompt": [DelayedFusion(lm, 0.4, 0.5, prompt="the sea at dawn")],
        "late": [DelayedFusion(lm, 0.4, 0.5, late=3)],
        "look-ahead": [DelayedFusion(lm, 0.4, 0.5, look_ahead=LookAhead(ngram))],
        "nlm": [ShallowFusion(matched_lm(), 0.3, 0.2)],
        "nlm, late llm": [ShallowFusion(matched_lm(), 0.3), DelayedFusion(lm, 0.4, 0.5, late=3)],
        "late look-ahead": [DelayedFusion(lm, 0.4, 0.5, late=3, look_ahead=LookAhead(ngram))],
        "late, seldom ahead": [DelayedFusion(lm, 0.4, 0.5, FixedInterval(7), late=5,
                                             look_ahead=LookAhead(ngram, 0.5, 3))],
        "ngram": [NgramFusion(ngram, 0.3, 0.2)],
        "both": [NgramFusion(ngram, 0.3, 0.2), DelayedFusion(lm, 0.4, 0.5, ShortestHypothesis("pieces", 2))],
        "lodr": [LodrFusion(ngram, 0.2), DelayedFusion(lm, 0.4, 0.5)],
        "words": [WordNgramFusion(word_ngram(), 0.4, 0.5, FixedInterval(4))],
        "words, llm": [WordNgramFusion(word_ngram(), 0.3, 0.2, ShortestHypothesis(), prompt="a sailor",
                                       oov_score=0.0),
                       DelayedFusion(lm, 0.4, 0.5),
                       VocabularyFusion(["sean", "sea", "sailor", "a"], acoustic.tokens, -1.5, 0.3)],
        "hotwords": [HotWordFusion(["sean sea", "a sailor"], 0.7), DelayedFusion(lm, 0.4, 0.5)],
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


@contextlib.contextmanager
def failing(module, calls):
    """Let calls of a module raise whose numbers, from 0, are in ``calls``; yield the number of calls."""
    count = [0]

    def hook(*_):
        number, count[0] = count[0], count[0] + 1
        if number in calls:
            raise RuntimeError(f"call {number} fails")

    handle = module.register_forward_pre_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


def layer_of(lm):
    return next(module for name, module in lm.model.named_modules() if name.endswith("layers.0"))
