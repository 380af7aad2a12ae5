"""Does a model score a random token tree as it scores plain text? Asked once, when a model is loaded.
Knows: a language model's tree and its slow twin. Must not know: transformers, search, fusion.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from icefall_fusion.lm.causal_lm import CausalLm

SEED = 7
ROUNDS = 3
TOLERANCE_FLOAT32 = 2e-4  # natural log a token
TOLERANCE_HALF = 0.2  # bfloat16 rounds a logit of 16 by 0.06; a wrong mask or position is off by more


def check_tree(lm: CausalLm) -> None:
    """Raise ValueError unless a random tree scores like plain forwards over each of its paths.

    The tree grows in three events with branches, dead ends and reused slots, in two utterances.
    """
    refusal = f"model {lm.name} cannot be used in a token tree"
    try:
        worst = _worst_difference(lm)
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{refusal}: {type(error).__name__}: {error}") from error
    full = {p.dtype for p in lm.model.parameters()} == {torch.float32}
    allowed = TOLERANCE_FLOAT32 if full else TOLERANCE_HALF
    if not worst <= allowed:  # also catches nan
        raise ValueError(
            f"{refusal}: its scores must differ from plain forwards by at most {allowed:g} a token, but "
            f"differ by {worst:.3g} (it ignores given positions or masks, as ALiBi models such as BLOOM do)"
        )


def _worst_difference(lm: CausalLm) -> float:
    """Return the largest difference between tree and plain scores, natural log a token."""
    rng = np.random.default_rng(SEED)
    prompts = [rng.integers(0, lm.vocab_size, size).tolist() for size in (1, 4)]
    scorer, eos = lm.open_tree(2, prompts), lm.eos_id is not None
    alive: list[list[list[int]]] = [[[]], [[]]]  # of each utterance: paths that may still grow
    worst = 0.0
    for _ in range(ROUNDS):
        alive = [_branch(paths, lm.vocab_size, rng) for paths in alive]
        nodes = [[scorer.insert(scorer.root(b), path) for path in paths] for b, paths in enumerate(alive)]
        found = scorer.score(nodes[0] + nodes[1], eos=eos).tolist()
        for b, paths in enumerate(alive):
            for path, tokens in zip(paths, lm.token_log_probs(paths, prompts[b], eos)):
                worst = max(worst, abs(found.pop(0) - sum(tokens)) / (len(path) + 1), key=_nan_last)
        alive = [paths[1::2] for paths in alive]
        scorer.keep([some[1::2] for some in nodes])
    return worst


def _branch(paths: list[list[int]], vocab_size: int, rng: np.random.Generator) -> list[list[int]]:
    """Return each path and two that continue it."""
    return [path + rng.integers(0, vocab_size, more).tolist() for path in paths for more in (0, 1, 3)]


def _nan_last(value: float) -> float:
    return float("inf") if value != value else value
