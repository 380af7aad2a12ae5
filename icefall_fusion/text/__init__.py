"""Text: words, their spellings by acoustic pieces, the forms that language models read.
Knows: words and pieces. Must not know: audio, models.

    language.py     what depends on the language: normalizer, words or characters, joining
    normalizer.py   written English to spoken words, for references and hypotheses alike
    spanish.py      the same of Spanish
    mandarin.py     the same of Mandarin
    any_script.py   the same of all other languages, by Unicode categories
    scripts.py      scripts without spaces: joining words, splitting text
    styles.py       words as a language model reads them: as-is, lower, sentence
    tokens.py       pieces of an acoustic model: which begin a word, text to ids and back
    vocabularies.py the same of tokens.txt, units.txt and vocab.json
    lexicon.py      words and their spellings, for decoding graphs
    word_times.py   when a word sounds, from the frames in which a CTC model marks it
"""
from __future__ import annotations
