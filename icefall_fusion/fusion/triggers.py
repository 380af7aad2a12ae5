"""When delayed fusion scores: each frame, every N frames, when the shortest hypothesis grew, at the end.
Knows: frames, live hypotheses and how many words each has closed. Must not know: LMs, tokenizers, scores.

A trigger is a value without state: `start` opens one run over one batch. The condition is each utterance's
own (Hori et al. 2025, section 3), so that no result depends on what else is in the batch.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

import torch

from icefall_fusion.common.checks import check, check_choice
from icefall_fusion.search.stop_rule import Pace

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.search.beam import Beam


class Trigger:
    """A fusion condition; see the subclasses."""

    def __init_subclass__(cls, **more: Any) -> None:
        """Forget the pace of a class whose condition is another one now."""
        super().__init_subclass__(**more)
        if {"fires", "start"} & vars(cls).keys() and "pace" not in vars(cls):
            cls.pace = Trigger.pace

    def start(self, beam: Beam, tokens: Any) -> TriggerRun:
        """Open a run over a batch that begins; ``tokens`` is the acoustic vocabulary."""
        raise NotImplementedError

    def pace(self) -> Optional[Pace]:
        """Return the condition as a pace, for a search that looks at it itself; None: it must ask the run."""
        return None


class TriggerRun:
    """A fusion condition watching one batch, asked once a frame."""

    def advance(self, beam: Beam, source: Tensor, grew: Tensor) -> None:
        """Follow prune and re-order (see ``Fusion.advance``)."""

    def fires(self, beam: Beam, frame: int, active: Tensor) -> Optional[Tensor]:
        """Return the utterances that fuse now, bool [B], or None for surely none (costs no device sync).

        Args:
            beam: after this frame's pruning.
            frame: index of the encoder output frame, from 0.
            active: bool [B], the utterances that have not ended.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FixedInterval(Trigger, TriggerRun):
    """Fuse after every ``frames`` encoder output frames (Hori et al. 2025, section 3, "fixed-interval").

    Args:
        frames: at least 1; at 40 ms a frame, 16 is 0.64 s.
    """

    frames: int = 16

    def __post_init__(self) -> None:
        check(self.frames >= 1, "FixedInterval.frames", "be at least 1", self.frames)

    def start(self, beam: Beam, tokens: Any) -> TriggerRun:
        return self

    def pace(self) -> Optional[Pace]:
        return Pace(self.frames)

    def fires(self, beam: Beam, frame: int, active: Tensor) -> Optional[Tensor]:
        return active if (frame + 1) % self.frames == 0 else None


@dataclass(frozen=True)
class EveryFrame(FixedInterval):
    """Fuse after every frame: words are scored as soon as they are closed; the dearest condition."""

    frames: int = 1

    def __post_init__(self) -> None:
        check(self.frames == 1, "EveryFrame.frames", "be 1 (take FixedInterval for more)", self.frames)


@dataclass(frozen=True)
class AtEnd(Trigger, TriggerRun):
    """Never fuse before the utterance ends: the same as rescoring the final beam."""

    def start(self, beam: Beam, tokens: Any) -> TriggerRun:
        return self

    def pace(self) -> Optional[Pace]:
        return Pace(0)

    def fires(self, beam: Beam, frame: int, active: Tensor) -> Optional[Tensor]:
        return None


@dataclass(frozen=True)
class ShortestHypothesis(Trigger):
    """Fuse when the shortest live hypothesis has grown since the last fusion (Hori et al. 2025, section 3).

    Every hypothesis has then something new to be scored, so that scored and unscored words never compete
    for longer than one word. The mark only rises: a beam whose shortest hypothesis was replaced by a
    shorter one fuses when that has outgrown the length of the last fusion.

    Args:
        unit: ``words``: closed words, what the LM can score; ``pieces``: acoustic pieces, as in a search
            whose LM shares the vocabulary (fires more often, mostly for the longer hypotheses' sake).
        every: look only after every so many frames, at least 1. The utterances of a large batch then fuse
            in the same frames, in fewer and larger calls of the LM, each at most ``every - 1`` frames late.
    """

    unit: str = "words"
    every: int = 1

    def __post_init__(self) -> None:
        check(self.every >= 1, "ShortestHypothesis.every", "be at least 1", self.every)
        check_choice(self.unit, ("words", "pieces"), "ShortestHypothesis.unit")

    def start(self, beam: Beam, tokens: Any) -> TriggerRun:
        return _ShortestRun(beam, tokens if self.unit == "words" else None, self.every)

    def pace(self) -> Optional[Pace]:
        return Pace(self.every, self.unit)


class _ShortestRun(TriggerRun):
    """Counts the words (or pieces) of every hypothesis; a few small gathers a frame."""

    def __init__(self, beam: Beam, tokens: Any, every: int) -> None:
        device = beam.node.device
        self._every = every
        self._starts = None if tokens is None else torch.tensor(tokens.starts_word, device=device)
        self._begun = torch.zeros_like(beam.node)  # [B, K] words or pieces begun, the open one included
        # With one word begun none is closed. A piece is closed as soon as it is there.
        first = 0 if tokens is None else 1
        # [B] length of the shortest hypothesis at the last event
        self._fused_at = torch.full_like(self._begun[:, 0], first)

    def advance(self, beam: Beam, source: Tensor, grew: Tensor) -> None:
        begun = self._begun.gather(1, source)
        if self._starts is not None:
            # The first piece begins a word, whether it is marked so or not.
            grew = grew & (self._starts[beam.last] | (begun == 0))
        self._begun = begun + grew

    def fires(self, beam: Beam, frame: int, active: Tensor) -> Optional[Tensor]:
        if (frame + 1) % self._every:
            return None
        alive = beam.alive
        longest = self._begun.amax(1, keepdim=True)
        shortest = torch.where(alive, self._begun, longest).amin(1)
        fires = active & (shortest > self._fused_at) & alive.any(1)
        if not bool(fires.any()):  # the one synchronization with the device
            return None
        self._fused_at = torch.where(fires, shortest, self._fused_at)
        return fires
