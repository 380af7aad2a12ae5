"""The frame loop of the prefix search alone: microseconds a frame for the whole batch, by every engine.
Knows: synthetic emissions, engines, torchaudio's decoder for GPUs. Must not know: how an engine searches.

    OMP_NUM_THREADS=1 python tools/bench/frame_loop.py
    python tools/bench/frame_loop.py --device cuda --batches 1 32 128
    python tools/bench/frame_loop.py --device cuda --batches 128 --beams 10 --engines triton --warps 1 2 4 8

"loop" is from the first frame to the last, without language models; "prepare" what is done once for all
frames before (candidate pieces); "whole" one call of ctc_prefix_search, N-best lists made, their best
hypotheses read; "read" the same with all hypotheses read. With --every N the loop stops after every N frames,
as for delayed fusion at a fixed interval whose LLM takes no time. "torchaudio" is its CUDA decoder, no frame
skipped; its loop is the call without lists. "floor" is the time to read the log-probs once at the measured
rate of a copy; "latency", for the kernel alone, the time of its loop's instructions for one warp by published
latencies (see kernel_registers.py). What is for GPUs here has never run on one.
"""
from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from pathlib import Path
from typing import Any, Iterator, Optional

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import figures  # noqa: E402
import kernel_registers  # noqa: E402
from decoders import torchaudio_cuda  # noqa: E402
from rates import rates  # noqa: E402
from synthetic_emissions import synthetic_emissions  # noqa: E402

from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search  # noqa: E402
from icefall_fusion.search.beam import Beam  # noqa: E402
from icefall_fusion.search.engines import gpu, open_search  # noqa: E402
from icefall_fusion.search.fusion import Fusion, FusionSet, StopRule  # noqa: E402
from icefall_fusion.search.search_input import check_input  # noqa: E402

PIECES = 501  # of synthetic_emissions, blank included
COLUMNS = ("loop_us", "prepare_us", "whole_us", "read_us", "floor_us", "latency_us")


class Stops(Fusion):
    """A delayed fusion at a fixed interval whose scores are all 0."""

    source, weight = "stops", 1.0

    def __init__(self, every: int) -> None:
        self.every = every

    def stop_rule(self) -> StopRule:
        """Return the interval."""
        return StopRule(self.every)


@contextlib.contextmanager
def fixed_warps(warps: Optional[int]) -> Iterator[None]:
    """Let the kernel search an utterance by so many warps; None: by those that it takes itself."""
    before = gpu.WARPS
    if warps is not None:
        gpu.WARPS = tuple((*row[:3], warps) for row in before)
    try:
        yield
    finally:
        gpu.WARPS = before


def measure(args: argparse.Namespace, engine: str, batch: int, beam: int, every: int,
            warps: Optional[int] = None) -> dict[str, Any]:
    """Return the times of one engine in microseconds a frame of the batch."""
    log_probs, lens, _ = synthetic_emissions(batch, args.frames)
    log_probs, lens = log_probs.to(args.device), lens.to(args.device)
    row = {"engine": engine, "batch": batch, "beam": beam, "every": every, "warps": warps}
    try:
        if engine == "torchaudio":
            times = measure_torchaudio(args, beam, log_probs, lens)
        else:
            with fixed_warps(warps):
                times = measure_ours(args, row, log_probs, lens)
    except Exception as error:
        if engine != "torchaudio" and not isinstance(error, ValueError):
            raise
        # ours does not serve, or other people's cannot be had or fails
        return {**row, "missing": f"{type(error).__name__}: {error}"}
    row.update({name: 1e6 * seconds / args.frames for name, seconds in times.items()})
    return row


def measure_ours(args: argparse.Namespace, row: dict[str, Any], log_probs: Tensor,
                 lens: Tensor) -> dict[str, float]:
    """Return the seconds of one of our engines; note in ``row`` what is known of the kernel."""
    options = PrefixSearchOptions(beam=row["beam"], engine=row["engine"], word_times=False)
    given = check_input(log_probs, lens, 0, None, None)
    fusions = [Stops(row["every"])] if row["every"] else []
    ready: list[Any] = []

    def prepare() -> None:
        state = Beam.at_root(given, options.beam, None, len(fusions))
        together = FusionSet(fusions, None)
        together.begin(state, given.ids)
        ready.append(open_search(given, state, options, together)[0])

    prepare()
    times = {}
    if row["engine"] == "triton" and figures.on_gpu(args.device):
        row["warps"] = ready[0].warps
        try:
            row["kernel"], times["latency_us"] = predicted(ready[0], args.frames)
        except Exception as error:  # the compiler's tools are not here: times matter more
            print(f"no estimate for the kernel: {type(error).__name__}: {error}")
    ready.clear()
    times["prepare_us"] = figures.least_seconds(prepare, args.rounds, args.device)
    for _ in range(2):
        prepare()
    times["loop_us"] = figures.least_seconds(lambda: ready.pop().run(), args.rounds, args.device)

    def whole(best_alone: bool) -> None:
        for nbest in ctc_prefix_search(log_probs, lens, options, fusions=fusions, blank_id=0):
            for hypothesis in nbest[:1] if best_alone else nbest:
                hypothesis.tokens  # noqa: B018 (it is made when it is read)

    for name, best_alone in (("whole_us", True), ("read_us", False)):
        times[name] = figures.least_seconds(lambda best=best_alone: whole(best), args.rounds, args.device)
    return times


def measure_torchaudio(args: argparse.Namespace, beam: int, log_probs: Tensor,
                       lens: Tensor) -> dict[str, float]:
    """Return the seconds of torchaudio's CUDA decoder, by itself and with its lists made.

    Raises:
        ImportError: it cannot be had.
    """
    found = {}
    for name, nbest in (("loop_us", 0), ("whole_us", 1), ("read_us", beam)):
        decode = torchaudio_cuda(beam, 0, nbest)()
        found[name] = figures.least_seconds(lambda run=decode: run(log_probs, lens), args.rounds, args.device)
    return found


def predicted(search: Any, frames: int) -> tuple[dict[str, int], float]:
    """Return what the compiler says of a search's kernel, and the seconds of all frames by its estimate."""
    kernel = search.kernel.search_utterances.warmup(
        *search.arguments(1), grid=(search.beam.arena.batch,), form=search.form, num_warps=search.warps)
    properties = torch.cuda.get_device_properties(search.beam.lens.device)
    used = kernel_registers.usage(kernel, 10 * properties.major + properties.minor)
    return used, used["cycles"] * frames / (1000.0 * properties.clock_rate)


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    numbers = (row["batch"], row["beam"], row["every"], row["warps"] or "")
    print("{:11}{:>5}{:>5}{:>6}{:>6}".format(row["engine"], *numbers), end="")
    if "missing" in row:
        print("  " + row["missing"])
        return
    print("".join(f"{row[name]:10.2f}" if name in row else f"{'-':>10}" for name in COLUMNS), flush=True)


def main() -> None:
    """Parse the command line, measure, print, write JSON."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--beams", type=int, nargs="+", default=[4, 10, 20, 50])
    parser.add_argument("--every", type=int, nargs="+", default=[0, 16], help="frames; 0: it does not stop")
    parser.add_argument("--engines", nargs="+", default=[], help="default: all of the device")
    parser.add_argument("--warps", type=int, nargs="+", default=[], help="of the kernel; default: its own")
    parser.add_argument("--frames", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default="bench/frame-loop.json")
    args = parser.parse_args()
    engines = args.engines or (["triton", "torchaudio", "torch"] if figures.on_gpu(args.device)
                               else ["native", "torch"])
    rows: list[dict[str, Any]] = []
    bandwidth = rates(args.device, "bfloat16")[0]
    print(f"a copy reads and writes {bandwidth / 1e9:.0f} GB/s; microseconds a frame of the batch:")
    print(f"{'engine':11}{'batch':>5}{'beam':>5}{'every':>6}{'warps':>6}"
          + "".join(f"{name[:-3]:>10}" for name in COLUMNS))
    for batch, beam, every, engine in itertools.product(args.batches, args.beams, args.every, engines):
        if engine == "torchaudio" and every:
            continue
        for warps in (args.warps or [None]) if engine == "triton" else [None]:
            row = measure(args, engine, batch, beam, every, warps)
            if "missing" not in row:
                row["floor_us"] = 1e6 * 4 * batch * PIECES / bandwidth
            rows.append(row)
            figures.save(args, rows, copy_bytes_a_second=bandwidth)  # a time limit takes nothing back
            show(row)
    figures.write(args, rows, copy_bytes_a_second=bandwidth)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
