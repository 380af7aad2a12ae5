"""Knows: features of whole and chunked audio, of cuts, and of torchaudio. Must not know: models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

from icefall_fusion.data.audio import AudioError, load_audio
from icefall_fusion.data.fbank import DIM, FbankOptions, cut_samples, extract, num_frames, run
from icefall_fusion.data.manifests import cuts_path, write_cuts


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


def _recording(path: Path, rate: int, seconds: float) -> Recording:
    soundfile.write(path, _noise(round(rate * seconds), rate), rate)
    return Recording.from_file(path)


def _cut(id: str, place: tuple[float, float], recording: Recording) -> MonoCut:
    start, seconds = place
    said = SupervisionSegment(id, recording.id, 0.0, seconds, text="x", speaker="noise")
    return MonoCut(id, start, seconds, 0, recording=recording, supervisions=[said])


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050])
def test_cuts_of_any_sampling_rate_have_their_features(tmp_path: Path, rate: int) -> None:
    recording = _recording(tmp_path / "long.flac", rate, 6.0)
    places = [(0.0, 6.0), (0.0, 1.5), (2.25, 1.503), (4.497, 1.503)]
    cuts = [_cut(f"c{number}", place, recording) for number, place in enumerate(places)]
    whole = load_audio(tmp_path / "long.flac")
    assert len(whole) == 96_000
    for cut in cuts:
        first, count = round(cut.start * 16_000), round(cut.duration * 16_000)
        np.testing.assert_allclose(cut_samples(cut), whole[first : first + count], atol=1e-6)
    write_cuts(cuts, cuts_path(tmp_path / "manifests", "dev"))
    assert run(FbankOptions(tmp_path, ("dev",), workers=1)) == 0
    for cut in CutSet.from_jsonl_lazy(cuts_path(tmp_path / "fbank", "dev")):
        stored, samples = cut.load_features(), cut_samples(cut)
        assert stored.shape == (cut.num_frames, DIM) == (num_frames(round(cut.duration * 16_000)), DIM)
        assert np.abs(stored - extract(samples).numpy()).max() < 0.05  # lilcom's step is 1/32


def test_changed_speed_is_resampled_too(tmp_path: Path) -> None:
    cut = _cut("c", (0.0, 2.0), _recording(tmp_path / "a.flac", 8_000, 2.0)).perturb_speed(1.1)
    assert len(cut_samples(cut)) == pytest.approx(16_000 * cut.duration, abs=2)


def test_cuts_of_a_truncated_recording(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    recording = _recording(path, 8_000, 6.0)
    early, late = _cut("early", (0.5, 1.0), recording), _cut("late", (5.0, 1.0), recording)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match="a.flac"):
        cut_samples(late)
    soundfile.write(path, _noise(8_000 * 5), 8_000)  # whole, but shorter than the manifest says
    assert len(cut_samples(early)) == 16_000
    with pytest.raises(AudioError, match="a.flac is truncated: .* the manifest needs 96000"):
        cut_samples(late)
    soundfile.write(path, _noise(8_000 * 6 - 20), 8_000)
    samples = cut_samples(late)
    assert len(samples) == 16_000 and not samples[-40:].any() and samples[-50:].any()
