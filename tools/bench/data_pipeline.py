"""Knows: the sampler of training, a synthetic manifest of millions of cuts, the memory of this process.
Must not know: features, models, how the sampler works.

    nice -n 19 python tools/bench/data_pipeline.py --output bench/data-pipeline.json    # 5 million cuts
    python tools/bench/data_pipeline.py --cuts 20000                                    # seconds

Writes a manifest like LibriHeavy's (features are described, never read; the file is removed again unless
--folder keeps it), goes once through the batches that training would get and reports memory and speed at
several points: memory must not grow with the corpus. Then it goes to the middle of the epoch by a saved
position, as a killed training does, and checks that the next batch is the one that had followed. For
comparison: lhotse's own DynamicBucketingSampler on the first cuts (--lhotse_cuts).

Then it speaks some utterances by eSpeak NG (--spoken) and reports how many hours of speech one core makes,
loads and augments in an hour: by the loader from stored features, and from features resident in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import itertools
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402
from lhotse import CutSet  # noqa: E402
from lhotse.dataset import DynamicBucketingSampler  # noqa: E402
from tqdm import tqdm  # noqa: E402

from icefall_fusion.common.checks import check, check_at_least  # noqa: E402
from icefall_fusion.common.command_line import REFUSED, parse_options  # noqa: E402
from icefall_fusion.common.files import atomic_path, write_json  # noqa: E402
from icefall_fusion.common.memory import memory_in_use, peak_rss_bytes  # noqa: E402
from icefall_fusion.data import espeak  # noqa: E402
from icefall_fusion.data.books import write_jsonl  # noqa: E402
from icefall_fusion.data.datamodule import DataOptions, TrainBatches  # noqa: E402
from icefall_fusion.data.fbank import FbankOptions  # noqa: E402
from icefall_fusion.data.fbank import run as compute_fbank  # noqa: E402
from icefall_fusion.data.manifests import cuts_path  # noqa: E402
from icefall_fusion.data.resident import FeatureStore  # noqa: E402
from icefall_fusion.data.synthesis import SynthesizeOptions  # noqa: E402
from icefall_fusion.data.synthesis import run as synthesize  # noqa: E402


@dataclass(frozen=True)
class BenchOptions:
    """Measure memory, speed and resuming of the training sampler.

    Args:
        cuts: in the synthetic manifest (LibriHeavy large has about 11 million).
        pre_text: characters of earlier text in every cut (LibriHeavy: up to 1,000).
        max_duration: seconds of audio in a batch.
        points: how many times memory and speed are noted.
        lhotse_cuts: so many cuts are also taken by lhotse's own sampler; 0 leaves that out.
        spoken: utterances that are spoken for the row "resident"; 0 leaves that out (it needs eSpeak NG).
        folder: keep the manifest here and use it again; none is a temporary folder.
        output: a JSON file of all figures.
    """

    cuts: int = 5_000_000
    pre_text: int = 0
    max_duration: float = 600.0
    points: int = 10
    lhotse_cuts: int = 100_000
    spoken: int = 200
    folder: str = ""
    output: str = ""

    def __post_init__(self) -> None:
        check_at_least(1000, self, "cuts")
        check_at_least(2, self, "points")
        check_at_least(0, self, "pre_text", "lhotse_cuts", "spoken")
        rule = "be at least 25 (the longest cut)"
        check(self.max_duration >= 25, "BenchOptions.max_duration", rule, self.max_duration)


def main() -> int:
    """Run from the command line; return the exit code."""
    try:
        options = parse_options(BenchOptions, sys.argv[1:], "python tools/bench/data_pipeline.py")
    except (ValueError, TypeError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    with contextlib.ExitStack() as stack:
        folder = options.folder or stack.enter_context(tempfile.TemporaryDirectory())
        figures = measure(options, Path(folder))
    if options.output:
        write_json(options.output, figures)
    print(json.dumps({name: value for name, value in figures.items() if name != "points"}, indent=2))
    return 0


def measure(options: BenchOptions, folder: Path) -> dict[str, Any]:
    """Return all figures."""
    manifest = folder / f"synthetic-{options.cuts}-{options.pre_text}.jsonl.gz"
    start = time.monotonic()
    if not manifest.is_file():
        with atomic_path(manifest) as temporary, gzip.open(temporary, "wt", compresslevel=1) as file:
            for line in tqdm(lines(options), total=options.cuts, unit="cut", desc="write"):
                file.write(line)
    figures: dict[str, Any] = {
        "cuts": options.cuts,
        "manifest_mb": round(manifest.stat().st_size / 1e6, 1),
        "write_seconds": round(time.monotonic() - start, 1),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "max_duration": options.max_duration,
    }
    if options.lhotse_cuts:
        figures["lhotse_cuts_per_second"] = lhotse_speed(manifest, options)
    if options.spoken and not espeak.available():
        print("no row of resident features: pip install espeakng-loader", file=sys.stderr)
    elif options.spoken:
        figures["resident"] = resident(folder / "speech", options.spoken)
    return {**figures, **go_through(manifest, options)}


def lines(options: BenchOptions) -> Iterator[str]:
    """Yield the lines of the manifest: books of 1,000 cuts, 2-25 s each."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfwyp", k=rng.randint(1, 9))) for _ in range(5000)]
    text = " ".join(rng.choices(words, k=200_000))
    for number in range(options.cuts):
        seconds = round(rng.uniform(2.0, 25.0), 3)
        book, place = f"large/{number // 1000 % 7000}/book_{number // 1000}", rng.randrange(len(text) - 2000)
        said, before = text[place : place + round(14.5 * seconds)], text[place : place + options.pre_text]
        cut = f'"id": "{book}/chapter_{number % 1000}", "start": {number % 1000 / 2}, "duration": {seconds}'
        custom = f'{{"cased": "{said}", "pre_text": "{before}", "book": "book"}}'
        frames, place = round(100 * seconds), f"{place},{rng.randrange(50_000)}"
        yield (
            f'{{{cut}, "channel": 0, "supervisions": [{{"id": "{book}", "recording_id": "{book}", '
            f'"start": 0.0, "duration": {seconds}, "channel": 0, "text": "{said}", "language": "English", '
            f'"speaker": "1", "custom": {custom}}}], "features": {{"type": "kaldi-fbank", "num_frames": '
            f'{frames}, "num_features": 80, "frame_shift": 0.01, "sampling_rate": 16000, "start": 0.0, '
            f'"duration": {seconds}, "storage_type": "lilcom_chunky", "storage_path": "/data/{book}.lca", '
            f'"storage_key": "{place}", "recording_id": "{book}", "channels": 0}}, "recording": {{"id": '
            f'"{book}", "sources": [{{"type": "file", "channels": [0], "source": "/data/{book}.flac"}}], '
            '"sampling_rate": 16000, "num_samples": 9600000, "duration": 600.0, "channel_ids": [0]}, '
            '"type": "MonoCut"}\n'
        )


def go_through(manifest: Path, options: BenchOptions) -> dict[str, Any]:
    """Go through an epoch of batches, noting memory; return the figures and those of resuming."""
    source = batches(manifest, options)
    memory_before, start = memory(), time.monotonic()
    points, seen, middle, follower = [], 0, {}, []
    with tqdm(total=options.cuts, unit="cut", desc="batches") as bar:
        for _, cuts in source.order:
            source.order.used += 1
            if middle and not follower:
                follower = [cut.number for cut in cuts]
            seen += len(cuts)
            bar.update(len(cuts))
            if seen * options.points >= options.cuts * (len(points) + 1):
                seconds = time.monotonic() - start
                points.append({"cuts": seen, "seconds": round(seconds, 1), **memory()})
                if not middle and seen >= options.cuts / 2:
                    middle = json.loads(json.dumps(source.state_dict()))
    return {
        "batches": source.order.used,
        "cuts_per_second": round(seen / (time.monotonic() - start)),
        "memory_before": memory_before,
        "memory_growth_mb": round(points[-1]["peak_mb"] - points[0]["peak_mb"], 1),
        "points": points,
        "resume": resume(manifest, options, middle, follower, points),
    }


def resume(
    manifest: Path, options: BenchOptions, state: dict[str, Any], follower: list[int], points: list
) -> dict[str, Any]:
    """Return how long it takes to get the first batch after a position, and what it would without one."""
    source = batches(manifest, options)
    source.load_state_dict(state)
    start = time.monotonic()
    _, cuts = next(iter(source.order))
    seconds = time.monotonic() - start
    reached = next(point for point in points if point["cuts"] >= options.cuts / 2)
    return {
        "at_batch": state["used"],
        "seconds": round(seconds, 2),
        "seconds_by_making_all_batches_again": reached["seconds"],
        "same_next_batch": [cut.number for cut in cuts] == follower,
        "state_kb": round(len(json.dumps(state)) / 1e3),
    }


def batches(manifest: Path, options: BenchOptions) -> TrainBatches:
    """Return the source that training uses; only its sampler is iterated."""
    return TrainBatches(manifest, DataOptions(max_duration=options.max_duration, workers=0))


def lhotse_speed(manifest: Path, options: BenchOptions) -> int:
    """Return the cuts per second of lhotse's sampler on the first cuts."""
    first = CutSet(itertools.islice(CutSet.from_jsonl_lazy(manifest), options.lhotse_cuts))
    data = DataOptions(max_duration=options.max_duration)
    start = time.monotonic()
    sampler = DynamicBucketingSampler(
        first, max_duration=data.max_duration, num_buckets=data.num_buckets, shuffle=True, seed=data.seed
    )
    return round(sum(map(len, sampler)) / (time.monotonic() - start))


def resident(folder: Path, count: int) -> dict[str, Any]:
    """Return hours of speech that one core (by its own clock) makes, loads and augments in an hour."""
    rng = random.Random(0)
    words = "seven ships came home before the old keeper of that light had counted them at breakfast".split()
    texts = (" ".join(rng.choices(words, k=rng.randint(8, 30))) for _ in range(count))
    rows = [{"id": f"u{at}", "text": text} for at, text in enumerate(texts)]
    write_jsonl(folder / "text" / "selected_train.jsonl", rows)
    torch.set_num_threads(1)
    spoken = SynthesizeOptions("train", folder, workers=1, shard_size=100, joined=True)
    audio, stored = (cuts_path(folder / kind, "train") for kind in ("manifests", "fbank"))
    seconds: dict[str, float] = {}
    with clock(seconds, "speak"):
        synthesize(spoken)
    with clock(seconds, "features_to_disk"):
        compute_fbank(FbankOptions(folder, ("train",), workers=1))
    data = DataOptions(max_duration=100.0, num_buckets=2, workers=0, time_warp=0, frequency_warp=0.1)
    with clock(seconds, "features_to_memory"):
        store = FeatureStore.of(audio, data, "cpu")
    sources = {"loader": TrainBatches(stored, data), "resident": TrainBatches(audio, data, store=store)}
    for name, source in sources.items():
        with clock(seconds, f"batches_{name}"):
            batches = sum(1 for _ in source)
    hours = sum(store.seconds) / 3600
    return {"hours": round(hours, 3), "batches": batches,
            **{f"{name}_hours_an_hour": round(3600 * hours / spent) for name, spent in seconds.items()}}


@contextlib.contextmanager
def clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note the processor time of a block."""
    begun = time.process_time()
    yield
    seconds[name] = time.process_time() - begun


def memory() -> dict[str, float]:
    """Return the memory of this process now and at its peak, in MB."""
    return {"now_mb": round(memory_in_use() / 1e6, 1), "peak_mb": round(peak_rss_bytes() / 1e6, 1)}


if __name__ == "__main__":
    sys.exit(main())
