"""Where a segment of a stream ends: after silence, or when it is long.
Knows: which frames are silent. Must not know: search, language models, audio.
"""
from __future__ import annotations

from typing import Optional, Sequence

from icefall_fusion.streaming.options import EndpointOptions


class Endpoint:
    """Watches the frames of one segment; the result does not depend on how they are cut into blocks."""

    def __init__(self, options: Optional[EndpointOptions], frame_shift: float) -> None:
        self._options, self._shift = options, frame_shift
        self.frames = self.silent = 0
        self.spoke = False

    def find(self, silent: Sequence[bool]) -> Optional[int]:
        """Return how many of the next frames belong to the segment, None if it goes on after them."""
        for number, still in enumerate(silent, 1):
            self.frames += 1
            self.silent = self.silent + 1 if still else 0
            self.spoke |= not still
            if self._ends():
                return number
        return None

    def _ends(self) -> bool:
        options = self._options
        if options is None:
            return False
        limit = options.pause if self.spoke else options.silence
        return self._reached(limit, self.silent) or self._reached(options.longest, self.frames)

    def _reached(self, seconds: float, frames: int) -> bool:
        return seconds > 0 and frames * self._shift >= seconds - 1e-9
