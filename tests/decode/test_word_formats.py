"""Transcripts in the formats of other programs: CTM, SRT, WebVTT, lhotse; names of files.
Knows: formats of words. Must not know: recognizers.
"""
from __future__ import annotations

import re

import pytest
from lhotse import SupervisionSegment

from icefall_fusion.decode.word_formats import CUE_SECONDS, LINE, ctm, cues, names_of, srt, supervision, vtt
from icefall_fusion.nbest import Hypothesis, NBest, WordTime

WORDS = [WordTime("we", 0.1, 0.32, 0.987), WordTime("saw", 0.32, 0.6), WordTime("<sea>", 1.5, 3661.0015)]


def test_ctm_has_start_and_duration_and_a_known_confidence() -> None:
    assert ctm("talk", WORDS).splitlines() == [
        "talk 1 0.100 0.220 we 0.987", "talk 1 0.320 0.280 saw", "talk 1 1.500 3659.501 <sea>"]
    assert ctm("talk", []) == ""


def test_subtitles_count_their_cues_and_break_at_pauses() -> None:
    assert srt(WORDS) == (
        "1\n00:00:00,100 --> 00:00:00,600\nwe saw\n\n2\n00:00:01,500 --> 01:01:01,002\n<sea>\n")
    assert vtt(WORDS) == (
        "WEBVTT\n\n00:00:00.100 --> 00:00:00.600\nwe saw\n\n"
        "00:00:01.500 --> 01:01:01.002\n&lt;sea&gt;\n")
    assert srt([]) == "" and vtt([]) == "WEBVTT\n"


def test_cues_are_short_and_keep_every_word() -> None:
    words = [WordTime(f"word{n}" * (1 + n % 3), n * 0.3, n * 0.3 + 0.3) for n in range(200)]
    made = cues(words)
    assert " ".join(" ".join(cue.lines) for cue in made) == " ".join(word.word for word in words)
    assert all(len(cue.lines) <= 2 and max(map(len, cue.lines)) <= LINE for cue in made)
    assert all(cue.end - cue.start <= CUE_SECONDS for cue in made)
    assert all(one.end <= other.start + 1e-9 for one, other in zip(made, made[1:]))
    assert cues([WordTime("x" * 60, 0.0, 9.0)])[0].lines == ["x" * 60]  # no place to cut it


def test_a_supervision_has_its_words_as_an_alignment() -> None:
    nbest = NBest("a b.wav", [Hypothesis([1], "we saw", {"total": 0.0}, WORDS[:2])])
    made = supervision("a_b", nbest, 4.0)
    again = SupervisionSegment.from_dict(made.to_dict())
    assert (again.id, again.recording_id, again.duration, again.text) == ("a_b", "a_b", 4.0, "we saw")
    first, second = again.alignment["word"]
    assert (first.symbol, first.start, first.end, first.score) == ("we", 0.1, 0.32, 0.987)
    assert second.symbol == "saw" and second.score is None
    assert supervision("a_b", nbest, 0.0).duration == 0.6  # of a file whose length was not known


def test_names_are_short_where_they_differ() -> None:
    assert names_of(["a/one talk.wav", "b/two.flac"]) == {"a/one talk.wav": "one_talk", "b/two.flac": "two"}
    assert names_of(["a/x.wav", "b/x.wav"]) == {"a/x.wav": "a_x.wav", "b/x.wav": "b_x.wav"}
    with pytest.raises(ValueError, match=re.escape("names that differ, but 'a/x' and 'a x' are both 'a_x'")):
        names_of(["a/x", "a x", "b/x"])
