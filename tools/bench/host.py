"""What the host does at a fusion event beside the model: words, their tokens, the tree, masks, scores.
Knows: the demo's speech, which functions are the device's work. Must not know: how any of it works.

    OMP_NUM_THREADS=1 python tools/bench/host.py

Decodes sentences of the demo with the shipped tokenizer and a tiny random LM, with the compiled code and
without it (CXX names no compiler then). Time is the thread's own, so that other work on the machine does not
count; "device" is what a GPU does where there is one: the model, distributions, picking scores from them.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import figures  # noqa: E402
import speech  # noqa: E402

from icefall_fusion.acoustic.sources import open_source  # noqa: E402
from icefall_fusion.common.native_build import load_native  # noqa: E402
from icefall_fusion.decode.utterances import read_cuts  # noqa: E402
from icefall_fusion.fusion import DelayedFusion, FixedInterval, ShortestHypothesis  # noqa: E402
from icefall_fusion.lm import CausalLm, tree_forward, tree_scorer  # noqa: E402
from icefall_fusion.lm.loading import Vocabulary  # noqa: E402
from icefall_fusion.lm.tree_memory import TreeCache  # noqa: E402
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search  # noqa: E402

_DEVICE = (
    (CausalLm, "tree_logits"), (tree_forward.torch, "log_softmax"), (tree_scorer, "pick"),
    (tree_scorer.TreeScorer, "_keep_distributions"), (TreeCache, "ensure"),
)


class Clock:
    """Adds up the thread's time in events, and in the device's work within them."""

    def __init__(self) -> None:
        self.events = self.device = 0.0
        self.inside = False

    def wrap(self, function: Callable[..., Any], device: bool) -> Callable[..., Any]:
        """Return the function with its time counted."""

        def timed(*given: Any, **more: Any) -> Any:
            begun, self.inside = time.thread_time(), self.inside or not device
            try:
                return function(*given, **more)
            finally:
                taken = time.thread_time() - begun
                if not device:
                    self.events, self.inside = self.events + taken, False
                elif self.inside:  # the end of an utterance is no event
                    self.device += taken

        return timed


@contextlib.contextmanager
def counting(clock: Clock) -> Iterator[None]:
    """Count the time of events, and of what a GPU would do in them."""
    counted = (*_DEVICE, (DelayedFusion, "_fuse_in_steps"))
    before = [(owner, name, getattr(owner, name)) for owner, name in counted]
    for owner, name, function in before[:-1]:
        setattr(owner, name, clock.wrap(function, True))
    in_steps = DelayedFusion._fuse_in_steps  # of engines and of a search frame by frame; not of the end

    def events(fusion: DelayedFusion, beam: Any, fires: Any, frame: int) -> Iterator[None]:
        steps, done = in_steps(fusion, beam, fires, frame), object()
        step = clock.wrap(lambda: next(steps, done), False)
        while step() is not done:
            yield

    DelayedFusion._fuse_in_steps = events
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def emit(args: argparse.Namespace) -> tuple[Any, CausalLm]:
    """Return log-probs of the longest sentences, and a tiny LM with the shipped LLM's tokenizer."""
    sets = speech.manifests(args)
    options = speech.decode_options(args, f"{args.speech}/host", sets)
    utterances = [one for path in sets.values() for one in read_cuts(path, "features")]
    utterances = sorted(utterances, key=lambda one: -one.seconds)[: args.batch]
    source, names = open_source(options.emissions), [one.id for one in utterances]
    with torch.inference_mode():
        emitted = source.emit(names, [one.load() for one in utterances])
    shipped = CausalLm.from_pretrained(options.llm.path)
    config = transformers.LlamaConfig(
        vocab_size=shipped.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    vocabulary = Vocabulary(shipped.tokenizer, shipped.pieces, shipped.bos_id, shipped.eos_id)
    model = transformers.LlamaForCausalLM(config).eval()
    return emitted, CausalLm(model, vocabulary, "tiny", self_check=False)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each beam, trigger and kind of code."""
    emitted, lm = emit(args)
    emitted_rows, rows = (emitted.log_probs, emitted.lens), []
    for code in ("compiled", "Python"):
        with contextlib.nullcontext() if code == "compiled" else without_compiler():
            for beam in args.beams:
                for name, trigger in (("interval-16", FixedInterval(16)), ("shortest", ShortestHypothesis())):
                    fusion, options = DelayedFusion(lm, 0.5, 1.0, trigger), PrefixSearchOptions(beam=beam)
                    times = []
                    for _ in range(args.rounds + 1):
                        clock = Clock()
                        with counting(clock):
                            ctc_prefix_search(*emitted_rows, options, emitted.tokens, [fusion])
                        times.append(clock.events - clock.device)
                    stats = fusion.stats()
                    row = {"code": code, "beam": beam, "trigger": name, "events": stats["events"],
                           "host_ms": 1000.0 * min(times[1:]), "hit_rate": stats["retokenize_hit_rate"],
                           "texts": stats["histories_scored"]}
                    rows.append({**row, "host_ms_an_event": row["host_ms"] / max(1, row["events"])})
    return rows


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Let there be no compiler, and so no compiled code."""
    before = os.environ.get("CXX")
    os.environ["CXX"] = "no-compiler"
    load_native.cache_clear()
    try:
        yield
    finally:
        del os.environ["CXX"]
        if before is not None:
            os.environ["CXX"] = before
        load_native.cache_clear()


def main() -> None:
    """Parse the command line, measure, print, write JSON."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    speech.add_arguments(parser)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--beams", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default="bench/host.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(args)
    titles = f"{'events':>8}{'texts':>8}{'hits':>8}{'host ms':>10}{'an event':>10}"
    print(f"{'code':10}{'beam':>6}{'trigger':>14}{titles}")
    for row in rows:
        print(f"{row['code']:10}{row['beam']:>6}{row['trigger']:>14}{row['events']:>8}{row['texts']:>8}"
              f"{row['hit_rate']:8.3f}{row['host_ms']:10.1f}{row['host_ms_an_event']:10.2f}")
    figures.write(args, rows)


if __name__ == "__main__":
    main()
