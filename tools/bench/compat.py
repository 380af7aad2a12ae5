"""Other decoders' calls, theirs and ours: milliseconds of the processor a second of audio, word errors.
Knows: the calls, emissions made of letters, an n-gram made on the spot. Must not know: how a decoder works.

The others are measured where they can be imported; torchaudio's is in the main environment, pyctcdecode and
kenlm come from a folder of their own:

    .venv/bin/pip install --target .cache/peers -r tools/bench/peers.txt
    PYTHONPATH=.cache/peers OMP_NUM_THREADS=1 .venv/bin/python tools/bench/compat.py

Utterances are random texts of common words with a bigram of their own; letters are blurred, so that without
a language model many words are wrong. Each call decodes all utterances; the fastest of some rounds counts.
"""
from __future__ import annotations

import argparse
import importlib
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Sequence

import numpy as np
import torch

from icefall_fusion.fusion.retokenize import COMMON_WORDS
from icefall_fusion.ngram.arpa import write_arpa
from icefall_fusion.ngram.kneser_ney import count_ngrams, kneser_ney
from icefall_fusion.scoring.wer import word_errors

FRAME_SHIFT = 0.02  # seconds, as wav2vec 2.0's
LABELS = ["-", "|", *"abcdefghijklmnopqrstuvwxyz'"]


class Speech(NamedTuple):
    """Log-probs [T, V] of each utterance, their texts, and a folder with words.arpa and lexicon.txt."""

    log_probs: list[np.ndarray]
    texts: list[str]
    folder: Path

    @property
    def seconds(self) -> float:
        return FRAME_SHIFT * sum(map(len, self.log_probs))


def make_speech(folder: Path, utterances: int, words: int, blur: float, seed: int = 0) -> Speech:
    """Make utterances of ``words`` words; ``blur`` is the noise of the logits, in nats."""
    rng = np.random.default_rng(seed)
    vocabulary = [word for word in COMMON_WORDS if set(word) <= set(LABELS)]
    follow = [rng.choice(len(vocabulary), 12) for _ in vocabulary]  # each word has few that follow it

    def text(length: int) -> list[int]:
        ids = [int(rng.integers(len(vocabulary)))]
        while len(ids) < length:
            ids.append(int(rng.choice(follow[ids[-1]])))
        return ids

    known = [text(12) for _ in range(1500)]
    names = ["<unk>", *vocabulary]
    stream = np.array([i for ids in known for i in (0, *(1 + one for one in ids), 0)])
    ends = np.cumsum([len(ids) + 2 for ids in known])
    bounds = np.stack([ends - [len(ids) + 2 for ids in known], ends], axis=1)
    counts = count_ngrams(stream, bounds, len(names), 3)
    write_arpa(folder / "words.arpa", kneser_ney(counts, len(names)), names)
    lexicon = "".join(f"{word} {' '.join(word)} |\n" for word in vocabulary)
    (folder / "lexicon.txt").write_text(lexicon, encoding="utf-8")
    texts = [" ".join(vocabulary[one] for one in text(words)) for _ in range(utterances)]
    return Speech([_emit(text, blur, rng) for text in texts], texts, folder)


def _emit(text: str, blur: float, rng: np.random.Generator) -> np.ndarray:
    """Return log-probs in which each letter lasts a frame or two, with blanks after it."""
    path = []
    for letter in text.replace(" ", "|"):
        path += [LABELS.index(letter)] * int(rng.integers(1, 3)) + [0] * int(rng.integers(1, 5))
    logits = blur * rng.standard_normal((len(path), len(LABELS)))
    logits[np.arange(len(path)), path] += 7.0
    return torch.from_numpy(logits).log_softmax(1).float().numpy()


Decode = Callable[[Speech], "list[str]"]


def pyctcdecode_calls(module: Any, folder: Path, beam: int) -> dict[str, Decode]:
    """Return pyctcdecode's calls of a module, theirs or ours."""
    labels = ["", " ", *LABELS[2:]]
    arpa = str(folder / "words.arpa")
    plain = module.build_ctcdecoder(labels)
    fused = module.build_ctcdecoder(labels, arpa, alpha=0.5, beta=1.0)
    hot = {"beam_width": beam, "hotwords": ["jabberwocky", "xylophone"]}
    return {
        "decode": lambda s: [plain.decode(rows, beam_width=beam) for rows in s.log_probs],
        "decode_batch": lambda s: plain.decode_batch(None, s.log_probs, beam_width=beam),
        "decode_batch, hot words": lambda s: plain.decode_batch(None, s.log_probs, **hot),
        "decode, word n-gram": lambda s: [fused.decode(rows, beam_width=beam) for rows in s.log_probs],
        "decode_batch, word n-gram": lambda s: fused.decode_batch(None, s.log_probs, beam_width=beam),
    }


def torchaudio_calls(module: Any, folder: Path, beam: int) -> dict[str, Decode]:
    """Return torchaudio's calls of a module, theirs or ours."""
    free = module.ctc_decoder(None, LABELS, beam_size=beam)
    held = module.ctc_decoder(str(folder / "lexicon.txt"), LABELS, beam_size=beam)

    def batch(speech: Speech) -> tuple[torch.Tensor, torch.Tensor]:
        lens = torch.tensor([len(rows) for rows in speech.log_probs])
        emissions = torch.zeros(len(lens), int(lens.max()), len(LABELS))
        for target, rows in zip(emissions, speech.log_probs):
            target[: len(rows)] = torch.from_numpy(rows)
        return emissions, lens

    def letters(found: Any) -> str:
        return " ".join("".join(free.idxs_to_tokens(found.tokens)).replace("|", " ").split())

    return {
        "ctc_decoder": lambda s: [letters(some[0]) for some in free(*batch(s))],
        "ctc_decoder, lexicon": lambda s: [" ".join(some[0].words) for some in held(*batch(s))],
    }


SIDES = {
    "pyctcdecode": ("pyctcdecode", "icefall_fusion.compat.pyctcdecode", pyctcdecode_calls),
    "torchaudio": ("torchaudio.models.decoder", "icefall_fusion.compat.torchaudio", torchaudio_calls),
}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row of each call and side: milliseconds a second of audio, word error rate."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        speech = make_speech(Path(name), args.utterances, args.words, args.blur)
        for package, (theirs, ours, make) in SIDES.items():
            for side, module in (("theirs", theirs), ("ours", ours)):
                calls, why = _calls(module, make, Path(name), args.beam)
                if calls is None:
                    print(f"{package}, {side}: {why}")
                for call, decode in (calls or {}).items():
                    rows.append({"package": package, "call": call, "side": side,
                                 **_time(decode, speech, args.rounds)})
    return rows


def _calls(module: str, make: Callable[..., dict[str, Decode]], folder: Path,
           beam: int) -> tuple[Optional[dict[str, Decode]], str]:
    if module.startswith("icefall_fusion"):
        return make(importlib.import_module(module), folder, beam), ""
    try:
        return make(importlib.import_module(module), folder, beam), ""
    except Exception as error:  # other people's, not there or broken
        return None, f"{type(error).__name__}: {error}"


def _time(decode: Decode, speech: Speech, rounds: int) -> dict[str, float]:
    seconds, found = [], []
    for _ in range(rounds):
        start = time.process_time()  # others may use the machine
        found = decode(speech)
        seconds.append(time.process_time() - start)
    texts = [{str(number): text for number, text in enumerate(some)} for some in (speech.texts, found)]
    return {"ms_a_second": 1000 * min(seconds) / speech.seconds, "wer": word_errors(*texts).wer}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, theirs and ours side by side."""
    lines = ["| call | theirs, ms | ours, ms | theirs, WER % | ours, WER % |", "|---|---|---|---|---|"]
    for package, call in dict.fromkeys((row["package"], row["call"]) for row in rows):
        sides = {r["side"]: r for r in rows if (r["package"], r["call"]) == (package, call)}
        cells = [f"{sides[side][key]:.{digits}f}" if side in sides else "–"
                 for key, digits in (("ms_a_second", 2), ("wer", 1)) for side in ("theirs", "ours")]
        lines.append(f"| {package}: {call} | {' | '.join(cells)} |")
    return "\n".join(lines)


def arguments(given: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--utterances", type=int, default=24)
    parser.add_argument("--words", type=int, default=12, help="of an utterance")
    parser.add_argument("--blur", type=float, default=1.7, help="noise of the logits, nats")
    parser.add_argument("--beam", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default="", help="JSON file of the rows")
    return parser.parse_args(given)


def main() -> None:
    logging.basicConfig(level=logging.ERROR)
    args = arguments()
    rows = measure(args)
    print(table(rows))
    if args.output:
        Path(args.output).write_text(json.dumps({"arguments": vars(args), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
