"""What a batched prefix beam search carries from frame to frame: prefixes as integers, and the beam.
Knows: tensors, pieces, word boundaries. Must not know: language models, tokenizers, the frame step.

Legend of dimensions (used all over the package):
    B utterances   K beam slots   T frames   V pieces (blank included)   C candidate pieces of a frame
    N tree or arena nodes   S fusions (index; in an LLM's cache: slots)   L layers of a language model
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import torch
from torch import Tensor

from icefall_fusion.common.checks import check

if TYPE_CHECKING:
    from icefall_fusion.search.search_input import SearchInput

# Numbers that all engines share; C++ and Triton get them as arguments.
#: A prefix is known by a hash of its pieces: ``hash(child) = hash(parent) * HASH_FACTOR ^ key(piece)``.
#: The factor is odd, so that multiplying by it loses nothing modulo 2^64.
HASH_FACTOR = 0x2545F4914F6CDD1D
#: Hashes of a dead slot, of the root, and of a parent that is not there (no slot has that one).
DEAD_HASH, ROOT_HASH, NO_PARENT_HASH = 0, 1, 2
#: Nats by which a candidate may miss the worst survivor and is looked at all the same: more than rounding.
ROUNDING = 1e-3
#: Of the best mass: a child with less is forgotten (`recover_mass`; denormal numbers would be slow).
TINY_MASS = 1e-30

#: Rows of `Beam.integers`.
NODE, LAST, HASH, PARENT_HASH, REPEATS = range(5)


class PrefixArena:
    """All prefixes that ever entered a beam, as a forest of integer nodes (append only).

    Node ids are int64 and unique over the batch: ``(row * B + b) * K + k``. Row 0 holds the roots
    (``root(b)`` is the empty prefix of utterance ``b``), row ``t + 1`` the prefixes born at frame ``t``. Ids
    are sparse: only ids that a beam holds, and their ancestors, mean anything. Because nothing is counted,
    growing needs no synchronization with the device. A prefix that was pruned and is born again gets a second
    node.

    Args:
        batch: B.
        beam: K.
        starts_word: [V] bool, or None when nothing asks for boundaries.
        rows: rows to reserve at first; their number grows by doubling.
    """

    def __init__(self, batch: int, beam: int, device: torch.device,
                 starts_word: Optional[Tensor] = None, rows: int = 64) -> None:
        self.batch, self.beam, self.row_size = batch, beam, batch * beam
        self.rows = 1
        self.starts_word = None if starts_word is None else starts_word.to(device)
        size = (max(2, rows), batch, beam)
        self._parent = torch.zeros(size, dtype=torch.int64, device=device)
        self._piece = torch.zeros(size, dtype=torch.int64, device=device)
        size = size if starts_word is not None else (0, batch, beam)
        self._boundary = torch.zeros(size, dtype=torch.int64, device=device)
        self.first_ids = torch.arange(self.row_size, device=device).view(batch, beam)
        self._parent[0] = self.first_ids
        self._piece[0] = -1
        if starts_word is not None:
            self._boundary[0] = self.first_ids
        self._host: dict[str, Any] = {}
        self._known = self._sent = 0  # rows that are on the host, and that are on their way there

    @property
    def fields(self) -> tuple[Tensor, Tensor, Tensor]:
        """Parents, pieces and boundaries, int64 [rows, B, K], for a search that writes nodes itself."""
        return self._parent, self._piece, self._boundary

    def root(self, utterance: int) -> int:
        """Return the node of the empty prefix of utterance ``utterance``."""
        return utterance * self.beam

    # -- vectorized gathers; every one takes int64 nodes of any shape and gives the same shape
    def parent(self, nodes: Tensor) -> Tensor:
        """Return the prefix without its last piece (a root's parent is itself)."""
        return self._parent.view(-1)[nodes]

    def piece(self, nodes: Tensor) -> Tensor:
        """Return the last piece of each prefix (-1 at a root)."""
        return self._piece.view(-1)[nodes]

    def boundary(self, nodes: Tensor) -> Tensor:
        """Return the boundary of each prefix: the prefix before the word that is still open.

        ``boundary(child by v) = parent if starts_word[v] else boundary(parent)``; a root is its own boundary.
        So the closed words of a prefix are all words of its boundary. A boundary's own boundary is exactly
        one word shorter (no word shorter where a vocabulary allows empty words).
        """
        check(self.starts_word is not None, "tokens", "be there when word boundaries are needed", None)
        return self._boundary.view(-1)[nodes]

    def begins_word(self, pieces: Tensor, first: Tensor) -> Tensor:
        """Return which pieces begin a word: those that are marked so, and the first of a prefix anyway."""
        return self.starts_word[pieces] | first

    # -- host side
    def pieces(self, node: int) -> list[int]:
        """Return all pieces of one prefix, first to last."""
        return self.pieces_between(node, -1)

    def pieces_between(self, node: int, ancestor: int) -> list[int]:
        """Return the pieces after ``ancestor`` up to ``node``, first to last (host work, one step a piece).

        Raises:
            ValueError: ``ancestor`` is not -1 and not on the way from ``node`` to its root.
        """
        parent, piece = self.on_host("parent"), self.on_host("piece")
        pieces: list[int] = []
        while node != ancestor and node >= self.row_size:
            pieces.append(int(piece[node]))
            node = int(parent[node])
        check(ancestor < 0 or node == ancestor, "ancestor", "be a prefix of node", ancestor)
        return pieces[::-1]

    def trace(self, nodes: Any) -> tuple[Any, Any]:
        """Trace many prefixes back at once, on the host.

        Args:
            nodes: numpy [n] int64.

        Returns:
            numpy arrays: the nodes on the way to each [n, longest] (first to last, left-aligned, without the
            root, -1 after the end), and their numbers [n]. A node was born at frame ``node // row_size - 1``.
        """
        parent, steps = self.on_host("parent"), []
        while (nodes >= self.row_size).any():
            steps.append(nodes)
            nodes = parent[nodes]
        if not steps:
            return np.zeros((len(nodes), 0), np.int64), np.zeros(len(nodes), np.int64)
        back = np.stack(steps, 1)  # last to first, then roots
        lengths = (back >= self.row_size).sum(1)
        place = lengths[:, None] - 1 - np.arange(back.shape[1])
        return np.where(place < 0, -1, np.take_along_axis(back, place.clip(0), 1)), lengths

    # -- growing; only the search calls these
    def add_row(self, parents: Tensor, pieces: Tensor) -> Tensor:
        """Append one row of possible nodes and return their ids [B, K] (used for the slots that grew)."""
        row = self.rows
        if row == self._parent.shape[0]:
            self.grow()
        self._parent[row].copy_(parents)
        self._piece[row].copy_(pieces)
        if self.starts_word is not None:
            closed = self._boundary.view(-1)[parents]
            self._boundary[row].copy_(torch.where(self.starts_word[pieces], parents, closed))
        self.rows = row + 1
        return self.first_ids + row * self.row_size

    def reach(self, first: int, rows: int) -> None:
        """Note that a search has itself written the rows from ``first`` up to ``rows``."""
        self.rows = max(self.rows, rows)
        self._known, self._sent = max(min(self._known, first), min(self._sent, rows)), 0

    def grow(self) -> None:
        """Double the room for rows."""
        self._parent, self._piece, self._boundary = (torch.cat([x, torch.zeros_like(x)]) for x in self.fields)
        self._host, self._known = {}, 0

    def send(self, first: int, rows: int) -> None:
        """Start to copy the rows up to ``rows`` to the host, where those from ``first`` on are new.

        They are there when the host has waited for the device; `reach` is called after that.
        """
        if self.first_ids.device.type == "cpu":
            return
        first, self._sent = min(self._known, first), rows
        for name, tensor in zip(("parent", "piece", "boundary"), self.fields):
            if name not in self._host:
                self._host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._host[name][first:rows].copy_(tensor[first:rows], non_blocking=tensor.is_cuda)

    def on_host(self, name: str) -> Any:
        """Return ``parent``, ``piece`` or ``boundary`` of all nodes, flat, to read; at most one wait."""
        if self.first_ids.device.type == "cpu":
            if name not in self._host:
                self._host[name] = getattr(self, "_" + name).view(-1).numpy()
            return self._host[name]
        if self._known < self.rows:
            self.send(self._known, self.rows)
            if self.first_ids.is_cuda:
                torch.cuda.current_stream(self.first_ids.device).synchronize()
            self._known = self.rows
        return self._host[name].view(-1).numpy()


class Beam:
    """The hypotheses of a batch between two frames; dense tensors, all on the device of the log-probs.

    Rows belong to utterances, columns to slots. A slot whose ``log_total`` is -inf is dead (``alive`` False)
    and its other values mean nothing. The search only moves these values (one gather a frame); where an
    extension and a stay meet in one prefix, the masses add and the stay's node, lm, words and state are kept.
    With fusions the slots are in no fixed order.

    Attributes:
        arena: where prefixes are spelled out.
        node: [B, K] int64, arena node of each prefix.
        last: [B, K] int64, last piece (blank at the root).
        log_blank, log_nonblank: [B, K] float32, natural-log mass of the alignments that end in blank / not.
        log_total: [B, K] float32, their log-sum. These three are relative to ``offset`` of the utterance.
        offset: [B] float64; after the last frame ``log_total + offset`` is the absolute log-probability.
        lm: [B, K, S] float32, RAW (unweighted) natural-log score that fusion s has inputs.
        words: [B, K, S] int64, words whose bonus fusion s has paid.
        state: [B, K, S] int64, one integer of the fusion's own (its tree node).
        fused: [B, K] float32, ``sum_s weight_s * lm_s + word_bonus_s * words_s``. Whoever changes lm or words
            changes fused too. Look-ahead adds to it for a while; after ``finish`` it is this sum.
        lens: [B] int64, frames of each utterance; then a row is frozen; blank: id of blank.
        asked: [B, K] bool, while ``extension_scores`` is called: slots of which an extension could survive.
        seen: alive, node, boundary [B, K] on the host, where an engine has copied them with its own results.
        landed: rows [B] bool (host) whose late scores came in, and nodes [B, K] up to which; or None.
        frame: the frame just searched (-1 before the first; of no meaning in ``Fusion.fuse_now``).
        integers: [B, 5, K] int64: node, last, hash, parent_hash, and K + 1 where the last piece repeats that
            before it, else 0.
        carried: [B, 2 * (K + 1)] float32: never, log_total of each slot, never, log_blank of each slot. One
            gather finds the mass that an extension of slot i carries over: at i + 1 or, if it repeats the
            last piece, K + 1 further; at 0: none.
    """

    def __init__(self, arena: PrefixArena, lens: Tensor, blank: int, fusions: int = 0) -> None:
        batch, beam, device = arena.batch, arena.beam, lens.device
        self.arena, self.lens, self.blank, self.frame = arena, lens, blank, -1
        self.integers = torch.zeros(batch, 5, beam, dtype=torch.int64, device=device)
        self.integers[:, NODE] = arena.first_ids[:, :1]
        self.integers[:, LAST] = blank
        self.integers[:, HASH, 0] = ROOT_HASH
        self.integers[:, PARENT_HASH] = NO_PARENT_HASH
        self.carried = torch.full((batch, 2 * (beam + 1)), -torch.inf, dtype=torch.float32, device=device)
        self.carried[:, 1] = self.carried[:, beam + 2] = 0.0
        self.log_nonblank = torch.full((batch, beam), -torch.inf, dtype=torch.float32, device=device)
        self.offset = torch.zeros(batch, dtype=torch.float64, device=device)
        self.asked, self.seen, self.landed = self.alive, None, None
        self.lm = torch.zeros(batch, beam, fusions, dtype=torch.float32, device=device)
        self.words = torch.zeros(batch, beam, fusions, dtype=torch.int64, device=device)
        self.state = torch.zeros(batch, beam, fusions, dtype=torch.int64, device=device)
        self.fused = torch.zeros(batch, beam, dtype=torch.float32, device=device)

    @classmethod
    def at_root(
        cls, inputs: SearchInput, beam: int, starts_word: Optional[Tensor] = None, fusions: int = 0
    ) -> Beam:
        """Return the beam of K = ``beam`` slots before the first frame of a batch, with an arena for all.

        Args:
            starts_word: [V] bool, where words are closed; see PrefixArena.
            fusions: S.
        """
        batch, frames, _ = inputs.log_probs.shape
        arena = PrefixArena(batch, beam, inputs.log_probs.device, starts_word, rows=frames + 1)
        return cls(arena, inputs.lens, inputs.blank, fusions)

    @property
    def node(self) -> Tensor:
        return self.integers[:, NODE]

    @property
    def last(self) -> Tensor:
        return self.integers[:, LAST]

    @property
    def hash(self) -> Tensor:
        """[B, K] int64, equal for equal prefixes of an utterance; DEAD_HASH for a dead slot."""
        return self.integers[:, HASH]

    @property
    def parent_hash(self) -> Tensor:
        """[B, K] int64, hash of the prefix without its last piece; no slot's for a root or a dead slot."""
        return self.integers[:, PARENT_HASH]

    @property
    def log_total(self) -> Tensor:
        return self.carried[:, 1 : self.arena.beam + 1]

    @property
    def log_blank(self) -> Tensor:
        return self.carried[:, self.arena.beam + 2 :]

    @property
    def alive(self) -> Tensor:
        return self.log_total > -torch.inf

    @property
    def boundary(self) -> Tensor:
        """[B, K] int64, arena node of the boundary of each prefix."""
        return self.arena.boundary(self.node)

    @property
    def score(self) -> Tensor:
        """[B, K] float32, the ranking score: ``log_total + fused`` (relative to ``offset``)."""
        return self.log_total + self.fused

    def permute_scores(self, source: Tensor) -> None:
        """Re-order lm, words and state."""
        wide = source.unsqueeze(2).expand_as(self.lm)
        self.lm, self.words, self.state = (x.gather(1, wide) for x in (self.lm, self.words, self.state))
