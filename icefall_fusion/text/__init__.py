"""Text: words, their spellings by acoustic pieces, the forms that language models read.
Knows: words and pieces. Must not know: audio, models.

    normalizer.py   written text to spoken words, for references and hypotheses alike
    styles.py       words as a language model reads them: as-is, lower, sentence
    tokens.py       pieces of an acoustic model: which begin a word, text to ids and back
    lexicon.py      words and their spellings, for decoding graphs
    word_times.py   when a word sounds, from the frames in which a CTC model marks it
"""
from __future__ import annotations
