"""Knows: speech, and what lhotse, torchaudio and kaldifeat (see tools/install_kaldifeat.sh) make of it.
Must not know: shards, models.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet

from icefall_fusion.data import espeak
from icefall_fusion.data.audio import load_audio
from icefall_fusion.data.fbank import FbankOptions, extract, extractor, num_frames, run
from icefall_fusion.data.features import DIM
from icefall_fusion.data.manifests import cut_of, cuts_path, write_cuts
from icefall_fusion.data.noise import CLEAN, OTHER, distort
from tests.data.test_fbank import torchaudios

pytestmark = [
    pytest.mark.skipif(not espeak.available(), reason="espeakng-loader is not installed"),
    pytest.mark.skipif(
        importlib.util.find_spec("kaldifeat") is None,
        reason="kaldifeat is not installed: bash tools/install_kaldifeat.sh",
    ),
]
CLOSE = {"atol": 1e-3, "rtol": 0.0}
SHORT, LONG = "Yes.", "He counted seven ships before breakfast, and wrote their names into the old book. " * 4
#: What is said, by whom, in which conditions (none: digital silence in it), and how many samples are cut off.
SPOKEN = [
    (SHORT, espeak.Voice("en-us", speed=220), CLEAN, 3),
    ("The lighthouse keeper was asleep.", espeak.Voice("en-gb", "f3"), OTHER, 79),
    ("It is twenty to nine, she said!", espeak.Voice("en-us-nyc", "m5", speed=140), None, 81),
    (LONG, espeak.Voice("en-gb-scotland", "f2", volume=20), OTHER, 0),
    (LONG, espeak.Voice("en-gb-x-rp", "whisper"), CLEAN, 1234),
]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """FLAC files of 16 bits, 0.3 to 30 s, whose lengths are no multiples of a frame."""
    folder, paths = tmp_path_factory.mktemp("speech"), []
    for number, (text, voice, conditions, cut_off) in enumerate(SPOKEN):
        samples = espeak.speak(text, voice, seed=number)
        if conditions is not None:
            samples, _ = distort(samples, conditions, np.random.default_rng(number))
        paths.append(folder / f"{number}.flac")
        soundfile.write(paths[-1], samples[: len(samples) - cut_off], 16_000)
    return paths


@pytest.fixture(scope="module")
def speech(recordings: list[Path]) -> list[np.ndarray]:
    utterances = [load_audio(path) for path in recordings]
    lengths = [len(samples) for samples in utterances]
    assert len(set(lengths)) == len(SPOKEN) and min(lengths) < 16_000 and max(lengths) > 12 * 16_000
    return utterances


def test_lhotse_torchaudio_and_kaldifeat_agree(speech: list[np.ndarray]) -> None:
    for samples in speech:
        theirs = torchaudios(samples)
        lhotses, kaldifeats = extract(samples), extract(samples, backend="kaldifeat")
        assert kaldifeats.shape == lhotses.shape == theirs.shape == (num_frames(len(samples)), DIM)
        assert lhotses.std() > 1  # speech, not silence at the floor of all three
        torch.testing.assert_close(lhotses, theirs, **CLOSE)
        torch.testing.assert_close(kaldifeats, theirs, **CLOSE)
        torch.testing.assert_close(kaldifeats, lhotses, **CLOSE)


def test_a_batch_is_its_utterances_one_by_one(speech: list[np.ndarray]) -> None:
    batch = extractor("kaldifeat").extract_batch([torch.from_numpy(one) for one in speech], 16_000)
    assert len(batch) == len(speech)
    for features, samples in zip(batch, speech):
        torch.testing.assert_close(features, extract(samples, backend="kaldifeat"), atol=1e-5, rtol=0.0)


def test_long_audio_in_chunks_is_the_whole(speech: list[np.ndarray]) -> None:
    samples = np.concatenate(speech)
    whole = extract(samples, backend="kaldifeat")
    for seconds in (1.0, 7.3, 30.0):
        chunked = extract(samples, chunk_seconds=seconds, backend="kaldifeat")
        torch.testing.assert_close(chunked, whole, **CLOSE)
    torch.testing.assert_close(whole, extract(samples), **CLOSE)


@pytest.mark.parametrize("count", [0, 79, 80, 159, 399, 400, 401, 1000])
def test_short_audio(speech: list[np.ndarray], count: int) -> None:
    samples = speech[0][2000 : 2000 + count]
    features = extract(samples, backend="kaldifeat")
    assert features.shape == (num_frames(count), DIM)
    torch.testing.assert_close(features, extract(samples), **CLOSE)


def test_silence_has_the_same_floor() -> None:
    silence = np.zeros(16_000, np.float32)
    torch.testing.assert_close(extract(silence, backend="kaldifeat"), extract(silence), **CLOSE)


def _stored(recordings: list[Path], options: FbankOptions, kind: str) -> dict[str, np.ndarray]:
    """Run the job on a manifest of the recordings; return the features of each."""
    cuts = [
        cut_of({"id": path.stem, "text": "x"}, path, soundfile.info(path).frames, {"voice": "x"})
        for path in recordings
    ]
    write_cuts(cuts, cuts_path(options.data_dir / "manifests", "dev"))
    assert run(options) == 0
    made = list(CutSet.from_jsonl_lazy(cuts_path(options.data_dir / "fbank", "dev")))
    assert [cut.id for cut in made] == [cut.id for cut in cuts]
    assert {cut.features.type for cut in made} == {kind}
    return {cut.id: cut.load_features() for cut in made}


def test_the_job_stores_the_same_features(recordings: list[Path], tmp_path: Path) -> None:
    options = FbankOptions(tmp_path / "one", ("dev",), workers=1, shard_size=2, backend="kaldifeat")
    one = _stored(recordings, options, "kaldifeat-fbank")
    two = _stored(recordings, replace(options, data_dir=tmp_path / "two", workers=2), "kaldifeat-fbank")
    other = _stored(recordings, replace(options, data_dir=tmp_path / "3", backend="lhotse"), "kaldi-fbank")
    for id, features in one.items():
        assert np.array_equal(features, two[id])
        assert np.abs(features - other[id]).max() < 0.05  # lilcom's step is 1/32
