"""Helpers of the search tests: random emissions, and fusions with small but real language models.
Knows: search, tokens. Must not know: large language models, what is tested.
"""
from __future__ import annotations

import math

import pytest
import torch

from icefall_fusion.common.native_build import load_native
from icefall_fusion.search import Fusion, PrefixSearchOptions, ctc_prefix_search
from icefall_fusion.text.tokens import AcousticTokens

NEVER = -math.inf
TOKENS = AcousticTokens.from_pieces(["<blk>", "▁a", "b", "▁c", "d", "▁e"], blank_id=0)


def emissions(seed, batch, frames, pieces, sharpness=2.0, blank_bias=0.0, blank=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, frames, pieces, generator=generator) * sharpness
    logits[..., blank] += blank_bias * (torch.rand(batch, frames, generator=generator) > 0.3)
    return logits.log_softmax(-1)


ENGINE = {"engine": "auto"}  # of searches that name none; see `each_engine`


@pytest.fixture(scope="module", autouse=True, params=["native", "torch"])
def each_engine(request):
    """Run a module's tests by compiled code (where it serves: for few shallow fusions), and by tensors."""
    if request.param == "native":
        load_native()
    ENGINE["engine"] = "auto" if request.param == "native" else "torch"
    yield request.param
    ENGINE["engine"] = "auto"


def search(log_probs, lens=None, tokens=None, fusions=(), ids=None, blank_id=None, **options):
    if lens is None:
        lens = torch.full((log_probs.shape[0],), log_probs.shape[1])
    options = {**ENGINE, **options}
    return ctc_prefix_search(log_probs, lens, PrefixSearchOptions(**options), tokens, fusions, ids, blank_id)


def listing(nbest):
    return [(tuple(h.tokens), h.scores["ctc"]) for h in nbest]


def assert_same(found, expected, tolerance=1e-4):
    assert [prefix for prefix, *_ in found] == [prefix for prefix, *_ in expected]
    for (_, score, *_), (_, wanted, *_) in zip(found, expected):
        assert score == pytest.approx(wanted, abs=tolerance)


def assert_near(found, expected, tolerance=1e-3):
    """Hold the better half of one list to another one. Rounding differs among devices: where two scores are
    nearly equal, either may come first, and either may have the last place of a beam."""
    assert abs(len(found) - len(expected)) <= 1
    scores = dict(found)
    for prefix, score in expected[: (len(expected) + 1) // 2]:
        assert scores[prefix] == pytest.approx(score, abs=tolerance)


class Spy(Fusion):
    """A fusion of weight 0 that watches the beam."""

    source, weight = "spy", 0.0

    def begin(self, beam, index, tokens, ids):
        self.index, self.reborn, self.born = index, 0, set()

    def advance(self, beam, source, grew):
        for node, new in zip(beam.node.flatten().tolist(), grew.flatten().tolist()):
            if new:
                name = (node % beam.arena.row_size // beam.arena.beam, tuple(beam.arena.pieces(node)))
                self.reborn += name in self.born
                self.born.add(name)


def bigram_table(pieces=6):
    generator = torch.Generator().manual_seed(99)
    table = (torch.randn(pieces, pieces, generator=generator) * 2).log_softmax(-1)  # row 0: sentence start
    return table  # column 0: sentence end


class Bigram(Spy):
    """Shallow fusion with a bigram model over pieces; its state is the last piece."""

    source, scores_extensions = "bigram", True

    def __init__(self, weight, word_bonus=0.0, eos=False):
        self.weight, self.word_bonus, self.eos, self.table = weight, word_bonus, eos, bigram_table()
        self.calls = 0

    def extension_scores(self, beam, pieces, active):
        self.calls += 1
        scores = self.table[beam.state[..., self.index].unsqueeze(2), pieces.unsqueeze(1)]
        unread = ~(beam.asked & active.unsqueeze(1))
        return scores.masked_fill(unread.unsqueeze(2), math.nan)

    def advance(self, beam, source, grew):
        state = beam.state[..., self.index]
        state.copy_(torch.where(grew, beam.last, state))

    def finish(self, beam):
        if self.eos:
            gain = self.table[beam.state[..., self.index], 0]
            beam.lm[..., self.index] += gain
            beam.fused += self.weight * gain


class WordLengths(Spy):
    """Delayed fusion: every few frames, minus the squared length of each closed word (in pieces)."""

    source = "lengths"

    def __init__(self, weight, word_bonus=0.0, every=1):
        self.weight, self.word_bonus, self.every = weight, word_bonus, every

    def begin(self, beam, index, tokens, ids):
        super().begin(beam, index, tokens, ids)
        self.tokens = tokens

    def _score(self, beam, nodes, active):
        for b, row in enumerate(nodes.tolist()):
            for k, node in enumerate(row):
                if not active[b] or not beam.alive[b, k]:
                    continue
                words = self.tokens.words(beam.arena.pieces(node))
                score = -float(sum(len(word) ** 2 for word in words))
                lm, paid = beam.lm[b, k, self.index], beam.words[b, k, self.index]
                beam.fused[b, k] += self.weight * (score - lm) + self.word_bonus * (len(words) - paid)
                beam.lm[b, k, self.index], beam.words[b, k, self.index] = score, len(words)

    def fuse(self, beam, frame, active):
        due = bool(self.every) and frame % self.every == 0
        if due:
            self._score(beam, beam.boundary, active)
        return due

    def finish(self, beam):
        self._score(beam, beam.node, torch.ones(beam.lens.shape, dtype=torch.bool))


def bigram_score(tokens, eos=False):
    table = bigram_table()
    path = [0, *tokens] + [0] * eos
    return sum(float(table[a, b]) for a, b in zip(path, path[1:]))
