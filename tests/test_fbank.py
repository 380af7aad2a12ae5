"""Knows: features of whole and chunked audio, and of torchaudio. Must not know: models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from icefall_fusion.data.fbank import DIM, extract, num_frames


def _noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.3, 0.3, count).astype(np.float32)


@pytest.mark.parametrize(
    "count", [16_000 * 3, 16_000 * 3 + 79, 16_000 * 3 + 81, 16_000 * 2 + 700, 16_000 + 1, 47_999]
)
def test_chunked_is_whole(count: int) -> None:
    samples = _noise(count)
    whole = extract(samples)
    assert whole.shape == (num_frames(count), DIM)
    torch.testing.assert_close(extract(samples, chunk_seconds=1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [0, 1, 79, 80, 159, 399, 400, 401, 1000])
def test_short_audio(count: int) -> None:
    features = extract(_noise(count))
    assert features.shape == (num_frames(count), DIM)
    assert torch.isfinite(features).all()


def test_silence_is_finite() -> None:
    assert torch.isfinite(extract(np.zeros(16_000, np.float32))).all()


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        extract(np.full(1600, np.nan, np.float32))


def test_resampling_keeps_the_frame_rate() -> None:
    time = np.arange(44_100) / 44_100
    high = extract(np.sin(2 * np.pi * 1000 * time).astype(np.float32), 44_100)
    low = extract(np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000).astype(np.float32))
    assert high.shape == low.shape
    assert high.argmax(dim=1).float().median() == low.argmax(dim=1).float().median()


def test_agrees_with_torchaudio() -> None:
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi")
    samples = _noise(16_000)
    theirs = kaldi.fbank(
        torch.from_numpy(samples)[None],
        num_mel_bins=DIM,
        sample_frequency=16_000,
        high_freq=-400.0,
        dither=0.0,
        snip_edges=False,
        energy_floor=1e-10,
    )
    torch.testing.assert_close(extract(samples), theirs, atol=2e-3, rtol=1e-3)
