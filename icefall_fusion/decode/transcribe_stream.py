"""Transcription while audio arrives: a live line in the terminal, or JSON lines for programs.
Knows: streams, audio files, raw PCM from a pipe. Must not know: how a stream is decoded.
"""
from __future__ import annotations

import json
import logging
import math
import shutil
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, BinaryIO, Iterator, TextIO

import numpy as np

from icefall_fusion.acoustic.models import CtcAed
from icefall_fusion.common.checks import check
from icefall_fusion.common.command_line import DONE
from icefall_fusion.data.audio import SAMPLE_RATE, load_audio
from icefall_fusion.decode.recognizer import Recognizer
from icefall_fusion.decode.word_formats import as_json
from icefall_fusion.decode.words import WordModel
from icefall_fusion.nbest import NBest
from icefall_fusion.streaming import Partial, Stream, StreamingDecoder, StreamOptions

if TYPE_CHECKING:
    from icefall_fusion.decode.recognizer import RecognizerOptions

PIPE = "-"  # standard input
PACKET = 1600  # samples; a tenth of a second
_WINDOW = 10.0  # seconds of a file read at once
_DIM, _PLAIN, _CLEAR = "\033[2m", "\033[0m", "\r\033[K"


def run_stream(options: RecognizerOptions, method: str, live: StreamOptions, name: str,
               as_lines: bool, words: WordModel) -> int:
    """Transcribe one file, or raw PCM of standard input, packet by packet.

    Args:
        options: the models; method: its name.
        live: options of the stream.
        name: a file, or "-": 16 bits, little endian, one channel, 16 kHz.
        as_lines: print JSON lines; else text.
        words: tells when words sound; the end of the last one may still move.

    Raises:
        ValueError: the method or the acoustic model cannot be used in a stream.
    """
    recognizer = Recognizer(options, method)
    stream = open_decoder(recognizer, live).open(name)
    text = _Terminal if sys.stdout.isatty() else _Texts
    show = _Lines(sys.stdout, words) if as_lines else text(sys.stdout)
    packets = pcm_packets(sys.stdin.buffer) if name == PIPE else file_packets(name)
    try:
        for samples in packets:
            stream.accept(samples)
            _tell(stream, show)
    except KeyboardInterrupt:  # of somebody who has said all
        logging.info("stopped by the keyboard: what was heard is decoded")
    last = stream.finish()
    for nbest in [*stream.take_segments(), last]:
        show.final(nbest)
    return DONE


def open_decoder(recognizer: Recognizer, live: StreamOptions) -> StreamingDecoder:
    """Return a decoder of streams by the models and the first method of a recognizer.

    Raises:
        ValueError: see `run_stream`.
    """
    method, model = recognizer.methods[0], recognizer.source.model
    rule = "be one pass of the prefix search or greedy in a stream (no rescoring, no lattices)"
    good = not method.spec.of_lattices and not method.spec.rescorers
    check(good, "method", rule, method.name)
    check(isinstance(model, CtcAed), "emissions.model", "be a model of ours (checkpoint) in a stream",
          recognizer.options.emissions.model)
    greedy = method.spec.search == "greedy"
    return StreamingDecoder(model, method.make_fusions({}), recognizer.options.search, live,
                            recognizer.source.tokens, greedy)


def file_packets(path: str) -> Iterator[np.ndarray]:
    """Yield the samples of a file in packets; little of it is in memory."""
    begin = 0.0
    while True:
        samples = load_audio(path, allow_empty=True, offset=begin, duration=_WINDOW)
        for start in range(0, len(samples), PACKET):
            yield samples[start : start + PACKET]
        if len(samples) < round(_WINDOW * SAMPLE_RATE):
            return
        begin += _WINDOW


def pcm_packets(file: BinaryIO) -> Iterator[np.ndarray]:
    """Yield the samples of raw PCM (16 bits, little endian, one channel, 16 kHz) as they come."""
    rest = b""
    while True:
        read = getattr(file, "read1", file.read)(2 * PACKET)
        if not read:
            break
        whole = rest + read
        even = len(whole) // 2 * 2
        rest = whole[even:]
        yield np.frombuffer(whole[:even], "<i2").astype(np.float32) / 32768
    if rest:
        logging.warning("the last byte is half a sample: it is left out")


def _tell(stream: Stream, show: _Show) -> None:
    partial = stream.partial()
    for nbest in stream.take_segments():
        show.final(nbest)
    show.partial(partial)


class _Show:
    """What is shown of a stream."""

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def partial(self, partial: Partial) -> None:
        """Show the text so far of the open segment."""

    def final(self, nbest: NBest) -> None:
        """Show the text of a segment that has ended."""


class _Texts(_Show):
    """A line a segment."""

    def final(self, nbest: NBest) -> None:
        if len(nbest) and nbest[0].text:
            print(nbest[0].text, file=self.out, flush=True)


class _Terminal(_Texts):
    """The open segment in the last line: what is committed as it is, what may change dim."""

    def partial(self, partial: Partial) -> None:
        width = shutil.get_terminal_size().columns - 1
        text = f"{partial.committed} {partial.unstable}".strip()
        hidden = max(0, len(text) - width)
        committed, unstable = text[: len(partial.committed)], text[len(partial.committed) :]
        unstable = unstable[max(0, hidden - len(committed)) :]
        self.out.write(f"{_CLEAR}{committed[hidden:]}{_DIM}{unstable}{_PLAIN}")
        self.out.flush()

    def final(self, nbest: NBest) -> None:
        self.out.write(_CLEAR)
        super().final(nbest)


class _Lines(_Show):
    """A JSON line whenever something has changed, and one for each segment that has ended."""

    def __init__(self, out: TextIO, words: WordModel) -> None:
        super().__init__(out)
        self._words = words
        self._before, self._ended = ("", ""), 0

    def partial(self, partial: Partial) -> None:
        texts = partial.committed, partial.unstable
        if texts != self._before:
            self._before = texts
            moved = replace(partial, words=self._words.timing.apply(partial.words))
            self._print({"final": False, **asdict(moved)})

    def final(self, nbest: NBest) -> None:
        self._before = "", ""
        moved = self._words.apply(nbest, math.inf)
        self._print({"final": True, "segment": self._ended, **as_json(moved)})
        self._ended += 1

    def _print(self, value: dict) -> None:
        print(json.dumps(value, ensure_ascii=False), file=self.out, flush=True)
