"""From the bytes of a client to samples at 16 kHz.
Knows: formats of samples, rates. Must not know: sockets, protocols, streams.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import numpy as np

from icefall_fusion.common.checks import check, check_choice, is_count
from icefall_fusion.data.audio import SAMPLE_RATE, Resampler

FORMATS = {"f32le": np.dtype("<f4"), "s16le": np.dtype("<i2")}
RATES = range(8_000, 192_001)  # Hz


@dataclass(frozen=True)
class SampleFormat:
    """How a client sends its one channel.

    Args:
        rate: in Hz, 8,000 to 192,000; other rates than 16,000 are resampled here.
        name: f32le (in about [-1, 1]) or s16le.

    Raises:
        ValueError: an unknown format, or a rate out of bounds.
    """

    rate: int = SAMPLE_RATE
    name: str = "f32le"

    def __post_init__(self) -> None:
        good = is_count(self.rate) and self.rate in RATES
        check(good, "sample_rate", f"be an integer of {RATES[0]} to {RATES[-1]} Hz", self.rate)
        check_choice(self.name, FORMATS, "format")

    @property
    def width(self) -> int:
        """Bytes of a sample."""
        return FORMATS[self.name].itemsize

    def seconds(self, count: int) -> float:
        """Return how long so many bytes last."""
        return count / self.width / self.rate

    def check_whole(self, data: bytes) -> None:
        """Raise ValueError unless a message has whole samples."""
        rule = f"have whole samples of {self.width} bytes ({self.name})"
        check(len(data) % self.width == 0, "a message of audio", rule, f"of {len(data)} bytes")


class SampleReader:
    """Makes samples at 16 kHz, float32, of a client's messages; few are held between them."""

    def __init__(self, kind: SampleFormat) -> None:
        self._type = FORMATS[kind.name]
        self._resampler: Optional[Resampler] = None if kind.rate == SAMPLE_RATE else Resampler(kind.rate)

    def read(self, data: bytes) -> np.ndarray:
        """Return the samples of a message, as far as they are known.

        Raises:
            ValueError: there are numbers that are not finite, or so large that they cannot be samples.
        """
        raw = np.frombuffer(data, self._type)
        samples = raw.astype(np.float32)
        if self._type.kind == "i":
            samples /= 32768
        elif len(samples):
            good = bool(np.isfinite(samples).all())
            check(good, "samples", "be finite numbers", "not: there are NaN or infinity")
            most = float(np.abs(samples).max())
            check(most <= _LOUDEST, "samples", f"lie in about [-1, 1] (at most {_LOUDEST:g})", most)
        return samples if self._resampler is None else self._resampler.accept(samples)

    def end(self) -> np.ndarray:
        """Return the last samples."""
        return np.zeros(0, np.float32) if self._resampler is None else self._resampler.end()


_LOUDEST = 100_000.0  # above the scale of 16 bits, which some clients send
