"""Beam search along lattices, batched: hypotheses are in states of a lattice, fusions score their words.
Knows: plain lattices, the Fusion protocol. Must not know: k2, which language model it is, log-probs.

Hypotheses of the same words in the same state are merged. Their masses add, or the better one counts. The one
that had its words already (a stay) keeps the state of its fusions, as in the prefix search.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import MutableMapping, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from icefall_fusion.common.checks import check, check_at_least, check_choice
from icefall_fusion.lattice.graph import Labels, outputs_of
from icefall_fusion.lattice.lattices import Lattices
from icefall_fusion.lattice.nbest_lists import beam_lists
from icefall_fusion.nbest import NBest
from icefall_fusion.search.beam import HASH_FACTOR, Beam, PrefixArena
from icefall_fusion.search.fusion import Fusion, FusionSet
from icefall_fusion.text.tokens import AcousticTokens

_NEVER = float("-inf")
_KEYS: MutableMapping[Labels, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()  # made once a vocabulary


@dataclass(frozen=True)
class LatticeBeamOptions:
    """Options of the beam search along a lattice.

    Args:
        beam: hypotheses kept per utterance. The same words are in many states of a lattice at a time, so ten
            times the beam of the prefix search keeps as many different words.
        merge: sum: the masses of equal words in the same state add, as in the prefix search; max: the best
            path counts, as in k2's shortest path.
        score_beam: hypotheses more than this many nats below the best are dropped; none: no limit.
        nbest: hypotheses returned; none: all of the beam.
    """

    beam: int = 100
    merge: str = "sum"
    score_beam: Optional[float] = None
    nbest: Optional[int] = None

    def __post_init__(self) -> None:
        name, score_beam = "LatticeBeamOptions.", self.score_beam
        check_at_least(1, self, "beam")
        check_choice(self.merge, ("sum", "max"), name + "merge")
        check(score_beam is None or score_beam > 0, name + "score_beam", "be none or above 0", score_beam)
        check(self.nbest is None or self.nbest >= 1, name + "nbest", "be none or at least 1", self.nbest)


@torch.no_grad()
def lattice_beam_search(
    lattices: Lattices,
    graph_weight: float,
    labels: Labels,
    options: Optional[LatticeBeamOptions] = None,
    fusions: Sequence[Fusion] = (),
    tokens: Optional[AcousticTokens] = None,
    frame_shift: Optional[float] = None,
) -> list[NBest]:
    """Search the best words along lattices, time-synchronously.

    Args:
        lattices: of a batch; those without arcs leave an empty list.
        graph_weight: factor of the graph's own scores.
        labels: vocabulary of the output labels (see ``DecodingGraph.labels``).
        options: see LatticeBeamOptions.
        fusions: delayed fusions.
        tokens: the acoustic pieces, for word times; none: no times.
        frame_shift: seconds a frame, for word times; none: no times.

    Returns:
        One NBest per utterance, best first; scores "ctc" (with ``sum`` of all alignments that the beam kept),
        "hlg" (of the best path to these words), one per fusion, "words" and "total".

    Raises:
        ValueError: a fusion wants to score extensions (shallow fusion).
    """
    options = options or LatticeBeamOptions()
    if not len(lattices):
        return []
    search = _LatticeSearch(lattices, graph_weight, labels, options, fusions)
    search.run()
    return beam_lists(search.searched(), labels, graph_weight, fusions, tokens, frame_shift)


class _Candidates(NamedTuple):
    """Hypotheses one arc longer, each [n]: the flat slot before, the arc, the mass, the hash of the words."""

    slot: Tensor
    arc: Tensor
    mass: Tensor
    history: Tensor


class _Groups(NamedTuple):
    """Candidates merged by state and words, each [g]: the one that stays, the best one, their mass."""

    keeper: Tensor
    best: Tensor
    mass: Tensor


class SearchedBeam(NamedTuple):
    """The beam after a search; of each slot also the graph's score and the best path.

    mass: [B,K] float64, -inf for dead slots; hlg: [B,K] float64.
    steps: for each frame [B,K] slots before and [B,K] arcs (-1 where an utterance had ended).
    """

    beam: Beam
    lattices: Lattices
    mass: Tensor
    hlg: Tensor
    steps: list[tuple[Tensor, Tensor]]
    nbest: int


class _LatticeSearch:
    """One search over one batch: in each frame extend, merge, prune, fuse."""

    def __init__(
        self, lattices: Lattices, graph_weight: float, labels: Labels, options: LatticeBeamOptions,
        fusions: Sequence[Fusion],
    ) -> None:
        self.lattices, self.options = lattices, options
        device, batch = lattices.source.device, len(lattices)
        self.device, self.beam_size = device, options.beam
        self.score = lattices.score({"ctc": 1.0, "hlg": graph_weight})
        self._index_states()
        lens = torch.where(lattices.counts > 0, lattices.lens, torch.zeros_like(lattices.lens)).to(device)
        starts = torch.tensor(labels.starts_word, device=device)
        arena = PrefixArena(batch, options.beam, device, starts, rows=int(lens.max()) + 2)
        self.beam = Beam(arena, lens, labels.blank_id, len(fusions))
        self.state = self.first_state.unsqueeze(1).repeat(1, options.beam)  # [B,K] of all lattices' states
        self.mass = torch.full((batch, options.beam), _NEVER, dtype=torch.float64, device=device)
        self.mass[:, 0] = torch.where((lattices.counts > 0).to(device), 0.0, _NEVER)
        self.hlg = torch.zeros_like(self.mass)
        self.history = torch.zeros_like(self.state)
        self.factor, self.addend = (keys.to(device) for keys in _history_keys(labels))
        self.steps: list[tuple[Tensor, Tensor]] = []
        self._show_masses()
        self.fusions = FusionSet(fusions, labels)
        self.fusions.begin(self.beam, lattices.ids)
        shallow = [fusion.source for fusion in self.fusions.shallow]
        check(not shallow, "fusions along a lattice", "be delayed, none that score extensions", shallow)

    def _index_states(self) -> None:
        """Number the states of all lattices in one row; note where the arcs of each begin."""
        lattices, device = self.lattices, self.device
        owner = torch.arange(len(lattices)).repeat_interleave(lattices.counts).to(device)  # [A]
        sizes = torch.ones(len(lattices), dtype=torch.int64, device=device)
        sizes = sizes.scatter_reduce(0, owner, lattices.target + 1, "amax")
        self.first_state = sizes.cumsum(0) - sizes
        self.owner = torch.arange(len(lattices), device=device).repeat_interleave(sizes)  # of states
        shift = self.first_state[owner]
        self.target = lattices.target + shift
        self.arc_count = torch.bincount(lattices.source + shift, minlength=len(self.owner))
        self.first_arc = self.arc_count.cumsum(0) - self.arc_count

    def run(self) -> None:
        """Search all frames, and the step into the final state of each utterance."""
        lens = self.beam.lens
        for frame in range(int(lens.max()) + 1):
            self.beam.frame = frame
            self._step((frame <= lens) & (lens > 0))
            self.fusions.fuse(self.beam, frame, frame < lens)
        self.fusions.finish(self.beam)

    def searched(self) -> SearchedBeam:
        nbest = min(self.options.nbest or self.beam_size, self.beam_size)
        return SearchedBeam(self.beam, self.lattices, self.mass, self.hlg, self.steps, nbest)

    def _step(self, active: Tensor) -> None:
        """Let the hypotheses of the utterances [B] bool that have this frame go along their arcs."""
        new = self._extend(active)
        groups = self._merge(new)
        row, rank, chosen = self._prune(new, groups)
        keeper, best = groups.keeper[chosen], groups.best[chosen]
        size, shape = self.beam_size, self.state.shape
        source = torch.arange(size, device=self.device).expand(shape).clone()
        before, arcs = source.clone(), torch.full(shape, -1, device=self.device)
        output = torch.zeros(shape, dtype=torch.int64, device=self.device)
        mass = self.mass.masked_fill(active.unsqueeze(1), _NEVER)
        hlg = self.hlg.masked_fill(active.unsqueeze(1), 0.0)
        slots = (row, rank)
        source[slots], before[slots] = new.slot[keeper] % size, new.slot[best] % size
        arcs[slots] = new.arc[best]
        output[slots] = self.lattices.output[new.arc[keeper]]
        mass[slots] = groups.mass[chosen]
        hlg[slots] = self.hlg.view(-1)[new.slot[best]] + self.lattices.hlg[new.arc[best]].double()
        self.state[slots], self.history[slots] = self.target[new.arc[keeper]], new.history[keeper]
        self.mass, self.hlg = mass, hlg
        self.steps.append((before, arcs))
        self._follow(source, output)

    def _extend(self, active: Tensor) -> _Candidates:
        alive = (self.mass > _NEVER) & active.unsqueeze(1)
        slots = alive.view(-1).nonzero().squeeze(1)
        states = self.state.view(-1)[slots]
        counts = self.arc_count[states]
        each = torch.arange(len(slots), device=self.device).repeat_interleave(counts)
        inside = torch.arange(len(each), device=self.device) - (counts.cumsum(0) - counts)[each]
        arc, slot = self.first_arc[states][each] + inside, slots[each]
        mass = self.mass.view(-1)[slot] + self.score[arc]
        possible = mass > _NEVER
        slot, arc, mass = slot[possible], arc[possible], mass[possible]
        output, history = self.lattices.output[arc], self.history.view(-1)[slot]
        return _Candidates(slot, arc, mass, history * self.factor[output] + self.addend[output])

    def _merge(self, new: _Candidates) -> _Groups:
        """Merge candidates of the same words in the same state."""
        count = len(new.slot)
        key = (new.history * HASH_FACTOR) ^ (self.target[new.arc] * -0x61C8864680B583EB)
        _, group = torch.unique(key, return_inverse=True)
        groups = int(group.max()) + 1 if count else 0
        nothing = torch.full((groups,), _NEVER, dtype=torch.float64, device=self.device)
        highest = nothing.scatter_reduce(0, group, new.mass, "amax")
        order = torch.arange(count, device=self.device)
        last = torch.full((groups,), count, device=self.device)
        at_best = torch.where(new.mass == highest[group], order, count)
        best = last.scatter_reduce(0, group, at_best, "amin")
        stays = self.lattices.output[new.arc] == 0
        # of those that had their words already the best, else the best of all
        stay_mass = new.mass.masked_fill(~stays, _NEVER)
        highest_stay = nothing.scatter_reduce(0, group, stay_mass, "amax")
        wanted = stays & (new.mass == highest_stay[group])
        keeper = last.scatter_reduce(0, group, torch.where(wanted, order, count), "amin")
        keeper = torch.where(keeper < count, keeper, best)
        mass = highest
        if self.options.merge == "sum":
            shares = (new.mass - highest[group]).exp()
            mass = highest + torch.zeros_like(highest).index_add_(0, group, shares).log()
        return _Groups(keeper, best, mass)

    def _prune(self, new: _Candidates, groups: _Groups) -> tuple[Tensor, Tensor, Tensor]:
        """Return row, rank and group of the hypotheses that stay, best first in each row; ties in order."""
        fused = self.beam.fused.view(-1)[new.slot[groups.keeper]].double()
        ranking = groups.mass + fused
        row = self.owner[self.target[new.arc[groups.keeper]]]
        order = ranking.sort(descending=True, stable=True).indices
        order = order[row[order].sort(stable=True).indices]
        row = row[order]
        counts = torch.bincount(row, minlength=len(self.lattices))
        begins = counts.cumsum(0) - counts
        rank = torch.arange(len(row), device=self.device) - begins[row]
        kept = rank < self.beam_size
        if self.options.score_beam is not None:
            kept &= ranking[order] >= ranking[order][begins[row]] - self.options.score_beam
        return row[kept], rank[kept], order[kept]

    def _follow(self, source: Tensor, output: Tensor) -> None:
        """Bring the beam that fusions see up to date."""
        beam, grew = self.beam, output > 0
        node, last = beam.node.gather(1, source), beam.last.gather(1, source)
        born = beam.arena.add_row(node, output)
        beam.node.copy_(torch.where(grew, born, node))
        beam.last.copy_(torch.where(grew, output, last))
        self._show_masses()
        beam.fused = beam.fused.gather(1, source)
        self.fusions.carry(beam, source, [], None)
        self.fusions.advance(beam, source, grew)

    def _show_masses(self) -> None:
        best = self.mass.amax(1)
        best = torch.where(best > _NEVER, best, torch.zeros_like(best))
        self.beam.offset = best
        self.beam.log_total.copy_(self.mass - best.unsqueeze(1))


def _history_keys(labels: Labels) -> tuple[Tensor, Tensor]:
    """Return the factor and the addend of the hash for each output label, two int64 tensors.

    The hash is of words, not of labels: "of" and "the" on two arcs or on one are the same words.
    """
    if labels in _KEYS:
        return _KEYS[labels]
    outputs = outputs_of(labels)
    highest = max((word for output in outputs for word in output), default=0)
    generator = torch.Generator().manual_seed(1234)
    low = torch.iinfo(torch.int64)
    keys = torch.randint(low.min, low.max, (highest + 1,), generator=generator, dtype=torch.int64)
    factors = torch.ones(len(outputs), dtype=torch.int64)
    addends = torch.zeros(len(outputs), dtype=torch.int64)
    for index in range(max(map(len, outputs))):
        longer = torch.tensor([i for i, output in enumerate(outputs) if len(output) > index])
        words = torch.tensor([outputs[i][index] for i in longer.tolist()])
        factors[longer] *= HASH_FACTOR
        addends[longer] = addends[longer] * HASH_FACTOR + keys[words]
    _KEYS[labels] = factors, addends
    return factors, addends
