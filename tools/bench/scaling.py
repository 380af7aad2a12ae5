"""How the cost of the prefix search and of delayed fusion grows with beam, length, batch and vocabulary.
Knows: synthetic log-probs, searches as functions. Must not know: how they work.

    OMP_NUM_THREADS=1 python tools/bench/scaling.py
    python tools/bench/scaling.py --device cuda --batches 8 32 128

One thing varies, the others keep their middle value. For each a line log(cost) = a + b log(size) is fitted
and b told: 1 is linear, 0 is free.
"""
from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any, Callable, Sequence

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import figures  # noqa: E402
from synthetic_emissions import synthetic_emissions  # noqa: E402

from icefall_fusion.decode.pretrained import FOLDER  # noqa: E402
from icefall_fusion.fusion import DelayedFusion, FixedInterval  # noqa: E402
from icefall_fusion.lm import CausalLm  # noqa: E402
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search  # noqa: E402
from icefall_fusion.text.tokens import AcousticTokens  # noqa: E402

Work = Callable[[], Any]


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return b of the line log(cost) = a + b log(size) of least squares."""
    x, y = ([math.log(value) for value in values] for values in (sizes, costs))
    middle, height = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle) * (b - height) for a, b in zip(x, y)) / sum((a - middle) ** 2 for a in x)


class Searches:
    """What is measured, by name: a search of some utterances of synthetic speech."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokens = AcousticTokens.load(FOLDER / "ctc_aed")
        self.lm = CausalLm.from_pretrained(FOLDER / "llm", device=args.device, dtype=args.dtype)

    def make(self, name: str, beam: int, frames: int, batch: int, interval: int) -> Work:
        """Return a search, ready to run."""
        device = self.args.device
        log_probs, lens, _ = synthetic_emissions(batch, frames)
        log_probs, lens = log_probs[..., : self.tokens.size].log_softmax(-1).to(device), lens.to(device)
        engine = "torch" if name == "by tensors" else "auto"
        recover = not figures.on_gpu(device)  # the kernel of a GPU cannot
        options = PrefixSearchOptions(beam=beam, word_times=False, recover_mass=recover, engine=engine)
        fusions = []
        if name == "delayed fusion":
            fusions = [DelayedFusion(self.lm, 0.5, 1.0, FixedInterval(interval))]
        return lambda: ctc_prefix_search(log_probs, lens, options, self.tokens, fusions)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Vary one thing after the other; return a row for each search and thing."""
    searches, rows = Searches(args), []
    middle = {"beam": 10, "frames": 200, "batch": 8, "interval": 16}
    varied = {"beam": args.beams, "frames": args.frames, "batch": args.batches, "interval": args.intervals}
    for name in ("no language model", "by tensors", "delayed fusion"):
        for thing, sizes in varied.items():
            if thing == "interval" and name != "delayed fusion":
                continue
            costs = []
            for size in sizes:
                work = searches.make(name, **{**middle, thing: size})
                costs.append(figures.least_seconds(work, args.rounds, args.device))
            slope = exponent(sizes, costs)
            row = {"search": name, "varied": thing, "sizes": sizes, "seconds": costs, "exponent": slope}
            rows.append(row)
            times = "  ".join(f"{size}: {1000 * cost:.1f}" for size, cost in zip(sizes, costs))
            print(f"{name:20}{thing:10}exponent {slope:5.2f}   ms {times}", flush=True)
    return rows


def main() -> None:
    """Parse the command line, measure, print, write JSON."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--beams", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--frames", type=int, nargs="+", default=[100, 200, 400, 800], help="of 40 ms")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 8, 32], help="utterances")
    parser.add_argument("--intervals", type=int, nargs="+", default=[8, 16, 32, 64], help="frames an event")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", help="of the LLM's weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", default="bench/scaling.json")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    figures.write(args, measure(args))


if __name__ == "__main__":
    main()
