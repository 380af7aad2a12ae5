"""Knows: audio files in, mono float32 at 16 kHz out; what can be wrong with a file.
Must not know: features, manifests, models.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

from icefall_fusion.checks import check
from icefall_fusion.files import PathLike

SAMPLE_RATE = 16_000  # Hz
_UNKNOWN_SIZE = 0x7FFF_0000  # bytes; sizes above stand for "not known when the header was written"
_BLOCK = 1 << 20  # frames read at once: stereo is never held whole


class AudioError(ValueError):
    """A file that exists but cannot be read as audio: empty, truncated, or in no known format."""


def load_audio(path: PathLike, allow_empty: bool = False) -> np.ndarray:
    """Return an audio file as mono at 16 kHz.

    Channels are averaged, any sampling rate is resampled.

    Args:
        path: any file that soundfile can read (WAV, FLAC, OGG, MP3, ...).
        allow_empty: return 0 samples for a file that holds none, instead of an error.

    Returns:
        float32 [samples] in about [-1, 1].

    Raises:
        FileNotFoundError: no such file.
        AudioError: the file holds no samples, fewer than its header says, or no audio.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no audio file at {path}")
    if path.stat().st_size == 0:
        raise AudioError(f"audio file {path} is empty (0 bytes)")
    _refuse_cut_wav(path)
    blocks: list[np.ndarray] = []
    try:
        with soundfile.SoundFile(path) as file:
            rate, declared = file.samplerate, file.frames
            while True:
                block = file.read(_BLOCK, dtype="float32", always_2d=True)
                if len(block) == 0:
                    break
                blocks.append(block.mean(axis=1) if block.shape[1] > 1 else block[:, 0])
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise AudioError(f"audio file {path} cannot be read (truncated, or no audio): {error}") from None
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if len(samples) == 0 and not allow_empty:
        raise AudioError(f"audio file {path} holds no samples")
    if path.suffix.lower() in (".wav", ".flac") and len(samples) < declared < 2**40:
        raise AudioError(
            f"audio file {path} is truncated: {len(samples)} of {declared} samples could be read"
        )
    if not np.isfinite(samples).all():
        raise AudioError(f"audio file {path} holds samples that are not finite numbers")
    return resample(samples, rate)


def _refuse_cut_wav(path: Path) -> None:
    """Compare a WAV file's size with its header: libsndfile takes one that was cut short for a whole one."""
    with path.open("rb") as file:
        header = file.read(12)
    if header[:4] != b"RIFF" or header[8:] != b"WAVE":
        return
    declared = int.from_bytes(header[4:8], "little") + 8
    size = path.stat().st_size
    if size < declared - 1 < _UNKNOWN_SIZE:  # a last pad byte may lack; recorders into pipes write huge sizes
        raise AudioError(f"audio file {path} is truncated: it has {size} of {declared} bytes")


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Return mono ``samples`` of ``rate`` Hz at 16 kHz, float32 (polyphase filter, scipy)."""
    check(samples.ndim == 1, "samples", "be one channel, [samples]", samples.shape)
    check(rate >= 1, "rate", "be at least 1 Hz", rate)
    samples = np.asarray(samples, np.float32)
    if rate == SAMPLE_RATE or len(samples) == 0:
        return samples
    divisor = int(np.gcd(SAMPLE_RATE, rate))
    return resample_poly(samples, SAMPLE_RATE // divisor, rate // divisor).astype(np.float32, copy=False)
