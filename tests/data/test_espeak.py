"""Knows: what synthetic speech promises: rate, determinism, disjoint voices. Must not know: models."""
from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet
from scipy.signal import resample_poly

from icefall_fusion.common.command_line import UNFINISHED
from icefall_fusion.data import espeak, synthesis, synthesizer, voices
from icefall_fusion.data.cut_audio import cut_samples
from icefall_fusion.data.espeak import ACCENTS, Engine, Voice, speak, variants
from icefall_fusion.data.fbank import FbankOptions
from icefall_fusion.data.fbank import run as compute_fbank
from icefall_fusion.data.manifests import cuts_path
from icefall_fusion.data.noise import Conditions
from icefall_fusion.data.spoken_words import spoken_words
from icefall_fusion.data.synthesis import (
    CONDITIONS,
    SPLITS,
    SynthesizeOptions,
    run,
)
from icefall_fusion.data.synthesizer import Synthesizer, punctuated
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


def test_the_times_of_words_are_told_and_change_no_sample() -> None:
    """Words begin where silence before them ends, and follow one another; "of the" is spoken as one."""
    text = "the keeper, don't you know, of the old lighthouse counted twenty one ships."
    events: list[espeak.SpeechEvent] = []
    samples = speak(text, Voice(speed=120), events=events)
    assert np.array_equal(samples, speak(text, Voice(speed=120)))
    words = spoken_words(text, events, len(samples) / 16_000)
    plain = "the keeper don't you know of the old lighthouse counted twenty one ships"
    assert " ".join(word.word for word in words) == plain
    assert "of the" in [word.word for word in words] and len(words) == 12
    assert all(word.start < word.end for word in words)
    assert all(one.end <= other.start for one, other in zip(words, words[1:]))
    assert words[1].end < words[2].start  # the comma
    for word in words:
        inside = samples[int(word.start * 16_000) : int(word.end * 16_000)]
        assert np.abs(inside).max() > 0.05
    pause = samples[int(words[1].end * 16_000) + 800 : int(words[2].start * 16_000) - 160]
    assert np.abs(pause).max() < 0.02
    assert spoken_words("", [], 0.1) == [] and spoken_words("a", [], 0.1) == []


def test_homophones_have_the_same_phonemes() -> None:
    words = "sea see knight night their there aunt ant two too".split()
    sounds = espeak.engine().phonemes(words, Voice())
    assert list(sounds) == words and all(sounds.values())
    same = [one for one, other in zip(words[::2], words[1::2]) if sounds[one] == sounds[other]]
    assert same == ["sea", "knight", "their", "two"]


def test_a_manifest_can_tell_the_times_of_words(tmp_path: Path) -> None:
    _write_utterances(tmp_path, 2)
    assert run(SynthesizeOptions("dev", tmp_path, workers=1)) == 0
    [plain] = _rows(tmp_path)
    assert run(SynthesizeOptions("dev", tmp_path, workers=1, word_times=True)) == 0
    [cut] = CutSet.from_file(cuts_path(tmp_path / "manifests", "dev"))
    items = cut.supervisions[0].alignment["word"]
    assert " ".join(item.symbol for item in items) == cut.supervisions[0].text
    assert 0 < items[0].duration and items[-1].end <= cut.duration
    told = cut.recording.sources[0].source
    ours, theirs = soundfile.read(told)[0], soundfile.read(plain["recording"]["sources"][0]["source"])[0]
    assert np.array_equal(ours, theirs)


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


@pytest.mark.parametrize("workers", [1, 2])
def test_joined_shards_hold_the_same_speech(tmp_path: Path, workers: int) -> None:
    folders = tmp_path / "apart", tmp_path / "joined"
    for folder, joined in zip(folders, (False, True)):
        folder.mkdir()
        _write_utterances(folder, 5)
        options = SynthesizeOptions("dev", folder, workers=workers, shard_size=3, joined=joined)
        assert run(options) == 0
        assert compute_fbank(FbankOptions(folder, ("dev",), workers=1)) == 0
    assert {path.suffix for path in (folders[1] / "audio" / "dev").iterdir()} == {".wav"}
    apart, joined = (list(CutSet.from_file(cuts_path(folder / "fbank", "dev"))) for folder in folders)
    assert [cut.id for cut in joined] == ["b-0", "b-2", "b-3", "b-4"] and joined[1].start > 1
    for one, two in zip(apart, joined):
        assert one.duration == two.duration
        said = [cut.supervisions[0].to_dict() | {"recording_id": ""} for cut in (one, two)]
        assert said[0] == said[1]
        assert np.array_equal(cut_samples(one), cut_samples(two))
        assert np.array_equal(one.load_features(), two.load_features())


def test_the_clock_ends_a_job_that_another_run_goes_on_with(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_utterances(tmp_path, 6)
    options = SynthesizeOptions("dev", tmp_path, workers=1, shard_size=2, joined=True, max_minutes=1e-9)
    with pytest.raises(ValueError, match="SynthesizeOptions.max_minutes must be enough for a shard, but is"):
        run(options)
    now = itertools.chain([0.0, 1.0, 59.0], itertools.repeat(61.0))  # begin, a look before each shard
    monkeypatch.setattr(synthesis.time, "monotonic", lambda: next(now))
    assert run(dataclasses.replace(options, max_minutes=1)) == UNFINISHED
    assert "1 shards were not spoken" in capsys.readouterr().out
    monkeypatch.undo()
    some = _rows(tmp_path)
    assert 2 <= len(some) < 5 and [row["id"] for row in some] == sorted(row["id"] for row in some)
    assert run(dataclasses.replace(options, max_minutes=0)) == 0
    assert len(_rows(tmp_path)) == 5 and all(row in _rows(tmp_path) for row in some)


def test_a_worker_speaks_the_background_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_utterances(tmp_path, 4)
    spoken: list = []
    count = lambda *args, **more: spoken.append(args) or speak(*args, **more)  # noqa: E731
    monkeypatch.setattr(synthesizer, "speak", count)
    options = SynthesizeOptions("dev", tmp_path, shard_size=1)
    utterances = [json.loads(line) for line in (tmp_path / "text" / "selected_dev.jsonl").open()]
    maker = Synthesizer(SPEAKERS["dev"], (Conditions(noises=("babble",)),), 1, [TEXT] * 9)
    for shard in synthesis._plan(options, utterances, tmp_path / "parts"):
        synthesis._make_shard(maker, options, float("inf"), shard)
    assert len(spoken) == 9 + 4


def test_accents_are_found_without_reading_all_voices(tmp_path: Path) -> None:
    """Files in lower case, as the library looks for them, speak as those of eSpeak NG's own folder."""
    own = Engine()
    own._data = types.SimpleNamespace(name=espeak._loader().get_data_path())
    names = {path.name for path in Path(Engine()._data.name, "lang", "gmw").iterdir()}
    assert {Path(file).name.lower() for file in ACCENTS.values()} <= names
    for accent in ACCENTS:
        voice = Voice(accent, "f3")
        assert np.array_equal(own.speak_native(TEXT, voice)[0], Engine().speak_native(TEXT, voice)[0])


def test_resampling_is_that_of_scipy() -> None:
    native, rate = espeak.engine().speak_native(TEXT, Voice(), 0)
    expected = resample_poly(native.astype(np.float32) / 32768.0, 320, 441).astype(np.float32)
    assert rate == 22_050 and np.array_equal(speak(TEXT, Voice()), expected)


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
