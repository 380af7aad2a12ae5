"""N-best lists of any search as FSAs for k2's tools: one linear FSA a hypothesis, or one prefix tree a list.
Knows: N-best lists, k2. Must not know: how lists were found.
"""
from __future__ import annotations

from typing import Any, Mapping, Optional

import torch

from icefall_fusion.common.checks import check
from icefall_fusion.lattice.k2_lattice import load_k2
from icefall_fusion.nbest import NBest


def linear_fsas(nbest: NBest, label_ids: Optional[Mapping[str, int]] = None) -> Any:
    """Return the hypotheses of one utterance as a k2 FsaVec of linear FSAs, best first.

    Args:
        nbest: the list.
        label_ids: id of each word, for FSAs over words; none: they are over acoustic pieces.

    Returns:
        an FsaVec; the final arc of each has the hypothesis's total score, all others 0, and the attribute
        ``rank`` says which hypothesis it is.

    Raises:
        ValueError: the list is empty, or a word has no id.
    """
    k2 = load_k2()
    rows = _labels(nbest, label_ids)
    fsas = k2.linear_fsa(rows)
    owner = torch.tensor([rank for rank, row in enumerate(rows) for _ in range(len(row) + 1)])
    totals = torch.tensor([hypothesis.total for hypothesis in nbest], dtype=torch.float32)
    fsas.scores = torch.where(fsas.labels == -1, totals[owner], torch.zeros(len(owner)))
    fsas.rank = owner.to(torch.int32)
    return fsas


def prefix_tree(nbest: NBest, label_ids: Optional[Mapping[str, int]] = None) -> Any:
    """Return the hypotheses of one utterance as one k2 FSA that shares what they begin with.

    Args, raises: as `linear_fsas`. Hypotheses of equal labels are one, with the best of their totals. Final
    arcs have the totals and the ``rank``, other arcs 0 and -1.
    """
    k2 = load_k2()
    states: dict[tuple[int, ...], int] = {(): 0}
    inner: list[tuple[int, int, int]] = []
    ends: dict[int, tuple[float, int]] = {}
    for rank, row in enumerate(_labels(nbest, label_ids)):
        for length in range(1, len(row) + 1):
            prefix = tuple(row[:length])
            if prefix not in states:
                states[prefix] = len(states)
                inner.append((states[prefix[:-1]], states[prefix], row[length - 1]))
        end = (nbest[rank].total, -rank)
        state = states[tuple(row)]
        ends[state] = max(ends.get(state, end), end)
    final = len(states)
    arcs = [(source, target, label, 0.0, -1) for source, target, label in inner]
    arcs += [(source, final, -1, total, -rank) for source, (total, rank) in ends.items()]
    arcs.sort(key=lambda arc: (arc[0], arc[2] == -1, arc[2]))
    table = torch.tensor([arc[:3] for arc in arcs], dtype=torch.int32)
    scores = torch.tensor([arc[3] for arc in arcs], dtype=torch.float32)
    fsa = k2.Fsa(torch.cat([table, scores.view(torch.int32).unsqueeze(1)], dim=1))
    fsa.rank = torch.tensor([arc[4] for arc in arcs], dtype=torch.int32)
    return k2.arc_sort(fsa)


def _labels(nbest: NBest, label_ids: Optional[Mapping[str, int]]) -> list[list[int]]:
    check(len(nbest) > 0, f"the N-best list of {nbest.utterance}", "hold a hypothesis", 0)
    if label_ids is None:
        return [list(hypothesis.tokens) for hypothesis in nbest]
    lacking = [word for h in nbest for word in h.words() if word not in label_ids]
    check(not lacking, "label_ids", f"have every word of {nbest.utterance}", lacking[:3])
    return [[label_ids[word] for word in h.words()] for h in nbest]
