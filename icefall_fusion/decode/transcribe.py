"""Job ``transcribe``: audio files to text, and to JSON with word times and scores.
Knows: the decoder, audio files. Must not know: how a search or a fusion works.
"""
from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict, dataclass, field
from typing import Any, Union

from icefall_fusion.acoustic.sources import EmissionOptions
from icefall_fusion.common.checks import check, check_choice
from icefall_fusion.common.files import write_text
from icefall_fusion.decode.job import SKIPPED_SOME, DecodeOptions, Decoder
from icefall_fusion.decode.language_models import LmOptions, NgramOptions
from icefall_fusion.decode.methods import parse_methods
from icefall_fusion.decode.pretrained import with_pretrained
from icefall_fusion.decode.utterances import read_audio_files
from icefall_fusion.nbest import NBest
from icefall_fusion.search import PrefixSearchOptions


@dataclass(frozen=True)
class TranscribeOptions:
    """Print the text of audio files; any rate and format that soundfile reads (WAV, FLAC, OGG, MP3, ...).

    Without ``emissions`` the models shipped with the repository are used.

    Args:
        files: audio files.
        method: how to decode: a name of README's table of methods, e.g. ctc-prefix.
        output: "text", "json" (a line a file: words with times, scores, all hypotheses) or "both".
        json: write the JSON lines to this file too.
        emissions: where log-probs come from.
        nlm: LM over the acoustic pieces.
        llm: LM with a vocabulary of its own.
        matched_llm: LLM over the acoustic pieces.
        ngram: n-gram over the acoustic pieces.
        search: the prefix search.
        weights: weight by method and source, or a YAML file that has them.
        longest: seconds; longer files are decoded in parts cut at quiet places.
        batch_size: files (or parts) decoded together.
    """

    files: list[str]
    method: str = "llm-delayed-shortest"
    output: str = "both"
    json: str = ""
    emissions: EmissionOptions = field(default_factory=EmissionOptions)
    nlm: LmOptions = field(default_factory=LmOptions)
    llm: LmOptions = field(default_factory=LmOptions)
    matched_llm: LmOptions = field(default_factory=LmOptions)
    ngram: NgramOptions = field(default_factory=NgramOptions)
    search: PrefixSearchOptions = field(default_factory=PrefixSearchOptions)
    weights: Union[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    longest: float = 60.0
    batch_size: int = 16

    def __post_init__(self) -> None:
        check(len(self.files) > 0, "TranscribeOptions.files", "name at least one file", self.files)
        check_choice(self.output, ("text", "json", "both"), "TranscribeOptions.output")
        check(len(parse_methods(self.method)) == 1, "TranscribeOptions.method", "be one method", self.method)


def run(options: TranscribeOptions) -> int:
    """Run the job ``transcribe``; files that cannot be read are listed and the exit code is 3."""
    decoder = Decoder(_decode_options(options))
    utterances = read_audio_files(dict.fromkeys(options.files), decoder.source.wants)
    found = {nbest.utterance: nbest for nbest in decoder.transcribe(utterances)}
    lines = {name: json.dumps(as_json(found[name]), ensure_ascii=False) for name in found}
    for name in dict.fromkeys(options.files):
        if name in found:
            _print(name, found[name], lines[name], options.output)
    for entry in decoder.skipped:
        print(f"skipped {entry['id']}: {entry['error']}", file=sys.stderr)
    if options.json:
        write_text(options.json, "".join(lines[name] + "\n" for name in lines))
        logging.info("wrote %s", options.json)
    return SKIPPED_SOME if decoder.skipped else 0


def _decode_options(options: TranscribeOptions) -> DecodeOptions:
    models = ("emissions", "nlm", "llm", "matched_llm", "ngram")
    same = {name: getattr(options, name) for name in (*models, "search", "weights", "longest", "batch_size")}
    nowhere = {"out": "unused", "test_sets": {"files": "unused"}}  # nothing is written
    return with_pretrained(DecodeOptions(**nowhere, methods=options.method, **same))


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
