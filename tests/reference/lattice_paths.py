"""Slow twins: all paths of a lattice, all sentences of a graph, one by one. For tests on tiny ones.
Knows: plain lattices and graphs. Must not know: k2, beams.
"""
from __future__ import annotations

import math
from collections import defaultdict


def all_paths(lattices, row):
    """Yield (arcs, label list) of every path of one lattice."""
    begin, end = lattices.bounds[row : row + 2].tolist()
    if begin == end:
        return
    leaving = defaultdict(list)
    for arc in range(begin, end):
        leaving[int(lattices.source[arc])].append(arc)
    last = int(lattices.target[begin:end].max())
    stack = [(0, ())]
    while stack:
        state, arcs = stack.pop()
        if state == last:
            yield arcs
            continue
        stack += [(int(lattices.target[arc]), (*arcs, arc)) for arc in leaving[state]]


def words_of_paths(lattices, row, graph_weight, merge="sum"):
    """Return {output labels: (score, graph score of the best path)} of one lattice; equal ones merged."""
    scores_of = defaultdict(list)
    for arcs in all_paths(lattices, row):
        outputs = tuple(label for label in (int(lattices.output[arc]) for arc in arcs) if label)
        hlg = sum(float(lattices.hlg[arc]) for arc in arcs)
        scores_of[outputs].append((sum(float(lattices.ctc[arc]) for arc in arcs) + graph_weight * hlg, hlg))
    result = {}
    for outputs, scores in scores_of.items():
        best = max(scores)
        total = best[0]
        if merge == "sum":
            total = best[0] + math.log(sum(math.exp(score - best[0]) for score, _ in scores))
        result[outputs] = (total, best[1])
    return result


def ngram_on_path(ngram, lattices, arcs, outputs):
    """Return the best score of an n-gram graph (kind G) along a path; -inf if it has no way.

    A step of backing off takes an arc without words, as a frame of silence.
    """
    leaving = defaultdict(list)
    for arc in range(len(ngram.source)):
        step = (int(ngram.target[arc]), float(ngram.score[arc]))
        leaving[int(ngram.source[arc]), int(ngram.label[arc])].append(step)
    now = {0: 0.0}
    for arc in arcs:
        words = [*outputs[int(lattices.output[arc])], *([-1] if int(lattices.label[arc]) == -1 else [])]
        for word in words or [0]:
            after: dict = {}
            for state, score in now.items():
                for target, more in leaving[state, word]:
                    after[target] = max(after.get(target, -math.inf), score + more)
            now = after
    return max(now.values(), default=-math.inf)


def graph_sentences(graph, frames):
    """Return {(labels of frames, words): best score} of all paths of a graph of so many frames."""
    leaving = defaultdict(list)
    for arc in range(len(graph.source)):
        leaving[int(graph.source[arc])].append(arc)
    now = {(0, (), ()): 0.0}
    for frame in range(frames + 1):
        after: dict = {}
        for (state, labels, words), score in now.items():
            for arc in leaving[state]:
                label = int(graph.label[arc])
                if (label == -1) != (frame == frames):
                    continue
                longer = (*words, *graph.outputs[int(graph.output[arc])])
                key = (int(graph.target[arc]), (*labels, label) if label >= 0 else labels, longer)
                value = score + float(graph.score[arc])
                after[key] = max(after.get(key, -math.inf), value)
        now = after
    result: dict = {}
    for (_, labels, words), score in now.items():
        result[labels, words] = max(result.get((labels, words), -math.inf), score)
    return result


def collapse(labels, topology):
    """Return the piece sequences that the labels of frames can stand for."""
    sequences, last = [[]], 0
    for label in labels:
        longer = []
        for pieces in sequences:
            again = label == last and label != 0
            if label == 0 or again:
                longer.append(pieces)
            if label != 0 and (not again or topology == "modified"):
                longer.append([*pieces, label])
        sequences, last = longer, label
    return sequences
