"""Knows: speech by eSpeak NG, the extractors, the job compute-fbank.
Must not know: how features are computed.

    OMP_NUM_THREADS=1 python tools/bench/fbank.py --output bench/fbank.json     # half an hour of speech
    python tools/bench/fbank.py --minutes 2 --backends lhotse                   # without kaldifeat

Speed of features on one core, in seconds of audio per second, of each backend: of the extractor alone, with
samples in memory, and of the whole job as it runs for a corpus: its own code reads parts of FLAC recordings
of 10 minutes, computes, and writes archives and manifests. Reading alone is shown beside them. The best of
the rounds counts, backends taking turns; by the clock, and by the core's time alone, which is what a machine
with other work gives. kaldifeat: bash tools/install_kaldifeat.sh
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402
from lhotse import MonoCut, Recording, SupervisionSegment  # noqa: E402
from tqdm import tqdm  # noqa: E402

from icefall_fusion.common.checks import check, check_at_least, check_choice  # noqa: E402
from icefall_fusion.common.command_line import REFUSED, parse_options  # noqa: E402
from icefall_fusion.common.files import write_json  # noqa: E402
from icefall_fusion.data.cut_audio import cut_samples  # noqa: E402
from icefall_fusion.data.espeak import ACCENTS, SAMPLE_RATE, Voice, speak  # noqa: E402
from icefall_fusion.data.fbank import BACKENDS, FbankOptions, extract, run  # noqa: E402
from icefall_fusion.data.manifests import cuts_path, write_cuts  # noqa: E402

CHAPTER = 600.0  # seconds of one recording, as in Libri-Light
TEXT = (
    "The lighthouse keeper counted seven ships before breakfast, and wrote their names into the old book.",
    "Nobody knew why; it had been done since the year the tower was built, and would be done for ever.",
    "It was raining.",
    "When the storm had passed he went down to the harbour, where the fishermen were mending their nets, "
    "and asked whether any of them had seen the lamp go out in the small hours of the night.",
)


@dataclass(frozen=True)
class BenchOptions:
    """Measure the speed of features.

    Args:
        minutes: of speech.
        longest: seconds of a cut; cuts have a quarter of that at least.
        backends: lhotse, kaldifeat, or both.
        device: for kaldifeat, e.g. cpu or cuda:0.
        rounds: how often all is measured.
        output: a JSON file of all figures.
    """

    minutes: float = 30.0
    longest: float = 25.0
    backends: tuple[str, ...] = BACKENDS
    device: str = "cpu"
    rounds: int = 3
    output: str = ""

    def __post_init__(self) -> None:
        check_at_least(0.5, self, "minutes")
        rule = f"be from 1 to {CHAPTER:g} seconds"
        check(1 <= self.longest <= CHAPTER, "BenchOptions.longest", rule, self.longest)
        check(len(self.backends) > 0, "BenchOptions.backends", "name at least one backend", self.backends)
        for backend in self.backends:
            check_choice(backend, BACKENDS, "BenchOptions.backends")
        check_at_least(1, self, "rounds")


def main() -> int:
    """Run from the command line; return the exit code."""
    try:
        options = parse_options(BenchOptions, sys.argv[1:], "python tools/bench/fbank.py")
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(options, Path(folder))
    except (ValueError, TypeError, argparse.ArgumentError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    if options.output:
        write_json(options.output, figures)
    show(figures)
    return 0


def measure(options: BenchOptions, folder: Path) -> dict[str, Any]:
    """Return all figures."""
    for backend in options.backends:
        _extract(backend, options, np.zeros(SAMPLE_RATE, np.float32))  # is it there? warm-up
    cuts = list(write_corpus(options, folder))
    audio = sum(cut.duration for cut in cuts)
    samples = [cut_samples(cut) for cut in cuts]
    tasks: dict[tuple[str, str], Callable[[int], None]] = {("read", ""): lambda _: _read(cuts)}
    for backend in options.backends:
        tasks["extract", backend] = lambda _, backend=backend: _extract(backend, options, *samples)
        tasks["job", backend] = lambda turn, backend=backend: _job(backend, options, folder, cuts, turn)
    spent: dict[tuple[str, str], list[tuple[float, float]]] = {name: [] for name in tasks}
    for turn in tqdm(range(options.rounds), unit="round"):
        for name, task in tasks.items():
            start, start_core = time.perf_counter(), time.process_time()
            task(turn)
            spent[name].append((time.perf_counter() - start, time.process_time() - start_core))
    rows = []
    for (what, backend), times in spent.items():
        row: dict[str, Any] = {"what": what, "backend": backend}
        for unit, seconds in zip(("", "core_"), map(min, zip(*times))):
            row[f"{unit}seconds"] = round(seconds, 3)
            row[f"{unit}times_real_time"] = round(audio / seconds, 1)
        rows.append(row)
    return {
        "audio_seconds": round(audio, 1),
        "cuts": len(cuts),
        "machine": f"{platform.processor() or platform.machine()}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": options.device,
        "rounds": options.rounds,
        "rows": rows,
    }


def write_corpus(options: BenchOptions, folder: Path) -> Iterator[MonoCut]:
    """Write recordings of one voice each as FLAC; yield cuts that follow one another."""
    rng, left = np.random.default_rng(0), options.minutes * 60
    for number, accent in enumerate(itertools.cycle(sorted(ACCENTS))):
        if left < options.longest / 4:
            return
        path = folder / f"chapter_{number}.flac"
        soundfile.write(path, _chapter(accent, number, min(left, CHAPTER)), SAMPLE_RATE)
        recording = Recording.from_file(path)
        left, start = left - recording.duration, 0.0
        while recording.duration - start >= options.longest / 4:
            wanted = rng.uniform(options.longest / 4, options.longest)
            duration = round(min(wanted, recording.duration - start), 3)
            id = f"{recording.id}_{start:.3f}"
            said = SupervisionSegment(id, recording.id, 0.0, duration, text="x", speaker=accent)
            yield MonoCut(id, start, duration, 0, recording=recording, supervisions=[said])
            start = round(start + duration, 3)


def _chapter(accent: str, number: int, seconds: float) -> np.ndarray:
    """Speech with a little noise, float32 [samples] at 16 kHz."""
    spoken, count = [], round(seconds * SAMPLE_RATE)
    for turn, text in enumerate(itertools.cycle(TEXT)):
        spoken.append(speak(text, Voice(accent, speed=150 + 5 * (turn % 10)), seed=turn))
        if sum(map(len, spoken)) >= count:
            break
    noise = np.random.default_rng(number).normal(0.0, 1e-3, count)
    return np.clip(np.concatenate(spoken)[:count] + noise, -1, 1).astype(np.float32)


def _read(cuts: list[MonoCut]) -> None:
    for cut in cuts:
        cut_samples(cut)


def _extract(backend: str, options: BenchOptions, *utterances: np.ndarray) -> None:
    device = options.device if backend == "kaldifeat" else "cpu"
    for samples in utterances:
        extract(samples, backend=backend, device=device)


def _job(backend: str, options: BenchOptions, folder: Path, cuts: list[MonoCut], turn: int) -> None:
    data_dir = folder / f"{backend}-{turn}"
    write_cuts(cuts, cuts_path(data_dir / "manifests", "train"))
    device = options.device if backend == "kaldifeat" else "cpu"
    job = FbankOptions(data_dir, ("train",), workers=1, backend=backend, device=device)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = run(job)
    if code != 0:
        raise RuntimeError(f"compute-fbank ended with exit code {code}")


def show(figures: dict[str, Any]) -> None:
    """Print the table."""
    print(f"{figures['audio_seconds'] / 60:.1f} min in {figures['cuts']} cuts; {figures['machine']}, "
          f"torch {figures['torch']}, {figures['threads']} thread")
    titles = f"{'seconds':>10}{'x real time':>14}{'core seconds':>15}{'x real time':>14}"
    print(f"{'what':10}{'backend':12}{titles}")
    for row in figures["rows"]:
        clock = f"{row['seconds']:>10.2f}{row['times_real_time']:>14.1f}"
        core = f"{row['core_seconds']:>15.2f}{row['core_times_real_time']:>14.1f}"
        print(f"{row['what']:10}{row['backend']:12}{clock}{core}")


if __name__ == "__main__":
    sys.exit(main())
