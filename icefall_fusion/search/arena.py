"""Prefixes as integers: a forest of (parent, piece) nodes on the device, spelled out on the host when asked.
Knows: nodes, pieces, frames, word boundaries. Must not know: scores, beams, language models.

Dimensions as in search/beam.py.
"""
from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from icefall_fusion.common.checks import check


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
        device: where the beam lives.
        starts_word: [V] bool, or None when nothing asks for boundaries.
        rows: rows to reserve at first; grows by doubling.
    """

    def __init__(self, batch: int, beam: int, device: torch.device,
                 starts_word: Optional[Tensor] = None, rows: int = 64) -> None:
        self.batch, self.beam, self.row_size = batch, beam, batch * beam
        self.rows = 1
        self._starts_word = None if starts_word is None else starts_word.to(device)
        size = (max(2, rows), batch, beam)
        self._parent = torch.zeros(size, dtype=torch.int64, device=device)
        self._piece = torch.zeros(size, dtype=torch.int64, device=device)
        self._boundary = torch.zeros(size if starts_word is not None else (0, batch, beam),
                                     dtype=torch.int64, device=device)
        self.first_ids = torch.arange(self.row_size, device=device).view(batch, beam)
        self._parent[0] = self.first_ids
        self._piece[0] = -1
        if starts_word is not None:
            self._boundary[0] = self.first_ids
        self._host: dict[str, Any] = {}

    @property
    def has_boundaries(self) -> bool:
        return self._starts_word is not None

    @property
    def starts_word(self) -> Optional[Tensor]:
        """[V] bool, or None."""
        return self._starts_word

    @property
    def fields(self) -> tuple[Tensor, Tensor, Tensor]:
        """Parents, pieces and boundaries, int64 [rows, B, K]: for a search that writes nodes itself."""
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

    def frame(self, nodes: Tensor) -> Tensor:
        """Return the frame at which each prefix was born (-1 at a root)."""
        return torch.div(nodes, self.row_size, rounding_mode="floor") - 1

    def boundary(self, nodes: Tensor) -> Tensor:
        """Return the closed part of each prefix: the prefix before the word that is still open.

        ``boundary(child by v) = parent if starts_word[v] else boundary(parent)``; a root is its own boundary.
        So the closed words of a prefix are all words of its boundary, and a boundary's own boundary is
        exactly one word shorter (no word shorter where a vocabulary allows empty words).
        """
        check(self.has_boundaries, "tokens", "be given when word boundaries are asked for", None)
        return self._boundary.view(-1)[nodes]

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
        found: list[int] = []
        while node != ancestor and node >= self.row_size:
            found.append(int(piece[node]))
            node = int(parent[node])
        check(ancestor < 0 or node == ancestor, "ancestor", "be a prefix of node", ancestor)
        return found[::-1]

    def trace(self, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Trace many prefixes back at once.

        Args:
            nodes: [n] int64.

        Returns:
            pieces [n, longest] (first to last, left-aligned, -1 after the end), birth frames [n, longest] and
            lengths [n]; on the CPU.
        """
        nodes = nodes.reshape(-1).cpu()
        parents, all_pieces = (torch.as_tensor(self.on_host(name)) for name in ("parent", "piece"))
        steps: list[Tensor] = []
        while bool((nodes >= self.row_size).any()):
            steps.append(nodes)
            nodes = parents[nodes]
        if not steps:
            empty = torch.zeros(nodes.numel(), 0, dtype=torch.int64)
            return empty, empty, torch.zeros(nodes.numel(), dtype=torch.int64)
        path = torch.stack(steps[::-1], dim=1)  # [n, longest], right-aligned: roots stand in front
        real = path >= self.row_size
        order = real.to(torch.int8).sort(dim=1, descending=True, stable=True).indices
        path, real = path.gather(1, order), real.gather(1, order)
        pieces = torch.where(real, all_pieces[path], torch.full_like(path, -1))
        frames = torch.where(real, self.frame(path), torch.full_like(path, -1))
        return pieces, frames, real.sum(1)

    # -- growing; only the search calls these
    def add_row(self, parents: Tensor, pieces: Tensor) -> Tensor:
        """Append one row of possible nodes and return their ids [B, K] (used for the slots that grew)."""
        row = self.rows
        if row == self._parent.shape[0]:
            self._grow()
        self._parent[row].copy_(parents)
        self._piece[row].copy_(pieces)
        if self._starts_word is not None:
            closed = self._boundary.view(-1)[parents]
            self._boundary[row].copy_(torch.where(self._starts_word[pieces], parents, closed))
        self.rows = row + 1
        return self.first_ids + row * self.row_size

    def reach(self, first: int, rows: int) -> None:
        """Know that a search has itself written rows from ``first`` on, before ``rows``."""
        self.rows = max(self.rows, rows)
        if self.first_ids.device.type != "cpu":  # else the mirror is the thing itself
            self._host = {name: (mirror, min(known, first)) for name, (mirror, known) in self._host.items()}

    def _grow(self) -> None:
        for name in ("_parent", "_piece", "_boundary"):
            old = getattr(self, name)
            if old.shape[0]:
                setattr(self, name, torch.cat([old, torch.zeros_like(old)]))
        self._host.clear()

    def on_host(self, name: str) -> Any:
        """Return ``parent``, ``piece`` or ``boundary`` of all nodes, a flat numpy array to read.

        It is the memory of the arena itself on a CPU, else a mirror that is brought up to date.
        """
        tensor = getattr(self, "_" + name)
        if tensor.device.type == "cpu":
            if name not in self._host:
                self._host[name] = tensor.view(-1).numpy()
            return self._host[name]
        mirror, rows = self._host.get(name, (None, 0))
        if mirror is None:
            mirror = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        if rows < self.rows:
            mirror[rows:self.rows].copy_(tensor[rows:self.rows])
            self._host[name] = (mirror, self.rows)
        return mirror.view(-1).numpy()
