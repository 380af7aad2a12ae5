"""The frame loop of the prefix search alone: microseconds a frame for the whole batch, by every engine.
Knows: synthetic emissions, engines. Must not know: how an engine searches.

    OMP_NUM_THREADS=1 python tools/bench/frame_loop.py
    python tools/bench/frame_loop.py --device cuda --batches 1 32 128

"loop" is from the first frame to the last, without language models; "prepare" what is done once for all
frames before (candidate pieces); "whole" one call of ctc_prefix_search, N-best lists made. With --every N the
loop stops after every N frames, as for delayed fusion at a fixed interval whose LLM takes no time.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import figures  # noqa: E402
from synthetic_emissions import synthetic_emissions  # noqa: E402

from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search  # noqa: E402
from icefall_fusion.search.beam import Beam  # noqa: E402
from icefall_fusion.search.engines import open_search  # noqa: E402
from icefall_fusion.search.fusion import Fusion, FusionSet, StopRule  # noqa: E402
from icefall_fusion.search.search_input import check_input  # noqa: E402


class Stops(Fusion):
    """A delayed fusion at a fixed interval whose scores are all 0."""

    source, weight = "stops", 1.0

    def __init__(self, every: int) -> None:
        self.every = every

    def stop_rule(self) -> StopRule:
        """Return the interval."""
        return StopRule(self.every)


def measure(args: argparse.Namespace, engine: str, batch: int, beam: int, every: int) -> dict[str, Any]:
    """Return the times of one engine in microseconds a frame of the batch."""
    log_probs, lens, _ = synthetic_emissions(batch, args.frames)
    log_probs, lens = log_probs.to(args.device), lens.to(args.device)
    options = PrefixSearchOptions(beam=beam, engine=engine, word_times=False)
    given = check_input(log_probs, lens, 0, None, None)
    fusions = [Stops(every)] if every else []
    row = {"engine": engine, "batch": batch, "beam": beam, "every": every}
    ready: list[Any] = []

    def prepare() -> None:
        state = Beam.at_root(given, beam, None, len(fusions))
        together = FusionSet(fusions, None)
        together.begin(state, given.ids)
        ready.append(open_search(given, state, options, together)[0])

    try:
        prepare()
    except ValueError as error:  # the engine does not serve, or cannot be had
        return {**row, "missing": str(error)}
    ready.clear()
    row["prepare_us"] = figures.least_seconds(prepare, args.rounds, args.device)
    for _ in range(2):
        prepare()
    row["loop_us"] = figures.least_seconds(lambda: ready.pop().run(), args.rounds, args.device)

    def whole() -> None:
        ctc_prefix_search(log_probs, lens, options, fusions=fusions, blank_id=0)

    row["whole_us"] = figures.least_seconds(whole, args.rounds, args.device)
    for name in ("prepare_us", "loop_us", "whole_us"):
        row[name] *= 1e6 / args.frames
    return row


def main() -> None:
    """Parse the command line, measure, print, write JSON."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--beams", type=int, nargs="+", default=[4, 10, 20, 50])
    parser.add_argument("--every", type=int, nargs="+", default=[0, 16], help="frames; 0: it does not stop")
    parser.add_argument("--engines", nargs="+", default=[], help="default: all of the device")
    parser.add_argument("--frames", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default="bench/frame-loop.json")
    args = parser.parse_args()
    ours = "triton" if figures.on_gpu(args.device) else "native"
    engines = args.engines or [ours, "torch"]
    rows = []
    print(f"{'engine':8}{'batch':>6}{'beam':>6}{'every':>6}{'loop us':>10}{'prepare':>10}{'whole':>10}")
    for batch in args.batches:
        for beam in args.beams:
            for every in args.every:
                for engine in engines:
                    row = measure(args, engine, batch, beam, every)
                    rows.append(row)
                    figures.save(args, rows)  # a time limit takes nothing back
                    print(f"{engine:8}{batch:>6}{beam:>6}{every:>6}", end="")
                    if "missing" in row:
                        print("  " + row["missing"])
                        continue
                    print("".join(f"{row[name]:10.1f}" for name in ("loop_us", "prepare_us", "whole_us")))
    figures.write(args, rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
