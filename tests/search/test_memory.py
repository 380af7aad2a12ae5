"""What a search leaves in memory: nothing of an utterance, and a bounded cache of words.
Knows: tiny random language models, both searches. Must not know: trained models.
"""
from __future__ import annotations

import gc

import pytest
import torch

from icefall_fusion.fusion import DelayedFusion, retokenize
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search
from tests.fusion.test_fusion import emissions, llm, tokens  # noqa: F401 (fixtures)

WORDS = 20


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_nothing_grows_over_utterances(llm, tokens, engine, monkeypatch):  # noqa: F811
    monkeypatch.setattr(retokenize, "MOST_WORDS", WORDS)
    fusion, counts, words = DelayedFusion(llm, 0.4, 0.5), [], []
    for seed in range(12):
        log_probs, lens = emissions(batch=3, frames=30, seed=seed)
        ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=4, engine=engine), tokens, [fusion])
        del log_probs, lens
        counts.append(tensors())
        words.append(len(fusion._tokenizer._ids_of))
    assert counts[2:] == counts[2:3] * 10
    assert max(words) <= WORDS < fusion._tokenizer.misses
