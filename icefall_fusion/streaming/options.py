"""Options of streaming decoding.
Knows: seconds, words, chunks. Must not know: models, how anything is decoded.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from icefall_fusion.acoustic.models import ChunkOptions
from icefall_fusion.common.checks import check, check_at_least, is_number


@dataclass(frozen=True)
class EndpointOptions:
    """When a segment of a stream ends (rules 1 to 3 of sherpa and Kaldi). 0 turns a rule off.

    A frame is silent when blank is its most probable piece.

    Args:
        silence: rule 1: seconds of silence that end a segment in which nothing was said.
        pause: rule 2: seconds of silence that end a segment in which something was said.
        longest: rule 3: seconds after which a segment ends in any case.
    """

    silence: float = 2.4
    pause: float = 1.2
    longest: float = 20.0

    def __post_init__(self) -> None:
        for name in ("silence", "pause", "longest"):
            value = getattr(self, name)
            check(is_number(value) and value >= 0, f"EndpointOptions.{name}", "be at least 0 s", value)


@dataclass(frozen=True)
class StreamOptions:
    """How streams are decoded.

    Args:
        chunk: what an encoder frame sees; a chunk is decoded when its audio is there.
        streams: streams that may be open at once.
        commit_after: seconds; words that ended longer ago are committed even where hypotheses differ: those
            that contradict the best one are dropped. none: only what all hypotheses share is committed, and
            memory is bounded only as far as they agree.
        window: seconds of audio that the search holds before it forgets what is committed. With a
            `ShallowFusion` it forgets nothing before the segment ends.
        context_words: most words of earlier text that a language model of delayed fusion reads. It forgets
            older ones when there are twice as many.
        endpoint: when a segment ends and a new one begins (the language model reads on); none: a stream is
            one segment, whose text is all that grows.
    """

    chunk: ChunkOptions = field(default_factory=ChunkOptions)
    streams: int = 64
    commit_after: Optional[float] = None
    window: float = 20.0
    context_words: int = 100
    endpoint: Optional[EndpointOptions] = None

    def __post_init__(self) -> None:
        check(isinstance(self.chunk, ChunkOptions), "StreamOptions.chunk", "be ChunkOptions", self.chunk)
        check_at_least(1, self, "streams", "context_words")
        for name in ("commit_after", "window"):
            value = getattr(self, name)
            good = (value is None and name == "commit_after") or (is_number(value) and value > 0)
            check(good, f"StreamOptions.{name}", "be above 0 s", value)
        good = self.endpoint is None or isinstance(self.endpoint, EndpointOptions)
        check(good, "StreamOptions.endpoint", "be none or EndpointOptions", self.endpoint)
