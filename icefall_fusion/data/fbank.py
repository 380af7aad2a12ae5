"""Knows: log-mel filter banks (lhotse or kaldifeat) of samples and of manifests; the job `compute-fbank`.
Must not know: models (they normalize features themselves), how audio was made.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import multiprocessing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import torch
from lhotse import CutSet, Fbank, FbankConfig, Features, LilcomChunkyWriter, MonoCut
from lhotse.audio.utils import AudioLoadingError, DurationMismatchError
from lhotse.features.base import FeatureExtractor
from lhotse.utils import compute_num_samples
from tqdm import tqdm

from icefall_fusion.checks import check, check_choice
from icefall_fusion.data.audio import SAMPLE_RATE, AudioError, load_audio, resample
from icefall_fusion.data.manifests import check_corpus, cuts_path, join_shards, write_cuts
from icefall_fusion.files import atomic_path, write_json

DIM = 80
FRAME_SHIFT = 0.01  # seconds
HOP = 160  # samples
MARGIN = 4  # frames at both ends of a chunk that are cut away again: a frame reaches 280 samples to its right
SHORTEST = 400  # samples in one window; shorter audio is padded with silence to give its frames
BACKENDS = ("lhotse", "kaldifeat")
SKIPPED_SOME = 3  # exit code


@dataclass(frozen=True)
class FbankOptions:
    """Compute and store the features of manifests.

    Args:
        data_dir: where ``manifests/`` is and ``fbank/`` goes.
        splits: names of manifests.
        workers: processes. The result does not depend on it.
        shard_size: cuts in one resumable piece of work.
        backend: lhotse, or kaldifeat (faster on a GPU; built by hand, see the README).
        device: for kaldifeat, e.g. cpu or cuda:0.
        speed_perturb: add copies of the training split at 0.9 and 1.1 of its speed, as icefall does. Off:
            synthesis already varies the speed of speech.
        corpus: names the manifests: ``CORPUS_cuts_SPLIT.jsonl.gz``.
    """

    data_dir: Path = Path("data")
    splits: tuple[str, ...] = ("train", "dev", "test-clean", "test-other")
    workers: int = 2
    shard_size: int = 500
    backend: str = "lhotse"
    device: str = "cpu"
    speed_perturb: bool = False
    corpus: str = "minibooks"

    def __post_init__(self) -> None:
        check(len(self.splits) > 0, "FbankOptions.splits", "name at least one split", self.splits)
        check(self.workers >= 1, "FbankOptions.workers", "be at least 1", self.workers)
        check(self.shard_size >= 1, "FbankOptions.shard_size", "be at least 1", self.shard_size)
        check_choice(self.backend, BACKENDS, "FbankOptions.backend")
        check_corpus(self.corpus, "FbankOptions.corpus")


@functools.lru_cache(maxsize=4)
def extractor(backend: str = "lhotse", device: str = "cpu") -> FeatureExtractor:
    """Return the feature extractor, with no dither, so that features are a function of the samples."""
    check_choice(backend, BACKENDS, "backend")
    if backend == "lhotse":
        return Fbank(FbankConfig(num_mel_bins=DIM, sampling_rate=SAMPLE_RATE, device=device))
    try:
        import kaldifeat  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "backend kaldifeat is not installed; it is built from source (see README, 'k2 and kaldifeat'), "
            "or choose backend lhotse, which gives the same features",
            name="kaldifeat",
        ) from None
    from lhotse import KaldifeatFbank, KaldifeatFbankConfig
    from lhotse.features.kaldifeat import KaldifeatFrameOptions, KaldifeatMelOptions

    frame = KaldifeatFrameOptions(sampling_rate=SAMPLE_RATE, dither=0.0)
    return KaldifeatFbank(KaldifeatFbankConfig(frame, KaldifeatMelOptions(num_bins=DIM), device=device))


def num_frames(samples: int) -> int:
    """Return the number of feature frames of that many samples at 16 kHz: one per 10 ms, rounded half up."""
    return (samples + HOP // 2) // HOP


def extract(
    samples: np.ndarray,
    rate: int = SAMPLE_RATE,
    chunk_seconds: float = 300.0,
    backend: str = "lhotse",
    device: str = "cpu",
) -> torch.Tensor:
    """Return the features of one channel of audio of any length.

    Long audio is taken in chunks that overlap by a few frames: memory stays bounded and the frames are those
    of the whole.

    Args:
        samples: float [samples] in about [-1, 1].
        rate: their sampling rate in Hz; anything but 16 kHz is resampled.
        chunk_seconds: how much to hold at once, at least 1.
        backend: lhotse or kaldifeat.
        device: where to compute.

    Returns:
        float32 [T, 80] on the CPU, one frame per 10 ms; T is 0 for less than half a frame.
    """
    check(chunk_seconds >= 1, "chunk_seconds", "be at least 1 second", chunk_seconds)
    samples = resample(np.asarray(samples), rate)
    check(bool(np.isfinite(samples).all()), "samples", "be finite numbers", "an array with NaN or infinity")
    total = num_frames(len(samples))
    if total == 0:
        return torch.zeros(0, DIM)
    compute = extractor(backend, device)
    if len(samples) < SHORTEST:
        return _frames(compute, np.pad(samples, (0, SHORTEST - len(samples))))[:total]
    size = int(chunk_seconds / FRAME_SHIFT)
    chunks = []
    for start in range(0, total, size):
        stop = min(start + size, total)
        first, last = max(start - MARGIN, 0), stop + MARGIN
        if total - stop <= 2 * MARGIN:  # no crumbs at the end
            stop, last = total, total + MARGIN
        piece = samples[first * HOP : last * HOP]
        chunks.append(_frames(compute, piece)[start - first : stop - first])
        if stop == total:
            break
    return torch.cat(chunks)


def _frames(compute: FeatureExtractor, samples: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return torch.as_tensor(compute.extract(torch.from_numpy(samples), SAMPLE_RATE)).cpu().clone()


def run(options: FbankOptions) -> int:
    """Write ``fbank/CORPUS_cuts_SPLIT.jsonl.gz`` and archives; return 0, or 3 when audio was skipped."""
    extractor(options.backend, options.device)  # fails here, not in a process of its own
    skipped = 0
    for split in options.splits:
        skipped += _run_split(options, split)
    return SKIPPED_SOME if skipped else 0


def _run_split(options: FbankOptions, split: str) -> int:
    source = cuts_path(options.data_dir / "manifests", split, options.corpus)
    if not source.is_file():
        raise FileNotFoundError(f"no manifest at {source}: make the audio of {split} first (job synthesize)")
    shards = _plan(options, split, list(CutSet.from_jsonl_lazy(source)))
    todo = [shard for shard in shards if not shard.manifest.exists()]
    print(f"compute-fbank {split}: {len(shards)} shards, {len(shards) - len(todo)} already done")
    with tqdm(total=sum(len(shard.cuts) for shard in shards), unit="cut", desc=split, smoothing=0.05) as bar:
        bar.update(bar.total - sum(len(shard.cuts) for shard in todo))
        for done in _each(options, todo):
            bar.update(done)
    target = cuts_path(options.data_dir / "fbank", split, options.corpus)
    totals = join_shards([shard.manifest for shard in shards], target)
    skipped: list[dict[str, Any]] = []
    for shard in shards:
        skipped += json.loads(shard.manifest.with_suffix(".skipped").read_text())
    write_json(target.parent / f"compute-fbank-{split}.json", {**totals, "skipped": skipped})
    for entry in skipped:
        logging.warning("skipped %s: %s", entry["id"], entry["error"])
    print(
        f"{split}: {totals['hours']:.2f} h, {totals['utterances']} cuts, {len(skipped)} skipped -> {target}"
    )
    return len(skipped)


@dataclass(frozen=True)
class _Shard:
    manifest: Path
    archive: Path
    cuts: list[MonoCut]


def _plan(options: FbankOptions, split: str, cuts: list[MonoCut]) -> list[_Shard]:
    if options.speed_perturb and split == "train":
        cuts = [copy for cut in cuts for copy in (cut, cut.perturb_speed(0.9), cut.perturb_speed(1.1))]
    folder = options.data_dir / "fbank"
    shards = []
    for number, start in enumerate(range(0, len(cuts), options.shard_size)):
        chunk = cuts[start : start + options.shard_size]
        content = [
            options.backend,
            [(cut.id, cut.duration, cut.recording.sources[0].source) for cut in chunk],
        ]
        name = f"{number:05d}-{hashlib.sha1(json.dumps(content).encode()).hexdigest()[:8]}"
        shards.append(
            _Shard(folder / ".parts" / split / f"{name}.jsonl.gz", folder / split / f"{name}.lca", chunk)
        )
    return shards


def _each(options: FbankOptions, todo: list[_Shard]) -> Iterator[int]:
    make = functools.partial(_make_shard, options)
    if options.workers == 1 or len(todo) < 2 or options.device != "cpu":
        yield from map(make, todo)
        return
    with multiprocessing.get_context("spawn").Pool(
        min(options.workers, len(todo)), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield from pool.imap_unordered(make, todo)


def _make_shard(options: FbankOptions, shard: _Shard) -> int:
    compute = extractor(options.backend, options.device)
    done, skipped = [], []
    with atomic_path(shard.archive) as temporary, LilcomChunkyWriter(str(temporary)) as writer:
        for cut in shard.cuts:
            try:
                features = extract(cut_samples(cut), backend=options.backend, device=options.device)
            except (AudioError, FileNotFoundError) as error:
                skipped.append({"id": cut.id, "error": str(error)})
                continue
            key = writer.write(cut.id, features.numpy())
            done.append(_with_features(cut, len(features), compute.name, str(shard.archive.absolute()), key))
        writer.close()
    write_json(shard.manifest.with_suffix(".skipped"), skipped)
    write_cuts(done, shard.manifest)  # last: its presence says that the archive is whole
    return len(shard.cuts)


def _with_features(cut: MonoCut, frames: int, kind: str, archive: str, key: str) -> MonoCut:
    features = Features(
        type=kind,
        num_frames=frames,
        num_features=DIM,
        frame_shift=FRAME_SHIFT,
        sampling_rate=SAMPLE_RATE,
        start=cut.start,
        duration=cut.duration,
        storage_type=LilcomChunkyWriter.name,
        storage_path=archive,
        storage_key=key,
        recording_id=cut.recording_id,
        channels=0,
    )
    return replace(cut, features=features)


def cut_samples(cut: MonoCut) -> np.ndarray:
    """Return the audio of a cut, [samples] at 16 kHz; only its part of the file is read.

    Raises:
        FileNotFoundError: the file is gone.
        AudioError: it is broken, or shorter than the manifest says (a lack of up to 10 ms becomes silence).
    """
    if cut.recording.transforms:  # speed perturbation: lhotse's business
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
