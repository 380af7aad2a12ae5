"""Words and texts on which a tokenizer is checked: common words, and words made of the acoustic pieces.
Knows: the acoustic pieces. Must not know: tokenizers of language models, beams, trees, models.
"""
from __future__ import annotations

import random
from typing import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from icefall_fusion.text.tokens import AcousticTokens

#: Words that any check includes: short, long, doubled, with apostrophes.
COMMON_WORDS = (
    "the of and to a in that it is i i'm i'll it's don't won't o'clock he she was his with as for had you "
    "not be at on by which have or from this him but all were my are me one their so an said them we who "
    "would been will no when there if more out up into do any your what has man could other than our some "
    "very time upon about may its only now like little then can made should did us such great before must "
    "two these see know over much down after first mr good men own never most old shall day where those "
    "came 'tis thou'rt king's boys' jabberwocky antidisestablishmentarianism xylophone zzz aaa aa ab ba "
).split()
_WORDS_A_TEXT = 7
_MOST = 3000  # pieces that words are made of; larger vocabularies (of words, on lattices) are sampled


def sample_words(tokens: AcousticTokens, seed: int = 0) -> list[str]:
    """Return words made of the acoustic pieces: each piece alone, and random runs of two to four.

    Of more than 3,000 pieces a random sample is taken.

    Args:
        tokens: the acoustic vocabulary.
        seed: of the random runs.
    """
    special = {tokens.blank_id, tokens.sos_eos_id}
    ids = [i for i in range(tokens.size) if i not in special and not tokens.pieces[i].startswith("<")]
    chance = random.Random(seed)
    ids = chance.sample(ids, _MOST) if len(ids) > _MOST else ids
    runs = [[i] for i in ids] + [chance.choices(ids, k=chance.randint(2, 4)) for _ in ids]
    return sorted({word for run in runs for word in tokens.words(run)})


def sample_texts(words: Sequence[str]) -> list[list[str]]:
    """Return texts in which every word stands first, inside and last somewhere, in a fixed random order."""
    chance = random.Random(0)
    texts = []
    for _ in range(2):
        order = list(words)
        chance.shuffle(order)
        texts += [order[start : start + _WORDS_A_TEXT] for start in range(0, len(order), _WORDS_A_TEXT)]
    texts += [[word, word] for word in words]
    return texts
