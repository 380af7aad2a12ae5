"""The audio of cuts, one after another or read ahead by threads.
Knows: cuts, audio files, the frame shift. Must not know: how features are made, models.
"""
from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Iterable, Iterator

import numpy as np
from lhotse import MonoCut
from lhotse.audio.utils import AudioLoadingError, DurationMismatchError
from lhotse.utils import compute_num_samples

from icefall_fusion.data.audio import SAMPLE_RATE, AudioError, load_audio, resample
from icefall_fusion.data.features import HOP

_AHEAD = 4  # cuts that each thread may have read before they are used


def cut_samples(cut: MonoCut) -> np.ndarray:
    """Return the audio of a cut, [samples] at 16 kHz; only its span of the file is read.

    Raises:
        FileNotFoundError: there is no such file.
        AudioError: it is broken, or shorter than in the manifest by more than 10 ms (up to that is padded).
    """
    if cut.recording.transforms:  # speed perturbation, which lhotse applies
        try:
            return resample(cut.load_audio()[0], cut.recording.sampling_rate)
        except (AudioLoadingError, DurationMismatchError) as error:
            raise AudioError(str(error)) from error
    path = cut.recording.sources[0].source
    samples = load_audio(path, allow_empty=True, offset=cut.start, duration=cut.duration)
    first, count = round(cut.start * SAMPLE_RATE), compute_num_samples(cut.duration, SAMPLE_RATE)
    if len(samples) < count - HOP:
        there = f"{first + len(samples)} samples at 16 kHz" if len(samples) else "too few samples"
        raise AudioError(f"audio file {path} is truncated: {there}, the manifest needs {first + count}")
    return np.pad(samples[:count], (0, count - len(samples[:count])))


def read_ahead(cuts: Iterable[MonoCut], threads: int) -> Iterator[tuple[MonoCut, Callable[[], np.ndarray]]]:
    """Yield each cut with a function that returns or raises its `cut_samples`; threads read ahead."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[MonoCut, Callable[[], np.ndarray]]] = deque()
        for cut in cuts:
            waiting.append((cut, pool.submit(cut_samples, cut).result))
            if len(waiting) > _AHEAD * threads:
                yield waiting.popleft()
        yield from waiting
