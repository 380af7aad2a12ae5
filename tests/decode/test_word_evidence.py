"""What speaks for each word: against values that are worked out by hand, and the LLM's own scores.
Knows: word_evidence. Must not know: how it becomes a probability.
"""
from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from icefall_fusion.decode.word_evidence import ACOUSTIC, NAMES, word_evidence
from icefall_fusion.lm import CausalLm
from icefall_fusion.nbest import Hypothesis, NBest
from icefall_fusion.text.tokens import AcousticTokens

TOKENS = AcousticTokens.from_pieces(["<blk>", "▁a", "b", "▁c", "▁d"], 0)


def nbest(*ranked: tuple[list[int], float]) -> NBest:
    return NBest("u", [Hypothesis(ids, TOKENS.decode(ids), {"total": total}) for ids, total in ranked])


def test_acoustic_evidence_is_that_of_the_best_alignment() -> None:
    """All alignments of a short utterance are tried; frames around a word go from word to word."""
    log_probs = (torch.randn(7, 5, generator=torch.Generator().manual_seed(3)) * 2).log_softmax(-1)
    pieces = [1, 2, 3]

    def collapse(path):
        return [p for p, _ in itertools.groupby(path) if p]

    paths = [p for p in itertools.product(range(5), repeat=7) if collapse(p) == pieces]
    best = max(paths, key=lambda path: sum(float(log_probs[t, p]) for t, p in enumerate(path)))
    own = [float(log_probs[t, p]) for t, p in enumerate(best)]
    peak = {p: max(value for value, q in zip(own, best) if q == p) for p in pieces}
    top = log_probs.amax(1).tolist()
    last_b, first_c = max(t for t, p in enumerate(best) if p == 2), best.index(3)
    found = word_evidence(nbest((pieces, -1.0)), log_probs, TOKENS)
    assert found.shape == (2, len(ACOUSTIC))
    one, two = (dict(zip(ACOUSTIC, row)) for row in found)
    assert one["piece_mean"] == pytest.approx((peak[1] + peak[2]) / 2, abs=1e-5)
    assert one["piece_least"] == pytest.approx(min(peak[1], peak[2]), abs=1e-5)
    assert two["piece_mean"] == two["piece_least"] == pytest.approx(peak[3], abs=1e-5)
    for word, around in ((one, range(first_c)), (two, range(last_b + 1, 7))):
        lost = sum(top[t] - own[t] for t in around)
        assert word["against"] == pytest.approx(np.log1p(lost), abs=1e-5)
        assert word["frames"] == pytest.approx(np.mean([top[t] for t in around]), abs=1e-5)
        assert word["utterance"] == pytest.approx(np.mean(top), abs=1e-5)
    assert (one["letters"], two["letters"]) == (pytest.approx(np.log(2)), 0.0)


def test_the_list_s_posterior_counts_all_hypotheses_that_have_the_word() -> None:
    log_probs = torch.zeros(6, 5).log_softmax(-1)
    ranked = ([1, 3], np.log(0.5)), ([1, 4], np.log(0.3)), ([4, 1, 3], np.log(0.2))
    odds = word_evidence(nbest(*ranked), log_probs, TOKENS)[:, 0]
    assert 1 / (1 + np.exp(-odds)) == pytest.approx([0.999, 0.7])  # "a" is in all: as sure as can be


def test_a_repeated_piece_and_no_words() -> None:
    log_probs = torch.full((5, 5), -9.0)
    for frame, piece in enumerate((1, 0, 1, 1, 0)):
        log_probs[frame, piece] = -0.01 - frame
    found = word_evidence(nbest(([1, 1], 0.0)), log_probs, TOKENS)
    assert found[:, 1] == pytest.approx([-0.01, -2.01])
    assert word_evidence(nbest(([], 0.0)), log_probs, TOKENS).shape == (0, len(ACOUSTIC))


def test_the_llm_scores_each_word_and_the_next(made) -> None:
    lm = CausalLm.from_pretrained(made["llm"])
    log_probs = torch.zeros(6, 5).log_softmax(-1)
    found = word_evidence(nbest(([1, 3, 4], 0.0)), log_probs, TOKENS, lm)
    assert found.shape == (3, len(NAMES))
    whole = [lm.log_prob(text) for text in ("a", "a c", "a c d")]
    each = np.diff([0.0, *whole])
    assert found[:, -2] == pytest.approx(each, abs=1e-3)
    assert found[:, -1] == pytest.approx([*each[1:], 0.0], abs=1e-3)
