"""Shallow fusion of a neural language model in streams: dropped hypotheses, segments, a model that fails.
Knows: tiny models, noise. Must not know: how a stream is decoded.
"""
from __future__ import annotations

from dataclasses import replace

import pytest
from stream_tools import (
    OPTIONS,
    SEARCH,
    decode_in_packets,
    failing,
    fusions_of,
    layer_of,
    matched_lm,
    noise,
    same,
    whole,
)
from torch import Tensor

from icefall_fusion.nbest import NBest
from icefall_fusion.search.engines.extension_scores import ExtensionScores
from icefall_fusion.streaming import EndpointOptions, StreamingDecoder


def log_prob(tokens) -> float:
    scorer = matched_lm().open_tree(1)
    return float(scorer.score([scorer.insert(scorer.root(0), list(tokens))], eos=True)[0])


@pytest.mark.parametrize("recover", [False, True])
def test_dropped_hypotheses_leave_the_others_their_scores(made, recover) -> None:
    options, search = replace(OPTIONS, commit_after=0.2), replace(SEARCH, recover_mass=recover)
    decoder = StreamingDecoder(made[0], fusions_of(made, "nlm"), search, options)
    found = decode_in_packets(decoder, noise(8, 40_000), [2560])
    for hypothesis in found:
        assert hypothesis.scores["nlm"] == pytest.approx(log_prob(hypothesis.tokens), abs=1e-3)
        words = 0.2 * len(hypothesis.words())
        total = hypothesis.scores["ctc"] + 0.3 * hypothesis.scores["nlm"] + words
        assert hypothesis.total == pytest.approx(total, abs=1e-3)


def test_segments_end_and_lanes_come_back(made) -> None:
    options = replace(OPTIONS, streams=1, endpoint=EndpointOptions(0, 0, 0.5))
    decoder = StreamingDecoder(made[0], fusions_of(made, "nlm"), SEARCH, options)
    for _ in range(2):
        stream = decoder.open("talk")
        stream.accept(noise(9, 30_000))
        last = stream.finish()
        segments = [*stream.take_segments(), last]
        assert len(segments) > 2 and not stream.take_warnings()
        assert all(nbest.weights["nlm"] == 0.3 for nbest in segments)
    decoder.open("gone").close()
    decoder.open("next").close()


@pytest.mark.parametrize("first", [0, 4])
def test_a_model_that_fails_is_taken_out_of_all_hypotheses(made, first) -> None:
    audio = noise(1, 30_003)
    decoder = StreamingDecoder(made[0], fusions_of(made, "nlm"), SEARCH, OPTIONS)
    stream = decoder.open("talk")
    with failing(layer_of(matched_lm()), range(first, 10_000)) as calls:
        for start in range(0, len(audio), 3000):
            stream.accept(audio[start : start + 3000])
            stream.partial()
        found = stream.finish()
    assert calls[0] == first + 1  # it is not asked again
    assert ["'nlm' failed (RuntimeError: call" in text for text in stream.take_warnings()] == [True]
    assert found.weights["nlm"] == 0 and all(h.scores["nlm"] == 0 for h in found)
    for one in found:
        assert one.total == pytest.approx(one.scores["ctc"], abs=1e-3)
    if first == 0:
        wanted = whole(made[0], [audio], names=["talk"])[0]
        assert found[0].tokens == wanted[0].tokens


@pytest.mark.parametrize("first", range(1, 12))
def test_a_model_that_fails_in_a_frame_has_no_score_in_it(made, first, monkeypatch) -> None:
    """The result is that of a search whose model was taken out just before the frame."""
    frames: list = []
    plain = ExtensionScores.rank

    def decode(taken_out) -> NBest:
        frames.clear()

        def rank(self, *args) -> Tensor:
            [fusion] = self.fusions.shallow
            if len(frames) == taken_out:
                fusion._fail(self.beam, RuntimeError("taken out"))
            frames.append(fusion.failed)
            found = plain(self, *args)
            frames[-1] = frames[-1], fusion.failed
            return found

        monkeypatch.setattr(ExtensionScores, "rank", rank)
        decoder = StreamingDecoder(made[0], fusions_of(made, "nlm"), replace(SEARCH, beam=3), OPTIONS)
        return decode_in_packets(decoder, noise(6, 40_007), [3000])

    with failing(layer_of(matched_lm()), range(first, 10_000)):
        found = decode(None)
    [frame] = [number for number, failed in enumerate(frames) if failed == (False, True)]
    same(found, decode(frame))
