"""Audio files in, mono float32 at 16 kHz out.
Knows: formats and damages of audio files. Must not know: features, manifests, models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Iterable, Iterator, Optional

import numpy as np
import soundfile
from scipy.signal import resample_poly

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike

SAMPLE_RATE = 16_000  # Hz
UNKNOWN_LENGTH = 2**40  # frames; libsndfile reports more where the header has no length
_UNKNOWN_SIZE = 0x7FFF_0000  # bytes; a larger size was not known when the header was written
_BLOCK = 1 << 20  # frames read at once
_MOST = 1 << 30  # samples allocated at once at most, as a header may be damaged


class AudioError(ValueError):
    """A file that exists but cannot be read as audio: empty, truncated, or in no known format."""


def load_audio(
    path: PathLike,
    allow_empty: bool = False,
    offset: float = 0.0,
    duration: Optional[float] = None,
    as_stored: bool = False,
) -> np.ndarray:
    """Return an audio file, or a span of it, as mono at 16 kHz.

    Channels are averaged and any sampling rate is resampled, block by block. Little memory is used beside
    that of the result. A span costs the reading of that span, and its samples are those of the whole file.

    Args:
        path: any file that soundfile can read (WAV, FLAC, OGG, MP3, ...).
        allow_empty: return 0 samples for a file (or span) without samples, instead of an error.
        offset: start of the span in seconds.
        duration: length of the span in seconds; None: to the end. A span beyond the end is shorter.
        as_stored: return the samples of one channel of 16 bits at 16 kHz as they are, int16 in units of
            1/32768; other files as ever.

    Returns:
        float32 [samples] in about [-1, 1], or int16 (see ``as_stored``).

    Raises:
        FileNotFoundError: no such file.
        AudioError: the file (or span) has no samples, the file has fewer than its header declares, or it is
            no audio.
    """
    check(offset >= 0, "offset", "be at least 0 seconds", offset)
    check(duration is None or duration > 0, "duration", "be more than 0 seconds", duration)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no audio file at {path}")
    if path.stat().st_size == 0:
        raise AudioError(f"audio file {path} is empty (0 bytes)")
    _refuse_cut_wav(path)
    try:
        with soundfile.SoundFile(path) as file:
            rate, declared = file.samplerate, file.frames
            span = _Span(rate, offset, duration)
            plain = rate == SAMPLE_RATE and file.channels == 1 and file.subtype == "PCM_16"
            frames = _Frames(file, span, path, "int16" if as_stored and plain else "float32")
            end = declared if span.last is None else min(span.last, declared)
            known = max(0, end - span.first) if declared < UNKNOWN_LENGTH else 0
            blocks = frames if rate == SAMPLE_RATE else _resampled(frames, rate)
            samples = _joined(blocks, min(-(-known * SAMPLE_RATE // rate), _MOST), frames.dtype)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise AudioError(f"audio file {path} cannot be read (truncated, or no audio): {error}") from None
    if path.suffix.lower() in (".wav", ".flac") and declared < UNKNOWN_LENGTH:
        if span.first + frames.read < end:
            got = f"{frames.read} of {end - span.first}"
            raise AudioError(f"audio file {path} is truncated: {got} samples could be read")
    samples = samples[span.skipped :][: span.count]
    if len(samples) == 0 and not allow_empty:
        where = f" after {offset} s" if offset > 0 else ""
        raise AudioError(f"audio file {path} holds no samples{where}")
    return samples


class _Span:
    """The frames to read for a span: ``first`` to ``last``. Resampled, it begins after ``skipped`` samples.

    The first frame lies early enough, and at the time of a sample at 16 kHz, so that resampling the span
    equals resampling the whole.
    """

    def __init__(self, rate: int, offset: float, duration: Optional[float]) -> None:
        up, down = _factors(rate)
        reach = _reach(up, down)
        start = round(offset * SAMPLE_RATE)
        self.first = max(0, start * down // up - reach) // down * down
        self.skipped = start - self.first // down * up
        self.count, self.last = None, None
        if duration is not None:
            self.count = round(duration * SAMPLE_RATE)
            self.last = -(-(start + self.count) * down // up) + reach


def _factors(rate: int) -> tuple[int, int]:
    divisor = int(np.gcd(SAMPLE_RATE, rate))
    return SAMPLE_RATE // divisor, rate // divisor


def _reach(up: int, down: int) -> int:
    """Return how many frames to each side a resampled sample depends on: half of resample_poly's filter."""
    return 0 if up == down else -(-10 * max(up, down) // up) + 1


class _Frames:
    """Frames ``first`` to ``last`` (None: the end) of a file, in blocks, channels averaged.

    Args:
        file: open.
        span: the frames to read.
        path: for messages.
        dtype: int16 or float32.

    Attributes:
        read: number of frames read so far; less than the span's at the end of the file.
    """

    def __init__(self, file: soundfile.SoundFile, span: _Span, path: Path, dtype: str) -> None:
        self._file, self._span, self._path, self.dtype, self.read = file, span, path, dtype, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        first, last, seekable = self._span.first, self._span.last, self._file.seekable()
        if seekable:
            self._file.seek(min(first, self._file.frames))
        position = first if seekable else 0
        while last is None or position < last:
            size = _BLOCK if last is None else min(_BLOCK, last - position)
            block = self._file.read(size, dtype=self.dtype, always_2d=True)
            if len(block) == 0:
                break
            unwanted = max(0, first - position)  # a stream that cannot seek
            position += len(block)
            block = block[unwanted:]
            if self.dtype == "float32" and not np.isfinite(block).all():
                raise AudioError(f"audio file {self._path} holds samples that are not finite numbers")
            self.read += len(block)
            yield block.mean(axis=1) if block.shape[1] > 1 else block[:, 0]


class Resampler:
    """Mono audio of any rate to 16 kHz, block by block: the samples are those of `resample` over the whole.

    Few samples are held between blocks.

    Args:
        rate: of the blocks, in Hz.
    """

    def __init__(self, rate: int) -> None:
        check(rate >= 1, "rate", "be at least 1 Hz", rate)
        self._rate, (self._up, self._down) = rate, _factors(rate)
        self._held, self._begin, self._made = np.zeros(0, np.float32), 0, 0  # it is held from that sample on

    def accept(self, block: np.ndarray) -> np.ndarray:
        """Take in the next samples and return those at 16 kHz that are known now, float32."""
        up, down, reach = self._up, self._down, _reach(self._up, self._down)
        self._held = np.concatenate((self._held, block))
        known = (self._begin + len(self._held) - 1 - reach) * up // down
        made = self._make(max(self._made, known))
        kept = max(self._begin, (self._made * down // up - reach) // down * down)
        self._held, self._begin = self._held[kept - self._begin :], kept
        return made

    def end(self) -> np.ndarray:
        """Return the last samples; no more may follow."""
        return self._make(None)

    def _make(self, stop: Optional[int]) -> np.ndarray:
        before = self._begin // self._down * self._up
        until = None if stop is None else stop - before
        made = resample(self._held, self._rate)[self._made - before : until]
        self._made += len(made)
        return made


def _resampled(blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Yield the samples of `resample` over all blocks together, holding few frames at a time."""
    resampler = Resampler(rate)
    for block in blocks:
        yield resampler.accept(block)
    yield resampler.end()


def _joined(blocks: Iterable[np.ndarray], expected: int, dtype: str = "float32") -> np.ndarray:
    """Return blocks as one array, without a copy if there are ``expected`` samples."""
    result, count = np.empty(expected, dtype), 0
    for block in blocks:
        if count + len(block) > len(result):  # headers may promise less
            result = np.concatenate((result[:count], np.empty(len(block) + count // 4, dtype)))
        result[count : count + len(block)] = block
        count += len(block)
    return result[:count]


def _refuse_cut_wav(path: Path) -> None:
    """Compare a WAV file's size with its header, as libsndfile accepts files that were cut short."""
    with path.open("rb") as file:
        header = file.read(12)
    if header[:4] != b"RIFF" or header[8:] != b"WAVE":
        return
    declared = int.from_bytes(header[4:8], "little") + 8
    size = path.stat().st_size
    if size < declared - 1 < _UNKNOWN_SIZE:  # the pad byte may lack; pipes write huge sizes
        raise AudioError(f"audio file {path} is truncated: it has {size} of {declared} bytes")


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Return mono ``samples`` of ``rate`` Hz at 16 kHz, float32 (polyphase filter, scipy)."""
    check(samples.ndim == 1, "samples", "be one channel, [samples]", samples.shape)
    check(rate >= 1, "rate", "be at least 1 Hz", rate)
    samples = np.asarray(samples, np.float32)
    if rate == SAMPLE_RATE or len(samples) == 0:
        return samples
    return resample_poly(samples, *_factors(rate)).astype(np.float32, copy=False)
