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

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import figures  # noqa: E402
import gpu_tables  # noqa: E402
from gpu_tables import Column  # noqa: E402

from icefall_fusion.acoustic.models import load  # noqa: E402
from icefall_fusion.acoustic.sherpa_export import export_sherpa  # noqa: E402
from icefall_fusion.acoustic.sources import EmissionOptions, open_source  # noqa: E402
from icefall_fusion.data.audio import SAMPLE_RATE  # noqa: E402
from icefall_fusion.data.fbank import extract  # noqa: E402
from icefall_fusion.data.manifests import spread  # noqa: E402
from icefall_fusion.decode.utterances import read_audio_files, read_cuts  # noqa: E402
from icefall_fusion.scoring.wer import compare_words, word_errors  # noqa: E402
from icefall_fusion.search import PrefixSearchOptions  # noqa: E402
from icefall_fusion.search.transducer import transducer_search  # noqa: E402

PARTS = ("features", "encoder", "search")


def _ms(*names: str) -> Callable[[dict[str, Any]], str]:
    """Return what writes these times of a row."""
    return lambda row: ", ".join(f"{1000 * row[name] / row['audio_seconds']:.2f}" for name in names)


COLUMNS = [
    Column("beam", "beam"), Column("sherpa-onnx, ms", _ms("theirs")), Column("ours, ms", _ms("ours")),
    Column("of it features, encoder, search", _ms(*(f"ours_{part}" for part in PARTS))),
    Column("ratio", "ratio", "{:.2f}"), Column("of the search", "search_ratio", "{:.2f}"),
    Column("same texts", lambda row: f"{row['same_texts']} of {row['utterances']}"),
    Column("different words", lambda row: f"{row['different_words']} of {row['words']}"),
    Column("WER theirs %", "wer_theirs", "{:.1f}"), Column("WER ours %", "wer_ours", "{:.1f}"),
]


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
    return "\n".join(gpu_tables.table(rows, COLUMNS))


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
    parser.add_argument("--output", default="bench/transducer.json", help="JSON file of the rows")
    parser.set_defaults(device="cpu")
    return parser.parse_args(given)


def main() -> None:
    args = arguments()
    rows = measure(args)
    print(table(rows))
    figures.write(args, rows)


if __name__ == "__main__":
    main()
