"""When delayed fusion scores: each frame, every N frames, when the shortest hypothesis grew, at the end.
Knows: stop rules. Must not know: LMs, tokenizers, scores.

A trigger is a value without state: `start` opens one run over one batch. The condition is each utterance's
own (Hori et al. 2025, section 3), so that no result depends on what else is in the batch.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from icefall_fusion.common.checks import check, check_choice, is_count, is_number
from icefall_fusion.search.fusion import StopRule
from icefall_fusion.search.stop_rule import StopRuleRun

if TYPE_CHECKING:
    from icefall_fusion.search.beam import Beam


def frames_of(milliseconds: float, frame_shift: float = 0.04) -> int:
    """Return a time in frames (for ``frames``, ``every`` and ``late``), at least 1, rounded.

    Raises:
        ValueError: the time or the frame shift (seconds) is no number above 0.
    """
    for name, value in (("milliseconds", milliseconds), ("frame_shift", frame_shift)):
        check(is_number(value) and value > 0, name, "be a number above 0", value)
    return max(1, round(milliseconds / 1000 / frame_shift))


class Trigger:
    """A fusion condition; see the subclasses.

    Another condition: override `start` and return a `StopRuleRun` of your own with other ``advance`` and
    ``fires``, and ``rule = None`` (it is then asked after every frame).
    """

    def rule(self) -> StopRule:
        """Return the condition as a value that every engine can evaluate."""
        raise NotImplementedError

    def start(self, beam: Beam, tokens: Any) -> StopRuleRun:
        """Open a run over a batch that begins; ``tokens`` is the acoustic vocabulary."""
        return StopRuleRun(self.rule(), beam)


@dataclass(frozen=True)
class FixedInterval(Trigger):
    """Fuse after every ``frames`` encoder output frames (Hori et al. 2025, section 3, "fixed-interval").

    Args:
        frames: an integer, at least 1; at 40 ms a frame, 16 is 0.64 s.
    """

    frames: int = 16

    def __post_init__(self) -> None:
        check(is_count(self.frames), "FixedInterval.frames", "be an integer, at least 1", self.frames)

    @classmethod
    def of_time(cls, milliseconds: float, frame_shift: float = 0.04) -> FixedInterval:
        """Return the trigger of an interval of time; ``frame_shift`` is in seconds."""
        return cls(frames_of(milliseconds, frame_shift))

    def rule(self) -> StopRule:
        return StopRule(self.frames)


@dataclass(frozen=True)
class EveryFrame(FixedInterval):
    """Fuse after every frame: words are scored as soon as they are closed; the most costly trigger."""

    frames: int = 1

    def __post_init__(self) -> None:
        check(self.frames == 1, "EveryFrame.frames", "be 1 (take FixedInterval for more)", self.frames)


@dataclass(frozen=True)
class AtEnd(Trigger):
    """Never fuse before the utterance ends: the same as rescoring the final beam."""

    def rule(self) -> StopRule:
        return StopRule(0)


@dataclass(frozen=True)
class ShortestHypothesis(Trigger):
    """Fuse when the shortest live hypothesis has grown since the last fusion (Hori et al. 2025, section 3).

    Every hypothesis then has a new word, so that scored and unscored words compete for at most one word. The
    length to beat only rises: if a shorter hypothesis becomes the shortest, it must outgrow the length of
    the last fusion first.

    Args:
        unit: ``words``: closed words, what the LM can score; ``pieces``: acoustic pieces, as in a search
            whose LM shares the vocabulary (fires more often).
        every: frames between two looks, an integer, at least 1. The utterances of a large batch then fuse in
            the same frames: fewer and larger calls of the LM, each at most ``every - 1`` frames late.
    """

    unit: str = "words"
    every: int = 1

    def __post_init__(self) -> None:
        check(is_count(self.every), "ShortestHypothesis.every", "be an integer, at least 1", self.every)
        check_choice(self.unit, ("words", "pieces"), "ShortestHypothesis.unit")

    def rule(self) -> StopRule:
        return StopRule(self.every, self.unit)
