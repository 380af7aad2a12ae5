"""Knows: what augmentation promises: levels, lengths, determinism. Must not know: files, models."""

from __future__ import annotations

import numpy as np
import pytest

from icefall_fusion.data.noise import (
    CLEAN,
    COLORS,
    OTHER,
    SAMPLE_RATE,
    TRAIN,
    Conditions,
    active_rms,
    babble,
    band_limit,
    colored_noise,
    distort,
    mix,
    reverberate,
    room_response,
)


def _speech(seconds: float = 2.0) -> np.ndarray:
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (0.2 * np.sin(2 * np.pi * 200 * time) * (np.sin(2 * np.pi * 2 * time) > 0)).astype(np.float32)


def _slope(noise: np.ndarray, low: float, high: float) -> float:
    """Return the fall of power from around ``low`` to around ``high`` Hz, in dB an octave."""
    power = np.abs(np.fft.rfft(noise)) ** 2
    frequency = np.fft.rfftfreq(len(noise), 1 / SAMPLE_RATE)
    level = [
        10 * np.log10(power[(frequency > edge / 1.1) & (frequency < edge * 1.1)].mean())
        for edge in (low, high)
    ]
    return (level[1] - level[0]) / np.log2(high / low)


@pytest.mark.parametrize(("color", "slope"), [("white", 0), ("pink", -3), ("brown", -6), ("speech", -9)])
def test_color(color: str, slope: float) -> None:
    noise = colored_noise(160_000, color, np.random.default_rng(0))
    assert noise.dtype == np.float32 and noise.shape == (160_000,)
    assert np.sqrt(np.mean(noise**2)) == pytest.approx(1, abs=1e-3)
    assert _slope(noise, 1000, 4000) == pytest.approx(slope, abs=0.7)


@pytest.mark.parametrize("snr", [0.0, 10.0, 25.0])
def test_mix_has_the_ratio_asked_for(snr: float) -> None:
    speech = _speech()
    noise = colored_noise(len(speech), "pink", np.random.default_rng(1))
    added = mix(speech, noise, snr) - speech
    ratio = 20 * np.log10(active_rms(speech) / np.sqrt(np.mean(added**2)))
    assert ratio == pytest.approx(snr, abs=0.05)


def test_room_decays_as_asked() -> None:
    response = room_response(0.4, 3.0, np.random.default_rng(2))
    direct, tail = response[0] ** 2, np.sum(response[1:] ** 2)
    assert 10 * np.log10(direct / tail) == pytest.approx(3.0, abs=1e-3)
    first = np.flatnonzero(response[1:])[0] + 1
    left = 10 * np.log10(np.cumsum(response[first:][::-1] ** 2)[::-1])  # Schroeder's backward integral
    fall = left[0] - left[int(0.2 * SAMPLE_RATE)]
    assert fall == pytest.approx(30, abs=2)  # half of RT60, half of 60 dB


def test_reverberate_keeps_length_level_and_beginning() -> None:
    speech = _speech()
    wet = reverberate(speech, room_response(0.5, 0.0, np.random.default_rng(3)))
    assert wet.shape == speech.shape
    assert np.sqrt(np.mean(wet**2)) == pytest.approx(np.sqrt(np.mean(speech**2)), rel=1e-4)


def test_band_limit_removes_what_is_above() -> None:
    limited = band_limit(colored_noise(32_000, "white", np.random.default_rng(4)), 3000.0)
    power = np.abs(np.fft.rfft(limited)) ** 2
    frequency = np.fft.rfftfreq(len(limited), 1 / SAMPLE_RATE)
    assert power[frequency > 4000].mean() < 1e-4 * power[frequency < 2500].mean()


def test_babble_of_short_voices() -> None:
    noise = babble(16_000, [_speech(0.5), _speech(3.0)], 4, np.random.default_rng(5))
    assert noise.shape == (16_000,) and np.sqrt(np.mean(noise**2)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("conditions", [TRAIN, CLEAN, OTHER], ids=["train", "clean", "other"])
def test_distort_is_a_function_of_the_seed(conditions: Conditions) -> None:
    speech, voices = _speech(), [_speech(1.0)]
    for seed in range(20):
        first, record = distort(speech, conditions, np.random.default_rng(seed), voices)
        again, same = distort(speech, conditions, np.random.default_rng(seed), voices)
        assert record == same and np.array_equal(first, again)
        assert first.shape == speech.shape and first.dtype == np.float32
        assert np.isfinite(first).all() and np.abs(first).max() <= 1


def test_distort_of_nothing_and_silence() -> None:
    empty, _ = distort(np.zeros(0, np.float32), OTHER, np.random.default_rng(0))
    silent, _ = distort(np.zeros(1600, np.float32), OTHER, np.random.default_rng(0))
    assert len(empty) == 0 and np.isfinite(silent).all()


def test_no_babble_without_voices() -> None:
    kinds = {distort(_speech(0.1), Conditions(), np.random.default_rng(i))[1]["noise"] for i in range(60)}
    assert kinds == set(COLORS)
    with pytest.raises(ValueError, match="more than babble"):
        distort(_speech(0.1), Conditions(noises=("babble",)), np.random.default_rng(0))


@pytest.mark.parametrize(
    "wrong", [{"snr": (10.0, 0.0)}, {"rt60": (0.0, 0.1)}, {"noises": ("green",)}, {"mild_share": 1.5}]
)
def test_wrong_conditions_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"Conditions.{next(iter(wrong))}"):
        Conditions(**wrong)
