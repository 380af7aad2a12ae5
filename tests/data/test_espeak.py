"""Knows: what synthetic speech promises: rate, determinism, disjoint voices. Must not know: models."""
from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from icefall_fusion.data import espeak, synthesis, voices
from icefall_fusion.data.espeak import ACCENTS, Voice, speak, variants
from icefall_fusion.data.synthesis import (
    CONDITIONS,
    SPLITS,
    SynthesizeOptions,
    Synthesizer,
    punctuated,
    run,
)
from icefall_fusion.data.voices import (
    DEV,
    DROPPED,
    SPEAKERS,
    TEST_CLEAN,
    TEST_OTHER,
    Speakers,
    training_variants,
)

pytestmark = pytest.mark.skipif(not espeak.available(), reason="espeakng-loader is not installed")
TEXT = "the old lighthouse keeper counted seven ships before breakfast"


@pytest.mark.parametrize("accent", sorted(ACCENTS))
def test_every_accent_speaks(accent: str) -> None:
    samples = speak(TEXT, Voice(accent))
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert 2 < len(samples) / 16_000 < 8
    assert 0.01 < np.sqrt(np.mean(samples**2)) < 0.5 and np.abs(samples).max() <= 1.05


@pytest.mark.parametrize("variant", ["f3", "whisper", "croak", "Mr serious", "klatt4"])
def test_history_does_not_matter(variant: str) -> None:
    voice = Voice("en-gb", variant)
    first = speak(TEXT, voice, seed=3)
    speak("something else altogether", Voice("en-us", "f2"))
    assert np.array_equal(first, speak(TEXT, voice, seed=3))


def test_speed_changes_the_duration() -> None:
    assert len(speak(TEXT, Voice(speed=100))) > 1.4 * len(speak(TEXT, Voice(speed=200)))


def test_nothing_to_say() -> None:
    assert len(speak("", Voice())) < 16_000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"accent": "en-xx"}, "Voice.accent must be one of"),
        ({"speed": 20}, "Voice.speed must lie in"),
        ({"pitch": 101}, "Voice.pitch must"),
    ],
)
def test_wrong_voices_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Voice(**wrong)


def test_unknown_variant_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'whisper'"):
        speak(TEXT, Voice(variant="wisper"))


def test_splits_share_no_variant() -> None:
    groups = [training_variants(), DEV, TEST_CLEAN, TEST_OTHER, DROPPED]
    names = [name for group in groups for name in group]
    assert len(names) == len(set(names))
    assert set(names) - {""} == set(variants())
    assert set(SPEAKERS) == set(SPLITS)


@pytest.mark.parametrize(
    ("text", "cased", "spoken"),
    [
        ("well i said it's late", "“Well,” I said; “it's late!”", "well, i said; it's late!"),
        ("a spring cart went by", "A spring-cart went by.", "a spring cart went by."),
        ("nineteen men", "19 men.", "nineteen men"),
    ],
)
def test_punctuation_never_changes_words(text: str, cased: str, spoken: str) -> None:
    assert punctuated(text, cased) == spoken


def _write_utterances(folder: Path, count: int) -> None:
    (folder / "text").mkdir()
    with (folder / "text" / "selected_dev.jsonl").open("w") as out:
        for index in range(count):
            text = f"{TEXT} and then counted once more" if index != 1 else "no"
            row = {"id": f"b-{index}", "book": "b", "index": index, "cased": text, "text": text}
            out.write(json.dumps(row) + "\n")


def test_job_is_resumable_and_independent_of_sharding(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    for folder in (first, second):
        folder.mkdir()
        _write_utterances(folder, 5)
    assert run(SynthesizeOptions("dev", first, workers=1, shard_size=2)) == 0
    assert run(SynthesizeOptions("dev", second, workers=1, shard_size=5)) == 0
    rows = [_rows(folder) for folder in (first, second)]
    assert [row["id"] for row in rows[0]] == [row["id"] for row in rows[1]] == ["b-0", "b-2", "b-3", "b-4"]
    for one, two in zip(*rows):
        ours, theirs = (soundfile.read(row["recording"]["sources"][0]["source"]) for row in (one, two))
        assert ours[1] == 16_000 and np.array_equal(ours[0], theirs[0])
    summary = json.loads((first / "manifests" / "synthesize-dev.json").read_text())
    assert summary["dropped"] == 1 and summary["dropped_utterances"][0]["id"] == "b-1"

    shard = sorted((first / "manifests" / ".parts" / "dev").glob("*.gz"))[0]
    before = shard.stat().st_mtime_ns
    sorted((first / "manifests" / ".parts" / "dev").glob("*.gz"))[1].unlink()
    assert run(SynthesizeOptions("dev", first, workers=1, shard_size=2)) == 0
    assert shard.stat().st_mtime_ns == before and _rows(first) == rows[0]


def test_shards_of_other_selections_or_voices_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": f"b-{index}", "text": f"{TEXT} number {index}"} for index in range(4)]

    def names(utterances: list, **changed: object) -> list:
        options = SynthesizeOptions("dev", tmp_path, shard_size=2, **changed)
        return [shard.manifest.name for shard in synthesis._plan(options, utterances, tmp_path)]

    before = names(rows)
    assert names(rows) == before and len(set(before)) == 2
    longer = names([*rows, {"id": "b-4", "text": TEXT}])  # its speech may be in the others' background
    assert not set(longer) & set(before)
    assert not set(names(rows, speakers=Speakers(DEV[1:]))) & set(before)
    everyone = names(rows, speakers=Speakers())
    monkeypatch.setattr(voices, "variants", lambda: ("f1", "f2", "f3"))
    assert not set(names(rows, speakers=Speakers())) & set(everyone)


def test_speech_of_an_utterance_depends_on_its_id() -> None:
    population = SPEAKERS["test-clean"], CONDITIONS["test-clean"]
    maker = Synthesizer(*population, seed=1)
    samples, record = maker.say("a", TEXT)
    again, _ = Synthesizer(*population, seed=1).say("a", TEXT)
    other, _ = maker.say("b", TEXT)
    assert np.array_equal(samples, again) and not np.array_equal(samples[:1000], other[:1000])
    assert record["voice"].partition("+")[2] in TEST_CLEAN


def _rows(folder: Path) -> list:
    with gzip.open(folder / "manifests" / "minibooks_cuts_dev.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]
