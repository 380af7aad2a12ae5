"""Knows: the acoustic model, its loss and loop. Must not know: real speech, files of features.

    OMP_NUM_THREADS=1 python tools/bench/training.py --output bench/training.json   # MiniBooks' model, a CPU
    python tools/bench/training.py --recipe egs/libriheavy/ASR/conf/ctc_aed.yaml --device cuda --seconds 600

Speed of training in hours of audio an hour: whole optimizer steps by the training loop, on random features
and transcripts that are in memory (what a data loader adds, `train` itself tells: data_wait in log.jsonl),
and how much arithmetic that is, counted on the model itself. Median of the steps after the first ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from icefall_fusion.acoustic.models import CtcAed  # noqa: E402
from icefall_fusion.common.checks import check, check_at_least, check_choice  # noqa: E402
from icefall_fusion.common.command_line import REFUSED, parse_options  # noqa: E402
from icefall_fusion.common.files import write_json  # noqa: E402
from icefall_fusion.common.memory import keep_freed_memory  # noqa: E402
from icefall_fusion.common.processes import to_device  # noqa: E402
from icefall_fusion.train.acoustic_loss import compute_loss  # noqa: E402
from icefall_fusion.train.acoustic_model import TrainOptions, compile_layers  # noqa: E402
from icefall_fusion.train.loop import Trainer  # noqa: E402

PIECES = ROOT / "egs/minibooks/ASR/pretrained/ctc_aed/bpe.model"
RATE = 4.5  # pieces a second of read speech


@dataclass(frozen=True)
class BenchOptions:
    """Measure the speed of training an acoustic model.

    Args:
        recipe: YAML file of options of the job train.
        seconds: of audio in a batch; 0: as the recipe has it (data.max_duration).
        utterance: seconds of each utterance.
        steps: that are timed.
        warmup: steps before those (compiling, memory).
        device: cpu or cuda.
        output: a JSON file of all figures.
    """

    recipe: str = str(ROOT / "egs/minibooks/ASR/conf/ctc_aed.yaml")
    seconds: float = 0.0
    utterance: float = 12.5
    steps: int = 8
    warmup: int = 3
    device: str = "cpu"
    output: str = ""

    def __post_init__(self) -> None:
        check(self.utterance >= 1, "BenchOptions.utterance", "be at least 1 s", self.utterance)
        rule = f"be 0 or at least {self.utterance} s (utterance)"
        check(self.seconds == 0 or self.seconds >= self.utterance, "BenchOptions.seconds", rule, self.seconds)
        check_at_least(2, self, "steps")
        check_at_least(1, self, "warmup")
        check_choice(self.device, ("cpu", "cuda"), "BenchOptions.device")


def main() -> int:
    """Run from the command line; return the exit code."""
    try:
        bench = parse_options(BenchOptions, sys.argv[1:], "python tools/bench/training.py")
        train = parse_options(TrainOptions, ["--config", bench.recipe], "a file of options of train")
    except (ValueError, TypeError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    figures = measure(bench, train)
    if bench.output:
        write_json(bench.output, figures)
    for name, value in figures.items():
        print(f"{name:26}{value}")
    return 0


class RandomBatches:
    """The same random batch again and again, and when each was asked for; a BatchSource."""

    def __init__(self, seconds: float, utterance: float, count: int) -> None:
        rng = torch.Generator().manual_seed(0)
        rows, frames = max(1, int(seconds / utterance)), round(100 * utterance)
        self.batch = {
            "features": torch.randn(rows, frames, 80, generator=rng),
            "lens": torch.full((rows,), frames),
            "tokens": torch.randint(3, 500, (rows, round(RATE * utterance)), generator=rng).tolist(),
            "texts": [""] * rows,
            "seconds": [utterance] * rows,
        }
        self.count, self.asked = count, []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(self.count):
            self.asked.append(time.perf_counter())
            yield dict(self.batch)
        self.asked.append(time.perf_counter())

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def measure(bench: BenchOptions, train: TrainOptions) -> dict[str, Any]:
    """Return all figures."""
    keep_freed_memory()
    device = torch.device(bench.device)
    seconds, steps = bench.seconds or train.data.max_duration, bench.warmup + bench.steps + 1
    batches = RandomBatches(seconds, bench.utterance, steps)
    audio = sum(batches.batch["seconds"])
    model = CtcAed(train.model, PIECES)
    model = model.to(device)
    flops = count_flops(model, to_device(batches.batch, device))
    if train.compile:
        compile_layers(model)
    trainer = dataclasses.replace(
        train.trainer, max_steps=steps, max_epochs=None, accumulate=1, save_every_steps=0,
        save_every_minutes=0.0, valid_every_steps=0, tensorboard=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        Trainer(trainer, model, compute_loss, batches, [batches.batch], folder, device=device).run()
    gaps = [end - begin for begin, end in zip(batches.asked, batches.asked[1:])][bench.warmup :]
    step = statistics.median(gaps)
    return {
        "recipe": bench.recipe.replace(f"{ROOT}/", ""),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds_of_audio_a_step": audio,
        "step_seconds": round(step, 4),
        "audio_hours_per_hour": round(audio / step, 1),
        "gflop_per_audio_second": round(flops / audio / 1e9, 3),
        "gflop_per_second": round(flops / step / 1e9, 1),
        "precision": trainer.precision,
        "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
    }


def count_flops(model: CtcAed, batch: dict[str, Any]) -> int:
    """Return the floating-point operations of one step's matrix products, forward and backward."""
    model.train()
    with FlopCounterMode(display=False) as counter:
        loss, _, _ = compute_loss(model, batch)
        loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


if __name__ == "__main__":
    sys.exit(main())
