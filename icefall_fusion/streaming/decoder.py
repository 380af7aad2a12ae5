"""Many live streams by one acoustic model and one language model: their work is done together.
Knows: the acoustic model, lanes of language models, streams. Must not know: where audio comes from, commands.

A round takes one chunk of every stream whose audio for it is there, wherever the stream is: one encoder call,
one search a stream up to its next fusion event, one call of the language model for all that wait, and so on
to the end of the chunk (but see `StreamingDecoder` for `ShallowFusion`). No result depends on what other
streams there are.

An error in one stream breaks that stream, and an error in a language model takes the model out of a segment
(see fusion/streaming.py); the others go on. Only an error in the encoder breaks all streams of its round.
"""
from __future__ import annotations

import copy
import functools
import logging
from typing import Callable, Iterator, Optional, Sequence, Union

import torch

from icefall_fusion.acoustic.models import CtcAed, join_states
from icefall_fusion.acoustic.models.subsampling import FACTOR
from icefall_fusion.common.checks import check, check_text
from icefall_fusion.common.memory import FreedMemory
from icefall_fusion.data.features import FRAME_SHIFT
from icefall_fusion.fusion import DelayedFusion, NgramFusion, ShallowFusion
from icefall_fusion.fusion.hotwords import HOT_WORDS, HotWordFusion, Phrases
from icefall_fusion.fusion.lodr import LodrFusion
from icefall_fusion.fusion.shallow_stream import ShallowStream
from icefall_fusion.fusion.streaming import DelayedStream
from icefall_fusion.fusion.word_ngram import VocabularyFusion, WordNgramFusion
from icefall_fusion.fusion.word_stream import WordNgramStream
from icefall_fusion.lm.tree_lanes import TreeLanes
from icefall_fusion.nbest import NBest
from icefall_fusion.search import Fusion, PrefixSearchOptions
from icefall_fusion.search.streaming import check_stream_options
from icefall_fusion.streaming.greedy import GreedySegment
from icefall_fusion.streaming.options import StreamOptions
from icefall_fusion.streaming.segment import Segment
from icefall_fusion.streaming.stream import Stream
from icefall_fusion.text.tokens import AcousticTokens

#: Bytes by which the process may grow before freed memory is given back: every few minutes with a language
#: model, whose calls take blocks of ever new sizes.
_GROWTH = 16_000_000
#: The fusions that streams have.
_KINDS = (DelayedFusion, WordNgramFusion, NgramFusion, LodrFusion, HotWordFusion, VocabularyFusion,
          ShallowFusion)


class StreamingDecoder:
    """Decodes streams while they arrive.

    The result of a stream is that of the same model over the whole audio with the same chunk mask and
    `ctc_prefix_search`, however the audio is cut into packets, as long as nothing was forgotten or forced
    (see `StreamOptions`). Not for several threads at once. The search runs on the CPU.

    Args:
        model: the acoustic model.
        fusions: `DelayedFusion`, `WordNgramFusion`, `NgramFusion`, `LodrFusion`, `HotWordFusion`,
            `VocabularyFusion`, `ShallowFusion`; their settings are copied for each stream. With a
            `ShallowFusion` tensors search, its model is asked for each stream by itself and reads no earlier
            text, and all of a segment is held until it ends: let `StreamOptions.endpoint` end them.
        search: the prefix search; its frame shift is the model's.
        options: chunks, commitment, endpoints.
        tokens: the vocabulary; none: the model's own.
        greedy: take the best piece of each frame; without fusions, ``search`` is of no use then.
        join: what is done to N-best lists in the end (see `join_oov`); none: nothing.

    Attributes:
        fusions: those given; each stream has copies.

    Raises:
        ValueError: a fusion that cannot be used in streams, or the model has no vocabulary.
    """

    def __init__(self, model: CtcAed, fusions: Sequence[Fusion] = (),
                 search: Optional[PrefixSearchOptions] = None, options: Optional[StreamOptions] = None,
                 tokens: Optional[AcousticTokens] = None, greedy: bool = False,
                 join: Optional[Callable[[list[NBest]], list[NBest]]] = None) -> None:
        self.model, self.options = model.eval(), StreamOptions() if options is None else options
        check(isinstance(self.options, StreamOptions), "options", "be StreamOptions", type(options).__name__)
        tokens = model.tokens if tokens is None else tokens
        check(tokens is not None, "tokens", "be given for a model without a vocabulary", None)
        self.tokens: AcousticTokens = tokens
        self.frame_shift = FACTOR * FRAME_SHIFT
        search = PrefixSearchOptions() if search is None else search
        self._search = check_stream_options(search, self.frame_shift)
        for number, fusion in enumerate(fusions):
            rule = f"be one of {', '.join(kind.__name__ for kind in _KINDS)} in a stream"
            check(type(fusion) in _KINDS, f"fusions[{number}]", rule, type(fusion).__name__)
        check(not (greedy and fusions), "fusions", "be none in greedy search", len(fusions))
        self.fusions, self._greedy, self.join = list(fusions), greedy, join
        #: the fusions whose language model is a neural one: all streams share its lanes
        self.neural = [fusion for fusion in self.fusions if type(fusion) in (DelayedFusion, ShallowFusion)]
        self._lanes = {id(fusion): TreeLanes(fusion.lm, self.options.streams) for fusion in self.neural}
        self._streams: list[Stream] = []
        self._opened, self._freed = 0, FreedMemory(_GROWTH)

    @property
    def streams(self) -> list[Stream]:
        """The open streams."""
        return list(self._streams)

    def open(self, name: Optional[str] = None, context: str = "",
             hotwords: Optional[Phrases] = None) -> Stream:
        """Open a stream.

        Args:
            name: in N-best lists; none: a number.
            context: what was said before, for language models of delayed fusion; read, not scored.
            hotwords: phrases of this stream in the place of the decoder's own (see `HotWordFusion`), whose
                weight, boost and word bonus they keep; none: the decoder's own.

        Raises:
            TypeError, ValueError: `StreamOptions.streams` are open, or hot words are bad.
        """
        most = self.options.streams
        check(len(self._streams) < most, "streams", f"be at most {most} (StreamOptions.streams)", most + 1)
        name = str(self._opened) if name is None else name
        check_text(name, "name")
        check_text(context, "context")
        open_segment = functools.partial(self._open_segment, self._fusions_with(hotwords))
        state = self.model.encoder.start(1, self.options.chunk)
        stream = Stream(self, name, state, open_segment, context.split())
        self._opened += 1
        self._streams.append(stream)
        return stream

    @torch.no_grad()
    def decode(self) -> bool:
        """Decode all chunks whose audio has arrived, of all streams; return whether there were any.

        A stream that breaks raises its error when it is used next.
        """
        any_ready = False
        while self._round(self._streams, ended=False):
            any_ready = True
        if any_ready:
            self._freed.watch()
        return any_ready

    @torch.no_grad()
    def finish(self, streams: Sequence[Stream]) -> list[NBest]:
        """End streams, and return the N-best list of the last segment of each.

        Raises:
            ValueError: a stream is not open.
            Exception: why a stream broke; all have ended, and ``result`` of the others tells their lists.
        """
        for stream in streams:
            stream.check_open()
            check(stream in self._streams, f"stream {stream.name!r}", "be open in this decoder", "closed")
        for stream in streams:
            stream.end()
        self.decode()
        while self._round(streams, ended=True):
            pass
        self._take_turns([(stream, stream.finish_segment()) for stream in streams if stream.error is None])
        self._streams = [stream for stream in self._streams if stream not in streams]
        return [stream.result() for stream in streams]

    def close(self, stream: Stream) -> None:
        """End a stream without a result."""
        stream.free()
        self._streams = [other for other in self._streams if other is not stream]

    def stats(self) -> dict[str, float]:
        """Return counters of language models: lm_forwards, lm_tokens_forwarded, oom_backoffs, kv_bytes."""
        counted = ("lm_forwards", "lm_tokens_forwarded", "oom_backoffs")
        each = self._lanes.values()
        total = {name: float(sum(getattr(lanes.counters, name) for lanes in each)) for name in counted}
        return {**total, "kv_bytes": float(sum(lanes.cache.kv_bytes for lanes in each))}

    # --- inside ------------------------------------------------------------------------------------------

    def _round(self, streams: Sequence[Stream], ended: bool) -> bool:
        """Decode the next chunk of all streams that have one; return whether one had."""
        size = FACTOR * self.options.chunk.size
        chunks = [(stream, stream.next_chunk(size, ended)) for stream in streams if stream.error is None]
        ready = [(stream, chunk) for stream, chunk in chunks if chunk is not None]
        if not ready:
            return False
        try:
            found = self._encode(ready)
        except Exception as error:
            for stream, _ in ready:
                self._break(stream, error)
        else:
            self._take_turns([(stream, stream.decode(log_probs)) for stream, log_probs in found])
        return True

    def _encode(self, ready: Sequence[tuple[Stream, torch.Tensor]]) -> list[tuple[Stream, torch.Tensor]]:
        """Return the log-probs [n, V] of the next chunk of each stream, whose features are given."""
        lens = torch.tensor([len(chunk) for _, chunk in ready])
        features = torch.nn.utils.rnn.pad_sequence([chunk for _, chunk in ready], batch_first=True)
        state = join_states([stream.state for stream, _ in ready])
        device = state.features.device
        frames, counts = self.model.encoder.forward_chunk(features.to(device), lens.to(device), state)
        log_probs, counts = self.model.ctc_log_probs(frames).cpu(), counts.tolist()
        for (stream, _), row in zip(ready, state.rows()):
            stream.state = row
        return [(stream, log_probs[row, : counts[row]]) for row, (stream, _) in enumerate(ready)]

    def _take_turns(self, going: list[tuple[Stream, Iterator[None]]]) -> None:
        """Let all go on to where a language model must score; it scores for all of them at once."""
        while going:
            going = [(stream, steps) for stream, steps in going if self._goes_on(stream, steps)]
            for lanes in self._lanes.values():
                lanes.run()

    def _goes_on(self, stream: Stream, steps: Iterator[None]) -> bool:
        """Do the next step of a stream; return whether another follows."""
        try:
            return next(steps, self) is not self
        except Exception as error:
            self._break(stream, error)
            return False

    def _break(self, stream: Stream, error: Exception) -> None:
        logging.error("stream %s is broken", stream.name, exc_info=error)
        stream.fail(error)
        self._streams = [other for other in self._streams if other is not stream]

    def _fusions_with(self, hotwords: Optional[Phrases]) -> list[Fusion]:
        """Return the fusions of a stream with phrases of its own."""
        if hotwords is None:
            return self.fusions
        check(not self._greedy, "hotwords", "be none in greedy search", hotwords)
        own = [f for f in self.fusions if isinstance(f, HotWordFusion) and f.source == HOT_WORDS]
        others = [fusion for fusion in self.fusions if fusion not in own]
        fusion = (own[0] if own else HotWordFusion([])).with_phrases(hotwords, self.tokens)
        return [*others, fusion] if own or len(hotwords) else others

    def _open_segment(self, own: Sequence[Fusion], stream: Stream, start: int,
                      context: Sequence[str]) -> Union[Segment, GreedySegment]:
        options, shift = self.options, self.frame_shift
        if self._greedy:
            return GreedySegment(self.tokens, shift, stream.name, start)
        fusions: list[Fusion] = []
        for fusion in own:
            text = context, options.context_words, stream.lost
            if isinstance(fusion, WordNgramFusion):
                fusions.append(WordNgramStream(fusion, *text))
            elif isinstance(fusion, ShallowFusion):
                fusions.append(ShallowStream(fusion, self._lanes[id(fusion)], stream.lost))
            elif isinstance(fusion, DelayedFusion):
                fusions.append(DelayedStream(fusion, self._lanes[id(fusion)], *text))
            else:
                fusions.append(copy.copy(fusion))
        after = None if options.commit_after is None else max(1, round(options.commit_after / shift))
        window = max(1, round(options.window / shift))
        try:
            return Segment(self.tokens, self._search, fusions, stream.name, start, window, after)
        except Exception:
            for fusion in fusions:
                if isinstance(fusion, (DelayedStream, ShallowStream)):
                    fusion.close()  # others need its lane
            raise
