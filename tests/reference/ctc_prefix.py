"""Slow twins of the CTC prefix search: every alignment by brute force, and dictionaries of prefixes.
Knows: the definition of CTC. Must not know: tensors of beams, candidates, anything of the fast search.
"""
from __future__ import annotations

import itertools
import math
from typing import Callable, Optional, Sequence

NEVER = -math.inf
Prefix = tuple[int, ...]


def log_add(*values: float) -> float:
    """Natural log of the sum of exponentials."""
    top = max(values)
    return top if top == NEVER else top + math.log(sum(math.exp(value - top) for value in values))


def brute_force(log_probs: Sequence[Sequence[float]], blank: int = 0) -> dict[Prefix, float]:
    """Return the log-probability of every piece sequence: the sum over all V ** T alignments."""
    masses: dict[Prefix, list[float]] = {}
    for path in itertools.product(range(len(log_probs[0]) if log_probs else 0), repeat=len(log_probs)):
        pieces = tuple(piece for piece, _ in itertools.groupby(path) if piece != blank)
        masses.setdefault(pieces, []).append(sum(row[piece] for row, piece in zip(log_probs, path)))
    return {pieces: log_add(*values) for pieces, values in masses.items()}


def dictionary_search(
    log_probs: Sequence[Sequence[float]],
    beam: int,
    blank: int = 0,
    top_pieces: Optional[int] = None,
    blank_skip: Optional[float] = None,
    extension_score: Optional[Callable[[Prefix, int], float]] = None,
    children_of: int = 0,
) -> list[tuple[Prefix, float, float]]:
    """Prefix beam search over dictionaries (Hannun et al. 2014; the way icefall and WeNet write it).

    Args:
        log_probs: T rows of V natural-log probabilities.
        beam: prefixes kept after each frame.
        top_pieces: best non-blank pieces of a frame that may extend; None: all.
        blank_skip: frames with a greater blank probability are pure blank.
        extension_score: weighted language model score of extending a prefix by a piece; ranks, is never mass.
        children_of: when above 0, the masses of pruned children are kept and given back (see
            search/children.py), and only this many best pieces of a frame may extend.

    Returns:
        (prefix, log mass, language model score), best first.
    """
    beams: dict[Prefix, tuple[float, float]] = {(): (0.0, NEVER)}  # blank, nonblank
    fused: dict[Prefix, float] = {(): 0.0}
    children: dict[Prefix, dict[int, tuple[float, float]]] = {(): {}}
    for row in log_probs:
        if blank_skip is not None and math.exp(row[blank]) > blank_skip:
            row = [row[blank] if piece == blank else NEVER for piece in range(len(row))]
        order = sorted((piece for piece in range(len(row)) if piece != blank), key=lambda v: -row[v])
        pieces = order[: children_of or top_pieces]
        for prefix, mass in beams.items():  # a live child's own total is the better one
            if children_of and prefix and prefix[:-1] in beams:
                open_ = children[prefix[:-1]].get(prefix[-1], (NEVER, NEVER))[1]
                total = log_add(*mass)
                ended = NEVER if total <= open_ else total + math.log1p(-math.exp(open_ - total))
                children[prefix[:-1]][prefix[-1]] = (ended, open_)
        found: dict[Prefix, list[list[float]]] = {}
        for prefix, (ended, open_) in beams.items():
            total = log_add(ended, open_)
            entry = found.setdefault(prefix, [[], []])
            entry[0].append(total + row[blank])
            if prefix:
                entry[1].append(open_ + row[prefix[-1]])
                parent = beams.get(prefix[:-1])
                if parent is not None:
                    repeats = prefix[-2:-1] == prefix[-1:]
                    entry[1].append((parent[0] if repeats else log_add(*parent)) + row[prefix[-1]])
        kept = {prefix: (log_add(*ended), log_add(NEVER, *open_)) for prefix, (ended, open_) in found.items()}
        for prefix, (ended, open_) in beams.items():
            before = children[prefix] if children_of else {}
            after = {}
            if children_of:  # what has no chance to be emitted in this frame ends in blank
                quiet = [v for v in before if v not in pieces]
                after = {v: (log_add(*before[v]) + row[blank], NEVER) for v in quiet}
            for piece in pieces:
                mass = ended if prefix[-1:] == (piece,) else log_add(ended, open_)
                child_ended, child_open = before.get(piece, (NEVER, NEVER))
                new = (log_add(child_ended, child_open) + row[blank], log_add(child_open, mass) + row[piece])
                child = (*prefix, piece)
                after[piece] = kept[child] if child in beams else new  # a live child is what it is
                if child not in beams:
                    kept[child] = new if children_of else (NEVER, new[1])
                    gain = extension_score(prefix, piece) if extension_score else 0.0
                    fused[child] = fused[prefix] + gain
            children[prefix] = after
        alive = [prefix for prefix in kept if log_add(*kept[prefix]) > NEVER]
        ranked = sorted(alive, key=lambda prefix: -(log_add(*kept[prefix]) + fused[prefix]))[:beam]
        newborn = [prefix for prefix in ranked if prefix not in beams]
        beams = {prefix: kept[prefix] for prefix in ranked}
        children = {prefix: {} if prefix in newborn else children[prefix] for prefix in ranked}
        fused = {prefix: fused[prefix] for prefix in ranked}
    result = [(prefix, log_add(*mass), fused[prefix]) for prefix, mass in beams.items()]
    return sorted(result, key=lambda entry: -(entry[1] + entry[2]))
