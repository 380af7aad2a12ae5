"""Streams in real time: when words are shown, how stable they are, errors, cost, streams that a core holds.
Knows: the shipped models, methods, speech with known word times. Must not know: how a stream is decoded.

    OMP_NUM_THREADS=1 python tools/bench/streaming.py                        # the table; half an hour
    OMP_NUM_THREADS=1 python tools/bench/streaming.py --model EXPORT --page egs/minibooks/ASR/RESULTS.md
    OMP_NUM_THREADS=1 python tools/bench/streaming.py --minutes 120          # memory of a long stream

Sentences of the demo are spoken by eSpeak NG, half clean and half noisy, which tells when each word ends.
Each is a stream of its own; the last packet tells that it ends. Rows are written one by one; a run that was
stopped goes on (--restart begins anew). Rows ``whole`` decode each utterance at its end, without chunk mask.
N-best rescoring shows the words of the first pass until the end. Refused are transducers, lattices, other
second passes, and what `StreamingDecoder` refuses (models that stop the search at different frames, for one).
Streams are searched on the CPU; --device is that of the models (never measured on a GPU so far). With --shape
the LLM has random weights of a published size and --llm's tokens: its words are those of the acoustic model.
"""
from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import figures  # noqa: E402
import word_times  # noqa: E402
from gpu_page import put  # noqa: E402
from shapes import SHAPES, faint, of_shape  # noqa: E402
from streaming_clock import Clock, Played, Speaker, Talk, play  # noqa: E402
from streaming_figures import BUSY, CAPACITY, CTC, LLM, STREAM, WHOLE, draw, measures, page  # noqa: E402
from streaming_memory import long_stream  # noqa: E402

from icefall_fusion.acoustic.models import ChunkOptions  # noqa: E402
from icefall_fusion.acoustic.sources import EmissionOptions  # noqa: E402
from icefall_fusion.common.checks import check  # noqa: E402
from icefall_fusion.common.files import write_text  # noqa: E402
from icefall_fusion.common.memory import peak_memory_bytes, reset_peak_memory  # noqa: E402
from icefall_fusion.decode.demo import STORIES  # noqa: E402
from icefall_fusion.decode.methods import Method  # noqa: E402
from icefall_fusion.decode.pretrained import with_pretrained, with_shipped_lms  # noqa: E402
from icefall_fusion.decode.recognizer import Recognizer, RecognizerOptions  # noqa: E402
from icefall_fusion.decode.tune_words import read_alignments  # noqa: E402
from icefall_fusion.decode.utterances import Utterance, read_cuts  # noqa: E402
from icefall_fusion.fusion.rescoring import rescore_with_lm  # noqa: E402
from icefall_fusion.nbest import NBest  # noqa: E402
from icefall_fusion.streaming import StreamingDecoder, StreamOptions  # noqa: E402

METHODS = ["ctc-greedy", "ctc-prefix", "ngram-shallow", "llm-nbest-rescoring", "llm-delayed-shortest",
           "llm-delayed-interval-16", "llm-delayed-shortest-ahead", "llm-delayed-shortest-late-8"]
SETS = ("test-clean", "test-other")
MARKS = "<!-- streaming.py: measured -->", "<!-- streaming.py: end -->"
FRAME = 40  # ms
LATE = 4.0  # seconds by which a machine with too many streams falls behind before it is given up


class Bench:
    """Models and speech.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        named = EmissionOptions(model=args.model, device=args.device)
        options = RecognizerOptions(emissions=named, weights=args.weights)
        options = with_shipped_lms(options) if args.model else with_pretrained(options)
        llm = replace(options.llm, dtype=args.dtype, path=args.llm or options.llm.path)
        if args.shape:
            options = replace(options, weights={method: faint(method) for method in args.methods})
        with of_shape(args.shape):
            self.recognizer = Recognizer(replace(options, llm=llm), args.methods)
        self.methods = {method.name: method for method in self.recognizer.methods}
        self.talks: list[Talk] = []
        self.utterances: dict[str, Utterance] = {}
        for manifest in args.cuts or self._speak():
            truth = read_alignments(manifest)
            for utterance in read_cuts(manifest, "audio"):
                words = truth.get(utterance.id, [])
                self.talks.append(Talk(utterance.id, utterance.load().numpy(), utterance.text or "", words))
            self.utterances |= {u.id: u for u in read_cuts(manifest, self.recognizer.source.wants)}
        self.seconds = sum(talk.seconds for talk in self.talks)

    def _speak(self) -> list[str]:
        half = argparse.Namespace(**{**vars(self.args), "sentences": max(1, self.args.sentences // 2)})
        return [word_times.speech(half, name) for name in SETS]

    def decoder(self, method: Method, chunk: int, streams: int = 1, **more: Any) -> StreamingDecoder:
        """Return a decoder of streams by a method in chunks of so many ms."""
        rule = "be greedy or the prefix search in a stream, then N-best rescoring by an LM at most"
        second = {spec.source for spec in method.spec.rescorers}
        good = method.spec.search in ("greedy", "prefix") and second <= {"nlm", "llm", "matched_llm"}
        check(good, "--methods", rule, method.name)
        left = round(self.args.left * 1000 / chunk)
        options = StreamOptions(chunk=ChunkOptions(chunk // FRAME, left), streams=streams,
                                commit_after=self.args.commit_after or None, **more)
        recognizer = self.recognizer
        return StreamingDecoder(recognizer.source.model, method.make_fusions({}), recognizer.options.search,
                                options, recognizer.source.tokens, method.spec.search == "greedy",
                                method.join)

    def rescorer(self, method: Method) -> Optional[Callable[[NBest], NBest]]:
        """Return the second pass of a method, if it has one."""
        if not method.spec.rescorers:
            return None
        models, sources = self.recognizer.models, [spec.source for spec in method.spec.rescorers]

        def rescore(nbest: NBest) -> NBest:
            for source in sources:
                lm, own = models.get(source), models.options[source]
                [nbest] = rescore_with_lm([nbest], lm, source, own.text, None, own.eos)
            return nbest.reweight(method.weights)

        return rescore

    def cost(self, clock: Clock, method: Method, seconds: float) -> dict[str, float]:
        """Return time and memory since the clock was made; unused models are left out."""
        unused = self.recognizer.models.unused_bytes(method.spec.needs)
        return {"rtf": round(clock.busy / seconds, 5), "peak_bytes": peak_memory_bytes() - unused,
                "audio_seconds": round(seconds, 2)}


def stream_row(bench: Bench, method: Method, chunk: int, bar: tqdm) -> dict[str, Any]:
    """Play all talks, one after the other."""
    reset_peak_memory()
    decoder, speaker = bench.decoder(method, chunk), Speaker(bench.talks)
    warm_up(bench, method, chunk)
    clock = Clock(bench.args.clock == "wall", bench.args.device)
    play(decoder, [speaker], clock, bench.rescorer(method), tick=lambda played: bar.update())
    return {**measures(speaker.played), **bench.cost(clock, method, bench.seconds), **decoder.stats()}


def whole_row(bench: Bench, method: Method, bar: tqdm) -> dict[str, Any]:
    """Decode each talk at its end."""
    reset_peak_memory()
    counted = dict.fromkeys(("lm_forwards", "lm_tokens_forwarded"), 0.0)

    def decode(clock: Clock, talk: Talk) -> Played:
        played, begun = Played(talk), clock.now
        clock.wait_until(begun + talk.seconds)
        with clock.computing():
            [batch] = bench.recognizer.emit([bench.utterances[talk.name]])
            decoded = method.decode(batch.emissions, bench.recognizer.source.model)
        played.end(clock.now - begun, decoded.nbests[0][0].times)
        counted.update({name: value + decoded.cost.get(name, 0.0) for name, value in counted.items()})
        bar.update()
        return played

    decode(Clock(False, bench.args.device), bench.talks[0])  # warms up
    counted, clock = dict.fromkeys(counted, 0.0), Clock(bench.args.clock == "wall", bench.args.device)
    every = [decode(clock, talk) for talk in bench.talks]
    return {**measures(every), **bench.cost(clock, method, bench.seconds), **counted}


def capacity_row(bench: Bench, method: Method, chunk: int, bar: tqdm) -> dict[str, Any]:
    """Search the largest number of streams at once whose words are heard within `BUSY` ms (99 % of them)."""
    tried: dict[int, dict[str, Any]] = {0: {}}

    def holds(streams: int) -> bool:
        tried[streams] = busy_streams(bench, method, chunk, streams)
        bar.update()
        return tried[streams].get("heard_p99_ms", np.inf) < BUSY

    failed, most = 1, bench.args.most_streams
    while failed <= most and holds(failed):
        failed *= 2
    good, bad = failed // 2, failed
    while bad - good > max(1, good // 16) and bad <= most:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    fails = {"failed": bad, "failed_p99_ms": tried[bad].get("heard_p99_ms")} if bad in tried else {}
    return {"streams": good, **tried[good], **fails}


def busy_streams(bench: Bench, method: Method, chunk: int, streams: int) -> dict[str, Any]:
    """Return the latency of words with so many streams, and the share of time computed; empty: too slow."""
    rng, first = np.random.default_rng(streams), 0
    order, speakers = rng.permutation(len(bench.talks)), []
    for _ in range(streams):
        talks: list[Talk] = []
        while sum(talk.seconds for talk in talks) < bench.args.capacity:
            talks.append(bench.talks[order[first % len(order)]])
            first += 1
        speakers.append(Speaker(talks, int(rng.integers(0, 50))))
    clock = Clock(bench.args.clock == "wall", bench.args.device)
    decoder = bench.decoder(method, chunk, streams)
    if not play(decoder, speakers, clock, bench.rescorer(method), LATE):
        return {}
    found = measures([played for speaker in speakers for played in speaker.played])
    wanted = ("heard_p99_ms", "first_p90_ms", "first_p99_ms", "wer")
    return {**{name: found[name] for name in wanted}, "busy": round(clock.busy / clock.now, 3)}


def warm_up(bench: Bench, method: Method, chunk: int) -> None:
    """Decode one talk, so that no figure has the first calls in it."""
    play(bench.decoder(method, chunk), [Speaker(bench.talks[:1])], Clock(False, bench.args.device),
         bench.rescorer(method))


# --- rows -----------------------------------------------------------------------------------------------


def plan(args: argparse.Namespace) -> list[tuple[str, str, Optional[int]]]:
    """Return all rows: kind, method, chunk in ms."""
    rows: list[tuple[str, str, Optional[int]]] = [(WHOLE, method, None) for method in args.methods
                                                  if "-late-" not in method]
    rows += [(STREAM, method, chunk) for chunk in sorted(args.chunks, reverse=True)
             for method in args.methods]
    if args.capacity:
        rows += [(CAPACITY, method, args.capacity_chunk) for method in (CTC, LLM) if method in args.methods]
    return [row for row in rows if row[0] in args.kinds]


def earlier_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of a run that was stopped, if it had the same options."""
    path = Path(args.output)
    if args.restart or not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    free = ("restart", "page", "figure", "methods", "chunks", "kinds", "capacity_chunk", "minutes",
            "long_chunk")
    if {k: v for k, v in found["options"].items() if k not in free} != {
            k: v for k, v in json.loads(json.dumps(vars(args))).items() if k not in free}:
        print(f"{path} was measured with other options: all is measured anew")
        return []
    return found["rows"]


def measure(args: argparse.Namespace, bench: Bench) -> list[dict[str, Any]]:
    """Measure what is not there yet; write and print a row after the other."""
    for method in bench.methods.values():  # what streams do not serve is refused before anything is measured
        bench.decoder(method, args.chunks[0]).open().close()
    rows, makers = earlier_rows(args), {STREAM: stream_row, CAPACITY: capacity_row}
    for key in plan(args):
        kind, name, chunk = key
        if any((row["kind"], row["method"], row["chunk_ms"]) == key for row in rows):
            continue
        total = None if kind == CAPACITY else len(bench.talks)
        with tqdm(total=total, desc=f"{kind} {name} {chunk or ''}", unit="", leave=False) as bar:
            method = bench.methods[name]
            made = makers[kind](bench, method, chunk, bar) if chunk else whole_row(bench, method, bar)
        rows.append({"kind": kind, "method": name, "chunk_ms": chunk, "utterances": len(bench.talks), **made})
        figures.save(args, rows)
        word_times.show([{k: v for k, v in rows[-1].items() if v is not None}])
    return rows


def arguments(given: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Return what the command line says."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", default="", help="acoustic model; none: the shipped one")
    parser.add_argument("--llm", default="", help="model folder or hub name; none: the shipped LLM")
    parser.add_argument("--shape", default="", choices=["", *SHAPES], help="a random LLM of this size")
    parser.add_argument("--weights", default="", help="YAML file; none: the shipped one")
    parser.add_argument("--dtype", default="float32", help="of the LLM's weights")
    parser.add_argument("--methods", nargs="+", help=f"none: {', '.join(METHODS)}; of a long stream two")
    kinds = [WHOLE, STREAM, CAPACITY]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="of rows")
    parser.add_argument("--chunks", type=int, nargs="+", default=[160, 320, 640, 1280], help="ms")
    parser.add_argument("--left", type=float, default=20.0, help="seconds before a chunk that it sees")
    parser.add_argument("--commit-after", type=float, default=5.0, help="seconds; 0: where all agree alone")
    parser.add_argument("--cuts", nargs="*", default=[], help="manifests with word times; none: the demo")
    parser.add_argument("--stories", default=str(STORIES))
    parser.add_argument("--sentences", type=int, default=60, help="of the demo, half clean and half noisy")
    parser.add_argument("--speech", default="bench/streaming", help="folder for the demo's audio")
    parser.add_argument("--clock", choices=("virtual", "wall"), default="virtual")
    parser.add_argument("--capacity", type=float, default=12.0, help="seconds of each stream; 0: none")
    parser.add_argument("--capacity-chunk", type=int, default=320, help="ms")
    parser.add_argument("--most-streams", type=int, default=512, help="that are tried at once")
    parser.add_argument("--minutes", type=float, default=0.0, help="of one long stream: its memory alone")
    parser.add_argument("--long-chunk", type=int, default=640, help="ms, of the long stream")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", default="bench/streaming.json", help="JSON file of figures")
    parser.add_argument("--restart", action="store_true", help="measure rows that are there again")
    parser.add_argument("--figure", default="", help="PNG: WER against latency")
    parser.add_argument("--page", default="", help="page whose section is filled")
    args = parser.parse_args(given)
    args.methods = args.methods or ([CTC, LLM] if args.minutes else METHODS)
    return args


def main(given: Optional[Sequence[str]] = None) -> None:
    """Measure, print, write."""
    args = arguments(given)
    torch.set_num_threads(1)
    if args.minutes:
        long_stream(args, Bench(args))
        return
    rows = measure(args, Bench(args))
    lines = page(rows)
    print("\n" + "\n".join(lines))
    if args.figure:
        draw(rows, args.figure)
    if args.page:
        text = Path(args.page).read_text(encoding="utf-8")
        write_text(args.page, put(text, *MARKS, lines))
    figures.write(args, rows)


if __name__ == "__main__":
    main()
