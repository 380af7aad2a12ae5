"""Options of the prefix beam search.
Knows: names and ranges. Must not know: how it is searched.
"""
from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Optional

from icefall_fusion.common.checks import check, check_choice

ENGINES = ("auto", "native", "triton", "torch")


@dataclass(frozen=True)
class PrefixSearchOptions:
    """Options of the prefix beam search. The defaults are exact, given the beam.

    Args:
        beam: prefixes kept per utterance (K).
        top_pieces: only this many best pieces of a frame may extend a prefix; none: all (exact, no slower).
        score_beam: prefixes that score this many nats less than the best are dropped; none: no limit.
        blank_skip: frames whose blank probability exceeds this are taken as pure blank (a piece may repeat
            after them); between 0.5 and 1; none: no frame is skipped. 0.999 is harmless and faster.
        recover_mass: keep the forward masses of pruned children of live prefixes and give them back when such
            a prefix is born again: closer to the true probability, slower.
        nbest: hypotheses returned; none: all of the beam.
        frame_shift: seconds per frame, for word times.
        word_times: whether hypotheses carry word times.
        engine: native: compiled code, for a CPU and without shallow fusion but that of an n-gram (built by a
            C++ compiler on first use); triton: one kernel, for a GPU, as native but without recovered mass, a
            beam above 62, or two n-grams (shallow fusion and look-ahead); torch: tensors, for every device
            and fusion; auto: native or triton where it can be had and serves, else torch. All find the same.
    """

    beam: int = 10
    top_pieces: Optional[int] = None
    score_beam: Optional[float] = None
    blank_skip: Optional[float] = None
    recover_mass: bool = False
    nbest: Optional[int] = None
    frame_shift: float = 0.04
    word_times: bool = True
    engine: str = "auto"

    def __post_init__(self) -> None:
        name = "PrefixSearchOptions."
        check(_counts(self.beam), name + "beam", "be an integer, at least 1", self.beam)
        for field in ("top_pieces", "nbest"):
            value = getattr(self, field)
            check(value is None or _counts(value), name + field, "be none or an integer, at least 1", value)
        check(self.score_beam is None or self.score_beam > 0, name + "score_beam", "be none or above 0",
              self.score_beam)
        check(self.blank_skip is None or 0.5 <= self.blank_skip <= 1, name + "blank_skip",
              "be none or between 0.5 and 1", self.blank_skip)
        check(self.frame_shift > 0, name + "frame_shift", "be above 0 seconds", self.frame_shift)
        check_choice(self.engine, ENGINES, name + "engine")

    def most_columns(self, pieces: int) -> int:
        """Return how many of V = ``pieces`` may extend a prefix in a frame, blank left out."""
        return pieces - 1 if self.top_pieces is None else min(self.top_pieces, pieces - 1)


def _counts(value: object) -> bool:
    return isinstance(value, Integral) and value >= 1
