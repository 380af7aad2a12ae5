"""Utterances are cut into segments that are decoded at once; the lists of all segments are joined.
Knows: utterances, N-best lists. Must not know: models, searches, files of a run.

Of a long utterance one window or segment is held at a time.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Callable, Container, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from icefall_fusion.common.counters import add_counters
from icefall_fusion.data.audio import SAMPLE_RATE
from icefall_fusion.data.features import FRAME_SHIFT
from icefall_fusion.decode.utterances import Utterance
from icefall_fusion.nbest import Hypothesis, NBest

_SMOOTHED = 20  # frames whose mean loudness decides where to cut


@dataclass
class Segment:
    """One of ``count`` segments of an utterance (mostly one): the second it starts at; ``load`` reads it."""

    utterance: Utterance
    number: int
    count: int
    start: float
    load: Callable[[], Tensor]

    @property
    def id(self) -> str:
        return self.utterance.id if self.number == 0 else f"{self.utterance.id}#{self.number}"


def segments_of(utterance: Utterance, longest: float) -> list[Segment]:
    """Return an utterance as segments of at most ``longest`` seconds, cut at quiet points.

    A short utterance is read at once, a long one in windows, and its segments by their ``load``.

    Raises:
        InputError: it cannot be read.
    """
    if utterance.seconds <= longest or not utterance.apart:
        values = utterance.load()  # maybe longer than its manifest says
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
    """Return the number of features [T,80] or samples [N] in a second."""
    return round(1 / FRAME_SHIFT) if values.dim() == 2 else SAMPLE_RATE


def split_long(
    read: Callable[[int, int], Tensor], rate: int, longest: float
) -> Iterator[tuple[int, int]]:
    """Yield the ranges into which features or samples are cut, each at most ``longest`` seconds.

    A segment ends in the quietest fifth of a second of the second half of the longest one possible.

    Args:
        read: returns those from the first to before the last, fewer where they end.
        rate: see `rate_of`.
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
    """The N-best lists of the segments of a batch by one method, and their cost."""

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
        """Remove the lists of utterances of which a segment could not be read."""
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
            else join_segments(utterance, [nbest for _, nbest in whole], [s.start for s, _ in whole])
            for utterance, whole in lists.items()
        ]


def join_segments(utterance: str, nbests: Sequence[NBest], starts: Sequence[float]) -> NBest:
    """Return the N-best list of an utterance that was decoded in segments.

    Rank k joins the k-th hypotheses of all segments (the last where a segment has fewer); scores add up.

    Args:
        utterance: its id.
        nbests: of the segments in order of time; each has at least one hypothesis.
        starts: second at which each segment starts.
    """
    ranks = range(max(map(len, nbests)))
    hypotheses = [_join([nbest[min(rank, len(nbest) - 1)] for nbest in nbests], starts) for rank in ranks]
    return NBest(utterance, hypotheses, dict(nbests[0].weights))


def _join(segments: Sequence[Hypothesis], starts: Sequence[float]) -> Hypothesis:
    return Hypothesis(
        tokens=[token for segment in segments for token in segment.tokens],
        text=" ".join(segment.text for segment in segments if segment.text),
        scores={source: sum(s.scores[source] for s in segments) for source in segments[0].scores},
        times=[
            replace(time, start=time.start + start, end=time.end + start)
            for segment, start in zip(segments, starts)
            for time in segment.times
        ],
    )
