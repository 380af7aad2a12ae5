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
    """Return {sayings: (score, graph score of the best path)} of one lattice; equal sayings merged."""
    found = defaultdict(list)
    for arcs in all_paths(lattices, row):
        said = tuple(s for s in (int(lattices.saying[arc]) for arc in arcs) if s)
        hlg = sum(float(lattices.hlg[arc]) for arc in arcs)
        found[said].append((sum(float(lattices.ctc[arc]) for arc in arcs) + graph_weight * hlg, hlg))
    result = {}
    for said, scores in found.items():
        best = max(scores)
        total = best[0]
        if merge == "sum":
            total = best[0] + math.log(sum(math.exp(score - best[0]) for score, _ in scores))
        result[said] = (total, best[1])
    return result


def graph_sentences(graph, frames):
    """Return {(labels heard, words said): best score} of all paths of a graph of so many frames."""
    leaving = defaultdict(list)
    for arc in range(len(graph.source)):
        leaving[int(graph.source[arc])].append(arc)
    now = {(0, (), ()): 0.0}
    for frame in range(frames + 1):
        after: dict = {}
        for (state, heard, said), score in now.items():
            for arc in leaving[state]:
                label = int(graph.label[arc])
                if (label == -1) != (frame == frames):
                    continue
                words = (*said, *graph.sayings[int(graph.saying[arc])])
                key = (int(graph.target[arc]), (*heard, label) if label >= 0 else heard, words)
                value = score + float(graph.score[arc])
                after[key] = max(after.get(key, -math.inf), value)
        now = after
    result: dict = {}
    for (_, heard, said), score in now.items():
        result[heard, said] = max(result.get((heard, said), -math.inf), score)
    return result
