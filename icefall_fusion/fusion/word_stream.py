"""A word n-gram in a stream: old words are forgotten as an LLM forgets them, the last ones are its context.
Knows: delayed fusion of word n-grams and of streams. Must not know: audio, when to cut, files.
"""
from __future__ import annotations

from typing import Callable, Optional, Sequence

from icefall_fusion.fusion.streaming import DelayedStream
from icefall_fusion.fusion.word_ngram import WordNgramFusion


class WordNgramStream(DelayedStream, WordNgramFusion):
    """A `WordNgramFusion` of one stream; its tree has no keys and values, so it needs no lane.

    Args:
        fusion: whose settings it has.
        context, words, tell: see `DelayedStream`.
    """

    def __init__(self, fusion: WordNgramFusion, context: Sequence[str], words: int,
                 tell: Optional[Callable[[str, Exception], None]] = None) -> None:
        super().__init__(fusion, fusion.lm, context, words, tell)
