"""Memory of each method for long utterances: what fusion with an LLM needs above the weights.
Knows: the decoder's methods, saved log-probs, memory counters. Must not know: how a method works.

    OMP_NUM_THREADS=1 python tools/bench/memory.py --batch 8                 # the shipped LLM, on a CPU
    python tools/bench/memory.py --device cuda --dtype bfloat16 --shapes minibooks mistral-7b \
        --emissions bench/saved --batch 16

The authors of delayed fusion leave open how much memory it takes beside shallow fusion and rescoring.
Utterances of --seconds are made of saved log-probs put one after another, or of synthetic ones (random
pieces) without --emissions. On a GPU the figure is the most that PyTorch allocated during a decode above
what was allocated before it (weights, log-probs); on a CPU the growth of the resident set, in a process for
each row. Beside it: keys and values of the token tree, next-token distributions, and what keys and values
take in a cache with a row for each hypothesis, counted. The row of ctc-prefix is that of the search alone.
It has never run on a GPU.
"""
from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import figures  # noqa: E402
import hypothesis_caches  # noqa: E402
import speech  # noqa: E402
from shapes import SHAPES, of_shape  # noqa: E402
from synthetic_emissions import synthetic_emissions  # noqa: E402

from icefall_fusion.acoustic.emissions import Emissions, pad_rows  # noqa: E402
from icefall_fusion.acoustic.sources import EmissionOptions, open_source  # noqa: E402
from icefall_fusion.common import memory  # noqa: E402
from icefall_fusion.common.devices import weight_bytes  # noqa: E402
from icefall_fusion.decode.language_models import LM_SOURCES, LanguageModels  # noqa: E402
from icefall_fusion.decode.method_names import parse_method  # noqa: E402
from icefall_fusion.decode.methods import Method  # noqa: E402
from icefall_fusion.decode.pretrained import FOLDER  # noqa: E402
from icefall_fusion.decode.utterances import read_cuts  # noqa: E402
from icefall_fusion.decode.weights import read_weights, weights_of  # noqa: E402
from icefall_fusion.search import PrefixSearchOptions  # noqa: E402
from icefall_fusion.text.tokens import AcousticTokens  # noqa: E402

METHODS = (
    "ctc-prefix", "llm-nbest-rescoring", "llm-delayed-shortest", "llm-delayed-interval-16",
    "llm-delayed-interval-16-ahead", "llm-shallow",
)
_SHIFT = 0.04  # seconds a frame of synthetic log-probs
_COUNTERS = ("kv_bytes_peak", "distribution_bytes_peak", "lm_forwards", "lm_tokens_forwarded", "oom_backoffs")


def long_utterances(args: argparse.Namespace, seconds: float) -> Emissions:
    """Return ``args.batch`` utterances of ``seconds``, on the device."""
    if not args.emissions_model:
        return _synthetic(args, seconds)
    source = open_source(EmissionOptions(args.emissions_model, device=args.device))
    if source.wants != "nothing":
        raise ValueError(f"--emissions must be of speech.py --keep, but is {args.emissions_model!r}")
    ids = [cut.id for path in speech.manifests(args).values() for cut in read_cuts(path, "nothing")]
    emitted = source.emit(ids)
    frames = round(seconds / emitted.frame_shift)
    rows = []
    for first in range(args.batch):
        parts, missing = [], frames
        for row in _around(first, len(ids)):
            parts.append(emitted.log_probs[row, : min(missing, int(emitted.lens[row]))])
            missing -= len(parts[-1])
            if missing == 0:
                break
        rows.append(torch.cat(parts))
    log_probs, lens = pad_rows(rows)
    names = [f"long-{number}" for number in range(args.batch)]
    return Emissions(names, log_probs, lens, source.tokens, emitted.frame_shift)


def _around(first: int, count: int) -> Iterator[int]:
    while True:
        yield first % count
        first += 1


def _synthetic(args: argparse.Namespace, seconds: float) -> Emissions:
    tokens = AcousticTokens.load(args.vocabulary or FOLDER / "ctc_aed")
    spoken = [v for v in range(tokens.size) if v not in (tokens.blank_id, tokens.sos_eos_id, tokens.unk_id)]
    made = synthetic_emissions(args.batch, round(seconds / _SHIFT), pieces=len(spoken))
    log_probs = torch.full((*made.log_probs.shape[:2], tokens.size), -30.0)
    log_probs[..., [tokens.blank_id, *spoken]] = made.log_probs
    names = [f"synthetic-{number}" for number in range(args.batch)]
    return Emissions(names, log_probs.to(args.device), made.lens, tokens, _SHIFT)


class Decoder:
    """Methods with the models of one shape, loaded once.

    Args:
        args: of the command line.
        shape: "minibooks" (the shipped models) or a name of `SHAPES`.
    """

    def __init__(self, args: argparse.Namespace, shape: str) -> None:
        named = argparse.Namespace(**{**vars(args), "emissions_model": args.emissions_model or "synthetic"})
        options = speech.decode_options(named, "unused", {"unused": "unused"}, methods=list(args.methods))
        lms = {name: getattr(options, name) for name in LM_SOURCES}
        if args.dtype:
            lms = {name: replace(lm, dtype=args.dtype) for name, lm in lms.items()}
        self.args, self._shape = args, "" if shape == "minibooks" else shape
        self._lms, self._ngram, self._tuned = lms, options.ngram, read_weights(options.weights)
        self.there = options.named_models()
        self._models: Optional[LanguageModels] = None

    def method(self, name: str, tokens: AcousticTokens) -> Method:
        """Return a method."""
        if self._models is None:
            self._models = LanguageModels(self._lms, self.args.device, self._ngram, tokens)
        weights = weights_of(name, self._tuned)
        if self._shape:  # they know nothing
            weights = {**weights, "words": 0.0, **dict.fromkeys(parse_method(name).sources, 1e-3)}
        with of_shape(self._shape):
            return Method(name, weights, PrefixSearchOptions(beam=self.args.beam), self._load(name))

    def _load(self, name: str) -> LanguageModels:
        for source in self.lm_sources(name):
            self._models.get(source)  # of second passes too
        return self._models

    def lm_sources(self, name: str) -> list[str]:
        """Return the sources of a method that are neural language models."""
        return sorted(set(parse_method(name).sources) & set(LM_SOURCES))

    def row(self, name: str, seconds: float) -> dict[str, Any]:
        """Return what one method needs for utterances of ``seconds``."""
        emissions = long_utterances(self.args, seconds)
        method = self.method(name, emissions.tokens)
        few = emissions.select([0])
        few = Emissions(few.ids, few.log_probs[:, :50], few.lens.clamp(max=50), few.tokens, few.frame_shift)
        method.decode(few)  # kernels are made, libraries take what they keep
        row = {"method": name, "seconds": seconds, "batch": self.args.batch, "beam": self.args.beam}
        row["log_probs_bytes"] = emissions.log_probs.numel() * emissions.log_probs.element_size()
        begun = _begin(self.args.device)
        try:
            with hypothesis_caches.counting() as held:
                cost = method.decode(emissions).cost
        except torch.OutOfMemoryError as error:
            return {**row, "out_of_memory": str(error)[:200]}
        row.update(_grown(begun, self.args.device))
        row.update({counter: int(cost.get(counter, 0)) for counter in _COUNTERS})
        row["search_seconds"], row["lm_seconds"] = cost["search"], cost["lm"]
        row["bytes_an_utterance"] = row["peak_bytes"] / self.args.batch
        sources = self.lm_sources(name)
        if len(sources) == 1:
            lm = self._models.get(sources[0])
            row["weight_bytes"] = weight_bytes(lm.model)
            row.update(held.bytes(lm, row["kv_bytes_peak"]))
        return row


def _begin(device: str) -> int:
    """Forget peaks; return the bytes in use."""
    gc.collect()
    if figures.on_gpu(device):
        torch.cuda.empty_cache()
    memory.give_back_memory()
    memory.reset_peak_memory()
    return memory.memory_in_use()


def _grown(begun: int, device: str) -> dict[str, int]:
    """Return the peak above ``begun`` bytes, and on a GPU what PyTorch reserved beside that of the host."""
    if not figures.on_gpu(device):
        return {"peak_bytes": max(0, memory.peak_rss_bytes() - begun)}
    reserved = torch.cuda.max_memory_reserved()
    return {"peak_bytes": torch.cuda.max_memory_allocated() - begun, "reserved_bytes": reserved,
            "host_peak_bytes": memory.peak_rss_bytes()}


def measure(args: argparse.Namespace, given: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each shape, length and method.

    Args:
        args: the parsed command line.
        given: the same as texts, for the processes of a CPU.
    """
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        decoder = Decoder(args, shape)
        for seconds in args.seconds:
            for name in args.methods:
                lacking = sorted(parse_method(name).needs - decoder.there)
                if lacking:
                    print(f"{name} is left out: there is no {', '.join(lacking)}")
                    continue
                row = decoder.row(name, seconds) if figures.on_gpu(args.device) else alone(
                    given, shape, name, seconds
                )
                rows.append({"shape": shape, **row})
                figures.save(args, rows)  # a time limit takes nothing back
                show(rows)
        del decoder
    return rows


def alone(given: Sequence[str], shape: str, name: str, seconds: float) -> dict[str, Any]:
    """Return the row of a process of its own, as the resident set of this one has seen other methods."""
    one = [*given, "--shapes", shape, "--methods", name, "--seconds", str(seconds), "--one"]
    done = subprocess.run([sys.executable, __file__, *one], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} at {seconds} s failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(rows: list[dict[str, Any]]) -> None:
    """Print the last row, with a head before the first."""
    names = ("peak_bytes", "kv_bytes_peak", "distribution_bytes_peak", "kv_bytes_of_rows")
    if len(rows) == 1:
        titles = "".join(f"{title:>12}" for title in ("peak MB", "KV MB", "distrib. MB", "KV of rows"))
        print(f"{'shape':16}{'s':>4} {'method':32}{titles}{'share':>8}")
    row = rows[-1]
    print(f"{row['shape']:16}{row['seconds']:4.0f} {row['method']:32}", end="")
    if "out_of_memory" in row:
        print("  out of memory", flush=True)
        return
    print("".join(f"{row.get(name, 0) / 2**20:12.1f}" for name in names), end="")
    print(f"{row['kv_of_rows']:8.2f}" if "kv_of_rows" in row else "", flush=True)


def arguments(given: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Return what the command line says."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    speech.add_arguments(parser)
    parser.add_argument("--shapes", nargs="+", default=["minibooks"], choices=["minibooks", *SHAPES])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seconds", nargs="+", type=float, default=[30.0, 60.0], help="of an utterance")
    parser.add_argument("--batch", type=int, default=32, help="utterances decoded together")
    parser.add_argument("--beam", type=int, default=10)
    parser.add_argument("--dtype", default="", help="of the LLMs' weights; none: float32")
    parser.add_argument("--vocabulary", default="", help="of synthetic log-probs; none: the shipped one")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # a process for one row
    parser.add_argument("--output", default="bench/memory.json")
    return parser.parse_args(given)


def main() -> None:
    """Measure, print, write JSON."""
    args = arguments()
    if not figures.on_gpu(args.device):
        torch.set_num_threads(1)
    if args.one:
        print(json.dumps(Decoder(args, args.shapes[0]).row(args.methods[0], args.seconds[0])))
        return
    figures.write(args, measure(args, sys.argv[1:]))


if __name__ == "__main__":
    main()
