"""The audio of cuts, one after another or read ahead by threads.
Knows: cuts, audio files, the frame shift. Must not know: how features are made, models.
"""
from __future__ import annotations

import contextlib
import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Iterable, Iterator, Optional, TypeVar, Union

import numpy as np
from lhotse import MonoCut
from lhotse.audio.utils import AudioLoadingError, DurationMismatchError
from lhotse.utils import compute_num_samples
from torch import Tensor

from icefall_fusion.data.audio import SAMPLE_RATE, AudioError, load_audio, resample
from icefall_fusion.data.features import HOP

Samples = Union[np.ndarray, Tensor]  # of a cut: its audio [samples], or its stored features [T,80]
Item = TypeVar("Item")
Result = TypeVar("Result")
_AHEAD = 4  # cuts, or groups of them, that each thread may have read before they are used


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
    return _span(samples, cut, cut.start, path)


def _span(samples: np.ndarray, cut: MonoCut, offset: float, path: str) -> np.ndarray:
    """Return the audio of a cut, of ``samples`` that begin ``offset`` seconds after the file does."""
    first, count = round(cut.start * SAMPLE_RATE), compute_num_samples(cut.duration, SAMPLE_RATE)
    samples = samples[first - round(offset * SAMPLE_RATE) :][:count]
    if len(samples) < count - HOP:
        there = f"{first + len(samples)} samples at 16 kHz" if len(samples) else "too few samples"
        raise AudioError(f"audio file {path} is truncated: {there}, the manifest needs {first + count}")
    return np.pad(samples, (0, count - len(samples)))


def read_ahead(cuts: Iterable[MonoCut], threads: int) -> Iterator[tuple[MonoCut, Callable[[], np.ndarray]]]:
    """Yield each cut with a function that returns or raises its `cut_samples`; threads read ahead."""
    return _ahead(cuts, cut_samples, threads)


def read_recordings(
    cuts: Iterable[MonoCut], threads: int, at_once: int, stored: Callable[[MonoCut], Tensor]
) -> Iterator[tuple[MonoCut, Union[Samples, Exception]]]:
    """Yield each cut with its audio, or the error that was raised instead; threads read ahead.

    Audio is that of `cut_samples`, but int16 where it is stored so (in units of 1/32768). Consecutive cuts
    of one recording open its file once.

    Args:
        cuts: of any recordings.
        threads: how many.
        at_once: most cuts that are read together.
        stored: reads the features of a cut that has some; they take the place of its `cut_samples`.
    """

    def read(group: list[MonoCut]) -> list[Union[Samples, Exception]]:
        return _together(group, stored)

    for group, done in _ahead(_groups(cuts, at_once), read, threads):
        yield from zip(group, done())


def _groups(cuts: Iterable[MonoCut], at_once: int) -> Iterator[list[MonoCut]]:
    for _, same in itertools.groupby(cuts, key=_is_span_of):
        while group := list(itertools.islice(same, at_once)):
            yield group


def _is_span_of(cut: MonoCut) -> Optional[str]:
    """Return the file whose span the cut is; None for features, and where lhotse must change the audio."""
    plain = not cut.has_features and cut.has_recording and not cut.recording.transforms
    return cut.recording.sources[0].source if plain else None


def _together(group: list[MonoCut], stored: Callable[[MonoCut], Tensor]) -> list[Union[Samples, Exception]]:
    path = _is_span_of(group[0])
    first, last = min(cut.start for cut in group), max(cut.end for cut in group)
    if path is not None and last - first <= 2 * sum(cut.duration for cut in group):  # they lie together
        with contextlib.suppress(AudioError, FileNotFoundError):  # told below, cut by cut
            whole = load_audio(path, allow_empty=True, offset=first, duration=last - first, as_stored=True)
            return [_span(whole, cut, first, path) for cut in group]
    return [_or_error(stored if cut.has_features else cut_samples, cut) for cut in group]


def _or_error(read: Callable[[MonoCut], Samples], cut: MonoCut) -> Union[Samples, Exception]:
    try:
        return read(cut)
    except (FileNotFoundError, ValueError) as error:
        return error


def _ahead(
    items: Iterable[Item], read: Callable[[Item], Result], threads: int
) -> Iterator[tuple[Item, Callable[[], Result]]]:
    """Yield each item with a function that returns or raises what ``read`` does; threads read ahead."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[Item, Callable[[], Result]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(read, item).result))
            if len(waiting) > _AHEAD * threads:
                yield waiting.popleft()
        yield from waiting
