"""A toy language for tests of lattices: pieces, words with homophones, an n-gram, lattices without k2.
Knows: searches, graphs. Must not know: large language models, what is tested.
"""
from __future__ import annotations

import pytest
import torch

from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.lattice.k2_fsas import load_k2
from icefall_fusion.lattice.lattices import Lattices
from icefall_fusion.nbest import NBest
from icefall_fusion.text.tokens import AcousticTokens

try:
    load_k2()
    WHY_NO_K2 = ""
except Unavailable as reason:
    WHY_NO_K2 = str(reason)
needs_k2 = pytest.mark.skipif(bool(WHY_NO_K2), reason=WHY_NO_K2 or "k2 is there")

TOKENS = AcousticTokens.from_pieces(["<blk>", "▁a", "b", "▁c", "d"], blank_id=0)
ARPA = """\\data\\
ngram 1=8
ngram 2=4

\\1-grams:
-99 <s> -0.3
-1 </s>
-1.5 <unk>
-0.8 a -0.2
-0.9 ab -0.1
-1.0 c -0.3
-1.1 cd -0.4
-1.2 cdb -0.2

\\2-grams:
-0.5 <s> a
-0.4 a c
-0.3 c </s>
-0.6 ab cd

\\end\\
"""
WORDS = ["a", "ab", "c", "cd", "cdb"]


def log_probs(seed: int, batch: int, frames: int, pieces: int = TOKENS.size, sharpness: float = 2.0):
    """Return random [B,T,V]."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, frames, pieces, generator=generator) * sharpness).log_softmax(-1)


def ctc_lattices(emissions, lens, ids=None) -> Lattices:
    """Return the whole CTC lattices over pieces (the standard topology, nothing pruned), made without k2.

    A state is the label of the frame before: blank or a piece.
    """
    parts: dict[str, list] = {name: [] for name in ("source", "target", "label", "piece", "frame", "ctc")}
    counts = []
    for row, frames in enumerate(lens.tolist()):
        before = len(parts["source"])
        pieces = emissions.shape[2]
        states = {0: [(0, 0)]}  # of each frame: (state, last label)
        number = 1
        for frame in range(frames):
            states[frame + 1] = [(number + label, label) for label in range(pieces)]
            number += pieces
        for frame in range(frames):
            for source, last in states[frame]:
                for target, label in states[frame + 1]:
                    born = label if label and (label != last or source == 0) else 0
                    values = (source, target, label, born, frame, float(emissions[row, frame, label]))
                    for name, value in zip(parts, values):
                        parts[name].append(value)
        if frames:
            for source, _ in states[frames]:
                for name, value in zip(parts, (source, number, -1, 0, frames, 0.0)):
                    parts[name].append(value)
        counts.append(len(parts["source"]) - before)
    bounds = torch.tensor([0, *counts]).cumsum(0)
    ctc = torch.tensor(parts.pop("ctc"), dtype=torch.float32)
    tensors = {name: torch.tensor(values, dtype=torch.int64) for name, values in parts.items()}
    tensors["output"] = tensors["piece"].clone()
    names = ids or [str(row) for row in range(len(lens))]
    return Lattices(names, lens, bounds, ctc=ctc, hlg=torch.zeros_like(ctc), **tensors)


def assert_same_pieces(nbests: list[NBest], expected: list[NBest], tolerance: float) -> None:
    """Assert that lists hold the same piece sequences with the same CTC scores, in any order."""
    for nbest, other in zip(nbests, expected):
        scores = {tuple(h.tokens): h.scores["ctc"] for h in other}
        assert {tuple(h.tokens) for h in nbest} == set(scores)
        for h in nbest:
            assert h.scores["ctc"] == pytest.approx(scores[tuple(h.tokens)], abs=tolerance)
