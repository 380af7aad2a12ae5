"""Token streams for language models: documents of consecutive utterances, normalized and cased.
Knows: utterance files, the two vocabularies. Must not know: audio, acoustic models, language models.
"""
from __future__ import annotations

import functools
import itertools
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
from tqdm import tqdm

from icefall_fusion.common.checks import check, check_at_least, check_choice
from icefall_fusion.common.files import atomic_path, write_json
from icefall_fusion.common.workers import in_workers
from icefall_fusion.data.books import read_jsonl
from icefall_fusion.text.scripts import join_words, split_units

STREAMS = ("nlm", "llm", "matched_llm")


@dataclass(frozen=True)
class Documents:
    """Tokenized documents laid end to end.

    Args:
        tokens: uint16, ``bos ... eos`` of one document after the other.
        lengths: tokens of each document, bos and eos included.
        words: words of all documents.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    words: int


@dataclass(frozen=True)
class LmTextOptions:
    """Options of ``prepare-lm-text``.

    Args:
        data_dir: has ``text/*.jsonl`` and both vocabularies; ``lm/{nlm,llm,matched_llm}/*.npy`` is written.
        pieces: size of the acoustic vocabulary (names its folder).
        spoken_train: utterances of the NLM: those of the acoustic training audio (JSON lines, in data_dir).
        spoken_dev: the NLM's dev utterances (JSON lines, in data_dir).
        streams: which are made, of nlm, llm and matched_llm.
        max_group: longest document, in consecutive utterances; half of the documents are one utterance.
        cased_share: share of the training books' documents that the LLM also sees as printed, with case and
            punctuation (0 to 1). The normalized copy is always whole.
        seed: of groups and order.
        workers: processes; the result does not depend on it.
    """

    data_dir: str = "data"
    pieces: int = 500
    spoken_train: str = "text/selected_train.jsonl"
    spoken_dev: str = "text/selected_dev.jsonl"
    streams: tuple[str, ...] = STREAMS
    max_group: int = 8
    cased_share: float = 1.0
    seed: int = 17
    workers: int = 2

    def __post_init__(self) -> None:
        check(len(self.streams) > 0, "LmTextOptions.streams", "name one at least", self.streams)
        for name in self.streams:
            check_choice(name, STREAMS, "LmTextOptions.streams")
        check_at_least(2, self, "max_group")
        share = self.cased_share
        check(0.0 <= share <= 1.0, "LmTextOptions.cased_share", "be between 0 and 1", share)
        check_at_least(1, self, "workers")


def run(options: LmTextOptions) -> int:
    """Write a token stream of train and dev each (and ``llm/dev_cased``) and their counts; return 0.

    The dev streams of llm and matched_llm are the same normalized documents: losses per word compare.

    Raises:
        FileNotFoundError: utterances or vocabularies are not there.
    """
    root = Path(options.data_dir)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core already
    for split, spoken in (("train", options.spoken_train), ("dev", options.spoken_dev)):
        if "nlm" in options.streams:
            tokenize = piece_tokenizer(root / f"lang_bpe_{options.pieces}")
            documents = [tokenize(texts) for texts in _texts(root / spoken)]
            _write_stream(root / "lm" / "nlm" / split, documents, options.seed)
        if set(options.streams) - {"nlm"}:
            _write_book_streams(root, split, options)
    return 0


def _texts(path: Path, most: int = 100_000) -> Iterator[list[str]]:
    """Yield the texts of a file of utterances, some at a time: in memory they are 20 times their tokens."""
    bar = tqdm(read_jsonl(path, ("text",)), unit="utt", desc=f"tokenize {path.stem}")
    rows = (row["text"] for row in bar)
    while texts := list(itertools.islice(rows, most)):
        yield texts


def _write_book_streams(root: Path, split: str, options: LmTextOptions) -> None:
    parts: dict[str, list[Documents]] = {"normalized": [], "cased": [], "pieces": []}
    books = _books(root / "text" / f"{split}.jsonl")
    tokenized = in_workers(_BookTokenizer(options, split), books, options.workers)
    for streams in tqdm(tokenized, desc=f"tokenize {split}", unit="book"):
        for name, documents in streams.items():
            parts[name].append(documents)
    folder = root / "lm"
    if "matched_llm" in options.streams:
        _write_stream(folder / "matched_llm" / split, parts["pieces"], options.seed)
    if "llm" not in options.streams:
        return
    if split == "train":
        _write_stream(folder / "llm" / split, parts["normalized"] + parts["cased"], options.seed)
    else:
        _write_stream(folder / "llm" / split, parts["normalized"], options.seed)
        _write_stream(folder / "llm" / f"{split}_cased", parts["cased"], options.seed)


def _write_stream(path: Path, parts: list[Documents], seed: int) -> None:
    """Write ``<path>.npy`` (shuffled documents, uint16) and ``<path>.json`` (documents, words, tokens)."""
    tokens = np.concatenate([part.tokens for part in parts])
    lengths = np.concatenate([part.lengths for part in parts])
    starts = np.cumsum(lengths) - lengths
    order = np.random.default_rng(seed).permutation(len(lengths))
    shuffled = np.empty_like(tokens)
    position = 0
    for start, length in zip(starts[order].tolist(), lengths[order].tolist()):
        shuffled[position : position + length] = tokens[start : start + length]
        position += length
    with atomic_path(path.with_suffix(".npy")) as temporary, open(temporary, "wb") as file:
        np.save(file, shuffled)
    words = sum(part.words for part in parts)
    write_json(path.with_suffix(".json"), {"documents": len(lengths), "words": words, "tokens": len(tokens)})
    print(f"{path.parent.name}/{path.name}: {len(lengths)} documents, {words} words, {len(tokens)} tokens")


def document_groups(count: int, max_group: int, generator: random.Random) -> list[tuple[int, int]]:
    """Cut ``count`` consecutive utterances into documents; return each one's first and last + 1 utterance.

    Half of the documents are one utterance (a language model must know how one begins and ends), the
    others 2 to ``max_group``.
    """
    groups = []
    start = 0
    while start < count:
        size = 1 if generator.random() < 0.5 else generator.randint(2, max_group)
        groups.append((start, min(count, start + size)))
        start += size
    return groups


def book_documents(utterances: list[dict], split: str, options: LmTextOptions) -> tuple[list[str], list[str]]:
    """Return the normalized and the cased documents of one book; a pure function of book, split and seed.

    All of the book is normalized; of a training book ``cased_share`` is also there as printed, else all.
    """
    book = utterances[0]["book"]
    generator = random.Random(f"{options.seed} {book}")
    normalized = [
        join_words([utterance["text"] for utterance in utterances[start:stop]])
        for start, stop in document_groups(len(utterances), options.max_group, generator)
    ]
    share = options.cased_share if split == "train" else 1.0
    cased = [
        join_words([utterance["cased"] for utterance in utterances[start:stop]])
        for start, stop in document_groups(len(utterances), options.max_group, generator)
        if generator.random() < share
    ]
    return normalized, cased


def piece_tokenizer(folder: Path) -> Callable[[list[str]], Documents]:
    """Return a function from texts to acoustic pieces, each text between two ``<sos/eos>``."""
    import sentencepiece

    path = folder / "bpe.model"
    if not path.is_file():
        raise FileNotFoundError(f"no acoustic pieces at {str(path)!r}: run train-tokenizers first")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    sos_eos = processor.piece_to_id("<sos/eos>")
    return lambda texts: _lay_out(texts, processor.encode(texts, num_threads=1), sos_eos, sos_eos)


def llm_tokenizer(folder: Path) -> Callable[[list[str]], Documents]:
    """Return a function from texts to LLM tokens, each text between ``<s>`` and ``</s>``."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no LLM tokenizer at {str(path)!r}: run train-tokenizers first")
    tokenizer = Tokenizer.from_file(str(path))
    bos, eos = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")

    def tokenize(texts: list[str]) -> Documents:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return _lay_out(texts, [encoding.ids for encoding in encodings], bos, eos)

    return tokenize


def _lay_out(texts: list[str], ids: list[list[int]], bos: int, eos: int) -> Documents:
    tokens = np.array([token for document in ids for token in (bos, *document, eos)], dtype=np.uint16)
    lengths = np.array([len(document) + 2 for document in ids], dtype=np.int64)
    return Documents(tokens, lengths, sum(len(split_units(text)) for text in texts))


def _books(path: Path) -> Iterator[list[dict]]:
    rows = read_jsonl(path, ("book", "cased", "text"))
    for _, utterances in itertools.groupby(rows, key=lambda utterance: utterance["book"]):
        yield list(utterances)


class _BookTokenizer:
    """Lays out a book's documents for each stream, by tokenizers that each process loads for itself."""

    def __init__(self, options: LmTextOptions, split: str) -> None:
        self._options, self._split = options, split

    @functools.cached_property
    def _pieces(self) -> Callable[[list[str]], Documents]:
        return piece_tokenizer(Path(self._options.data_dir) / f"lang_bpe_{self._options.pieces}")

    @functools.cached_property
    def _llm(self) -> Callable[[list[str]], Documents]:
        return llm_tokenizer(Path(self._options.data_dir) / "llm_tokenizer")

    def __call__(self, utterances: list[dict]) -> dict[str, Documents]:
        normalized, cased = book_documents(utterances, self._split, self._options)
        streams = {}
        if "matched_llm" in self._options.streams:
            streams["pieces"] = self._pieces(normalized)
        if "llm" in self._options.streams:
            streams.update(normalized=self._llm(normalized), cased=self._llm(cased))
        return streams
