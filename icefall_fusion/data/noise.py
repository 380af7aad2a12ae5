"""Knows: the effects of rooms, noise and channels on samples; numpy, scipy and seeds only.
Must not know: files, manifests, synthesis, models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional, Sequence

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.signal import oaconvolve

from icefall_fusion.common.checks import check, check_choice

SAMPLE_RATE = 16_000  # Hz
COLORS = ("white", "pink", "brown", "speech")
NOISES = (*COLORS, "babble")
SPEECH_CORNER = 500.0  # Hz: the long-term spectrum of speech is flat below, falls by 9 dB an octave above
LOWEST = 50.0  # Hz: noise is flat below, so that brown noise is audible


@dataclass(frozen=True)
class Conditions:
    """What may happen between mouth and microphone. Ranges are (low, high), drawn for each utterance.

    Args:
        snr: signal-to-noise ratio in dB over the active speech.
        mild_share: part of the utterances that draw from ``mild_snr`` and stay without a room.
        mild_snr: signal-to-noise ratio in dB of those.
        reverb_share: part of the other utterances that get a room.
        rt60: reverberation time in seconds.
        direct_to_reverb: energy of the direct sound over that of the tail, in dB.
        noises: kinds to draw from: white, pink, brown, speech (shaped), babble.
        babble_talkers: how many talkers babble has, (least, most).
        band_limit_share: part of the utterances that go through a narrow channel.
        band_limit: its upper edge in Hz.
        level: final RMS in dB relative to full scale.
    """

    snr: tuple[float, float] = (0.0, 25.0)
    mild_share: float = 0.4
    mild_snr: tuple[float, float] = (15.0, 30.0)
    reverb_share: float = 0.5
    rt60: tuple[float, float] = (0.05, 0.6)
    direct_to_reverb: tuple[float, float] = (-3.0, 10.0)
    noises: tuple[str, ...] = NOISES
    babble_talkers: tuple[int, int] = (3, 6)
    band_limit_share: float = 0.1
    band_limit: tuple[float, float] = (3000.0, 6000.0)
    level: tuple[float, float] = (-32.0, -20.0)

    def __post_init__(self) -> None:
        for name in ("snr", "mild_snr", "rt60", "direct_to_reverb", "babble_talkers", "band_limit", "level"):
            value = getattr(self, name)
            check(len(value) == 2 and value[0] <= value[1], f"Conditions.{name}", "be (low, high)", value)
        for name in ("mild_share", "reverb_share", "band_limit_share"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"Conditions.{name}", "lie in 0..1", value)
        check(self.rt60[0] > 0, "Conditions.rt60", "be positive seconds", self.rt60)
        check(
            self.babble_talkers[0] >= 1,
            "Conditions.babble_talkers",
            "start at 1 or more",
            self.babble_talkers,
        )
        check(self.level[1] <= 0, "Conditions.level", "be at most 0 dB", self.level)
        check(len(self.noises) > 0, "Conditions.noises", "name at least one kind", self.noises)
        for noise in self.noises:
            check_choice(noise, NOISES, "Conditions.noises")


#: Broad, for training: 40 % mild, the rest down to 0 dB and rooms up to 0.6 s.
TRAIN = Conditions()
#: A quiet room that is not a studio.
CLEAN = Conditions(
    snr=(10.0, 20.0),
    mild_share=0.0,
    reverb_share=0.7,
    rt60=(0.1, 0.3),
    direct_to_reverb=(3.0, 10.0),
    band_limit_share=0.0,
)
#: Noisy and reverberant: low SNR, always a room.
OTHER = Conditions(
    noises=("pink", "brown", "speech", "babble"),  # white hides low voices altogether
    snr=(4.0, 14.0),
    mild_share=0.0,
    reverb_share=1.0,
    rt60=(0.25, 0.6),
    direct_to_reverb=(-1.0, 8.0),
    band_limit_share=0.15,
)


def colored_noise(count: int, color: str, rng: np.random.Generator) -> np.ndarray:
    """Return noise of unit RMS.

    Args:
        count: number of samples, at least 1.
        color: white (flat), pink (-3 dB an octave), brown (-6 dB an octave) or speech
            (see ``SPEECH_CORNER``).
        rng: source of randomness.

    Returns:
        float32 [count].
    """
    check_choice(color, COLORS, "color")
    size = next_fast_len(max(count, 16), real=True)
    white = rng.standard_normal(size, dtype=np.float32)
    if color != "white":
        frequency = np.fft.rfftfreq(size, 1 / SAMPLE_RATE).astype(np.float32)
        if color == "speech":
            gain = np.maximum(frequency, SPEECH_CORNER) ** -1.5
        else:
            gain = np.maximum(frequency, LOWEST) ** (-0.5 if color == "pink" else -1.0)
        white = irfft(rfft(white) * gain, size)
    return _unit_rms(white[:count])


def babble(count: int, voices: Sequence[np.ndarray], talkers: int, rng: np.random.Generator) -> np.ndarray:
    """Return the sum of ``talkers`` random voices, each at a random position and level, with unit RMS.

    Args:
        count: number of samples.
        voices: speech of other utterances, each float32 [any length >= 1].
        talkers: how many at once.
        rng: source of randomness.

    Returns:
        float32 [count].
    """
    check(len(voices) > 0, "voices", "hold at least one utterance", len(voices))
    total = np.zeros(count, np.float32)
    for _ in range(talkers):
        voice = _unit_rms(voices[rng.integers(len(voices))])
        start = int(rng.integers(len(voice)))
        gain = np.float32(10 ** (rng.uniform(-4, 4) / 20))
        total += gain * np.resize(np.roll(voice, -start), count)
    return _unit_rms(total)


def room_response(rt60: float, direct_to_reverb: float, rng: np.random.Generator) -> np.ndarray:
    """Return the impulse response of a room: direct sound at sample 0, then exponentially decaying noise.

    Args:
        rt60: seconds until the tail has fallen by 60 dB.
        direct_to_reverb: energy of the direct sound over that of the tail, in dB.
        rng: source of randomness.

    Returns:
        float32 [samples], first value 1.
    """
    gap = int(rng.uniform(0.002, 0.012) * SAMPLE_RATE)  # the first reflection's way
    tail = rng.standard_normal(max(int(rt60 * SAMPLE_RATE), 1), dtype=np.float32)
    tail *= np.exp(-np.log(1000.0) * np.arange(len(tail)) / (rt60 * SAMPLE_RATE)).astype(np.float32)
    tail *= np.float32(10 ** (-direct_to_reverb / 20) / np.sqrt(np.sum(tail**2)))
    response = np.zeros(1 + gap + len(tail), np.float32)
    response[0] = 1.0
    response[1 + gap :] = tail
    return response


def reverberate(samples: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Return ``samples`` filtered by ``response``, with the same length (last echoes are cut) and RMS."""
    wet = oaconvolve(samples, response)[: len(samples)].astype(np.float32)
    return wet * (_rms(samples) / max(_rms(wet), 1e-9))


def band_limit(samples: np.ndarray, edge: float) -> np.ndarray:
    """Return ``samples`` without frequencies above ``edge`` Hz (a soft edge of 400 Hz)."""
    size = next_fast_len(len(samples) + SAMPLE_RATE // 10, real=True)
    frequency = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    gain = (1 / (1 + np.exp(np.clip((frequency - edge) / 100.0, -50, 50)))).astype(np.float32)
    return irfft(rfft(samples, size) * gain, size)[: len(samples)]


def active_rms(samples: np.ndarray) -> float:
    """Return the RMS over 20 ms frames at most 30 dB below the loudest: the level of speech, not pauses."""
    frame = SAMPLE_RATE // 50
    whole = len(samples) // frame * frame
    if whole == 0:
        return _rms(samples)
    power = np.mean(samples[:whole].reshape(-1, frame) ** 2, axis=1)
    loud = power >= power.max() * 1e-3
    return float(np.sqrt(power[loud].mean()))


def mix(samples: np.ndarray, noise: np.ndarray, snr: float) -> np.ndarray:
    """Return samples plus ``noise`` (same length, unit RMS) at ``snr`` dB below the active speech."""
    return samples + noise * np.float32(active_rms(samples) * 10 ** (-snr / 20))


def distort(
    samples: np.ndarray,
    conditions: Conditions,
    rng: np.random.Generator,
    voices: Optional[Sequence[np.ndarray]] = None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return ``samples`` under conditions drawn from ``conditions``, and the draw.

    Args:
        samples: float32 [samples] at 16 kHz.
        conditions: the ranges.
        rng: source of randomness; the same state gives the same result.
        voices: other utterances for babble; without them babble is not drawn.

    Returns:
        (float32 [samples] within [-1, 1], {"snr", "noise", "rt60", "band"}: dB, name, seconds or 0, Hz or 0).
    """
    mild = rng.random() < conditions.mild_share
    snr = rng.uniform(*(conditions.mild_snr if mild else conditions.snr))
    kinds = [kind for kind in conditions.noises if kind != "babble" or voices]
    check(
        len(kinds) > 0,
        "Conditions.noises",
        "name more than babble when no voices are given",
        conditions.noises,
    )
    kind = kinds[rng.integers(len(kinds))]
    record = {"snr": round(snr, 1), "noise": kind, "rt60": 0.0, "band": 0}
    if len(samples) == 0:
        return samples.astype(np.float32), record
    if not mild and rng.random() < conditions.reverb_share:
        rt60 = rng.uniform(*conditions.rt60)
        samples = reverberate(samples, room_response(rt60, rng.uniform(*conditions.direct_to_reverb), rng))
        record["rt60"] = round(rt60, 2)
    if kind == "babble":
        talkers = int(rng.integers(conditions.babble_talkers[0], conditions.babble_talkers[1] + 1))
        noise = babble(len(samples), voices or (), talkers, rng)
    else:
        noise = colored_noise(len(samples), kind, rng)
    samples = mix(samples, noise, snr)
    if rng.random() < conditions.band_limit_share:
        edge = rng.uniform(*conditions.band_limit)
        samples = band_limit(samples, edge)
        record["band"] = int(edge)
    return _at_level(samples, rng.uniform(*conditions.level)), record


def _at_level(samples: np.ndarray, level: float) -> np.ndarray:
    gain = 10 ** (level / 20) / max(_rms(samples), 1e-9)
    peak = float(np.abs(samples).max()) * gain
    return (samples * np.float32(gain / max(1.0, peak / 0.98))).astype(np.float32)


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) if len(samples) else 0.0


def _unit_rms(samples: np.ndarray) -> np.ndarray:
    return (samples / np.float32(max(_rms(samples), 1e-9))).astype(np.float32)
