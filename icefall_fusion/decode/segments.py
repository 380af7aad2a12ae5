"""Utterances in segments: what is decoded at once, and the lists of all segments joined again.
Knows: utterances, N-best lists. Must not know: models, searches, files of a run.

Of a long utterance no more is held than what is looked at: where to cut it, then its parts.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Container, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from icefall_fusion.common.counters import add_counters
from icefall_fusion.data.audio import SAMPLE_RATE
from icefall_fusion.data.fbank import FRAME_SHIFT
from icefall_fusion.decode.utterances import Utterance, join_parts
from icefall_fusion.nbest import NBest

_SMOOTHED = 20  # frames: a cut is put where so many together are quietest


@dataclass
class Segment:
    """One of ``count`` segments of an utterance (mostly all of it): its first second, and what reads it."""

    utterance: Utterance
    number: int
    count: int
    start: float
    load: Callable[[], Tensor]

    @property
    def id(self) -> str:
        return self.utterance.id if self.number == 0 else f"{self.utterance.id}#{self.number}"


def segments_of(utterance: Utterance, longest: float) -> list[Segment]:
    """Return an utterance as segments of at most ``longest`` seconds, cut at quiet places.

    A short one is read here and now; a long one in windows, and its segments when they are asked for.

    Raises:
        InputError: it cannot be read.
    """
    if utterance.seconds <= longest or not utterance.apart:
        values = utterance.load()  # maybe longer than was said
        rate = rate_of(values)
        ranges = list(split_long(lambda first, last: values[first:last], rate, longest))
        loads = [lambda a=a, b=b: values[a:b] for a, b in ranges]
    else:
        rate = rate_of(utterance.load(0.0, 1.0))

        def read(first: int, last: int) -> Tensor:
            return utterance.load(first / rate, (last - first) / rate)

        ranges = list(split_long(read, rate, longest))
        loads = [lambda a=a, b=b: read(a, b) for a, b in ranges]
    return [
        Segment(utterance, number, len(ranges), first / rate, load)
        for number, ((first, _), load) in enumerate(zip(ranges, loads))
    ]


def rate_of(values: Tensor) -> int:
    """Return how many make a second: of features [T,80] or samples [N]."""
    return round(1 / FRAME_SHIFT) if values.dim() == 2 else SAMPLE_RATE


def split_long(
    read: Callable[[int, int], Tensor], rate: int, longest: float
) -> Iterator[tuple[int, int]]:
    """Yield the ranges into which features or samples are cut, each at most ``longest`` seconds.

    A cut is put at the quietest fifth of a second in the second half of the time allowed.

    Args:
        read: returns those from the first to before the last, fewer where they end.
        rate: so many are a second, see `rate_of`.
        longest: seconds.
    """
    limit, hop, start = max(int(longest * rate), 1), round(rate * FRAME_SHIFT), 0
    while True:
        first, last = (start + limit // 2) // hop, (start + limit) // hop
        begin = max(0, first - _SMOOTHED // 2)
        values = read(begin * hop, max((last + _SMOOTHED // 2) * hop, start + limit + 1))
        end = begin * hop + len(values)
        if end <= start + limit:
            yield start, end if len(values) else start + len(read(start, begin * hop))
            return
        loudness = values.mean(1) if values.dim() == 2 else _power(values, hop)
        smooth = torch.nn.functional.avg_pool1d(
            loudness[None, None], _SMOOTHED, stride=1, padding=_SMOOTHED // 2, count_include_pad=False
        )[0, 0, first - begin : last - begin]
        cut = (first + int(smooth.argmin())) * hop if len(smooth) else start + limit
        yield start, cut
        start = cut


def _power(samples: Tensor, hop: int) -> Tensor:
    return samples[: len(samples) // hop * hop].view(-1, hop).square().mean(1)


class Recognized:
    """The N-best lists of the segments that one method has decoded of a batch, and what they cost."""

    def __init__(self) -> None:
        self.segments: list[tuple[Segment, NBest]] = []
        self.cost: dict[str, float] = {}

    def add(self, segments: Sequence[Segment], nbests: Sequence[NBest], cost: Mapping[str, float]) -> None:
        """Take in lists and their cost."""
        self.segments += zip(segments, nbests)
        add_counters(self.cost, cost)

    def earlier_texts(self, segments: Sequence[Segment]) -> dict[str, str]:
        """Return the best text so far of the utterances of ``segments``, by the id of the segment."""
        texts: dict[str, list[str]] = {segment.utterance.id: [] for segment in segments if segment.number}
        for segment, nbest in self.segments:
            if segment.utterance.id in texts:
                texts[segment.utterance.id].append(nbest[0].text)
        return {s.id: " ".join(texts[s.utterance.id]) for s in segments if s.number}

    def drop(self, utterances: Container[str]) -> None:
        """Forget what was found of utterances: a segment of them could not be read."""
        self.segments = [
            (segment, nbest) for segment, nbest in self.segments if segment.utterance.id not in utterances
        ]

    def join(self) -> list[NBest]:
        """Return one list an utterance."""
        lists: dict[str, list[tuple[Segment, NBest]]] = {}
        for segment, nbest in self.segments:
            lists.setdefault(segment.utterance.id, []).append((segment, nbest))
        return [
            whole[0][1]
            if len(whole) == 1
            else join_parts(utterance, [nbest for _, nbest in whole], [segment.start for segment, _ in whole])
            for utterance, whole in lists.items()
        ]
