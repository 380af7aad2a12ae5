"""Job ``transcribe``: audio files to text, words with times, subtitles, lhotse supervisions.
Knows: recognizers, audio files, formats. Must not know: how a search or a fusion works.
"""
from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Sequence, Union

from icefall_fusion.common.checks import check, check_choice
from icefall_fusion.common.command_line import SKIPPED_SOME
from icefall_fusion.common.files import atomic_path, fingerprint, write_text
from icefall_fusion.decode.method_names import parse_methods
from icefall_fusion.decode.options import RecognizerOptions, check_no_language, check_nothing_is_normalized
from icefall_fusion.decode.pretrained import FOLDER, WORDS, with_pretrained
from icefall_fusion.decode.utterances import Utterance, read_audio_files
from icefall_fusion.decode.word_formats import as_json, ctm, names_of, srt, supervision, vtt
from icefall_fusion.decode.words import WordModel, WordRecognizer
from icefall_fusion.nbest import NBest, WordTime
from icefall_fusion.streaming.options import EndpointOptions, StreamOptions
from icefall_fusion.text.language import ENGLISH
from icefall_fusion.text.scripts import unspaced

#: Formats, and what holds each in the folder of results: one file in all, or one a file of audio.
FORMATS = {"text": "text.txt", "json": "words.jsonl", "ctm": "words.ctm",
           "lhotse": "supervisions.jsonl.gz", "srt": "", "vtt": ""}
_SUBTITLES: dict[str, Callable[[Sequence[WordTime]], str]] = {"srt": srt, "vtt": vtt}


def _live() -> StreamOptions:
    return StreamOptions(commit_after=5.0, endpoint=EndpointOptions())


@dataclass(frozen=True, kw_only=True)
class TranscribeOptions(RecognizerOptions):
    """Print the text of audio files; any rate and format that soundfile reads (WAV, FLAC, OGG, MP3, ...).

    Without ``emissions`` the models shipped with the repository are used.

    Args:
        files: audio files.
        stream: decode one file as it arrives, or "-" (raw PCM of standard input: 16 bits, 16 kHz, one
            channel), or "mic" or "mic:DEVICE" (a microphone, until Ctrl-C): a live line in a terminal, else a
            line a segment; JSON lines with the format json alone.
        live: of the stream; a segment ends by the usual rules.
        method: how to decode: a name of the table of methods, e.g. ctc-prefix.
        format: a list or a text with commas of: text, json (a line a file: words with times, scores, all
            hypotheses), ctm (a line a word), srt, vtt (subtitles), lhotse (supervisions with alignments).
        out: folder for text.txt, words.jsonl, words.ctm, supervisions.jsonl.gz and NAME.srt, NAME.vtt; empty:
            all is printed (subtitles of one file alone, lhotse never).
        words: YAML file of the job tune-words; empty: that of the shipped models, or the usual constants.
        json: write the JSON lines to this file too.
        batch_size: files (or segments of long ones) decoded together.
        language: ISO 639 code, which lhotse and JSON lines name unless it is English; empty: that of the
            acoustic model.
    """

    files: list[str] = field(metadata={"positional": True})
    stream: bool = False
    live: StreamOptions = field(default_factory=_live)
    method: str = "llm-delayed-shortest"
    format: Union[str, list[str]] = "text,json"
    out: str = ""
    words: str = ""
    json: str = ""
    batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(self.files) > 0, "TranscribeOptions.files", "name at least one file", self.files)
        check(len(self.formats) > 0, "TranscribeOptions.format", "name at least one format", self.format)
        for name in self.formats:
            check_choice(name, FORMATS, "TranscribeOptions.format")
            many = name in _SUBTITLES and len(set(self.files)) > 1
            rule = "name a folder for lhotse, and for subtitles of several files"
            check(bool(self.out) or not (many or name == "lhotse"), "TranscribeOptions.out", rule, self.out)
        check(len(parse_methods(self.method)) == 1, "TranscribeOptions.method", "be one method", self.method)
        check_nothing_is_normalized(self)
        if self.stream:
            check_no_language(self, "in a stream")
            check(len(self.files) == 1, "TranscribeOptions.files", "be one in a stream", self.files)
            good = set(self.formats) <= {"text", "json"} and not self.out and not self.json
            check(good, "TranscribeOptions.format", "be text or json, printed, in a stream", self.format)

    @property
    def formats(self) -> list[str]:
        """The names of the formats, each once."""
        names = self.format.split(",") if isinstance(self.format, str) else self.format
        return list(dict.fromkeys(name.strip() for name in names if name.strip()))


def run(options: TranscribeOptions) -> int:
    """Run the job ``transcribe``; files that cannot be read are listed and the exit code is 3."""
    if options.stream:
        from icefall_fusion.decode.transcribe_stream import run_stream

        with_models, as_lines = with_pretrained(options), options.formats == ["json"]
        words = word_model(with_models)
        return run_stream(with_models, options.method, options.live, options.files[0], as_lines, words)
    files = list(dict.fromkeys(options.files))
    names = names_of(files)
    options = with_pretrained(options)
    recognizer = WordRecognizer(options, options.method, word_model(options))
    utterances = read_audio_files(files, recognizer.source.wants)
    found = {nbest.utterance: nbest for nbest in recognizer.transcribe(utterances)}
    nbests = {name: found[name] for name in files if name in found}
    language = "" if recognizer.language == ENGLISH else recognizer.language.name
    if options.out:
        _write(options, nbests, names, utterances, language)
    else:
        for name, nbest in nbests.items():
            for kind in options.formats:
                sys.stdout.write(_shown(kind, nbest, names[name], language))
    for utterance, error in recognizer.unreadable:
        print(f"skipped {utterance.id}: {error}", file=sys.stderr)
    if options.json:
        write_text(options.json, "".join(_shown("json", nbest, "", language) for nbest in nbests.values()))
        logging.info("wrote %s", options.json)
    return SKIPPED_SOME if recognizer.unreadable else 0


def word_model(options: RecognizerOptions) -> WordModel:
    """Return what the options say of words, or what lies beside the shipped models, where those are used.

    Args:
        options: with the path of the acoustic model, and ``words``, a file or "".
    """
    shipped = FOLDER / WORDS
    if not options.words and not (options.emissions.model == str(FOLDER / "ctc_aed") and shipped.is_file()):
        return WordModel()
    found = WordModel.read(options.words or shipped)
    if found.model and found.model != fingerprint(options.emissions.model):
        logging.warning("times and confidence of words were found with another acoustic model than %s; "
                        "the job tune-words finds its own", options.emissions.model)
    return found


def _shown(kind: str, nbest: NBest, name: str, language: str) -> str:
    """Return a list in one of the formats that are text; ``name`` is that of CTM."""
    if kind == "text":
        return f"{nbest.utterance}\t{unspaced(nbest[0].text)}\n"
    if kind == "json":
        return json.dumps(as_json(nbest, language), ensure_ascii=False) + "\n"
    times = nbest[0].times
    return ctm(name, times) if kind == "ctm" else _SUBTITLES[kind](times)


def _write(options: TranscribeOptions, nbests: dict[str, NBest], names: dict[str, str],
           utterances: Sequence[Utterance], language: str) -> None:
    """Write the files of all formats to the folder ``out``."""
    folder = Path(options.out)
    for kind in options.formats:
        if kind in _SUBTITLES:
            for name, nbest in nbests.items():
                write_text(folder / f"{names[name]}.{kind}", _shown(kind, nbest, names[name], language))
        elif kind == "lhotse":
            seconds = {utterance.id: utterance.seconds for utterance in utterances}
            _write_supervisions(folder / FORMATS[kind], nbests, names, seconds, language)
        else:
            lines = [_shown(kind, nbest, names[name], language) for name, nbest in nbests.items()]
            write_text(folder / FORMATS[kind], "".join(lines))
    logging.info("wrote %s of %d files to %s", ", ".join(options.formats), len(nbests), folder)


def _write_supervisions(path: Path, nbests: dict[str, NBest], names: dict[str, str],
                        seconds: dict[str, float], language: str) -> None:
    from lhotse import SupervisionSet

    made = [supervision(names[name], nbest, seconds[name], language) for name, nbest in nbests.items()]
    with atomic_path(path) as temporary:
        SupervisionSet.from_segments(made).to_file(temporary)
