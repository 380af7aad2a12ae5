"""How exact the times of words are: against eSpeak NG's own events, for voices that no constant was found on.
Knows: synthetic speech, tune-words, forced alignment by torchaudio. Must not know: how a search works.

    python tools/bench/word_times.py --model egs/minibooks/ASR/pretrained/ctc_aed --sentences 120 \\
        --json bench/word_times.json

The constants are found on the demo's sentences of even number, spoken by dev's voices, and held to the
others, spoken by those of test-clean and test-other. Marks of the search and of a forced alignment (Viterbi)
of the same hypothesis are compared, as they are and moved by constants.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from figures import write

from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.acoustic.sources import EmissionOptions
from icefall_fusion.common.files import write_text
from icefall_fusion.data import synthesis
from icefall_fusion.data.manifests import cuts_path, spread
from icefall_fusion.decode.demo import STORIES, read_sentences
from icefall_fusion.decode.pretrained import with_pretrained
from icefall_fusion.decode.recognizer import Recognizer, RecognizerOptions
from icefall_fusion.decode.tune_words import Sighting, fit_timing, read_alignments, sight, timing_errors
from icefall_fusion.decode.utterances import read_cuts
from icefall_fusion.nbest import NBest, WordTime
from icefall_fusion.text.normalizer import normalize
from icefall_fusion.text.word_times import WordTiming

SPLITS = ("dev", "test-clean", "test-other")


def speech(args: argparse.Namespace, split: str) -> str:
    """Speak sentences, those of even number for dev, and return their manifest with word times."""
    sentences = read_sentences(args.stories)[0 if split == "dev" else 1 :: 2]
    lines = []
    for index, (story, cased) in enumerate(spread(sentences, args.sentences)):
        row = {"id": f"{split}-{index:04d}", "book": story, "index": index, "cased": cased}
        lines.append(json.dumps({**row, "text": normalize(cased)}))
    data = Path(args.speech)
    source = data / "text" / f"{split}.jsonl"
    write_text(source, "\n".join(lines) + "\n")
    synthesis.run(synthesis.SynthesizeOptions(
        split=split, data_dir=data, input=source, workers=1, min_seconds=0.3, max_seconds=60.0,
        word_times=True,
    ))
    return str(cuts_path(data / "manifests", split))


def aligned(nbest: NBest, row: int, emissions: Emissions) -> list[WordTime]:
    """Return the marks of the best hypothesis by forced alignment (Viterbi) of its pieces."""
    from torchaudio.functional import forced_align

    best, tokens, shift = nbest[0], emissions.tokens, emissions.frame_shift
    if not best.tokens:
        return []
    log_probs = emissions.log_probs[row : row + 1, : int(emissions.lens[row])].float().cpu()
    path = forced_align(log_probs, torch.tensor([best.tokens]), blank=tokens.blank_id)[0][0].tolist()
    peaks: list[int] = []
    for frame, piece in enumerate(path):
        if piece == tokens.blank_id:
            continue
        if frame == 0 or path[frame - 1] != piece:
            peaks.append(frame)
        elif log_probs[0, frame, piece] > log_probs[0, peaks[-1], piece]:
            peaks[-1] = frame
    return [
        WordTime(time.word, peaks[start] * shift, (peaks[stop - 1] + 1) * shift)
        for time, (start, stop) in zip(best.times, tokens.word_spans(best.tokens))
    ]


def sightings(recognizer: Recognizer, manifest: str) -> tuple[dict[str, list[Sighting]], int]:
    """Decode a manifest; return the words recognized right by kind of mark, and the words spoken."""
    truth = read_alignments(manifest)
    found: dict[str, list[Sighting]] = {"search": [], "viterbi": []}
    for utterances in recognizer.batches(read_cuts(manifest, recognizer.source.wants)):
        for batch in recognizer.emit(utterances):
            nbests = recognizer.methods[0].decode(batch.emissions, recognizer.source.model).nbests
            for row, nbest in enumerate(nbests):
                words = truth[nbest.utterance]
                found["search"] += sight(nbest[0].times, words)
                found["viterbi"] += sight(aligned(nbest, row, batch.emissions), words)
    return found, sum(len(group.word.split()) for words in truth.values() for group in words)


def row_of(split: str, marks: str, how: str, words: int, seen: Sequence[Sighting],
           timing: WordTiming) -> dict[str, Any]:
    """Return a row of figures in milliseconds."""
    row: dict[str, Any] = {"set": split, "marks": marks, "times": how, "words": words, "right": len(seen)}
    for name, errors in timing_errors(seen, timing).items():
        size = np.abs(errors) * 1000
        row |= {f"{name}_mean_ms": round(float(size.mean()), 1),
                f"{name}_median_bias_ms": round(float(np.median(errors) * 1000), 1),
                f"{name}_p90_ms": round(float(np.quantile(size, 0.9)), 1)}
    return row


def parser_of(page: str | None, name: str, method: str) -> argparse.ArgumentParser:
    """Return the options that benchmarks of words share.

    Args:
        page: text of ``--help``.
        name: of the benchmark, and so of its figures.
        method: the usual one.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=page, formatter_class=raw)
    parser.add_argument("--model", default="", help="acoustic model; none: the shipped one")
    parser.add_argument("--method", default=method)
    parser.add_argument("--stories", default=str(STORIES))
    parser.add_argument("--sentences", type=int, default=120, help="of each set of the demo")
    parser.add_argument("--speech", default="bench/word_times", help="folder for the audio")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default=f"bench/{name}.json", dest="output", help="figures")
    return parser


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line says."""
    return parser_of(__doc__, "word_times", "ctc-prefix").parse_args(given)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows of figures."""
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


def main(given: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = arguments(given)
    options = RecognizerOptions(emissions=EmissionOptions(model=args.model, device=args.device))
    options = options if args.model else with_pretrained(options)
    recognizer = Recognizer(options, args.method)
    seen = {split: sightings(recognizer, speech(args, split)) for split in SPLITS}
    fitted = {marks: fit_timing(found) for marks, found in seen["dev"][0].items()}
    rows = []
    for split, (found, words) in seen.items():
        for marks, those in found.items():
            ways = {"marks": WordTiming(0.0, 0.0, 0.0, 0.0), "usual": WordTiming(), "fitted": fitted[marks]}
            rows += [row_of(split, marks, how, words, those, timing) for how, timing in ways.items()]
    show(rows)
    print({marks: str(timing) for marks, timing in fitted.items()})
    write(args, rows, fitted={marks: vars(timing) for marks, timing in fitted.items()})


if __name__ == "__main__":
    main()
