"""A profile of delayed fusion: one event of the LLM, the frames up to the next one, and a whole batch.
Knows: which functions of the decoder do what, the profiler's timeline. Must not know: how any of it works.

    OMP_NUM_THREADS=1 python tools/bench/profile_fusion.py                      # the shipped LLM, on a CPU
    python tools/bench/profile_fusion.py --device cuda --dtype bfloat16 --shape mistral-7b \
        --emissions bench/saved --batches 32

For each of the three: the 15 largest kernels (on a CPU: operators, by the time that is theirs alone), how
long the device had nothing to do, in which part of the host's work that was and what the host did in the
ten longest gaps, and the numbers of launches, of waits for the device and of copies to the host. The batch
is decoded twice before it is watched. Watching takes time itself: shares and counts are to be trusted more
than times. --trace keeps the whole trace, for chrome://tracing. It has never run on a GPU.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Sequence

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import figures  # noqa: E402
import fusion  # noqa: E402
import speech  # noqa: E402
from timeline import Timeline, mark, watching  # noqa: E402

from icefall_fusion.decode.utterances import read_cuts  # noqa: E402

EVENT, LAUNCH, WAIT, JOIN, FORWARD, BATCH = "event", "launch", "wait", "join", "forward", "whole batch"
#: Functions whose calls are marked, by where they are looked up, and what they do.
MARKED = {
    "icefall_fusion.fusion.delayed:DelayedFusion.begin": "begin",
    "icefall_fusion.fusion.delayed:DelayedFusion._launch": EVENT,
    "icefall_fusion.fusion.delayed:DelayedFusion._nodes": "words to tokens",
    "icefall_fusion.fusion.delayed:DelayedFusion._join": JOIN,
    "icefall_fusion.fusion.delayed:DelayedFusion._land": "late scores",
    "icefall_fusion.fusion.delayed:DelayedFusion._clean": "clean up the tree",
    "icefall_fusion.lm.tree_scorer:TreeScorer.launch": LAUNCH,
    "icefall_fusion.lm.tree_forward:forward": FORWARD,
    "icefall_fusion.search.ctc_prefix:open_search": "open the search",
    "icefall_fusion.search.export:export_nbests": "make lists",
}
METHOD = "llm-delayed-interval-16"


@contextlib.contextmanager
def marking() -> Iterator[list[str]]:
    """Mark the calls of `MARKED` within the block; the list has what is not there any more."""
    before, gone = [], []
    for place, label in MARKED.items():
        owner, name = _find(place)
        if not hasattr(owner, name):
            gone.append(place)
            continue
        before.append((owner, name, owner.__dict__.get(name)))
        setattr(owner, name, _marked(getattr(owner, name), label))
    try:
        yield gone
    finally:
        for owner, name, function in before:
            delattr(owner, name) if function is None else setattr(owner, name, function)


def _find(place: str) -> tuple[Any, str]:
    module, _, path = place.partition(":")
    owner = importlib.import_module(module)
    *owners, name = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    return owner, name


def _marked(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    """Return the function with each call marked and numbered; what `launch` returns is the wait."""
    numbers = itertools.count()

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        number = next(numbers)
        with mark(f"{label} {number}"):
            result = function(*given, **named)
        return _marked_wait(result, number) if label == LAUNCH else result

    return call


def _marked_wait(wait: Callable[[], Any], number: int) -> Callable[[], Any]:
    def call() -> Any:
        with mark(f"{WAIT} {number}"):
            return wait()

    return call


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a row for each method, batch size and section, and what could not be marked."""
    sets, rows, more = speech.manifests(args), [], {}
    for batch in args.batches:
        run, more["left_out"] = fusion.open_run(args, sets, batch, args.beam, "none")
        recognizer = run.recognizer
        utterances = [u for path in sets.values() for u in read_cuts(path, recognizer.source.wants)]
        utterances = sorted(utterances, key=lambda u: -u.seconds)[:batch]
        (emitted,) = recognizer.emit(utterances)
        for (method,), groups in fusion.turns(recognizer.methods, args):
            for _ in range(2):
                method.decode(emitted.emissions)
            with marking() as gone, watching(args.device, trace=args.trace) as watched, mark(BATCH):
                method.decode(emitted.emissions)
                figures.wait(args.device)
            more["not_marked"] = gone
            for section, start, end in sections(watched[0], "-late-" in method.name):
                row = {"method": method.name, "batch": len(utterances), "beam": args.beam, "section": section}
                rows.append({**row, "groups": groups, **watched[0].report(start, end)})
                figures.save(args, rows, **more)
                show(rows[-1])
        del run, recognizer, emitted
    return rows, more


def sections(timeline: Timeline, late: bool) -> list[tuple[str, float, float]]:
    """Return one event in the middle, the frames from its end to the next event, and the whole: name, time.

    It is an event in which the model is called. A method without events (shallow fusion) has the whole alone.
    Where scores are ``late``, the frames begin when the model is launched.
    """
    (whole,) = timeline.marks(BATCH)
    found = [("batch", whole.start, whole.end)]
    events, forwards = timeline.marks(f"{EVENT} "), timeline.marks(FORWARD)
    pairs = [
        (event, after) for event, after in zip(events, events[1:])
        if any(event.start <= forward.start < event.end for forward in forwards)
    ]
    if not pairs:
        return found
    event, after = pairs[len(pairs) // 2]
    end = event.end
    for launch in timeline.marks(f"{LAUNCH} "):
        if event.start <= launch.start < event.end:
            name = f"{WAIT} {launch.name.removeprefix(f'{LAUNCH} ')}"
            waits = [wait for wait in timeline.marks(WAIT) if wait.name == name]
            joins = [join for wait in waits for join in timeline.marks(JOIN) if join.start >= wait.end]
            end = max([end, *(wait.end for wait in waits), *(join.end for join in joins[:1])])
    frames = (end, after.start) if end < after.start else (event.end, after.start)  # groups take turns
    return [("event", event.start, end), ("frames", *frames), *found]


def show(row: dict[str, Any]) -> None:
    """Print a section."""
    print(f"\n{row['section']} of {row['method']}, batch {row['batch']}: {row['wall_us'] / 1e3:.2f} ms, the "
          f"device works {row['device_us'] / 1e3:.2f} ms and waits {100 * row['idle_share']:.0f} %")
    print(", ".join(f"{name.replace('_', ' ')} {call['count']} ({call['us'] / 1e3:.2f} ms)"
                    for name, call in row["calls"].items()))
    for kernel in row["kernels"]:
        share = f"{100 * kernel['share']:5.1f} %"
        print(f"  {kernel['us']:10.0f} us {kernel['count']:6} x {share}  {kernel['name'][:70]}")
    for name, part in row["marks"].items():
        idle = row["idle_us_by_mark"].get(name, 0.0)
        print(f"  host {part['us']:10.0f} us {part['count']:6} x, the device idle {idle:8.0f} us: {name}")
    for gap in row["largest_gaps"][:5]:
        host = ", ".join(f"{part['name'][:60]} {100 * part['share']:.0f} %" for part in gap["host"])
        print(f"  gap of {gap['us']:8.0f} us at {gap['at_us']:.0f}: {host}", flush=True)


def arguments(given: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Return what the command line says."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    speech.add_arguments(parser)
    parser.add_argument("--methods", nargs="+", default=[METHOD])
    parser.add_argument("--beam", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="+", default=[32], help="utterances, the longest ones")
    parser.add_argument("--dtype", default="", help="of the LLM's weights; none: float32")
    parser.add_argument("--shape", default="", choices=["", *fusion.SHAPES], help="a random LLM of this size")
    parser.add_argument("--engine", default="auto", choices=["auto", "native", "triton", "torch"])
    parser.add_argument("--groups", type=int, nargs="+", default=[1],
                        help="of utterances in turns, see search/turns.py; 0: as the search chooses")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--trace", default="", help="file for the whole trace of the last batch")
    parser.add_argument("--output", default="bench/profile.json")
    return argparse.Namespace(**vars(parser.parse_args(given)), limit=0, apart=True)


def main() -> None:
    """Measure, print, write JSON."""
    args = arguments()
    rows, more = measure(args)
    figures.write(args, rows, **more)


if __name__ == "__main__":
    main()
