"""Phrases (hot words) as hash tables, as the GPU kernel reads them.
Knows: automata of phrases. Must not know: searches, texts.

The links of an automaton to shorter matches are followed here, once: the table of a list holds each node with
all pieces that lead on from it or from one of its suffixes, by ``node * base + piece``. Where it has nothing,
a hypothesis begins anew at the root. So a step is one look-up (as of an n-gram, see gpu_ngram.py), whatever
the phrases. Each list has a table of its own, made once; those of a batch lie end to end.
"""
from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, MutableMapping, Sequence

import numpy as np
import torch

from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.search.engines.gpu_layout import BUCKET, MOST_COLUMNS, Phrases
from icefall_fusion.search.engines.gpu_ngram import place_keys

if TYPE_CHECKING:
    from icefall_fusion.ngram.phrases import PhraseAutomaton

MOST_EDGES = 2**23  # of one list: about 256 MB


_TABLES = Phrases._fields.index("mask")  # the fields before it; the others tell the lists of a batch apart
_LISTS: MutableMapping[PhraseAutomaton, dict[tuple[torch.device, int], Phrases]] = weakref.WeakKeyDictionary()


def phrases_of(automata: Sequence[PhraseAutomaton], base: int, device: torch.device) -> Phrases:
    """Return the phrases of a batch on a device, without weight and bonus.

    Args:
        automata: one for each utterance; the same object for those that share a list.
        base: above all pieces.

    Raises:
        Unavailable: there are too many pieces, or a list has too many edges.
    """
    if base > MOST_COLUMNS:
        raise Unavailable(f"with phrases it has at most {MOST_COLUMNS} pieces", unusual=True)
    different = list(dict.fromkeys(automata))
    lists = [_list_of(automaton, base, device) for automaton in different]
    parts = zip(*(one[:_TABLES] for one in lists))
    tables = lists[0][:_TABLES] if len(lists) == 1 else [torch.cat(part) for part in parts]
    cells = _begins([len(one.key) for one in lists])
    roots = _begins([len(one.root_child) for one in lists])
    nodes = _begins([len(one.pending) for one in lists])
    at = np.array([different.index(automaton) for automaton in automata])
    masks = np.array([len(one.key) // BUCKET - 1 for one in lists])
    begins = [torch.from_numpy(values[at]).to(device) for values in (masks, cells, roots, nodes)]
    return Phrases(*tables, *begins)


def _begins(sizes: Sequence[int]) -> np.ndarray:
    return np.cumsum([0, *sizes[:-1]])


def _list_of(automaton: PhraseAutomaton, base: int, device: torch.device) -> Phrases:
    """Return the tables of a list on a device, made once."""
    made = _LISTS.setdefault(automaton, {})
    if (device, base) not in made:
        made[device, base] = _make_list(automaton, base, device)
    return made[device, base]


def _make_list(one: PhraseAutomaton, base: int, device: torch.device) -> Phrases:
    node, piece, child = all_edges(one)
    keys = torch.from_numpy(node * base + piece)
    buckets, cells = place_keys(keys)
    key = torch.full((buckets * BUCKET,), -1)
    key[cells] = keys
    children, held = torch.zeros(len(key), dtype=torch.int32), torch.zeros(len(key))
    children[cells], held[cells] = torch.from_numpy(child), torch.from_numpy(one.pending[child])
    roots = (one.from_root, one.pending[one.from_root], one.pending, one.complete, one.most)
    return Phrases(*(part.to(device) for part in (key, children, held, *map(torch.from_numpy, roots))))


def all_edges(one: PhraseAutomaton) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return node, piece and next node of all steps that do not begin anew at the root.

    Raises:
        Unavailable: there are more than `MOST_EDGES`.
    """
    first, shorter = one.first.astype(np.int64), one.shorter.astype(np.int64)
    nodes = at = np.arange(1, len(one))
    keys, children, total = [], [], 0
    while len(nodes):  # suffix after suffix
        counts = first[at + 1] - first[at]
        total += int(counts.sum())
        if total > MOST_EDGES:
            raise Unavailable(f"a list of phrases has more than {MOST_EDGES} edges for it", unusual=True)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        edges = np.repeat(first[at], counts) + within
        keys.append(np.repeat(nodes, counts) * one.size + one.piece[edges])
        children.append(edges if one.child is None else one.child[edges])
        at = shorter[at]
        nodes, at = nodes[at > 0], at[at > 0]
    none = np.zeros(0, np.int64)
    # of equal keys the first counts: that of the longest suffix
    found, rows = np.unique(np.concatenate([none, *keys]), return_index=True)
    child = np.concatenate([none, *children])[rows].astype(np.int32)
    return found // one.size, found % one.size, child
