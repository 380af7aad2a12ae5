"""Slow twins of the transducer search: all alignments, a beam over dictionaries, icefall's, ALSD.
Knows: plain functions of a transducer. Must not know: tensors of a search, the package's search.

A model is two functions: ``log_probs(frame, prefix) -> list[float]`` over the pieces, and the blank's id.
"""
from __future__ import annotations

import math
from typing import Callable, Sequence

Prefix = tuple[int, ...]
LogProbs = Callable[[int, Prefix], Sequence[float]]
NEVER = -math.inf


def log_add(*values: float) -> float:
    top = max(values)
    return top if top == NEVER else top + math.log(sum(math.exp(value - top) for value in values))


def all_alignments(log_probs: LogProbs, frames: int, blank: int, symbols: int,
                   pieces: int) -> dict[Prefix, float]:
    """Return the log-prob of every prefix, every alignment walked by itself.

    symbols: 1: a frame emits blank or one piece; more: up to so many pieces, and then blank.
    """
    found: dict[Prefix, list[float]] = {}

    def walk(frame: int, prefix: Prefix, emitted: int, score: float) -> None:
        if frame == frames:
            found.setdefault(prefix, []).append(score)
            return
        row = log_probs(frame, prefix)
        walk(frame + 1, prefix, 0, score + row[blank])
        if emitted == symbols:
            return
        for piece in range(pieces):
            if piece != blank and symbols == 1:
                walk(frame + 1, (*prefix, piece), 0, score + row[piece])
            elif piece != blank:
                walk(frame, (*prefix, piece), emitted + 1, score + row[piece])

    walk(0, (), 0, 0.0)
    return {prefix: log_add(*scores) for prefix, scores in found.items()}


def modified_beam_search(log_probs: LogProbs, frames: int, blank: int,
                         beam: int) -> list[tuple[Prefix, float]]:
    """Return (pieces, log-prob) of the final beam, best first, as icefall describes it.

    In a frame every hypothesis is extended by every piece and by blank; the ``beam`` best of all of these
    stay, and those that then spell the same are one, their probabilities added.
    """
    hypotheses: dict[Prefix, float] = {(): 0.0}
    for frame in range(frames):
        ways = []
        for prefix, score in hypotheses.items():
            for piece, log_prob in enumerate(log_probs(frame, prefix)):
                ways.append((score + log_prob, prefix if piece == blank else (*prefix, piece)))
        ways.sort(key=lambda way: -way[0])
        hypotheses = {}
        for score, prefix in ways[:beam]:
            hypotheses[prefix] = log_add(hypotheses.get(prefix, NEVER), score)
    return sorted(hypotheses.items(), key=lambda found: -found[1])


def alsd(log_probs: LogProbs, frames: int, blank: int, beam: int, longest: int) -> list[tuple[Prefix, float]]:
    """Return (pieces, log-prob) of complete hypotheses, best first: alignment-length synchronous decoding.

    Saon et al. 2020, algorithm 1. All hypotheses of a step have as many frames and pieces together, so one of
    u pieces is in frame i - u. The ``beam`` best of a step stay; equal ones are one. What has ended the last
    frame is complete.

    longest: pieces of a hypothesis at most.
    """
    hypotheses: dict[Prefix, float] = {(): 0.0}
    complete: dict[Prefix, float] = {}
    for step in range(frames + longest):
        ways: dict[Prefix, float] = {}
        for prefix, score in hypotheses.items():
            frame = step - len(prefix)
            if frame >= frames:
                continue
            row = log_probs(frame, prefix)
            after = complete if frame == frames - 1 else ways
            after[prefix] = log_add(after.get(prefix, NEVER), score + row[blank])
            for piece, log_prob in enumerate(row):
                if piece != blank and len(prefix) < longest:
                    longer = (*prefix, piece)
                    ways[longer] = log_add(ways.get(longer, NEVER), score + log_prob)
        hypotheses = dict(sorted(ways.items(), key=lambda found: -found[1])[:beam])
    return sorted(complete.items(), key=lambda found: -found[1])


def dictionary_search(log_probs: LogProbs, frames: int, blank: int, beam: int, symbols: int,
                      extra: Callable[[Prefix], float] = lambda prefix: 0.0,
                      score_beam: float = math.inf) -> list[tuple[Prefix, float]]:
    """Return (pieces, log-mass) of the final beam, best first, of the search as we define it.

    Equal prefixes are one before pruning. With more than one symbol a frame has steps; a prefix is what has
    ended the frame (done) and what may emit more (open), and both count when it is pruned.

    extra: what language models add to a prefix's rank, of its pieces alone.
    score_beam: a prefix whose rank is further below the best dies, after each step and at a frame's end.
    """
    def near(masses: dict[Prefix, float]) -> list[Prefix]:
        ranks = {prefix: mass + extra(prefix) for prefix, mass in masses.items() if mass > NEVER}
        least = max(ranks.values(), default=NEVER) - score_beam
        return sorted((p for p in ranks if ranks[p] >= least), key=lambda p: -ranks[p])

    beams: dict[Prefix, float] = {(): 0.0}
    for frame in range(frames):
        opened, done = beams, dict.fromkeys(beams, NEVER)
        for _ in range(symbols):
            opened, done = _step(log_probs, frame, blank, symbols, opened, done)
            total = {prefix: log_add(opened.get(prefix, NEVER), done.get(prefix, NEVER))
                     for prefix in {**done, **opened}}
            kept = near(total)[:beam]
            opened = {prefix: opened.get(prefix, NEVER) for prefix in kept}
            done = {prefix: done.get(prefix, NEVER) for prefix in kept}
        if symbols == 1:
            beams = opened
        else:
            ends = {p: log_add(done[p], opened[p] + log_probs(frame, p)[blank]) for p in opened}
            beams = {prefix: ends[prefix] for prefix in near(ends)}
    return sorted(beams.items(), key=lambda found: -(found[1] + extra(found[0])))


def _step(log_probs: LogProbs, frame: int, blank: int, symbols: int, opened: dict[Prefix, float],
          done: dict[Prefix, float]) -> tuple[dict[Prefix, float], dict[Prefix, float]]:
    after, ended = {}, dict(done)
    for prefix, mass in opened.items():
        if mass == NEVER:
            continue
        for piece, log_prob in enumerate(log_probs(frame, prefix)):
            into = after if piece != blank or symbols == 1 else ended
            longer = prefix if piece == blank else (*prefix, piece)
            into[longer] = log_add(into.get(longer, NEVER), mass + log_prob)
    return after, ended
