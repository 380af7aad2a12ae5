"""Constants of word times: found again where they are known, and on real speech with the shipped models.
Knows: tune-words, synthetic speech. Must not know: how speech is decoded.
"""
from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from icefall_fusion.__main__ import main
from icefall_fusion.data import espeak
from icefall_fusion.data.manifests import cuts_path
from icefall_fusion.data.synthesis import SynthesizeOptions
from icefall_fusion.data.synthesis import run as synthesize
from icefall_fusion.decode.demo import STORIES, read_sentences
from icefall_fusion.decode.tune_words import Sighting, fit_timing, right_words, sight, timing_errors
from icefall_fusion.decode.word_evidence import ACOUSTIC
from icefall_fusion.nbest import WordTime
from icefall_fusion.text.language import Language
from icefall_fusion.text.normalizer import normalize
from icefall_fusion.text.word_times import WordTiming


def test_constants_are_found_again() -> None:
    """Words that last as the constants say, some with a pause after them, give these constants."""
    true, rng, seen = WordTiming(0.06, 0.04, 0.1, 0.05), np.random.default_rng(0), []
    for _ in range(400):
        first = float(rng.uniform(1, 5))
        mark = WordTime("a" * int(rng.integers(1, 12)), first, first + float(rng.uniform(0.04, 0.8)))
        after = mark.end + float(rng.uniform(0.1, 0.9))
        word = true.apply([mark, WordTime("b", after, after)])[0]
        seen.append(Sighting(mark, after, word.start, word.end))
    found = fit_timing(seen)
    assert found == true
    assert np.abs(timing_errors(seen, found)["end"]).max() < 1e-5
    with pytest.raises(ValueError, match="cuts must have 20 words at least"):
        fit_timing(seen[:19])


def test_words_spoken_as_one_tell_their_outer_times() -> None:
    truth = [WordTime("keeper", 0.1, 0.5), WordTime("of the", 0.5, 0.8), WordTime("sea", 0.8, 1.2)]
    marks = [WordTime(w, t, t + 0.04) for w, t in (("Keeper", 0.2), ("of", 0.6), ("a", 0.7), ("the", 0.75))]
    assert list(sight(marks, truth)) == [
        Sighting(marks[0], 0.6, 0.1, 0.5), Sighting(marks[1], 0.7, 0.5, None),
        Sighting(marks[3], None, None, 0.8)]
    assert list(sight([], truth)) == []


@pytest.mark.skipif(not espeak.available(), reason="espeakng-loader is not installed")
def test_the_shipped_model_tells_when_words_sound(tmp_path, capsys, caplog) -> None:
    """The issue's limits hold on a few sentences: starts within 60 ms and ends within 80 ms on average."""
    (tmp_path / "text").mkdir()
    sentences = read_sentences(str(STORIES))[:8]
    rows = [{"id": f"s{i}", "cased": c, "text": normalize(c)} for i, (_, c) in enumerate(sentences)]
    source = tmp_path / "text" / "selected_test-clean.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert synthesize(SynthesizeOptions("test-clean", tmp_path, workers=1, word_times=True)) == 0
    cuts, words = str(cuts_path(tmp_path / "manifests", "test-clean")), tmp_path / "words.yaml"
    command = ["tune-words", "--methods", "ctc-greedy,ctc-prefix", "--cuts", cuts]
    assert main([*command, "--out", str(words)]) == 0
    printed = capsys.readouterr().out
    found = WordTiming(**yaml.safe_load(words.read_text())["timing"])
    assert 0.0 < found.lead < 0.1 and found.letter > 0
    [before, after] = [line for line in printed.splitlines() if ": starts off by" in line]
    assert list(yaml.safe_load(words.read_text())["confidence"]) == ["ctc-greedy", "ctc-prefix"]
    told = yaml.safe_load(words.read_text())["confidence"]["ctc-greedy"]
    curve = told.pop("curve")
    assert len(curve) > 2 and curve == sorted(curve)
    assert set(told) == {"intercept", *ACOUSTIC} and told["piece_mean"] + told["piece_least"] > 0
    assert float(printed.split("AUC ")[1].split()[0]) > 0.75
    sizes = [int(part.split(" ms")[0]) for part in after.split("off by ")[1:]]
    assert sizes[0] <= 60 and sizes[1] <= 80
    assert int(before.split("ends off by ")[1].split(" ms")[0]) > sizes[1] + 40
    audio = str(next((tmp_path / "audio").rglob("s1.flac")))
    transcribe = ["transcribe", audio, "--method", "ctc-greedy", "--format", "ctm"]
    assert main([*transcribe, "--words", str(words)]) == 0
    moved = capsys.readouterr().out
    sure = [float(line.split()[5]) for line in moved.splitlines()]
    assert all(0 < value < 1 for value in sure) and max(sure) - min(sure) > 0.05
    words.write_text("timing: {lead: 0.0, tail: 0.0, least: 0.0, letter: 0.0}\n")
    assert main([*transcribe, "--words", str(words)]) == 0
    marks = capsys.readouterr().out
    assert all(len(line.split()) == 5 for line in marks.splitlines())  # no confidence in that file
    starts = [[float(line.split()[2]) for line in text.splitlines()] for text in (moved, marks)]
    assert np.subtract(*starts) == pytest.approx(-found.lead, abs=2e-3)
    assert main(transcribe) == 0  # the file beside the shipped models is used
    assert all(len(line.split()) == 6 for line in capsys.readouterr().out.splitlines())
    words.write_text("model: abc\ntiming: {}\n")
    assert main([*transcribe, "--words", str(words)]) == 0
    assert "found with another acoustic model" in caplog.text
    capsys.readouterr()
    for text, message in (("timing: {lead: x}", "WordTiming.lead must be some seconds"),
                          ("weights: {}", "must be a YAML file of tune-words"),
                          ("timing: {}\nconfidence: {x: {intercept: 0, lists: 1}}", "weigh some of")):
        words.write_text(text)
        assert main([*transcribe, "--words", str(words)]) == 2
        assert message in capsys.readouterr().err


def test_a_model_that_is_never_right_is_refused(made, capsys, caplog) -> None:
    command = ["tune-words", "--emissions.model", made["model"], "--cuts", made["cuts"]]
    assert main([*command, "--methods", "ctc-prefix"]) == 2
    assert "words must be right here and wrong there, but is 0" in capsys.readouterr().err
    assert "tells no times of words" in caplog.text


def test_right_words_are_told_apart_from_case_and_punctuation() -> None:
    heard = ["We", "saw,", "a", "the", "see"]
    assert right_words("we saw the sea", heard) == [True, True, False, True, False]
    assert right_words("", ["a"]) == [False] and right_words("a b", []) == []


def test_right_words_of_another_language() -> None:
    assert right_words("今天天气好", ["今天", "天", "汽", "好"], Language("zh")) == [True, True, False, True]
    assert right_words("今天天气好", ["今天", "天汽", "好"], Language("zh")) == [True, False, True]
    assert right_words("¿Qué? 3 señoras", ["que", "tres", "señoras"], Language("es")) == [False, True, True]
