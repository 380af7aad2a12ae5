"""N-grams over acoustic pieces.
Knows: piece ids, log-probs, ARPA files. Must not know: searches.

- ``piece_ngram.py``: the model; scores tensors of contexts.
- ``arpa.py``: ARPA files, read and written.
- ``kneser_ney.py``: probabilities from counts (modified Kneser-Ney).
"""
from __future__ import annotations

from icefall_fusion.ngram.piece_ngram import PieceNgram

__all__ = ["PieceNgram"]
