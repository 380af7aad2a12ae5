"""What is to be decoded: utterances of lhotse manifests or audio files, read late, long ones in parts.
Knows: cuts, audio, features, N-best lists of parts. Must not know: models, searches, methods.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from icefall_fusion.checks import check
from icefall_fusion.data.audio import SAMPLE_RATE, AudioError, load_audio, resample
from icefall_fusion.data.fbank import FRAME_SHIFT, extract
from icefall_fusion.files import PathLike
from icefall_fusion.nbest import Hypothesis, NBest, WordTime

_TOLERANCE = 0.1  # seconds that a file may lack of what its manifest says


class InputError(ValueError):
    """The audio or features of one utterance are missing or broken; the message says whose and why."""


@dataclass(frozen=True)
class Utterance:
    """One utterance.

    Args:
        id: unique in its test set.
        seconds: duration, as far as known before reading.
        text: the reference, or None when there is none.
        load: reads features [T,80] or samples [N] float32, whichever was asked for; may raise InputError.
        custom: further fields of the cut's first supervision.
    """

    id: str
    seconds: float
    text: str | None
    load: Callable[[], Tensor] = field(compare=False)
    custom: Mapping[str, Any] = field(default_factory=dict, compare=False)


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
    except Exception as error:  # lhotse and gzip have many errors for what is broken
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be loaded as a manifest of cuts: {what}") from error
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
        utterances.append(Utterance(cut.id, float(cut.duration), text, _loader(cut, wants), custom))
    return utterances


def read_audio_files(paths: Iterable[PathLike], wants: str) -> list[Utterance]:
    """Return audio files as utterances without reference; the id is the path as given."""
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
    except (OSError, RuntimeError):  # reading it will say what is wrong
        return 0.0


def _file_loader(path: PathLike, wants: str) -> Callable[[], Tensor]:
    return lambda: _of_audio(lambda: load_audio(path), path, wants)


def _loader(cut: Any, wants: str) -> Callable[[], Tensor]:
    if wants == "nothing":
        return lambda: torch.zeros(0)
    if wants == "features" and cut.has_features:
        return lambda: _stored_features(cut)
    return lambda: _of_audio(lambda: _cut_audio(cut), cut.id, wants)


def _stored_features(cut: Any) -> Tensor:
    try:
        return torch.from_numpy(cut.load_features()).float()
    except Exception as error:  # an archive of any kind may be missing, cut short or foreign
        raise InputError(f"features of {cut.id} cannot be read: {type(error).__name__}: {error}") from error


def _cut_audio(cut: Any) -> np.ndarray:
    """Return a cut's audio [samples] at 16 kHz; what is padded, mixed or part of a file is lhotse's work."""
    file = _whole_file(cut)
    if file is not None:
        samples = load_audio(file)
        seconds = len(samples) / SAMPLE_RATE
        if seconds < cut.duration - _TOLERANCE:  # libsndfile takes a WAV that was cut short for a whole one
            raise AudioError(f"{file} is truncated: it has {seconds:.2f} of {cut.duration:.2f} s")
        return samples
    try:
        loaded = cut.load_audio()
    except Exception as error:  # of any backend, of what mixing asks for
        raise AudioError(f"{type(error).__name__}: {error}") from error
    if loaded is None:
        raise AudioError("the cut has no recording")
    samples = resample(loaded.mean(axis=0), int(cut.sampling_rate))
    if not np.isfinite(samples).all():
        raise AudioError("it holds samples that are not finite numbers")
    return samples


def _whole_file(cut: Any) -> str | None:
    """Return the path of the file that a cut is all of, or None."""
    from lhotse import MonoCut

    if not isinstance(cut, MonoCut) or cut.recording is None or cut.recording.transforms:
        return None
    sources = cut.recording.sources
    one_file = len(sources) == 1 and sources[0].type == "file" and len(sources[0].channels) == 1
    whole = cut.start == 0 and abs(cut.duration - cut.recording.duration) < 1e-3
    return str(sources[0].source) if one_file and whole else None


def _of_audio(load: Callable[[], Any], name: Any, wants: str) -> Tensor:
    try:
        samples = load()
    except (FileNotFoundError, AudioError) as error:
        raise InputError(f"audio of {name} cannot be read: {error}") from error
    return extract(samples) if wants == "features" else torch.from_numpy(samples)


# --- batches ------------------------------------------------------------------------------------------


def batches(
    utterances: Sequence[Utterance], size: int, seconds: float, longest: float
) -> Iterator[list[Utterance]]:
    """Yield batches of utterances of similar length, the longest first.

    Args:
        utterances: in any order.
        size: utterances in a batch at most.
        seconds: of padded audio in a batch at most (one utterance may be more).
        longest: an utterance of more seconds is a batch of its own: it is decoded in parts.
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


def split_long(values: Tensor, longest: float) -> list[tuple[int, int]]:
    """Return the ranges into which features [T,80] or samples [N] are cut, each at most ``longest`` seconds.

    A cut is put at the quietest fifth of a second in the second half of the time allowed.
    """
    rate = round(1 / FRAME_SHIFT) if values.dim() == 2 else SAMPLE_RATE
    limit = max(int(longest * rate), 1)
    if len(values) <= limit:
        return [(0, len(values))]
    hop = 1 if values.dim() == 2 else round(rate * FRAME_SHIFT)
    if values.dim() == 2:
        loudness = values.mean(1)
    else:
        loudness = values[: len(values) // hop * hop].view(-1, hop).square().mean(1)
    window = 20
    smooth = torch.nn.functional.avg_pool1d(
        loudness[None, None], window, stride=1, padding=window // 2, count_include_pad=False
    )[0, 0]
    ranges, start = [], 0
    while len(values) - start > limit:
        first, last = (start + limit // 2) // hop, (start + limit) // hop
        cut = (first + int(smooth[first:last].argmin())) * hop if last > first else start + limit
        ranges.append((start, cut))
        start = cut
    return [*ranges, (start, len(values))]


def join_parts(utterance: str, parts: Sequence[NBest], starts: Sequence[float]) -> NBest:
    """Return the N-best list of an utterance that was decoded in parts.

    Rank k joins the k-th hypotheses of all parts (the last where a part has fewer); scores add up.

    Args:
        utterance: its id.
        parts: in order of time; each has at least one hypothesis.
        starts: seconds at which each part starts.
    """
    ranks = range(max(len(part) for part in parts))
    hypotheses = [_join([part[min(rank, len(part) - 1)] for part in parts], starts) for rank in ranks]
    return NBest(utterance, hypotheses, dict(parts[0].weights))


def _join(parts: Sequence[Hypothesis], starts: Sequence[float]) -> Hypothesis:
    return Hypothesis(
        tokens=[token for part in parts for token in part.tokens],
        text=" ".join(part.text for part in parts if part.text),
        scores={source: sum(part.scores[source] for part in parts) for source in parts[0].scores},
        times=[
            WordTime(time.word, time.start + start, time.end + start)
            for part, start in zip(parts, starts)
            for time in part.times
        ],
    )
