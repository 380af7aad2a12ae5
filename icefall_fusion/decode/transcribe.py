"""Job ``transcribe``: audio files to text, and to JSON with word times and scores.
Knows: recognizers, audio files. Must not know: how a search or a fusion works.
"""
from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

from icefall_fusion.common.checks import check, check_choice
from icefall_fusion.common.command_line import SKIPPED_SOME
from icefall_fusion.common.files import write_text
from icefall_fusion.decode.method_names import parse_methods
from icefall_fusion.decode.pretrained import with_pretrained
from icefall_fusion.decode.recognizer import Recognizer, RecognizerOptions
from icefall_fusion.decode.utterances import read_audio_files
from icefall_fusion.nbest import NBest


@dataclass(frozen=True, kw_only=True)
class TranscribeOptions(RecognizerOptions):
    """Print the text of audio files; any rate and format that soundfile reads (WAV, FLAC, OGG, MP3, ...).

    Without ``emissions`` the models shipped with the repository are used.

    Args:
        files: audio files.
        method: how to decode: a name of the table of methods, e.g. ctc-prefix.
        output: "text", "json" (a line a file: words with times, scores, all hypotheses) or "both".
        json: write the JSON lines to this file too.
        batch_size: files (or segments of long ones) decoded together.
    """

    files: list[str] = field(metadata={"positional": True})
    method: str = "llm-delayed-shortest"
    output: str = "both"
    json: str = ""
    batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(self.files) > 0, "TranscribeOptions.files", "name at least one file", self.files)
        check_choice(self.output, ("text", "json", "both"), "TranscribeOptions.output")
        check(len(parse_methods(self.method)) == 1, "TranscribeOptions.method", "be one method", self.method)


def run(options: TranscribeOptions) -> int:
    """Run the job ``transcribe``; files that cannot be read are listed and the exit code is 3."""
    recognizer = Recognizer(with_pretrained(options), options.method)
    utterances = read_audio_files(dict.fromkeys(options.files), recognizer.source.wants)
    nbests = {nbest.utterance: nbest for nbest in recognizer.transcribe(utterances)}
    lines = {name: json.dumps(as_json(nbest), ensure_ascii=False) for name, nbest in nbests.items()}
    for name in dict.fromkeys(options.files):
        if name in nbests:
            _print(name, nbests[name], lines[name], options.output)
    for utterance, error in recognizer.unreadable:
        print(f"skipped {utterance.id}: {error}", file=sys.stderr)
    if options.json:
        write_text(options.json, "".join(line + "\n" for line in lines.values()))
        logging.info("wrote %s", options.json)
    return SKIPPED_SOME if recognizer.unreadable else 0


def _print(name: str, nbest: NBest, line: str, output: str) -> None:
    if output != "json":
        print(f"{name}\t{nbest[0].text if len(nbest) else ''}")
    if output != "text":
        print(line)


def as_json(nbest: NBest) -> dict[str, Any]:
    """Return a list as plain values: text, words with start and end in seconds, scores, other hypotheses."""
    best = nbest[0]
    return {
        "file": nbest.utterance,
        "text": best.text,
        "words": [asdict(time) for time in best.times],
        "scores": best.scores,
        "weights": nbest.weights,
        "nbest": [{"text": h.text, "scores": h.scores} for h in nbest],
    }
