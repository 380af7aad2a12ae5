"""Earlier text as the LLM's context: word errors with none, with that of the reference, and as recognized.

    OMP_NUM_THREADS=1 python tools/bench/context.py --data egs/minibooks/ASR/data --split test-clean

Some sentences of a split are spoken, and those before them in their book. All are decoded without context.
Then the sentences are decoded again with 1, 2 ... sentences before them as the LLM's prompt, as written and
as they were recognized.
"""
from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import figures  # noqa: E402
import speech  # noqa: E402
from lhotse import load_manifest_lazy  # noqa: E402

from icefall_fusion.common.files import write_text  # noqa: E402
from icefall_fusion.data import synthesis  # noqa: E402
from icefall_fusion.data.manifests import cuts_path, read_utterances, spread, write_cuts  # noqa: E402
from icefall_fusion.decode.job import DecodeRun  # noqa: E402
from icefall_fusion.nbest import read_nbests  # noqa: E402

KINDS = ("reference", "recognized")
_NEEDED = ("id", "book", "index", "text", "cased")


def choose(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Return, by the id of a chosen sentence, the sentences before it and itself, in order."""
    text = Path(args.data) / "text"
    book = "test" if args.split.startswith("test") else args.split
    rows = read_utterances(text / f"{book}.jsonl", _NEEDED)
    at = {(row["book"], row["index"]): row for row in rows}
    chains = {}
    for row in read_utterances(text / f"selected_{args.split}.jsonl", _NEEDED):
        before = [at.get((row["book"], row["index"] - back)) for back in range(max(args.before), -1, -1)]
        if all(before):
            chains[row["id"]] = before
    return {id: chains[id] for id in spread(list(chains), args.utterances)}


def speak(args: argparse.Namespace, chains: dict[str, list[dict[str, Any]]]) -> Path:
    """Make the audio of all sentences once and return their manifest."""
    rows = {row["id"]: row for chain in chains.values() for row in chain}
    data = Path(args.speech) / f"context-{args.split}-{len(rows)}"
    source = data / "text" / "sentences.jsonl"
    write_text(source, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()))
    synthesis.run(synthesis.SynthesizeOptions(
        split=args.split, data_dir=data, input=source, workers=args.workers, min_seconds=0.2,
        max_seconds=60.0,
    ))
    return cuts_path(data / "manifests", args.split)


def field(kind: str, count: int) -> str:
    """Return the name of the custom field with so many sentences before a cut."""
    return f"{kind}_{count}"


def with_contexts(
    args: argparse.Namespace, cuts: Path, chains: dict[str, list[dict[str, Any]]], recognized: dict[str, str]
) -> Path:
    """Write the manifest of the chosen sentences, with the earlier text of each kind and length."""
    chosen, path = [], cuts.with_name(f"{args.split}-chosen.jsonl.gz")
    for cut in load_manifest_lazy(cuts):
        chain = chains.get(cut.id)
        if chain is not None and all(row["id"] in recognized for row in chain):
            custom = cut.supervisions[0].custom = dict(cut.supervisions[0].custom or {})
            for count in args.before:
                before = chain[-1 - count : -1]
                custom[field("reference", count)] = " ".join(row["text"] for row in before)
                custom[field("recognized", count)] = " ".join(recognized[row["id"]] for row in before)
            chosen.append(cut)
    write_cuts(chosen, path)
    return path


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Decode without context, then with each; return a row for each."""
    chains = choose(args)
    cuts = speak(args, chains)
    out = f"{args.speech}/context-decode"
    options = speech.decode_options(
        args, out, {"all": str(cuts)}, methods=args.method, threads=args.threads, batch_size=args.batch
    )
    DecodeRun(options).decode_all()
    lists = read_nbests(Path(out) / f"nbest-all-{args.method}.jsonl")
    recognized = {nbest.utterance: nbest[0].text if len(nbest) else "" for nbest in lists}
    chosen = with_contexts(args, cuts, chains, recognized)
    rows = []
    print(f"{'context':12}{'sentences':>10}{'WER %':>8}{'words':>8}{'LM s':>8}{'tokens':>10}")
    for kind, count in [("none", 0), *((kind, count) for kind in KINDS for count in args.before)]:
        context = "" if kind == "none" else field(kind, count)
        llm = replace(options.llm, context=context, context_words=args.context_words)
        [row] = DecodeRun(replace(options, llm=llm, test_sets={"chosen": str(chosen)})).decode_all()
        kept = ("wer", "words", "lm_seconds", "lm_tokens_forwarded")
        values = {name: row[name] for name in kept}
        rows.append({"context": kind, "sentences": count, **values})
        print(f"{kind:12}{count:10}{row['wer']:8.2f}{row['words']:8,}{row['lm_seconds']:8.1f}"
              f"{row['lm_tokens_forwarded']:10,}", flush=True)
    return rows


def main() -> None:
    """Parse the command line, measure, print, write JSON."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    speech.add_arguments(parser)
    parser.add_argument("--data", required=True, help="folder of the recipe's data, with text/")
    parser.add_argument("--split", default="test-clean")
    parser.add_argument("--utterances", type=int, default=150, help="sentences of the split; 0: all")
    parser.add_argument("--before", type=int, nargs="+", default=[1, 4], help="sentences of context")
    parser.add_argument("--context-words", type=int, default=200)
    parser.add_argument("--method", default="llm-delayed-shortest-ahead")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1, help="processes that speak")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--output", default="bench/context.json")
    args = parser.parse_args()
    figures.write(args, measure(args))


if __name__ == "__main__":
    main()
