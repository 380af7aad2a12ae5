"""Recordings of an hour: memory, time, word errors, with and without the text of earlier parts for the LLM.
Knows: manifests, the decoder and its rows. Must not know: how parts are cut and joined.

    OMP_NUM_THREADS=1 python tools/bench/long_audio.py                 # the sentences of the demo, repeated
    python tools/bench/long_audio.py --cuts data/fbank/libriheavy_cuts_test_clean.jsonl.gz --minutes 5 60

The utterances of a manifest are put one after the other, as they stand there, with pauses between, and become
one recording of so many minutes with one reference; where they are too few, they come again (which helps a
model that reads earlier text: word errors count only without it). The recording is decoded in parts of
--longest seconds, which know nothing of each other or (carry) follow one another, the LLM reading the last
--context-words words that were recognized before. The peak of memory is that of the whole decode, reading
included; on a GPU that of the GPU.
"""
from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import figures  # noqa: E402
import speech  # noqa: E402

from icefall_fusion.data.audio import SAMPLE_RATE  # noqa: E402
from icefall_fusion.data.manifests import cut_of, write_cuts  # noqa: E402
from icefall_fusion.decode.job import DecodeRun  # noqa: E402
from icefall_fusion.decode.utterances import Utterance, read_cuts  # noqa: E402

PAUSE = 0.5  # seconds between two utterances


def join(utterances: list[Utterance], minutes: float, folder: Path) -> tuple[str, bool]:
    """Write one recording of ``minutes`` and its manifest; return its path, and whether utterances repeat."""
    name = f"{minutes:g}-minutes"
    audio, manifest = folder / f"{name}.flac", folder / f"{name}.jsonl.gz"
    wanted, written, texts, index = round(minutes * 60 * SAMPLE_RATE), 0, [], 0
    folder.mkdir(parents=True, exist_ok=True)
    with soundfile.SoundFile(audio, "w", SAMPLE_RATE, 1, "PCM_16") as file:
        while written < wanted:
            utterance = utterances[index % len(utterances)]
            samples = utterance.load().numpy()
            file.write(np.concatenate([samples, np.zeros(round(PAUSE * SAMPLE_RATE), np.float32)]))
            written += len(samples) + round(PAUSE * SAMPLE_RATE)
            texts.append(utterance.text or "")
            index += 1
    write_cuts([cut_of({"id": name, "text": " ".join(texts)}, audio, written, {"voice": "many"})], manifest)
    return str(manifest), index > len(utterances)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Decode each recording by each method, with parts alone and in turn; return a row for each."""
    sets = speech.manifests(args)
    utterances = [utterance for path in sets.values() for utterance in read_cuts(path, "audio")]
    rows = []
    titles = f"{'WER %':>8}{'words':>8}{'RTF':>9}{'all s':>8}{'peak MB':>9}{'KV MB':>8}"
    print(f"{'minutes':>8} {'longest':>8} {'carry':>6} {'method':32}{titles}")
    for minutes in args.minutes:
        manifest, repeated = join(utterances, minutes, Path(args.speech) / "long")
        for longest in args.longest:
            for carry in (False, True):
                for method in args.methods:
                    row = decode(args, manifest, method, longest, carry)
                    row.update(minutes=minutes, longest=longest, carry=carry, repeated=repeated)
                    rows.append(row)
                    show(row)
    return rows


def decode(
    args: argparse.Namespace, manifest: str, method: str, longest: float, carry: bool
) -> dict[str, Any]:
    """Decode a recording and return a row."""
    options = speech.decode_options(
        args, f"{args.speech}/long/decode", {"long": manifest}, methods=method, longest=longest,
        threads=args.threads,
    )
    llm = replace(options.llm, carry=carry, context_words=args.context_words)
    run = DecodeRun(replace(options, llm=llm))
    for _ in range(2 if figures.on_gpu(args.device) else 1):  # first kernels are compiled there
        begun = time.perf_counter()
        [row] = run.decode_set("long", manifest)
    wall = time.perf_counter() - begun
    kept = ("method", "wer", "words", "search_seconds", "lm_seconds", "audio_seconds", "kv_bytes_peak")
    found = {name: row.get(name, 0) for name in kept}
    found.update(wall_seconds=wall, peak_bytes=row["peak_memory_bytes"])
    return found


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    rtf = (row["search_seconds"] + row["lm_seconds"]) / row["audio_seconds"]
    print(f"{row['minutes']:8g} {row['longest']:8g} {row['carry']!s:>6} {row['method']:32}{row['wer']:8.2f}"
          f"{row['words']:8,}{rtf:9.5f}{row['wall_seconds']:8.1f}"
          f"{row['peak_bytes'] / 2**20:9,.0f}{row['kv_bytes_peak'] / 2**20:8.1f}", flush=True)


def main() -> None:
    """Parse the command line, measure, print, write JSON."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    speech.add_arguments(parser)
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 60], help="of the recordings")
    parser.add_argument("--longest", type=float, nargs="+", default=[30], help="seconds of a part")
    parser.add_argument("--methods", nargs="+", default=["llm-delayed-shortest-ahead"])
    parser.add_argument("--context-words", type=int, default=100, help="that the LLM reads before a part")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--output", default="bench/long_audio.json")
    args = parser.parse_args()
    figures.write(args, measure(args))


if __name__ == "__main__":
    main()
