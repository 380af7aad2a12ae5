"""Whole decodes with an LLM: word errors against time and memory, for methods, beams and batch sizes.
Knows: the decoder and its rows. Must not know: how a method works.

    OMP_NUM_THREADS=1 python tools/bench/fusion.py                                  # sentences of the demo
    python tools/bench/fusion.py --device cuda --beams 5 10 20 50 --batches 1 32
    python tools/bench/fusion.py --cuts data/fbank/minibooks_cuts_dev.jsonl.gz --limit 128
    python tools/bench/fusion.py --quantizations none 8bit 4bit int8 --methods llm-delayed-shortest
    python tools/bench/fusion.py --device cuda --dtype bfloat16 --shape mistral-7b --beams 10

Time is that of search, language models and second passes, without features and encoder; as a ratio, against
llm-shallow (or the first method) at the same beam and batch, with the first of --quantizations. --engine
torch runs every search by tensors, as shallow fusion needs it; the default is what users get. Methods take
turns batch by batch within one run. With --shape the LLMs have random weights of a published configuration,
and a weight in the search that leaves the acoustic model's hypotheses as they are: times and memory are those
of such a model, word errors say nothing.
"""
from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import figures  # noqa: E402
import speech  # noqa: E402
from shapes import SHAPES, of_shape  # noqa: E402

from icefall_fusion.common.devices import weight_bytes  # noqa: E402
from icefall_fusion.decode.job import DecodeRun  # noqa: E402
from icefall_fusion.decode.method_names import parse_method  # noqa: E402
from icefall_fusion.search import PrefixSearchOptions  # noqa: E402

METHODS = (
    "llm-shallow", "llm-nbest-rescoring", "llm-delayed-shortest", "llm-delayed-interval-8",
    "llm-delayed-interval-16", "llm-delayed-interval-32", "llm-delayed-interval-64",
    "llm-delayed-interval-128",
)
_FAINT = 1e-3  # weight of an LLM that knows nothing
_SUMMED = ("search_seconds", "lm_seconds", "audio_seconds", "words", "lm_tokens_forwarded", "lm_forwards")
_KEPT = ("method", "wer", "words", "oracle_wer", "search_seconds", "lm_seconds", "lm_forwards",
         "lm_tokens_forwarded", "kv_bytes_peak", "peak_memory_bytes", "audio_seconds")


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Decode by every method at every beam and batch size; return a row for each."""
    sets, rows = speech.manifests(args), []
    for batch in args.batches:
        for beam in args.beams:
            base: dict[str, Any] | None = None
            for quantization in args.quantizations:
                search = PrefixSearchOptions(beam=beam, engine=args.engine)
                options = speech.decode_options(
                    args, f"{args.speech}/fusion", sets, methods=list(args.methods), search=search,
                    batch_size=batch, limit=args.limit, threads=args.threads,
                )
                if args.shape:
                    options = replace(options, weights={name: faint(name) for name in args.methods})
                change: dict[str, Any] = {"dtype": args.dtype} if args.dtype else {}
                if quantization != "none":
                    change["quantization"] = quantization
                llm, matched = (replace(lm, **change) for lm in (options.llm, options.matched_llm))
                with of_shape(args.shape):
                    run = DecodeRun(replace(options, llm=llm, matched_llm=matched))
                for _ in range(2 if figures.on_gpu(args.device) else 1):  # first kernels are compiled there
                    found = [row for name, path in sets.items() for row in run.decode_set(name, path)]
                new = compare(found, args.methods, beam, batch, base)
                loaded = run.recognizer.models.loaded()
                weights = weight_bytes(loaded["llm"].model) if "llm" in loaded else 0
                fused = {name: lm.fused is not None for name, lm in loaded.items()}
                del run, loaded  # its models, before the next ones come
                more = {"quantization": quantization, "llm_weights": weights, "fused": fused}
                new = [{**row, **more} for row in new]
                rows += new
                figures.save(args, rows)  # a time limit takes nothing back
                base = base or reference(new)
                show(rows[-len(args.methods) :])
    return rows


def faint(method: str) -> dict[str, float]:
    """Return weights with which a method does all its work and finds what the acoustic model finds."""
    return {"words": 0.0, **dict.fromkeys(parse_method(method).sources, _FAINT)}


def reference(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row that others are compared with."""
    return next((row for row in rows if row["method"] == "llm-shallow"), rows[0])


def compare(
    found: list[dict[str, Any]], methods: list[str], beam: int, batch: int, base: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return a row for each method over all sets, with its speed against that of ``base``.

    Args:
        found: rows of ``results.json``.
        methods: in the order wanted.
        beam, batch: of the search, for the rows.
        base: none: the row of llm-shallow among these, or the first.
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
        row.update(beam=beam, batch=batch, seconds=row["search_seconds"] + row["lm_seconds"])
        row["rtf"] = row["seconds"] / row["audio_seconds"]
        rows.append(row)
    base = base or reference(rows)
    for row in rows:
        row["times_faster"] = base["seconds"] / row["seconds"]
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows of one beam and batch size."""
    weights = f"LLM of {rows[0]['llm_weights'] / 2**20:,.0f} MB, quantization {rows[0]['quantization']}"
    print(f"\nbeam {rows[0]['beam']}, batch {rows[0]['batch']}, {weights}: {rows[0]['words']:,} words")
    titles = f"{'WER %':>8}{'RTF':>9}{'faster':>9}{'search s':>10}{'LM s':>8}{'tokens':>10}{'KV MB':>8}"
    print(f"{'method':34}{titles}")
    for row in rows:
        print(f"{row['method']:34}{row['wer']:8.2f}{row['rtf']:9.5f}{row['times_faster']:8.2f}x"
              f"{row['search_seconds']:10.2f}{row['lm_seconds']:8.2f}{row['lm_tokens_forwarded']:10,}"
              f"{row['kv_bytes_peak'] / 2**20:8.1f}", flush=True)


def main() -> None:
    """Parse the command line, measure, print, write JSON."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    speech.add_arguments(parser)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--beams", type=int, nargs="+", default=[10])
    parser.add_argument("--batches", type=int, nargs="+", default=[32], help="utterances decoded together")
    parser.add_argument("--limit", type=int, default=0, help="utterances of each set; 0: all")
    parser.add_argument("--quantizations", nargs="+", default=["none"], help="none, 8bit, 4bit, int8")
    parser.add_argument("--dtype", default="", help="of the LLMs' weights; none: float32")
    parser.add_argument("--shape", default="", choices=["", *SHAPES], help="random LLMs of this size")
    parser.add_argument("--engine", default="auto", choices=["auto", "native", "triton", "torch"])
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--output", default="bench/fusion.json")
    args = parser.parse_args()
    if args.shape and args.quantizations != ["none"]:
        parser.error("--shape makes plain weights: leave --quantizations alone")
    figures.write(args, measure(args))


if __name__ == "__main__":
    main()
