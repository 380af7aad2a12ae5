"""The LLM's side of delayed fusion: ways to score the events of a real decode, at model sizes up to 7B.
Knows: recorded events, causal LMs, clocks. Must not know: how events came about, how they are scored.

    OMP_NUM_THREADS=1 python tools/bench/llm_tree.py                          # the shipped LLM, on a CPU
    python tools/bench/llm_tree.py --record bench/events.json.gz              # where there is speech; then:
    python tools/bench/llm_tree.py --events bench/events.json.gz --device cuda --dtype bfloat16 \
        --models minibooks open-llama-3b mistral-7b

A decode of speech by delayed fusion with the shipped models (interval 16, beam 10) is recorded: at each event
the tokens of every hypothesis. Then each model scores the same events

    full texts    every hypothesis again from its first token, in padded batches;
    path caches   keys and values of each hypothesis apart, re-ordered by copying when the beam changes;
    eager tree    one tree an utterance, every token forwarded as soon as it is there;
    lazy, unfused one tree an utterance, a token forwarded when a child of it has to be scored;
    lazy, launches the same by fused kernels where a model has them, on a GPU, each launched by itself;
    lazy, cublas  the same, events of usual sizes as CUDA graphs;
    lazy tree     the same, each product in the form that was the fastest at loading (ours).

All must give the same scores (float32; in bfloat16 the largest difference is told). Models but the
shipped one have random weights of the named configuration: time and memory do not depend on the values. The
floor of an event is the larger of: weights read once at the measured copy bandwidth, and the products of
forwarded tokens at the measured matrix rate.

An event's time is that from the call until its scores are there. On a GPU two parts of it are told too: the
host's time until all is launched, and the GPU's own time. For that one the GPU sleeps first, until the host
has launched all; events at which it woke too early are counted.
"""
from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, Optional, Sequence

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import figures  # noqa: E402
from llm_events import Event, Recording, read_events, record, write_events  # noqa: E402
from llm_ways import WAYS, LazyTree  # noqa: E402
from rates import rates  # noqa: E402
from shapes import SHAPES, make_model  # noqa: E402

from icefall_fusion.lm import CausalLm  # noqa: E402
from icefall_fusion.lm.products import Machine  # noqa: E402
from icefall_fusion.lm.tree_forward import GPU_TOKEN_BUCKET  # noqa: E402

_SLEEP = 40_000_000  # cycles, some 20 ms: longer than the host needs for an event
ROWS = (307, 320, 640)  # tokens of events in the table of products
Batches = Sequence[tuple[int, list[Event]]]


@torch.inference_mode()
def replay(way: str, lm: CausalLm, batches: Batches, device: str) -> tuple[dict, list]:
    """Score all events one way; return what it cost, and the scores."""
    if figures.on_gpu(device):
        torch.cuda.reset_peak_memory_stats()
    scores, seconds, launching, forwarded, forwards, kv_bytes, told = [], 0.0, 0.0, 0, 0, 0, {}
    for batch, recorded in batches:
        scorer = WAYS[way](lm, batch)
        for event in recorded:
            prepared = scorer.prepare(event)
            figures.wait(device)
            begun = time.perf_counter()
            wait = scorer.launch(prepared)
            launching += time.perf_counter() - begun
            scores.append(wait())
            figures.wait(device)
            seconds += time.perf_counter() - begun
            scorer.after(event)
        forwarded, forwards = forwarded + scorer.forwarded, forwards + scorer.forwards
        kv_bytes, told = max(kv_bytes, scorer.kv_bytes), scorer.told()
    events = max(1, len(scores))
    row = {"way": way, "seconds": seconds, "events": len(scores), "ms_an_event": 1000 * seconds / events,
           "tokens_forwarded": forwarded, "forwards": forwards, "kv_mb": kv_bytes / 2**20, **told}
    if figures.on_gpu(device):
        row["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
        row["host_ms_an_event"] = 1000 * launching / events
    return row, scores


@torch.inference_mode()
def gpu_alone(way: str, lm: CausalLm, batches: Batches) -> dict[str, float]:
    """Return the GPU's own time of an event, and at how many events it had to wait for the host."""
    total, events, waited = 0.0, 0, 0
    for batch, recorded in batches:
        scorer = WAYS[way](lm, batch)
        for event in recorded:
            prepared = scorer.prepare(event)
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(_SLEEP)
            first.record()
            wait = scorer.launch(prepared)
            waited += first.query()
            last.record()
            wait()
            last.synchronize()
            total += first.elapsed_time(last)
            events += 1
            scorer.after(event)
    return {"gpu_ms_an_event": total / max(1, events), "gpu_waited_for_host": waited}


def floor_seconds(lm: CausalLm, row: dict[str, Any], bandwidth: float, rate: float) -> float:
    """Return the least time of a row's events: weights read at ``bandwidth``, products done at ``rate``.

    A table of embeddings is read by rows; it counts where it is the output layer too.
    """
    inputs, outputs = lm.model.get_input_embeddings().weight, lm.model.get_output_embeddings().weight
    read = [p for p in lm.model.parameters() if p is not inputs or p is outputs]
    count, size = sum(p.numel() for p in read), sum(p.numel() * p.element_size() for p in read)
    return max(size * row["forwards"] / bandwidth, row["tokens_forwarded"] * 2 * count / rate)


def measure_way(
    way: str, name: str, lm: CausalLm, recording: Recording, speeds: tuple[float, float],
    reference: Optional[list], device: str,
) -> tuple[dict[str, Any], list]:
    """Return the row of one way, and its scores."""
    tree, batches = issubclass(WAYS[way], LazyTree), recording.batches
    attention = lm.model.config._attn_implementation
    if not tree:  # our attention is for trees
        lm.model.set_attn_implementation("sdpa")
    few = [(batch, events[:2]) for batch, events in batches[:1]]
    # of trees all: on a GPU each size that comes for the first time may cost as much as all events
    for _ in range(WAYS[way].rounds):
        replay(way, lm, batches if tree and figures.on_gpu(device) else few, device)
    row, scores = replay(way, lm, batches, device)
    if figures.on_gpu(device) and tree and not WAYS[way].eager:
        row.update(gpu_alone(way, lm, batches))
    lm.model.set_attn_implementation(attention)
    differences = [float((a - b).abs().max()) for a, b in zip(scores, reference or scores)]
    worst = max(differences)
    row["largest_difference"] = worst if np.isfinite(worst) else None
    row["fused"] = tree and way != "lazy, unfused" and lm.fused is not None
    floor, parameters = floor_seconds(lm, row, *speeds), sum(p.numel() for p in lm.model.parameters())
    row.update(
        model=name, parameters=parameters, floor_seconds=floor, rtf=row["seconds"] / recording.audio_seconds,
        floor_ms_an_event=1000 * floor / max(1, row["events"]), times_floor=row["seconds"] / floor,
    )
    if "gpu_ms_an_event" in row:
        row["gpu_times_floor"] = row["gpu_ms_an_event"] / row["floor_ms_an_event"]
    return row, scores


def tell(row: dict[str, Any]) -> None:
    """Print a row."""
    parts = "".join(
        f"{row[key]:8.2f} {word}" for key, word in (("host_ms_an_event", "host"), ("gpu_ms_an_event", "GPU"))
        if key in row
    )
    print(f"{row['model']:16}{row['way']:15}{row['ms_an_event']:9.2f} ms an event{parts}"
          f"{row['floor_ms_an_event']:8.2f} floor{row['times_floor']:8.2f} x floor"
          f"{row['tokens_forwarded']:9,} tokens{row['kv_mb']:9.1f} MB keys and values"
          f"  differs by {row['largest_difference']}{', fused' if row['fused'] else ''}", flush=True)


def tell_products(name: str, lm: CausalLm, speeds: tuple[float, float]) -> list[dict[str, Any]]:
    """Print and return the floor, the prediction by count and the trials of a fused model's products."""
    machine, found = Machine(memory=speeds[0], operations=speeds[1]), []
    for rows in ROWS:
        for product, (shape, _) in lm.fused.shapes().items():
            padded = -(-rows // GPU_TOKEN_BUCKET) * GPU_TOKEN_BUCKET
            best = shape.candidates(padded, machine)[0]
            trials = [each for each in lm.fused.products.told
                      if (each["product"], each["rows"]) == (product, padded)]
            row = {"product": product, "rows": rows, "times": 1 if product == "last" else lm.layers,
                   "floor": shape.floor(rows, machine), "form": list(best.form), "tiles": best.tiles,
                   "waves": best.waves, "bytes": best.bytes, "predicted": best.seconds, "trials": trials}
            found.append(row)
            times = [row["floor"], best.seconds]
            if trials:
                times += [trials[0]["seconds"], min(each["seconds"] for each in trials)]
            words = zip(times, ("floor", "predicted", "cuBLAS", "least"))
            print(f"{name:16}{rows:4} rows {product:8}{best.tiles:5} tiles{best.waves:3} waves"
                  + "".join(f"{1e6 * seconds:8.1f} us {word}" for seconds, word in words), flush=True)
        here = [row for row in found if row["rows"] == rows]
        sums = (1e3 * sum(row["times"] * row[key] for row in here) for key in ("floor", "predicted"))
        print(f"{name:16}{rows:4} rows, all products: {next(sums):.2f} ms floor, {next(sums):.2f} predicted")
    return found


def measure(
    args: argparse.Namespace, recording: Recording
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Replay every way with every model; return rows, and what was measured once."""
    speeds = rates(args.device, args.dtype)
    more = {"audio_seconds": recording.audio_seconds, "recorded": recording.told,
            "copy_bytes_a_second": speeds[0], "matrix_ops_a_second": speeds[1], "not_fused": {},
            "products": {}}
    rows: list[dict[str, Any]] = []
    for name in args.models:
        lm, reference = make_model(name, args.device, args.dtype, recording.tokens()), None
        if lm.fused_failure is not None:
            more["not_fused"][name] = lm.fused_failure
            print(f"{name} is not fused: {lm.fused_failure}", flush=True)
        if lm.fused is not None:
            more["products"][name] = tell_products(name, lm, speeds)
        for way in args.ways:
            if WAYS[way].needs_fused and lm.fused is None:
                continue
            row, scores = measure_way(way, name, lm, recording, speeds, reference, args.device)
            reference = reference or scores
            rows.append(row)
            tell(row)
            figures.save(args, rows, **more)  # a time limit takes nothing back
        del lm
        if figures.on_gpu(args.device):
            torch.cuda.empty_cache()
    return rows, more


def parse() -> argparse.Namespace:
    """Return the command line's options; those of speech are there only when events are recorded."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--events", default="", help="file of --record to read; none: decode and record")
    if any(word.split("=")[0] == "--events" for word in sys.argv[1:]):
        parser.add_argument("--device", default="cpu")
    else:  # it needs packages that reading events does not
        import speech

        speech.add_arguments(parser)
    parser.add_argument("--record", default="", help="write the events to this file and end")
    parser.add_argument("--first", type=int, default=0, help="so many events of each batch; 0: all")
    parser.add_argument("--models", nargs="+", default=["minibooks"], choices=["minibooks", *SHAPES])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--beam", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32, help="utterances")
    parser.add_argument("--interval", type=int, default=16, help="frames between events")
    parser.add_argument("--output", default="bench/llm_tree.json")
    args = parser.parse_args()
    for name in ("beam", "batch", "interval"):
        if args.events and f"--{name}" in sys.argv:
            parser.error(f"--{name} belongs to the recording: it has no effect with --events")
    return args


def main() -> None:
    """Parse the command line, record or read, measure, print, write JSON."""
    args = parse()
    if args.device == "cpu":
        torch.set_num_threads(1)
    recording = (read_events(args.events) if args.events else record(args)).first(args.first)
    if args.record:
        write_events(args.record, recording)
        print(f"written: {args.record}: {sum(len(events) for _, events in recording.batches)} events")
        return
    rows, more = measure(args, recording)
    figures.write(args, rows, **more)
    ours = [row for row in rows if row["way"] == "lazy tree"]
    if figures.on_gpu(args.device) and not all(row["fused"] for row in ours):
        sys.exit("llm_tree.py: a model ran without fused kernels: the times are not ours (see the warnings)")


if __name__ == "__main__":
    main()
