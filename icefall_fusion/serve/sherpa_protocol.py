"""The protocol of sherpa-onnx's streaming WebSocket server, so that its clients work here as they are.
Knows: its fields. Must not know: sockets, decoders.

A client sends samples at 16 kHz, float32, little endian, in binary messages, and then the text "Done". It
gets a JSON text whenever something was decoded, and "Done!" at the end. A word stands for a token here:
``tokens`` are the words, each with a space before it (scripts without spaces have none), and ``timestamps``
their beginnings, counted from ``start_time``, the beginning of the segment.
"""
from __future__ import annotations

import json
from typing import TYPE_CHECKING, Sequence

from icefall_fusion.common.checks import check
from icefall_fusion.nbest import WordTime
from icefall_fusion.serve.samples import SampleFormat
from icefall_fusion.serve.session import Opening, Protocol, Read
from icefall_fusion.serve.talk import Clock, Forms
from icefall_fusion.text.scripts import join_words, unspaced

if TYPE_CHECKING:
    from icefall_fusion.serve.engine import Ended

END, LAST = "Done", "Done!"


class SherpaForms(Forms):
    """The messages to a client of sherpa-onnx."""

    def partial(self, segment: int, words: list[WordTime], stable: int, clock: Clock) -> str:
        """See `Forms`."""
        return _result(segment, words, clock.start)

    def segment(self, number: int, ended: Ended, clock: Clock) -> str:
        """See `Forms`."""
        return _result(number, ended.nbest[0].times if len(ended.nbest) else [], clock.start, True,
                       ended.last)

    def final(self) -> str:
        """See `Forms`."""
        return LAST


class SherpaProtocol(Protocol):
    """The protocol of sherpa-onnx: audio, then "Done"."""

    def __init__(self) -> None:
        self.forms = SherpaForms()

    def open(self, first: Read) -> Opening:
        """See `Protocol`."""
        return Opening(SampleFormat(), self.forms)

    def read_end(self, text: str) -> None:
        """See `Protocol`."""
        check(text == END, "a text message", f"be {END!r}", text if len(text) <= 80 else text[:80] + "...")


def _result(segment: int, words: Sequence[WordTime], start: float, final: bool = False,
            last: bool = False) -> str:
    fields = {
        "text": join_words(word.word for word in words),
        "tokens": [unspaced(f" {word.word}") for word in words],
        "timestamps": [round(max(0.0, word.start - start), 2) for word in words],
        "segment": segment,
        "start_time": round(start, 2),
        "is_final": final,
        "is_eof": last,
    }
    return json.dumps(fields, ensure_ascii=False)
