"""Log-mel features of audio that arrives in packets, equal to those of the whole.
Knows: samples, the extractor of `fbank.py`. Must not know: models, search, who sends the samples.
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.data.fbank import MARGIN, SHORTEST, extract_frames, num_frames
from icefall_fusion.data.features import DIM, HOP

REACH = 280  # samples to the right of a frame's first that it depends on
_LONGEST = 30_000  # frames made at once


class StreamingFbank:
    """Features of one stream at 16 kHz: `fbank.extract` of all samples, as soon as they are known.

    It holds the samples of frames that are not made yet, and those of a few frames before.

    Attributes:
        samples: number of samples so far.
        frames: number of frames that `take` has returned.
    """

    def __init__(self) -> None:
        self.samples = self.frames = 0
        self._begin = 0  # the first sample that is held
        self._held: list[np.ndarray] = []
        self._ended = False

    def accept(self, samples: np.ndarray) -> None:
        """Take in the next samples: float [n] in about [-1, 1], n may be 0.

        Raises:
            ValueError: not one channel, not finite, or the stream has ended.
        """
        check(not self._ended, "samples", "not come after the end of the stream", len(samples))
        samples = np.asarray(samples)
        check(samples.ndim == 1, "samples", "be one channel, [samples]", samples.shape)
        check(samples.dtype.kind == "f", "samples", "be floating point, in about [-1, 1]", samples.dtype)
        finite = bool(np.isfinite(samples).all())
        check(finite, "samples", "be finite numbers", "an array with NaN or infinity")
        if len(samples):
            self._held.append(samples.astype(np.float32))
            self.samples += len(samples)

    def end(self) -> None:
        """Note that no samples follow, so that the last frames are known."""
        self._ended = True

    @property
    def ready(self) -> int:
        """Frames that are known and that `take` has not returned."""
        known = num_frames(self.samples) if self._ended else max(0, (self.samples - REACH) // HOP + 1)
        return max(0, known - self.frames)

    def take(self, count: int) -> Tensor:
        """Return the next ``count`` frames [count, 80], at most `ready`."""
        check(0 <= count <= self.ready, "count", f"be in 0..{self.ready}", count)
        parts = [self._make(min(_LONGEST, count - done)) for done in range(0, count, _LONGEST)]
        return torch.cat(parts) if parts else torch.zeros(0, DIM)

    def _make(self, count: int) -> Tensor:
        held = np.concatenate(self._held)
        first = max(self.frames - MARGIN, 0)  # frames at the edge of a piece are not those of the whole
        last = (self.frames + count + MARGIN) * HOP
        piece = held[first * HOP - self._begin : last - self._begin]
        if self._ended and self.samples < SHORTEST:
            piece = np.pad(piece, (0, SHORTEST - len(piece)))
        made = extract_frames(piece)[self.frames - first :][:count]
        self.frames += count
        begin = max(self.frames - MARGIN, 0) * HOP
        self._held, self._begin = [held[begin - self._begin :].copy()], begin
        return made
