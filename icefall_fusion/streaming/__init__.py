"""Live audio: streams are decoded while they arrive, with the language model in the first pass.
Knows: acoustic models, search, fusion. Must not know: commands, test sets, servers.

    decoder = StreamingDecoder(load(folder), [DelayedFusion(lm, 0.4)])
    stream = decoder.open()
    for samples in packets:          # float, 16 kHz; of any size
        stream.accept(samples)
        print(stream.partial())      # committed text, unstable text, words with times, age
    nbest = stream.finish()          # as if the same model had heard all at once, chunk mask included

With many streams call ``accept`` of each, then ``decoder.decode()`` once for all, then ``partial`` of each.
A language model that fails is left out of its segment, and ``stream.take_warnings()`` tells. A stream that
breaks raises its error when it is used next; the others go on.

    decoder.py    StreamingDecoder: many streams, their encoder chunks and LLM events together
    stream.py     Stream: audio in, partial and final results out
    segment.py    one segment: search, committed words, forgetting
    greedy.py     one segment by greedy search
    endpoint.py   where a segment ends
    options.py    StreamOptions, EndpointOptions
"""
from __future__ import annotations

from icefall_fusion.streaming.decoder import StreamingDecoder
from icefall_fusion.streaming.options import EndpointOptions, StreamOptions
from icefall_fusion.streaming.stream import Partial, Stream

__all__ = ["EndpointOptions", "Partial", "Stream", "StreamOptions", "StreamingDecoder"]
