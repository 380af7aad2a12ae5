"""Whole decodes with an LLM: word errors against time and memory, for methods, beams and batch sizes.
Knows: the decoder and its rows, the device's rates. Must not know: how a method works.

    OMP_NUM_THREADS=1 python tools/bench/fusion.py                                  # sentences of the demo
    python tools/bench/fusion.py --device cuda --beams 5 10 20 50 --batches 1 32
    python tools/bench/fusion.py --cuts data/fbank/minibooks_cuts_dev.jsonl.gz --limit 128
    python tools/bench/fusion.py --quantizations none 8bit 4bit int8 --methods llm-delayed-shortest
    python tools/bench/fusion.py --device cuda --dtype bfloat16 --shape mistral-7b --batches 32 64 \
        --emissions bench/saved                    # of speech.py --keep: without acoustic model or speech

Time is that of search, language models and second passes, without features and encoder; as a ratio, against
llm-shallow (or the first method) at the same beam and batch, with the first of --quantizations. --engine
torch runs every search by tensors, as shallow fusion needs it; the default is what users get. On a CPU
methods take turns batch by batch within one run. On a GPU, and with --apart, one comes after the other, each
decoded twice (kernels are made the first time) and a third time under the profiler, which tells when the
device works; the JSON is written after each. With --shape the LLMs have random weights of a published
configuration, and a weight in the search that leaves the acoustic model's hypotheses as they are: times and
memory are those of such a model, word errors say nothing.

The floor of a method is the larger of: the LLM's weights read once a call at the measured copy bandwidth, and
forwarded tokens x 2 x parameters at the measured matrix rate. "host" is the share of the time in which the
device has nothing to do; "of rows" what keys and values take, against a cache with a row for each hypothesis.
"""
from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import figures  # noqa: E402
import hypothesis_caches  # noqa: E402
import speech  # noqa: E402
from fusion_columns import SHOWN  # noqa: E402
from rates import rates  # noqa: E402
from shapes import SHAPES, faint, of_shape  # noqa: E402
from timeline import watching  # noqa: E402

from icefall_fusion.common.devices import weight_bytes  # noqa: E402
from icefall_fusion.decode.job import DecodeRun  # noqa: E402
from icefall_fusion.decode.language_models import LM_SOURCES  # noqa: E402
from icefall_fusion.decode.method_names import parse_method  # noqa: E402
from icefall_fusion.search import PrefixSearchOptions  # noqa: E402

METHODS = (
    "llm-shallow", "llm-nbest-rescoring", "llm-delayed-shortest", "llm-delayed-interval-8",
    "llm-delayed-interval-16", "llm-delayed-interval-32", "llm-delayed-interval-64",
    "llm-delayed-interval-128",
)
#: With --shape, where time is what counts.
METHODS_OF_A_SHAPE = (
    "llm-shallow", "llm-nbest-rescoring", "llm-delayed-shortest", "llm-delayed-interval-16",
    "llm-delayed-shortest-ahead", "llm-delayed-interval-16-ahead", "llm-delayed-interval-16-late-8",
)
#: Aims of delayed fusion with a 7B LLM on a GPU: figure of the row, bound, how it is said.
TARGETS = (
    ("llm_rtf", 0.001, "LLM RTF <= 0.001"),
    ("times_slower_than_shallow", 0.25, ">= 4 times faster than llm-shallow"),
    ("times_slower_than_rescoring", 1.0, "as fast as N-best rescoring"),
    ("host_share", 0.2, "host < 20 % of the time"),
    ("kv_of_rows", 0.2, "keys and values <= 1/5 of caches by hypothesis"),
)

_NO_BOUND = 1e9  # seconds in a batch: --batches says how many utterances
_LONGEST_WATCHED = 10.0  # seconds of a decode that is watched by the profiler
_SUMMED = ("search_seconds", "lm_seconds", "audio_seconds", "words", "lm_tokens_forwarded", "lm_forwards")
_KEPT = ("method", "wer", "words", "oracle_wer", "search_seconds", "lm_seconds", "lm_forwards",
         "lm_tokens_forwarded", "kv_bytes_peak", "peak_memory_bytes", "audio_seconds")


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Decode by every method at every beam and batch size; return a row for each, and the device's rates."""
    sets = speech.manifests(args)
    rows: list[dict[str, Any]] = []
    own_rates = rates(args.device, args.dtype or "float32")
    more = {"copy_bytes_a_second": own_rates[0], "matrix_ops_a_second": own_rates[1]}
    for batch in args.batches:
        for beam in args.beams:
            base: Optional[dict[str, Any]] = None
            for quantization in args.quantizations:
                run, more["left_out"] = open_run(args, sets, batch, beam, quantization)
                every, new = list(run.recognizer.methods), []
                for some, groups in turns(every, args):
                    made = decode(args, run, some, sets)
                    for row in made:
                        row.update(beam=beam, batch=batch, quantization=quantization, groups=groups)
                        add_costs(row, run, own_rates)
                    new += made
                    compare(new, base)
                    figures.save(args, rows + new, **more)  # a time limit takes nothing back
                rows += new
                base = base or reference(new)
                del run, every, some  # its models, before the next ones come
                show(new)
    return rows, more


def turns(every: list[Any], args: argparse.Namespace) -> Iterator[tuple[list[Any], int]]:
    """Yield methods that are decoded together, and the groups of their searches (0: as the search chooses).

    Groups make a difference to delayed fusion alone; other methods come once.
    """
    for some in [[one] for one in every] if args.apart else [every]:
        delayed = any(spec.trigger is not None for method in some for spec in method.spec.fusions)
        for groups in args.groups if delayed else args.groups[:1]:
            for method in some:
                method.search = replace(method.search, groups=groups or None)
            yield some, groups


def open_run(
    args: argparse.Namespace, sets: dict[str, str], batch: int, beam: int, quantization: str
) -> tuple[DecodeRun, list[str]]:
    """Return a run, and the methods that it leaves out as a model is not there."""
    search = PrefixSearchOptions(beam=beam, engine=args.engine)
    options = speech.decode_options(
        args, f"{args.speech}/fusion", sets, methods=list(args.methods), search=search, batch_size=batch,
        batch_seconds=_NO_BOUND, limit=args.limit, threads=args.threads,
    )
    there = options.named_models()
    left_out = [name for name in args.methods if not parse_method(name).needs <= there | {"attention"}]
    if left_out:
        print(f"left out, as a model is not there: {', '.join(left_out)}")
    methods = [name for name in args.methods if name not in left_out]
    options = replace(options, methods=methods)
    if args.shape:
        options = replace(options, weights={name: faint(name) for name in methods})
    change: dict[str, Any] = {"dtype": args.dtype} if args.dtype else {}
    if quantization != "none":
        change["quantization"] = quantization
    llm, matched = (replace(lm, **change) for lm in (options.llm, options.matched_llm))
    with of_shape(args.shape):
        return DecodeRun(replace(options, llm=llm, matched_llm=matched)), left_out


def decode(
    args: argparse.Namespace, run: DecodeRun, methods: list[Any], sets: dict[str, str]
) -> list[dict[str, Any]]:
    """Decode all sets by some methods of a run; return a row for each method."""
    run.recognizer.methods = methods

    def once() -> list[dict[str, Any]]:
        return [row for name, path in sets.items() for row in run.decode_set(name, path)]

    names = [method.name for method in methods]
    if not args.apart:
        return together(once(), names)
    with hypothesis_caches.counting() as held:  # the first time kernels are compiled
        once()
    row = together(once(), names)[0]
    row["held"] = held
    if row["seconds"] < _LONGEST_WATCHED:
        try:
            with watching(args.device, host=False) as watched:
                once()
            row["device_seconds"] = watched[0].busy_seconds()
        except RuntimeError as error:
            print(f"the device's time cannot be had: {error}")
    return [row]


def together(found: list[dict[str, Any]], methods: list[str]) -> list[dict[str, Any]]:
    """Return a row for each method over all sets.

    Args:
        found: rows of ``results.json``.
        methods: in the order wanted.
    """
    rows = []
    for method in methods:
        own = [row for row in found if row["method"] == method]
        row = {key: own[0][key] for key in _KEPT if key in own[0]}
        for key in _SUMMED:
            row[key] = sum(part.get(key, 0) for part in own)
        row["wer"] = sum(part["wer"] * part["words"] for part in own) / max(1, row["words"])
        for key in ("kv_bytes_peak", "peak_memory_bytes"):
            row[key] = max(part.get(key, 0) for part in own)
        row["seconds"] = row["search_seconds"] + row["lm_seconds"]
        row["rtf"] = row["seconds"] / row["audio_seconds"]
        row["llm_rtf"] = row["lm_seconds"] / row["audio_seconds"]
        rows.append(row)
    return rows


def add_costs(row: dict[str, Any], run: DecodeRun, own_rates: tuple[float, float]) -> None:
    """Add to a row its floor, the share of the host, and what a cache for each hypothesis would hold."""
    held = row.pop("held", None)
    models, sources = run.recognizer.models, set(parse_method(row["method"]).sources) & set(LM_SOURCES)
    lms = {source: models.get(source) for source in sorted(sources)}
    row["llm_weights"] = sum(weight_bytes(lm.model) for lm in lms.values())
    row["fused"] = {name: lm.fused is not None for name, lm in lms.items()}
    if len(lms) == 1 and row["lm_forwards"]:
        lm = next(iter(lms.values()))
        row["floor_seconds"] = figures.floor_seconds(
            lm.model, row["lm_forwards"], row["lm_tokens_forwarded"], own_rates
        )
        row["times_floor"] = row["lm_seconds"] / row["floor_seconds"]
        row["whole_times_floor"] = row["seconds"] / row["floor_seconds"]
        if held is not None:
            row.update(held.bytes(lm, row["kv_bytes_peak"]))
    if "device_seconds" in row:
        row["host_share"] = max(0.0, 1.0 - row["device_seconds"] / row["seconds"])


def reference(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row that others are compared with."""
    return next((row for row in rows if row["method"] == "llm-shallow"), rows[0])


def compare(rows: list[dict[str, Any]], base: Optional[dict[str, Any]] = None) -> None:
    """Add to rows of one beam and batch their speed against ``base``, and the aims that they meet.

    Args:
        rows: those so far.
        base: none: the row of llm-shallow among these, or the first.
    """
    base = base or reference(rows)
    others = {name: row for row in rows for name in ("llm-shallow", "llm-nbest-rescoring")
              if row["method"] == name}
    for row in rows:
        row["times_faster"] = base["seconds"] / row["seconds"]
        if not row["method"].startswith("llm-delayed"):
            continue
        for name, other in others.items():
            row[f"times_slower_than_{name.split('-')[-1]}"] = row["seconds"] / other["seconds"]
        row["targets"] = {said: row[key] <= bound for key, bound, said in TARGETS if key in row}


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows of one beam and batch size."""
    if not rows:
        return
    weights = f"LLM of {rows[0]['llm_weights'] / 2**20:,.0f} MB, quantization {rows[0]['quantization']}"
    print(f"\nbeam {rows[0]['beam']}, batch {rows[0]['batch']}, {weights}: {rows[0]['words']:,} words")
    print(f"{'method':34}" + "".join(f"{column.title:>{column.width}}" for column in SHOWN))
    for row in rows:
        print(f"{row['method']:34}" + "".join(column.cell(row) for column in SHOWN), flush=True)
    for row in rows:
        if row.get("targets"):
            said = ", ".join(f"{name}: {'met' if met else 'MISSED'}" for name, met in row["targets"].items())
            print(f"{row['method']}: {said}")


def arguments(given: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Return what the command line says."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    speech.add_arguments(parser)
    parser.add_argument("--methods", nargs="+", default=[], help="default: a comparison; less with --shape")
    parser.add_argument("--beams", type=int, nargs="+", default=[10])
    parser.add_argument("--batches", type=int, nargs="+", default=[32], help="utterances decoded together")
    parser.add_argument("--limit", type=int, default=0, help="utterances of each set; 0: all")
    parser.add_argument("--quantizations", nargs="+", default=["none"], help="none, 8bit, 4bit, int8")
    parser.add_argument("--dtype", default="", help="of the LLMs' weights; none: float32")
    parser.add_argument("--shape", default="", choices=["", *SHAPES], help="random LLMs of this size")
    parser.add_argument("--engine", default="auto", choices=["auto", "native", "triton", "torch"])
    parser.add_argument("--groups", type=int, nargs="+", default=[0],
                        help="groups of utterances in turns, for delayed fusion; 0: as the search chooses")
    parser.add_argument("--apart", action="store_true", help="method by method, as on a GPU")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--output", default="bench/fusion.json")
    args = parser.parse_args(given)
    args.apart = args.apart or figures.on_gpu(args.device)
    args.methods = args.methods or list(METHODS_OF_A_SHAPE if args.shape else METHODS)
    if args.shape and args.quantizations != ["none"]:
        parser.error("--shape makes plain weights: leave --quantizations alone")
    return args


def main() -> None:
    """Measure, print, write JSON."""
    args = arguments()
    rows, more = measure(args)
    figures.write(args, rows, **more)


if __name__ == "__main__":
    main()
