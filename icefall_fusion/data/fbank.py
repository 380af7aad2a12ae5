"""Log-mel features of audio and of manifests, by lhotse or kaldifeat; the job `compute-fbank`.
Knows: audio, cuts, shards. Must not know: models (they normalize features themselves), how audio was made.
"""

from __future__ import annotations

import functools
import itertools
import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from lhotse import Fbank, FbankConfig, Features, LilcomChunkyWriter, MonoCut
from lhotse.features.base import FeatureExtractor
from tqdm import tqdm

from icefall_fusion.common.checks import check, check_at_least, check_choice
from icefall_fusion.common.command_line import SKIPPED_SOME, UNFINISHED
from icefall_fusion.common.files import atomic_path, write_json
from icefall_fusion.common.workers import in_workers
from icefall_fusion.data.audio import SAMPLE_RATE, AudioError, resample
from icefall_fusion.data.cut_audio import read_ahead
from icefall_fusion.data.cut_lines import parse_cut, read_lines
from icefall_fusion.data.feature_shards import Shard, joined_lines, plan, ranges
from icefall_fusion.data.features import DIM, FRAME_SHIFT, HOP
from icefall_fusion.data.manifests import check_corpus, cuts_path, join_lines

MARGIN = 4  # frames cut off both ends of a chunk, as a frame reaches 280 samples to its right
SHORTEST = 400  # samples of a window; shorter audio is padded with silence
BACKENDS = ("lhotse", "kaldifeat")
SHOWN, LISTED = 20, 10_000  # skipped cuts: how many are printed, how many the report lists
EVALUATION = ("dev", "test")  # splits with these prefixes are neither perturbed nor shuffled


@dataclass(frozen=True)
class FbankOptions:
    """Compute and store the features of manifests.

    Several machines (or GPUs) with one ``data_dir`` can each compute some shards, e.g.
    ``--start 0 --stop 500``. The run after which no shard is missing joins them. A killed run goes on when
    it is called again.

    Args:
        data_dir: folder of ``manifests/`` and ``fbank/``.
        splits: names of manifests.
        workers: processes, or on a GPU threads that read audio. The result does not depend on it.
        shard_size: cuts in one shard; a killed run loses unfinished shards.
        backend: lhotse, or kaldifeat (for a GPU; tools/install_kaldifeat.sh installs it).
        device: for kaldifeat, e.g. cpu or cuda:0.
        speed_perturb: add copies of all splits but dev and test at 0.9 and 1.1 of their speed, as icefall
            does. Synthesized speech varies in speed already.
        corpus: names the manifests: ``CORPUS_cuts_SPLIT.jsonl.gz``.
        start: first shard to compute here, from 0.
        stop: one past the last shard to compute here; none: to the end.
        retry: compute the shards again in which audio was skipped.
        shuffle: join the shards (but of dev and test) in a random order, the same each time. For a corpus
            that is sorted by speaker and much larger than the buffer that training shuffles.
    """

    data_dir: Path = Path("data")
    splits: tuple[str, ...] = ("train", "dev", "test-clean", "test-other")
    workers: int = 2
    shard_size: int = 500
    backend: str = "lhotse"
    device: str = "cpu"
    speed_perturb: bool = False
    corpus: str = "minibooks"
    start: int = 0
    stop: Optional[int] = None
    retry: bool = False
    shuffle: bool = False

    def __post_init__(self) -> None:
        check(len(self.splits) > 0, "FbankOptions.splits", "name at least one split", self.splits)
        check_at_least(1, self, "workers", "shard_size")
        check_choice(self.backend, BACKENDS, "FbankOptions.backend")
        check_corpus(self.corpus, "FbankOptions.corpus")
        check_at_least(0, self, "start")
        rule = f"be above start ({self.start})"
        check(self.stop is None or self.stop > self.start, "FbankOptions.stop", rule, self.stop)


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
            "backend kaldifeat is not installed: run 'bash tools/install_kaldifeat.sh', which builds it, "
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

    Long audio is processed in chunks that overlap by a few frames. Memory stays bounded, and the frames equal
    those of the whole.

    Args:
        samples: float [samples] in about [-1, 1].
        rate: their sampling rate in Hz; anything but 16 kHz is resampled.
        chunk_seconds: length of a chunk, at least 1.
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
        if total - stop <= 2 * MARGIN:  # the last chunk takes a short rest
            stop, last = total, total + MARGIN
        piece = samples[first * HOP : last * HOP]
        chunks.append(_frames(compute, piece)[start - first : stop - first])
        if stop == total:
            break
    return torch.cat(chunks)


def extract_frames(samples: np.ndarray) -> torch.Tensor:
    """Return the features [T, 80] of a piece of audio at 16 kHz by lhotse; those at its edges are its own."""
    return _frames(extractor(), samples)


def _frames(compute: FeatureExtractor, samples: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return torch.as_tensor(compute.extract(torch.from_numpy(samples), SAMPLE_RATE)).cpu().clone()


def run(options: FbankOptions) -> int:
    """Write ``fbank/CORPUS_cuts_SPLIT.jsonl.gz`` and archives.

    Returns:
        0; 3 when audio was skipped (the report lists it); 4 when a split was not joined, because shards are
        missing that other machines have not finished.
    """
    extractor(options.backend, options.device)  # fails here, not in a worker process
    return max(_run_split(options, split) for split in options.splits)


def _run_split(options: FbankOptions, split: str) -> int:
    source = cuts_path(options.data_dir / "manifests", split, options.corpus)
    if not source.is_file():
        raise FileNotFoundError(f"no manifest at {source}: make the audio of {split} first (job synthesize)")
    folder = options.data_dir / "fbank"
    perturb = options.speed_perturb and not split.startswith(EVALUATION)
    shards = plan(source, folder, split, options.shard_size, f"{options.backend} {DIM}", perturb)
    mine = shards[options.start : options.stop]
    todo = [one for one in mine if not one.features.exists() or (options.retry and one.has_errors())]
    share = f" ({len(mine)} of them here)" if len(mine) < len(shards) else ""
    print(f"compute-fbank {split}: {len(shards)} shards{share}, {len(mine) - len(todo)} already done")
    with tqdm(total=sum(shard.count for shard in mine), unit="cut", desc=split, smoothing=0.05) as bar:
        bar.update(bar.total - sum(shard.count for shard in todo))
        workers = options.workers if options.device == "cpu" else 1
        make, alone = functools.partial(_make_shard, options), functools.partial(torch.set_num_threads, 1)
        for done in in_workers(make, todo, workers, in_order=False, begin=alone):
            bar.update(done)
    missing = [shard.number for shard in shards if not shard.features.exists()]
    if missing:
        print(
            f"{split}: not joined yet, {len(missing)} of {len(shards)} shards are missing: {ranges(missing)} "
            "(--start FIRST --stop LAST+1). Run this once more when they are done"
        )
        return UNFINISHED
    return _join(options, split, shards)


def _join(options: FbankOptions, split: str, shards: list[Shard]) -> int:
    skipped: list[dict[str, str]] = []
    count = itertools.count()

    def skip(id: str, error: str) -> None:
        number = next(count)
        if number < SHOWN:
            logging.warning("skipped %s: %s", id, error)
        if number < LISTED:
            skipped.append({"id": id, "error": error})

    if options.shuffle and not split.startswith(EVALUATION):
        random.Random(0).shuffle(shards)
    target = cuts_path(options.data_dir / "fbank", split, options.corpus)
    lines = tqdm(joined_lines(shards, skip), unit="cut", desc=f"join {split}", smoothing=0.05)
    totals = join_lines(lines, target)
    number = next(count)
    report = target.parent / f"compute-fbank-{split}.json"
    write_json(report, {**totals, "skipped_count": number, "skipped": skipped})
    if number > SHOWN:
        logging.warning("... and %d more, see %s", number - SHOWN, report)
    print(f"{split}: {totals['hours']:.2f} h, {totals['utterances']} cuts, {number} skipped -> {target}")
    return SKIPPED_SOME if number else 0


def _make_shard(options: FbankOptions, shard: Shard) -> int:
    if shard.features.exists() and not options.retry:
        return shard.count  # another machine has done it
    compute = extractor(options.backend, options.device)
    made, archive = [], shard.new_archive()
    with atomic_path(archive) as temporary, LilcomChunkyWriter(str(temporary)) as writer:
        cuts = (parse_cut(line, f"{shard.cuts}, line {number}") for number, line in read_lines(shard.cuts))
        # a GPU has one process, which would wait for the disk
        threads = 1 if options.device == "cpu" else options.workers
        for cut, samples in read_ahead(cuts, threads):
            try:
                features = extract(samples(), backend=options.backend, device=options.device)
            except (AudioError, FileNotFoundError) as error:
                made.append({"id": cut.id, "error": str(error)})
                continue
            key = writer.write(cut.id, features.numpy())
            described = _described(cut, len(features), compute.name, str(archive.absolute()), key)
            made.append({"id": cut.id, "features": described.to_dict()})
        writer.close()
    shard.publish(made, archive, options.retry)
    return shard.count


def _described(cut: MonoCut, frames: int, kind: str, archive: str, key: str) -> Features:
    return Features(
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
