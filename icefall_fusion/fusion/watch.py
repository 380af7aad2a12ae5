"""What becomes of each word of a reference in the beam: who watches a search changes nothing in it.
Knows: beams, words, how many of them a delayed fusion has scored. Must not know: which models take part.
"""
from __future__ import annotations

from typing import Any, Callable, Mapping, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.search.beam import Beam
from icefall_fusion.search.fusion import Fusion

#: What can become of a word of the reference that the result lacks, in the order of a search.
NEVER, BY_MASS, BY_SCORES, AFTER, IN_LIST = (
    "never in the beam", "left before the LLM spoke, by its mass",
    "left before the LLM spoke, by scores of others", "left after the LLM spoke", "in the list at the end",
)
FATES = (NEVER, BY_MASS, BY_SCORES, AFTER, IN_LIST)


class _Sight(NamedTuple):
    """Where a word stood when it was last in the beam: its rank by score and by mass alone, from 0."""

    by_score: int
    by_mass: int


class _Words:
    """Which words of a reference a hypothesis has right so far, by its best alignment with a beginning of it.

    Sets of words are bits of an integer: bit i is word i of the reference.
    """

    def __init__(self, reference: Sequence[str]) -> None:
        self.reference = list(reference)
        start = [(cost, 0) for cost in range(len(self.reference) + 1)]
        self._rows: dict[tuple[str, ...], list[tuple[int, int]]] = {(): start}
        self._right: dict[tuple[str, ...], int] = {}

    def right(self, words: tuple[str, ...]) -> int:
        """Return the words of the reference that ``words`` have right."""
        if words not in self._right:
            for count in range(1, len(words) + 1):
                if words[:count] not in self._rows:
                    self._rows[words[:count]] = self._extend(self._rows[words[: count - 1]], words[count - 1])
            best = min(self._rows[words], key=lambda cell: (cell[0], -bin(cell[1]).count("1")))
            self._right[words] = best[1]
        return self._right[words]

    def _extend(self, row: Sequence[tuple[int, int]], word: str) -> list[tuple[int, int]]:
        """Return the least edits to each beginning of the reference, and the words right, with one more."""
        new = [(row[0][0] + 1, row[0][1])]
        for place, other in enumerate(self.reference):
            same = word == other
            through = row[place][0] + (not same), row[place][1] | (int(same) << place)
            skipped, more = (new[place][0] + 1, new[place][1]), (row[place + 1][0] + 1, row[place + 1][1])
            new.append(min(through, skipped, more, key=lambda cell: cell[0]))
        return new


class BeamWatch(Fusion):
    """Watches which words of the references are in the beam, and whether a delayed fusion has scored them.

    It asks after every frame, so the search goes frame by frame; the results are the same.

    Args:
        references: words by utterance; others are not watched.
        speaker: the delayed fusion whose scores count; before this one in the search.
        split: from a text to the units of references, where these are characters; words may have several.

    Attributes:
        spoken: by utterance, the words that were scored while they were in the beam (bits, see `fates`).
        last: by utterance, where each word of the reference was last seen.
        final: by utterance, the words that are in the beam at the end.
    """

    source, weight = "watch", 0.0

    def __init__(self, references: Mapping[str, Sequence[str]], speaker: Fusion,
                 split: Callable[[str], Sequence[str]] = str.split) -> None:
        self._references, self._speaker, self._split = references, speaker, split
        self.spoken: dict[str, int] = {}
        self.last: dict[str, dict[int, _Sight]] = {}
        self.final: dict[str, int] = {}

    def begin(self, beam: Beam, index: int, tokens: Any, ids: Sequence[str]) -> None:
        check(tokens is not None, "tokens", "be there when words are watched", None)
        self.index, self._tokens, self._ids = index, tokens, list(ids)
        self._matchers = {name: _Words(self._references[name]) for name in ids if name in self._references}
        self._spelled: dict[int, tuple[str, ...]] = {}
        for name in self._matchers:
            self.spoken[name], self.last[name], self.final[name] = 0, {}, 0

    def fuse(self, beam: Beam, frame: int, active: Tensor) -> bool:
        self._look(beam, active)
        return False

    def finish(self, beam: Beam) -> None:
        for name, present in self._look(beam, torch.ones_like(beam.lens, dtype=torch.bool)).items():
            self.final[name] = present

    def _look(self, beam: Beam, active: Tensor) -> dict[str, int]:
        """Note what is in the beam; return the words that are, by utterance."""
        nodes, alive = beam.node.tolist(), beam.alive.tolist()
        scored = beam.words[..., self._speaker.index].tolist()
        score, mass = beam.score.tolist(), beam.log_total.tolist()
        found = {}
        for b, (name, goes_on) in enumerate(zip(self._ids, active.tolist())):
            if not goes_on or name not in self._matchers:
                continue
            matcher = self._matchers[name]
            slots = [slot for slot, lives in enumerate(alive[b]) if lives]
            words = {slot: self._words(beam, nodes[b][slot]) for slot in slots}
            right = {slot: matcher.right(self._units(words[slot])) for slot in slots}
            for slot in slots:
                self.spoken[name] |= right[slot] & matcher.right(self._units(words[slot][: scored[b][slot]]))
            ranks = [_ranks(right, slots, values[b]) for values in (score, mass)]
            self.last[name].update({word: _Sight(rank, ranks[1][word]) for word, rank in ranks[0].items()})
            found[name] = sum(1 << word for word in ranks[0])
        return found

    def _words(self, beam: Beam, node: int) -> tuple[str, ...]:
        words = self._spelled.get(node)
        if words is None:
            words = self._spelled[node] = tuple(self._tokens.words(beam.arena.pieces(node)))
        return words

    def _units(self, words: Sequence[str]) -> tuple[str, ...]:
        return tuple([unit for word in words for unit in self._split(word)])

    def fates(self, utterance: str, missing: Sequence[int]) -> Optional[list[str]]:
        """Return what became of words of the reference that the result lacks; None: it was not watched.

        Left by its mass: when it was last seen, it stood no better by its mass alone than with all scores.

        Args:
            utterance: its id.
            missing: their numbers.
        """
        if utterance not in self.last:
            return None
        return [self._fate(utterance, word) for word in missing]

    def _fate(self, utterance: str, word: int) -> str:
        if self.final[utterance] >> word & 1:
            return IN_LIST
        if self.spoken[utterance] >> word & 1:
            return AFTER
        sight = self.last[utterance].get(word)
        if sight is None:
            return NEVER
        return BY_SCORES if sight.by_mass < sight.by_score else BY_MASS


def _ranks(right: Mapping[int, int], slots: Sequence[int], values: Sequence[float]) -> dict[int, int]:
    """Return for each word that a slot has right the best rank of such a slot."""
    ranks: dict[int, int] = {}
    for rank, slot in enumerate(sorted(slots, key=lambda slot: -values[slot])):
        bits, word = right[slot], 0
        while bits:
            if bits & 1:
                ranks.setdefault(word, rank)
            bits, word = bits >> 1, word + 1
    return ranks
