r"""sherpa-onnx's modified_beam_search and our transducer search: the same ONNX files, one thread of a CPU.
Knows: both calls, audio, a model folder of ours. Must not know: how a search works.

    OMP_NUM_THREADS=1 python tools/bench/transducer.py --model exp/transducer/export \
        --cuts data/manifests/minibooks_cuts_dev.jsonl.gz

The model is exported by ``export --format sherpa`` into a folder of the moment, or --files names such a
folder. Both sides go from samples to texts, an utterance at a time and one symbol a frame at most; the
fastest of some rounds, taken in turns, counts, in seconds of the processor. What is left of sherpa-onnx's
time without features and encoder is told by taking ours of these two parts off: the encoder is the same file
in both.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Sequence

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from icefall_fusion.acoustic.models import load
from icefall_fusion.acoustic.sherpa_export import export_sherpa
from icefall_fusion.acoustic.sources import EmissionOptions, open_source
from icefall_fusion.common.environment import describe_environment
from icefall_fusion.common.files import write_json
from icefall_fusion.data.audio import SAMPLE_RATE
from icefall_fusion.data.fbank import extract
from icefall_fusion.data.manifests import spread
from icefall_fusion.decode.utterances import read_audio_files, read_cuts
from icefall_fusion.scoring.wer import compare_words, word_errors
from icefall_fusion.search import PrefixSearchOptions
from icefall_fusion.search.transducer import transducer_search

PARTS = ("features", "encoder", "search")


class Speech(NamedTuple):
    """Samples of utterances at 16 kHz, and their texts as far as they are known."""

    samples: list[np.ndarray]
    texts: list[Optional[str]]

    @property
    def seconds(self) -> float:
        return sum(map(len, self.samples)) / SAMPLE_RATE


def read_speech(args: argparse.Namespace) -> Speech:
    """Return the utterances of a manifest, spread over it, or of audio files."""
    found = read_cuts(args.cuts, "audio") if args.cuts else list(read_audio_files(args.audio, "audio"))
    found = spread(found, args.utterances)
    return Speech([np.asarray(one.load(), np.float32) for one in found], [one.text for one in found])


def ours(folder: Path) -> Callable[[Speech, int], tuple[list[str], dict[str, float]]]:
    """Return our decoding: texts, and seconds of the processor by part."""
    source = open_source(EmissionOptions(str(folder)))

    def decode(speech: Speech, beam: int) -> tuple[list[str], dict[str, float]]:
        options, texts = PrefixSearchOptions(beam=beam, nbest=1, word_times=False), []
        seconds = dict.fromkeys(PARTS, 0.0)
        for samples in speech.samples:
            marks = [time.process_time()]
            features = torch.as_tensor(extract(samples))
            marks.append(time.process_time())
            made = source.emit(["utterance"], [features])
            marks.append(time.process_time())
            found = made.joiner_frames, made.lens, source.transducer, options, source.tokens
            [nbest] = transducer_search(*found)
            marks.append(time.process_time())
            texts.append(nbest[0].text)
            for part, begun, ended in zip(PARTS, marks, marks[1:]):
                seconds[part] += ended - begun
        return texts, seconds

    return decode


def theirs(folder: Path) -> Callable[[Speech, int], tuple[list[str], dict[str, float]]]:
    """Return sherpa-onnx's decoding: texts, and seconds of the processor, all in one."""
    import sherpa_onnx

    files = {part: str(folder / f"{part}.onnx") for part in ("encoder", "decoder", "joiner")}
    made: dict[int, Any] = {}

    def decode(speech: Speech, beam: int) -> tuple[list[str], dict[str, float]]:
        if beam not in made:
            made[beam] = sherpa_onnx.OfflineRecognizer.from_transducer(
                **files, tokens=str(folder / "tokens.txt"), num_threads=1, max_active_paths=beam,
                decoding_method="modified_beam_search")
        begun, texts = time.process_time(), []
        for samples in speech.samples:
            stream = made[beam].create_stream()
            stream.accept_waveform(SAMPLE_RATE, samples)
            made[beam].decode_stream(stream)
            texts.append(" ".join(stream.result.text.split()))
        return texts, {"all": time.process_time() - begun}

    return decode


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row of each beam: seconds of both sides, their ratio, differences of texts, error rates."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(args.files or name)
        if not args.files:
            export_sherpa(load(args.model), name)
        speech, sides = read_speech(args), {"ours": ours(folder), "theirs": theirs(folder)}
        return [_row(sides, speech, beam, args.rounds) for beam in args.beams]


def _row(sides: dict[str, Any], speech: Speech, beam: int, rounds: int) -> dict[str, Any]:
    texts, best = {}, {}
    for number in range(rounds + 1):  # the first warms up
        for side, decode in sides.items():
            texts[side], seconds = decode(speech, beam)
            if number and (side not in best or sum(seconds.values()) < sum(best[side].values())):
                best[side] = seconds
    parts, total = best["ours"], sum(best["theirs"].values())
    shared = parts["features"] + parts["encoder"]
    pairs = [compare_words(a.split(), b.split()).errors for a, b in zip(texts["theirs"], texts["ours"])]
    row = {
        "beam": beam, "utterances": len(speech.samples), "audio_seconds": speech.seconds,
        "ours": sum(parts.values()), "theirs": total, "ratio": total / sum(parts.values()),
        **{f"ours_{part}": value for part, value in parts.items()}, "theirs_beyond_encoder": total - shared,
        "search_ratio": (total - shared) / parts["search"],
        "same_texts": sum(a == b for a, b in zip(texts["theirs"], texts["ours"])),
        "different_words": sum(pairs), "words": sum(len(text.split()) for text in texts["theirs"]),
    }
    if all(text is not None for text in speech.texts):
        references = {str(at): text for at, text in enumerate(speech.texts)}
        for side, found in texts.items():
            row[f"wer_{side}"] = word_errors(references, {str(at): one for at, one in enumerate(found)}).wer
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table: milliseconds of the processor a second of audio."""
    heads = ("beam", "sherpa-onnx, ms", "ours, ms", "of it features, encoder, search", "ratio",
             "of the search", "same texts", "different words", "WER theirs, ours %")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        ms = {name: 1000 * row[name] / row["audio_seconds"] for name in ("theirs", "ours")}
        parts = ", ".join(f"{1000 * row[f'ours_{part}'] / row['audio_seconds']:.2f}" for part in PARTS)
        rates = f"{row['wer_theirs']:.1f}, {row['wer_ours']:.1f}" if "wer_ours" in row else "–"
        cells = (row["beam"], f"{ms['theirs']:.2f}", f"{ms['ours']:.2f}", parts, f"{row['ratio']:.2f}",
                 f"{row['search_ratio']:.2f}", f"{row['same_texts']} of {row['utterances']}",
                 f"{row['different_words']} of {row['words']}", rates)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def arguments(given: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", default="", help="model folder of ours with a transducer head")
    model.add_argument("--files", default="", help="folder of `export --format sherpa`")
    speech = parser.add_mutually_exclusive_group(required=True)
    speech.add_argument("--cuts", default="", help="manifest of cuts with audio")
    speech.add_argument("--audio", nargs="+", default=[], help="audio files")
    parser.add_argument("--utterances", type=int, default=40, help="at most")
    parser.add_argument("--beams", type=int, nargs="+", default=[4, 10])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default="", help="JSON file of the rows")
    return parser.parse_args(given)


def main() -> None:
    args = arguments()
    rows = measure(args)
    print(table(rows))
    if args.output:
        about = describe_environment("cpu")
        write_json(args.output, {"arguments": vars(args), "rows": rows, "environment": about})


if __name__ == "__main__":
    main()
