"""Utterances of lhotse manifests or audio files, read when they are decoded, long ones segment by segment.
Knows: cuts, audio, features. Must not know: models, searches, methods.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike
from icefall_fusion.data.audio import SAMPLE_RATE, AudioError, load_audio, resample
from icefall_fusion.data.fbank import extract
from icefall_fusion.data.features import DIM, FRAME_SHIFT

_TOLERANCE = 0.1  # seconds by which a file may be shorter than its manifest says
_MARGIN = 0.05  # seconds on each side of a segment that its features depend on, and some more


class InputError(ValueError):
    """The audio or features of one utterance are missing or broken; the message says whose and why."""


@dataclass(frozen=True)
class Utterance:
    """One utterance.

    Args:
        id: unique in its test set.
        seconds: duration, as far as known before reading.
        text: the reference, or None when there is none.
        load: reads features [T,80] or samples [N] float32, as was asked for: ``load()`` all of them,
            ``load(start, seconds)`` those of a segment (fewer at the utterance's end); may raise InputError.
        custom: further fields of the cut's first supervision.
        apart: whether segments can be read each by itself: not those of a cut that is mixed or transformed.
    """

    id: str
    seconds: float
    text: str | None
    load: Callable[..., Tensor] = field(compare=False)
    custom: Mapping[str, Any] = field(default_factory=dict, compare=False)
    apart: bool = True


def read_cuts(path: PathLike, wants: str) -> list[Utterance]:
    """Return the utterances of a lhotse manifest of cuts (with features, or with recordings only).

    Args:
        path: ``.jsonl`` or ``.jsonl.gz``.
        wants: ``features``, ``audio`` or ``nothing`` (only ids and references are needed).

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: the file is no manifest of cuts, it has none, or an id occurs twice.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no manifest of cuts at {path}")
    try:
        utterances = _of_manifest(path, wants)
    except Exception as error:  # lhotse and gzip have many errors for a broken file
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be loaded as a manifest of cuts: {reason}") from error
    check(len(utterances) > 0, f"{path}", "hold at least one cut", 0)
    _check_unique(utterances, str(path))
    return utterances


def _of_manifest(path: PathLike, wants: str) -> list[Utterance]:
    from lhotse import CutSet

    utterances = []
    for cut in CutSet.from_file(path):
        texts = [s.text for s in cut.supervisions if s.text is not None]
        text = " ".join(texts) if texts else None
        custom = (cut.supervisions[0].custom or {}) if cut.supervisions else {}
        load = _loader(cut, wants)
        utterances.append(Utterance(cut.id, float(cut.duration), text, load, custom, _is_plain(cut)))
    return utterances


def read_audio_files(paths: Iterable[PathLike], wants: str) -> list[Utterance]:
    """Return audio files as utterances without reference; the id is the path."""
    utterances = [Utterance(str(path), _duration(path), None, _file_loader(path, wants)) for path in paths]
    _check_unique(utterances, "the list of files")
    return utterances


def _check_unique(utterances: Sequence[Utterance], where: str) -> None:
    seen: set[str] = set()
    for utterance in utterances:
        check(utterance.id not in seen, f"ids in {where}", "occur once", utterance.id)
        seen.add(utterance.id)


def _duration(path: PathLike) -> float:
    import soundfile

    try:
        return float(soundfile.info(str(path)).duration)
    except (OSError, RuntimeError):  # reading the file will name the error
        return 0.0


def _file_loader(path: PathLike, wants: str) -> Callable[..., Tensor]:
    def load(start: float, seconds: Optional[float]) -> np.ndarray:
        return load_audio(path, seconds is not None, start, seconds)

    return _audio_loader(load, path, wants)


def _loader(cut: Any, wants: str) -> Callable[..., Tensor]:
    if wants == "nothing":
        return lambda: torch.zeros(0)
    if wants == "features" and cut.has_features:
        return lambda start=0.0, seconds=None: _stored_features(cut, start, seconds)
    return _audio_loader(lambda start, seconds: _cut_audio(cut, start, seconds), cut.id, wants)


def _stored_features(cut: Any, start: float, seconds: Optional[float]) -> Tensor:
    if _is_over(cut, start):
        return torch.zeros(0, DIM)
    try:
        return torch.from_numpy(_part_of(cut, start, seconds).load_features()).float()
    except Exception as error:  # an archive of any kind may be missing, cut short or foreign
        raise InputError(f"features of {cut.id} cannot be read: {type(error).__name__}: {error}") from error


def _is_over(cut: Any, start: float) -> bool:
    return start > 0 and round((cut.duration - start) * SAMPLE_RATE) < 1


def _part_of(cut: Any, start: float, seconds: Optional[float]) -> Any:
    if seconds is None:
        return cut
    return cut.truncate(offset=start, duration=min(seconds, cut.duration - start), preserve_id=True)


def _cut_audio(cut: Any, start: float, seconds: Optional[float]) -> np.ndarray:
    """Return a cut's audio [samples] at 16 kHz; lhotse pads, mixes and cuts out."""
    file = _whole_file(cut)
    if file is not None:
        samples = load_audio(file, seconds is not None, start, seconds)
        end = cut.duration if seconds is None else min(cut.duration, start + seconds)
        reached = start + len(samples) / SAMPLE_RATE
        if reached < end - _TOLERANCE:  # libsndfile takes a WAV that was cut short for a whole one
            raise AudioError(f"{file} is truncated: it has {reached:.2f} of {cut.duration:.2f} s")
        return samples
    if _is_over(cut, start):
        return np.zeros(0, np.float32)
    try:
        loaded = _part_of(cut, start, seconds).load_audio()
    except Exception as error:  # of any backend, of what mixing asks for
        raise AudioError(f"{type(error).__name__}: {error}") from error
    if loaded is None:
        raise AudioError("the cut has no recording")
    samples = resample(loaded.mean(axis=0), int(cut.sampling_rate))
    if not np.isfinite(samples).all():
        raise AudioError("it holds samples that are not finite numbers")
    return samples


def _is_plain(cut: Any) -> bool:
    """Return whether a cut is one segment of one recording as it was recorded: not mixed, not transformed."""
    from lhotse import MonoCut

    return isinstance(cut, MonoCut) and not (cut.recording is not None and cut.recording.transforms)


def _whole_file(cut: Any) -> str | None:
    """Return the path of the file that a cut is all of, or None."""
    if not _is_plain(cut) or cut.recording is None:
        return None
    sources = cut.recording.sources
    one_file = len(sources) == 1 and sources[0].type == "file" and len(sources[0].channels) == 1
    whole = cut.start == 0 and abs(cut.duration - cut.recording.duration) < 1e-3
    return str(sources[0].source) if one_file and whole else None


def _audio_loader(
    load: Callable[[float, Optional[float]], np.ndarray], name: Any, wants: str
) -> Callable[..., Tensor]:
    """Return an utterance's ``load`` from a function that reads samples by start and seconds (None: all)."""

    def read(start: float, seconds: Optional[float]) -> np.ndarray:
        try:
            return load(start, seconds)
        except (FileNotFoundError, AudioError) as error:
            raise InputError(f"audio of {name} cannot be read: {error}") from error

    def load_values(start: float = 0.0, seconds: Optional[float] = None) -> Tensor:
        if wants != "features":
            return torch.from_numpy(read(start, seconds))
        if seconds is None:
            return extract(read(start, seconds))
        begin = max(0.0, start - _MARGIN)  # so that frames are those of the whole
        frames = extract(read(begin, start + seconds + _MARGIN - begin))
        first = round((start - begin) / FRAME_SHIFT)
        return frames[first : first + round(seconds / FRAME_SHIFT)]

    return load_values


# --- batches ------------------------------------------------------------------------------------------


def batches(
    utterances: Sequence[Utterance], size: int, seconds: float, longest: float
) -> Iterator[list[Utterance]]:
    """Yield batches of utterances of similar length, the longest first.

    Args:
        utterances: in any order.
        size: utterances in a batch at most.
        seconds: of padded audio in a batch at most (one utterance may be more).
        longest: an utterance of more seconds is a batch of its own: it is decoded in segments.
    """
    batch: list[Utterance] = []
    for utterance in sorted(utterances, key=lambda u: (-u.seconds, u.id)):
        full = batch and (len(batch) == size or batch[0].seconds * (len(batch) + 1) > seconds)
        if full or (batch and batch[0].seconds > longest):
            yield batch
            batch = []
        batch.append(utterance)
    if batch:
        yield batch
