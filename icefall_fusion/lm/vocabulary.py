"""The tokens of a language model: which tokenizer its folder holds, what starts and ends a text.
Knows: tokenizers and files of a model folder. Must not know: weights, trees, search, fusion.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from icefall_fusion.common.files import PathLike
from icefall_fusion.text.tokens import AcousticTokens

PROBES = ("hello world", "the cat sat on the mat", "it's a long way", "Good morning, Mrs. Smith!")
SENTENCE_PIECE_FILES = ("tokenizer.model", "spiece.model")
TOKENIZER_FILES = (*SENTENCE_PIECE_FILES, "tokenizer.json", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class Vocabulary:
    """What a folder says about tokens.

    Args:
        tokenizer: Hugging Face tokenizer, or None.
        pieces: acoustic pieces (the folder has ``bpe.model``), or None.
        bos_id: start of a text, or None.
        eos_id: end of a text, or None.
    """

    tokenizer: Any = None
    pieces: Optional[AcousticTokens] = None
    bos_id: Optional[int] = None
    eos_id: Optional[int] = None

    @classmethod
    def load(cls, path_or_name: PathLike, config: Any) -> Vocabulary:
        """Read the tokens beside a model.

        Args:
            path_or_name: model folder or hub name.
            config: the model's config, whose bos and eos serve when the tokenizer names none.
        Raises:
            ValueError: the tokenizer contradicts the SentencePiece model beside it.
        """
        folder = Path(path_or_name)
        config = config.get_text_config(decoder=True)
        bos_id, eos_id = _first(config.bos_token_id), _first(config.eos_token_id)
        if (folder / "bpe.model").is_file():
            pieces = AcousticTokens.load(folder)
            mark = pieces.sos_eos_id
            return cls(None, pieces, bos_id if mark is None else mark, eos_id if mark is None else mark)
        if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
            return cls(None, None, bos_id, eos_id)
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path_or_name))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"the tokenizer of {path_or_name} cannot be loaded: {error}") from error
        _check_against_sentence_piece(folder, tokenizer)
        bos_id = bos_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        eos_id = eos_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        return cls(tokenizer, None, bos_id, eos_id)


def check_folder(name: str) -> None:
    """Raise FileNotFoundError when ``name`` lacks config.json, or looks like a path and is none."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"model folder must hold a config.json, but {name!r} does not")
    elif folder.exists() or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"model must be a folder or a hub name, but {name!r} is neither")


def _first(token: Any) -> Optional[int]:
    """Return an id that may be None, one number or a list of them."""
    return token[0] if isinstance(token, (list, tuple)) and token else token or (0 if token == 0 else None)


def _check_against_sentence_piece(folder: Path, tokenizer: Any) -> None:
    """Raise ValueError when the loaded tokenizer gives other ids than the SentencePiece model beside it.

    transformers 5 builds a tokenizer without the leading space from a folder that has ``tokenizer.model``
    alone: the first word of every text then gets ids that the model never saw.
    """
    files = [folder / name for name in SENTENCE_PIECE_FILES]
    files += [Path(getattr(tokenizer, "vocab_file", None) or folder / "none")]  # of a hub name: in its cache
    files = [file for file in files if file.suffix == ".model" and file.is_file()]
    if not files:
        return
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.Load(str(files[0]))
    except (OSError, RuntimeError):
        return  # not a SentencePiece model: other tokenizers use the same file name
    for text in PROBES:
        expected, found = processor.EncodeAsIds(text), tokenizer(text, add_special_tokens=False)["input_ids"]
        if expected != found:
            raise ValueError(
                f"tokenizer of {folder} must agree with its {files[0].name}, but {text!r} is "
                f"{tokenizer.convert_ids_to_tokens(found)} instead of {processor.EncodeAsPieces(text)}; "
                "put the model's own tokenizer.json beside it"
            )
