"""Knows: the acoustic model, its loss and loop. Must not know: real speech, files of features.

    OMP_NUM_THREADS=1 python tools/bench/training.py --output bench/training.json   # MiniBooks' model, a CPU
    python tools/bench/training.py --recipe egs/minibooks/ASR/conf/ctc_aed_gpu.yaml --device cuda \
        --batches [600,1200] --optimizers [adamw,muon] --output bench/training.json

Speed of training in hours of audio a second and an hour: whole optimizer steps by the training loop, on
random features and transcripts that are in memory (what a data loader adds, `train` itself tells, as
data_wait in log.jsonl). Beside it, how much arithmetic that is, counted on the model itself, as a share of
the rate of one large matrix product in the same run; how many calls of torch a step makes (on a GPU: kernels,
eager); and on a GPU how often the host waits for it. Median of the steps after the first ones; a row is
written when it is known. It has never run on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from rates import rates  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from icefall_fusion.acoustic.models import CtcAed  # noqa: E402
from icefall_fusion.common.checks import check, check_at_least, check_choice  # noqa: E402
from icefall_fusion.common.command_line import REFUSED, parse_options  # noqa: E402
from icefall_fusion.common.environment import describe_environment  # noqa: E402
from icefall_fusion.common.files import write_json  # noqa: E402
from icefall_fusion.common.memory import keep_freed_memory  # noqa: E402
from icefall_fusion.common.precision import in_bf16  # noqa: E402
from icefall_fusion.common.processes import to_device  # noqa: E402
from icefall_fusion.train.acoustic_loss import compute_loss  # noqa: E402
from icefall_fusion.train.acoustic_model import TrainOptions, compile_layers  # noqa: E402
from icefall_fusion.train.loop import Trainer  # noqa: E402
from icefall_fusion.train.options import OPTIMIZERS, TrainerOptions  # noqa: E402
from icefall_fusion.train.step import TrainingStep  # noqa: E402

PIECES = ROOT / "egs/minibooks/ASR/pretrained/ctc_aed/bpe.model"
RATE = 4.5  # pieces a second of read speech


@dataclass(frozen=True)
class BenchOptions:
    """Measure the speed of training an acoustic model.

    Args:
        recipe: YAML file of options of the job train.
        seconds: of audio in a batch; 0: as the recipe has it (data.max_duration).
        batches: several of these, a row each; empty: ``seconds``.
        optimizers: adamw and muon, a row each; empty: the recipe's.
        utterance: seconds of each utterance.
        steps: that are timed.
        warmup: steps before those (compiling, memory).
        device: cpu or cuda.
        output: a JSON file of all figures.
    """

    recipe: str = str(ROOT / "egs/minibooks/ASR/conf/ctc_aed.yaml")
    seconds: float = 0.0
    batches: tuple[float, ...] = ()
    optimizers: tuple[str, ...] = ()
    utterance: float = 12.5
    steps: int = 8
    warmup: int = 3
    device: str = "cpu"
    output: str = ""

    def __post_init__(self) -> None:
        check(self.utterance >= 1, "BenchOptions.utterance", "be at least 1 s", self.utterance)
        rule = f"be 0 or at least {self.utterance} s (utterance)"
        for seconds in (self.seconds, *self.batches):
            check(seconds == 0 or seconds >= self.utterance, "BenchOptions.seconds", rule, seconds)
        for name in self.optimizers:
            check_choice(name, OPTIMIZERS, "BenchOptions.optimizers")
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
    keep_freed_memory()
    kind = "bfloat16" if in_bf16(train.trainer.precision, torch.device(bench.device)) else "float32"
    product = rates(bench.device, kind)[1]
    rows: list[dict[str, Any]] = []
    for optimizer in bench.optimizers or (train.trainer.optimizer,):
        for seconds in bench.batches or (bench.seconds,):
            rows.append(measure(bench, train, optimizer, seconds, product))
            if bench.output:
                machine = describe_environment(bench.device)
                given = dataclasses.asdict(bench)
                write_json(bench.output, {"machine": machine, "options": given, "rows": rows})
            for name, value in rows[-1].items():
                print(f"{name:26}{value}", flush=True)
    return 0


class RandomBatches:
    """The same random batch again and again, and when each was asked for; a BatchSource."""

    def __init__(self, seconds: float, utterance: float, count: int) -> None:
        rng = torch.Generator().manual_seed(0)
        rows, frames = max(1, int(seconds / utterance)), round(100 * utterance)
        self.batch = {
            "features": torch.randn(rows, frames, 80, generator=rng),
            "lens": torch.full((rows,), frames),
            "frames": [frames] * rows,
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


def measure(
    bench: BenchOptions, train: TrainOptions, optimizer: str, seconds: float, product: float
) -> dict[str, Any]:
    """Return the figures of one batch size and optimizer.

    Args:
        product: operations a second of a large matrix product.
    """
    device = torch.device(bench.device)
    seconds, steps = seconds or train.data.max_duration, bench.warmup + bench.steps + 1
    batches = RandomBatches(seconds, bench.utterance, steps)
    audio = sum(batches.batch["seconds"])
    model = CtcAed(train.model, PIECES)
    model = model.to(device)
    flops = count_flops(model, to_device(batches.batch, device))
    trainer = dataclasses.replace(
        train.trainer, max_steps=steps, max_epochs=None, accumulate=1, save_every_steps=0,
        save_every_minutes=0.0, valid_every_steps=0, tensorboard=False, optimizer=optimizer, progress="steps",
    )
    calls, waits = count_calls(trainer, model, batches.batch, device)
    if train.compile:
        compile_layers(model)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(trainer, model, compute_loss, batches, [batches.batch], folder, device=device).run()
    gaps = [end - begin for begin, end in zip(batches.asked, batches.asked[1:])][bench.warmup :]
    step = statistics.median(gaps)
    return {
        "recipe": bench.recipe.replace(f"{ROOT}/", ""),
        "optimizer": optimizer,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds_of_audio_a_step": audio,
        "step_seconds": round(step, 4),
        "audio_hours_per_hour": round(audio / step, 1),
        "audio_hours_per_second": round(audio / step / 3600, 4),
        "calls_a_step": calls,
        "waits_a_step": waits,
        "gflop_per_audio_second": round(flops / audio / 1e9, 3),
        "gflop_per_second": round(flops / step / 1e9, 1),
        "matrix_gflop_per_second": round(product / 1e9, 1),
        "share_of_matrix_rate": round(flops / step / product, 4),
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


class Calls(TorchDispatchMode):
    """Counts calls of torch that are kernels on a GPU: no views, no allocations."""

    VIEWS = (
        "detach", "unbind", "transpose", "slice", "view", "t", "select", "permute", "unsafe_view", "alias",
        "as_strided", "expand", "unsqueeze", "squeeze", "split", "chunk", "unfold", "empty", "empty_like",
        "empty_strided", "new_empty",
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket.__name__.strip("_") not in self.VIEWS
        return function(*args, **(kwargs or {}))


def count_calls(
    options: TrainerOptions, model: CtcAed, batch: dict[str, Any], device: torch.device
) -> tuple[int, Optional[int]]:
    """Return the calls of a whole eager step, and on a GPU how often the host waits in it (else None).

    Waits are those that torch can warn of, in the step and in reading the figures of the one before.
    """
    step = TrainingStep(options, model, compute_loss, device)
    step.read(step(iter([batch]), 1e-5, dict))  # makes the optimizer's state
    with Calls() as calls:
        step.read(step(iter([batch]), 1e-5, dict))
    if device.type != "cuda":
        return calls.count, None
    earlier = step(iter([batch]), 1e-5, dict)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            later = step(iter([batch]), 1e-5, dict)
            step.read(earlier)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    step.read(later)
    return calls.count, sum("synchroniz" in str(warning.message) for warning in said)


if __name__ == "__main__":
    sys.exit(main())
