"""N-grams over acoustic pieces, read from ARPA files.
Knows: piece ids, log-probs. Must not know: searches, who estimates them.
"""
from __future__ import annotations

from icefall_fusion.ngram.piece_ngram import PieceNgram

__all__ = ["PieceNgram"]
