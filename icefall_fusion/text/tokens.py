"""Pieces of the acoustic model: blank, sentence mark, which pieces start a word, text to ids and back.
Knows: SentencePiece models, lists of pieces, scripts. Must not know: transformers, torch, models, search.
"""
from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Optional, Sequence

from icefall_fusion.common.checks import check, check_text, is_count
from icefall_fusion.common.files import PathLike

WORD_START = "▁"
UNKNOWN_TEXT = "⁇"  # text of an unknown piece, SentencePiece's own sign
_BLANKS = ("<blk>", "<blank>", "<pad>", "[PAD]")
_SENTENCE_MARKS = ("<sos/eos>", "<s>", "</s>", "<sos>", "<eos>", "[CLS]", "[SEP]", "<pad>", "[PAD]")
_UNKNOWNS = ("<unk>", "[UNK]")


class AcousticTokens:
    """The vocabulary of a CTC model, blank included; use :meth:`load` or :meth:`from_pieces`.

    Attributes:
        pieces: the text of every id.
        size: V, blank included.
        blank_id: id of the blank.
        sos_eos_id: id that starts and ends a sentence for the attention decoder and piece LMs, or None.
        unk_id: id of the unknown piece, or None.
        starts_word: for every id, whether it begins a new word. A delimiter piece ("|") has no text and
            counts as starting the next word. A piece that begins with a character of a script without spaces
            (text/scripts.py) does: there every character closes the one before.
        word_start, delimiter: as given to `from_pieces`.
        processor: SentencePiece's, or None.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        blank_id: int,
        word_start: str,
        delimiter: Optional[str],
        processor: Any = None,
        unspaced: bool = True,
    ) -> None:
        check(isinstance(pieces, Sequence), "pieces", "be a sequence of text", type(pieces).__name__)
        check(len(pieces) >= 2, "pieces", "hold a blank and at least one more piece", len(pieces))
        for index, piece in enumerate(pieces):
            check_text(piece, f"pieces[{index}]")
        good = is_count(blank_id, 0) and blank_id < len(pieces)
        check(good, "blank_id", f"be in 0..{len(pieces) - 1}", blank_id)
        check_text(word_start, "word_start")
        duplicates = len(pieces) - len(set(pieces))
        check(duplicates == 0, "pieces", "differ from one another (duplicates)", duplicates)
        good = delimiter is None or (isinstance(delimiter, str) and delimiter in pieces)
        check(good, "delimiter", "be one of the pieces", delimiter)
        self.pieces: list[str] = list(pieces)
        self.size = len(self.pieces)
        self.blank_id = blank_id
        self.sos_eos_id = self._find(("<sos/eos>",))
        self.unk_id = self._find(_UNKNOWNS)
        self._ids = {piece: index for index, piece in enumerate(self.pieces)}
        self.delimiter = delimiter
        self._delimiter_id = None if delimiter is None else self._ids[delimiter]
        self.word_start = word_start
        self.processor = processor
        self._unspaced = unspaced
        silent = {blank_id, self._delimiter_id} | {self._ids.get(mark) for mark in _SENTENCE_MARKS}
        self._texts: list[str] = []  # text that each id adds to its word
        self.starts_word: list[bool] = []
        for index, piece in enumerate(self.pieces):
            starts = delimiter is None and index not in silent and piece.startswith(word_start)
            text = piece[len(word_start) :] if starts else piece
            if unspaced and index not in silent and not text.isascii():
                starts = starts or _scripts().begins_unit(text)
            text = "" if index in silent else UNKNOWN_TEXT if index == self.unk_id else text
            check(" " not in text, f"pieces[{index}]", "hold no space inside a word (see delimiter)", piece)
            self._texts.append(text)
            self.starts_word.append(index == self._delimiter_id or (starts and index != self.unk_id))
        self.has_text = [bool(text) for text in self._texts]
        self._longest = max(len(piece) for piece in self.pieces)
        marked = delimiter is None and any(piece.startswith(word_start) for piece in self.pieces)
        self._mark = word_start if marked else ""

    @classmethod
    def load(cls, path: PathLike) -> "AcousticTokens":
        """Read a vocabulary: a file, or the first of these in a folder.

        ``bpe.model`` or any ``.model`` file (SentencePiece), icefall's ``tokens.txt``, WeNet's ``units.txt``,
        Hugging Face's ``vocab.json``; without SentencePiece text is spelled by the longest pieces.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is no vocabulary, or has no blank piece.
        """
        path = Path(path)
        if path.suffix in (".txt", ".json") and path.is_file():
            from icefall_fusion.text.vocabularies import read_vocabulary

            return cls(*read_vocabulary(path, _BLANKS))
        if path.is_dir() and not (path / "bpe.model").is_file():
            from icefall_fusion.text.vocabularies import NAMES

            for name in NAMES:
                if (path / name).is_file():
                    return cls.load(path / name)
        path = path / "bpe.model" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"SentencePiece model not found: {str(path)!r}")
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{str(path)!r} must be a SentencePiece model, but is not: {error}") from error
        pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
        check(pieces[0] in _BLANKS, f"piece 0 of {str(path)!r}", f"be a blank, one of {_BLANKS}", pieces[0])
        return cls(pieces, 0, WORD_START, None, processor)

    @classmethod
    def from_pieces(
        cls,
        pieces: Sequence[str],
        blank_id: int,
        word_start: str = WORD_START,
        delimiter: Optional[str] = None,
        unspaced: bool = True,
    ) -> "AcousticTokens":
        """Make the vocabulary of any CTC model from its pieces in id order.

        Args:
            pieces: text of every id, blank included.
            blank_id: id of the CTC blank.
            word_start: prefix of the pieces that begin a word; empty: every piece is a word.
            delimiter: the piece between words ("|" in letter vocabularies); None: pieces say it themselves.
            unspaced: pieces of scripts without spaces begin words; False: only a mark or the delimiter does.

        Raises:
            ValueError: blank or delimiter is not in the vocabulary, or a piece is no text or repeats another.
        """
        return cls(pieces, blank_id, word_start, delimiter, unspaced=unspaced)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text of words with single spaces (none for an empty text).

        Spaces next to characters of scripts without spaces count as none.

        Raises:
            ValueError: a character is in no piece and there is no unknown piece.
        """
        runs = [text] if text.isascii() or not self._unspaced else _scripts().runs(text)
        if self.processor is not None:
            return self.processor.encode("".join(runs))
        ids: list[int] = []
        for run in runs:
            if self._unspaced and not run.isascii() and _scripts().begins_unit(run):
                ids.extend(self._encode_word(run))
                continue
            for number, word in enumerate(word for word in run.split(" ") if word):
                if number > 0 and self._delimiter_id is not None:
                    ids.append(self._delimiter_id)
                ids.extend(self._encode_word(self._mark + word))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids: words with single spaces; blanks and sentence marks are silent."""
        return " ".join(self.words(ids))

    def words(self, ids: Sequence[int], spans: Optional[Sequence[tuple[int, int]]] = None) -> list[str]:
        """Return the words that ids spell; ``spans`` are those of `word_spans`, where they are known."""
        texts, spans = self._texts, self.word_spans(ids) if spans is None else spans
        return ["".join([texts[index] for index in ids[start:stop]]) for start, stop in spans]

    def word_spans(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Return, for each word, its first piece and one past its last as positions in ``ids``.

        Words without text vanish; pieces without text at the edges of a word are outside its span,
        unless they start it.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        spans: list[tuple[int, int]] = []
        start = stop = -1  # of the word being read; stop is one past its last piece with text
        for position, index in enumerate(ids):
            if not 0 <= index < self.size:
                raise ValueError(f"ids must be in 0..{self.size - 1}, but ids[{position}] is {index!r}")
            if self.starts_word[index]:
                if stop > start:
                    spans.append((start, stop))
                start = stop = position if index != self._delimiter_id else -1
            if self._texts[index]:
                start = position if start < 0 else start
                stop = position + 1
        if stop > start:
            spans.append((start, stop))
        return spans

    def fingerprint(self) -> str:
        """Return the SHA-1 of the pieces, to tell vocabularies apart."""
        return hashlib.sha1("\n".join(self.pieces).encode("utf-8")).hexdigest()

    def _find(self, names: Sequence[str]) -> Optional[int]:
        return next((self.pieces.index(name) for name in names if name in self.pieces), None)

    def _encode_word(self, word: str) -> list[int]:
        """Spell a word with the longest piece at every position."""
        ids: list[int] = []
        position = 0
        while position < len(word):
            for length in range(min(self._longest, len(word) - position), 0, -1):
                index = self._ids.get(word[position : position + length])
                if index is not None:
                    break
            else:
                index, length = self.unk_id, 1
                check(index is not None, "text", "be spelled by the pieces (there is no unknown piece)", word)
            ids.append(index)
            position += length
        return ids


def _scripts() -> Any:
    """Return the module of scripts without spaces, which English text does without."""
    from icefall_fusion.text import scripts

    return scripts
