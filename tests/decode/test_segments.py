"""Batches, long utterances in segments: cut, read, joined, with the text of earlier ones; unreadable ones.
Knows: utterances, segments, the job decode. Must not know: how a search works.
"""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from job_tools import arguments, lists
from lhotse import LilcomChunkyWriter, Recording

from icefall_fusion.__main__ import main
from icefall_fusion.acoustic.saved import SavedSource
from icefall_fusion.common.command_line import parse_options
from icefall_fusion.data.fbank import extractor
from icefall_fusion.data.manifests import write_cuts
from icefall_fusion.decode.job import DecodeOptions, DecodeRun
from icefall_fusion.decode.method_names import parse_method
from icefall_fusion.decode.recognizer import Recognizer
from icefall_fusion.decode.segments import join_segments, rate_of, segments_of, split_long
from icefall_fusion.decode.utterances import InputError, Utterance, batches, read_audio_files, read_cuts
from icefall_fusion.fusion import DelayedFusion
from icefall_fusion.nbest import Hypothesis, NBest, WordTime
from icefall_fusion.search import ctc_prefix_search
from icefall_fusion.text.styles import adapt


def test_batches_hold_like_lengths_and_every_utterance_once() -> None:
    seconds = [1.0, 50.0, 2.0, 90.0, 3.0, 2.5]
    utterances = [Utterance(f"u{i}", s, "", torch.zeros) for i, s in enumerate(seconds)]
    made = list(batches(utterances, size=3, seconds=100.0, longest=60.0))
    assert sorted(u.id for batch in made for u in batch) == [u.id for u in utterances]
    assert [len(batch) for batch in made] == [1, 2, 3] and made[0][0].id == "u3"
    assert all(batch[0].seconds * len(batch) <= 100 for batch in made)



def split_of(values: torch.Tensor, longest: float) -> list[tuple[int, int]]:
    return list(split_long(lambda first, last: values[first:last], rate_of(values), longest))



def test_long_input_is_cut_at_quiet_points() -> None:
    features = torch.zeros(1000, 80)
    features[[*range(380, 420)]] = -10.0
    assert split_of(features, 20.0) == [(0, 1000)]
    ranges = split_of(features, 6.0)
    assert ranges[0][0] == 0 and 380 <= ranges[0][1] <= 420 and ranges[-1][1] == 1000
    samples = torch.randn(160000)
    segments = split_of(samples, 3.0)
    assert all(a < b and b - a <= 48000 for a, b in segments)
    assert [a for a, _ in segments[1:]] == [b for _, b in segments[:-1]]



@given(st.integers(1, 700), st.floats(1.0, 3.0), st.booleans(), st.integers(0, 100))
def test_cuts_by_windows_are_those_of_the_whole(frames, longest, audio, seed) -> None:
    """Against the loudness of all, smoothed at once."""
    noise = torch.randint(-8, 9, (frames, 4), generator=torch.Generator().manual_seed(seed)).float()
    values = noise if not audio else noise[:, 0].repeat_interleave(160)[: frames * 160 - seed]
    hop = 160 if audio else 1
    power = values[: len(values) // hop * hop].view(-1, hop).square()
    loudness = (power if audio else values).mean(1)
    padded = torch.nn.functional.pad(loudness, (10, 10), value=torch.nan)
    expected, start, limit = [], 0, int(longest * 100 * hop)
    while len(values) - start > limit:
        hops = range((start + limit // 2) // hop, (start + limit) // hop)
        quietest = min(hops, key=lambda i: round(float(padded[i : i + 20].nanmean()), 4))
        expected.append((start, quietest * hop))
        start = quietest * hop
    assert split_of(values, longest) == [*expected, (start, len(values))]



def noise_file(path: Path, seconds: float, rate: int = 16000, channels: int = 1) -> None:
    count = round(seconds * rate)
    noise = np.random.default_rng(3).normal(0, 0.1, (count, channels))
    soundfile.write(path, noise * np.sin(np.arange(count) / rate)[:, None], rate)



def long_cut(folder: Path, kind: str):
    """Return a cut of some 9 s."""
    noise_file(folder / "long.flac", 9.0077)
    recording = Recording.from_file(folder / "long.flac")
    if kind == "declared too short":
        recording = replace(recording, duration=7.0, num_samples=112000)
    cut = recording.to_cut()
    if kind == "segment":
        return cut.truncate(offset=0.7, duration=8.0)
    if kind == "ends a little late":
        return replace(cut.truncate(offset=0.7, duration=6.0), duration=6.000000001)
    if kind == "padded":
        return cut.pad(duration=10.0)
    if kind == "mixed":
        noise_file(folder / "other.flac", 9.5)
        return cut.mix(Recording.from_file(folder / "other.flac").to_cut(), snr=10)
    if kind == "transformed":
        return cut.perturb_speed(0.9)
    if kind == "stored features":
        with LilcomChunkyWriter(folder / "features") as storage:
            cut = cut.compute_and_store_features(extractor(), storage)
        return cut.truncate(offset=0.5, duration=8.0)
    return cut



KINDS = ("whole file", "declared too short", "segment", "ends a little late", "padded", "mixed",
         "transformed", "stored features")



@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wants", ["features", "audio"])
def test_segments_of_long_cuts_are_those_of_the_whole(tmp_path, wants, kind) -> None:
    write_cuts([long_cut(tmp_path, kind)], tmp_path / "cuts.jsonl.gz")
    [utterance] = read_cuts(tmp_path / "cuts.jsonl.gz", wants)
    whole = utterance.load()
    values = [segment.load() for segment in segments_of(utterance, 2.0)]
    assert len(values) >= 4 and all(0 < len(segment) <= 2 * rate_of(whole) for segment in values)
    assert torch.cat(values).shape == whole.shape and (torch.cat(values) - whole).abs().max() < 1e-3



@pytest.mark.parametrize("wants", ["features", "audio"])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_long_files_are_read_segment_by_segment(tmp_path, wants, rate) -> None:
    """The segments are those of the whole; no more than a segment and its neighbourhood is read at once."""
    noise_file(tmp_path / "long.flac", 9.0077, rate, channels=2)
    [utterance] = read_audio_files([tmp_path / "long.flac"], wants)
    whole, most = utterance.load(), 0.0

    def load(start: float, seconds: float) -> torch.Tensor:
        nonlocal most
        most = max(most, seconds)
        return utterance.load(start, seconds)

    segments = segments_of(replace(utterance, load=load), 2.0)
    values = [segment.load() for segment in segments]
    assert len(segments) >= 5 and most <= 2.4
    assert [(segment.start, segment.number, segment.count) for segment in segments] == [
        (sum(len(v) for v in values[:i]) / rate_of(whole), i, len(segments)) for i in range(len(segments))
    ]
    assert torch.cat(values).shape == whole.shape and (torch.cat(values) - whole).abs().max() < 1e-3



def test_segments_are_joined() -> None:
    def hypothesis(text: str, score: float) -> Hypothesis:
        times = [WordTime(text, 0.1, 0.2)] if text else []
        return Hypothesis([1], text, {"ctc": score, "total": score}, times)

    one = NBest("u", [hypothesis("a", -1.0), hypothesis("b", -2.0)])
    two = NBest("u#1", [hypothesis("c", -4.0)])
    joined = join_segments("u", [one, two, NBest("u#2", [hypothesis("", 0.0)])], [0.0, 10.0, 20.0])
    assert [h.text for h in joined] == ["a c", "b c"] and [h.total for h in joined] == [-5.0, -6.0]
    assert joined[0].times[1] == WordTime("c", 10.1, 10.2)



def test_long_audio_is_decoded_in_segments(made, tmp_path) -> None:
    more = ["--methods", "ctc-greedy,nlm-shallow+llm-delayed-interval-16", "--longest", "1"]
    assert main(arguments(made, tmp_path, *more)) == 0
    for method in ("ctc-greedy", "nlm-shallow+llm-delayed-interval-16"):
        decoded = lists(tmp_path, method)
        assert sorted(decoded) == [f"noise-{i}" for i in range(7)]
        last = decoded["noise-6"]
        assert all(t.end <= 1.6 for t in last[0].times) and last[0].times[-1].start >= 0.5
        assert [t.start for t in last[0].times] == sorted(t.start for t in last[0].times)



def test_segments_carry_the_text_so_far_to_the_llm(made, tmp_path, capsys) -> None:
    """Against the segments of each utterance decoded one by one, with the text so far as the prompt."""
    methods = ["llm-delayed-shortest", "ctc-greedy", "llm-delayed-interval-4"]
    named = {**made, "cuts": str(tiny.manifest(tmp_path / "audio", 14))}
    options = arguments(named, tmp_path / "out", "--methods", ",".join(methods), "--longest", "1")[1:]
    options += ["--llm.carry", "true", "--llm.context_words", "5", "--llm.text", "sentence"]
    assert main(["decode", *options]) == 0
    parsed = parse_options(DecodeOptions, options, "decode")
    recognizer = Recognizer(parsed, parsed.methods)
    lm, thirds = recognizer.models.get("llm"), 0
    for method in (methods[0], methods[2]):
        [fused] = parse_method(method).fusions
        decoded = lists(tmp_path / "out", method)
        for utterance in read_cuts(named["cuts"], recognizer.source.wants):
            words: list[str] = []
            score = 0.0
            for segments, emissions, _ in recognizer.emit([utterance]):
                [segment] = segments
                prompt = " ".join(adapt(words, "sentence").split()[-5:])
                thirds += segment.number == 2 and bool(prompt)
                fusion = DelayedFusion(lm, 0.4, 0.5, fused.trigger, "sentence", prompt or None)
                search = (emissions.log_probs, emissions.lens, parsed.search, emissions.tokens)
                [nbest] = ctc_prefix_search(*search, [fusion], emissions.ids)
                words += nbest[0].words()
                score += nbest[0].scores["llm"]
            assert decoded[utterance.id][0].words() == words
            assert decoded[utterance.id][0].scores["llm"] == pytest.approx(score, abs=2e-3)
    assert thirds >= 4
    shallow = arguments(named, tmp_path / "no", "--methods", "nlm-shallow", "--nlm.carry", "true")
    assert main(shallow) == 2 and "nlm.carry must be left alone" in capsys.readouterr().err



@pytest.mark.parametrize("carry", [False, True])
def test_an_unreadable_segment_takes_its_utterance_along(made, tmp_path, monkeypatch, carry) -> None:
    """Nothing is left of it: no list, no cost, no saved emissions."""
    cuts = tiny.manifest(tmp_path / "audio", 14)
    options = ["--methods", "llm-delayed-shortest", "--longest", "1", "--batch_seconds", "2"]
    options += ["--save_emissions", str(tmp_path / "kept"), "--llm.carry", str(carry).lower()]
    options = arguments({**made, "cuts": str(cuts)}, tmp_path / "out", *options)[1:]
    decode = DecodeRun(parse_options(DecodeOptions, options, "decode"))
    *good, bad = read_cuts(cuts, decode.recognizer.source.wants)
    starts = [segment.start for segment in segments_of(bad, 1.0)]
    seen: list[float] = []

    def load(start: float, seconds: float) -> torch.Tensor:
        if start == starts[2] and start in seen:  # the cuts are made: now the third segment is read
            raise InputError("the disk is gone")
        seen.append(start)
        return bad.load(start, seconds)

    seen += starts[2:3]
    monkeypatch.setattr("icefall_fusion.decode.job.read_cuts", lambda *_: [*good, replace(bad, load=load)])
    [row] = decode.decode_set("noise", str(cuts))
    assert [(entry["id"], entry["error"]) for entry in decode.skipped] == [(bad.id, "the disk is gone")]
    assert sorted(lists(tmp_path / "out", "llm-delayed-shortest")) == sorted(u.id for u in good)
    [file] = (tmp_path / "out").glob("nbest-*")
    assert all(json.loads(line)["lists"] for line in file.read_text().splitlines()[1:])
    saved = SavedSource(tmp_path / "kept" / "noise", decode.recognizer.source.tokens)
    assert sorted(saved.ids) == sorted(u.id for u in good)
    assert row["audio_seconds"] == pytest.approx(sum(u.seconds for u in good))

