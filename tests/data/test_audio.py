"""Long audio files: reading and resampling by blocks equals that of the whole, in bounded memory.
Knows: icefall_fusion.data.audio. Must not know: features, manifests.
"""
from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

from icefall_fusion.data import audio
from icefall_fusion.data.audio import AudioError, load_audio, resample


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 16_001, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("block", [700, 4_096, 10**6])
def test_blocks_give_what_the_whole_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int, block: int
) -> None:
    samples = np.random.default_rng(rate).uniform(-0.5, 0.5, 3 * rate + 17).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    monkeypatch.setattr(audio, "_BLOCK", block)
    samples_read, expected = load_audio(tmp_path / "a.wav"), resample(samples, rate)
    assert samples_read.dtype == np.float32 and samples_read.shape == expected.shape
    np.testing.assert_allclose(samples_read, expected, atol=1e-6)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_memory_is_that_of_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int) -> None:
    minute = np.random.default_rng(0).uniform(-0.5, 0.5, (60 * rate, 2)).astype(np.float32)
    with soundfile.SoundFile(tmp_path / "a.wav", "w", rate, 2) as file:
        for _ in range(8):
            file.write(minute)
    del minute
    monkeypatch.setattr(audio, "_BLOCK", 2**14)
    tracemalloc.start()
    try:
        samples = load_audio(tmp_path / "a.wav")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(samples) == 8 * 60 * 16_000
    assert samples.nbytes <= peak < 1.1 * samples.nbytes


def test_headers_that_promise_too_little_or_too_much(tmp_path: Path) -> None:
    samples = np.arange(1000, dtype=np.float32)
    for expected in (0, 10, 999, 1000, 5000):
        joined = audio._joined(iter(np.array_split(samples, 7)), expected)
        np.testing.assert_array_equal(joined, samples)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 8_000, subtype="FLOAT")
    with pytest.raises(AudioError, match="nan.wav holds samples that are not finite numbers"):
        load_audio(tmp_path / "nan.wav")
