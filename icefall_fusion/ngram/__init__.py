"""N-grams over acoustic pieces, and over words.
Knows: ids of pieces and words, log-probs, ARPA files, KenLM. Must not know: searches.

- ``piece_ngram.py``: the model; scores tensors of contexts.
- ``vocabulary.py``: a list of words as an automaton over pieces.
- ``word_ngram.py``: n-grams over words, of KenLM or our own reader.
- ``arpa.py``: ARPA files, read and written.
- ``kneser_ney.py``: probabilities from counts (modified Kneser-Ney).
- ``pruning.py``: n-grams left out that tell little (entropy pruning).
- ``phrases.py``: phrases with boosts (hot words) as an automaton over the pieces.
"""
from __future__ import annotations

from icefall_fusion.ngram.piece_ngram import PieceNgram

__all__ = ["PieceNgram"]
