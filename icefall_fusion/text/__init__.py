"""Text: the normalizer, acoustic tokens, the lexicon.
Knows: words and pieces. Must not know: audio, models.
"""
from __future__ import annotations

from icefall_fusion.text.normalizer import adapt, normalize
from icefall_fusion.text.tokens import AcousticTokens

__all__ = ["AcousticTokens", "adapt", "normalize"]
