"""A lexicon that gives each word its pieces: read from a file; it guides a search and names its words.
Knows: lexicon files, pieces, automata. Must not know: searches, language models, whose calls they are.
"""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Optional, Sequence, Union

from icefall_fusion.common.checks import check
from icefall_fusion.ngram.vocabulary import WordAutomaton
from icefall_fusion.text.tokens import WORD_START, AcousticTokens

Spellings = Sequence["tuple[str, Sequence[str]]"]


def read_lexicon(path: Union[str, os.PathLike]) -> list[tuple[str, list[str]]]:
    """Read lines of a word and the pieces that spell it, separated by white space; a word may come again.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a word has no spelling (with its line), there are no words, or the file is no UTF-8 text.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no lexicon at {path}")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        word, *spelling = line.split() or [""]
        check(not word or bool(spelling), f"{path}:{number}", "have a spelling after the word", line)
        if word:
            found.append((word, spelling))
    check(bool(found), f"the lexicon {path}", "have at least one word", 0)
    return found


class LexiconTokens(AcousticTokens):
    """An acoustic vocabulary whose words are those of a lexicon, by their spellings.

    Of several words with one spelling the first one counts.

    Args:
        tokens: the pieces; words end with the piece ``silence`` or begin with "▁".
        spellings: words and their pieces.
        silence: between words; None: there is none.

    Raises:
        ValueError: a spelling holds no known piece, is empty, or does not tell where a word begins or ends.
    """

    def __init__(self, tokens: AcousticTokens, spellings: Spellings, silence: Optional[str]) -> None:
        super().__init__(tokens.pieces, tokens.blank_id, tokens.word_start, tokens.delimiter)
        self._by_spelling: dict[tuple[int, ...], str] = {}
        for word, spelling in spellings:
            spoken = list(spelling[:-1] if spelling and spelling[-1] == silence else spelling)
            check(bool(spoken), f"the lexicon word {word!r}", "have a spelling", list(spelling))
            strange = [piece for piece in spoken if piece not in self._ids]
            check(not strange, f"the spelling of {word!r}", "hold pieces of the vocabulary only", strange)
            ids = tuple(self._ids[piece] for piece in spoken)
            if silence is not None:
                rule, good = f"end with {silence!r} and hold it nowhere else", len(spoken) < len(spelling)
            else:
                rule, good = f"begin with a piece in {WORD_START!r}", self.starts_word[ids[0]]
                rule += " and have no other such piece"
            good = good and not any(self.starts_word[one] for one in ids[silence is None :])
            good = good and self.blank_id not in ids
            check(good, f"the spelling of {word!r}", rule, " ".join(spelling))
            self._by_spelling.setdefault(ids, word)

    def words(self, ids: Sequence[int], spans: Optional[Sequence[tuple[int, int]]] = None) -> list[str]:
        """Return the words that ids spell; what is in no spelling is written as its pieces."""
        spans = self.word_spans(ids) if spans is None else spans
        plain = super().words(ids, spans)
        spelled = [tuple(ids[start:stop]) for start, stop in spans]
        return [self._by_spelling.get(spelling, text) for spelling, text in zip(spelled, plain)]

    def automaton(self, oov_score: float) -> WordAutomaton:
        """Return the words as an automaton over the pieces; see `WordAutomaton`."""
        letters: list[Any] = [(piece,) for piece in range(self.size)]
        letters[self.blank_id] = None
        if self.delimiter is not None:
            letters[self._ids[self.delimiter]] = ()
        return WordAutomaton(list(self._by_spelling), letters, self.starts_word, oov_score)
