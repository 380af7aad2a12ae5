"""Sentences as the token stream of a language model that has a tokenizer of its own.
Knows: utterance files, tokenizers. Must not know: weights, losses, the training loop.
"""
from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from icefall_fusion.common.checks import check, check_at_least, check_choice
from icefall_fusion.common.files import PathLike, atomic_path, fingerprint
from icefall_fusion.common.processes import gather_over_processes
from icefall_fusion.data.books import read_jsonl
from icefall_fusion.data.lm_text import document_groups
from icefall_fusion.text.scripts import join_words
from icefall_fusion.text.styles import TEXT_STYLES, adapt

BATCH = 2048  # documents tokenized by one call
SPLITS = ("train", "dev")


@dataclasses.dataclass(frozen=True)
class DocumentOptions:
    """How the sentences of a text become documents ``bos ... eos``.

    Args:
        text: how the LM sees words, as ``--llm.text`` of a decode: as-is, lower or sentence.
        max_group: longest document of the training text, in neighbouring sentences; half of the documents are
            one sentence. 1: all are. Those of dev always are.
        cased_share: share of the training documents that are also there as printed (key ``cased``), 0 to 1.
        share: share of the training documents to use, above 0 to 1.
        seed: of groups and shares.
    """

    text: str = "as-is"
    max_group: int = 4
    cased_share: float = 0.0
    share: float = 1.0
    seed: int = 17

    def __post_init__(self) -> None:
        check_choice(self.text, TEXT_STYLES, "DocumentOptions.text")
        check_at_least(1, self, "max_group")
        check(0 <= self.cased_share <= 1, "DocumentOptions.cased_share", "be from 0 to 1", self.cased_share)
        check(0 < self.share <= 1, "DocumentOptions.share", "be above 0, at most 1", self.share)


def prepare_streams(
    data: PathLike,
    folder: PathLike,
    options: DocumentOptions,
    encode: Callable[[list[str]], list[list[int]]],
    marks: tuple[int, int],
    tokenizer: str,
    size: int,
    rank: int = 0,
) -> Path:
    """Return a folder with ``train.npy`` and ``dev.npy``; the first process makes them on the first call.

    Args:
        data: folder with ``train.jsonl`` and ``dev.jsonl``: a sentence a line, in order; key ``text``, and
            perhaps ``cased`` (as printed) and ``book``; or with both streams, which are then used.
        folder: where streams are kept, one folder for each text, tokenizer and options.
        options: of the documents.
        encode: texts -> token ids of each.
        marks: ids of bos and eos.
        tokenizer: what tells the tokenizer from others.
        size: ids are below it.
        rank: number of this process.

    Raises:
        FileNotFoundError: the folder has neither.
        ValueError: a text has no sentence, or a line of it is broken.
    """
    data = Path(data)
    if all((data / f"{split}.npy").is_file() for split in SPLITS):
        return data
    for split in SPLITS:
        if not (data / f"{split}.jsonl").is_file():
            raise FileNotFoundError(f"{data} must hold {split}.jsonl or {split}.npy, but has neither")
    texts = [fingerprint(data / f"{split}.jsonl") for split in SPLITS]
    made_of = repr((texts, dataclasses.astuple(options), tokenizer, marks, size))
    target = Path(folder) / hashlib.sha1(made_of.encode()).hexdigest()[:12]
    if rank == 0:
        for split in SPLITS:
            if not (target / f"{split}.npy").is_file():
                documents = read_documents(data / f"{split}.jsonl", options, split == "train")
                dtype = np.uint16 if size <= 2**16 else np.uint32
                _write(target / f"{split}.npy", documents, encode, marks, dtype)
    gather_over_processes(None)
    return target


def read_documents(path: PathLike, options: DocumentOptions, train: bool) -> Iterator[str]:
    """Yield the documents of a file of sentences; a pure function of the file and the options.

    Args:
        path: JSON lines; neighbours are consecutive lines of one ``book``.
        options: see `DocumentOptions`.
        train: whether sentences are grouped, printed forms are added, and a share is taken.
    """
    cased = train and options.cased_share > 0
    rows = read_jsonl(path, ("text", "cased") if cased else ("text",))
    for book, sentences in itertools.groupby(rows, key=lambda row: row.get("book", "")):
        generator = random.Random(f"{options.seed} {book}")
        yield from _of_book(list(sentences), options, train, cased, generator)


def _of_book(
    rows: list[dict], options: DocumentOptions, train: bool, cased: bool, generator: random.Random
) -> Iterator[str]:
    for key in ("text", "cased") if cased else ("text",):
        share = options.share * (options.cased_share if key == "cased" else 1.0) if train else 1.0
        for start, stop in _groups(len(rows), options.max_group if train else 1, generator):
            words = [word for row in rows[start:stop] for word in row[key].split()]
            if words and (share == 1.0 or generator.random() < share):
                yield join_words(words) if key == "cased" else adapt(words, options.text)


def _groups(count: int, longest: int, generator: random.Random) -> list[tuple[int, int]]:
    if longest == 1:
        return [(index, index + 1) for index in range(count)]
    return document_groups(count, longest, generator)


def _write(
    path: Path,
    documents: Iterator[str],
    encode: Callable[[list[str]], list[list[int]]],
    marks: tuple[int, int],
    dtype: type,
) -> None:
    """Write ``bos t1 .. tn eos`` of one document after the other."""
    bos, eos = marks
    parts: list[np.ndarray] = []
    count = 0
    while texts := list(itertools.islice(documents, BATCH)):
        ids: Sequence[Sequence[int]] = encode(texts)
        parts.append(np.array([token for some in ids for token in (bos, *some, eos)], dtype=dtype))
        count += len(texts)
    check(count > 0, f"the text of {path.stem}", "hold a sentence (with DocumentOptions.share)", "empty")
    tokens = np.concatenate(parts)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, tokens)
    print(f"{path}: {count} documents, {len(tokens)} tokens", file=sys.stderr, flush=True)
