"""Transcription while audio arrives: a live line in the terminal, or JSON lines for programs.
Knows: streams, sources of live audio, what shows them. Must not know: how a stream is decoded, devices.
"""
from __future__ import annotations

import logging
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, Iterator

import numpy as np

from icefall_fusion.acoustic.models import CtcAed
from icefall_fusion.acoustic.prior import SourceWithPrior
from icefall_fusion.common.checks import check
from icefall_fusion.common.command_line import DONE
from icefall_fusion.decode.live_audio import live_packets
from icefall_fusion.decode.live_views import make_view
from icefall_fusion.decode.recognizer import Recognizer
from icefall_fusion.decode.words import WordModel
from icefall_fusion.streaming import StreamingDecoder, StreamOptions

if TYPE_CHECKING:
    from icefall_fusion.decode.recognizer import RecognizerOptions


def run_stream(options: RecognizerOptions, method: str, live: StreamOptions, name: str,
               as_lines: bool, words: WordModel) -> int:
    """Transcribe one source, packet by packet. Ctrl-C ends the audio: what was heard is decoded.

    Args:
        options: the models; method: its name.
        live: options of the stream.
        name: a file, "-", "mic" or "mic:DEVICE" (see `live_packets`).
        as_lines: print JSON lines; else text.
        words: tells when words sound; the end of the last one may still move.

    Raises:
        ValueError: the method or the acoustic model cannot be used in a stream, or see `live_packets`.
    """
    recognizer = Recognizer(options, method)
    stream = open_decoder(recognizer, live).open(name)
    view = make_view(sys.stdout, words if as_lines else None)
    try:
        with _UntilInterrupt(live_packets(name)) as packets:
            for samples in packets:
                stream.accept(samples)
                partial = stream.partial()
                for nbest in stream.take_segments():
                    view.final(nbest)
                view.partial(partial)
        last = stream.finish()
        for nbest in [*stream.take_segments(), last]:
            view.final(nbest)
    finally:
        view.close()
    return DONE


class _UntilInterrupt:
    """Packets until the first Ctrl-C. It cuts the wait for a packet short, and never the work on one.

    The second one is an exception wherever it comes, as ever.

    Args:
        packets: to be yielded.
    """

    def __init__(self, packets: Iterator[np.ndarray]) -> None:
        self._packets, self._waits, self._asked = packets, False, False
        self._before: Any = None

    def __enter__(self) -> Iterator[np.ndarray]:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self._going()

    def __exit__(self, *error: object) -> None:
        self._packets.close()
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: Any) -> None:
        again, self._asked = self._asked, True
        if again or self._waits:
            raise KeyboardInterrupt

    def _going(self) -> Iterator[np.ndarray]:
        while not self._asked:
            try:
                self._waits = True
                samples = next(self._packets, None)
                self._waits = False
            except KeyboardInterrupt:
                self._waits = False
                break
            if samples is None:
                return
            yield samples
        logging.info("stopped by the keyboard: what was heard is decoded")


def open_decoder(recognizer: Recognizer, live: StreamOptions) -> StreamingDecoder:
    """Return a decoder of streams by the models and the first method of a recognizer.

    Raises:
        ValueError: see `run_stream`.
    """
    method, model = recognizer.methods[0], getattr(recognizer.source, "network", None)
    prior = isinstance(recognizer.source, SourceWithPrior)
    rule = "be empty (or its scale 0) in a stream"
    check(not prior, "emissions.prior", rule, recognizer.options.emissions.prior)
    rule = "be one pass of the prefix search or greedy in a stream (no rescoring, lattices, transducers)"
    good = method.spec.search in ("greedy", "prefix") and not method.spec.rescorers
    check(good, "method", rule, method.name)
    check(isinstance(model, CtcAed) and recognizer.source.has_ctc, "emissions.model",
          "be a model of ours (checkpoint) with a CTC head in a stream", recognizer.options.emissions.model)
    greedy = method.spec.search == "greedy"
    return StreamingDecoder(model, method.make_fusions({}), recognizer.options.search, live,
                            recognizer.source.tokens, greedy, method.join)
