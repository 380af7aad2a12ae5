"""Prefix beam search with shallow and delayed fusion over dictionaries, one by one: the slow twin.
Knows: log-probs, pieces, plain functions that score. Must not know: tensors, trees, the package's search.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Callable, Optional, Sequence

Prefix = tuple[int, ...]
NEVER = -math.inf


@dataclass
class SlowFusion:
    """Shallow when ``piece_score`` is given (log P(piece | prefix)); delayed when ``word_score`` is.

    ``end_score(prefix, words)`` is the raw score of a whole hypothesis at the end.
    ``trigger``: ("interval", n), ("words", every), ("pieces", every) or ("end",).
    """

    source: str
    weight: float
    bonus: float
    end_score: Callable[[Prefix, Sequence[str]], float]
    piece_score: Optional[Callable[[Prefix, int], float]] = None
    word_score: Optional[Callable[[Sequence[str]], float]] = None
    trigger: tuple = ("end",)
    ahead: Optional[Callable[[Prefix, int], float]] = None  # (prefix, piece) -> estimate, until it is scored
    ahead_every: int = 1
    prefix_score: Optional[Callable[[Prefix], float]] = None  # that of an extension; it wins ``gain`` at most
    gain: float = 0.0
    frame_score: Optional[Callable[[int, Prefix], Optional[float]]] = None  # after a frame; None: as before
    late: int = 0  # scores of an event join so many frames later, or at the next event
    longest_fused: int = 0
    due: Optional[int] = None
    flying: set = field(default_factory=set)  # words that were closed at the event
    known: set = field(default_factory=set)


@dataclass
class Slot:
    blank: float
    nonblank: float
    lm: list[float]
    words: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)  # pieces that the LM has scored
    ahead: list[float] = field(default_factory=list)

    def total(self) -> float:
        return log_add(self.blank, self.nonblank)


def log_add(*values: float) -> float:
    top = max(values)
    return top if top == NEVER else top + math.log(sum(math.exp(v - top) for v in values))


def fused_search(log_probs, beam: int, tokens, fusions: Sequence[SlowFusion], acoustic: str = "ctc"
                 ) -> list[tuple[Prefix, dict]]:
    """Return (pieces, scores) of the final beam, best first; ``log_probs`` is a list of rows.

    acoustic: ``ctc``; or ``rnnt``, a transducer of one symbol a frame: a row is then a function of prefixes.
    """
    go_on = step if acoustic == "ctc" else transducer_step
    nothing = [0.0] * len(fusions)
    slots = {(): Slot(0.0, NEVER, list(nothing), [0] * len(fusions), [0] * len(fusions), list(nothing))}
    for fusion in fusions:
        fusion.longest_fused, fusion.due, fusion.known = 0, None, {()}

    def rank(slot: Slot) -> float:
        sums = (f.weight * s + f.bonus * w for f, s, w in zip(fusions, slot.lm, slot.words))
        return slot.total() + sum(sums) + sum(slot.ahead)

    for frame, row in enumerate(log_probs):
        slots = go_on(slots, row, tokens, fusions)
        best = sorted(slots, key=lambda prefix: -rank(slots[prefix]))[:beam]
        slots = {prefix: slots[prefix] for prefix in best if slots[prefix].total() > NEVER}
        for s, fusion in enumerate(fusions):
            fired = fires(fusion, frame, slots, tokens)
            scored = fired and not fusion.late
            if fusion.due is not None and (fired or fusion.due <= frame):
                scored, fusion.due = True, None
                fusion.known |= fusion.flying
            if fired:
                closed = {tuple(closed_words(prefix, tokens)) for prefix in slots}
                fusion.flying = {words[:n] for words in closed for n in range(len(words) + 1)}
                if fusion.late:
                    fusion.due = frame + fusion.late
                else:
                    fusion.known |= fusion.flying
            for prefix, slot in slots.items():
                if fusion.frame_score is not None:
                    now = fusion.frame_score(frame, prefix)
                    slot.lm[s] = slot.lm[s] if now is None else now
                if scored:
                    part = prefix[: closed_pieces(prefix, tokens)]
                    while tuple(tokens.words(part)) not in fusion.known:
                        part = part[: closed_pieces(part, tokens)]
                    words = tokens.words(part)
                    slot.lm[s], slot.words[s] = fusion.word_score(words), len(words)
                    slot.scored[s] = len(part)
                if fusion.ahead is not None and (scored or (frame + 1) % fusion.ahead_every == 0):
                    rest = range(slot.scored[s], len(prefix))
                    slot.ahead[s] = sum(fusion.ahead(prefix[:i], prefix[i]) for i in rest)
    for s, fusion in enumerate(fusions):
        for prefix, slot in slots.items():
            words = tokens.words(prefix)
            slot.lm[s], slot.words[s], slot.ahead[s] = fusion.end_score(prefix, words), len(words), 0.0
    result = []
    for prefix, slot in slots.items():
        scores = {acoustic: slot.total(), "words": len(tokens.words(prefix)), "total": rank(slot)}
        scores.update({fusion.source: lm for fusion, lm in zip(fusions, slot.lm)})
        result.append((prefix, scores))
    return sorted(result, key=lambda found: -found[1]["total"])


def step(slots: dict[Prefix, Slot], row, tokens, fusions) -> dict[Prefix, Slot]:
    """Return all stays and extensions of one frame; a stay keeps its LM values in a merge."""
    after: dict[Prefix, Slot] = {}
    for prefix, slot in slots.items():
        repeated = slot.nonblank + row[prefix[-1]] if prefix else NEVER
        blank = slot.total() + row[tokens.blank_id]
        after[prefix] = replace(copy.deepcopy(slot), blank=blank, nonblank=repeated)
    for prefix, slot in slots.items():
        for piece, log_prob in enumerate(row):
            if piece == tokens.blank_id:
                continue
            mass = (slot.blank if prefix and piece == prefix[-1] else slot.total()) + log_prob
            extend(slots, after, prefix, piece, mass, tokens, fusions)
    return after


def transducer_step(slots: dict[Prefix, Slot], row, tokens, fusions) -> dict[Prefix, Slot]:
    """Return the same for a transducer whose frame emits blank or one piece, with ``row(prefix)``."""
    after: dict[Prefix, Slot] = {}
    for prefix, slot in slots.items():
        stay = slot.total() + row(prefix)[tokens.blank_id]
        after[prefix] = replace(copy.deepcopy(slot), blank=NEVER, nonblank=stay)
    for prefix, slot in slots.items():
        for piece, log_prob in enumerate(row(prefix)):
            if piece != tokens.blank_id:
                extend(slots, after, prefix, piece, slot.total() + log_prob, tokens, fusions)
    return after


def extend(slots, after: dict[Prefix, Slot], prefix: Prefix, piece: int, mass: float, tokens, fusions):
    """Add the way from a prefix by a piece; where it leads to a live prefix, to that one's mass."""
    longer = (*prefix, piece)
    if longer in slots:
        after[longer].nonblank = log_add(after[longer].nonblank, mass)
        return
    grown = replace(copy.deepcopy(slots[prefix]), blank=NEVER, nonblank=mass)
    for s, fusion in enumerate(fusions):
        if fusion.prefix_score is not None:
            grown.lm[s] = min(grown.lm[s] + fusion.gain, fusion.prefix_score(longer))
        if fusion.piece_score is not None:
            grown.lm[s] += fusion.piece_score(prefix, piece)
            grown.words[s] += int(tokens.starts_word[piece] or not prefix)
    after[longer] = grown


def closed_words(prefix: Prefix, tokens) -> list[str]:
    """Return the words before the last piece that starts one (a first piece starts none before it)."""
    return tokens.words(prefix[: closed_pieces(prefix, tokens)])


def closed_pieces(prefix: Prefix, tokens) -> int:
    """Return how many pieces the closed words have."""
    return max((i for i, piece in enumerate(prefix) if i > 0 and tokens.starts_word[piece]), default=0)


def fires(fusion: SlowFusion, frame: int, slots: dict[Prefix, Slot], tokens) -> bool:
    kind = fusion.trigger[0]
    if kind == "interval":
        return (frame + 1) % fusion.trigger[1] == 0
    if kind == "end" or not slots or (frame + 1) % fusion.trigger[1]:
        return False
    if kind == "pieces":
        shortest = min(len(prefix) for prefix in slots)
    else:
        shortest = min(sum(1 for p in prefix[1:] if tokens.starts_word[p]) for prefix in slots)
    grew = shortest > fusion.longest_fused
    fusion.longest_fused = max(shortest, fusion.longest_fused)
    return grew
