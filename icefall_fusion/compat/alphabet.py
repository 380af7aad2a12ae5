"""Labels of a CTC model in pyctcdecode's form, and the vocabulary that our search makes of them.
Knows: labels, their marks of words and blanks. Must not know: searches, language models.
"""
from __future__ import annotations

import json
import re
from typing import Sequence

from icefall_fusion.common.checks import check
from icefall_fusion.text.tokens import WORD_START, AcousticTokens

BPE_TOKEN, UNK_TOKEN, UNK_BPE_TOKEN = WORD_START, "⁇", "▁⁇▁"
BLANK_TOKEN_PTN = re.compile(r"^[<\[]pad[>\]]$", re.IGNORECASE)
UNK_TOKEN_PTN = re.compile(r"^[<\[]unk[>\]]$", re.IGNORECASE)
_MARK = re.compile(r"[<\[].+[>\]]")
_NO_WORD_START = "\x00"  # begins no label: all labels spell one word


class Alphabet:
    """The labels of a CTC model in one form: blank is "", the space is " ", BPE pieces begin with "▁"."""

    def __init__(self, labels: Sequence[str], is_bpe: bool) -> None:
        self._labels, self._is_bpe = list(labels), bool(is_bpe)

    @property
    def labels(self) -> list[str]:
        return list(self._labels)

    @property
    def is_bpe(self) -> bool:
        return self._is_bpe

    @classmethod
    def build_alphabet(cls, labels: Sequence[str]) -> Alphabet:
        """Bring labels into that form; a missing blank is put at the end.

        Raises:
            ValueError: labels are no texts, repeat, or BPE pieces hold a space.
        """
        good = isinstance(labels, Sequence) and not isinstance(labels, str)
        good = good and all(isinstance(label, str) for label in labels)
        check(good, "labels", "be a list of texts", labels)
        twice = sorted({label for label in labels if list(labels).count(label) > 1})
        check(not twice, "labels", "differ from one another", twice)
        is_bpe = any(label.startswith(("##", BPE_TOKEN)) for label in labels)
        odd = [label for label in labels if is_bpe and " " in label]
        check(not odd, "labels", "hold no space where they are BPE pieces", odd)
        named = list(labels)
        if any(label.startswith("##") for label in labels):
            named = [_from_word_pieces(label) for label in labels]
        if not is_bpe and "|" in named and " " not in named:
            named[named.index("|")] = " "
        named = ["" if BLANK_TOKEN_PTN.match(label) else label for label in named]
        if not is_bpe and "_" in named and "" not in named:
            named[named.index("_")] = ""
        named = [*named, *([] if "" in named else [""])]
        unknown = UNK_BPE_TOKEN if is_bpe else UNK_TOKEN
        named = [unknown if UNK_TOKEN_PTN.match(label) else label for label in named]
        check(len(set(named)) == len(named), "labels", "have one blank and one unknown label", labels)
        return cls(named, is_bpe)

    def dumps(self) -> str:
        """Return the alphabet as JSON."""
        return json.dumps({"labels": self._labels, "is_bpe": self._is_bpe})

    @classmethod
    def loads(cls, text: str) -> Alphabet:
        """Read what `dumps` writes.

        Raises:
            ValueError: it is something else.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"alphabet must be JSON: {error}") from error
        good = isinstance(values, dict) and set(values) == {"labels", "is_bpe"}
        check(good, "alphabet", "have the fields labels and is_bpe", values)
        return cls(values["labels"], values["is_bpe"])

    def tokens(self) -> AcousticTokens:
        """Return the vocabulary that a search wants: only spaces and marks part words, as in pyctcdecode."""
        blank = self._labels.index("") if "" in self._labels else -1
        check(blank >= 0, "labels", 'have a blank ("")', self._labels)
        pieces = ["<unk>" if label in (UNK_BPE_TOKEN, UNK_TOKEN) else label for label in self._labels]
        if self._is_bpe:
            return AcousticTokens.from_pieces(pieces, blank, BPE_TOKEN, unspaced=False)
        delimiter = " " if " " in pieces else None
        return AcousticTokens.from_pieces(pieces, blank, _NO_WORD_START, delimiter, unspaced=False)


def _from_word_pieces(label: str) -> str:
    """Return a piece of the style in which "##" goes on with a word in the style in which "▁" begins one."""
    if label.startswith("##"):
        return label[2:]
    return label if not label or _MARK.fullmatch(label) else BPE_TOKEN + label
