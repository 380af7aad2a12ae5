"""Live audio: streams are decoded while they arrive, with the language model in the first pass.
Knows: acoustic models, search, fusion. Must not know: commands, test sets, servers.

    decoder.py    StreamingDecoder: many streams, their encoder chunks and LLM events together
    stream.py     Stream: audio in, partial and final results out
    segment.py    one segment: search, committed words, forgetting
    endpoint.py   where a segment ends
    options.py    StreamOptions, EndpointOptions
"""
from __future__ import annotations

from icefall_fusion.streaming.decoder import StreamingDecoder
from icefall_fusion.streaming.options import EndpointOptions, StreamOptions
from icefall_fusion.streaming.stream import Partial, Stream

__all__ = ["EndpointOptions", "Partial", "Stream", "StreamOptions", "StreamingDecoder"]
