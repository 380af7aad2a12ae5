"""How much of the closed words a language model is shown where words have no spaces between them.
Knows: words, tokenizers and their vocabularies. Must not know: beams, trees, models, scores.

The paper (arXiv 2501.09258, section 3) closes a word when the next one begins. In Chinese every character is
a word then, and a tokenizer that joins characters has other tokens for the text when the next one comes: the
score of the shorter text was that of tokens which the longer one does not have. The other rules hold back the
last characters until that cannot happen, or until a segmenter sees a new word. All words are shown at the end
of the utterance, so the final score is the same under every rule.
"""
from __future__ import annotations

import logging
from typing import Any, Iterable, Optional, Sequence

from icefall_fusion.common.checks import check, check_choice
from icefall_fusion.fusion.retokenize import WordTokenizer
from icefall_fusion.text.styles import adapt

#: ``words``: all closed words (each character of a script without spaces is one). ``tokens``: those tokens
#: that no further text can change. ``jieba``: the words that the package jieba sees, but for the last one.
BOUNDARIES = ("words", "tokens", "jieba")


class HoldingTokenizer(WordTokenizer):
    """Words -> token ids, of which those of the last words may be held back.

    Where the tokenizer goes word by word, closed words never change and none is held back.

    Args:
        tokenizer, style, strict: see `WordTokenizer`.
        boundaries: ``tokens`` or ``jieba``.

    Raises:
        ValueError: the rule is unknown, or needs a package or a tokenizer that is not there.
    """

    def __init__(self, tokenizer: Any, style: str, boundaries: str, strict: bool = True) -> None:
        check_choice(boundaries, BOUNDARIES[1:], "boundaries")
        self._rule = boundaries
        self._crossing: Optional[Crossing] = None
        self._told = False
        super().__init__(tokenizer, style, strict=strict)
        if boundaries == "tokens":
            rule = "have a vocabulary of tokens for boundaries 'tokens'"
            check(not self._acoustic, "language model's tokenizer", rule, type(tokenizer).__name__)
            self._crossing = Crossing(tokenizer.get_vocab())
        elif boundaries == "jieba":
            _jieba()

    def encode_closed(self, words: Sequence[str], prompted: bool = False) -> tuple[list[int], int]:
        """Return the ids of what is shown of closed words, and how many words that is.

        Raises:
            ValueError: the tokenizer cannot spell a word.
        """
        if self._crossing is None:
            shown = _whole_words(words, self._style_text(words), _segmented(self._style_text(words)))
            return self.encode_whole(words[:shown], prompted), shown
        ids = self.encode_whole(words, prompted)
        spelled = [self._crossing.spelling(name) for name in self._tokenizer.convert_ids_to_tokens(ids)]
        text = self._style_text(words).encode("utf-8")
        whole = b"".join(spelled)
        if whole.lstrip(b" ") != text:
            if not self._told:
                self._told = True
                logging.warning("boundaries 'tokens' need a tokenizer that keeps its text; %r is shown whole",
                                text.decode("utf-8")[:40])
            return ids, len(words)
        safe = self._crossing.safe_part(whole)
        count, length = 0, 0
        while count < len(ids) and length + len(spelled[count]) <= safe:
            length += len(spelled[count])
            count += 1
        shown = whole[:length].lstrip(b" ").decode("utf-8", errors="ignore")
        return ids[:count], _whole_words(words, self._style_text(words), len(shown))

    def _style_text(self, words: Sequence[str]) -> str:
        return adapt(words, self.style)


class Crossing:
    """Tells where the tokens of a text can no longer change.

    A byte-pair or unigram tokenizer makes a token over a place only if the token is an entry of its
    vocabulary. So a place is safe if no entry fits over it: none that the text has there, and none that the
    text may have when it goes on.

    Args:
        entries: of the vocabulary; byte-level ("Ġthe") or with "▁" for a space.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        entries = list(entries)
        # Byte-level BPE has no "▁" but inside of marks, as DeepSeek's <｜begin▁of▁sentence｜>.
        self._byte_level = not any(entry.startswith("▁") for entry in entries)
        self._entries = {spelled for spelled in map(self.spelling, entries) if len(spelled) > 1}
        self._begun = {entry[:length] for entry in self._entries for length in range(1, len(entry))}

    def spelling(self, entry: str) -> bytes:
        """Return the bytes of a token."""
        if self._byte_level and all(letter in _BYTE_OF for letter in entry):
            return bytes([_BYTE_OF[letter] for letter in entry])
        if len(entry) == 6 and entry.startswith("<0x") and entry.endswith(">"):
            return bytes([int(entry[3:5], 16)])
        return entry.replace("▁", " ").encode("utf-8")

    def safe_part(self, text: bytes) -> int:
        """Return the last place of a text that no token can cross, whatever follows; 0 if there is none."""
        end = len(text)
        reaches = []  # of each place: how far an entry that begins there reaches; beyond the end: any way
        for start in range(end):
            stop, reach = start + 1, start + 1
            while stop <= end:
                part = text[start:stop]
                if part in self._entries:
                    reach = stop
                if part not in self._begun:
                    break
                stop += 1
            reaches.append(end + 1 if stop > end else reach)
        safe, furthest = 0, 0
        for place in range(end + 1):
            if furthest <= place:
                safe = place
            if place < end:
                furthest = max(furthest, reaches[place])
        return safe


def _byte_letters() -> dict[str, int]:
    """Return the byte of each letter of byte-level BPE (GPT-2): printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return {**letters, **{chr(256 + number): byte for number, byte in enumerate(others)}}


_BYTE_OF = _byte_letters()


def _whole_words(words: Sequence[str], text: str, length: int) -> int:
    """Return how many words the first ``length`` characters of their text hold whole."""
    shown, at = 0, 0
    for word in words:
        at += at < len(text) and at > 0 and text[at] == " "
        at += len(word)
        if at > length:
            break
        shown += 1
    return shown


def _segmented(text: str) -> int:
    """Return the characters of all segments but the last."""
    segments = _jieba().lcut(text)
    return len(text) - len(segments[-1]) if segments else 0


def _jieba() -> Any:
    try:
        import jieba
    except ImportError as error:
        raise ValueError("boundaries 'jieba' need the package jieba: pip install jieba") from error
    jieba.setLogLevel(logging.WARNING)
    return jieba
