"""Groups of utterances searched in turns: a language model works for one while the host works for another.
Knows: searches that go in steps, their fusions. Must not know: how a frame is searched, which model it is.

At an event the host makes words into tokens, grows the trees and lays out the model call, while the GPU has
nothing to do; then the host waits. With two groups the host's work for one falls into the GPU's work for the
other. Each group has its own beam, trees and engine. What utterances have in common never matters, so the
results are those of one batch.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Iterator, Optional

import torch

from icefall_fusion.common.checks import check
from icefall_fusion.search.ctc_prefix import PrefixSearch
from icefall_fusion.search.fusion import Fusion, FusionSet
from icefall_fusion.search.search_input import SearchInput

if TYPE_CHECKING:
    from icefall_fusion.nbest import NBest
    from icefall_fusion.search.search_input import PrefixSearchOptions
    from icefall_fusion.text.tokens import AcousticTokens

GROUPS = 2  # one is scored, the other is searched
LEAST = 16  # utterances of a batch from which on two groups are better than one


def search_in_turns(inputs: SearchInput, options: PrefixSearchOptions, tokens: Optional[AcousticTokens],
                    fusions: FusionSet) -> list[NBest]:
    """Search groups of the utterances of a batch in turns; arguments as of `PrefixSearch`.

    Raises:
        ValueError: ``options.groups`` asks for several, and a fusion serves but one.
    """
    count = min(options.groups or automatic_groups(inputs, fusions), len(inputs.ids))
    sets = [fusions] if count == 1 else split(fusions, count)
    rows = alternate(inputs.lens.tolist(), count)

    def open_group(number: int) -> PrefixSearch:
        part = select(inputs, rows[number]) if len(rows) > 1 else inputs
        return PrefixSearch(part, options, tokens, sets[number])

    first = open_group(0)
    if options.groups is None and count > 1 and first.search.rule is None:  # it goes frame by frame
        del first
        sets, rows = [fusions], alternate(inputs.lens.tolist(), 1)
        first = open_group(0)

    def steps(number: int) -> Iterator[None]:
        search = first if number == 0 else open_group(number)
        yield from search.steps()
        return search.nbests()

    found: dict[int, NBest] = {}
    for group, lists in zip(rows, take_turns([steps(number) for number in range(len(sets))])):
        found.update(zip(group, lists))
    return [found[row] for row in range(len(inputs.ids))]


def automatic_groups(inputs: SearchInput, fusions: FusionSet) -> int:
    """Return how many groups are best: two on a GPU if a model's scores are collected in steps, else one."""
    stepping = any(type(fusion).in_steps is not Fusion.in_steps for fusion in fusions.members)
    splitting = all(type(fusion).for_groups is not Fusion.for_groups for fusion in fusions.members)
    good = inputs.log_probs.is_cuda and len(inputs.ids) >= LEAST and stepping and splitting
    return GROUPS if good else 1


def split(fusions: FusionSet, count: int) -> list[FusionSet]:
    """Return fusions for each of ``count`` groups."""
    members = []
    for fusion in fusions.members:
        groups = fusion.for_groups(count)
        rule = f"be none or 1 with the fusion {fusion.source!r}, which serves one group alone"
        check(groups is not None, "PrefixSearchOptions.groups", rule, count)
        members.append(groups)
    return [FusionSet([groups[number] for groups in members], fusions.tokens) for number in range(count)]


def alternate(lens: list[int], groups: int) -> list[list[int]]:
    """Return the rows of each group, the longest first: all have work to the end. One group is as it was."""
    if groups == 1:
        return [list(range(len(lens)))]
    order = sorted(range(len(lens)), key=lambda row: -lens[row])
    return [order[number::groups] for number in range(groups)]


def select(inputs: SearchInput, rows: list[int]) -> SearchInput:
    """Return some utterances, the longest first; a batch in that order is not copied."""
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if step > 0 and rows == list(range(rows[0], rows[-1] + 1, step)):
        index = slice(rows[0], rows[-1] + 1, step)
    else:
        index = torch.tensor(rows, device=inputs.lens.device)
    frames = slice(int(inputs.lens[rows[0]]))
    log_probs, best, live = (x[index][:, frames] for x in (inputs.log_probs, inputs.best, inputs.live))
    return SearchInput(log_probs, best, live, inputs.lens[index], [inputs.ids[row] for row in rows],
                       inputs.blank)


def take_turns(groups: list[Iterator[None]]) -> list[list[NBest]]:
    """Let each group go one step after the other, until all are done; return what they return."""
    going, found = dict(enumerate(groups)), {}
    try:
        while going:
            for number, steps in list(going.items()):
                try:
                    next(steps)
                except StopIteration as done:
                    found[number] = done.value
                    del going[number]
    finally:
        for steps in going.values():  # one has failed
            steps.close()
    return [found[number] for number in range(len(groups))]
