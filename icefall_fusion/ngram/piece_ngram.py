"""Back-off n-gram over acoustic pieces as sorted tensors: thousands of contexts scored in a few gathers.
Knows: tensors, tables of n-grams. Must not know: acoustic models, search, fusion, file formats, estimation.
"""
from __future__ import annotations

from typing import Optional, Sequence

import torch
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike
from icefall_fusion.ngram.arpa import longest_order, read_arpa

NOTHING = -1  # in a context: no piece so far back
_MAX_DIRECT_KEYS = 2**22  # up to here a direct index is faster than a search; it takes at most 32 MB


class NgramOrder:
    """All n-grams of one length as tensors, sorted by key (see `arpa.NgramTable`).

    Args:
        length: n.
        keys: [n] int64, rising.
        log_probs: [n] float32, natural log of P(last piece | pieces before it).
        backoffs: [n] float32, natural log of the weight of shorter contexts after this n-gram.
    """

    def __init__(self, length: int, keys: Tensor, log_probs: Tensor, backoffs: Tensor) -> None:
        self.length, self.keys, self.log_probs, self.backoffs = length, keys, log_probs, backoffs
        self._index: Optional[Tensor] = None  # of every possible key where those are few; NOTHING if absent
        if len(keys) and int(keys[-1]) < _MAX_DIRECT_KEYS:
            self._index = torch.full((int(keys[-1]) + 2,), NOTHING, device=keys.device)
            self._index[keys] = torch.arange(len(keys), device=keys.device)

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the table."""
        index = [] if self._index is None else [self._index]
        return [self.keys, self.log_probs, self.backoffs, *index]

    def to(self, device: torch.device) -> NgramOrder:
        """Return the table on a device."""
        return NgramOrder(self.length, *(x.to(device) for x in (self.keys, self.log_probs, self.backoffs)))

    def find(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the index of each key and whether the table has it, two tensors of the keys' shape."""
        if self._index is not None:
            index = self._index[keys.clamp(max=len(self._index) - 1)]
            return index.clamp(min=0), index >= 0
        index = torch.searchsorted(self.keys, keys).clamp_(max=len(self.keys) - 1)
        return index, self.keys[index] == keys


class PieceNgram:
    """A back-off n-gram language model over acoustic pieces (Katz 1987).

    Its tables are sorted tensors. So a search scores all its hypotheses at once, without leaving the device.

    Args:
        size: V, number of pieces; the ids of START and END follow them.
        orders: the n-grams of length 1, 2, ...; unigrams of every id.
        name: for messages.
    """

    def __init__(self, size: int, orders: Sequence[NgramOrder], name: str = "n-gram") -> None:
        self.size, self.base, self.orders, self.name = size, size + 2, list(orders), name
        self._copies: dict[torch.device, PieceNgram] = {}
        self.start_id = size
        self.end_id = self.eos_id = size + 1
        longest = longest_order(size)
        check(1 <= len(orders) <= longest, "orders", f"be 1..{longest} for {size} pieces", len(orders))
        check(len(orders[0].keys) == self.base, "unigrams", f"be {self.base}", len(orders[0].keys))

    @property
    def order(self) -> int:
        """The longest n."""
        return len(self.orders)

    @property
    def device(self) -> torch.device:
        """Device of its tables."""
        return self.orders[0].keys.device

    @property
    def table_bytes(self) -> int:
        """Memory of its tables."""
        return sum(x.numel() * x.element_size() for order in self.orders for x in order.tensors())

    def to(self, device: torch.device) -> PieceNgram:
        """Return the model on a device; the copy is kept."""
        device = torch.device(device)
        if self.device == device:
            return self
        if device not in self._copies:
            orders = [order.to(device) for order in self.orders]
            self._copies[device] = PieceNgram(self.size, orders, self.name)
        return self._copies[device]

    def check_size(self, pieces: int) -> None:
        """Raise ValueError, with both sizes, unless the acoustic model has as many pieces."""
        check(self.size == pieces, f"the n-gram {self.name}", f"be over {pieces} acoustic pieces", self.size)

    def score(self, contexts: Sequence[Tensor], pieces: Tensor) -> Tensor:
        """Return natural-log P(piece | context) of the pieces' shape.

        Args:
            contexts: the piece before, the one before that, ..., each of a shape that broadcasts to that of
                ``pieces``; START or NOTHING at the beginning of the sentence.
            pieces: ids, END included.
        """
        scores = self.orders[0].log_probs[pieces]
        if not contexts:
            return scores
        history = torch.zeros_like(contexts[0])  # key of the context, valid while ``known``
        known = torch.ones_like(history, dtype=torch.bool)
        for shorter, longer, piece in zip(self.orders, self.orders[1:], contexts):
            known = known & (piece >= 0)
            history = history + piece.clamp(min=0) * self.base ** (shorter.length - 1)
            index, present = shorter.find(history)
            backoff = shorter.backoffs[index].masked_fill(~(known & present), 0.0)
            index, present = longer.find(history * self.base + pieces)
            scores = torch.where(known & present, longer.log_probs[index], scores + backoff)
        return scores

    def score_sentences(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Score sentences that stand end to end, each beginning with START and ending with END.

        Args:
            ids: [n] int64.

        Returns:
            natural-log probability of every id but START [m], and the number of its sentence [m].
        """
        position = (ids != self.start_id).nonzero().squeeze(1)
        contexts: list[Tensor] = []
        beyond = torch.zeros_like(position, dtype=torch.bool)
        for back in range(1, self.order):
            context = ids[(position - back).clamp(min=0)].masked_fill(beyond, NOTHING)
            contexts.append(context)
            beyond = beyond | (context == self.start_id)
        sentence = torch.cumsum(ids == self.start_id, 0)[position] - 1
        return self.score(contexts, ids[position]), sentence

    @classmethod
    def load(cls, path: PathLike, pieces: Sequence[str]) -> PieceNgram:
        """Read an ARPA file whose words are acoustic pieces; see `arpa.read_arpa`, also for its errors.

        Args:
            path: the file.
            pieces: text of every id.
        """
        orders = [
            NgramOrder(length, *map(torch.from_numpy, table))
            for length, table in enumerate(read_arpa(path, pieces), 1)
        ]
        return cls(len(pieces), orders, str(path))
