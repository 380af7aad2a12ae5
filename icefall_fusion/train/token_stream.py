"""Token streams as shuffled batches of packed documents, resumable at any batch.
Knows: arrays of token ids, bounds of documents. Must not know: models, tokenizers, losses.
"""
from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Union

import numpy as np
import torch
from torch import Tensor

from icefall_fusion.common.checks import check

NO_DOCUMENT = -1  # document number of padding


class TokenBatch(NamedTuple):
    """R rows of L tokens of several documents; a token may attend only to its own document's past.

    Args:
        tokens: [R, L] input ids (0 in padding).
        targets: [R, L] the next token of the same document, -100 where there is none.
        positions: [R, L] position within the document, from 0 at its bos.
        documents: [R, L] number of the document within the row, NO_DOCUMENT in padding.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    documents: Tensor


def attention_mask(documents: Tensor) -> Tensor:
    """Return [R, 1, L, L] bool, True where a query may attend to a key: same document, not later."""
    same = documents[:, :, None] == documents[:, None, :]
    return same.tril()[:, None]


def document_bounds(stream: np.ndarray, bos: int, eos: int, name: str = "stream") -> np.ndarray:
    """Return [N, 2] first index and end (one past the last) of every document ``bos t1 .. tn eos``.

    Args:
        stream: [M] token ids, documents one after another.
        bos: id that begins a document; may equal ``eos``.
        eos: id that ends one.
        name: of the stream, for errors.

    Raises:
        ValueError: the stream is not a sequence of whole documents.
    """
    if bos == eos:
        marks = np.flatnonzero(stream == bos)
        whole = len(marks) % 2 == 0
        starts, ends = marks[0::2], marks[1::2]
    else:
        starts, ends = np.flatnonzero(stream == bos), np.flatnonzero(stream == eos)
        whole = len(starts) == len(ends)
    whole = whole and len(starts) > 0 and starts[0] == 0 and ends[-1] == len(stream) - 1
    if not (whole and bool(np.all(starts[1:] == ends[:-1] + 1))):
        raise ValueError(f"{name} must be documents of bos={bos} ... eos={eos} one after another, but is not")
    return np.stack([starts, ends + 1], axis=1).astype(np.int64)


def pack_rows(lengths: np.ndarray, length: int) -> list[list[tuple[int, int, int]]]:
    """Pack documents into rows of ``length`` tokens, best fit, longest first.

    Args:
        lengths: [N] input tokens of each document (all but its last).
        length: tokens in a row.

    Returns:
        rows of (document, offset within the document, tokens). Documents longer than a row are cut.
    """
    pieces = []
    for document, size in enumerate(lengths.tolist()):
        for offset in range(0, size, length):
            pieces.append((min(length, size - offset), document, offset))
    pieces.sort(key=lambda piece: (-piece[0], piece[1], piece[2]))
    rows: list[list[tuple[int, int, int]]] = []
    free: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for size, document, offset in pieces:
        at = bisect.bisect_left(free, (size, -1))
        if at == len(free):
            rows.append([])
            space, row = length, len(rows) - 1
        else:
            space, row = free.pop(at)
        rows[row].append((document, offset, size))
        if space > size:
            bisect.insort(free, (space - size, row))
    return rows


class TokenBatches:
    """Shuffled batches of packed documents; a BatchSource.

    Each epoch is a seeded permutation of the documents in blocks. A block is packed on its own, so a resumed
    run repeats the packing of one block at most. All batches have the same shape.

    Args:
        path: ``.npy`` of token ids (memory-mapped).
        bos: id that begins a document.
        eos: id that ends one.
        rows: rows in a batch.
        length: tokens in a row.
        seed: of the order.
        shuffle: False keeps the documents in the order of the file (validation).
        rank: number of this process.
        world: processes; each takes every ``world``-th batch.
        max_tokens: tokens of the stream to use (about), spread evenly over it; 0 = all.
        block: documents packed together.
    """

    def __init__(
        self,
        path: Union[str, Path],
        bos: int,
        eos: int,
        rows: int,
        length: int,
        seed: int = 1,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        max_tokens: int = 0,
        block: int = 8192,
    ) -> None:
        check(rows >= 1, "rows", "be at least 1", rows)
        check(length >= 2, "length", "be at least 2", length)
        if not Path(path).is_file():
            raise FileNotFoundError(f"token stream {path} does not exist")
        self.stream = np.load(path, mmap_mode="r")
        self.bounds = document_bounds(np.asarray(self.stream), bos, eos, str(path))
        if 0 < max_tokens < len(self.stream):
            stride = int(np.ceil(len(self.stream) / max_tokens))
            self.bounds = self.bounds[::stride]
        self.rows, self.length, self.seed, self.shuffle = rows, length, seed, shuffle
        self.rank, self.world, self.block = rank, world, block
        self.epoch = self.block_index = self.group = 0  # a group is one batch for every process

    def batches_in(self, epochs: float) -> int:
        """Estimate the batches of one process in ``epochs``: all rows count as full, which nearly holds."""
        tokens = int((self.bounds[:, 1] - self.bounds[:, 0] - 1).sum())
        return math.ceil(epochs * tokens / (self.rows * self.length * self.world))

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the batch that was yielded last."""
        return {"epoch": self.epoch, "block_index": self.block_index, "group": self.group, "seed": self.seed,
                "documents": len(self.bounds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position that ``state_dict`` returned.

        Raises:
            ValueError: the state belongs to other data or another seed.
        """
        for name, mine in (("seed", self.seed), ("documents", len(self.bounds))):
            check(state[name] == mine, f"state[{name!r}]", f"be {mine} as in this run's data", state[name])
        self.epoch, self.block_index, self.group = state["epoch"], state["block_index"], state["group"]

    def __iter__(self) -> Iterator[TokenBatch]:
        order = np.arange(len(self.bounds))
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        blocks = range(0, len(order), self.block)
        while self.block_index < len(blocks):
            start = blocks[self.block_index]
            chosen = order[start : start + self.block]
            layout = self._pack_block(chosen)
            per_group = self.rows * self.world
            groups = -(-len(layout) // per_group)
            while self.group < groups:
                first = self.group * per_group + self.rank * self.rows
                batch = self._make_batch(chosen, layout[first : first + self.rows])
                self.group += 1
                yield batch
            self.block_index, self.group = self.block_index + 1, 0
        self.epoch, self.block_index = self.epoch + 1, 0

    def _pack_block(self, chosen: np.ndarray) -> list[list[tuple[int, int, int]]]:
        bounds = self.bounds[chosen]
        layout = pack_rows(bounds[:, 1] - bounds[:, 0] - 1, self.length)
        if self.shuffle:  # best fit, longest first, sorts rows by length of document
            mixer = np.random.default_rng([self.seed, self.epoch, self.block_index])
            layout = [layout[row] for row in mixer.permutation(len(layout))]
        return layout

    def _make_batch(self, chosen: np.ndarray, layout: list[list[tuple[int, int, int]]]) -> TokenBatch:
        shape = (self.rows, self.length)
        tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        targets, documents = np.full(shape, -100), np.full(shape, NO_DOCUMENT)
        for row, parts in enumerate(layout):
            at = 0
            for number, (document, offset, size) in enumerate(parts):
                begin = self.bounds[chosen[document], 0] + offset
                columns = slice(at, at + size)
                tokens[row, columns] = self.stream[begin : begin + size]
                targets[row, columns] = self.stream[begin + 1 : begin + size + 1]
                positions[row, columns] = np.arange(offset, offset + size)
                documents[row, columns] = number
                at += size
        return TokenBatch(*(torch.from_numpy(a) for a in (tokens, targets, positions, documents)))


class ValidationPass:
    """A source whose every iteration is the whole first epoch, for validation."""

    def __init__(self, source: TokenBatches) -> None:
        self.source = source

    def __iter__(self) -> Iterator[TokenBatch]:
        self.source.epoch = self.source.block_index = self.source.group = 0
        return iter(self.source)
